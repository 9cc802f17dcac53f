"""Sound read by tensorflow-io against PyAV, where tensorflow-io's environment is: $AVLM_TFIO_PYTHON or .venv-tfio.

`avlm doctor --make-tfio-venv` builds it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from input_pipeline.media import MediaError, load_media
from input_pipeline.spec import SAMPLE_RATE, MediaSpec
from input_pipeline.tfio_audio import DEFAULT_PYTHON, PYTHON_VARIABLE, TfioAudio
from tests.input_pipeline.media_corpus import cut, write_sound, write_video

ONE_WINDOW = MediaSpec(max_windows=1, window_frames=2000)  # 20 s: all of any sound here
LSB = 1 / 2**15

# The part of the band that both low-passes leave alone: PyAV's reaches 0.97 of the lower Nyquist frequency,
# tensorflow-io's is 0.06 dB high at 0.85 of it.
PASSED = 0.8


@pytest.fixture(scope="module")
def tfio(repository: Path) -> Iterator[TfioAudio]:
    python = os.environ.get(PYTHON_VARIABLE) or repository / DEFAULT_PYTHON
    if PYTHON_VARIABLE not in os.environ and not Path(python).exists():
        pytest.skip(
            f"no environment with tensorflow-io at {python}; `avlm doctor --make-tfio-venv` builds it"
        )
    reader = TfioAudio(os.fspath(python), timeout=60.0)
    yield reader
    reader.close()


def pyav(path: Path) -> np.ndarray:
    """The whole sound as `avlm prepare` reads it by default."""
    ((_, _, samples),) = load_media(path, ONE_WINDOW, kind="audio").windows
    return samples


def noise(rate: int, channels: int = 1, seconds: float = 2.0) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (channels, round(rate * seconds))).astype(np.float32)


def lag(a: np.ndarray, b: np.ndarray) -> int:
    """Samples by which `a` comes after `b`."""
    size = min(len(a), len(b))
    spectrum = np.fft.rfft(a[:size], 2 * size) * np.conj(np.fft.rfft(b[:size], 2 * size))
    peak = int(np.argmax(np.fft.irfft(spectrum)))
    return peak if peak < size else peak - 2 * size


def spectra(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies and both spectra; without the edges, at which a resampler sees silence that is not there."""
    size = min(len(a), len(b))
    window = np.hanning(size)
    return (
        np.fft.rfftfreq(size, 1 / SAMPLE_RATE),
        np.fft.rfft(a[:size] * window),
        np.fft.rfft(b[:size] * window),
    )


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_f32le", "flac"])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_at_16_khz_the_samples_are_the_same(tfio: TfioAudio, tmp_path: Path, codec: str, layout: str) -> None:
    suffix = "flac" if codec == "flac" else "wav"
    sound = noise(SAMPLE_RATE, 1 if layout == "mono" else 2)
    path = write_sound(tmp_path / f"noise.{suffix}", sound, SAMPLE_RATE, codec=codec, layout=layout)
    samples, start = tfio(path)
    assert start == 0.0
    np.testing.assert_array_equal(samples, pyav(path))
    np.testing.assert_allclose(samples, sound.mean(axis=0), atol=2**-7 if codec == "pcm_u8" else LSB)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampled_it_is_the_same_where_both_low_passes_are_flat(
    tfio: TfioAudio, tmp_path: Path, rate: int
) -> None:
    path = write_sound(tmp_path / "noise.wav", noise(rate, 2), rate, layout="stereo")
    ours, theirs = tfio(path)[0], pyav(path)
    assert abs(len(ours) - len(theirs)) <= 1
    assert lag(ours, theirs) == 0
    frequencies, a, b = spectra(ours, theirs)
    passed = frequencies < PASSED * min(rate, SAMPLE_RATE) / 2
    # What is left is the ripple of two filters, 7e-5 at most; a hundredth of a sample off would give 1e-2.
    assert np.linalg.norm(a[passed] - b[passed]) < 2e-4 * np.linalg.norm(b[passed])


def test_what_16_khz_cannot_hold_is_not_folded_back(tfio: TfioAudio, tmp_path: Path) -> None:
    time = np.arange(2 * 44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 10_000 * time).astype(np.float32)
    samples, _ = tfio(write_sound(tmp_path / "tone.wav", tone[None], 44_100, codec="pcm_f32le"))
    assert np.abs(samples[1000:-1000]).max() < 0.5 * 10 ** (-80 / 20)


def test_an_impulse_stays_where_it_is(tfio: TfioAudio, tmp_path: Path) -> None:
    impulse = np.zeros((1, 44_100), np.float32)
    impulse[0, 22_050] = 1.0
    samples, _ = tfio(write_sound(tmp_path / "impulse.wav", impulse, 44_100, codec="pcm_f32le"))
    assert np.argmax(samples) == 8_000 and len(samples) == 16_000


