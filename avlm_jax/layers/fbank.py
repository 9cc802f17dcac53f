"""Kaldi's log-mel filterbank in JAX, as BEATs reads it (microsoft/unilm: beats/BEATs.py, `preprocess`).

BEATs calls torchaudio.compliance.kaldi.fbank with num_mel_bins=128, sample_frequency=16000, frame_length=25,
frame_shift=10 and Kaldi's defaults for the rest; those defaults (kaldi-asr/kaldi: feat/feature-window.h,
mel-computations.h) are the constants below. Dither is 0 and no energy is appended.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SAMPLE_RATE = 16_000  # Hz
FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
FFT_SIZE = 512  # FRAME_LENGTH rounded up to a power of two
NUM_MEL = 128
LOW_HZ, HIGH_HZ = 20.0, 8000.0  # Kaldi's low-freq default; high-freq 0 means the Nyquist frequency
PREEMPHASIS = 0.97
POVEY_EXPONENT = 0.85  # the "povey" window is a symmetric Hann window to this power
LOG_FLOOR = 1.1920928955078125e-07  # fp32 machine epsilon, applied to the mel energies before the logarithm
WAVEFORM_SCALE = 2.0**15  # [-1, 1] to the int16 range Kaldi expects (BEATs.py: waveform * 2 ** 15)
BEATS_MEAN, BEATS_STD = 15.41663, 6.55582  # BEATs.py defaults fbank_mean, fbank_std


def frame_count(num_samples: int | jax.Array) -> int | jax.Array:
    """Whole 25-ms frames every 10 ms that fit in `num_samples` (snip_edges): 1 s 98, 10 s 998, 30 s 2998.

    Works on ints and elementwise on integer arrays; fewer than 400 samples give 0.
    """
    count = 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT
    if isinstance(count, int):
        return max(count, 0)
    return jnp.maximum(count, 0) if isinstance(count, jax.Array) else np.maximum(count, 0)


@functools.cache
def povey_window() -> np.ndarray:
    """f64[400], Kaldi's default window."""
    n = np.arange(FRAME_LENGTH, dtype=np.float64)
    return (0.5 - 0.5 * np.cos(2.0 * np.pi * n / (FRAME_LENGTH - 1))) ** POVEY_EXPONENT


@functools.cache
def mel_banks() -> np.ndarray:
    """f64[257 128]: triangles with straight sides on the mel scale; the Nyquist bin has no weight."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)

    low, high = mel(LOW_HZ), mel(HIGH_HZ)
    step = (high - low) / (NUM_MEL + 1)
    left = low + step * np.arange(NUM_MEL)
    centre, right = left + step, left + 2 * step
    bins = mel(np.arange(FFT_SIZE // 2) * SAMPLE_RATE / FFT_SIZE)[:, None]
    banks = np.maximum(0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
    return np.concatenate([banks, np.zeros((1, NUM_MEL))])


def _frames(waveform: jax.Array) -> jax.Array:
    """[... s] -> [... frames 400] out of strided slices of 80-sample pieces, cheaper than a gather."""
    piece = np.gcd(FRAME_LENGTH, FRAME_SHIFT).item()  # 80 = 400 / 5 = 160 / 2
    count = frame_count(waveform.shape[-1])
    stride, pieces = FRAME_SHIFT // piece, FRAME_LENGTH // piece
    used = (count - 1) * stride + pieces
    x = waveform[..., : used * piece].reshape(*waveform.shape[:-1], used, piece)
    return jnp.concatenate(
        [x[..., k : k + (count - 1) * stride + 1 : stride, :] for k in range(pieces)], axis=-1
    )


def _power_by_fft(frames: Float[Array, "*b frames 400"]) -> Float[Array, "*b frames 257"]:
    spectrum = jnp.fft.rfft(frames, n=FFT_SIZE)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _power_by_product(frames: Float[Array, "*b frames 400"]) -> Float[Array, "*b frames 257"]:
    """The same by a product with the Fourier matrix, which is what a TPU is made for: XLA has no fast transform there, and what
    it puts in its place takes a minute of CPU time to compile for v6e (measured: 60 to 75 s, this 17 s; 12 and 15 s for v5e).
    """
    matrix = jnp.asarray(fourier_matrix(), jnp.float32)
    parts = jnp.matmul(frames, matrix, precision=jax.lax.Precision.HIGHEST)
    real, imaginary = jnp.split(parts, 2, axis=-1)
    return jnp.square(real) + jnp.square(imaginary)


@functools.cache
def fourier_matrix() -> np.ndarray:
    """f64[400 514], real parts beside imaginary ones, of the transform of 400 samples padded to 512."""
    # Reduced before the division: an angle keeps its last bits.
    turns = np.outer(np.arange(FRAME_LENGTH), np.arange(FFT_SIZE // 2 + 1)) % FFT_SIZE
    angles = -2.0 * np.pi * turns / FFT_SIZE
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def kaldi_fbank(waveform: Float[Array, "*b s"]) -> Float[Array, "*b frames 128"]:
    """Log-mel energies of 16 kHz mono audio in [-1, 1], fp32; frames = 1 + (s - 400) // 160.

    Raises:
        ValueError: fewer than 400 samples, which hold no frame.
    """
    if waveform.shape[-1] < FRAME_LENGTH:
        raise ValueError(
            f"the waveform has {waveform.shape[-1]} samples; a filterbank frame needs {FRAME_LENGTH} (25 ms)"
        )
    frames = _frames(waveform.astype(jnp.float32) * WAVEFORM_SCALE)
    frames = frames - frames.mean(axis=-1, keepdims=True)
    # Kaldi's first sample of a frame has no predecessor and is its own: x[0] - 0.97 x[0].
    previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    window = jnp.asarray(povey_window(), jnp.float32).reshape((1,) * (frames.ndim - 1) + (FRAME_LENGTH,))
    frames = (frames - PREEMPHASIS * previous) * window
    power = jax.lax.platform_dependent(frames, tpu=_power_by_product, default=_power_by_fft)
    # HIGHEST: a TPU would otherwise round the power spectrum to bf16 here.
    mel = jnp.matmul(power, jnp.asarray(mel_banks(), jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, LOG_FLOOR))


def beats_normalize(fbank: Float[Array, "*b frames mel"]) -> Float[Array, "*b frames mel"]:
    """(x - 15.41663) / (2 * 6.55582). The factor 2 is BEATs' own (BEATs.py, `preprocess`)."""
    return (fbank - BEATS_MEAN) / (2.0 * BEATS_STD)
