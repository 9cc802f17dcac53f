"""Published sizes on torch's meta device: the peers' own names, shapes and counts, and no weights at all."""

import importlib.util
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from avlm_jax.encoders.beats import BeatsConfig  # noqa: E402
from avlm_jax.encoders.siglip import SiglipConfig  # noqa: E402
from avlm_jax.weights import beats, qwen2, siglip  # noqa: E402
from avlm_jax.weights.table import flatten, plan_import  # noqa: E402
from tests.parity.beats_peer import build_beats, speechbrain_beats  # noqa: E402
from tests.weights.published import BEATS, LANGUAGE, SIGLIP  # noqa: E402

pytestmark = pytest.mark.parity


class Abstract:
    """A tensor's shape and dtype, as the tables ask for them."""

    def __init__(self, tensor: torch.Tensor):
        names = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16}
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(names[tensor.dtype])


def check(module: torch.nn.Module, table, expected, total: int) -> dict[str, tuple[str, ...]]:
    """Plans the import of a module's state dict; returns reason -> names of what is left out."""
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert sum(parameter.numel() for parameter in module.parameters()) == total
    tied = getattr(module, "_tied_weights_keys", None) or {}
    config = getattr(module, "config", None)
    shared = set(tied) if getattr(config, "tie_word_embeddings", False) else set()
    tensors = {name: Abstract(t) for name, t in module.state_dict().items() if name not in shared}
    plan = plan_import(table, tensors, expected)
    assert {path: leaf.shape for path, leaf in plan.leaves.items()} == {
        path: tuple(leaf.shape) for path, leaf in flatten(expected).items()
    }
    used = {name for leaf in plan.leaves.values() for name in leaf.names} | set(plan.copies)
    ignored = {name for names in plan.ignored.values() for name in names}
    assert used | ignored == tensors.keys() and not used & ignored
    return plan.ignored


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    config, total = LANGUAGE[name]
    sizes = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta")}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    kind = {"qwen2": "Qwen2", "llama": "Llama"}[config["model_type"]]
    peer_config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(peer_config)
    ignored = check(model, qwen2.qwen2_table(config), qwen2.expected_params(config), total)
    assert not ignored
    print(f"{name}: {total:,} parameters, {len(model.state_dict())} tensors")


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip(name):
    sizes, total, _ = SIGLIP[name]
    config = SiglipConfig(**sizes)
    peer_config = transformers.SiglipVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.width,
        num_hidden_layers=config.depth, intermediate_size=config.mlp_dim,
        num_attention_heads=config.num_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(peer_config)
    pooled = siglip.siglip_table(config, pooled=True), siglip.expected_params(config, pooled=True)
    assert not check(model, *pooled, total)
    ignored = check(model, siglip.siglip_table(config), siglip.expected_params(config), total)
    assert {len(names) for names in ignored.values()} == {16, 13}  # one layer; the final norm and the head
    print(f"SigLIP {name}: {total:,} parameters, {len(model.state_dict())} tensors")


def test_a_whole_siglip():
    """google/siglip-so400m-patch14-384 holds both towers, under the names of the released file."""
    text = dict(hidden_size=1152, num_hidden_layers=27, intermediate_size=4304, num_attention_heads=16)
    vision = text | dict(image_size=384, patch_size=14)
    with torch.device("meta"):
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text | dict(vocab_size=32_000), vision_config=vision)
        )
    assert "vision_model.encoder.layers.26.mlp.fc2.bias" in model.state_dict()
    config = SiglipConfig()
    ignored = check(model, siglip.siglip_table(config), siglip.expected_params(config), 877_960_498)
    assert ignored.keys() == {
        "text tower and contrastive loss",
        "layers above hidden state -2, which is the feature",
        "final norm and head above hidden state -2, which is the feature",
    }


@pytest.mark.skipif(importlib.util.find_spec("speechbrain") is None, reason="needs speechbrain")
@pytest.mark.parametrize("num_classes", BEATS)
def test_beats(num_classes):
    config, total = BeatsConfig(), BEATS[num_classes]
    with speechbrain_beats() as peer, torch.device("meta"):
        with mock.patch.object(peer, "init_bert_params"):  # It asks for data, which there is none of.
            model = build_beats(peer, config, num_classes)
    classifier = num_classes is not None
    table, expected = beats.beats_table(config, classifier), beats.expected_params(config, num_classes)
    assert not check(model, table, expected, total)
    # The encoder alone out of the same file.
    ignored = check(model, beats.beats_table(config), beats.expected_params(config), total)
    assert [len(names) for names in ignored.values()] == ([2] if classifier else [])
    print(f"BEATs, {num_classes} classes: {total:,} parameters, {len(model.state_dict())} tensors")
