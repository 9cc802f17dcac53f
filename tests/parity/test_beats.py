"""BEATs against speechbrain's port of the original, with random weights, in fp32."""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
kaldi_native_fbank = pytest.importorskip("kaldi_native_fbank")
if importlib.util.find_spec("speechbrain") is None:  # importing it here would already ask for torchaudio
    pytest.skip("needs speechbrain", allow_module_level=True)

from avlm_jax.encoders.beats import (  # noqa: E402
    BeatsClassifier,
    BeatsConfig,
    BeatsEncoder,
    relative_buckets,
    token_mask,
)
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank  # noqa: E402
from avlm_jax.weights import safetensors_io  # noqa: E402
from avlm_jax.weights.beats import beats_table, expected_params, load_beats, save_beats  # noqa: E402
from avlm_jax.weights.table import export_params, import_params  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides, and theirs takes the softmax through a division and a multiplication by 32.
TOLERANCE = 1e-4

TINY = BeatsConfig(
    embed_dim=24, width=48, depth=3, num_heads=4, mlp_dim=80, conv_pos_kernel=16, conv_pos_groups=4,
    num_buckets=32, max_distance=40, mask="unilm",
)  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    """speechbrain.lobes.models.beats; torchaudio, which it wants for the filterbank, is stood in for."""

    def fbank(waveform, num_mel_bins, sample_frequency, frame_length, frame_shift):
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = sample_frequency
        options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = frame_length, frame_shift
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = num_mel_bins
        online = kaldi_native_fbank.OnlineFbank(options)
        online.accept_waveform(sample_frequency, waveform[0].tolist())
        online.input_finished()
        return torch.from_numpy(np.stack([online.get_frame(k) for k in range(online.num_frames_ready)]))

    names = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules[names[-1]].fbank = fbank
    sys.modules[names[0]].list_audio_backends = list
    try:
        yield importlib.import_module("speechbrain.lobes.models.beats")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def build(peer, monkeypatch, config: BeatsConfig, num_classes: int, seed: int = 0):
    """Their model with our sizes and random weights, and our parameters out of its state dict."""
    cfg = dict(
        input_patch_size=config.patch_size, embed_dim=config.embed_dim, encoder_embed_dim=config.width,
        encoder_layers=config.depth, encoder_attention_heads=config.num_heads,
        encoder_ffn_embed_dim=config.mlp_dim, conv_pos=config.conv_pos_kernel,
        conv_pos_groups=config.conv_pos_groups, num_buckets=config.num_buckets,
        max_distance=config.max_distance, gru_rel_pos=config.gru_gate, deep_norm=config.deep_norm,
        relative_position_embedding=True, layer_wise_gradient_decay_ratio=0.6, encoder_layerdrop=0.05,
        finetuned_model=True, predictor_class=num_classes,
    )  # fmt: skip
    original = peer.BEATsConfig
    monkeypatch.setattr(peer, "BEATsConfig", lambda _: original(cfg))
    model = peer.BEATs().eval()
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
    params, _ = import_params(beats_table(config, True), tensors, expected_params(config, num_classes))
    return model, params


def compare(peer, monkeypatch, config: BeatsConfig, waveforms: np.ndarray, lengths: list[float]) -> float:
    """Largest error over unmasked tokens and class probabilities, relative to the largest feature."""
    model, params = build(peer, monkeypatch, config, num_classes=7)
    wav = torch.from_numpy(waveforms)
    with torch.no_grad():
        features, probabilities, padding = model.extract_features(wav, torch.tensor(lengths))
        frames = model.preprocess(wav)
        samples = torch.arange(wav.shape[1])[None] >= (torch.tensor(lengths) * wav.shape[1])[:, None]
        frame_padding = model.forward_padding_mask(frames, samples)
    fbank = beats_normalize(kaldi_fbank(waveforms))
    frame_mask = ~frame_padding.numpy()
    encoder = {name: value for name, value in params.items() if name != "predictor"}
    found, mask = BeatsEncoder(config).apply({"params": encoder}, fbank, frame_mask)
    np.testing.assert_array_equal(np.asarray(mask), ~padding.numpy())
    logits = BeatsClassifier(config, num_classes=7).apply({"params": params}, fbank, frame_mask)
    valid = np.asarray(mask)
    difference = np.abs(np.asarray(found) - features.numpy())[valid].max() / features.abs().max().item()
    probability_error = np.abs(1 / (1 + np.exp(-np.asarray(logits))) - probabilities.numpy()).max()
    return float(max(difference, probability_error))


def noise(n: int, samples: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    level = np.exp(rng.normal(size=(n, samples // 400 + 1))).repeat(400, axis=1)[:, :samples]
    return np.clip(0.05 * level * rng.standard_normal((n, samples)), -1, 1).astype(np.float32)


@pytest.mark.parametrize("kernel", [16, 15])
@pytest.mark.parametrize("gru_gate,deep_norm", [(True, True), (False, False)])
def test_unpadded(peer, monkeypatch, kernel, gru_gate, deep_norm):
    config = dataclasses.replace(TINY, conv_pos_kernel=kernel, gru_gate=gru_gate, deep_norm=deep_norm)
    error = compare(peer, monkeypatch, config, noise(2, 16000), [1.0, 1.0])
    print(f"BEATs tiny, kernel {kernel}, gate {gru_gate}, deep norm {deep_norm}: {error:.1e} of the scale")
    assert error < TOLERANCE


def test_padded(peer, monkeypatch):
    error = compare(peer, monkeypatch, TINY, noise(3, 24000), [1.0, 0.47, 0.8])
    print(f"BEATs tiny, padded: {error:.1e} of the scale")
    assert error < TOLERANCE


def test_one_layer_at_the_released_width(peer, monkeypatch):
    config = BeatsConfig(depth=1, mask="unilm")
    error = compare(peer, monkeypatch, config, noise(2, 16000), [1.0, 0.6])
    print(f"BEATs released width, one layer: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("seconds,tokens", [(1, 48), (10, 496), (30, 1496)])
def test_token_counts_agree(peer, monkeypatch, seconds, tokens):
    config = dataclasses.replace(TINY, depth=1)
    model, _ = build(peer, monkeypatch, config, num_classes=7)
    with torch.no_grad():
        features, _, padding = model.extract_features(torch.zeros(1, 16000 * seconds), torch.tensor([0.7]))
    frames = 1 + (16000 * seconds - 400) // 160
    assert features.shape[1] == tokens == config.num_tokens(frames) == padding.shape[1]
    assert token_mask(np.ones((1, frames), bool), config).shape == (1, tokens)


@pytest.mark.parametrize("num_buckets,max_distance", [(320, 800), (32, 40), (320, 1280)])
def test_relative_buckets(peer, num_buckets, max_distance):
    attention = peer.MultiheadAttention(
        8, 2, has_relative_attention_bias=True, num_buckets=num_buckets, max_distance=max_distance
    )
    distance = np.arange(-3000, 3001)
    expected = attention._relative_positions_bucket(torch.from_numpy(distance)).numpy()
    np.testing.assert_array_equal(relative_buckets(distance, num_buckets, max_distance), expected)


def test_the_port_reads_what_we_write(peer, monkeypatch, tmp_path):
    model, params = build(peer, monkeypatch, TINY, num_classes=7)
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
