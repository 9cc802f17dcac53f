"""Decodes media files and their conversations into the records that training and evaluation read.

Files are decoded in worker processes under a time limit: one that hangs or crashes the decoder costs itself
alone. What cannot be used is listed with its reason in rejected.jsonl; the rest goes through. The work is
spread by Apache Beam: over this machine's cores by default, over a cluster with --runner.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence

from input_pipeline.annotations import DATASETS, describe_dataset, describe_datasets, import_annotations
from input_pipeline.errors import UserError
from input_pipeline.manifest import (
    Listing,
    list_files,
    list_folder,
    read_manifest,
    write_manifest,
)
from input_pipeline.media import Limits
from input_pipeline.media_config import SPEC_FIELDS, media_spec_from_config
from input_pipeline.prepare import DEFAULT_TIMEOUT, LOCAL_RUNNER, SHOWN_REJECTIONS, prepare
from input_pipeline.spec import MediaSpec
from input_pipeline.tfio_audio import tfio_python

EPILOG = """\
what to prepare (one of):
  avlm prepare --folder my_videos --out records/mine
      every video, sound and picture below my_videos, without conversations: to be asked about or captioned
  avlm prepare one.mp4 two.wav --out records/two
      these files
  avlm prepare --manifest data/train.jsonl --out records/train --config configs/savenvideo.py:size=demo
      a manifest of JSON lines: {"id": "1", "video": "a.mp4", "conversations":
      [{"from": "human", "value": "<video>\\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]}
  avlm prepare --dataset vggsound --annotations vggsound.csv --media-root vggsound/video --out records/vggsound \\
      --dataset-option split=train
      a public data set in its own form; with --write-manifest FILE in place of --out, as a manifest to look at.
      Ten million rows take 13 GB of memory on the machine that starts this; divide larger files.
      avlm prepare --describe-dataset vggsound tells what that importer reads and which options it has

after a kill, a crash or Ctrl-C:
  the same command again goes on with what is missing; finished shards wait in records/.train.partial.
  On finished records it does nothing. Files that were rejected are tried again with --overwrite.
  With gs:// a run that was killed (not by Ctrl-C) may leave a shard of each process in $TMPDIR/avlm-*.

on many machines (pip install 'avlm_jax[gcp]' for gs:// and Dataflow; Beam's own options stand behind --):
  avlm prepare --manifest gs://bucket/train.jsonl --out gs://bucket/records/train --runner DataflowRunner \\
      -- --project P --region us-central1 --temp_location gs://bucket/tmp --sdk_container_image IMAGE
  avlm prepare --manifest /shared/train.jsonl --out /shared/records/train --runner FlinkRunner \\
      -- --flink_master host:8081 --environment_type LOOPBACK
  The machines need this package, by an image with it or --setup_file ./setup.py, and see the same paths.

exit codes:
  0 all went through; 1 something is listed in rejected.jsonl, the rest went through; 2 nothing could be done,
  or a full disk or a bucket that cannot be read ended the run; 130 interrupted. The same command goes on
"""


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
        "--dataset",
        metavar="NAME",
        help=f"a public data set, whose files --annotations names: {', '.join(sorted(DATASETS))}",
    )
    parser.add_argument("--annotations", metavar="FILE", help="the data set's annotations, as published")
    parser.add_argument(
        "--dataset-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the data set's importer, such as max_samples=500000; may be repeated",
    )
    parser.add_argument(
        "--describe-dataset",
        metavar="NAME",
        nargs="?",
        const="",
        help="tell what files a data set's importer reads, where its media may lie and which options it has; "
        "without a NAME, which data sets there are",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of records to create, local or gs://bucket/folder"
    )
    parser.add_argument(
        "--write-manifest",
        metavar="FILE",
        help="write what would be prepared as a manifest of JSON lines, and stop; no --out",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace records that are in --out, and what a killed run with other arguments has finished",
    )
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
    parser.add_argument(
        "--audio-backend",
        choices=("pyav", "tfio"),
        default="pyav",
        help="what reads the sound: PyAV, or tensorflow-io (WAV, FLAC, MP3 and Ogg Vorbis files alone; in an "
        "environment of its own, which `avlm doctor --make-tfio-venv` builds)",
    )
    parser.add_argument(
        "--tfio-python",
        metavar="PATH",
        help="Python of that environment (default: $AVLM_TFIO_PYTHON, else .venv-tfio/bin/python)",
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
    if args.describe_dataset is not None:
        print(describe_dataset(args.describe_dataset) if args.describe_dataset else describe_datasets())
        return 0
    files, beam_options = _split_files(args.files)
    listing = _list(args, files)
    if not listing.count:
        raise UserError(f"nothing is left to prepare: {'; '.join(_left_out(listing))}")
    if args.write_manifest:
        return _write_manifest(args, listing)
    if not args.out:
        raise UserError("say with --out DIR where the records shall be")
    if args.timeout <= 0:
        raise UserError(f"--timeout is {args.timeout:g}; it must be positive seconds")
    if args.tfio_python and args.audio_backend != "tfio":
        raise UserError("--tfio-python goes with --audio-backend tfio")
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
        tfio=tfio_python(args.tfio_python) if args.audio_backend == "tfio" else None,
    )
    print("\n".join([report.summary(), *_left_out(listing)]))
    return report.exit_code


def _left_out(listing: Listing) -> list[str]:
    return [f"{count} left out: {reason}" for reason, count in sorted(listing.left_out.items())]


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
    if args.dataset_option and not args.dataset:
        raise UserError(f"--dataset-option {args.dataset_option[0]} goes with --dataset NAME")
    if args.dataset:
        root = args.media_root or os.path.dirname(args.annotations) or "."
        return import_annotations(args.dataset, args.annotations, root, **_dataset_options(args))
    if args.manifest:
        return read_manifest(args.manifest, args.media_root)
    return list_folder(args.folder) if args.folder else list_files(files)


def _dataset_options(args: argparse.Namespace) -> dict[str, str]:
    options = {}
    for option in args.dataset_option:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--dataset-option {option}: write NAME=VALUE")
        if name in ("dataset", "path", "media_root"):
            raise UserError(f"--dataset-option {option}: that is said with an option of the command itself")
        options[name] = value
    return options


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
    write_manifest(listing, args.write_manifest)
    print("\n".join([f"{len(listing.lines)} lines in {args.write_manifest}", *_left_out(listing)]))
    for rejection in listing.rejections[:SHOWN_REJECTIONS]:
        print(f"  rejected: {rejection.path} [{rejection.id}]: {rejection.reason}")
    if listing.rejections:
        print(f"{len(listing.rejections)} of {listing.count} lines rejected")
    return 1 if listing.rejections else 0
