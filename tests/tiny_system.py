"""SAVEnVideo with random weights, small enough to compile in seconds, its tokenizer, and media of noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly
from avlm_jax.checkpoints.stage_result import save_tree
from avlm_jax.config import apply_overrides, config_to_json, load_config
from avlm_jax.state import Tree, flatten, unflatten
from input_pipeline.media import LoadedMedia
from input_pipeline.records import encode_record
from input_pipeline.spec import MediaSpec
from input_pipeline.transforms.media import pad_media
from tests.record_folder import write_folder

CONFIG = Path(__file__).parents[1] / "configs" / "savenvideo.py"
SIZES = (
    "init.vision=",
    "init.audio=",
    "init.llm=",
    "media.num_frames=4",
    "media.image_size=16",
    "media.window_frames=32",
    "media.max_windows=3",
    "media.max_intervals=3",
    "model.vision.image_size=16",
    "model.vision.patch_size=8",
    "model.vision.width=16",
    "model.vision.depth=2",
    "model.vision.mlp_dim=32",
    "model.vision.num_heads=2",
    "model.audio.width=32",
    "model.audio.depth=1",
    "model.audio.num_heads=2",
    "model.audio.mlp_dim=32",
    "model.audio.embed_dim=16",
    "model.avts.num_queries=8",
    "model.avts.num_layers=1",
    "model.avts.d_model=32",
    "model.avts.num_heads=2",
    "model.llm.vocab_size=300",
    "model.llm.width=32",
    "model.llm.depth=2",
    "model.llm.num_heads=4",
    "model.llm.num_kv_heads=2",
    "model.llm.mlp_dim=48",
    "model.llm.lora.rank=2",
    "text.max_length=160",
)


def save_tokenizer(folder: Path) -> Path:
    """Byte-level, one id per byte, with Qwen2's control tokens: needs no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|media|>"],
    )
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(tokenizer: Path, *overrides: str) -> ConfigDict:
    """configs/savenvideo.py:size=demo, shrunk; `overrides` as `a.b=value`."""
    return apply_overrides(
        load_config(f"{CONFIG}:size=demo"), (*SIZES, f"text.tokenizer={tokenizer}", *overrides)
    )


def random_params(assembly: Assembly, seed: int = 0) -> Tree:
    """Parameters drawn by numpy: compiling the modules' own initialisers takes longer than the tests.

    Adapters do something and answers depend on what was read, unlike with fresh parameters.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name == "scale":
            return np.ones(shape, np.float32)
        spread = 0.3 if name in ("embedding", "lora_b") else max(shape[-2:-1], default=4) ** -0.5
        return rng.normal(0, spread, shape).astype(np.float32)

    return unflatten(
        {path: draw(path, leaf.shape) for path, leaf in flatten(assembly.abstract_params()).items()}
    )


def publish(assembly: Assembly, params: Tree, folder: Path) -> Path:
    """A stage's checkpoint of all parameters, so that loading it draws none."""
    config = json.loads(config_to_json(assembly.config))
    save_tree(folder, params, config, {"stage": "2b", "parent": None})
    return folder


def make_media(spec: MediaSpec, seed: int, *, frames: int = 4, windows: int = 3) -> LoadedMedia:
    """Two seconds of noise to see and hear; 0 frames or windows leave a modality out."""
    rng = np.random.default_rng(seed)
    size, samples = spec.image_size, spec.window_samples
    return LoadedMedia(
        frames=rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8),
        frame_times=(np.arange(frames) + 0.5) * 2.0 / max(frames, 1),
        windows=[
            (0.3 * i, 0.3 * i + samples / 16_000, rng.uniform(-0.5, 0.5, samples).astype(np.float32))
            for i in range(windows)
        ],
        duration=2.0,
    )


def padded(media: LoadedMedia, spec: MediaSpec) -> dict[str, np.ndarray]:
    """Arrays as `SampleBuilder.build` takes them."""
    return pad_media(media.frames, media.frame_times, media.windows, media.duration, spec)


def write_records(folder: Path, spec: MediaSpec, videos: int, questions: int = 2) -> Path:
    """Records of noise videos with multiple-choice questions "v0-q1", ...; the second video is silent."""
    records = []
    for number in range(videos):
        media = make_media(spec, number, windows=0 if number == 1 else 3)
        samples = [
            {
                "id": f"v{number}-q{kind}",
                "task": "mcq",
                "conversations": [
                    {
                        "from": "human",
                        "value": f"<video>\nAt 00:01, which?{number}\nA: a\nB: b\nC: c\nD: d",
                    },
                    {"from": "gpt", "value": "b (B)"},
                ],
                "qa_type": kind,
                "answer": "ABCD"[(number + kind) % 4],
                "options": ["a", "b", "c", "d"],
            }
            for kind in range(1, questions + 1)
        ]
        records.append(encode_record(media, media_id=f"v{number}", source="noise", samples=samples))
    write_folder(folder, spec, records, manifest_lines=videos * questions)
    return folder
