"""Reads sound files with tensorflow-io: a script for the Python of another environment (see tfio_audio.py).

Requests are JSON behind an eight-byte length on stdin, one at a time: {"path", "timeout"}, or {} for the
versions. An answer is a line of JSON and, where that has "samples", as many little-endian f32 numbers. Nothing
of this project is imported here and nothing of it imports this.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import signal
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

SAMPLE_RATE = 16_000  # Hz, as spec.SAMPLE_RATE
SELF_DESTRUCT_MARGIN = 5.0  # s after the limit at which this process ends itself, should its parent be gone.
BLOCK = 1 << 20  # samples that are read or resampled at once

# tfio.audio.resample is speexdsp's resampler at quality 4: a symmetric filter of 64 taps, longer by the ratio
# of the rates when the rate falls (speexdsp:libspeexdsp/resample.c, quality_map and update_filter).
FILTER_TAPS = 64

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # RIFF's format tags
WAV_ENCODINGS = {(PCM, 8), (PCM, 16), (PCM, 24), (FLOAT, 32)}
FLAC_BITS = (16, 24)


class Refusal(Exception):
    """A file that gives no samples; `stage` is "open" (not a format that is read) or "decode" (damaged)."""

    def __init__(self, reason: str, stage: str = "open") -> None:
        super().__init__(reason)
        self.reason, self.stage = reason, stage


# What the file is
# -------------------------------------------------------------------------------------------------------


def check_format(file: BinaryIO) -> str:
    """The file's format by its bytes: "wav", "flac", "mp3" or "ogg"; Refusal for every other.

    tensorflow-io is not asked: it reads any 32-bit WAV as float, also one of integers, and looks for mp3 frames
    in whatever it does not know.
    """
    head = file.read(64)
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        _check_wav(file)
        return "wav"
    if head.startswith(b"fLaC"):
        bits = _flac_info(head)[0]
        if bits not in FLAC_BITS:
            raise Refusal(f"is FLAC of {bits} bits; tensorflow-io is used for 16 and 24 bits alone")
        return "flac"
    if head.startswith(b"OggS"):
        if b"\x01vorbis" not in head:
            raise Refusal("is Ogg, but not Vorbis, the one Ogg codec that tensorflow-io reads")
        return "ogg"
    if _is_mp3(file, head):
        return "mp3"
    kind = "MP4 or QuickTime" if head[4:8] == b"ftyp" else "no WAV, FLAC, MP3 or Ogg Vorbis"
    raise Refusal(f"is {kind}; tensorflow-io reads WAV, FLAC, MP3 and Ogg Vorbis files alone")


def _check_wav(file: BinaryIO) -> None:
    position, end = 12, file.seek(0, os.SEEK_END)
    while position + 8 <= end:
        file.seek(position)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"fmt ":
            fields = file.read(26)
            if len(fields) < 16:
                break
            tag, bits = struct.unpack_from("<H", fields)[0], struct.unpack_from("<H", fields, 14)[0]
            if tag == EXTENSIBLE and len(fields) == 26:
                tag = struct.unpack_from("<H", fields, 24)[0]
            if (tag, bits) not in WAV_ENCODINGS:
                kind = {PCM: "integers", FLOAT: "floating point"}.get(tag, f"the codec {tag:#06x}")
                read = "integers of 8, 16 and 24 bits and floating point of 32 bits"
                raise Refusal(f"is WAV with {kind} of {bits} bits; tensorflow-io reads {read}")
            return
        position += 8 + size + size % 2
    raise Refusal("is WAV without a whole fmt chunk", "decode")


def _flac_info(head: bytes) -> tuple[int, bytes]:
    """Bits of a sample and the MD5 of all samples, out of STREAMINFO (RFC 9639, section 8.2)."""
    if len(head) < 42 or head[4] & 0x7F != 0:
        raise Refusal("is FLAC without STREAMINFO", "decode")
    return ((head[20] & 1) << 4 | head[21] >> 4) + 1, head[26:42]


def _is_mp3(file: BinaryIO, head: bytes) -> bool:
    position = 0
    if head.startswith(b"ID3") and len(head) >= 10:
        size = 0
        for byte in head[6:10]:  # seven bits each
            size = size << 7 | byte & 0x7F
        position = 10 + size
    file.seek(position)
    frame = file.read(4096).lstrip(b"\0")[:2]
    # Eleven ones, then MPEG's version, then layer III.
    return len(frame) == 2 and frame[0] == 0xFF and frame[1] & 0xE0 == 0xE0 and frame[1] & 0x06 == 0x02


# What is heard
# -------------------------------------------------------------------------------------------------------


def scaled(block: np.ndarray) -> np.ndarray:
    """f32 [n c] in [-1, 1] of what tensorflow-io gives; 24-bit samples come in the upper bits of 32."""
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if block.dtype == np.int16:
        return block.astype(np.float32) / 2**15
    if block.dtype == np.int32:
        return (block / 2**31).astype(np.float32)
    return block.astype(np.float32, copy=False)


def read_mono(path: str, kind: str, md5: bytes) -> tuple[np.ndarray, int]:
    """f32 [n] samples, the mean of the channels, and their rate."""
    import tensorflow as tf
    import tensorflow_io as tfio

    # Bytes, since a name need not be UTF-8; absolute, since TensorFlow takes "s3://..." for an address.
    name = os.fsencode(os.path.abspath(path))
    try:
        sound = tfio.audio.AudioIOTensor(name)
        rate, (total, channels) = int(sound.rate), (int(size) for size in sound.shape)
    except tf.errors.OpError as error:
        raise Refusal(f"tensorflow-io cannot open it: {plain(error)}") from None
    if total <= 0 or channels <= 0 or rate <= 0:
        raise Refusal(f"tensorflow-io finds {total} samples in {channels} channels at {rate} Hz", "decode")
    mono, digest = np.empty(total, np.float32), hashlib.md5(usedforsecurity=False)
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        try:
            block = sound[start:stop].numpy()
        except tf.errors.OpError as error:
            at = f"between {start / rate:.3f} and {stop / rate:.3f} s"
            raise Refusal(f"tensorflow-io cannot decode it {at}: {plain(error)}", "decode") from None
        if block.shape != (stop - start, channels):
            raise Refusal(f"tensorflow-io gives too few samples after {start / rate:.3f} s", "decode")
        if kind == "flac":
            little = block.astype(block.dtype.newbyteorder("<"), copy=False)
            exact = little if block.itemsize == 2 else little.view(np.uint8).reshape(-1, 4)[:, 1:]
            digest.update(np.ascontiguousarray(exact))
        mono[start:stop] = np.ascontiguousarray(scaled(block).T).mean(axis=0, dtype=np.float32)
    # tensorflow-io does not look at FLAC's checksums: damage passes as noise or silence.
    if kind == "flac" and not any(md5):
        raise Refusal("is FLAC without the checksum of its samples, so that damage would pass unseen")
    if kind == "flac" and digest.digest() != md5:
        raise Refusal("its samples do not have the checksum that the file states; it is damaged", "decode")
    if not np.isfinite(mono).all():
        raise Refusal("holds samples that are no numbers", "decode")
    return mono, rate


def resample(mono: np.ndarray, rate: int) -> np.ndarray:
    """f32 [ceil(n * 16000 / rate)] of f32 [n] samples at `rate` Hz; out[k] is the sound at k / 16000 seconds.

    tfio.audio.resample starts with the delay of its filter and drops as much at the end. Its input is therefore
    led in by what makes the delay a whole number of output samples, which are then dropped. That also joins
    blocks without a seam.
    """
    import tensorflow as tf
    import tensorflow_io as tfio

    if rate == SAMPLE_RATE:
        return mono
    divisor = math.gcd(rate, SAMPLE_RATE)
    down, up = rate // divisor, SAMPLE_RATE // divisor
    taps = FILTER_TAPS if down <= up else -(-(FILTER_TAPS * down // up) // 8) * 8
    delay = taps // 2
    lead = delay + (-2 * delay) % down
    dropped = (lead + delay) * up // down
    block = -(-BLOCK // down) * down
    out = np.empty(-(-len(mono) * up // down), np.float32)
    for start in range(0, len(mono), block):
        stop = min(start + block, len(mono))
        first = start * up // down
        wanted = -(-stop * up // down) - first
        # One sample more than the filter's half: an output between the last two inputs is asked for, too.
        begin, end = start - lead, stop + delay + down
        padding = max(0, -begin), max(0, end - len(mono))
        heard = np.pad(mono[max(0, begin) : end], padding)
        made = tfio.audio.resample(tf.constant(heard[:, None]), rate, SAMPLE_RATE).numpy()[:, 0]
        out[first : first + wanted] = made[dropped : dropped + wanted]
    return out


def decode(path: str) -> np.ndarray:
    """f32 [n] samples of a file, mono at 16 kHz in [-1, 1]; Refusal if it gives none."""
    try:
        with open(path, "rb") as file:
            kind = check_format(file)
            file.seek(0)
            md5 = _flac_info(file.read(42))[1] if kind == "flac" else b""
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None
    return np.clip(resample(*read_mono(path, kind, md5)), -1.0, 1.0)


def plain(error: Any) -> str:
    """A TensorFlow error's message without the names of its machinery."""
    return re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error.message)).strip()


