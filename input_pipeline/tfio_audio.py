"""tensorflow-io as another reader of sound: optional, offline, in an environment and a process of its own.

No tensorflow-io works beside today's JAX (0.37.1, the last one, wants TensorFlow 2.16 and NumPy 1), so nothing
here imports it: tfio_worker.py runs under the Python of an environment that `avlm doctor --make-tfio-venv` builds
from requirements/tfio-py311.txt, and answers one file at a time under a time limit.

What it reads (tensorflow-io 0.37.1, TensorFlow 2.16.2, each measured against PyAV; the rest is refused):

    WAV, integers of 8, 16, 24 bits    the same samples
    WAV, floating point of 32 bits     the same samples
    FLAC, 16 and 24 bits               the same samples; damage is found by the MD5 of the samples, which
                                       tensorflow-io itself does not look at (without an MD5: refused)
    MP3                                within 3e-6, the encoder's delay left out as PyAV does
    Ogg Vorbis                         within 2e-7
    WAV, integers of 32 bits           refused: tensorflow-io would read them as floating point
    WAV, other codecs; FLAC in Ogg;    refused: tensorflow-io does not open them
      Opus; AAC; Matroska, WebM
    MP4 and QuickTime, sound or video  refused: tensorflow-io wants the system's FFmpeg 2.8, 3.4 or 4.2 for them

At 16 kHz that is all. Other rates go through tfio.audio.resample, whose low-pass is gentler than PyAV's: from
44.1 or 48 kHz it is 2 dB down between 7.0 and 7.5 kHz and 14 dB above, from 8 kHz likewise from 3.5 kHz on; below
that the two agree. Times agree to the sample.

Its decoders are from 2024 and see no repairs: damaged FLAC and WAV files have sent them into endless loops and
crashes, which cost the file alone, and some damage inside an MP3 at which PyAV stops passes as noise. A process of
its own is no sandbox. PyAV is the reader for files from strangers, and the default.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from input_pipeline.containers import (
    MISSING_FRACTION,
    MISSING_SECONDS,
    Limits,
    MediaError,
    Track,
    read_timeline,
)
from input_pipeline.errors import UserError
from input_pipeline.sound import sound_start
from input_pipeline.spec import SAMPLE_RATE
from input_pipeline.workers import Worker, WorkerFailure

PYTHON_VARIABLE = "AVLM_TFIO_PYTHON"
DEFAULT_PYTHON = ".venv-tfio/bin/python"
WORKER = Path(__file__).with_name("tfio_worker.py")
REMEDY = "use --audio-backend pyav"
VERSIONS_SECONDS = 30.0  # The versions are at hand when the process is ready.


def tfio_python(chosen: str | None = None) -> str:
    """The Python of tensorflow-io's environment: `chosen`, else $AVLM_TFIO_PYTHON, else .venv-tfio here.

    Raises:
        UserError: there is no such file.
    """
    named = chosen or os.environ.get(PYTHON_VARIABLE)
    path = os.path.abspath(named or DEFAULT_PYTHON)
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: there is no Python with tensorflow-io; build its environment with "
            f"`avlm doctor --make-tfio-venv`, or name one with --tfio-python or {PYTHON_VARIABLE}"
        )
    return path


def backend_versions(python: str) -> dict[str, str]:
    """Versions of "python", "tensorflow" and "tensorflow_io" in an environment, which is started and ended.

    They decide on the samples, so that records say which they were.

    Raises:
        UserError: there is no such Python, or it cannot run tensorflow-io.
    """
    reader = TfioAudio(python)
    try:
        return reader.start()
    finally:
        reader.close()


class TfioAudio:
    """Reads the sound of one file at a time; an `audio_reader` of `load_media`.

    The process starts when it is first needed, which takes about ten seconds; `start` does it ahead, outside any
    file's time limit. One thread at a time may use it.

    Args:
        python: of the environment with tensorflow-io (see `tfio_python`).
        timeout: seconds that one file may take.
        limits: what a file may ask for; default `Limits()`.
    """

    def __init__(self, python: str, *, timeout: float = 120.0, limits: Limits | None = None) -> None:
        self._python, self._timeout, self._limits = python, timeout, limits or Limits()
        # Isolated (-I): neither PYTHONPATH nor this folder, whose names would hide other modules, is searched.
        self._worker = Worker([python, "-I", os.fspath(WORKER)])

    def start(self) -> dict[str, str]:
        """Starts the process unless it runs; returns and raises as `backend_versions`.

        One that was ended while it was idle, for want of memory perhaps, is replaced: no file is to blame.
        """
        try:
            try:
                answer = self._worker.run(b"{}", VERSIONS_SECONDS)
            except WorkerFailure as failure:
                if failure.stage != "crash":
                    raise
                answer = self._worker.run(b"{}", VERSIONS_SECONDS)
            return json.loads(answer)
        except OSError as error:
            why = error.strerror
        except (RuntimeError, WorkerFailure) as error:
            why = str(error).strip().rpartition("\n")[2]
        raise UserError(
            f"{self._python} cannot run tensorflow-io ({why}); build its environment anew with "
            "`avlm doctor --make-tfio-venv`, or leave out --audio-backend tfio"
        )

    def __call__(self, path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
        """The sound of a file: f32 [n] samples, mono at 16 kHz in [-1, 1], and when the first is heard.

        That moment, in seconds on the file's own clock, is PyAV's word: 0.025 s for an mp3 at 44.1 kHz, whose
        encoder's delay is left out.

        Raises:
            MediaError: the file is none that tensorflow-io reads ("open"), is damaged ("decode"), took too long
                ("timeout") or ended the process ("crash").
            UserError: the process cannot be started.
        """
        self.start()
        # Absolute, for the process may see "s3://..." as an address.
        request = json.dumps({"path": os.path.abspath(path), "timeout": self._timeout}).encode()
        try:
            head, _, body = self._worker.run(request, self._timeout).partition(b"\n")
        except WorkerFailure as failure:
            if failure.stage == "crash":
                self.start()  # Now, so that the next file does not pay for it.
            raise MediaError(path, failure.reason, failure.stage) from None
        answer = json.loads(head)
        if "reason" in answer:
            remedy = f"; {REMEDY}" if answer["stage"] == "open" else ""
            raise MediaError(path, answer["reason"] + remedy, answer["stage"])
        samples = np.frombuffer(body, "<f4").astype(np.float32)
        if len(samples) != answer["samples"]:
            raise MediaError(path, f"{len(samples)} of {answer['samples']} samples came back", "crash")
        track = read_timeline(path, "audio", self._limits).audio
        self._check_length(path, track, len(samples) / SAMPLE_RATE)
        # When the first sample is heard tensorflow-io does not say.
        return samples, sound_start(path, "audio", track, self._limits)

    def close(self) -> None:
        """Ends the process."""
        self._worker.stop()
        self._worker.join()

    def _check_length(self, path: str | os.PathLike[str], track: Track, heard: float) -> None:
        """MediaError if the packets last another time than the `heard` seconds: nothing is lost unseen."""
        stored = track.end - track.start
        if abs(stored - heard) > max(MISSING_SECONDS, MISSING_FRACTION * stored):
            reason = f"tensorflow-io gives {heard:.3f} s of sound, its packets hold {stored:.3f} s; {REMEDY}"
            raise MediaError(path, reason)
