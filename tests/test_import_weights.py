"""`avlm import-weights` on tiny folders of the released form: what arrives, what is left out, what is left alone."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli, import_weights
from avlm_jax.assembly import load_backbones
from avlm_jax.config import load_config
from avlm_jax.import_weights import import_backbones
from avlm_jax.staging import SPARE_BYTES
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.beats import load_beats
from avlm_jax.weights.qwen2 import load_qwen2
from avlm_jax.weights.record import read_record
from avlm_jax.weights.siglip import load_siglip
from avlm_jax.weights.table import flatten
from input_pipeline.errors import UserError
from tests.released_folders import BEATS, QWEN2, SIGLIP, edit, edit_json, make_beats, make_qwen2, make_siglip
from tests.tiny_system import CONFIG

LOADERS = {"vision": load_siglip, "audio": load_beats, "llm": load_qwen2}
OVERRIDES = (
    *(
        f"--config.model.vision.{key}={getattr(SIGLIP, key)}"
        for key in ("width", "depth", "mlp_dim", "num_heads")
    ),
    "--config.model.vision.image_size=32",
    "--config.model.vision.patch_size=8",
    *(
        f"--config.model.audio.{key}={getattr(BEATS, key)}"
        for key in (
            "embed_dim",
            "width",
            "depth",
            "num_heads",
            "mlp_dim",
            "conv_pos_kernel",
            "conv_pos_groups",
        )
    ),
    "--config.model.llm.vocab_size=300",
    "--config.model.llm.width=16",
    "--config.model.llm.depth=3",
    "--config.model.llm.num_heads=4",
    "--config.model.llm.num_kv_heads=2",
    "--config.model.llm.mlp_dim=24",
    "--config.model.llm.rope_theta=1e6",
    "--config.model.llm.tie_embeddings=False",
)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By part, a folder that no test changes."""
    root = tmp_path_factory.mktemp("released")
    return {
        "vision": make_siglip(root / "siglip"),
        "audio": make_beats(root / "beats"),
        "llm": make_qwen2(root / "qwen2"),
    }


def command(sources: dict[str, Path], out: Path, *more: str) -> list[str]:
    parts = [f"--{part}={folder}" for part, folder in sources.items()]
    return ["import-weights", *parts, f"--out={out}", *more]


