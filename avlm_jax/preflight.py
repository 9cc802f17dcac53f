"""Compiles the real training step for a TPU slice nobody has rented yet: does it fit, what moves, how long does a step take.

It runs on any Linux machine, without a TPU, weights, records or a tokenizer.

Exit code 0: every stage fits; 1: one does not; 2: unusable arguments or configuration. With --table 0 means that the table is
written; which stages fit stands in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlm_jax.aot.topologies import EXAMPLES, parse_slice, prepare_environment
from avlm_jax.config import add_config_arguments, config_from_args
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EPILOG = """examples:
  avlm preflight --config configs/savenvideo.py:size=7b,stage=2a --topology v5e:16x16
  avlm preflight --config configs/savenvideo.py:size=7b,stage=2a --topology v6e-8 --search --workdir runs/preflight
  avlm preflight --config configs/savenvideo.py:size=7b,stage=2a --topology v5p-8 --slices 2 --mesh data=2,fsdp=4 \\
      --rows-per-chip 8 --config.model.llm.remat=minimal --json
  avlm preflight --config configs/savenvideo.py:size=7b --table launch/SLICES.md --workdir runs/preflight
"""
AXES = ("data", "fsdp", "tensor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm preflight`'s arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--topology", metavar="SLICE", help=f"a TPU slice by its shape or as it is rented: {EXAMPLES}"
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="so many of them, joined by the data-centre network (default 1)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        type=read_mesh,
        default={},
        help="sizes of data, fsdp, tensor in place of config.mesh's; one may be -1",
    )
    parser.add_argument(
        "--rows-per-chip",
        type=int,
        metavar="N",
        help="rows of text that a device takes at a time, in place of the stage's rows_per_device; 0: all at once",
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help="text positions, in place of the stage's max_length"
    )
    parser.add_argument(
        "--samples",
        type=float,
        default=0.0,
        metavar="N",
        help="also tell how many hours so many samples take",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try rows per chip and remat policies, and name the fastest that fits",
    )
    parser.add_argument(
        "--table",
        metavar="FILE",
        help="write the table of every stage on v5e, v5p and v6e slices there (Markdown)",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="keep what was compiled here; the same command then goes on where it stopped",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when everything fits."""
    config = config_from_args(args)
    if bool(args.topology) == bool(args.table):
        raise UserError(f"name one of --topology SLICE ({EXAMPLES}) and --table FILE")
    if args.table:
        _refuse_beside_table(args)
    if args.rows_per_chip is not None and args.rows_per_chip < 0:
        raise UserError(
            f"--rows-per-chip is {args.rows_per_chip}; it must be at least 1, or 0 for all rows at once"
        )
    slice_ = parse_slice(args.topology, args.slices) if args.topology else None
    prepare_environment()
    if args.table:
        from avlm_jax.aot.slices import write_table

        path = write_table(config, args.config, Path(args.table), cache_folder(args.workdir), progress)
        print(f"wrote {path}")
        return 0
    return check_stages(config, args, slice_)


def _refuse_beside_table(args: argparse.Namespace) -> None:
    given = {
        "--slices": args.slices != 1,
        "--mesh": bool(args.mesh),
        "--rows-per-chip": args.rows_per_chip is not None,
        "--length": args.length is not None,
        "--samples": bool(args.samples),
        "--search": args.search,
        "--json": args.json,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise UserError(
            f"leave {', '.join(names)} away: --table takes its own slices, and meshes, rows and lengths from the "
            "configuration (--config.stage.2a.rows_per_device=..., --config.mesh.tensor=...)"
        )


def check_stages(config: ConfigDict, args: argparse.Namespace, slice_: Any) -> int:
    """Compiles each stage of the configuration on one slice and prints what was found."""
    from avlm_jax.aot.compiled import compile_step, prepare
    from avlm_jax.aot.report import format_report, make_report
    from avlm_jax.aot.search import best, format_trials, search

    cache = cache_folder(args.workdir)
    found, fits = [], True
    for name in config.stages:
        options = {"mesh": args.mesh, "length": args.length}
        if args.search:
            rows = None if args.rows_per_chip is None else (args.rows_per_chip,)
            trials = search(config, name, slice_, rows=rows, cache=cache, progress=progress, **options)
            chosen = best(trials)
            fits = fits and chosen is not None
            entry = {"trials": [trial.to_dict() for trial in trials]}
            if not args.json:
                print(format_trials(trials), flush=True)
            if chosen is None:
                found.append({"stage": name, "slice": slice_.name, "fits": False, **entry})
                continue
            report = chosen.report
        else:
            setup = prepare(config, name, slice_, rows=args.rows_per_chip, **options)
            report = make_report(setup, compile_step(setup, cache=cache, progress=progress))
            fits, entry = fits and report.memory.fits, {}
        found.append({**report.to_dict(args.samples), **entry})
        if not args.json:
            print(format_report(report, args.samples) + "\n", flush=True)
    if args.json:
        print(json.dumps({"fits": fits, "stages": found}, indent=2))
    return 0 if fits else 1


def read_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" as {"data": 2, "fsdp": 4}."""
    sizes: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        axis, _, number = item.partition("=")
        if axis not in AXES or axis in sizes or not number.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"{item!r} is not one of data=N, fsdp=N, tensor=N, each at most once"
            )
        sizes[axis] = int(number)
    return sizes


def cache_folder(workdir: str | None) -> Path | None:
    """Where compiled programs' figures are kept; None without a --workdir."""
    if workdir is None:
        return None
    folder = Path(workdir) / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what is going on; on a terminal with the seconds so far, which a compiler does not tell."""
    begun, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\r{what}: {time.monotonic() - begun:.0f} s ", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stderr.isatty():
        ticker.start()
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        done.set()
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{what}: {time.monotonic() - begun:.0f} s ", file=sys.stderr, flush=True)
