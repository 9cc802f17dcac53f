import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.layers import fbank

RATE = fbank.SAMPLE_RATE


def test_frame_counts_of_the_published_durations():
    # 1 s, 5.12 s, 10 s, 10.255 s and 30 s at 16 kHz.
    counts = {16_000: 98, 81_920: 510, 160_000: 998, 164_080: 1024, 480_000: 2998, 400: 1, 399: 0, 0: 0}
    for samples, frames in counts.items():
        assert fbank.frame_count(samples) == frames
        if frames:
            out = jax.eval_shape(fbank.kaldi_fbank, jax.ShapeDtypeStruct((2, samples), jnp.float32))
            assert out.shape == (2, frames, 128) and out.dtype == jnp.float32
    array = np.array(list(counts))
    np.testing.assert_array_equal(fbank.frame_count(array), list(counts.values()))
    np.testing.assert_array_equal(fbank.frame_count(jnp.asarray(array)), list(counts.values()))


def test_too_short_a_waveform_is_refused():
    with pytest.raises(ValueError, match="399 samples.*400"):
        fbank.kaldi_fbank(jnp.zeros(399))


def test_matches_the_definition_in_double_precision():
    rng = np.random.default_rng(0)
    waveform = (0.1 * rng.standard_normal(2000)).astype(np.float32)
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    expected = np.zeros((11, 128))
    for frame in range(11):
        x = waveform[160 * frame : 160 * frame + 400].astype(np.float64) * 32768
        x = x - x.mean()
        x = np.append(0.03 * x[0], x[1:] - 0.97 * x[:-1]) * window
        power = np.abs(np.fft.fft(x, 512)) ** 2
        for m in range(128):
            weights = np.interp(mel(np.arange(256) * 31.25), edges[m : m + 3], [0, 1, 0])
            expected[frame, m] = np.log(max(weights @ power[:256], 1.19209290e-07))
    found = fbank.kaldi_fbank(waveform)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)  # fp32 against fp64


def test_framing_joins_without_a_seam():
    """Frames of a long signal are the frames of its pieces cut at a multiple of the shift."""
    rng = np.random.default_rng(1)
    waveform = jnp.asarray(0.1 * rng.standard_normal((3, 160 * 40 + 240)), jnp.float32)
    whole = fbank.kaldi_fbank(waveform)
    second = fbank.kaldi_fbank(waveform[:, 160 * 25 :])
    np.testing.assert_allclose(whole[:, 25:], second, atol=1e-4)


def test_a_tone_lights_its_own_mel_bin_and_an_offset_none():
    t = np.arange(RATE) / RATE
    edges = np.linspace(*(1127 * np.log1p(f / 700) for f in (20, 8000)), 130)
    for hertz in (440.0, 1000.0, 3000.0):
        out = np.asarray(fbank.kaldi_fbank(jnp.asarray(0.3 * np.sin(2 * np.pi * hertz * t), jnp.float32)))
        nearest = np.abs(edges[1:-1] - 1127 * np.log1p(hertz / 700)).argmin()
        assert np.abs(out.mean(axis=0).argmax() - nearest) <= 1
    constant = fbank.kaldi_fbank(jnp.full(RATE, 0.5, jnp.float32))
    np.testing.assert_allclose(constant, np.log(fbank.LOG_FLOOR), atol=1e-5)


def test_louder_by_two_is_log_four_more():
    rng = np.random.default_rng(2)
    waveform = jnp.asarray(0.1 * rng.standard_normal(4000), jnp.float32)
    quiet, loud = fbank.kaldi_fbank(waveform), fbank.kaldi_fbank(2 * waveform)
    heard = np.asarray(quiet) > -10  # the lowest mel triangles hold no FFT bin and stay at the floor
    assert heard.mean() > 0.9
    np.testing.assert_allclose(np.asarray(loud - quiet)[heard], np.log(4), atol=1e-4)


def test_normalisation_has_the_factor_two():
    x = jnp.asarray([15.41663, 15.41663 + 6.55582])
    np.testing.assert_allclose(fbank.beats_normalize(x), [0.0, 0.5], atol=1e-6)


def test_the_tpu_form_of_the_spectrum_is_as_exact_as_the_fast_transform():
    rng = np.random.default_rng(3)
    frames = rng.standard_normal((2, 7, 400)) * 3000
    expected = np.abs(np.fft.rfft(frames, 512)) ** 2
    loudest = expected.max(axis=-1, keepdims=True)
    inputs = jnp.asarray(frames, jnp.float32)
    for form in (fbank._power_by_product, fbank._power_by_fft):
        # fp32 sums of 400 products: the error is relative to the loudest bin, in both forms.
        np.testing.assert_array_less(np.abs(form(inputs) - expected) / loudest, 3e-6)
    lowered = jax.jit(fbank.kaldi_fbank).trace(jnp.zeros(4000)).lower(lowering_platforms=("tpu",))
    assert "fft" not in lowered.as_text()
    assert "fft" in jax.jit(fbank.kaldi_fbank).lower(jnp.zeros(4000)).as_text()
