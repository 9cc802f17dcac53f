"""What becomes of one media file: its record, or why there is none; and the process in which that is found out.

Files are decoded in processes of their own (workers.py), which import this module and nothing of Beam or JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from input_pipeline.errors import UserError
from input_pipeline.manifest import MediaLine, Rejection
from input_pipeline.media import Limits, MediaError, load_media
from input_pipeline.paths import COPY_BYTES, file_size, is_remote, to_path
from input_pipeline.records import encode_record
from input_pipeline.sound import AudioReader
from input_pipeline.spec import MediaSpec
from input_pipeline.tfio_audio import TfioAudio
from input_pipeline.workers import send

SELF_DESTRUCT_MARGIN = 5.0  # s after the limit at which a worker ends itself, should its parent be gone.
FULL = (errno.ENOSPC, errno.EDQUOT)  # No room on the disk.


class MachineFault(UserError):
    """A file could not be tried for a reason that lies in the machine, the network or the rights: no rejection."""


def prepare_one(
    lines: Sequence[MediaLine],
    spec: MediaSpec,
    limits: Limits | None = None,
    *,
    scratch: str | None = None,
    audio_reader: AudioReader | None = None,
) -> bytes | Rejection:
    """Decodes one media file and packs it with its conversations: a pure function of the file.

    Args:
        lines: all lines on one file (same path, kind and interval, see `group_by_media`).
        spec: how the media become arrays.
        limits: what a file may ask for.
        scratch: folder for a passing copy of a file that is not local; default the system's.
        audio_reader: see `load_media`.

    Returns:
        A record (see records.py), or why there is none.

    Raises:
        MachineFault: the file cannot be fetched, though it may well be there, or the disk is full.
    """
    first, limits = lines[0], limits or Limits()
    try:
        with _local_file(first.path, limits, scratch) as path:
            media = load_media(
                path,
                spec,
                kind=first.kind,
                interval=first.interval,
                limits=limits,
                audio_reader=audio_reader,
            )
    except MediaError as error:
        return Rejection(first.path, first.id, error.reason, error.stage)
    samples = [line.sample() for line in lines if line.conversations is not None]
    return encode_record(media, media_id=first.name, source=first.source, samples=samples)


@contextlib.contextmanager
def _local_file(path: str, limits: Limits, scratch: str | None) -> Iterator[str]:
    """The file itself, or a copy of one on gs://. The decoder reads files to and fro, and only local ones."""
    if not is_remote(path):
        yield path
        return
    if not path.startswith("gs://"):
        raise MediaError(path, "only local paths and gs:// addresses are supported", "open")
    with contextlib.ExitStack() as stack:
        try:
            remote = to_path(path)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch))
            copy = os.path.join(folder, remote.name)
            try:
                size = file_size(remote)
                if size <= limits.max_bytes:
                    with remote.open("rb") as source, open(copy, "wb") as target:
                        shutil.copyfileobj(source, target, COPY_BYTES)
            except (FileNotFoundError, IsADirectoryError):
                raise MediaError(path, "no such file", "open") from None
            if size > limits.max_bytes:
                raise MediaError(
                    path, f"has {size} bytes; the limit max_bytes is {limits.max_bytes}", "limit"
                )
        except MediaError:
            raise
        # Credentials that expired, a network that is down, a full disk: gcsfs has errors of many kinds.
        except Exception as error:
            raise MachineFault(
                f"{path} cannot be fetched ({type(error).__name__}: {error}); when that is mended, the same "
                "command goes on"
            ) from error
        yield copy


def worker_command(tfio: Mapping[str, Any] | None = None) -> list[str]:
    """Command of a worker that runs `prepare_one`; works from a source tree as well as installed.

    Args:
        tfio: "python", "timeout" and "limits" of the TfioAudio that reads the sound; None: PyAV reads it.
    """
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from input_pipeline.decoding import serve; serve({tfio!r})"
    return [sys.executable, "-c", code]


def serve(tfio: Mapping[str, Any] | None = None) -> None:
    """A worker's life: jobs from stdin, answers to stdout, until stdin ends. See `worker_command`."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    reader = None
    if tfio is not None:  # TensorFlow's ten seconds of starting belong to this worker's start and to no file.
        reader = TfioAudio(tfio["python"], timeout=tfio["timeout"], limits=Limits(**tfio["limits"]))
        reader.start()
    send(answers, b"")
    jobs = sys.stdin.buffer
    while header := jobs.read(8):
        job = msgpack.unpackb(jobs.read(struct.unpack("<Q", header)[0]))
        if hasattr(signal, "setitimer"):  # SIGALRM's default action ends even a process stuck in C code
            signal.setitimer(signal.ITIMER_REAL, job["timeout"] + SELF_DESTRUCT_MARGIN)
        lines = [_media_line(fields) for fields in job["lines"]]
        try:
            result = prepare_one(
                lines,
                MediaSpec(**job["spec"]),
                Limits(**job["limits"]),
                scratch=job["scratch"],
                audio_reader=reader,
            )
            answer = (
                {"record": result} if isinstance(result, bytes) else {"rejection": dataclasses.asdict(result)}
            )
        except Exception as error:
            answer = _unexpected(error, lines[0])
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, msgpack.packb(answer))


def _unexpected(error: Exception, line: MediaLine) -> dict[str, Any]:
    """The answer on an exception: the machine's fault, or a defect of this program, which is one file's.

    So is a lack of memory: on a machine that is short of it the kernel kills, an exception means that one
    allocation was absurd. Were it a fault, a single file could keep a run from ever ending.
    """
    if isinstance(error, UserError):  # MachineFault; or tensorflow-io cannot be started
        return {"fault": str(error)}
    if isinstance(error, OSError) and error.errno in FULL:
        return {"fault": f"{line.path} cannot be decoded ({error}); make room, and the same command goes on"}
    reason = f"unexpected {type(error).__name__}: {error}"
    return {"rejection": dataclasses.asdict(Rejection(line.path, line.id, reason, "crash"))}


def _media_line(fields: Mapping[str, Any]) -> MediaLine:
    interval = fields["interval"]
    return MediaLine(**{**fields, "interval": None if interval is None else tuple(interval)})
