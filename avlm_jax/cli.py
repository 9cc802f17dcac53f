"""The command line: `avlm <verb> ...`. A verb's module is imported only when the verb is called.

A verb's module has `add_arguments(parser)` and `run(args) -> int` (the exit code); the first paragraph of its
docstring is the verb's description, and `EPILOG`, where it has one, stands under its help as examples.

Exit codes: 0 all well; 1 something was rejected or failed though the rest went through; 2 unusable arguments,
configuration or input; 130 interrupted; 143 stopped by SIGTERM; 75 stuck, or another process is missing: start all again.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

from avlm_jax import __version__
from input_pipeline.errors import UserError

EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count it.
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE.


class Verb(NamedTuple):
    """A line of `avlm --help`: the module that does the work, and what it does."""

    module: str
    summary: str


VERBS: dict[str, Verb] = {
    "demo": Verb("avlm_jax.demo", "SAVEnVideo in ten minutes: records, four stages, a table of results"),
    "prepare": Verb(
        "input_pipeline.prepare_command", "decode media files and their conversations into records"
    ),
    "cache-features": Verb(
        "avlm_jax.cache_features", "run the frozen encoders once over records and keep their features"
    ),
    "train": Verb("avlm_jax.train", "run a configuration's stages; the same command continues a killed run"),
    "evaluate": Verb("avlm_jax.evaluate", "answer the questions of prepared records and score the answers"),
    "score": Verb("avlm_jax.score", "score a file of predictions"),
    "ask": Verb("avlm_jax.ask", "ask a question about one media file"),
    "import-weights": Verb("avlm_jax.import_weights", "check released weights and gather them in one folder"),
    "export": Verb(
        "avlm_jax.export", "a trained model as a folder for PyTorch: transformers, PEFT, one file"
    ),
    "preflight": Verb(
        "avlm_jax.preflight", "compile a training step for a TPU slice: does it fit, how long does it take"
    ),
    "doctor": Verb("avlm_jax.doctor", "check this installation: versions, devices, known traps"),
}

# Read when the libraries are first imported, hence set before any verb's module is. A user's own setting
# wins.
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's C++ log: errors stay, remarks about the CPU go.
    "GRPC_VERBOSITY": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # That PyTorch is not there is as it should be.
    "TOKENIZERS_PARALLELISM": "false",  # Otherwise it warns after every fork of a loader's worker.
}

# What a user can mend: the message names the file. Other OSErrors are defects and keep their traceback.
MENDABLE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
MENDABLE_NUMBERS = (errno.EROFS, errno.EBUSY, errno.EDQUOT)  # Read-only file system, mount point, quota.


def overview() -> str:
    """The text of `avlm --help`."""
    width = max(map(len, VERBS))
    lines = [
        "usage: avlm <verb> [options]",
        "",
        "Train and run video language models that see, hear and tell the time, in JAX.",
        "",
        "verbs:",
        *(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "options:",
        "  -h, --help   this text; `avlm <verb> --help` explains a verb and gives examples",
        "  --version    the version",
        "  --traceback  after a verb: show where in the code an error arose",
        "",
        "A newcomer starts with `avlm demo`; trouble with the installation is found by `avlm doctor`.",
    ]
    return "\n".join(lines)


def build_parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one verb, with the options every verb has."""
    parser = _Parser(
        prog=f"avlm {verb}",
        description=(module.__doc__ or VERBS[verb].summary).strip().split("\n\n")[0],
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # An abbreviation that works today would change its meaning with the next option.
    )
    module.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses `argv`; `--config.a.b=value` goes to `args.config_overrides` if the verb takes a `--config`."""
    overrides: list[str] = []
    rest: list[str] = []
    takes_config = any("--config" in action.option_strings for action in parser._actions)
    items = iter(argv)
    for item in items:
        if not (takes_config and item.startswith("--config.")):
            rest.append(item)
        elif "=" in item:
            overrides.append(item)
        else:
            value = next(items, None)
            if value is None:
                parser.error(f"{item} needs a value: {item}=value")
            overrides.append(f"{item}={value}")
    args = parser.parse_args(rest)
    args.config_overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `avlm` with `argv` (the process's own arguments by default) and returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _overview_or_verb(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `avlm ... | head` has read enough. Python flushes stdout on leaving and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _overview_or_verb(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else EXIT_UNUSABLE
    if argv[0] == "--version":
        print(f"avlm_jax {__version__}")
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"avlm: unknown verb {argv[0]!r}; {hint} (`avlm --help` explains them)", file=sys.stderr)
        return EXIT_UNUSABLE
    return _run_verb(argv[0], argv[1:])


def _run_verb(verb: str, argv: Sequence[str]) -> int:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        module = importlib.import_module(VERBS[verb].module)
        return module.run(parse_args(build_parser(verb, module), argv))
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error.
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(f"avlm {verb}: {stop.code}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"avlm {verb}: {stop if stop.args else 'interrupted'}", file=sys.stderr)
        code = getattr(stop, "exit_code", EXIT_INTERRUPTED)
        _tell_other_processes("leave", code)
        return code
    except Exception as error:
        message = _message(error)
        if message is None:
            _tell_other_processes("crash", traceback.format_exc())
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"avlm {verb}: {message}", file=sys.stderr)
        code = getattr(error, "exit_code", EXIT_UNUSABLE)
        _tell_other_processes("leave", code, message)
        return code


def _tell_other_processes(how: str, *what: object) -> None:
    """Where there are other processes of a run, they are told how this one ends, and it ends here."""
    multihost = sys.modules.get("avlm_jax.processes.multihost")
    if multihost is not None:  # Else no verb has begun a run.
        getattr(multihost, how)(*what)


def _message(error: Exception) -> str | None:
    """What to tell the user about an error they can mend; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MENDABLE) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in MENDABLE_NUMBERS:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; make some, then start the same command again"
    return None


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option when it is given an unknown one."""

    def error(self, message: str) -> NoReturn:
        _, found, unknown = message.partition("unrecognized arguments: ")
        if found:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown.split()[0].partition("=")[0], known, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)


if __name__ == "__main__":
    sys.exit(main())
