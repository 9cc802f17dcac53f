"""Decodes media files and their conversations into the records that training and evaluation read.

Files are decoded in worker processes under a time limit: one that hangs or crashes the decoder costs itself
alone. What cannot be used is listed with its reason in rejected.jsonl; the rest goes through. The work is
spread by Apache Beam: over this machine's cores by default, over a cluster with --runner.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from input_pipeline.decoding import worker_command
from input_pipeline.errors import UserError
from input_pipeline.manifest import (
    Listing,
    Rejection,
    list_files,
    list_folder,
    parse_lines,
    read_manifest,
)
from input_pipeline.media import Limits
from input_pipeline.media_config import SPEC_FIELDS, media_spec_from_config
from input_pipeline.paths import AnyPath, is_remote, to_path
from input_pipeline.plan import Plan, make_plan
from input_pipeline.records import (
    MANIFEST,
    REJECTED,
    SCHEMA_VERSION,
    RecordError,
    finish_records,
    finished_shard,
    shard_name,
)
from input_pipeline.spec import MediaSpec
from input_pipeline.working_folder import WorkingFolder

EPILOG = """\
what to prepare (one of):
  avlm prepare --folder my_videos --out records/mine
      every video, sound and picture below my_videos, without conversations: to be asked about or captioned
  avlm prepare one.mp4 two.wav --out records/two
      these files
  avlm prepare --manifest data/train.jsonl --out records/train --config configs/savenvideo.py:size=demo
      a manifest of JSON lines: {"id": "1", "video": "a.mp4", "conversations":
      [{"from": "human", "value": "<video>\\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]}
  avlm prepare --dataset audiocaps --annotations train.csv --media-root audiocaps/wav --out records/audiocaps
      a public data set in its own form; with --write-manifest FILE in place of --out, as a manifest to look at

after a kill, a crash or Ctrl-C:
  the same command again goes on with what is missing; finished shards wait in records/.train.partial.
  On finished records it does nothing. Files that were rejected are tried again with --overwrite.

on many machines (pip install 'avlm_jax[gcp]' for gs:// and Dataflow; Beam's own options stand behind --):
  avlm prepare --manifest gs://bucket/train.jsonl --out gs://bucket/records/train --runner DataflowRunner \\
      -- --project P --region us-central1 --temp_location gs://bucket/tmp --sdk_container_image IMAGE
  avlm prepare --manifest /shared/train.jsonl --out /shared/records/train --runner FlinkRunner \\
      -- --flink_master host:8081 --environment_type LOOPBACK
  The machines need this package, by an image with it or --setup_file ./setup.py, and see the same paths.

exit codes:
  0 all went through; 1 something is listed in rejected.jsonl, the rest went through; 2 nothing could be done;
  130 interrupted, the same command goes on
"""

DEFAULT_TIMEOUT = 120.0  # s per file; an hour of 1080p H.264 takes about a minute on one core.
LOCAL_RUNNER, DATAFLOW_RUNNER = "DirectRunner", "DataflowRunner"
PLAN_FILE = "plan.msgpack"  # in the working folder
SHOWN_REJECTIONS = 10  # lines of the summary; all are in rejected.jsonl


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What a run did.

    Attributes:
        manifest_lines: lines or files asked for.
        records, samples: written.
        rejected: one entry per line that did not come through, as in rejected.jsonl.
        ignored: files of a folder that are no media by their suffix.
        seconds: wall time; `record_bytes`: size of the records.
        resumed: shards that an earlier, killed run had finished.
        up_to_date: the records were there already, and nothing was done.
    """

    out_dir: str
    manifest_lines: int
    records: int
    samples: int
    rejected: list[Rejection]
    ignored: list[str]
    seconds: float
    record_bytes: int
    resumed: int = 0
    up_to_date: bool = False

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
        if self.resumed:
            lines.append(f"{self.resumed} shards were there from an earlier run")
        if self.up_to_date:
            again = "; --overwrite tries what was rejected again" if self.rejected else ""
            lines.append(f"the records are up to date, nothing was done{again}")
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
    runner: str = LOCAL_RUNNER,
    beam_options: Sequence[str] = (),
) -> PrepareReport:
    """Makes a folder of records; the same input gives the same bytes, however many work on it.

    A run that was killed is taken up by another with the same arguments; one on finished records does
    nothing.

    Args:
        lines: a Listing, or native manifest lines as objects (see manifest.py).
        out_dir: folder to create; it appears when everything is done, so a killed run leaves none.
        spec: how the media become arrays.
        media_root, source: for lines given as objects: what paths are relative to, and the default "source".
        workers: decoding processes of the local runner; default one per core.
        timeout: seconds one file may take.
        limits: what one file may ask for; default `Limits()`.
        overwrite: replace records that are in `out_dir`.
        label: in front of the progress bar.
        runner: a Beam runner; the default works on this machine.
        beam_options: Beam's own options, ["--project=p", ...].

    Raises:
        RecordError: `out_dir` is taken.
        UserError: `workers` is less than 1, or the runner cannot run or reach the files.
    """
    began = time.monotonic()
    listing = lines if isinstance(lines, Listing) else parse_lines(lines, media_root, source=source)
    workers, limits = _default_workers() if workers is None else workers, limits or Limits()
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if runner == DATAFLOW_RUNNER:
        _check_remote(out_dir, listing)
    job = {"spec": dataclasses.asdict(spec), "limits": dataclasses.asdict(limits)}
    rejections = [dataclasses.asdict(rejection) for rejection in listing.rejections]
    settings = {**job, "timeout": timeout, "schema_version": SCHEMA_VERSION, "rejections": rejections}
    plan = make_plan(listing.lines, settings)
    resumed = 0
    with WorkingFolder(out_dir, plan.sha256, overwrite=overwrite) as folder:
        up_to_date = folder.finished is not None and not overwrite
        if up_to_date:
            folder.discard()
        elif folder.complete is None:
            resumed = _make_shards(
                plan,
                folder.path,
                job,
                timeout,
                workers=workers,
                runner=runner,
                beam_options=beam_options,
                label=label,
            )
            finish_records(
                folder.path,
                spec,
                _entries(folder.path, plan),
                plan=plan.sha256,
                manifest_lines=listing.count,
                rejected=rejections,
            )
        if not up_to_date:
            folder.put_in_place()
    manifest = json.loads((to_path(out_dir) / MANIFEST).read_text())
    return PrepareReport(
        out_dir=os.fspath(out_dir),
        manifest_lines=listing.count,
        records=manifest["counts"]["records"],
        samples=manifest["counts"]["samples"],
        rejected=_read_rejections(out_dir),
        ignored=listing.ignored,
        seconds=time.monotonic() - began,
        record_bytes=sum(shard["bytes"] for shard in manifest["shards"]),
        resumed=resumed,
        up_to_date=up_to_date,
    )


def _make_shards(
    plan: Plan, folder: AnyPath, job: Mapping[str, Any], timeout: float, *, workers: int, **options: Any
) -> int:
    """Makes the shards that are not there; returns how many were. `options` are `run_pipeline`'s."""
    plan_file = folder / PLAN_FILE
    if not plan_file.exists():
        plan.write(plan_file)
    if not plan.shards:
        return 0
    from input_pipeline.pipeline import Work, run_pipeline  # Beam takes a second to import.

    work = Work(
        folder=os.fspath(folder),
        plan_file=os.fspath(plan_file),
        num_shards=len(plan.shards),
        job=dict(job),
        timeout=timeout,
        command=worker_command,
    )
    return run_pipeline(work, plan.shards, num_media=len(plan.groups), workers=workers, **options)


def _entries(folder: AnyPath, plan: Plan) -> list[dict[str, Any]]:
    """The entries of all shards, in order; every line that was planned is in them, as what it became."""
    entries = []
    for shard in plan.shards:
        entry = finished_shard(folder, shard.index, len(plan.shards), verify=False)
        if entry is None:
            name = shard_name(shard.index, len(plan.shards))
            raise RecordError(f"{folder / name} was not made or is damaged; the same command makes it again")
        entries.append(entry)
    num_lines = sum(map(len, plan.groups))
    found = sum(entry["samples"] + entry["media_only"] + entry["rejected"] for entry in entries)
    if found != num_lines:
        raise AssertionError(f"{num_lines} lines were planned, but {found} are accounted for in {folder}")
    return entries


def _read_rejections(out_dir: str | os.PathLike[str]) -> list[Rejection]:
    text = (to_path(out_dir) / REJECTED).read_text(encoding="utf-8")
    return [Rejection(**json.loads(line)) for line in text.split("\n") if line]


def _check_remote(out_dir: str | os.PathLike[str], listing: Listing) -> None:
    local = [
        path for path in (os.fspath(out_dir), *(line.path for line in listing.lines)) if not is_remote(path)
    ]
    if local:
        raise UserError(
            f"--runner {DATAFLOW_RUNNER}: its machines cannot reach {local[0]}; copy the media with "
            "`gcloud storage cp --recursive` and name gs:// paths for them and for --out"
        )


def _default_workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The command
# ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `avlm prepare`."""
    limits = Limits()
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="media files to prepare; options of Beam may follow, behind -- (FILEs stand right before it)",
    )
    parser.add_argument(
        "--manifest", metavar="JSONL", help="manifest of JSON lines: media with conversations"
    )
    parser.add_argument("--folder", metavar="DIR", help="prepare every media file below this folder")
    parser.add_argument(
        "--dataset", metavar="NAME", help="a public data set, whose files --annotations names"
    )
    parser.add_argument("--annotations", metavar="FILE", help="the data set's annotations, as published")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of records to create, local or gs://bucket/folder"
    )
    parser.add_argument(
        "--write-manifest",
        metavar="FILE",
        help="write what would be prepared as a manifest of JSON lines, and stop; no --out",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace records that are in --out")
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that the manifest's or the data set's paths are relative to (the folder of that file)",
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
        help="decoding processes on this machine (one per core)",
    )
    parser.add_argument(
        "--runner",
        default=LOCAL_RUNNER,
        metavar="NAME",
        help="of Beam: %(default)s (this machine), DataflowRunner, FlinkRunner, SparkRunner, ... "
        "(%(default)s); its options stand behind --",
    )
    # --audio-backend belongs here, and into `settings` and `job` of `prepare`.
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
    files, beam_options = _split_files(args.files)
    listing = _list(args, files)
    if args.write_manifest:
        return _write_manifest(args, listing)
    if not args.out:
        raise UserError("say with --out DIR where the records shall be")
    if args.timeout <= 0:
        raise UserError(f"--timeout is {args.timeout:g}; it must be positive seconds")
    report = prepare(
        listing,
        args.out,
        _media_spec(args),
        workers=args.workers,
        timeout=args.timeout,
        limits=Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels, max_duration=args.max_duration),
        overwrite=args.overwrite,
        runner=args.runner,
        beam_options=beam_options,
    )
    print(report.summary())
    return report.exit_code


