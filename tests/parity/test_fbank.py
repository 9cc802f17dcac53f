"""The filterbank against kaldi-native-fbank, a C++ copy of Kaldi's front end."""

import numpy as np
import pytest

kaldi_native_fbank = pytest.importorskip("kaldi_native_fbank")

from avlm_jax.layers.fbank import LOG_FLOOR, kaldi_fbank, mel_banks, povey_window  # noqa: E402

pytestmark = pytest.mark.parity

# Log energies between -15.9 and 31; both sides compute in fp32.
TOLERANCE = 1e-3


def reference(waveform: np.ndarray) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = 16000
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 128
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16000, (waveform * 2**15).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(k) for k in range(fbank.num_frames_ready)])


def signals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    t = np.arange(16000) / 16000
    return {
        "noise": 0.1 * rng.standard_normal(16000),
        "quiet noise with an offset": 1e-4 * rng.standard_normal(16000) + 0.2,
        "chirp in noise": 0.5 * np.sin(2 * np.pi * (50 + 3500 * t) * t) + 0.01 * rng.standard_normal(16000),
        "clipped": np.clip(2 * rng.standard_normal(7777), -1, 1),
        "one frame": 0.1 * rng.standard_normal(400),
        "silence": np.zeros(4000),
    }


def definition(waveform: np.ndarray) -> np.ndarray:
    """The same energies in fp64, frame by frame."""
    x = waveform.astype(np.float64) * 2**15
    frames = np.stack([x[start : start + 400] for start in range(0, len(x) - 399, 160)])
    frames -= frames.mean(axis=1, keepdims=True)
    frames[:, 1:] -= 0.97 * frames[:, :-1]
    frames[:, 0] *= 0.03
    power = np.abs(np.fft.rfft(frames * povey_window(), 512)) ** 2
    return np.log(np.maximum(power @ mel_banks(), LOG_FLOOR))


@pytest.mark.parametrize("name", signals())
def test_log_mel_energies(name):
    waveform = signals()[name].astype(np.float32)
    theirs, exact = reference(waveform), definition(waveform)
    found = np.asarray(kaldi_fbank(waveform))
    assert found.shape == theirs.shape
    difference, our_error, their_error = (
        np.abs(a - b).max() for a, b in ((found, theirs), (found, exact), (theirs, exact))
    )
    print(f"fbank, {name}: {difference:.1e} from Kaldi; from fp64 {our_error:.1e}, Kaldi {their_error:.1e}")
    # Where fp32 cancels, Kaldi itself is off by more than the tolerance; we may be off as much, not more.
    assert difference < TOLERANCE or our_error < their_error
    assert np.median(np.abs(found - theirs)) < 1e-5
