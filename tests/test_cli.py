"""The command line: quick help, lazy imports, exit codes, and messages without tracebacks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avlm_jax import __version__, cli
from avlm_jax.config import ConfigError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], int]], None]:
    """Installs a verb `example` whose `run` is the given function."""

    def install(run: Callable[[Any], int]) -> None:
        module = types.ModuleType("example_verb", "Does an example.\n\nMore text.")
        module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=0)
        module.run = run
        monkeypatch.setitem(sys.modules, "example_verb", module)
        monkeypatch.setitem(cli.VERBS, "example", cli.Verb("example_verb", "an example"))

    return install


def test_help_lists_every_verb_and_imports_nothing_heavy(repository: Path) -> None:
    code = (
        "import sys; from avlm_jax.cli import main; code = main(['--help']); "
        "heavy = {'jax', 'numpy', 'flax', 'grain', 'av', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, entry in cli.VERBS.items():
        assert f"  {name} " in result.stdout and entry.summary in result.stdout


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_every_verb_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(cli.VERBS[name].module) is not None
    assert cli.main([name, "--help"]) == 0
    assert f"usage: avlm {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"avlm_jax {__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "right"), [("trian", "train"), ("evalute", "evaluate"), ("prep", "prepare")]
)
def test_an_unknown_verb_names_the_nearest(
    wrong: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([wrong]) == 2
    assert f"unknown verb {wrong!r}; did you mean {right!r}?" in capsys.readouterr().err


def test_no_verb_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: avlm <verb>" in capsys.readouterr().out


def test_the_verbs_code_is_the_exit_code(verb) -> None:
    verb(lambda args: args.count)
    assert cli.main(["example", "--count", "1"]) == 1
    assert cli.main(["example"]) == 0


def test_an_unknown_option_names_the_nearest(verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda args: 0)
    assert cli.main(["example", "--cuont=3"]) == 2
    assert "did you mean --count?" in capsys.readouterr().err


def test_a_user_error_is_one_line(verb, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> int:
        raise ConfigError("unknown config key 'a'; did you mean 'b'?")

    verb(run)
    assert cli.main(["example"]) == 2
    assert capsys.readouterr().err == "avlm example: unknown config key 'a'; did you mean 'b'?\n"
    assert cli.main(["example", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_file_is_one_line(verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda args: len(Path("no/such/file").read_text()))
    assert cli.main(["example"]) == 2
    assert capsys.readouterr().err == "avlm example: no/such/file: No such file or directory\n"


def test_a_defect_keeps_its_traceback(verb) -> None:
    verb(lambda args: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["example"])


def test_an_interrupt_leaves_with_130(verb, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> int:
        raise KeyboardInterrupt

    verb(run)
    assert cli.main(["example"]) == 130
    assert capsys.readouterr().err == "avlm example: interrupted\n"


def test_a_reader_that_has_enough_is_no_error(repository: Path) -> None:
    command = f'"{sys.executable}" -m avlm_jax --help | head -n 1; exit "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command], cwd=repository, capture_output=True, text=True)
    assert result.returncode in (0, cli.EXIT_BROKEN_PIPE) and result.stderr == ""
