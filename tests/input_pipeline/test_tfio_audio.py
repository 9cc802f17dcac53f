"""The reader that asks a process of another environment: protocol, time limit, crash, and what is refused."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import tfio_audio, tfio_worker
from input_pipeline.errors import UserError
from input_pipeline.media import Limits, MediaError
from input_pipeline.tfio_audio import TfioAudio, tfio_python
from tests.input_pipeline.media_corpus import write_sound, write_video

# Speaks tfio_worker's protocol with the standard library alone, and does what the file's name says.
FAKE = """
import json, os, pathlib, struct, sys, time

def send(message):
    os.write(1, struct.pack("<Q", len(message)) + message)

send(b"")
while header := sys.stdin.buffer.read(8):
    request = json.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
    name = pathlib.PurePath(request.get("path", "")).stem
    if not name:
        answer, body = {"python": "3", "tensorflow": "2", "tensorflow_io": str(os.getpid())}, b""
    elif name == "hangs":
        time.sleep(60)
    elif name == "crashes":
        os.abort()
    elif name == "refused":
        answer, body = {"reason": "is no sound", "stage": "open"}, b""
    elif name == "damaged":
        answer, body = {"reason": "is damaged", "stage": "decode"}, b""
    else:
        count = 8000 if name == "shortened" else 32000
        answer, body = {"samples": 32000 if name == "torn" else count}, struct.pack("<f", 0.25) * count
        if name == "torn":
            body = body[:400]
    send(json.dumps(answer).encode() + b"\\n" + body)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TfioAudio]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(tfio_audio, "WORKER", script)
    reader = TfioAudio(sys.executable, timeout=20.0)
    yield reader
    reader.close()


def two_seconds(path: Path, rate: int = 16_000, **options: str) -> Path:
    return write_sound(path, np.full((1, 2 * rate), 0.25, np.float32), rate, **options)


def process_id(reader: TfioAudio) -> str:
    return reader.start()["tensorflow_io"]


def test_samples_come_back(fake: TfioAudio, tmp_path: Path) -> None:
    samples, start = fake(two_seconds(tmp_path / "good.wav"))
    assert samples.dtype == np.float32 and samples.flags.writeable
    np.testing.assert_array_equal(samples, np.full(32_000, 0.25, np.float32))
    assert start == 0.0


def test_the_clock_is_the_files_own(fake: TfioAudio, tmp_path: Path) -> None:
    samples, start = fake(two_seconds(tmp_path / "good.mp3", codec="libmp3lame"))
    assert start == pytest.approx(1105 / 16_000), "LAME's delay"


def test_one_process_serves_many_files(fake: TfioAudio, tmp_path: Path) -> None:
    path = two_seconds(tmp_path / "good.wav")
    before = process_id(fake)
    for _ in range(3):
        fake(path)
    assert process_id(fake) == before


@pytest.mark.parametrize(
    ("name", "stage", "reason"),
    [
        ("refused", "open", "is no sound; use --audio-backend pyav"),
        ("damaged", "decode", "is damaged$"),
        ("shortened", "decode", "gives 0.500 s of sound, its packets hold 2.000 s"),
        ("torn", "crash", "100 of 32000 samples"),
    ],
)
def test_a_refusal_names_file_reason_and_stage(
    fake: TfioAudio, tmp_path: Path, name: str, stage: str, reason: str
) -> None:
    path = two_seconds(tmp_path / f"{name}.wav")
    with pytest.raises(MediaError, match=reason) as caught:
        fake(path)
    assert (caught.value.stage, caught.value.path) == (stage, str(path))
    assert len(fake(two_seconds(tmp_path / "good.wav"))[0]) == 32_000, "the next file is read"


def test_a_crash_costs_its_own_file_alone(fake: TfioAudio, tmp_path: Path) -> None:
    before = process_id(fake)
    with pytest.raises(MediaError, match="SIGABRT") as caught:
        fake(two_seconds(tmp_path / "crashes.wav"))
    assert caught.value.stage == "crash"
    assert process_id(fake) != before
    assert len(fake(two_seconds(tmp_path / "good.wav"))[0]) == 32_000


def test_a_process_that_was_killed_while_idle_costs_no_file(fake: TfioAudio, tmp_path: Path) -> None:
    path = two_seconds(tmp_path / "good.wav")
    before = int(process_id(fake))
    os.kill(before, signal.SIGKILL)
    assert len(fake(path)[0]) == 32_000
    assert process_id(fake) != str(before)


def test_a_broken_environment_is_no_fault_of_the_file(fake: TfioAudio, tmp_path: Path) -> None:
    path = two_seconds(tmp_path / "good.wav")
    process = int(process_id(fake))
    tfio_audio.WORKER.write_text("raise SystemExit('no library')", encoding="utf-8")
    os.kill(process, signal.SIGKILL)
    with pytest.raises(UserError, match="no library.*--make-tfio-venv") as caught:
        fake(path)
    assert not isinstance(caught.value, MediaError)


def test_a_file_that_hangs_is_ended(fake: TfioAudio, tmp_path: Path) -> None:
    fake._timeout = 0.5
    fake.start()
    began = time.monotonic()
    with pytest.raises(MediaError, match="limit of 0.5 s") as caught:
        fake(two_seconds(tmp_path / "hangs.wav"))
    assert caught.value.stage == "timeout" and time.monotonic() - began < 10
    assert len(fake(two_seconds(tmp_path / "good.wav"))[0]) == 32_000


