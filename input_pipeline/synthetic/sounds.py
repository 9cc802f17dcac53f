"""Makes a scene's sound: eight timbres that differ at any half second of them, over a faint noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from input_pipeline.synthetic.scene import SOUNDS, Scene

SAMPLE_RATE = 16_000  # Hz; what BEATs hears.
LEVEL = 0.09  # Root mean square of an event's sound (-21 dBFS).
LEVEL_SPREAD_DB = 2.0
PITCH_SPREAD = 0.06  # Relative, either way: one semitone.
PEAK = 0.36  # Of one event; with an overlapping one below it the sum stays under MAX_PEAK.
MAX_PEAK = 0.5
FADE = 0.020  # Seconds of fade in and out.
FADED = 10 ** (-12 / 20)  # Gain of a sound while a later one is heard over it.
FLOOR = 10 ** (-50 / 20)  # Root mean square of the background noise.
_EVENT, _NOISE = 0x50D, 0xF10  # Streams of the scene's random numbers.


def synthesize(scene: Scene, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The whole sound track.

    Args:
        scene: what is heard.
        sample_rate: Hz.

    Returns:
        float32 [s], s = duration x sample_rate rounded; |x| <= MAX_PEAK; the same for the same arguments.
    """
    total = round(scene.duration * sample_rate)
    track = _noise_floor(scene.seed, total)
    for index, event in enumerate(scene.events):
        if event.sound is None:
            continue
        begin, end = round(event.start * sample_rate), min(round(event.end * sample_rate), total)
        rng = np.random.default_rng([scene.seed, index, _EVENT])
        wave = render_sound(event.sound, (end - begin) / sample_rate, rng, sample_rate)[: end - begin]
        for later in scene.events[index + 1 :]:
            if later.sound is not None and later.start < event.end:
                _duck(
                    wave,
                    round(later.start * sample_rate) - begin,
                    round(later.end * sample_rate) - begin,
                    sample_rate,
                )
        track[begin : begin + len(wave)] += wave
    return np.clip(track, -MAX_PEAK, MAX_PEAK, out=track)


def _noise_floor(seed: int, samples: int) -> np.ndarray:
    """White noise; long tracks repeat ten seconds of it, which no ear can tell and costs a tenth."""
    rng = np.random.default_rng([seed, _NOISE])
    piece = rng.standard_normal(min(samples, 160_000), dtype=np.float32) * np.float32(FLOOR)
    return np.resize(piece, samples)


def _duck(wave: np.ndarray, begin: int, end: int, sample_rate: int) -> None:
    """Lowers wave[begin:end] to FADED, with a ramp of FADE seconds at its beginning."""
    begin, end = max(begin, 0), min(end, len(wave))
    if begin >= end:
        return
    gain = np.full(end - begin, FADED, np.float32)
    ramp = min(round(FADE * sample_rate), len(gain))
    gain[:ramp] = np.linspace(1.0, FADED, ramp, dtype=np.float32)
    wave[begin:end] *= gain


