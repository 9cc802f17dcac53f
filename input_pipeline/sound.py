"""Sound streams become 16 kHz mono and are cut into windows, each at its true time.

Of what lies before the first window nothing is resampled, and where the codec allows it nothing is decoded;
the samples are those of a decoder that came from the start, bit for bit. For that a start in the middle must
be certain of its place to the sample and free of memory: PCM and FLAC are, where their packets follow each
other without a hole by a clock that counts samples. AAC (noise substitution and long-term prediction carry
state along), mp3 (a reservoir of bits, timestamps estimated after a seek), Opus, Vorbis and the rest are
decoded from the start, at about a thousand times real time.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
from av.container import InputContainer

from input_pipeline.containers import (
    STRICT_CODECS,
    Limits,
    MediaError,
    Track,
    decode_stream,
    open_container,
)
from input_pipeline.seeking import Entry, LandedElsewhereError
from input_pipeline.spec import FBANK_FRAME_LENGTH, SAMPLE_RATE, MediaSpec

# (path) -> f32 [n] samples at 16 kHz, mono, in [-1, 1], and the time in seconds of the first one.
AudioReader = Callable[[str | os.PathLike[str]], tuple[np.ndarray, float]]
Chunk = tuple[int, np.ndarray, float]  # position in samples from the sound's start, f32 [n], that start in s

# When the timestamps are this far ahead of the samples there was a hole: a player is silent. Less is rounding, but
# small holes and a slow clock add up to it (FFmpeg's own limit for that, libswresample, min_hard_comp).
GAP_SECONDS = 0.1
STRICT_GAP_SECONDS = 0.005  # The same for codecs that number their samples; Matroska rounds to 0.001 s.
# Samples resampled ahead of the first that is wanted. FFmpeg's filter reaches 16 of them to either side.
RUN_UP = 256
MAX_PHASES = 1024  # Above this FFmpeg's resampler rounds a conversion's phases (libswresample, phase_shift).
MAX_PERIOD = 4096  # Samples after which a conversion repeats: 441 for 44.1 kHz, 3 for 48 kHz.
# A seek costs less than decoding this many packets of sound.
SKIPPED_PACKETS = 64
SAMPLE_TOLERANCE = 1e-3  # of a sample; times are floats


@dataclasses.dataclass
class CutSound:
    """What of a sound falls into windows.

    Attributes:
        windows: (start, end, f32 [n] samples), times in seconds on the file's own clock.
        start, end: of the sound on the same clock; end is of the part that was read.
    """

    windows: list[tuple[float, float, np.ndarray]]
    start: float
    end: float


def window_starts(total: int, centres: list[float] | None, spec: MediaSpec) -> list[int]:
    """First sample of each audio window of a sound of `total` samples at 16 kHz.

    A sound that fits (total <= max_windows * window_hop) is cut into contiguous windows whose filterbank
    frames join without a seam. A longer one gets max_windows whole windows, centred on `centres` (seconds
    from the sound's start: the times of the frames) if there are as many of them, else on the midpoints of
    max_windows equal segments; windows that would leave the sound are moved inside, and those that then
    coincide are given once.
    """
    if total <= spec.max_windows * spec.window_hop:
        return [i * spec.window_hop for i in range(spec.max_windows)]
    if centres is None or len(centres) != spec.max_windows:
        segment = total / SAMPLE_RATE / spec.max_windows
        centres = [(i + 0.5) * segment for i in range(spec.max_windows)]
    last = max(total - spec.window_samples, 0)  # One window may be longer than max_windows hops.
    starts = [round(c * SAMPLE_RATE) - spec.window_samples // 2 for c in centres]
    return sorted({min(max(s, 0), last) for s in starts})


def cut_windows(
    chunks: Iterable[Chunk],
    track_end: float,
    centres: list[float] | None,
    spec: MediaSpec,
    part: tuple[float, float] | None = None,
) -> CutSound:
    """Keeps the samples of a sound that fall into windows; the rest is dropped at once.

    Args:
        chunks: the sound, ascending.
        track_end: when it ends by its packets. From packets, not samples: off by the encoder's delay, a small
            fraction of a window.
        centres: times of the frames on the file's own clock, if there are any.
        part: (start, end) on the same clock; only the samples that lie wholly within are there.
    """
    start, total, first, stop, starts, buffers = 0.0, 0, 0, math.inf, None, []
    for position, chunk, begin in chunks:
        if starts is None:
            start, length = begin, round((track_end - begin) * SAMPLE_RATE)
            if part is not None:
                first = max(math.ceil((part[0] - start) * SAMPLE_RATE - SAMPLE_TOLERANCE), 0)
                stop = math.floor((part[1] - start) * SAMPLE_RATE + SAMPLE_TOLERANCE)
                length = min(length, stop) - first
            on_sound = [c - start - first / SAMPLE_RATE for c in centres] if centres else None
            starts = [first + place for place in window_starts(length, on_sound, spec)] if length > 0 else []
            buffers = [None] * len(starts)
        total = min(max(total, position + len(chunk)), stop)
        for i in range(bisect.bisect_right(starts, position - spec.window_samples), len(starts)):
            offset = position - starts[i]
            if offset + len(chunk) <= 0:
                break
            if buffers[i] is None:
                buffers[i] = np.zeros(spec.window_samples, np.float32)
            low = max(offset, 0)
            high = min(offset + len(chunk), spec.window_samples)
            buffers[i][low:high] = chunk[low - offset : high - offset]
        if total >= stop:
            break
    windows = []
    for place, buffer in zip(starts or [], buffers, strict=True):
        valid = min(total - place, spec.window_samples)
        # Less than one filterbank frame is no input: Kaldi's snip_edges drops it at a sound's end as well.
        if buffer is not None and valid >= FBANK_FRAME_LENGTH:
            begin = start + place / SAMPLE_RATE
            windows.append((begin, begin + valid / SAMPLE_RATE, buffer[:valid]))
    # A part ends within a sample; where that one was reached the sound goes on at least to the part's end.
    return CutSound(windows, start, part[1] if total >= stop else start + total / SAMPLE_RATE)


def read_with(path: str | os.PathLike[str], reader: AudioReader) -> Chunk:
    """The whole sound by another decoder than PyAV. ValueError if that does not keep to `AudioReader`."""
    samples, start = reader(path)
    samples = np.asarray(samples)
    if samples.dtype != np.float32 or samples.ndim != 1 or not math.isfinite(start):
        raise ValueError(
            f"audio_reader gave {samples.dtype}{list(samples.shape)} from {start!r} s; it must give float32 "
            "[n] samples and a finite start"
        )
    if not np.isfinite(samples).all() or (len(samples) and np.abs(samples).max() > 1):
        raise ValueError("audio_reader gave samples that are not within [-1, 1]")
    return 0, samples, float(start)


def sound_start(path: str | os.PathLike[str], kind: str, track: Track, limits: Limits) -> float:
    """When the first sample is heard; an encoder's priming is in the packets but not in the sound."""
    with open_container(path, kind, limits) as container:
        frame = next(decode_stream(path, container, track.index, limits), None)
    return track.start if frame is None or frame.time is None else frame.time


class _CannotSkipError(Exception):
    """What was left out decides on the samples that follow."""


def read_sound(
    path: str | os.PathLike[str], kind: str, track: Track, limits: Limits, begin: float = -math.inf
) -> Iterator[Chunk]:
    """A sound as 16 kHz mono: all of it, or from shortly before `begin` (seconds) on.

    The chunks of a later beginning are the same as those of the whole.
    """
    earlier = [entry for entry in track.entries if entry.time + RUN_UP / SAMPLE_RATE <= begin]
    entry = earlier[-1] if earlier and earlier[-1].order >= SKIPPED_PACKETS else None
    for attempt in ((entry, begin), (None, begin), (None, -math.inf)):
        try:
            with open_container(path, kind, limits) as container:
                yield from _mono_16k(path, container, track, limits, *attempt)
            return
        except (LandedElsewhereError, _CannotSkipError):  # raised before the first chunk only
            continue


def _mono_16k(
    path: str | os.PathLike[str],
    container: InputContainer,
    track: Track,
    limits: Limits,
    entry: Entry | None,
    begin: float,
) -> Iterator[Chunk]:
    """The resampler keeps the channels and the mean is taken here: FFmpeg's own downmix of float stereo is
    (L + R) / sqrt(2), 1.41 times too loud and out of range. A hole in the timestamps moves the position on.

    Position of a sample: that of the last hole (or change of format), plus what was resampled since.
    """
    resampler, setup = None, None
    start, written, expected = None, 0, 0.0
    base, taken = 0, 0  # position of the last hole at 16 kHz, and the samples since then as they are stored
    strict = container.streams[track.index].codec_context.name in STRICT_CODECS

    def drain(frame: av.AudioFrame | None) -> Iterator[Chunk]:
        nonlocal written
        for part in resampler.resample(frame):
            samples = part.to_ndarray().reshape(-1, part.layout.nb_channels).T
            mono = samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
            wrong = np.isnan(mono)
            if wrong.any():
                place = start + (written + int(wrong.argmax())) / SAMPLE_RATE
                raise MediaError(path, f"its sound holds what is no number at {place:.3f} s")
            yield written, np.clip(mono, -1.0, 1.0), start
            written += len(mono)

    for frame in decode_stream(path, container, track.index, limits, entry):
        time = frame.time
        if start is None:
            start = expected = time if time is not None else 0.0
            if entry is not None:
                if time is None or abs(time - entry.time) * frame.sample_rate > SAMPLE_TOLERANCE:
                    raise LandedElsewhereError
                start = track.entries[0].time
                taken = _samples_before(entry, track, frame.sample_rate)
        time = expected if time is None else time
        if strict and (frame.time is None or abs(time - expected) > STRICT_GAP_SECONDS):
            raise MediaError(path, f"its sound is damaged at {expected:.3f} s, samples are missing")
        # When it would be heard by the samples so far.
        due = time if setup is None else start + (base + taken * SAMPLE_RATE / setup[0]) / SAMPLE_RATE
        now = (frame.sample_rate, frame.format.name, frame.layout.nb_channels, frame.layout.name)
        if now != setup or time - due > GAP_SECONDS:
            position = round((time - start) * SAMPLE_RATE)
            if resampler is not None:
                yield from drain(None)
                written = base = max(written, position)
                taken = 0
            elif setup is not None:
                if base + taken * SAMPLE_RATE / setup[0] > position - RUN_UP:
                    raise _CannotSkipError  # how many samples these give only the resampler knows
                base, taken = position, 0
            resampler, setup = None, now
        expected = max(time, expected) + frame.samples / frame.sample_rate
        if resampler is None:
            ends = base + (taken + frame.samples) * SAMPLE_RATE / frame.sample_rate
            if ends < (begin - start) * SAMPLE_RATE - RUN_UP and _repeats(frame.sample_rate):
                taken += frame.samples
                continue
            # Interleaved: PyAV 18.1 crashes on the planes of eight and more channels.
            resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=SAMPLE_RATE)
            lead = taken % (frame.sample_rate // math.gcd(frame.sample_rate, SAMPLE_RATE))
            written = base + (taken - lead) * SAMPLE_RATE // frame.sample_rate
            if lead:  # the resampler must begin where its filter would stand in the same place
                for _ in drain(_silence(frame, lead)):
                    pass
        taken += frame.samples
        yield from drain(frame)
    if resampler is not None:
        yield from drain(None)


def _repeats(rate: int) -> bool:
    """Whether a conversion to 16 kHz comes round to the same filter within a few samples."""
    divisor = math.gcd(rate, SAMPLE_RATE)
    return SAMPLE_RATE // divisor <= MAX_PHASES and rate // divisor <= MAX_PERIOD


def _samples_before(entry: Entry, track: Track, rate: int) -> int:
    samples = (entry.pts - track.entries[0].pts) * track.samples_per_tick
    if samples.denominator != 1 or not _repeats(rate) or track.entries[0].order:
        raise LandedElsewhereError
    return int(samples)


def _silence(like: av.AudioFrame, samples: int) -> av.AudioFrame:
    frame = av.AudioFrame(format=like.format.name, layout=like.layout, samples=samples)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate, frame.time_base = like.sample_rate, like.time_base
    return frame
