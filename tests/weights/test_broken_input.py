"""Broken weights, through the command line: each an error that names file and key, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from avlm_jax import cli
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.safetensors_io import SafetensorsError, read_file
from tests.released_folders import edit, edit_json, make_beats, make_qwen2, make_siglip, write_json

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("released")
    return {
        "vision": make_siglip(root / "vision"),
        "audio": make_beats(root / "audio"),
        "llm": make_qwen2(root / "llm"),
    }


@pytest.fixture
def copies(released, tmp_path) -> dict[str, Path]:
    return {part: Path(shutil.copytree(folder, tmp_path / part)) for part, folder in released.items()}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[dict[str, Path]], str]:
    """Imports the folders, which must fail without a trace, and gives what was told on stderr."""

    def run(sources: dict[str, Path], *more: str) -> str:
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        parts = [f"--{part}={folder}" for part, folder in sources.items()]
        assert cli.main(["import-weights", *parts, f"--out={tmp_path / 'out'}", *more]) == 2
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return run


def shard_of(folder: Path, name: str) -> Path:
    """The file in which a tensor lies."""
    return Path(safetensors_io.read_folder(folder)[name].file)


def edit_header(file: Path, change: Callable[[dict[str, Any]], None], data: bytes = b"") -> None:
    """Changes a file's header; its data stay, with `data` behind them."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    write_raw(file, json.dumps(header).encode(), raw[end:] + data)


def write_raw(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + header + data)


# One tensor of each part, so that every case is tried on all three.
TENSORS = {
    "vision": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "audio": "encoder.layers.1.fc1.weight",
    "llm": "model.layers.1.mlp.up_proj.weight",
}
EVERY_PART = pytest.mark.parametrize("part", list(TENSORS))


@EVERY_PART
@pytest.mark.parametrize("kept", [0.99, 0.3, 0.0])
def test_truncated(copies, refused, part, kept):
    file = shard_of(copies[part], TENSORS[part])
    os.truncate(file, int(file.stat().st_size * kept))
    told = refused(copies)
    assert str(file) in told and "fetch" in told
    if kept == 0.99:
        assert "tensor '" in told  # The one that is cut off.


@EVERY_PART
def test_overlapping(copies, refused, part):
    name = TENSORS[part]
    file = shard_of(copies[part], name)

    def overlap(header):
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [4, 4 + end - begin]

    edit_header(file, overlap)
    told = refused(copies)
    assert f"{file}: tensor '" in told and ("overlaps" in told or "leaves a hole" in told)


@EVERY_PART
def test_oversized_header(copies, refused, part):
    file = shard_of(copies[part], TENSORS[part])
    content = file.read_bytes()
    for length, message in (
        (2**40, "too large for a safetensors file"),
        (99_999_999, "truncated inside its header"),
    ):
        file.write_bytes(length.to_bytes(8, "little") + content[8:])
        told = refused(copies)
        assert str(file) in told and message in told


@EVERY_PART
def test_a_header_that_lies_about_a_tensor(copies, refused, part):
    name = TENSORS[part]
    file = shard_of(copies[part], name)
    original = file.read_bytes()
    for change, message in (
        (dict(dtype="F31"), "dtype 'F31' is unknown"),
        (dict(shape=[24, 17]), "takes"),
        (dict(shape=[-24, 16]), "shape [-24, 16]"),
        (dict(shape=[2**40, 2**40]), "too large for an array"),
        (dict(data_offsets=[0, 2**62]), "truncated"),
        (dict(data_offsets=None), "lacks dtype, shape or data_offsets"),
    ):
        file.write_bytes(original)
        edit_header(file, lambda header, change=change: header[name].update(change))
        told = refused({part: copies[part]})
        assert f"{file}: tensor {name!r}" in told and message in told


@EVERY_PART
@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, ml_dtypes.float8_e4m3fn])
def test_wrong_dtype(copies, refused, part, dtype):
    """Quantised or token-like numbers in the place of weights."""
    name = TENSORS[part]
    array = np.array(safetensors_io.read_folder(copies[part])[name]).astype(dtype)
    edit(copies[part], {name: array})
    told = refused(copies)
    assert f"{name} ({shard_of(copies[part], name)}) is {np.dtype(dtype)}" in told
    assert "needs floating-point numbers" in told