def render_sound(
    name: str, seconds: float, rng: np.random.Generator, sample_rate: int = SAMPLE_RATE
) -> np.ndarray:
    """One sound, at LEVEL give or take LEVEL_SPREAD_DB and with its ends faded.

    Args:
        name: one of scene.SOUNDS.
        seconds: length.
        rng: draws pitch and level.
        sample_rate: Hz, at least 16,000.

    Returns:
        float32 [round(seconds x sample_rate)], |x| <= PEAK.
    """
    if name not in TIMBRES:
        raise ValueError(f"unknown sound {name!r}; known: {', '.join(SOUNDS)}")
    samples = round(seconds * sample_rate)
    pitch = float(rng.uniform(1 - PITCH_SPREAD, 1 + PITCH_SPREAD))
    gain = 10 ** (float(rng.uniform(-LEVEL_SPREAD_DB, LEVEL_SPREAD_DB)) / 20)
    period = TIMBRES[name](pitch, rng, sample_rate).astype(np.float32)
    scale = LEVEL / math.sqrt(float(np.mean(np.square(period)))) * gain
    scale = min(scale, PEAK / float(np.abs(period).max()))
    offset = int(rng.integers(len(period)))  # An event may begin anywhere in the period.
    wave = np.resize(np.roll(period * np.float32(scale), -offset), samples)
    ramp = min(round(FADE * sample_rate), samples // 2)
    fade = np.linspace(0.0, 1.0, ramp, endpoint=False, dtype=np.float32)
    wave[:ramp] *= fade
    wave[samples - ramp :] *= fade[::-1]
    return wave


# Each timbre gives one period (float [n]) that joins itself without a jump and is repeated for as long as
# needed.


def _seconds(length: float, sample_rate: int) -> np.ndarray:
    return np.arange(round(length * sample_rate)) / sample_rate


def _ring_out(
    strike: Callable[[np.ndarray], np.ndarray], period: float, sample_rate: int, times: int
) -> np.ndarray:
    """A decaying strike repeated every `period` seconds, the tails of earlier strikes included."""
    n = round(period * sample_rate)
    return strike(np.arange(n * times) / sample_rate).reshape(times, n).sum(axis=0)


def _bell(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Partials of a free bar, 1 : 2.76 : 5.40 : 8.93, the higher ones dying sooner."""
    del rng

    def strike(t: np.ndarray) -> np.ndarray:
        partials = ((1.0, 1.0, 6.0), (2.76, 0.8, 9.0), (5.40, 0.55, 13.0), (8.93, 0.3, 20.0))
        wave = sum(a * np.exp(-d * t) * np.sin(2 * np.pi * 640.0 * pitch * f * t) for f, a, d in partials)
        return np.asarray(wave)

    return _ring_out(strike, 0.34, sample_rate, 3)


def _drum(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A membrane whose tone drops from twice its pitch, with a dull noise burst at the stroke."""
    t = _seconds(0.30, sample_rate)
    f = 85.0 * pitch
    thump = np.exp(-t / 0.08) * np.sin(2 * np.pi * (f * t + f * 0.03 * (1 - np.exp(-t / 0.03))))
    noise = np.convolve(rng.standard_normal(len(t)), np.ones(12) / 12, mode="same") * np.exp(-t / 0.02)
    return thump + 0.9 * noise


def _whistle(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A near-pure tone at 2.2 kHz with six vibrato swings a second."""
    del rng
    t = _seconds(1.0, sample_rate)
    tone = round(2200.0 * pitch)  # Whole turns in the second that is repeated.
    return np.sin(2 * np.pi * tone * t + 12.0 * np.sin(2 * np.pi * 6.0 * t))


def _buzz(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A band-limited sawtooth at 120 Hz."""
    del rng
    n = round(sample_rate / (120.0 * pitch))
    turn = 2 * np.pi * np.arange(n) / n
    return sum(np.sin(k * turn) / k for k in range(1, 24))


def _hiss(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Noise between 3 and 7 kHz, shaped in the frequency domain (hence without a seam)."""
    n = 2 * sample_rate
    hertz = np.fft.rfftfreq(n, 1 / sample_rate)
    band = (hertz > 3000.0 * pitch) & (hertz < 7000.0 * pitch)
    spectrum = np.zeros(len(hertz), complex)
    spectrum[band] = np.exp(2j * np.pi * rng.random(int(band.sum())))
    return np.fft.irfft(spectrum, n)


def _chirp(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A bird's quick upward sweep from 2.2 to 5.2 kHz, six a second with gaps."""
    del rng
    t = _seconds(0.17, sample_rate)
    length = 0.11
    sweep = np.sin(2 * np.pi * pitch * (2200.0 * t + 3000.0 / (2 * length) * t * t))
    return sweep * np.where(t < length, np.sin(np.pi * np.minimum(t / length, 1.0)) ** 0.7, 0.0)


def _siren(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A tone with two overtones wailing between 500 and 1,300 Hz and back in 0.6 s."""
    del rng
    n = round(0.6 * sample_rate)
    swing = 1 - np.abs(2 * np.arange(n) / n - 1)
    hertz = pitch * (500.0 + 800.0 * swing)
    turns = np.cumsum(hertz) / sample_rate
    turns *= round(turns[-1]) / turns[-1]  # Whole turns, so that the period joins itself.
    return sum(a * np.sin(2 * np.pi * k * turns) for k, a in ((1, 1.0), (2, 0.4), (3, 0.25)))


def _click(pitch: float, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Broadband clicks of a few milliseconds, eight a second."""
    n = round(0.125 / pitch * sample_rate)
    t = np.arange(n) / sample_rate
    return rng.standard_normal(n) * np.exp(-t / 0.003)


TIMBRES: dict[str, Callable[[float, np.random.Generator, int], np.ndarray]] = {
    "bell": _bell,
    "drum": _drum,
    "whistle": _whistle,
    "buzz": _buzz,
    "hiss": _hiss,
    "chirp": _chirp,
    "siren": _siren,
    "click": _click,
}