def test_limits_hold(tmp_path: Path, fake: TfioAudio) -> None:
    fake._limits = Limits(max_duration=1.0)
    with pytest.raises(MediaError, match="max_duration") as caught:
        fake(two_seconds(tmp_path / "good.wav"))
    assert caught.value.stage == "limit"


def test_after_close_no_process_is_left(fake: TfioAudio) -> None:
    process = int(process_id(fake))
    fake.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_environment_that_cannot_run_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file.*--make-tfio-venv"):
        TfioAudio(str(tmp_path / "python")).start()
    reader = TfioAudio(sys.executable)  # This environment has no TensorFlow.
    with pytest.raises(UserError, match="No module named 'tensorflow'.*--make-tfio-venv"):
        reader.start()
    reader.close()


def test_where_its_python_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVLM_TFIO_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"\.venv-tfio/bin/python.*--tfio-python"):
        tfio_python()
    for name in (".venv-tfio/bin/python", "named", "chosen"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert tfio_python() == str(tmp_path / ".venv-tfio/bin/python")
    monkeypatch.setenv("AVLM_TFIO_PYTHON", "named")
    assert tfio_python() == str(tmp_path / "named")
    assert tfio_python("chosen") == str(tmp_path / "chosen")


# What tfio_worker.py lets tensorflow-io see
# -------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> tfio_worker.Refusal:
    with path.open("rb") as file, pytest.raises(tfio_worker.Refusal) as caught:
        tfio_worker.check_format(file)
    return caught.value


@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [
        ("a.wav", "pcm_u8", "wav"),
        ("a.wav", "pcm_s16le", "wav"),
        ("a.wav", "pcm_s24le", "wav"),
        ("a.wav", "pcm_f32le", "wav"),
        ("a.flac", "flac", "flac"),
        ("a.mp3", "libmp3lame", "mp3"),
        ("misnamed.bin.wav", "pcm_s16le", "wav"),
    ],
)
def test_formats_that_are_read(tmp_path: Path, name: str, codec: str, kind: str) -> None:
    with two_seconds(tmp_path / name, codec=codec).open("rb") as file:
        assert tfio_worker.check_format(file) == kind


@pytest.mark.parametrize(
    ("name", "codec", "reason"),
    [
        ("a.wav", "pcm_s32le", "WAV with integers of 32 bits"),
        ("a.wav", "pcm_f64le", "WAV with floating point of 64 bits"),
        ("a.wav", "pcm_alaw", "WAV with the codec 0x0006"),
        ("a.ogg", "flac", "Ogg, but not Vorbis"),
        ("a.m4a", "aac", "MP4 or QuickTime"),
        ("a.aac", "aac", "no WAV, FLAC, MP3 or Ogg Vorbis"),
        ("a.mka", "flac", "no WAV, FLAC, MP3 or Ogg Vorbis"),
    ],
)
def test_formats_that_are_refused(tmp_path: Path, name: str, codec: str, reason: str) -> None:
    refused = refusal(two_seconds(tmp_path / name, codec=codec))
    assert reason in refused.reason and refused.stage == "open"


def test_a_video_is_refused(tmp_path: Path) -> None:
    sound = np.zeros(1600, np.int16)
    path = write_video(tmp_path / "a.mp4", [20, 90], [0.0, 0.1], sound=sound, sound_codec="aac")
    assert "MP4 or QuickTime" in refusal(path).reason


@pytest.mark.parametrize("data", [b"", b"RIFF", b"RIFF\x04\0\0\0WAVE", b"fLaC", b"ID3\x04", b"\xff", b"OggS"])
def test_stumps_of_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "stump"
    path.write_bytes(data)
    assert refusal(path).stage in ("open", "decode")


def test_wav_chunks_before_the_format_are_passed_over(tmp_path: Path) -> None:
    chunk = struct.pack("<4sI", b"JUNK", 3) + b"abc\0"
    data = two_seconds(tmp_path / "a.wav", codec="pcm_s32le").read_bytes()
    (tmp_path / "b.wav").write_bytes(data[:12] + chunk + data[12:])
    assert "integers of 32 bits" in refusal(tmp_path / "b.wav").reason


def test_what_flac_says_of_its_samples(tmp_path: Path) -> None:
    path = two_seconds(tmp_path / "a.flac", codec="flac")
    bits, md5 = tfio_worker._flac_info(path.read_bytes()[:42])
    assert bits == 16 and len(md5) == 16 and any(md5)


def test_scaling() -> None:
    for kind, low, high in (("u1", 0, 255), ("i2", -(2**15), 2**15 - 1), ("i4", -(2**31), 2**31 - 2**8)):
        values = tfio_worker.scaled(np.array([[low], [high]], kind))
        assert values.dtype == np.float32 and values[0, 0] == -1 and 0.99 < values[1, 0] < 1
    assert tfio_worker.scaled(np.array([[0.5]], np.float32))[0, 0] == 0.5


def test_the_rate_is_the_projects() -> None:
    from input_pipeline.spec import SAMPLE_RATE

    assert tfio_worker.SAMPLE_RATE == SAMPLE_RATE


def test_the_lock_file_pins_everything(repository: Path) -> None:
    lock = (repository / "requirements" / "tfio-py311.txt").read_text(encoding="utf-8")
    entries = [block for block in lock.replace("\\\n", " ").splitlines() if block and block[0] not in " #"]
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    names = {entry.split("==")[0] for entry in entries}
    assert {"tensorflow-io", "tensorflow-cpu", "numpy"} <= names
    assert "tensorflow" not in names, "the one for GPUs, four times as large"