@EVERY_PART
def test_one_layer_in_another_precision(copies, refused, part):
    name = TENSORS[part]
    array = np.array(safetensors_io.read_folder(copies[part])[name]).astype(np.float16)
    edit(copies[part], {name: array})
    assert "its layers are stored as" in refused(copies)


def test_a_missing_shard(copies, refused):
    file = shard_of(copies["llm"], TENSORS["llm"])
    file.unlink()
    told = refused(copies)
    assert f"{file}: missing, though {INDEX} names it; fetch it" in told


def test_shards_of_two_models(copies, refused, tmp_path):
    """The second shard is that of a model with other tensors in it."""
    file = shard_of(copies["llm"], TENSORS["llm"])
    safetensors_io.write_file(file, {"model.other.weight": np.ones((2, 2), np.float32)})
    told = refused(copies)
    assert f"{file}: tensor " in told and ("is in the index but not in the file" in told)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": 5}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        "[" * 100_000,
        '{"weight_map":' * 100_000,
    ],
)
def test_a_broken_index(copies, refused, content):
    (copies["llm"] / INDEX).write_text(content)
    assert str(copies["llm"] / INDEX) in refused(copies)


@EVERY_PART
def test_no_weights_at_all(copies, refused, part):
    for file in copies[part].glob("model*"):
        file.unlink()
    assert f"{copies[part]}: neither model.safetensors nor {INDEX}" in refused(copies)


@EVERY_PART
def test_a_key_too_many(copies, refused, part):
    name = TENSORS[part].replace("fc1", "fc3").replace("up_proj", "down_up_proj")
    edit(copies[part], {name: np.zeros((3, 2), np.float32)})
    told = refused(copies)
    assert f"unknown tensor {name} ({shard_of(copies[part], name)}) of shape [3, 2]" in told


@EVERY_PART
def test_a_key_too_few(copies, refused, part):
    edit(copies[part], {}, drop=(TENSORS[part],))
    assert f"missing tensor {TENSORS[part]}" in refused(copies)


@EVERY_PART
def test_wrong_shape(copies, refused, part):
    name = TENSORS[part]
    array = np.array(safetensors_io.read_folder(copies[part])[name])
    for wrong in (array[:-1], array.T, array[None], array.reshape(-1)):
        edit(copies[part], {name: wrong})
        told = refused(copies)
        assert f"{name} ({shard_of(copies[part], name)}) has shape {list(wrong.shape)}" in told


def test_two_names_for_one_tensor(copies, refused):
    name = TENSORS["vision"]
    array = np.array(safetensors_io.read_folder(copies["vision"])[name])
    edit(copies["vision"], {name.removeprefix("vision_model."): array})
    told = refused(copies)
    assert "set twice" in told and name in told


def test_every_problem_of_a_part_is_listed(copies, refused):
    array = np.zeros((2, 2), ml_dtypes.bfloat16)
    edit(copies["llm"], {TENSORS["llm"]: array, "stray": array}, drop=("model.norm.weight",))
    told = refused(copies)
    assert "qwen2 weights: 3 problems" in told
    for part in ("unknown tensor stray", "missing tensor model.norm.weight", f"{TENSORS['llm']} ("):
        assert part in told


def test_a_tied_model_with_another_head(copies, refused):
    edit_json(copies["llm"] / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight" in refused(copies)


@EVERY_PART
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '"x"', "[" * 100_000, "\x00\xff"])
def test_a_broken_config(copies, refused, part, content):
    (copies[part] / "config.json").write_text(content)
    assert str(copies[part] / "config.json") in refused(copies)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision", {"vision_config": []}),
        ("vision", {"vision_config": {"hidden_size": "16"}}),
        ("vision", {"vision_config": {"hidden_size": -16}}),
        ("vision", {"vision_config": {"num_hidden_layers": 0}}),
        ("vision", {"vision_config": {"num_attention_heads": None}}),
        ("audio", {"encoder_embed_dim": "768"}),
        ("audio", {"encoder_layers": -1}),
        ("audio", {"num_buckets": 2.5}),
        ("audio", {"conv_pos": None}),
        ("llm", {"hidden_size": "16"}),
        ("llm", {"rms_norm_eps": "small"}),
        ("llm", {"rope_parameters": 7}),
        ("llm", {"rope_theta": None}),
        ("llm", {"head_dim": "x"}),
        ("llm", {"tie_word_embeddings": "yes"}),
        ("llm", {"model_type": None}),
        ("llm", {"eos_token_id": {}}),
    ],
)
def test_a_config_of_other_types(copies, refused, part, change):
    edit_json(copies[part] / "config.json", **change)
    assert f"{copies[part]}/config.json" in refused(copies)