def test_real_speech(tfio: TfioAudio, shared_media: Path) -> None:
    path = shared_media / "jfk.flac"  # 24 bits, 44.1 kHz, stereo
    ours, theirs = tfio(path)[0], pyav(path)
    assert len(ours) == len(theirs) == 176_000 and lag(ours, theirs) == 0
    # Speech has next to nothing above 6.4 kHz, so that the whole band agrees.
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999999


def test_the_encoder_delay_of_an_mp3_is_left_out(tfio: TfioAudio, shared_media: Path) -> None:
    path = shared_media / "nasa_13013.mp4.audio.mp3"  # 8 kHz, stereo
    ours, start = tfio(path)
    theirs = pyav(path)
    assert start == pytest.approx(0.138125) and len(ours) == len(theirs) == 208_896 and lag(ours, theirs) == 0
    frequencies, a, b = spectra(ours, theirs)
    passed = frequencies < PASSED * 4_000
    assert np.linalg.norm(a[passed] - b[passed]) < 1e-4 * np.linalg.norm(b[passed])


def test_an_mp3_at_16_khz(tfio: TfioAudio, tmp_path: Path) -> None:
    sound = noise(SAMPLE_RATE, 2)
    path = write_sound(tmp_path / "noise.mp3", sound, SAMPLE_RATE, codec="libmp3lame", layout="stereo")
    ours, theirs = tfio(path)[0], pyav(path)
    # Two decoders in single precision.
    np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_vorbis_at_16_khz(tfio: TfioAudio, tmp_path: Path) -> None:
    sound = noise(SAMPLE_RATE, 2)
    path = tmp_path / "noise.ogg"
    with av.open(str(path), "w") as container:
        # FFmpeg's own encoder, which it calls experimental, and for stereo alone.
        stream = container.add_stream(
            "vorbis", rate=SAMPLE_RATE, layout="stereo", options={"strict": "experimental"}
        )
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame) + stream.encode(None))
    ours, start = tfio(path)
    theirs = pyav(path)
    assert start == 0.0 and len(ours) == len(theirs)
    # Two decoders in single precision, 1.5e-7 apart where this was measured.
    np.testing.assert_allclose(ours, theirs, atol=5e-7)


def test_what_it_would_misread_or_cannot_read_is_refused(
    tfio: TfioAudio, tmp_path: Path, shared_media: Path
) -> None:
    sound = noise(SAMPLE_RATE)
    files = {
        shared_media / "sine_mono_s32_8000.wav": "WAV with integers of 32 bits",
        shared_media / "nasa_13013.mp4": "MP4 or QuickTime",
        write_sound(tmp_path / "a.wav", sound, SAMPLE_RATE, codec="pcm_alaw"): "WAV with the codec 0x0006",
        write_sound(tmp_path / "a.m4a", sound, SAMPLE_RATE, codec="aac"): "MP4 or QuickTime",
        write_sound(tmp_path / "a.ogg", sound, SAMPLE_RATE, codec="flac"): "not Vorbis",
        write_video(
            tmp_path / "a.mkv", [20, 90], [0.0, 0.1], sound=(sound[0] * 2**15).astype(np.int16)
        ): "no WAV",
    }
    for path, reason in files.items():
        with pytest.raises(MediaError, match=f"{reason}.*use --audio-backend pyav") as caught:
            tfio(path)
        assert caught.value.stage == "open", path


def test_damage_is_found(tfio: TfioAudio, tmp_path: Path) -> None:
    wav = write_sound(tmp_path / "a.wav", noise(SAMPLE_RATE), SAMPLE_RATE)
    flac = write_sound(tmp_path / "a.flac", noise(SAMPLE_RATE), SAMPLE_RATE, codec="flac")
    data = bytearray(flac.read_bytes())
    data[len(data) // 2] ^= 0x40  # tensorflow-io gives other samples and says nothing
    (tmp_path / "flipped.flac").write_bytes(data)
    for path in (cut(wav, 0.6), cut(flac, 0.6), tmp_path / "flipped.flac"):
        with pytest.raises(MediaError) as caught:
            tfio(path)
        assert caught.value.stage == "decode", path


def test_a_wav_whose_header_hides_samples_is_refused(tfio: TfioAudio, tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", noise(SAMPLE_RATE), SAMPLE_RATE)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0)  # as a recorder leaves it that was switched off
    path.write_bytes(data)
    with pytest.raises(MediaError):
        tfio(path)


def test_media_load_with_it(tfio: TfioAudio, shared_media: Path) -> None:
    path = shared_media / "sine_mono_s16.wav"
    spec = MediaSpec(max_windows=2, window_frames=300)
    default, other = load_media(path, spec), load_media(path, spec, audio_reader=tfio)
    assert [window[:2] for window in other.windows] == [window[:2] for window in default.windows]
    for ours, theirs in zip(other.windows, default.windows, strict=True):
        np.testing.assert_array_equal(ours[2], theirs[2])
