"""The Beam pipeline of `avlm prepare`: one element per shard, one decoding process per core.

An element is (number of the shard, where in the plan's file its media stand): tiny, so that a job graph takes
tens of thousands. What a shard became is in its sidecar (records.py); a shard that has a valid one is not
made again. Media that cannot be used become rows of the sidecar; an exception means that the machine or the
installation is at fault, and the runner may try the shard again elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from input_pipeline.decoding import MachineFault
from input_pipeline.errors import UserError
from input_pipeline.paths import is_remote, to_path
from input_pipeline.plan import ShardPlan, read_groups
from input_pipeline.progress import track
from input_pipeline.records import SIDECAR, finished_shard, write_shard
from input_pipeline.workers import Worker, WorkerFailure, WorkerPool


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Beam warns while it is imported, through the root logger, which then gets a handler it did not have."""
    root = logging.getLogger()
    handlers, disabled = root.handlers[:], root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers


with _quiet_logging():
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineState

LOCAL_RUNNERS = ("DirectRunner", "FnApiRunner")
# The in-process runner. Beam's own choice behind the name DirectRunner would first fetch a program, Prism,
# from the internet.
IN_PROCESS_RUNNER = "FnApiRunner"
# The in-process runner deals the shards out to its threads beforehand. With some threads per decoding process
# a process whose own shards were short goes on with those of others.
THREADS_PER_WORKER = 4
LOCAL_POLL_SECONDS, REMOTE_POLL_SECONDS = 0.2, 10.0  # How often progress is looked at; remote: a listing.


class _Stopped(Exception):
    """The run is being ended."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What every shard of a run has in common; it travels to the machines that do the work.

    Attributes:
        folder: the working folder.
        plan: its sha256.
        plan_file: where `Plan.write` wrote.
        num_shards: in the plan.
        job: what a decoding process is told with each group of lines, see `decoding.serve`.
        timeout: seconds one file may take.
        command: gives the command of a decoding process on the machine that needs it.
        run: key of this run among those of a process.
    """

    folder: str
    plan: str
    plan_file: str
    num_shards: int
    job: dict[str, Any]
    timeout: float
    command: Callable[[], list[str]]
    run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


class _Session:
    """What the threads of one process share while they work on one run.

    Attributes:
        pool: the decoding processes.
        done: media files that are through, here or in an earlier run.
        resumed: shards of an earlier run.
        error: the first thing that went wrong; it ends the run.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self.pool = WorkerPool(work.command(), workers)
        self.done = self.resumed = 0
        self.error: BaseException | None = None
        self.stopped = False
        self._lock = threading.Lock()

    def count(self, media: int, *, resumed: int = 0) -> None:
        with self._lock:
            self.done += media
            self.resumed += resumed

    def stop(self, error: BaseException | None = None) -> None:
        with self._lock:
            self.error = self.error or error
            self.stopped = True
        self.pool.stop()


_LOCAL: dict[str, _Session] = {}  # Runs that this process drives itself.
_REMOTE: dict[str, _Session] = {}  # Runs that this process works for; they end with it.
_REMOTE_LOCK = threading.Lock()


class MakeShards(beam.DoFn):
    """Elements are the fields of ShardPlans; gives each one's entry (records.py). Decodes in killable processes."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def process(self, element: tuple[int, int, int]) -> list[dict[str, Any]]:
        shard, session = ShardPlan(*element), _LOCAL.get(self._work.run)
        if session is None:
            return [make_shard(shard, self._work, _remote_session(self._work))]
        # Through Beam an exception would come out as pages of text; the driver raises the first one itself.
        try:
            return [] if session.stopped else [make_shard(shard, self._work, session)]
        except _Stopped:
            return []
        except BaseException as error:
            session.stop(error)
            return []


def _remote_session(work: Work) -> _Session:
    """One decoding process per process of a remote runner, however many threads that has.

    Runners start a process per core; ten threads that decode at once would not fit its memory.
    """
    with _REMOTE_LOCK:
        if work.run not in _REMOTE:
            _REMOTE[work.run] = _Session(work, 1)
        return _REMOTE[work.run]


def make_shard(shard: ShardPlan, work: Work, session: _Session) -> dict[str, Any]:
    """Decodes one shard's media and writes it, unless an earlier run has; returns its entry."""
    groups = read_groups(to_path(work.plan_file), shard)
    state = _media_state(groups)
    entry = finished_shard(work.folder, shard.index, work.num_shards)
    if entry is not None and _is_wanted(entry, state, work):
        session.count(len(groups), resumed=1)
        return entry
    rejected: list[dict[str, str]] = []
    extra = {"media_only": 0, "media_state": state, "plan": work.plan, "late": None}

    def records() -> Iterator[bytes]:
        # The worker is given back before the shard is closed and hashed: others decode meanwhile.
        with session.pool.worker() as worker, tempfile.TemporaryDirectory(prefix="avlm-") as scratch:
            for group in groups:
                answer = _decode(group, work, worker, scratch)
                if session.stopped:
                    raise _Stopped
                session.count(1)
                if "record" in answer:
                    extra["media_only"] += sum(line["conversations"] is None for line in group)
                    yield answer["record"]
                else:
                    if answer["rejection"]["stage"] == "timeout":
                        extra["late"] = work.timeout
                    rejected.extend({**answer["rejection"], "id": line["id"]} for line in group)

    return write_shard(work.folder, shard.index, work.num_shards, records(), rejected=rejected, extra=extra)


def _is_wanted(entry: dict[str, Any], state: str, work: Work) -> bool:
    """Whether a finished shard is what this run would make.

    A job of another plan that was not ended may still write into the folder. The time limit is no part of the
    plan, as it changes nothing for a file that came through; files that were late are tried again under another.
    """
    made = (entry.get("plan"), entry.get("media_state"))
    return made == (work.plan, state) and entry["late"] in (None, work.timeout)


