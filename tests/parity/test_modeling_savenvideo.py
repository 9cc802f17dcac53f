"""modeling_savenvideo.py, the file that every exported folder carries, against the JAX model it was exported from."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

import jax  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from avlm_jax.assembly import Assembly, assemble  # noqa: E402
from avlm_jax.config import apply_overrides  # noqa: E402
from avlm_jax.encoders.beats import BeatsConfig, BeatsEncoder  # noqa: E402
from avlm_jax.export import export_model  # noqa: E402
from avlm_jax.generate import Generator  # noqa: E402
from avlm_jax.layers.fbank import beats_normalize, kaldi_fbank  # noqa: E402
from avlm_jax.lora import is_lora  # noqa: E402
from avlm_jax.pytorch import modeling_savenvideo as modeling  # noqa: E402
from avlm_jax.state import flatten, unflatten  # noqa: E402
from avlm_jax.weights.beats import expected_params, save_beats  # noqa: E402
from avlm_jax.weights.qwen2 import save_qwen2  # noqa: E402
from avlm_jax.weights.siglip import save_siglip  # noqa: E402
from input_pipeline.media import LoadedMedia, window_starts  # noqa: E402
from input_pipeline.spec import SAMPLE_RATE, MediaSpec  # noqa: E402
from tests.exported_system import METADATA, demo_assembly, learnt_of  # noqa: E402
from tests.parity.peers import relative_error  # noqa: E402
from tests.tiny_system import make_media, padded, random_params, save_tokenizer, tiny_config  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides; sums are ordered differently.
TOLERANCE = 1e-4
LOGITS = 1e-3  # Absolute, of the demo's model.

# Every value of every option of the connector, and of the encoders' options that decide which tokens there are.
OPTIONS = {
    "as the demo": (),
    "global, plain": (
        "model.avts.scope=global", "model.avts.time_scope=all", "model.avts.attention=plain",
        "model.avts.type_embed=False", "model.avts.visual_pool=bilinear2", "model.avts.freq_pool=none",
        "model.time.f=scalar", "model.time.source=frames", "media.image_size=40", "model.vision.image_size=40",
    ),
    "per frame, all times": (
        "model.avts.time_scope=all", "model.avts.attention=plain", "model.avts.visual_pool=frame",
        "model.avts.freq_pool=window", "model.avts.num_layers=2", "model.time.f=table", "model.time.source=both",
        "model.audio.mask=unilm", "model.vision.feature_layer=0",
    ),
    "global, wide": (
        "model.avts.scope=global", "model.avts.time_scope=all", "model.avts.d_model=0", "model.avts.freq_pool=none",
        "model.time.f=seconds", "model.time.source=both", "model.vision.feature_layer=-1", "model.audio.embed_dim=32",
    ),
    "no resampler": (
        "model.avts.resampler=mlp", "model.avts.visual_pool=bilinear2", "model.time.source=both",
        "media.image_size=27", "model.vision.image_size=27",
    ),
    "no resampler, tokens of whole windows": (
        "model.avts.resampler=mlp", "model.avts.visual_pool=frame", "model.avts.freq_pool=window",
        "model.avts.d_model=0",
    ),
}  # fmt: skip


def build(folder: Path, *overrides: str) -> tuple[Assembly, dict]:
    """The tiny system with random backbones in folders, and all its parameters."""
    tokenizer = save_tokenizer(folder / "tokenizer")
    bare = assemble(tiny_config(tokenizer, "model.llm.tie_embeddings=False", *overrides))
    params, c = random_params(bare, seed=3), bare.system.llm_config
    for path, leaf in flatten(params["llm"]).items():
        # Else attention is all or nothing and adapters outweigh their kernels: roundings would grow a thousandfold.
        if path.startswith(("layers/attn/q", "layers/attn/k")) or path.endswith("lora_b"):
            leaf *= 0.3
    save_siglip(folder / "vision", bare.system.vision_config, params["vision"])
    save_beats(folder / "audio", bare.system.audio_config, params["audio"])
    hf = {
        "model_type": "qwen2" if c.qkv_bias else "llama", "vocab_size": c.vocab_size, "hidden_size": c.width,
        "num_hidden_layers": c.depth, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
        "intermediate_size": c.mlp_dim, "rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps,
    }  # fmt: skip
    llm = {path: leaf for path, leaf in flatten(params["llm"]).items() if not is_lora(path)}
    save_qwen2(folder / "llm", hf, unflatten(llm))
    places = [f"init.{part}={folder / part}" for part in ("vision", "audio", "llm")]
    return assemble(apply_overrides(bare.config, places)), params


def export(assembly: Assembly, params: dict, out: Path, adapter: bool = False) -> Path:
    flat = flatten(params)
    learnt = unflatten({p: x for p, x in flat.items() if p.startswith("connector/") or is_lora(p)})
    return export_model(assembly.config, learnt, out, adapter=adapter, metadata=METADATA)


# What is asked: all media; no sound; no picture; little of both, its sound ending inside a filterbank column.
PROMPTS = (
    ("What is heard?", {}),
    ("Between 0.5 s and 1.2 s, and at 1.9 s: who moves the longest way?", {"windows": 0}),
    ("Why in the first second, 0:00 to 0:01?", {"frames": 0}),
    ("Is it there at all", {"frames": 2, "windows": 2}),
)


def make_batch(assembly: Assembly) -> dict[str, np.ndarray]:
    builder = assembly.builder(prompt=True)
    rows = []
    for seed, (question, kept) in enumerate(PROMPTS):
        media = make_media(builder.spec, seed, **kept)
        if kept.get("windows") == 2:
            start, _, samples = media.windows[1]
            samples = samples[: len(samples) // 3]
            media.windows[1] = (start, start + len(samples) / SAMPLE_RATE, samples)
        sample = {"id": f"s{seed}", "conversations": [{"from": "human", "value": question, "verbatim": True}]}
        rows.append(builder.build(padded(media, builder.spec), sample).arrays)
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    batch["audio"][batch["audio"] == 0] = 0.7  # What pads must not matter.
    batch["frames"][~batch["frame_mask"]] = 255
    return batch


def to_torch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in batch.items()}


def ours(assembly: Assembly, params: dict, batch: dict[str, np.ndarray], method: str):
    return jax.jit(functools.partial(assembly.system.apply, method=method))({"params": params}, batch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(assembly, parameters, exported folder, model) of the tiny system."""
    folder = tmp_path_factory.mktemp("tiny")
    assembly, params = build(folder)
    out = export(assembly, params, folder / "exported")
    return assembly, params, out, modeling.SaveNVideo.from_pretrained(out)