def test_a_tokenizer_of_another_vocabulary(copies, refused):
    """Larger than the table, far smaller, or of the right size with its control tokens elsewhere."""
    llm = copies["llm"]
    file = llm / "tokenizer.json"
    original = json.loads(file.read_text())

    def with_tokens(change: Callable[[dict[str, Any]], None]) -> str:
        content = json.loads(json.dumps(original))
        change(content)
        write_json(file, content)
        return refused(copies)

    def larger(content):
        content["model"]["vocab"] |= {f"word{i}": 256 + i for i in range(100)}
        for index, token in enumerate(content["added_tokens"]):
            token["id"] = 356 + index

    def permuted(content):
        # <|im_end|>, the model's id 256, changes places with an ordinary token.
        vocabulary = content["model"]["vocab"]
        word = next(word for word, index in vocabulary.items() if index == 10)
        vocabulary |= {word: 256, "<|im_end|>": 10}

    told = with_tokens(larger)
    assert f"{file}: token '<|media|>' has the id 359, but the model's table has 300 rows" in told
    told = with_tokens(permuted)
    assert f"{llm}/config.json: eos_token_id is 256, which is the ordinary token" in told
    write_json(file, original)
    big = make_qwen2(llm, vocab_size=2000)
    assert f"{big}/tokenizer.json: its 260 tokens leave 1740 of the model's 2000 rows" in refused(copies)


# A pickle. The script looks at its instructions before it asks for torch, so this needs none.


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def as_zip(file: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(40))


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["cfg", "model", "beside"])
def test_a_malicious_pickle(tmp_path, copies, refused, monkeypatch, form, protocol, where):
    monkeypatch.chdir(tmp_path)
    checkpoint: dict[str, Any] = {"cfg": {}, "model": {}}
    if where == "beside":
        checkpoint["optimizer"] = Evil()
    else:
        checkpoint[where]["x"] = Evil()
    content = pickle.dumps(checkpoint, protocol)
    file = tmp_path / "BEATs.pt"
    if form == "zip":
        as_zip(file, content)
    else:
        file.write_bytes(content)
    told = refused({**copies, "audio": file})
    assert f"{file}: refused, its pickle calls for {os.system.__module__}.system" in told
    assert not list(tmp_path.rglob("evil"))


def test_a_pickle_that_hides_a_name(tmp_path, refused):
    """Names that are put together while it runs, here behind two that are harmless."""
    content = b"".join(
        (
            b"\x80\x04",
            b"\x8c\x05posix\x94", b"\x8c\x06system\x94", b"00",
            b"\x8c\x0bcollections", b"\x8c\x0bOrderedDict", b"00",
            b"h\x00", b"h\x01", b"\x93", b"\x8c\x02id", b"\x85", b"R", b".",
        )
    )  # fmt: skip
    file = tmp_path / "BEATs.pt"
    file.write_bytes(content)
    assert f"{file}: refused, its pickle calls for" in refused({"audio": file})
    file.write_bytes(b"\x80\x02\x82\x01.")
    assert f"{file}: refused, its pickle calls for something without a name" in refused({"audio": file})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither torch's zip archive nor a pickle"),
        (b"<html>not found</html>", "neither torch's zip archive nor a pickle"),
        (b"PK\x03\x04" + bytes(200), "truncated or damaged"),
        (pickle.dumps({"cfg": {}, "model": {}}, 2)[:-1], "truncated or damaged"),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, refused, content, message):
    file = tmp_path / "BEATs.pt"
    file.write_bytes(content)
    told = refused({"audio": file})
    assert str(file) in told and (message in told or "neither torch's" in told)


