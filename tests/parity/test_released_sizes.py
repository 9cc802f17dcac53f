"""The whole way at the released sizes: SigLIP so400m, BEATs iter3+ (a .pt), Qwen2-0.5B; random weights, a few minutes.

    make parity ARGS="-m slow tests/parity/test_released_sizes.py"

Needs about 9 GB of memory and 8 GB of disk.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from avlm_jax import cli  # noqa: E402
from avlm_jax.assembly import assemble, load_backbones  # noqa: E402
from avlm_jax.checkpoints.stage_result import save_tree  # noqa: E402
from avlm_jax.config import config_to_json, load_config  # noqa: E402
from avlm_jax.encoders.beats import BeatsConfig  # noqa: E402
from avlm_jax.generate import load_model  # noqa: E402
from avlm_jax.state import flatten, unflatten  # noqa: E402
from avlm_jax.weights import beats  # noqa: E402
from avlm_jax.weights.table import export_params  # noqa: E402
from tests.released_folders import CHAT_TEMPLATE  # noqa: E402
from tests.tiny_system import CONFIG, make_media, padded  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

# fp32 on both sides through 26 + 12 + 24 layers.
TOLERANCE = 1e-4
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Qwen2: 151643 to 151645
SINGLE = ("model.vision", "model.audio", "model.avts", "model.llm")
OVERRIDES = (
    *(f"{section}.dtype=float32" for section in SINGLE),
    "frozen_dtype=float32", "media.num_frames=2", "media.max_windows=2", "text.max_length=384",
)  # fmt: skip


def make_vision(folder: Path) -> None:
    """google/siglip-so400m-patch14-384, config.json."""
    config = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27, image_size=384,
        patch_size=14,
    )  # fmt: skip
    transformers.SiglipVisionModel(config).save_pretrained(folder)


def make_audio(file: Path) -> None:
    """A fine-tuned iter3+ checkpoint, as published: a pickle with cfg and model."""
    config, rng = BeatsConfig(), np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("scale", "bias", "g"):
            return np.full(shape, {"scale": 1.0, "bias": 0.0, "g": 0.5}[name], np.float32)
        return rng.normal(0, 0.02, shape).astype(np.float32)

    shapes = flatten(beats.expected_params(config, 527))
    tree = unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})
    model = {
        name: torch.from_numpy(np.array(tensor))
        for name, tensor in export_params(beats.beats_table(config, True), tree).items()
    }
    cfg = {theirs: getattr(config, ours) for ours, (theirs, _) in beats._CONFIG_KEYS.items()}
    cfg |= {"relative_position_embedding": True, "finetuned_model": True, "predictor_class": 527}
    torch.save({"cfg": cfg, "model": model}, file)


def make_llm(folder: Path) -> None:
    """Qwen/Qwen2-0.5B-Instruct, config.json; bfloat16 in shards, with a byte-level tokenizer of as many tokens."""
    config = transformers.Qwen2Config(
        vocab_size=151_936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, bos_token_id=151_643, eos_token_id=151_645,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {sign: index for index, sign in enumerate(alphabet)}
    words |= {f"~{index}": index for index in range(len(alphabet), 151_643)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=CONTROL[0],
        eos_token=CONTROL[2],
        extra_special_tokens=[CONTROL[1]],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def test_released_files_become_a_model_that_pytorch_computes_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    make_vision(tmp_path / "siglip")
    make_audio(tmp_path / "BEATs.pt")
    make_llm(tmp_path / "qwen2")
    parts = {"vision": "siglip", "audio": "BEATs.pt", "llm": "qwen2"}
    given = [word for part, name in parts.items() for word in (f"--{part}", str(tmp_path / name))]
    weights, name = tmp_path / "weights", f"{CONFIG}:size=0.5b,weights={tmp_path / 'weights'}"
    assert cli.main(["import-weights", *given, "--out", str(weights), "--config", name]) == 0

    assembly = assemble(load_config(name, OVERRIDES))
    rng, reports = np.random.default_rng(1), load_backbones(assembly.config)[1]
    learnt = unflatten(
        {
            path: rng.normal(0, 0.02, leaf.shape).astype(np.float32) + path.endswith("scale")
            for path, leaf in flatten(assembly.abstract_params()).items()
            if path.startswith("connector/") or "lora_" in path
        }
    )
    metadata = {
        "stage": "2b", "parent": None, "weights": {part: report.sha256 for part, report in reports.items()},
    }  # fmt: skip
    save_tree(
        tmp_path / "run" / "2b" / "final", learnt, json.loads(config_to_json(assembly.config)), metadata
    )
    del learnt

    model = load_model(tmp_path / "run" / "2b" / "final")
    media = padded(make_media(assembly.system.spec, 0, frames=2, windows=2), assembly.system.spec)
    turns = [{"from": "human", "value": "What is heard between 0.5 s and 1 s?"}]
    row = assembly.builder(prompt=True).build(media, {"id": "q", "conversations": turns})
    batch = {key: np.array(value)[None] for key, value in row.arrays.items()}
    ours = np.asarray(assembly.system.apply({"params": model.params}, batch, method="logits"))
    del model
    jax.clear_caches()
    gc.collect()

    exported = tmp_path / "exported"
    command = ["export", "--workdir", str(tmp_path / "run"), "--out", str(exported), "--adapter"]
    assert cli.main(command) == 0
    monkeypatch.syspath_prepend(str(exported))
    monkeypatch.delitem(sys.modules, "modeling_savenvideo", raising=False)
    from modeling_savenvideo import SaveNVideo

    theirs = SaveNVideo.from_pretrained(exported)
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    tensors = {key: x.long() if x.dtype == torch.int32 else x for key, x in tensors.items()}
    with torch.inference_mode():
        expected = theirs(tensors).numpy()
    shown = batch["segment_ids"][0] > 0
    error = np.abs(ours - expected)[0, shown].max() / np.abs(expected[0, shown]).max()
    with capsys.disabled():
        print(f"\nreleased sizes, JAX against PyTorch: {error:.1e} of the largest logit")
    assert error < TOLERANCE
    np.testing.assert_array_equal(ours[0, shown].argmax(-1), expected[0, shown].argmax(-1))