# The parts


@pytest.mark.parametrize("samples", [400, 16_000, 164_080])
def test_filterbank(samples):
    rng = np.random.default_rng(samples)
    sound = np.clip(rng.normal(0, 0.1, (2, 3, samples)), -1, 1).astype(np.float32)
    sound[1, 1, samples // 2 :] = 0.0  # the floor of silence
    expected = np.asarray(beats_normalize(kaldi_fbank(sound)))
    found = modeling.kaldi_fbank(torch.from_numpy(sound)).numpy()
    # A band that holds less than a millionth of its frame's loudest is what is left when fp32 numbers a thousand times
    # larger cancel: its logarithm has no digits left, and which ones it shows depends on the processor. There the
    # energies are compared, with the frame's loudest as their scale.
    energies = [np.exp(x.astype(np.float64) * 2 * 6.55582 + 15.41663) for x in (expected, found)]
    loudest = energies[0].max(axis=-1, keepdims=True)
    faint = energies[0] < 1e-6 * loudest
    error = relative_error(np.where(faint, 0, expected), np.where(faint, 0, found))
    faint_error = float(np.where(faint, np.abs(energies[0] - energies[1]) / loudest, 0).max())
    print(
        f"filterbank, {samples} samples: {error:.1e} of the scale; {faint.sum()} faint bands {faint_error:.1e}"
    )
    assert error < TOLERANCE and faint_error < 1e-8
    assert faint.mean() < 0.02  # the narrowest bands, at the lowest frequencies


@pytest.mark.parametrize("mask", ["time_patch", "unilm"])
@pytest.mark.parametrize(
    "gru_gate,deep_norm,embed_dim,kernel", [(True, True, 24, 16), (False, False, 48, 15)]
)
def test_beats(tmp_path, mask, gru_gate, deep_norm, embed_dim, kernel):
    config = BeatsConfig(
        embed_dim=embed_dim, width=48, depth=3, num_heads=4, mlp_dim=80, conv_pos_kernel=kernel, conv_pos_groups=4,
        num_buckets=32, max_distance=40, gru_gate=gru_gate, deep_norm=deep_norm, mask=mask,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.25, leaf.shape).astype(np.float32), expected_params(config)
    )
    for path, leaf in flatten(params).items():
        leaf += path.endswith("scale") or path.endswith("/g")  # in place: around 1
    save_beats(tmp_path, config, params)
    fbank = rng.normal(0, 0.5, (4, 203, 128)).astype(np.float32)
    valid = np.arange(203)[None] < np.array([[203], [101], [7], [0]])
    expected, expected_mask = BeatsEncoder(config).apply({"params": params}, fbank, valid)
    peer = modeling.Beats(modeling.SimpleNamespace(**vars(config)))
    peer.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        found, found_mask = peer(torch.from_numpy(fbank), torch.from_numpy(valid))
    np.testing.assert_array_equal(np.asarray(expected_mask), found_mask.numpy())
    assert not expected_mask[3].any() and 0 < expected_mask[1].sum() < expected_mask[0].sum()
    error = relative_error(expected, found)
    print(f"BEATs, {mask}, gate {gru_gate}, deep norm {deep_norm}: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", OPTIONS)
