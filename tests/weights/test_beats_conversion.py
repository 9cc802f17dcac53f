"""What surrounds the conversion of BEATs' pickle. The conversion itself needs torch: tests/parity/test_beats_checkpoint.py."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from avlm_jax.weights import beats
from avlm_jax.weights.beats import SCRIPT, ConversionError, convert_checkpoint


@pytest.fixture
def script() -> types.ModuleType:
    """The script as a module; it imports torch only when it comes to that."""
    spec = importlib.util.spec_from_file_location("beats_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "BEATs.pt").write_bytes(b"whatever")
    return tmp_path / "BEATs.pt"


def stand_in(folder: Path, *lines: str) -> Path:
    """A program in the place of Python."""
    python = folder / "python"
    python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    python.chmod(0o755)
    return python


def test_exit_codes_agree(script):
    assert (script.REFUSED, script.NO_TORCH) == (beats.SCRIPT_REFUSED, beats.SCRIPT_NO_TORCH)


def test_the_process_knows_nothing_of_this_ones_environment(tmp_path, file, monkeypatch):
    for name in (
        "HF_TOKEN",
        "https_proxy",
        "HTTP_PROXY",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.setenv(name, "secret")
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(
            file, tmp_path / "out", python=stand_in(tmp_path, 'env >&2; echo "$@" >&2; exit 2')
        )
    *variables, arguments = str(error.value).splitlines()
    names = {line.partition("=")[0] for line in variables}
    expected = {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
    of_the_shell = {"PWD", "OLDPWD", "SHLVL", "_"}
    of_the_system = {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT"}
    assert expected <= names <= expected | of_the_shell | of_the_system
    assert arguments == f"-I {SCRIPT} {file} {tmp_path / 'out'}"
    assert f"HOME={tmp_path / 'out'}" in variables


def test_a_conversion_that_takes_too_long_is_stopped(tmp_path, file):
    with pytest.raises(ConversionError, match="BEATs.pt: its conversion took more than 0 s and was stopped"):
        convert_checkpoint(file, tmp_path / "out", python=stand_in(tmp_path, "exec sleep 60"), timeout=0.2)


def test_a_file_that_changes_meanwhile(tmp_path, file):
    python = stand_in(tmp_path, 'echo \'{"source_sha256": "0"}\' > "$4/config.json"')
    with pytest.raises(ConversionError, match="changed while it was being converted"):
        convert_checkpoint(file, tmp_path / "out", python=python)


def test_a_crash_is_relayed(tmp_path, file):
    with pytest.raises(ConversionError, match="failed, exit code 7: something odd"):
        convert_checkpoint(
            file, tmp_path / "out", python=stand_in(tmp_path, "echo something odd >&2", "exit 7")
        )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "FOLDER: No space left on device"),
        (PermissionError(13, "Permission denied", "FOLDER/x"), "FOLDER/x: Permission denied"),
    ],
)
def test_a_disk_that_does_not_take_it(script, monkeypatch, capsys, error, message):
    def convert(*_):
        raise error

    monkeypatch.setattr(script, "convert", convert)
    monkeypatch.setattr(script, "give_up_network", lambda: None)
    monkeypatch.setattr(sys, "argv", ["beats_checkpoint.py", "BEATs.pt", "FOLDER"])
    assert script.main() == script.REFUSED
    assert capsys.readouterr().err == f"BEATs.pt: cannot be converted ({message})\n"


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121", "2.9.1"])
def test_an_old_torch_never_sees_the_file(script, monkeypatch, file, version):
    seen = []
    torch = types.SimpleNamespace(__version__=version, load=lambda *args, **kwargs: seen.append(args))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(ImportError, match=f"torch {version[:6]}.* CVE-2026-24747|torch .*CVE-2026-24747"):
        script.load(file)
    assert not seen
    torch.__version__ = "2.10.0"
    script.load(file)
    assert seen


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "gelu", [1, [2.0, "x"]], {"a": {"b": [None]}}])
def test_values_of_cfg_that_json_has(script, file, value):
    assert script.plain(file, "cfg['x']", value) == value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), r"cfg\['x'\] is nan \(float\)"),
        (b"raw", r"cfg\['x'\] is b'raw' \(bytes\)"),
        ([1, {"deep": {2}}], r"cfg\['x'\]\[1\]\['deep'\] is \{2\} \(set\)"),
        ({1: 2}, r"cfg\['x'\] is \{1: 2\} \(dict\)"),
        (1j, r"cfg\['x'\] is 1j \(complex\)"),
    ],
)
def test_values_of_cfg_that_json_lacks(script, file, value, where):
    with pytest.raises(script.Refused, match=f"BEATs.pt: {where}, which JSON cannot hold"):
        script.plain(file, "cfg['x']", value)


def test_the_network_is_given_up():
    unshare = shutil.which("unshare")  # util-linux's, as a second opinion on what this system allows
    ways = ([unshare, "--net", "true"], [unshare, "--user", "--net", "true"])
    if unshare is None or not any(subprocess.run(way, capture_output=True).returncode == 0 for way in ways):
        pytest.skip("this system lets no process of ours leave its network")
    code = (
        "import importlib.util, os, sys; "
        "spec = importlib.util.spec_from_file_location('script', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "before = os.readlink('/proc/self/ns/net'); module.give_up_network(); "
        "print(before != os.readlink('/proc/self/ns/net'))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code, SCRIPT], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_the_script_alone_says_how_it_is_used():
    result = subprocess.run([sys.executable, "-I", SCRIPT, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage: beats_checkpoint.py" in result.stdout