# The process
# -------------------------------------------------------------------------------------------------------


def load() -> dict[str, str]:
    """Imports tensorflow-io on one core and runs a native operation; returns the versions."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)  # parallelism here is one process per file
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")
    import tensorflow_io as tfio

    tfio.audio.resample(tf.zeros([16, 1]), 8000, SAMPLE_RATE)
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "tensorflow_io": tfio.__version__,
    }


def answer(request: dict[str, Any], versions: dict[str, str]) -> bytes:
    """The bytes that answer one request."""
    if "path" not in request:
        return json.dumps(versions).encode() + b"\n"
    try:
        samples = decode(request["path"]).astype("<f4", copy=False)
    except Refusal as refusal:
        return json.dumps({"reason": refusal.reason, "stage": refusal.stage}).encode() + b"\n"
    except Exception as error:  # a defect of this script or of tensorflow-io, or no memory: one file's
        reason = f"unexpected {type(error).__name__}: {error}"
        return json.dumps({"reason": reason, "stage": "crash"}).encode() + b"\n"
    return json.dumps({"samples": len(samples)}).encode() + b"\n" + samples.tobytes()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def send(message: bytes) -> None:
        answers.write(struct.pack("<Q", len(message)))
        answers.write(message)
        answers.flush()

    versions = load()
    send(b"")
    while header := sys.stdin.buffer.read(8):
        request = json.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
        if "timeout" in request:  # SIGALRM's default action ends even a process stuck in C code
            signal.setitimer(signal.ITIMER_REAL, request["timeout"] + SELF_DESTRUCT_MARGIN)
        message = answer(request, versions)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(message)


if __name__ == "__main__":
    main()