def test_media_tokens_with_every_option(name, tmp_path):
    assembly, params = build(tmp_path, *OPTIONS[name])
    batch = make_batch(assembly)
    expected, mask = ours(assembly, params, batch, "media_tokens")
    model = modeling.SaveNVideo.from_pretrained(export(assembly, params, tmp_path / "exported"))
    given = to_torch(batch)
    with torch.no_grad():
        kinds = [model.see(given), model.hear(given), model.ask(given)]
        found, found_mask = model.connector.resampler(kinds, given["duration"])
    np.testing.assert_array_equal(np.asarray(mask), found_mask.numpy())
    assert mask.any(axis=1).all()
    error = relative_error(expected, found, where=mask)
    print(f"media tokens, {name}: {error:.1e} of the scale")
    assert error < TOLERANCE


# The whole model


@pytest.mark.parametrize("name", ["as the demo", "global, wide", "no resampler", "llama"])
def test_logits(name, tmp_path):
    llama = ("model.llm.qkv_bias=False", "text.system=You see and hear.")
    overrides = llama if name == "llama" else (*OPTIONS[name], "text.max_length=420")
    assembly, params = build(tmp_path, *overrides)
    batch = make_batch(assembly)
    expected = np.asarray(ours(assembly, params, batch, "logits"))
    for adapter in (False, True):
        out = export(assembly, params, tmp_path / f"adapter {adapter}", adapter)
        model = modeling.SaveNVideo.from_pretrained(out)
        given = to_torch(batch)
        with torch.no_grad():
            found, (_, segments) = model(given).numpy(), model.spliced(given)
        seen = segments.numpy() > 0
        masked = batch["segment_ids"].sum() - seen.sum()  # Holes inside the prompts.
        assert (masked > 0) == (name != "global, wide")
        error = relative_error(expected, found, where=seen)
        print(f"logits, {name}, adapter beside the base {adapter}: {error:.1e} of the scale")
        assert error < TOLERANCE


