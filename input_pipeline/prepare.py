"""The run of `avlm prepare`: a plan, its shards made by Beam, lists and manifest, the folder put in its place."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from input_pipeline.decoding import worker_command
from input_pipeline.errors import UserError
from input_pipeline.manifest import (
    Listing,
    Rejection,
    parse_lines,
)
from input_pipeline.media import Limits
from input_pipeline.paths import AnyPath, is_remote, map_files, to_path
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
from input_pipeline.tfio_audio import backend_versions
from input_pipeline.working_folder import WorkingFolder

DEFAULT_TIMEOUT = 120.0  # s per file; an hour of 1080p H.264 takes about a minute on one core.
LOCAL_RUNNER, DATAFLOW_RUNNER = "DirectRunner", "DataflowRunner"
PLAN_FILE = "plan-{sha256}.msgpack"  # In the working folder. A job of another plan finds no plan there.
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
            again = " and tries what was rejected again" if self.rejected else ""
            lines.append(
                "the records of this listing are there, nothing was done; media files were not looked at again, "
                f"--overwrite does that{again}"
            )
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
    tfio: str | None = None,
) -> PrepareReport:
    """Makes a folder of records; the same input gives the same bytes, however many work on it.

    A run that was killed is taken up by another with the same arguments (the time limit and the number of
    workers may differ); one on finished records does nothing.

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
        tfio: Python of an environment with tensorflow-io, which then reads the sound in PyAV's place (see
            tfio_audio.py).

    Raises:
        RecordError: `out_dir` is taken.
        UserError: `workers` is less than 1, or the runner cannot run or reach the files, or there is no
            tensorflow-io.
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
    settings = {**job, "schema_version": SCHEMA_VERSION, "rejections": rejections}
    # Another decoder, and another version of it, gives other samples.
    audio_backend = None if tfio is None else {"name": "tfio", **backend_versions(tfio)}
    if audio_backend is not None:
        settings["audio_backend"] = audio_backend
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
                tfio,
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
                audio_backend=audio_backend,
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
    plan: Plan,
    folder: AnyPath,
    job: Mapping[str, Any],
    timeout: float,
    tfio: str | None,
    *,
    workers: int,
    **options: Any,
) -> int:
    """Makes the shards that are not there; returns how many were. `options` are `run_pipeline`'s."""
    plan_file = folder / PLAN_FILE.format(sha256=plan.sha256)
    if not plan_file.exists():
        plan.write(plan_file)
    if not plan.shards:
        return 0
    from input_pipeline.pipeline import Work, run_pipeline  # Beam takes a second to import.

    audio = None if tfio is None else {"python": tfio, "timeout": timeout, "limits": job["limits"]}
    work = Work(
        folder=os.fspath(folder),
        plan=plan.sha256,
        plan_file=os.fspath(plan_file),
        num_shards=len(plan.shards),
        job=dict(job),
        timeout=timeout,
        command=functools.partial(worker_command, audio),
    )
    return run_pipeline(work, plan.shards, num_media=len(plan.groups), workers=workers, **options)


def _entries(folder: AnyPath, plan: Plan) -> list[dict[str, Any]]:
    """The entries of all shards, in order; every line that was planned is in them, as what it became."""
    total = len(plan.shards)
    find = functools.partial(finished_shard, folder, num_shards=total, verify=False)
    entries = []
    for index, entry in enumerate(map_files(find, range(total), folder)):
        name = shard_name(index, total)
        if entry is None:
            raise RecordError(f"{folder / name} was not made or is damaged; the same command makes it again")
        if entry.get("plan") != plan.sha256:
            raise RecordError(
                f"{folder / name} was written by a job with other arguments that is still at work; end that job, "
                "and the same command makes the shard again"
            )
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