def _decode(group: list[dict[str, Any]], work: Work, worker: Worker, scratch: str) -> dict[str, Any]:
    """A worker's answer on one media file, or the rejection that a failure of the worker amounts to.

    A crash may be another's doing: of an earlier file that damaged the process, of whoever killed it while it
    was idle. It counts as the file's own when it comes again in a process that has seen nothing else.

    Raises:
        MachineFault: see `prepare_one`.
    """
    answer = _attempt(group, work, worker, scratch)
    if answer.get("rejection", {}).get("stage") == "crash":
        worker.renew()
        answer = _attempt(group, work, worker, scratch)
    if "fault" in answer:
        raise MachineFault(answer["fault"])
    return answer


def _attempt(group: list[dict[str, Any]], work: Work, worker: Worker, scratch: str) -> dict[str, Any]:
    job = {**work.job, "timeout": work.timeout, "lines": group, "scratch": scratch}
    try:
        return msgpack.unpackb(worker.run(msgpack.packb(job), work.timeout))
    except WorkerFailure as failure:
        for left in Path(scratch).iterdir():  # copies of remote media
            shutil.rmtree(left, ignore_errors=True)
        path, line_id = group[0]["path"], group[0]["id"]
        return {"rejection": {"path": path, "id": line_id, "reason": failure.reason, "stage": failure.stage}}


def _media_state(groups: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Changes with the size or the time of any local file: a shard of files that were replaced is made anew."""
    digest = hashlib.sha256()
    for group in groups:
        path = group[0]["path"]
        if is_remote(path):
            continue  # One request per object would cost more than objects are replaced.
        try:
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        except (OSError, ValueError):
            digest.update(b"missing ")
    return digest.hexdigest()


# The driver
# ---------------------------------------------------------------------------------------------------------


def run_pipeline(
    work: Work,
    shards: Sequence[ShardPlan],
    *,
    num_media: int,
    workers: int,
    runner: str,
    beam_options: Sequence[str],
    label: str,
) -> int:
    """Makes all shards that are not there yet; returns how many of them were.

    Args:
        work, shards: what to do.
        num_media: media files in all, for the progress.
        workers: decoding processes of the in-process runner.
        runner: a Beam runner; those in LOCAL_RUNNERS are the in-process one.
        beam_options: further options of Beam, as on its command line.
        label: in front of the progress.

    Raises:
        UserError: the runner is unknown, or misses something.
        KeyboardInterrupt: on Ctrl-C; finished shards are kept.
    """
    if runner in LOCAL_RUNNERS:
        return _run_here(work, shards, num_media, workers, beam_options, label)
    return _run_elsewhere(work, shards, runner, beam_options, label)


def _run_here(
    work: Work,
    shards: Sequence[ShardPlan],
    num_media: int,
    workers: int,
    beam_options: Sequence[str],
    label: str,
) -> int:
    options = [
        f"--runner={IN_PROCESS_RUNNER}",
        "--direct_running_mode=multi_threading",
        f"--direct_num_workers={min(len(shards), workers * THREADS_PER_WORKER)}",
        *beam_options,
    ]
    pipeline = _build(work, shards, options)
    session = _LOCAL[work.run] = _Session(work, min(workers, len(shards)))
    try:
        with _Running(lambda: pipeline.run().wait_until_finish()) as running:
            try:
                running.show(lambda: session.done, num_media, label, "file", LOCAL_POLL_SECONDS)
            finally:  # also on Ctrl-C: the threads end when their processes do
                session.stop()
        if session.error is not None:
            raise session.error
        return session.resumed
    finally:
        session.pool.join()
        del _LOCAL[work.run]


def _run_elsewhere(
    work: Work, shards: Sequence[ShardPlan], runner: str, beam_options: Sequence[str], label: str
) -> int:
    logging.basicConfig(level=logging.INFO)  # where the job can be watched
    pipeline = _build(work, shards, [f"--runner={runner}", *beam_options])
    found = _count_shards(work)
    job = pipeline.run()
    with _Running(job.wait_until_finish) as running:
        try:
            running.show(
                lambda: _count_shards(work), len(shards), f"{label} ({runner})", "shard", REMOTE_POLL_SECONDS
            )
        except KeyboardInterrupt:
            job.cancel()
            raise
    if running.result not in (None, PipelineState.DONE):
        raise UserError(
            f"the job ended as {running.result}, its log says why; the same command takes it up again"
        )
    return found


def _count_shards(work: Work) -> int:
    return sum(path.name.endswith(SIDECAR) for path in to_path(work.folder).iterdir())


def _build(work: Work, shards: Sequence[ShardPlan], options: Sequence[str]) -> beam.Pipeline:
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    except (ValueError, ImportError) as error:  # no such runner, a required option is missing, no [gcp] extra
        raise UserError(f"Beam cannot run with {' '.join(options)}: {error}") from None
    _ = (
        pipeline
        | "Shards" >> beam.Create([dataclasses.astuple(shard) for shard in shards], reshuffle=False)
        | "Spread" >> beam.Reshuffle()
        | "Make" >> beam.ParDo(MakeShards(work))
    )
    return pipeline


class _Running:
    """A call in another thread, so that this one can show progress and take Ctrl-C; leaving waits for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> _Running:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def show(self, count: Callable[[], int], total: int, label: str, unit: str, every: float) -> None:
        """Shows how `count` grows until the call has ended."""

        def items() -> Iterator[int]:
            shown, alive = 0, True
            while alive:
                self._thread.join(every)
                alive = self._thread.is_alive()
                now = count()
                yield from range(shown, now)
                shown = now

        for _ in track(items(), total=total, label=label, unit=unit):
            pass
