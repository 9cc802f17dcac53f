"""BEATs against speechbrain's port of the original, with random weights, in fp32."""

import dataclasses
import importlib.util

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("kaldi_native_fbank")
if importlib.util.find_spec("speechbrain") is None:  # importing it here would already ask for torchaudio
    pytest.skip("needs speechbrain", allow_module_level=True)

from avlm_jax.encoders.beats import (  # noqa: E402
    BeatsClassifier,
    BeatsConfig,
    BeatsEncoder,
    relative_buckets,
)
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank  # noqa: E402
from avlm_jax.weights import safetensors_io  # noqa: E402
from avlm_jax.weights.beats import beats_table, expected_params, load_beats, save_beats  # noqa: E402
from avlm_jax.weights.table import export_params, import_params  # noqa: E402
from tests.parity.beats_peer import build_beats, speechbrain_beats  # noqa: E402
from tests.parity.peers import relative_error  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides, and theirs takes the softmax through a division and a multiplication by 32.
TOLERANCE = 1e-4

TINY = BeatsConfig(
    embed_dim=24, width=48, depth=3, num_heads=4, mlp_dim=80, conv_pos_kernel=16, conv_pos_groups=4,
    num_buckets=32, max_distance=40, mask="unilm",
)  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    with speechbrain_beats() as module:
        yield module


def build(peer, config: BeatsConfig, num_classes: int | None, seed: int = 0):
    """Their model with our sizes and random weights, and our parameters out of its state dict."""
    model = build_beats(peer, config, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm.weight" in name or "grep_a" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("original0"):
                parameter.copy_(1 + 0.3 * noise.abs())
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 and "relative" not in name else 4
                parameter.copy_(noise / fan_in**0.5)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    classifier = num_classes is not None
    params, _ = import_params(beats_table(config, classifier), tensors, expected_params(config, num_classes))
    return model, params


def compare(
    peer, config: BeatsConfig, waveforms: np.ndarray, lengths: list[float], num_classes: int | None = 7
) -> float:
    """Largest error over unmasked tokens and class probabilities, relative to the largest feature.

    From waveforms on both sides. Asserts that the number of tokens and their mask are the same.
    """
    model, params = build(peer, config, num_classes)
    wav = torch.from_numpy(waveforms)
    with torch.no_grad():
        features, *tagged = model.extract_features(wav, torch.tensor(lengths))
        frames = model.preprocess(wav)
        samples = torch.arange(wav.shape[1])[None] >= (torch.tensor(lengths) * wav.shape[1])[:, None]
        frame_padding = model.forward_padding_mask(frames, samples)
        padding = model.forward_padding_mask(features, frame_padding)
    fbank = beats_normalize(kaldi_fbank(waveforms))
    frame_mask = ~frame_padding.numpy()
    encoder = {name: value for name, value in params.items() if name != "predictor"}
    found, mask = BeatsEncoder(config).apply({"params": encoder}, fbank, frame_mask)
    np.testing.assert_array_equal(np.asarray(mask), ~padding.numpy())
    assert mask.shape[1] == config.num_tokens(fbank.shape[1])
    error = relative_error(found, features, mask)
    if tagged:
        logits = BeatsClassifier(config, num_classes=num_classes).apply({"params": params}, fbank, frame_mask)
        probabilities = 1 / (1 + np.exp(-np.asarray(logits)))
        error = max(error, float(np.abs(probabilities - tagged[0].numpy()).max()))
    return error


def noise(n: int, samples: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    level = np.exp(rng.normal(size=(n, samples // 400 + 1))).repeat(400, axis=1)[:, :samples]
    return np.clip(0.05 * level * rng.standard_normal((n, samples)), -1, 1).astype(np.float32)


OPTIONS = {
    "as released": {},
    "odd kernel": dict(conv_pos_kernel=15),
    "no gate, no deep norm": dict(gru_gate=False, deep_norm=False),
    "no gate": dict(gru_gate=False),
    "no deep norm": dict(deep_norm=False),
    "no projection": dict(embed_dim=48),
    "few, near buckets": dict(num_buckets=8, max_distance=12),
    "time_patch": dict(mask="time_patch"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_unpadded(peer, name):
    error = compare(peer, dataclasses.replace(TINY, **OPTIONS[name]), noise(2, 16000), [1.0, 1.0])
    print(f"BEATs tiny, {name}: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", ["as released", "no gate, no deep norm", "no projection"])
def test_padded(peer, name):
    config = dataclasses.replace(TINY, **OPTIONS[name])
    error = compare(peer, config, noise(3, 24000), [1.0, 0.47, 0.8])
    print(f"BEATs tiny, padded, {name}: {error:.1e} of the scale")
    assert error < TOLERANCE


def test_padded_at_a_column_border(peer):
    """Where the sound ends with a column of patches, our own rule for the mask and unilm's are the same."""
    config = dataclasses.replace(TINY, mask="time_patch")
    # 148 frames of 162 samples, as unilm cuts its mask: 64 frames are 4 columns.
    error = compare(peer, config, noise(2, 24000), [1.0, 64 * 162 / 24000])
    print(f"BEATs tiny, padded at a column's border, our mask: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("num_classes", [None, 527])
def test_one_layer_at_the_released_width(peer, num_classes):
    config = BeatsConfig(depth=1, mask="unilm")
    error = compare(peer, config, noise(2, 16000), [1.0, 0.6], num_classes)
    kind = "pretrained only" if num_classes is None else f"fine-tuned on {num_classes} classes"
    print(f"BEATs released width, one layer, {kind}: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("seconds,tokens", [(1, 48), (10, 496), (30, 1496)])
@pytest.mark.parametrize("length", [1.0, 0.7])
def test_seconds_to_tokens(peer, seconds, tokens, length):
    """From the waveform on; 10 s and more reach the logarithmic buckets and the last one."""
    config = dataclasses.replace(TINY, depth=2)
    assert config.num_tokens(1 + (16000 * seconds - 400) // 160) == tokens
    error = compare(peer, config, noise(1, 16000 * seconds), [length])
    print(f"BEATs tiny, {seconds} s, {length:.0%} of it sound, {tokens} tokens: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("num_buckets,max_distance", [(320, 800), (32, 40), (320, 1280)])
def test_relative_buckets(peer, num_buckets, max_distance):
    attention = peer.MultiheadAttention(
        8, 2, has_relative_attention_bias=True, num_buckets=num_buckets, max_distance=max_distance
    )
    distance = np.arange(-3000, 3001)
    expected = attention._relative_positions_bucket(torch.from_numpy(distance)).numpy()
    np.testing.assert_array_equal(relative_buckets(distance, num_buckets, max_distance), expected)


def test_the_port_reads_what_we_write(peer, tmp_path):
    model, params = build(peer, TINY, num_classes=7)
    save_beats(tmp_path, TINY, params)
    stored = safetensors_io.read_folder(tmp_path)
    state = {name: torch.from_numpy(np.array(stored[name])) for name in stored}
    renamed = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in state.items()
    }
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(renamed, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    config, again, _ = load_beats(tmp_path, classifier=True)
    assert export_params(beats_table(config, True), again).keys() == state.keys()