def _split_files(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files, and what stood behind `--`: argparse lets nothing else that begins with -- through to here."""
    first = next((i for i, name in enumerate(files) if name.startswith("--")), len(files))
    return list(files[:first]), list(files[first:])


def _list(args: argparse.Namespace, files: Sequence[str]) -> Listing:
    asked = {
        "files": files,
        "--manifest": args.manifest,
        "--folder": args.folder,
        "--dataset": args.dataset,
    }
    chosen = [name for name, value in asked.items() if value]
    if len(chosen) != 1:
        got = f"not {' and '.join(chosen)}" if chosen else "none was given"
        raise UserError(f"say what to prepare with one of --manifest, --folder, --dataset or files; {got}")
    if bool(args.dataset) != bool(args.annotations):
        raise UserError("--dataset NAME and --annotations FILE belong together")
    if args.dataset:
        from input_pipeline.annotations import import_annotations

        root = args.media_root or os.path.dirname(args.annotations) or "."
        return import_annotations(args.dataset, args.annotations, root)
    if args.manifest:
        return read_manifest(args.manifest, args.media_root)
    return list_folder(args.folder) if args.folder else list_files(files)


def _media_spec(args: argparse.Namespace) -> MediaSpec:
    changed = getattr(args, "config_overrides", [])
    if changed and not args.config:
        raise UserError(f"{changed[0]}: name the configuration it changes with --config")
    spec = media_spec_from_config(args.config, changed) if args.config else MediaSpec()
    overrides = {name: getattr(args, name, None) for name in SPEC_FIELDS}
    try:
        return dataclasses.replace(
            spec, **{name: value for name, value in overrides.items() if value is not None}
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _write_manifest(args: argparse.Namespace, listing: Listing) -> int:
    if args.out:
        raise UserError("--write-manifest writes no records; leave out --out, or prepare the manifest after")
    from input_pipeline.manifest import write_manifest

    write_manifest(listing, args.write_manifest)
    print(f"{len(listing.lines)} lines in {args.write_manifest}")
    for rejection in listing.rejections[:SHOWN_REJECTIONS]:
        print(f"  rejected: {rejection.path} [{rejection.id}]: {rejection.reason}")
    if listing.rejections:
        print(f"{len(listing.rejections)} of {listing.count} lines rejected")
    return 1 if listing.rejections else 0


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
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells count it


if __name__ == "__main__":
    # By its full name: what travels to Beam's machines must not be called __main__ there.
    from input_pipeline.prepare import main as _main

    sys.exit(_main())
