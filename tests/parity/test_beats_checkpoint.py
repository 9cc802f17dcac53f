"""BEATs' published .pt, made with torch as unilm makes it, through `avlm import-weights`: to the bit, and once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from avlm_jax import cli  # noqa: E402
from avlm_jax.weights import beats, safetensors_io  # noqa: E402
from avlm_jax.weights.beats import load_beats  # noqa: E402
from avlm_jax.weights.json_file import file_sha256  # noqa: E402
from avlm_jax.weights.record import read_record  # noqa: E402
from avlm_jax.weights.table import export_params, flatten  # noqa: E402
from tests.released_folders import BEATS, TAGS, fill, make_qwen2  # noqa: E402

pytestmark = pytest.mark.parity

# The keys of a published cfg beside those that this encoder reads.
TRAINING = {
    "encoder_layerdrop": 0.05, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0,
    "dropout_input": 0.0, "layer_wise_gradient_decay_ratio": 0.6, "conv_bias": False, "layer_norm_first": False,
    "activation_fn": "gelu", "relative_position_embedding": True, "predictor_dropout": 0.0,
}  # fmt: skip


def checkpoint(tags: int | None, seed: int = 0) -> tuple[dict, dict]:
    """(what is saved, our parameters of the encoder)."""
    params = fill(beats.expected_params(BEATS, tags), seed)
    model = OrderedDict(
        (name, torch.from_numpy(np.array(tensor)))
        for name, tensor in export_params(beats.beats_table(BEATS, tags is not None), params).items()
    )
    # In unilm all layers hold one and the same embedding.
    shared = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    for layer in range(1, BEATS.depth):
        model[shared.format(layer)] = model[shared.format(0)]
    cfg = {theirs: getattr(BEATS, ours) for ours, (theirs, _) in beats._CONFIG_KEYS.items()} | TRAINING
    saved = {"cfg": cfg, "model": model}
    if tags is not None:
        cfg |= {"finetuned_model": True, "predictor_class": tags}
        saved["label_dict"] = {index: f"/m/0{index}" for index in range(tags)}
    return saved, {path: leaf for path, leaf in flatten(params).items() if not path.startswith("predictor/")}


@pytest.mark.parametrize("tags", [None, TAGS])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_published_checkpoint_arrives_to_the_bit_and_is_converted_once(
    tmp_path, capsys, monkeypatch, tags, zipped
):
    saved, expected = checkpoint(tags)
    file, out = tmp_path / "BEATs_iter3_plus.pt", tmp_path / "out"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    argv = ["import-weights", f"--audio={file}", f"--out={out}"]
    assert cli.main(argv) == 0
    told = capsys.readouterr()
    assert f"audio: converting {file}" in told.err
    config, params, report = load_beats(out / "audio")
    assert config == BEATS
    found = flatten(params)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32 and found[path].tobytes() == array.tobytes(), path
    stored = safetensors_io.read_folder(out / "audio")
    for name, tensor in saved["model"].items():
        if not name.startswith("predictor"):
            assert np.asarray(stored[name]).tobytes() == tensor.numpy().tobytes()
    record = read_record(out)["audio"]
    cfg = json.loads((out / "audio/config.json").read_text())
    assert record["source_sha256"] == cfg["source_sha256"] == file_sha256(file)
    assert record["source"] == str(file) and record["sha256"] == report.sha256
    assert {key: cfg[key] for key in TRAINING} == TRAINING and cfg["finetuned_model"] is False
    ignored = [name for names in record["ignored"].values() for name in names]
    assert ignored == (["predictor.bias", "predictor.weight"] if tags else [])
    assert cfg.get("source_unused_keys") == (["label_dict"] if tags else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "out"]  # nothing else is left

    monkeypatch.setattr(beats.subprocess, "run", None)
    assert cli.main(argv) == 0
    again = capsys.readouterr()
    assert f"audio: {out / 'audio'} holds {file} already" in again.err and again.out == told.out


def test_another_checkpoint_needs_overwrite(tmp_path, capsys):
    file, out = tmp_path / "BEATs.pt", tmp_path / "out"
    torch.save(checkpoint(None)[0], file)
    argv = ["import-weights", f"--audio={file}", f"--out={out}"]
    assert cli.main(argv) == 0
    saved, expected = checkpoint(None, seed=5)
    torch.save(saved, file)
    assert cli.main(argv) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite"]) == 0
    path = "layers/mlp/fc1/kernel"
    assert flatten(load_beats(out / "audio")[1])[path].tobytes() == expected[path].tobytes()


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def dropped(saved: dict, *names: str) -> dict:
    return saved | {"model": {name: tensor for name, tensor in saved["model"].items() if name not in names}}


NAME = "encoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved | {"extra": Evil()}, "refused, its pickle calls for posix.system"),
        (lambda saved: saved | {"cfg": argparse.Namespace(**saved["cfg"])}, "calls for argparse.Namespace"),
        (lambda saved: saved["model"], "the key 'cfg' is missing"),
        (lambda saved: {"cfg": saved["cfg"]}, "the key 'model' is missing; a BEATs checkpoint has 'cfg' and 'model'"),
        (lambda saved: {"cfg": 1, "model": {}}, "the key 'cfg' is a int"),
        (lambda saved: [saved], "holds a list, not a dict"),
        (lambda saved: saved | {"cfg": saved["cfg"] | {"rate": float("inf")}}, "cfg['rate'] is inf (float)"),
        (lambda saved: saved | {"model": saved["model"] | {"epoch": 3}}, "model['epoch'] is int, not an ordinary tensor"),
        (
            lambda saved: saved | {"model": saved["model"] | {NAME: torch.ones(2, 2, dtype=torch.complex64)}},
            f"model['{NAME}'] is torch.strided torch.complex64 on cpu",
        ),
        (lambda saved: saved | {"model": saved["model"] | {7: torch.ones(1)}}, "the key 7 is a int, not a name"),
        (lambda saved: dropped(saved, NAME), f"missing tensor {NAME}"),
        (lambda saved: saved | {"model": saved["model"] | {"mask_emb": torch.ones(3)}}, "unknown tensor mask_emb"),
        (
            lambda saved: saved | {"model": saved["model"] | {NAME: torch.ones(3, 2)}},
            f"{NAME} ({{file}}/model.safetensors) has shape [3, 2]",
        ),
        (
            lambda saved: saved | {"model": saved["model"] | {NAME: saved["model"][NAME].long()}},
            f"{NAME} ({{file}}/model.safetensors) is int64",
        ),
        (lambda saved: saved | {"cfg": saved["cfg"] | {"layer_norm_first": True}}, "layer_norm_first is True"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused_and_nothing_is_written(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "BEATs.pt"
    torch.save(change(checkpoint(TAGS)[0]), file)
    llm = make_qwen2(tmp_path / "qwen2")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["import-weights", f"--llm={llm}", f"--audio={file}", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert str(file) in told and message.format(file=file) in told
    assert ".avlm-import" not in told  # the folder of the conversion means nothing to the user
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_checkpoint(tmp_path, capsys, zipped, kept):
    file = tmp_path / "BEATs.pt"
    torch.save(checkpoint(None)[0], file, _use_new_zipfile_serialization=zipped)
    os.truncate(file, int(file.stat().st_size * kept))
    assert cli.main(["import-weights", f"--audio={file}", f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert f"{file}: " in told and "fetch the file again" in told
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_full_disk(tmp_path, capsys):
    """It is full for the process that converts, told in one line."""
    file, python = tmp_path / "BEATs.pt", tmp_path / "python"
    torch.save(checkpoint(None)[0], file)
    python.write_text(f'#!/bin/sh\nulimit -f 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    argv = ["import-weights", f"--audio={file}", f"--out={tmp_path / 'out'}", f"--torch-python={python}"]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert f"{file}: cannot be converted (" in told and "File too large" in told and "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BEATs.pt", "python"]


def test_a_flipped_bit(tmp_path, capsys):
    file = tmp_path / "BEATs.pt"
    torch.save(checkpoint(None)[0], file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert cli.main(["import-weights", f"--audio={file}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is damaged (its checksum differs)" in capsys.readouterr().err


def test_the_folder_of_another_machine(tmp_path):
    """The script by itself, and its folder in place of the file."""
    saved, expected = checkpoint(TAGS)
    file = Path(tmp_path / "BEATs.pt")
    torch.save(saved, file)
    beats.convert_checkpoint(file, tmp_path / "converted")
    assert sorted(path.name for path in (tmp_path / "converted").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert cli.main(["import-weights", f"--audio={tmp_path / 'converted'}", f"--out={tmp_path / 'out'}"]) == 0
    found = flatten(load_beats(tmp_path / "out/audio")[1])
    assert all(found[path].tobytes() == array.tobytes() for path, array in expected.items())
    assert json.loads((tmp_path / "out/audio/config.json").read_text())["source_sha256"] == file_sha256(file)
    _, predictor, _ = load_beats(tmp_path / "converted", classifier=True)
    assert predictor["predictor"]["kernel"].shape == (BEATS.width, TAGS)
