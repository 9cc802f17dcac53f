"""Decodes media files and their conversations into the records that training and evaluation read.

Files are decoded in worker processes under a time limit: one that hangs or crashes the decoder costs itself
alone. What cannot be used is listed with its reason in rejected.jsonl; the rest goes through.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import functools
import importlib.util
import os
import queue
import signal
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack

from input_pipeline.errors import UserError
from input_pipeline.manifest import (
    Listing,
    MediaLine,
    Rejection,
    group_by_media,
    list_files,
    list_folder,
    parse_lines,
    read_manifest,
)
from input_pipeline.media import Limits, MediaError, load_media
from input_pipeline.progress import track
from input_pipeline.records import REJECTED, RecordWriter, encode_record
from input_pipeline.spec import MediaSpec
from input_pipeline.workers import Worker, WorkerFailure, send

EPILOG = """\
examples:
  avlm prepare --folder my_videos --out records/mine
      every video, sound and picture below my_videos, without conversations: to be asked about or captioned
  avlm prepare --manifest data/train.jsonl --out records/train --config configs/savenvideo.py:size=demo
      a manifest of JSON lines: {"id": "1", "video": "a.mp4", "conversations":
      [{"from": "human", "value": "<video>\\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]}
  avlm prepare one.mp4 two.wav --out records/two

exit codes:
  0 all went through; 1 something is listed in rejected.jsonl, the rest went through; 2 nothing could be done
"""

DEFAULT_TIMEOUT = 120.0  # s per file; an hour of 1080p H.264 takes about a minute on one core.
SELF_DESTRUCT_MARGIN = 5.0  # s after the limit at which a worker ends itself, should its parent be gone.
SHOWN_REJECTIONS = 10  # lines of the summary; all are in rejected.jsonl


def prepare_one(
    lines: Sequence[MediaLine], spec: MediaSpec, limits: Limits | None = None
) -> bytes | Rejection:
    """Decodes one media file and packs it with its conversations: a pure function of the file.

    Args:
        lines: all lines on one file (same path and kind, see `group_by_media`).
        spec: how the media become arrays.
        limits: what a file may ask for.

    Returns:
        A record (see records.py), or why there is none.
    """
    first = lines[0]
    try:
        media = load_media(first.path, spec, kind=first.kind, limits=limits)
    except MediaError as error:
        return Rejection(first.path, first.id, error.reason, error.stage)
    samples = [line.sample() for line in lines if line.conversations is not None]
    return encode_record(media, media_id=first.name, source=first.source, samples=samples)


def worker_command() -> list[str]:
    """Command of a worker that runs `prepare_one`; works from a source tree as well as installed."""
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from input_pipeline.prepare import serve; serve()"
    return [sys.executable, "-c", code]


def serve() -> None:
    """A worker's life: jobs from stdin, answers to stdout, until stdin ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    send(answers, b"")
    jobs = sys.stdin.buffer
    while header := jobs.read(8):
        job = msgpack.unpackb(jobs.read(struct.unpack("<Q", header)[0]))
        if hasattr(signal, "setitimer"):  # SIGALRM's default action ends even a process stuck in C code
            signal.setitimer(signal.ITIMER_REAL, job["timeout"] + SELF_DESTRUCT_MARGIN)
        lines = [MediaLine(**line) for line in job["lines"]]
        try:
            result = prepare_one(lines, MediaSpec(**job["spec"]), Limits(**job["limits"]))
        except Exception as error:  # a defect of this program, or no memory: one file's, not the run's
            reason = f"unexpected {type(error).__name__}: {error}"
            result = Rejection(lines[0].path, lines[0].id, reason, "crash")
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        answer = (
            {"record": result} if isinstance(result, bytes) else {"rejection": dataclasses.asdict(result)}
        )
        send(answers, msgpack.packb(answer))


# The whole run
# -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What a run did.

    Attributes:
        manifest_lines: lines or files asked for.
        records, samples: written.
        rejected: one entry per line that did not come through, as in rejected.jsonl.
        ignored: files of a folder that are no media by their suffix.
        seconds: wall time; `record_bytes`: size of the records.
    """

    out_dir: str
    manifest_lines: int
    records: int
    samples: int
    rejected: list[Rejection]
    ignored: list[str]
    seconds: float
    record_bytes: int

    @property
    def exit_code(self) -> int:
        return 1 if self.rejected else 0

    def summary(self) -> str:
        """One screen for a person."""
        rate = f", {self.record_bytes / self.records / 2**20:.2f} MiB each" if self.records else ""
        lines = [
            f"{self.records} records with {self.samples} conversations in {self.out_dir} "
            f"({self.seconds:.1f} s{rate})"
        ]
        if self.ignored:
            few = ", ".join(self.ignored[:3]) + (", ..." if len(self.ignored) > 3 else "")
            lines.append(f"{len(self.ignored)} files ignored, no media by their suffix: {few}")
        if self.rejected:
            stages = collections.Counter(rejection.stage for rejection in self.rejected)
            counts = ", ".join(f"{count} {stage}" for stage, count in sorted(stages.items()))
            lines.append(f"{len(self.rejected)} of {self.manifest_lines} lines rejected ({counts}):")
            for rejection in self.rejected[:SHOWN_REJECTIONS]:
                name = f" [{rejection.id}]" if rejection.id else ""
                lines.append(f"  {rejection.path}{name}: {rejection.reason}")
            if len(self.rejected) > SHOWN_REJECTIONS:
                lines.append(f"  ... all of them: {os.path.join(self.out_dir, REJECTED)}")
        return "\n".join(lines)


def prepare(
    lines: Listing | Iterable[Mapping[str, Any]],
    out_dir: str | os.PathLike[str],
    spec: MediaSpec,
    *,
    media_root: str | os.PathLike[str] = ".",
    source: str = "",
    workers: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    limits: Limits | None = None,
    overwrite: bool = False,
    label: str = "prepare",
) -> PrepareReport:
    """Makes a folder of records; the same input gives the same bytes, whatever the number of workers.

    Args:
        lines: a Listing, or native manifest lines as objects (see manifest.py).
        out_dir: folder to create; it appears when everything is done, so a killed run leaves none.
        spec: how the media become arrays.
        media_root, source: for lines given as objects: what paths are relative to, and the default "source".
        workers: decoding processes; default one per core. 0 decodes in this process, without a time limit.
        timeout: seconds one file may take.
        limits: what one file may ask for; default `Limits()`.
        overwrite: replace records that are in `out_dir`.
        label: in front of the progress bar.

    Raises:
        RecordError: `out_dir` is taken.
    """
    began = time.monotonic()
    listing = lines if isinstance(lines, Listing) else parse_lines(lines, media_root, source=source)
    limits = limits or Limits()
    groups = group_by_media(listing.lines)
    rejected = list(listing.rejections)
    with RecordWriter(out_dir, spec, overwrite=overwrite) as writer:
        results = _results(groups, spec, limits, _default_workers() if workers is None else workers, timeout)
        # The bar counts a file when its record is asked for; closing the pool on the way out is the
        # generator's.
        for group, result in zip(
            groups, track(results, total=len(groups), label=label, unit="file"), strict=True
        ):
            if isinstance(result, bytes):
                writer.add(result)
            else:
                rejected.extend(dataclasses.replace(result, id=line.id) for line in group)
        manifest = writer.finish(
            manifest_lines=listing.count, rejected=[dataclasses.asdict(rejection) for rejection in rejected]
        )
    return PrepareReport(
        out_dir=os.fspath(out_dir),
        manifest_lines=listing.count,
        records=manifest["counts"]["records"],
        samples=manifest["counts"]["samples"],
        rejected=rejected,
        ignored=listing.ignored,
        seconds=time.monotonic() - began,
        record_bytes=sum(shard["bytes"] for shard in manifest["shards"]),
    )


def _results(
    groups: Sequence[Sequence[MediaLine]], spec: MediaSpec, limits: Limits, workers: int, timeout: float
) -> Iterator[bytes | Rejection]:
    """`prepare_one` of every group, in order."""
    if workers <= 0:
        yield from (prepare_one(group, spec, limits) for group in groups)
        return
    pool = [Worker(worker_command()) for _ in range(min(workers, len(groups)))]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)
    common = {"spec": dataclasses.asdict(spec), "limits": dataclasses.asdict(limits), "timeout": timeout}

    def run(group: Sequence[MediaLine]) -> bytes | Rejection:
        worker = idle.get()
        try:
            job = msgpack.packb({**common, "lines": [dataclasses.asdict(line) for line in group]})
            answer = msgpack.unpackb(worker.run(job, timeout))
        except WorkerFailure as failure:
            return Rejection(group[0].path, group[0].id, failure.reason, failure.stage)
        finally:
            idle.put(worker)
        return answer["record"] if "record" in answer else Rejection(**answer["rejection"])

    # A few results may wait for their turn; a record is some megabytes.
    executor, pending = ThreadPoolExecutor(len(pool) or 1), collections.deque()
    try:
        for group in groups:
            pending.append(executor.submit(run, group))
            if len(pending) > 4 * len(pool):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    # also on Ctrl-C and errors: a thread that waits for a worker gets its answer when that is stopped
    finally:
        for future in pending:
            future.cancel()
        for worker in pool:
            worker.stop()
        executor.shutdown()
        for worker in pool:
            worker.join()


def _default_workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The command
# ---------------------------------------------------------------------------------------------------------


@functools.cache
def _spec_fields() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(MediaSpec))


def media_spec_from_config(name: str, overrides: Sequence[str] = ()) -> MediaSpec:
    """The MediaSpec in `config.media` of a configuration file, `path.py[:arguments]`.

    Args:
        name: of the configuration.
        overrides: strings `--config.media.key=value`; nothing else of a configuration is used here.

    Raises:
        UserError: no such file, it has no `get_config` or no `media`, or media has an unknown or unusable
            field; an override of anything else.
    """
    path, separator, arguments = name.partition(".py:")
    path = path + ".py" if separator else name
    if not Path(path).is_file():
        raise UserError(f"--config {name}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("avlm_prepare_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config {name}: {path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {name}: {path} defines no get_config(arg)")
    config = module.get_config(arguments)
    if "media" not in config:
        raise UserError(f"--config {name}: the configuration has no section media")
    fields = dict(config["media"])
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        if not key.startswith("media."):
            raise UserError(f"{override}: `avlm prepare` reads the section media only; leave it out")
        fields[key.removeprefix("media.")] = int(value) if value.isdecimal() else value
    for key in fields:
        if key not in _spec_fields():
            near = difflib.get_close_matches(key, _spec_fields(), 1, 0.0)
            raise UserError(f"--config {name}: media.{key} is unknown; did you mean media.{near[0]}?")
    try:
        return MediaSpec(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"--config {name}: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `avlm prepare`."""
    limits = Limits()
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="media files to prepare, instead of the next two"
    )
    parser.add_argument(
        "--manifest", metavar="JSONL", help="manifest of JSON lines: media with conversations"
    )
    parser.add_argument("--folder", metavar="DIR", help="prepare every media file below this folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of records to create")
    parser.add_argument("--overwrite", action="store_true", help="replace records that are in --out")
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that the manifest's paths are relative to (its own folder)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH[:ARGS]",
        help="configuration whose section media says how many frames and audio windows are kept and how "
        "large, e.g. configs/savenvideo.py:size=demo; models with another section media cannot use the "
        "records (default: the paper's, 16 frames of 384 x 384)",
    )
    for name in ("num_frames", "image_size", "window_frames", "max_windows"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"overrides media.{name}"
        )
    parser.add_argument("--sampler", choices=("midpoint", "linspace"), help="overrides media.sampler")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="decoding processes (one per core); 0: in this process, no time limit",
    )
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="S", help="seconds per file (%(default)g)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=limits.max_bytes, metavar="N", help="largest file (%(default)d)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=limits.max_pixels, metavar="N", help="largest picture (%(default)d)"
    )
    parser.add_argument(
        "--max-duration",
        type=float,
        default=limits.max_duration,
        metavar="S",
        help="longest media (%(default)g s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `avlm prepare`; returns its exit code. Raises UserError for unusable arguments."""
    chosen = [name for name in ("files", "manifest", "folder") if getattr(args, name)]
    if len(chosen) != 1:
        got = f"not {' and '.join(chosen)}" if chosen else "none was given"
        raise UserError(f"say what to prepare with one of --manifest, --folder or files; {got}")
    if args.timeout <= 0:
        raise UserError(f"--timeout is {args.timeout:g}; it must be positive seconds")
    changed = getattr(args, "config_overrides", [])
    if changed and not args.config:
        raise UserError(f"{changed[0]}: name the configuration it changes with --config")
    spec = media_spec_from_config(args.config, changed) if args.config else MediaSpec()
    overrides = {name: getattr(args, name, None) for name in _spec_fields()}
    try:
        spec = dataclasses.replace(
            spec, **{name: value for name, value in overrides.items() if value is not None}
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.manifest:
        listing = read_manifest(args.manifest, args.media_root)
    else:
        listing = list_folder(args.folder) if args.folder else list_files(args.files)
    report = prepare(
        listing,
        args.out,
        spec,
        workers=args.workers,
        timeout=args.timeout,
        limits=Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels, max_duration=args.max_duration),
        overwrite=args.overwrite,
    )
    print(report.summary())
    return report.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m input_pipeline.prepare`, for machines without the avlm command (Beam workers)."""
    parser = argparse.ArgumentParser(
        "prepare", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