def same(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype and found[path].tobytes() == array.tobytes(), path


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its time and content."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_three_parts(released, tmp_path, capsys):
    out = tmp_path / "made" / "weights"
    assert cli.main(command(released, out)) == 0
    told = capsys.readouterr()
    assert "warning" not in told.err
    assert {path.name for path in out.iterdir()} == {"vision", "audio", "llm", "import.json"}
    records = read_record(out)
    for part, load in LOADERS.items():
        config, params, report = load(out / part)
        original = load(released[part])
        same(params, original[1])
        assert not report.ignored  # What the model does not use was left behind.
        record = records[part]
        assert (record["tensors"], record["bytes"], record["sha256"]) == (
            report.count,
            report.bytes,
            report.sha256,
        )
        assert record["source"] == str(released[part])
        assert report.sha256 == original[2].sha256
        if part == "llm":
            assert record["dtypes"] == ["bfloat16"]
            assert (out / "llm/config.json").read_bytes() == (released["llm"] / "config.json").read_bytes()
        else:
            assert config == original[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / "llm" / name).read_bytes() == (released["llm"] / name).read_bytes()
    assert (out / "vision/preprocessor_config.json").is_file()
    lines = [line.split() for line in told.out.splitlines()]
    assert [line[0] for line in lines[1:] if line and line[0] in LOADERS] == list(LOADERS)
    assert "       5 left out: text tower and contrastive loss" in told.out
    assert "       2 left out: the tagging head; features are read before it" in told.out
    assert f"next: avlm train --config configs/savenvideo.py:size=7b,weights={out} " in told.out


@pytest.mark.parametrize("more", [["--config", f"{CONFIG}:size=demo", *OVERRIDES], []])
def test_the_next_command_is_one_that_works(released, tmp_path, capsys, more):
    """Also without a configuration, though no published model has these sizes."""
    assert cli.main(command(released, tmp_path, *more)) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["avlm", "train"] and words[-2:] == ["--workdir", "W"]
    config = load_config(words[3], words[4:-2])
    assert config.text.tokenizer == f"{tmp_path}/llm"
    known, reports = load_backbones(config)
    assert known and set(reports) == set(LOADERS)


def test_some_of_the_parts(released, tmp_path, capsys):
    reports = import_backbones(audio=released["audio"], out=tmp_path)
    assert set(reports) == set(read_record(tmp_path)) == {"audio"}
    assert cli.main(command({"llm": released["llm"]}, tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"--config.init.audio={tmp_path}/audio --config.init.llm={tmp_path}/llm" in out
    assert f"--config.text.tokenizer={tmp_path}/llm" in out
    assert set(read_record(tmp_path)) == {"audio", "llm"}
    shutil.rmtree(tmp_path / "audio")
    assert set(read_record(tmp_path)) == {"llm"}


SMALL = {"depth": 24, "num_heads": 14, "num_kv_heads": 2, "mlp_dim": 4864}


@pytest.mark.parametrize(
    ("sizes", "size", "flags"),
    [
        ({"width": 896, "vocab_size": 151936, "tie_embeddings": True, "head_dim": 64, **SMALL}, "0.5b", []),
        ({"width": 1536}, "1.5b", []),
        ({"width": 3584, "head_dim": 128, "num_heads": 28, "vocab_size": 152064}, "7b", []),
        ({"width": 3584, "vocab_size": 150000}, "7b", ["--config.model.llm.vocab_size=150000"]),
        (
            {"width": 2048, "depth": 36, "head_dim": 128, "num_heads": 16},
            "7b",
            [f"--config.model.llm.{item}" for item in ("width=2048", "depth=36", "num_heads=16")],
        ),
    ],
)
def test_the_size_follows_the_language_model(tmp_path, monkeypatch, sizes, size, flags):
    monkeypatch.setattr(import_weights, "read_record", lambda out: {"llm": {}})
    monkeypatch.setattr(import_weights, "open_backbone", lambda part, folder: (sizes, None))
    words = shlex.split(import_weights.next_command(tmp_path, None, []))
    assert words[3] == f"configs/savenvideo.py:size={size}"
    assert sorted(word for word in words if ".model." in word) == sorted(flags)
    # Where there is no such file, what the size 7b lacks for certain is told.
    monkeypatch.chdir(tmp_path)
    told = import_weights.next_command(tmp_path, None, [])
    assert all(flag in told for flag in flags) or sizes["width"] == 3584


def test_a_damaged_part_does_not_spoil_the_next_command(released, tmp_path, capsys):
    import_backbones(vision=released["vision"], audio=released["audio"], out=tmp_path)
    (tmp_path / "vision/config.json").write_text("{")
    assert cli.main(command({"llm": released["llm"]}, tmp_path)) == 0
    told = capsys.readouterr().out
    assert "--config.model.llm.width=16" in told and ".vision.width" not in told


def test_the_same_again_writes_nothing(released, tmp_path, capsys):
    assert cli.main(command(released, tmp_path)) == 0
    before, first = everything(tmp_path), capsys.readouterr().out
    assert cli.main(command(released, tmp_path)) == 0
    told = capsys.readouterr()
    assert everything(tmp_path) == before and told.out == first
    for part in LOADERS:
        assert f"{part}: {tmp_path / part} holds {released[part]} already" in told.err


def test_other_weights_need_overwrite(released, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(command(released, out)) == 0
    before = everything(out)
    other = make_qwen2(tmp_path / "other", seed=9)
    both = {"vision": released["vision"], "llm": other}
    assert cli.main(command(both, out)) == 2
    told = capsys.readouterr().err
    assert f"{out}/llm: holds {released['llm']} (sha256 " in told and f"not {other} (sha256 " in told
    assert "--overwrite replaces it" in told
    assert everything(out) == before
    assert cli.main(command(both, out, "--overwrite")) == 0
    same(load_qwen2(out / "llm")[1], load_qwen2(other)[1])
    assert read_record(out)["llm"]["source"] == str(other)
    kept = {name: file for name, file in everything(out).items() if name.startswith("vision/")}
    assert kept and kept == {name: before[name] for name in kept}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_another_tokenizer_counts_as_other_weights(released, tmp_path):
    source = Path(shutil.copytree(released["llm"], tmp_path / "qwen2"))
    import_backbones(llm=source, out=tmp_path / "out")
    edit_json(source / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        import_backbones(llm=source, out=tmp_path / "out")


def test_a_folder_of_somebody_else_is_not_touched(released, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match="llm: was not put there by this command, so it stays, with --over"
        ):
            import_backbones(**released, out=tmp_path, overwrite=overwrite)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["llm", "llm/notes.txt"]


def test_a_part_that_was_damaged_is_written_again(released, tmp_path):
    import_backbones(**released, out=tmp_path)
    before = (tmp_path / "llm/model.safetensors").read_bytes()
    damaged = bytearray(before)
    damaged[-1] ^= 1
    (tmp_path / "llm/model.safetensors").write_bytes(damaged)
    (tmp_path / "vision/config.json").unlink()
    untouched = everything(tmp_path / "audio")
    import_backbones(**released, out=tmp_path)
    assert (tmp_path / "llm/model.safetensors").read_bytes() == before
    assert (tmp_path / "vision/config.json").is_file() and everything(tmp_path / "audio") == untouched


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_import_leaves_nothing_that_looks_complete(released, tmp_path, monkeypatch, stop):
    """It stops at the fifth tensor of the language model."""
    read = safetensors_io.StoredTensor.__array__
    count = iter(range(10_000))

    def stopping(tensor, dtype=None, copy=None):
        if tensor.dtype != np.float32 and next(count) == 4:
            raise stop
        return read(tensor, dtype, copy)

    monkeypatch.setattr(safetensors_io.StoredTensor, "__array__", stopping)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        import_backbones(**released, out=tmp_path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"vision", "audio", "import.json"}
    assert set(read_record(tmp_path)) == {"vision", "audio"}
    vision = everything(tmp_path / "vision")
    import_backbones(**released, out=tmp_path)
    assert set(read_record(tmp_path)) == set(LOADERS)
    assert everything(tmp_path / "vision") == vision


@pytest.mark.parametrize("part_there", [True, False])
def test_leftovers_of_a_killed_import_are_removed(released, tmp_path, part_there):
    """Killed while it wrote, or between the two renames that replace a part: what stood there is in .llm.old."""
    other = make_qwen2(tmp_path / "other", seed=9)
    out = tmp_path / "out"
    import_backbones(llm=other, out=out)
    shutil.copytree(released["llm"], out / ".llm.partial")
    if part_there:
        (out / ".llm.old").mkdir()
    else:
        (out / "llm").rename(out / ".llm.old")
    with pytest.raises(UserError, match=f"llm: holds {other} .* --overwrite replaces it"):
        import_backbones(llm=released["llm"], out=out)
    same(load_qwen2(out / "llm")[1], load_qwen2(other)[1])
    import_backbones(llm=released["llm"], out=out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"llm", "import.json"}
    same(load_qwen2(out / "llm")[1], load_qwen2(released["llm"])[1])


@pytest.mark.parametrize("earlier", [False, True])
def test_a_part_of_a_run_killed_before_its_record(released, tmp_path, monkeypatch, capsys, earlier):
    """SIGKILL after the rename: import.json does not know the part, or tells of the one before."""
    if earlier:
        import_backbones(llm=make_qwen2(tmp_path / "other", seed=9), out=tmp_path / "out")

    def killed(*_):
        raise SystemExit

    out = tmp_path / "out"
    monkeypatch.setattr(import_weights, "write_record", killed)
    with pytest.raises(SystemExit):
        import_backbones(llm=released["llm"], out=out, overwrite=earlier)
    monkeypatch.undo()
    before = everything(out / "llm")
    assert cli.main(command({"llm": released["llm"]}, out)) == 0
    assert f"llm: {out / 'llm'} holds {released['llm']} already" in capsys.readouterr().err
    assert everything(out / "llm") == before
    assert read_record(out)["llm"]["source"] == str(released["llm"])
    import_backbones(llm=make_qwen2(tmp_path / "third", seed=5), out=out, overwrite=True)  # It is ours again.


def test_a_part_with_more_in_it_than_this_command_writes_is_not_taken_over(released, tmp_path):
    import_backbones(llm=released["llm"], out=tmp_path)
    (tmp_path / "import.json").unlink()
    (tmp_path / "llm/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="llm: was not put there by this command"):
        import_backbones(llm=released["llm"], out=tmp_path, overwrite=True)


def test_a_part_that_is_a_link(released, tmp_path, capsys):
    """It may have been moved to a larger disk. The link is replaced, never what it points to."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    import_backbones(llm=released["llm"], out=out)
    (out / "llm").rename(elsewhere)
    (out / "llm").symlink_to(elsewhere)
    before = everything(elsewhere)
    assert cli.main(command({"llm": released["llm"]}, out)) == 0
    assert "already" in capsys.readouterr().err and (out / "llm").is_symlink()
    other = make_qwen2(tmp_path / "other", seed=9)
    assert cli.main(command({"llm": other}, out, "--overwrite")) == 0
    assert not (out / "llm").is_symlink() and everything(elsewhere) == before
    same(load_qwen2(out / "llm")[1], load_qwen2(other)[1])
    assert {path.name for path in out.iterdir()} == {"llm", "import.json"}
    # Without a record, and to nothing.
    shutil.rmtree(out)
    out.mkdir()
    (out / "llm").symlink_to(elsewhere)
    assert cli.main(command({"llm": other}, out, "--overwrite")) == 2
    assert "llm: was not put there by this command" in capsys.readouterr().err
    (out / "llm").unlink()
    (out / "llm").symlink_to(tmp_path / "nowhere")
    assert cli.main(command({"llm": other}, out, "--overwrite")) == 2
    assert f"{out}/llm is a link to {tmp_path}/nowhere, where nothing is" in capsys.readouterr().err
    assert everything(elsewhere) == before
    (tmp_path / "nowhere").mkdir()
    assert cli.main(command({"llm": other}, out)) == 0
    assert (out / "llm").is_symlink() and (tmp_path / "nowhere/config.json").is_file()


def test_out_is_a_link(released, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert cli.main(command({"llm": released["llm"]}, tmp_path / "out")) == 2
    assert "out is a link to" in capsys.readouterr().err
    (tmp_path / "nowhere").mkdir()
    assert cli.main(command({"llm": released["llm"]}, tmp_path / "out")) == 0
    assert (tmp_path / "nowhere/llm/config.json").is_file()


def test_out_is_the_current_folder(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        import_backbones(llm=released["llm"], out=".")
        assert {path.name for path in tmp_path.iterdir()} == {"llm", "import.json"}


def test_all_parts_are_checked_before_one_is_written(released, tmp_path, capsys):
    llm = Path(shutil.copytree(released["llm"], tmp_path / "qwen2"))
    audio = Path(shutil.copytree(released["audio"], tmp_path / "beats"))
    edit(llm, {}, drop=("model.norm.weight",))
    edit(audio, {"stray": np.zeros(1, np.float32)})
    out = tmp_path / "out"
    assert cli.main(command({"vision": released["vision"], "audio": audio, "llm": llm}, out)) == 2
    told = capsys.readouterr().err
    assert "nothing was imported" in told
    assert (
        f"unknown tensor stray ({audio}/model.safetensors)" in told
        and "missing tensor model.norm.weight" in told
    )
    assert not out.exists()


def test_a_configuration_of_other_sizes(released, tmp_path, capsys):
    out = tmp_path / "out"
    changed = [item for item in OVERRIDES if "llm.width" not in item and "audio.depth" not in item]
    more = ["--config.model.llm.mlp_dim=48", "--config.model.llm.qkv_bias=False"]
    assert cli.main(command(released, out, "--config", f"{CONFIG}:size=demo", *changed, *more)) == 2
    told = capsys.readouterr().err
    for line in (
        "width is 128, the checkpoint's 16",
        "mlp_dim is 48, the checkpoint's 24",
        "qkv_bias is False, the checkpoint's True",
    ):
        assert line in told
    assert not out.exists()
    assert cli.main(command(released, out, "--config", f"{CONFIG}:size=7b")) == 2
    told = capsys.readouterr().err
    assert all(
        f"config.model.{part} does not fit the checkpoint in {released[part]}" in told for part in LOADERS
    )
    assert not out.exists()


def test_the_feature_layer_of_a_configuration_decides_what_is_kept(released, tmp_path):
    config = load_config(f"{CONFIG}:size=demo", [*OVERRIDES, "model.vision.feature_layer=-3"])
    import_backbones(vision=released["vision"], out=tmp_path, config=config)
    found, params, _ = load_siglip(tmp_path / "vision")
    assert found.feature_layer == -3 and params["layers"]["ln1"]["scale"].shape == (1, 16)


def test_too_little_space(released, tmp_path, monkeypatch):
    def usage(folder):
        assert Path(folder) == tmp_path
        return shutil._ntuple_diskusage(10**9, 0, SPARE_BYTES + 30_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        UserError,
        match=rf"{tmp_path}: no room for vision, audio, llm, which takes \d\d\.\d kB: 67.1 MB are free",
    ):
        import_backbones(**released, out=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_no_space_to_convert_in(tmp_path, monkeypatch, capsys):
    """Told before the process starts."""
    file = tmp_path / "BEATs.pt"
    file.write_bytes(bytes(10_000))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, SPARE_BYTES + 19_999)
    )
    monkeypatch.setattr(import_weights, "convert_checkpoint", None)
    assert cli.main(["import-weights", f"--audio={file}", f"--out={tmp_path / 'out'}"]) == 2
    assert f"no room for the conversion of {file}, which takes 20.0 kB" in capsys.readouterr().err


def fake_conversion(monkeypatch, released) -> None:
    """Stands for torch: the tensors come from a folder."""

    def convert(file, folder, *, python):
        assert not list(Path(folder).iterdir())
        shutil.copytree(released["audio"], folder, dirs_exist_ok=True)

    monkeypatch.setattr(import_weights, "convert_checkpoint", convert)


@pytest.mark.parametrize("out_there", [True, False])
def test_leftovers_of_a_killed_conversion_are_removed(released, tmp_path, monkeypatch, out_there):
    file, out = tmp_path / "BEATs.pt", tmp_path / "out"
    file.write_bytes(b"whatever")
    if out_there:
        out.mkdir()

    def killed(file, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        shutil.copytree(folder, tmp_path / "copy")
        raise UserError(Path(folder))

    monkeypatch.setattr(import_weights, "convert_checkpoint", killed)
    with pytest.raises(UserError) as error:
        import_backbones(audio=file, out=out)
    (folder,) = error.value.args
    assert folder.parent == (out if out_there else tmp_path) and not folder.exists()
    (tmp_path / "copy").rename(folder)
    other = tmp_path / ".avlm-import-of-another-out"
    other.mkdir()
    out.mkdir(exist_ok=True)  # Made by an import of another part.
    fake_conversion(monkeypatch, released)
    import_backbones(audio=file, out=out)
    assert {path.name for path in out.iterdir()} == {"audio", "import.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"BEATs.pt", "out", other.name}


def test_the_sizes_of_a_converted_part_are_compared_again(released, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "BEATs.pt", tmp_path / "out"
    file.write_bytes(b"whatever")
    fake_conversion(monkeypatch, released)
    argv = ["import-weights", f"--audio={file}", f"--out={out}"]
    assert cli.main([*argv, "--config", f"{CONFIG}:size=demo", *OVERRIDES]) == 0
    monkeypatch.setattr(import_weights, "convert_checkpoint", None)
    assert cli.main([*argv, "--config", f"{CONFIG}:size=demo", *OVERRIDES]) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--config", f"{CONFIG}:size=7b"]) == 2
    told = capsys.readouterr().err
    assert f"config.model.audio does not fit the checkpoint in {file}: " in told


def test_published_preprocessing_is_compared(released, tmp_path, capsys):
    vision = Path(shutil.copytree(released["vision"], tmp_path / "siglip"))
    edit_json(vision / "preprocessor_config.json", resample=2, size={"height": 64, "width": 64})
    assert cli.main(command({"vision": vision}, tmp_path / "out")) == 0
    told = capsys.readouterr().err
    assert "resample is 2, this project's pictures are made with 3" in told
    assert "size is {'height': 64, 'width': 64}, this project's pictures are made with {'height': 32" in told
    assert len(read_record(tmp_path / "out")["vision"]["warnings"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model alone, or at least one of --vision, --audio, --llm"),
        (["--model=x", "--llm=y"], "give --model alone"),
        (["--llm={llm}/tokenizer.json"], "a file; --llm names a folder"),
        (["--audio={audio}/model.safetensors"], "name its folder, which must hold BEATs' cfg"),
        (["--llm=no/such"], "there is no folder 'no/such' here"),
        (["--llm={llm}", "--config=nowhere.py"], "no config file 'nowhere.py'"),
        (["--llm={vision}"], "model_type is 'siglip'; known: qwen2, llama"),
        (["--vision={llm}"], "model_type is 'qwen2', expected siglip"),
        (["--audio={llm}"], "config.json: "),
        (["--llm={empty}"], "config.json: missing"),
        (["--model={empty}"], "--model names a folder made by `avlm export`"),
    ],
)
def test_arguments(released, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    filled = [item.format(**released, empty=tmp_path / "empty") for item in arguments]
    assert cli.main(["import-weights", *filled, f"--out={out}"]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_out_is_a_file(released, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; --out names a folder"):
        import_backbones(**released, out=tmp_path / "file")


@pytest.mark.parametrize(
    "way", ["the part", "another part", "below", "through a link", "links in it", "a .pt"]
)
def test_a_source_is_never_deleted(released, tmp_path, monkeypatch, way):
    """Even where import.json says that the part may be replaced."""
    out = tmp_path / "out"
    import_backbones(**released, out=out)
    part, source = "llm", out / "llm"
    if way == "another part":
        source = out / "vision"
    elif way == "below":
        source = make_qwen2(out / "llm" / "fine-tuned", seed=9)
    elif way == "through a link":
        (tmp_path / "link").symlink_to(out)
        source = tmp_path / "link" / "llm"
    elif way == "links in it":
        source = tmp_path / "linked"
        source.mkdir()
        for file in (out / "llm").iterdir():
            (source / file.name).symlink_to(file)
    elif way == "a .pt":
        part, source = "audio", out / "audio" / "BEATs.pt"
        source.write_bytes(b"whatever")
        fake_conversion(monkeypatch, released)
    before = everything(tmp_path)
    with pytest.raises(
        UserError, match=r"lies in .*/out/(llm|vision|audio), which is --out's own; name another"
    ):
        import_backbones(**{part: source}, out=out, overwrite=True)
    assert everything(tmp_path) == before


def test_a_source_in_out_beside_the_parts(released, tmp_path):
    source = make_qwen2(tmp_path / "sources" / "llm")
    before = everything(source)
    import_backbones(llm=source, out=tmp_path)
    import_backbones(llm=make_qwen2(tmp_path / "sources" / "other", seed=9), out=tmp_path, overwrite=True)
    assert everything(source) == before


def test_folders_of_pickles(released, tmp_path):
    for part, name, message in (
        ("llm", "pytorch_model-00001-of-00002.bin", "take a repository or revision with safetensors"),
        ("audio", "BEATs_iter3.pt", f"--audio {tmp_path}/audio/BEATs_iter3.pt"),
    ):
        folder = tmp_path / part
        folder.mkdir()
        shutil.copy(released[part] / "config.json", folder)
        (folder / name).write_bytes(b"\x80\x02}.")
        with pytest.raises(UserError, match="its weights are pickles") as error:
            import_backbones(**{part: folder}, out=tmp_path / "out")
        assert message in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"format_version": 1}',
        '{"format_version": 9, "parts": {}}',
        '{"format_version": 1, "parts": {"llm": 5}}',
        '{"format_version": 1, "parts": {"llm": {"source": "x", "tensors": 3}}}',
    ],
)
def test_a_record_that_is_none(released, tmp_path, content):
    (tmp_path / "import.json").write_text(content)
    with pytest.raises(UserError, match="import.json: .*[Rr]emove|import.json: .*fetch or copy it again"):
        import_backbones(**released, out=tmp_path)
    assert os.listdir(tmp_path) == ["import.json"]


def test_a_tied_model_in_one_file(tmp_path):
    source = make_qwen2(tmp_path / "qwen2", tie_word_embeddings=True)
    table = np.array(safetensors_io.read_folder(source)["model.embed_tokens.weight"])
    edit(source, {"lm_head.weight": table})
    report = import_backbones(llm=source, out=tmp_path / "out")["llm"]
    (names,) = report.ignored.values()
    assert names == ("lm_head.weight",)
    stored = safetensors_io.read_folder(tmp_path / "out/llm")
    assert "lm_head.weight" not in stored and len(stored) == report.count
    assert QWEN2["num_hidden_layers"] * 12 + 2 == report.count


def test_a_llama_without_chatml_is_imported_with_a_warning(tmp_path, capsys):
    source = make_qwen2(tmp_path / "vicuna", model_type="llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text()
        (source / name).write_text(text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"))
    assert cli.main(command({"llm": source}, tmp_path / "out")) == 0
    assert "no <|im_start|>, <|im_end|>; text.template 'chatml' does not fit" in capsys.readouterr().err