def test_archives_that_torch_does_not_write(tmp_path, refused):
    file = tmp_path / "BEATs.pt"
    as_zip(file, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED)
    assert f"{file}: archive/data.pkl is compressed" in refused({"audio": file})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert f"{file}: a zip archive without data.pkl" in refused({"audio": file})
    as_zip(file, pickle.dumps({}, 2))
    content = bytearray(file.read_bytes())
    content[content.index(b"archive/data/0") + 20] ^= 1
    file.write_bytes(content)
    assert f"{file}: archive/data/0 is damaged (its checksum differs)" in refused({"audio": file})
    os.truncate(file, file.stat().st_size // 2)
    assert f"{file}: truncated or damaged" in refused({"audio": file})


def test_a_python_without_torch(tmp_path, refused):
    file = tmp_path / "BEATs.pt"
    file.write_bytes(pickle.dumps({"cfg": {}, "model": {}}, 2) * 5)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'torch'\" >&2\nexit 3\n")
    python.chmod(0o755)
    told = refused({"audio": file}, f"--torch-python={python}")
    assert f"{file} is a pickle, and {python} has no torch" in told and "--torch-python" in told
    assert "give FOLDER in place of the file" in told
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    assert f"{file}: its conversion failed, killed by SIGKILL" in refused(
        {"audio": file}, f"--torch-python={python}"
    )
    assert f"{tmp_path}/none: no such Python" in refused({"audio": file}, f"--torch-python={tmp_path}/none")


# Headers that chance made.

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I8", "shape": [0, 5], "data_offsets": [32, 32]},
}
DATA = bytes(range(32))
VALUES = (
    0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**4000, 1.5, None, True, "x", [], {}, "F32", [0], [1] * 70, [0] * 70,
    [0, 2**62, 2**62], [10**300] * 3000, {"dtype": "F32"},
)  # fmt: skip
ROUNDS = 3000
MOST_BYTES = 8 * 2**20  # for reading a header of a few hundred bytes, or of 1 MB in the largest of VALUES


def mutate(draw: random.Random) -> tuple[bytes, bytes, int | None]:
    """(header, data, length if it is to lie) with one to four things wrong."""
    raw = bytearray(json.dumps(HEADER).encode())
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randrange(1, 5)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif kind == 1:
        begin, end = sorted(draw.choices(range(len(raw)), k=2))
        del raw[begin:end]
    elif kind == 2:
        return bytes(raw), DATA[: draw.randrange(33)] + bytes(draw.randrange(3)), None
    elif kind == 3:
        return bytes(raw), DATA, 2 ** draw.randrange(64) - draw.randrange(2)
    else:
        header = json.loads(raw)
        entry = header[draw.choice("abc")]
        key = draw.choice(list(entry))
        if key != "dtype" and draw.random() < 0.5:
            entry[key][draw.randrange(len(entry[key]))] = draw.choice(VALUES)
        else:
            entry[key] = draw.choice(VALUES)
        raw = bytearray(json.dumps(header).encode())
    return bytes(raw), DATA, None


def outcome(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What `read_file` finds, or None if it refuses the file and names it."""
    try:
        found = read_file(file)
        return {name: (str(t.dtype), t.shape, np.asarray(t).tobytes()) for name, t in found.items()}
    except SafetensorsError as error:
        assert str(error).startswith(f"{file}: ") and len(str(error)) < 1000
        return None


def test_headers_made_by_chance(tmp_path):
    """Never a crash, a hang or a large allocation: the file is refused, or what its header says is in it."""
    file = tmp_path / "model.safetensors"
    draw = random.Random(0)
    refusals = 0
    tracemalloc.start()
    try:
        for _ in range(ROUNDS):
            header, data, length = mutate(draw)
            write_raw(file, header, data, length)
            found = outcome(file)
            refusals += found is None
            if found is not None:
                said = json.loads(header[:length])
                said.pop("__metadata__", None)
                assert found.keys() == said.keys()
                for name, (_, shape, content) in found.items():
                    begin, end = said[name]["data_offsets"]
                    assert list(shape) == list(said[name]["shape"]) and content == data[begin:end]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 * ROUNDS < refusals < ROUNDS
    assert peak < MOST_BYTES, f"{peak} bytes were allocated"


@pytest.mark.parametrize(
    "shape",
    [[0] * 70, [0, 2**62, 2**62], [0, 2**63], [0, 10**4000], [0] + [2**62] * 3000, [0] + [10**300] * 3000],
)
def test_sizes_that_no_array_can_have(tmp_path, shape):
    """Nothing is stored, so that only the sizes themselves can be found fault with."""
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode())
    assert outcome(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": NaN}', b"\xff\xfe{\x00}\x00", b""]
)
def test_headers_that_are_no_json_of_ours(tmp_path, header):
    write_raw(tmp_path / "model.safetensors", header)
    assert outcome(tmp_path / "model.safetensors") is None