def test_rows_may_be_packed(tiny):
    """Two texts in one row, as segment ids tell: the second is read as if it stood alone."""
    *_, model = tiny
    batch = to_torch({key: value[:1] for key, value in make_batch(tiny[0]).items()})
    length = int(batch["segment_ids"].sum())
    packed = {key: value.clone() for key, value in batch.items()}
    tail = torch.randint(0, 250, (1, batch["tokens"].shape[1] - length))
    packed["tokens"][:, length:], packed["segment_ids"][:, length:] = tail, 2
    packed["positions"][:, length:] = torch.arange(tail.shape[1])
    with torch.no_grad():
        found, before, alone = model(packed)[0], model(batch)[0], model.llm(tail).logits[0]
        seen = model.spliced(batch)[1][0] > 0
    torch.testing.assert_close(found[length:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[seen], before[seen], atol=1e-4, rtol=0)


def test_bfloat16(tiny):
    """Positions stay precise: neither rotary frequencies nor codes of time are rounded."""
    assembly, _, out, model = tiny
    narrow = modeling.SaveNVideo.from_pretrained(out, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    batch = to_torch(make_batch(assembly))
    with torch.no_grad():
        (found, segments), (expected, _) = narrow.spliced(batch), model.spliced(batch)
        assert narrow(batch).isfinite().all()
    # 8 bits of mantissa, through encoders and resampler.
    assert relative_error(expected, found, where=segments > 0) < 0.03


# From a question to an answer


def cut(sound: np.ndarray, times: list[float], spec: MediaSpec) -> list[tuple[float, float, np.ndarray]]:
    """Audio windows as `load_media` makes them of a sound that begins at 0."""
    windows = []
    for start in window_starts(len(sound), times or None, spec):
        samples = sound[start : start + spec.window_samples]
        if len(samples) >= 400:
            windows.append((start / SAMPLE_RATE, (start + len(samples)) / SAMPLE_RATE, samples))
    return windows


def ask_media(spec: MediaSpec, seed: int) -> tuple[LoadedMedia, dict]:
    """Noise to see and hear, for us and for the exported model; every fifth without sound, every seventh without picture.

    Some sounds fit into the windows and some are too long; some videos have fewer frames than the spec.
    """
    rng = np.random.default_rng(seed)
    room = spec.max_windows * spec.window_hop
    sound = rng.uniform(-0.6, 0.6, int(room * rng.uniform(0.05, 1.6))).astype(np.float32)
    sound *= np.sin(np.arange(len(sound)) * rng.uniform(0.01, 1.0)).astype(np.float32)
    count = 0 if seed % 7 == 3 else spec.num_frames if seed % 2 else int(rng.integers(1, spec.num_frames + 1))
    sound = sound[: 0 if seed % 5 == 4 and count else None]
    duration = max(len(sound) / SAMPLE_RATE, 3.0)
    times = np.sort(rng.uniform(0, duration, count))
    size = spec.image_size
    blocks = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    frames = np.stack(
        [np.asarray(Image.fromarray(x).resize((size, size))) for x in blocks]
        or [np.zeros((size, size, 3), np.uint8)]
    )[:count]
    media = LoadedMedia(frames, times, cut(sound, times.tolist(), spec), duration)
    given = {"frames": frames, "frame_times": times, "duration": duration}
    return media, given | ({"waveform": sound} if len(sound) else {})


QUESTIONS = (
    "What is heard?",
    "<video>\nWhich figure moves between 0:01 and 0:02?\nA: red circle\nB: blue square\nAnswer with the letter.",
    "At 1.5 s, which sound is heard?",
    "In the first 2 seconds and in the last second, what changes?",
    "Describe <video> in a few words.",
    "Between 00:00:00.500 and 00:00:02.250, which figure moves while the bell is heard?",
    "<audio>\nWhat happens from 1 to 2 seconds?",
    "When is the low tone heard?\nA: 00:01 - 00:02\nB: 00:02 - 00:03",
    "The green cross moves; which sound is heard at 0:01 and at 0:02?",
)


def test_answers_of_the_demo(tmp_path, capsys):
    """The demo's backbones with a random connector and adapter, merged: logits and greedy answers."""
    assembly = demo_assembly()
    flat = flatten(learnt_of(assembly, seed=3))
    # Adapters as large as the kernels themselves would make the language model amplify every rounding.
    learnt = unflatten({path: leaf * 0.5 if path.endswith("lora_b") else leaf for path, leaf in flat.items()})
    model = modeling.SaveNVideo.from_pretrained(
        export_model(assembly.config, learnt, tmp_path / "exported", metadata=METADATA)
    )
    params = assembly.parameters(learnt)[0]
    builder, generator = assembly.builder(prompt=True), Generator(assembly, params, 24)
    rows, answers = [], []
    for seed in range(25):
        question = QUESTIONS[seed % len(QUESTIONS)]
        media, given = ask_media(builder.spec, seed)
        sample = {"id": f"s{seed}", "conversations": [{"from": "human", "value": question, "verbatim": True}]}
        row = builder.build(padded(media, builder.spec), sample).arrays
        prepared, length = model.prepare(question, **given), int(row["segment_ids"].sum())
        for key, value in prepared.items():
            text = key in ("tokens", "positions", "segment_ids")
            expected = row[key][:length] if text else row[key]
            assert value[0].numpy().dtype == (np.int64 if text else expected.dtype), key
            np.testing.assert_array_equal(value[0].numpy(), expected, err_msg=f"{seed}: {key}")
        rows.append(row)
        answers.append(model.generate(question, **given, max_new_tokens=24))
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    expected = generator.texts(batch)
    assert answers == expected
    assert len(set(answers)) >= 10  # Else equal answers prove little.
    logits = np.asarray(ours(assembly, params, batch, "logits"))
    with torch.no_grad():
        found, (_, segments) = model(to_torch(batch)).numpy(), model.spliced(to_torch(batch))
    error = np.abs(found - logits)[segments.numpy() > 0].max()
    with capsys.disabled():
        print(
            f"\ndemo, 25 questions: answers identical, {len(set(answers))} different ones; logits up to "
            f"{np.abs(logits).max():.0f} differ by {error:.1e}"
        )
    assert error < LOGITS


def test_runs_without_the_project(tiny, tmp_path):
    """In a process that can import neither JAX nor this project, from the folder alone."""
    assembly, params, out, model = tiny
    code = f"""
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("jax", "jaxlib", "flax", "avlm_jax", "input_pipeline", "peft")
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {str(out)!r})
from modeling_savenvideo import SaveNVideo
import numpy
model = SaveNVideo.from_pretrained({str(out)!r})
sound = numpy.sin(numpy.arange(9000) / 9)
print("answer:", repr(model.generate("What is heard?", waveform=sound, max_new_tokens=6)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = model.generate("What is heard?", waveform=np.sin(np.arange(9000) / 9), max_new_tokens=6)
    assert result.stdout.splitlines()[-1] == f"answer: {answer!r}"


# What is wrong is said


@pytest.mark.parametrize("part", ["vision", "audio", "connector", "llm", "adapter"])
def test_every_tensor_is_wanted(tiny, tmp_path, part):
    assembly, params, *_ = tiny
    out = export(assembly, params, tmp_path / "out", adapter=part == "adapter")
    file = next((out / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    short = name.removeprefix("vision_model.").replace("weight_g", "weight")
    for change in ({name: None}, {"extra.weight": torch.zeros(2)}, {name: torch.zeros(3, 5)}):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(RuntimeError) as error:
            modeling.SaveNVideo.from_pretrained(out)
        assert ("extra.weight" if "extra.weight" in change else short) in str(error.value)


def test_other_folders_are_refused(tiny, tmp_path):
    out = shutil.copytree(tiny[2], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for change in ({"model_type": "qwen2"}, {"format_version": 2}):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"config.json is of .*, wanted: \('savenvideo', 1, 'chatml'\)"):
            modeling.SaveNVideo.from_pretrained(out)


def test_numbers_that_are_none_are_no_answer(tiny):
    broken = modeling.SaveNVideo.from_pretrained(tiny[2])
    with torch.no_grad():
        broken.llm.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        broken.generate("What?", waveform=np.zeros(4000), max_new_tokens=3)
