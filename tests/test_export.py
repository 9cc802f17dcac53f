"""`avlm export`: what it writes, one tensor at a time, all or nothing."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from avlm_jax import cli, export, staging
from avlm_jax.assembly import Assembly, assemble
from avlm_jax.checkpoints.stage_result import load_tree, save_tree
from avlm_jax.config import ConfigError, apply_overrides, config_to_json
from avlm_jax.export import ExportError, export_model
from avlm_jax.lora import is_lora, merge_kernel, retire
from avlm_jax.staging import StagingError
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.exported import read_exported
from avlm_jax.weights.qwen2 import load_qwen2
from avlm_jax.weights.safetensors_io import SafetensorsError, StoredTensor
from avlm_jax.weights.siglip import load_siglip
from avlm_jax.weights.table import WeightError
from input_pipeline.errors import UserError
from tests.exported_system import (
    METADATA,
    bits,
    demo_assembly,
    learnt_of,
    scale_of,
    tiny_assembly,
    write_backbones,
)
from tests.tiny_system import random_params, tiny_config


@pytest.fixture(scope="module")
def demo() -> Assembly:
    return demo_assembly()


@pytest.fixture(scope="module")
def learnt(demo) -> dict:
    return learnt_of(demo)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Assembly:
    return tiny_assembly(tmp_path_factory.mktemp("tiny"), ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def merged(demo, learnt, tmp_path_factory) -> Path:
    return export_model(demo.config, learnt, tmp_path_factory.mktemp("merged") / "out", metadata=METADATA)


@pytest.fixture(scope="module")
def adapted(demo, learnt, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "out"
    return export_model(demo.config, learnt, out, adapter=True, metadata=METADATA)


# Merging


def test_merging_adds_alpha_over_rank_times_a_b(demo, learnt, merged):
    base = flatten(load_qwen2(demo.config.init.llm)[1])
    found = flatten(load_qwen2(merged / "llm")[1])
    adapters, lora = flatten(learnt["llm"]), demo.config.model.llm.lora
    for path, kernel in found.items():
        layer = path.removesuffix("/kernel")
        expected = base[path].astype(np.float64)
        if f"{layer}/lora_a" in adapters:
            a, b = (adapters[f"{layer}/lora_{half}"].astype(np.float64) for half in "ab")
            update = lora.alpha / lora.rank * np.einsum("lir,lro->lio", a, b)
            assert np.abs(update).max() > 0.1, path
            expected = expected + update
        # fp32 on a sum of 16 products.
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=path)


def test_the_merged_model_is_the_base_with_its_adapter_merged(tiny, tmp_path):
    """In half precision, with an adapter of an earlier stage: what PEFT would merge is what `llm/` holds."""
    tree = retire(learnt_of(tiny, seed=1), scale_of(tiny))
    tree["llm"] = learnt_of(tiny, seed=2)["llm"]
    whole = export_model(tiny.config, tree, tmp_path / "whole")
    apart = export_model(tiny.config, tree, tmp_path / "apart", adapter=True)
    base, found = (flatten(load_qwen2(out / "llm")[1]) for out in (apart, whole))
    bare = flatten(load_qwen2(tiny.config.init.llm)[1])
    lora, changed = tiny.config.model.llm.lora, 0
    for path, kernel in base.items():
        layer, expected = path.removesuffix("/kernel"), kernel
        if f"llm/{layer}/lora_a" in flatten(tree):
            pairs = [
                [(flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"])]
                for flat in (flatten(tree["merged"]["0"]["llm"]), flatten(tree["llm"]))
            ]
            by_layer = [
                merge_kernel(bare[path][i], [(a[i], b[i]) for a, b in pairs[0]], 1.0)  # The scale is in B.
                for i in range(len(kernel))
            ]
            assert kernel.tobytes() == np.stack(by_layer).tobytes(), path
            assert kernel.tobytes() != bare[path].tobytes(), path
            expected = np.stack(
                [
                    merge_kernel(kernel[i], [(a[i], b[i]) for a, b in pairs[1]], lora.alpha / lora.rank)
                    for i in range(len(kernel))
                ]
            )
            changed += 1
        assert found[path].dtype == ml_dtypes.bfloat16
        assert found[path].tobytes() == expected.tobytes(), path
    assert changed == 7
    assert json.loads((whole / "config.json").read_text())["source"]["merged_adapters"] == 2
    assert json.loads((apart / "config.json").read_text())["source"]["merged_adapters"] == 1


# What stands in the folder


def test_what_pytorch_needs_is_there(demo, adapted, merged):
    assert json.loads((merged / "config.json").read_text())["adapter"] is None
    stated = json.loads((adapted / "config.json").read_text())
    assert stated["adapter"] == "adapter" and stated["source"]["hash"] == METADATA["hash"]
    assert stated["media_token_id"] == demo.system.media_token_id
    assert stated["num_media_tokens"] == demo.system.num_media_tokens
    assert stated["text"] == {
        "template": "chatml", "system": "", "stop_tokens": ["<|im_end|>", "<|endoftext|>"], "max_length": 160,
    }  # fmt: skip
    generation = json.loads((merged / "llm" / "generation_config.json").read_text())
    assert generation == {"do_sample": False, "eos_token_id": [638, 636], "pad_token_id": 636}
    package = Path(export.__file__).parent
    assert (merged / "modeling_savenvideo.py").read_bytes() == (
        package / "pytorch" / "modeling_savenvideo.py"
    ).read_bytes()
    for name in ("tokenizer.json", "chat_template.jinja"):
        original = Path(demo.config.text.tokenizer) / name
        assert (merged / "llm" / name).read_bytes() == original.read_bytes()
    assert not (merged / "adapter").exists()


def test_only_chatml_can_be_exported(tiny, tmp_path):
    """The exported file lays out prompts itself, and knows no other template."""
    config = apply_overrides(tiny.config, ["text.template=plain"])
    with pytest.raises(
        ExportError, match="text.template is 'plain'; modeling_savenvideo.py .* 'chatml' only"
    ):
        export_model(config, learnt_of(tiny), tmp_path / "out")
    own = apply_overrides(tiny.config, ["stage.1a.template=plain"])
    with pytest.raises(ExportError, match="stage.1a.template is 'plain'"):
        export_model(own, learnt_of(tiny), tmp_path / "out", metadata={"stage": "1a"})
    assert not (tmp_path / "out").exists()
    turned = apply_overrides(config, ["stage.2b.template=chatml"])
    out = export_model(turned, learnt_of(tiny), tmp_path / "out", metadata={"stage": "2b"})
    stated = json.loads((out / "config.json").read_text())
    assert (stated["text"]["template"], stated["source"]["stage"]) == ("chatml", "2b")


def test_the_template_s_own_system_text_is_spelt_out(tiny, tmp_path):
    config = apply_overrides(tiny.config, []).unlock()
    config.text.system = None
    out = export_model(config, learnt_of(tiny), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["text"]["system"] == "You are a helpful assistant."


def test_every_file_s_hash_is_listed(adapted):
    listed = json.loads((adapted / "hashes.json").read_text())
    files = {str(file.relative_to(adapted)): file for file in adapted.rglob("*") if file.is_file()}
    assert listed.keys() == files.keys() - {"hashes.json"}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name


def test_full_parameters_take_the_place_of_the_backbones(tiny, tmp_path):
    """Fully fine-tuned systems publish kernels; adapters are added to those."""
    tree = flatten(learnt_of(tiny))
    full = flatten(random_params(tiny, seed=5))
    replaced = ("llm/layers/attn/q/kernel", "llm/norm/scale", "llm/embed/embedding", "vision/layers/mlp/fc1/kernel",
                "audio/patch_ln/bias")  # fmt: skip
    tree |= {path: full[path] + 1 for path in replaced}
    out = export_model(tiny.config, unflatten(tree), tmp_path / "out")
    llm, vision = flatten(load_qwen2(out / "llm")[1]), flatten(load_siglip(out / "vision")[1])
    a, b = (tree[f"llm/layers/attn/q/lora_{half}"] for half in "ab")
    scale = tiny.config.model.llm.lora.alpha / tiny.config.model.llm.lora.rank
    sums = np.stack([merge_kernel(tree[replaced[0]][i], [(a[i], b[i])], scale) for i in range(len(a))])
    for path, expected in {
        "layers/attn/q/kernel": sums, "norm/scale": tree[replaced[1]], "embed/embedding": tree[replaced[2]],
    }.items():  # fmt: skip
        assert llm[path].tobytes() == expected.astype(ml_dtypes.bfloat16).tobytes(), path
    assert vision["layers/mlp/fc1/kernel"].tobytes() == tree[replaced[3]].astype(ml_dtypes.bfloat16).tobytes()
    untouched = flatten(load_siglip(tiny.config.init.vision)[1])
    assert vision["layers/mlp/fc2/kernel"].tobytes() == untouched["layers/mlp/fc2/kernel"].tobytes()


def test_what_no_stage_has_trained_is_what_ask_would_draw(tiny, tmp_path):
    tree = flatten(learnt_of(tiny))
    early = {path: leaf for path, leaf in tree.items() if not path.startswith("connector/audio_mlp/")}
    early = {path: leaf for path, leaf in early.items() if not is_lora(path)}
    out = export_model(tiny.config, unflatten(early), tmp_path / "out", metadata=METADATA)
    drawn = [path for path in tree if path.startswith("connector/audio_mlp/")]
    assert json.loads((out / "config.json").read_text())["source"]["drawn"] == sorted(drawn)
    params = flatten(tiny.parameters(unflatten(early))[0])
    found = read_exported(out).learnt
    for path in drawn:
        np.testing.assert_array_equal(found[path].read(), np.asarray(params[path], np.float32), err_msg=path)
    card = (out / "README.md").read_text()
    assert "**Untrained.**" in card and "`connector/audio_mlp/fc1`" in card
    assert "has trained no adapter" in card
    assert bits({"llm": load_qwen2(out / "llm")[1]}) == bits({"llm": load_qwen2(tiny.config.init.llm)[1]})


def test_an_export_holds_the_released_weights_whatever_the_base_was_kept_in(tiny, tmp_path):
    """An adapter that was trained over an int8 base goes onto, and into, the weights as released."""
    tree = learnt_of(tiny)
    partly = {
        path: leaf for path, leaf in flatten(tree).items() if not path.startswith("connector/audio_mlp/")
    }
    config, plain = (apply_overrides(tiny.config, [f"frozen_dtype={name}"]) for name in ("int8", "bfloat16"))
    found, expected = (export_model(c, unflatten(partly), tmp_path / c.frozen_dtype) for c in (config, plain))
    for name in ("llm", "vision", "audio", "connector"):
        file = f"{name}/model.safetensors"
        assert (found / file).read_bytes() == (expected / file).read_bytes()
    apart = export_model(config, tree, tmp_path / "apart", adapter=True)
    assert bits({"llm": load_qwen2(apart / "llm")[1]}) == bits({"llm": load_qwen2(tiny.config.init.llm)[1]})


# One tensor at a time


def test_no_more_than_a_tensor_is_in_memory(tmp_path, monkeypatch):
    """16 layers of 512 x 1024: the peak of Python's memory is a few kernels, not the model."""
    sizes = ["model.llm.width=512", "model.llm.mlp_dim=1024", "model.llm.depth=16", "model.llm.lora.rank=4"]
    monkeypatch.setattr("tests.tiny_system.SIZES", (*tiny_sizes(), *sizes))
    config = tiny_config(tmp_path / "tokenizer", *write_backbones(tmp_path, ml_dtypes.bfloat16))
    assembly = assemble(config)
    learnt = learnt_of(assembly)
    assembly.abstract_params()  # What tracing leaves behind is not the export's.
    released = []
    real = StoredTensor.release
    monkeypatch.setattr(StoredTensor, "release", lambda self: (released.append(self.name), real(self)))
    tracemalloc.start()
    try:
        export_model(config, learnt, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kernel = 512 * 1024 * 4
    model = sum(tensor.nbytes for tensor in safetensors_io.read_folder(config.init.llm).values())
    assert model > 20 * kernel
    # The kernel in fp32, its update, their sum, the result and its transposed copy; and the tracing of the shapes.
    assert peak < 8 * kernel, f"{peak / kernel:.1f} kernels"
    stored = safetensors_io.read_folder(config.init.llm).keys()
    assert set(stored) <= set(released), "pages of the files read are given back"


def tiny_sizes() -> tuple[str, ...]:
    from tests import tiny_system

    return tiny_system.SIZES


# All or nothing


def refused(assembly, tree, out: Path, error=UserError, match="", overrides=(), **options) -> None:
    """The export is refused and leaves everything as it was."""

    def listing() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in out.parent.rglob("*"))

    before = listing()
    config = apply_overrides(assembly.config, overrides)
    with pytest.raises(error, match=match):
        export_model(config, tree, out, **options)
    assert listing() == before


def test_a_model_without_adapter_has_none_to_export(tiny, tmp_path):
    tree = {"connector": learnt_of(tiny)["connector"]}
    refused(tiny, tree, tmp_path / "out", ExportError, "learnt no adapter", adapter=True)
    refused(
        tiny, tree, tmp_path / "out", ExportError, "lora.rank is 0", ["model.llm.lora.rank=0"], adapter=True
    )


@pytest.mark.parametrize("part", ["vision", "audio", "llm"])
def test_a_backbone_that_is_not_there_is_named(tiny, tmp_path, part):
    tree = learnt_of(tiny)
    refused(tiny, tree, tmp_path / "out", ConfigError, rf"config\.init\.{part} is empty", [f"init.{part}="])
    refused(
        tiny, tree, tmp_path / "out", ConfigError, rf"config\.init\.{part} names", [f"init.{part}=nowhere"]
    )


def test_another_backbone_than_the_configuration_s_is_refused(tiny, tmp_path):
    tree = learnt_of(tiny)
    elsewhere = write_backbones(tmp_path, rope_theta=77.0)
    refused(tiny, tree, tmp_path / "out", ConfigError, "rope_theta", elsewhere)
    # Not even in a size that the configuration leaves to its default.
    config_file = tmp_path / "vision" / "config.json"
    stated = json.loads(config_file.read_text()) | {"layer_norm_eps": 1e-3}
    config_file.write_text(json.dumps(stated))
    refused(tiny, tree, tmp_path / "out", ConfigError, "ln_eps", [o for o in elsewhere if "vision" in o])


def test_other_weights_than_those_trained_on_are_refused(tiny, tmp_path):
    weights = tiny.weights
    tree = learnt_of(tiny)
    export_model(tiny.config, tree, tmp_path / "right", metadata=METADATA | {"weights": weights})
    wrong = METADATA | {"weights": weights | {"audio": "0" * 64}}
    refused(
        tiny, tree, tmp_path / "out", ConfigError, "trained on other weights of audio than", metadata=wrong
    )


def test_truncated_backbones_are_refused(tiny, tmp_path):
    shutil.copytree(tiny.config.init.llm, tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(
        tiny,
        learnt_of(tiny),
        tmp_path / "out",
        SafetensorsError,
        "truncated",
        [f"init.llm={tmp_path / 'llm'}"],
    )


def test_a_checkpoint_that_does_not_fit_is_refused(tiny, tmp_path):
    tree = flatten(learnt_of(tiny))
    out = tmp_path / "out"
    odd = {"connector/of/old/kernel": np.zeros((2, 2), np.float32)}
    refused(tiny, unflatten(tree | odd), out, ConfigError, r"connector/of/old/kernel \[2, 2\]; .* no such")
    cut = {"connector/tlp/bias": tree["connector/tlp/bias"][:-1]}
    refused(tiny, unflatten(tree | cut), out, ConfigError, r"connector/tlp/bias \[31\]; .* shape \[32\]")
    path = "connector/tlp/bias"
    refused(tiny, unflatten(tree | {path: tree[path] * np.nan}), out, ExportError, f"not finite: {path}")
    old = retire(unflatten(tree), scale_of(tiny))
    half = flatten(old)
    half["merged/0/llm/layers/attn/q/lora_a"] = half["merged/0/llm/layers/attn/q/lora_a"][..., :1]
    refused(
        tiny,
        unflatten(half),
        out,
        ConfigError,
        r"an adapter \[2, 32, 1\] x \[2, 2, 32\] for llm/layers/attn/q",
    )
    del half["merged/0/llm/layers/attn/q/lora_b"]
    refused(tiny, unflatten(half), out, ConfigError, "not lora_a and lora_b")


def test_a_sum_beyond_the_stored_precision_is_no_infinity(tiny, tmp_path):
    overrides = write_backbones(tmp_path / "half", np.float16)
    tree = flatten(learnt_of(tiny))
    tree["llm/layers/attn/q/lora_a"] = tree["llm/layers/attn/q/lora_a"] * 1e6
    path = "llm/layers/attn/q/kernel, layer 0: .* into float16"
    refused_tree = unflatten(tree)
    (tmp_path / "here").mkdir()
    refused(tiny, refused_tree, tmp_path / "here" / "out", WeightError, path, overrides)


def test_nothing_of_the_user_s_is_overwritten(tiny, tmp_path):
    tree = learnt_of(tiny)
    (tmp_path / "file").write_text("mine")
    refused(tiny, tree, tmp_path / "file", StagingError, "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused(tiny, tree, tmp_path / "full", ExportError, "not empty")
    refused(tiny, tree, tmp_path / "full", ExportError, "is no export", overwrite=True)
    (tmp_path / "full" / "config.json").write_text('{"model_type": "savenvideo"}')
    refused(tiny, tree, tmp_path / "full", ExportError, "is no export", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "full")
    refused(tiny, tree, tmp_path / "link", ExportError, "is no export", overwrite=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(StagingError, match="is a link to .*nothing"):
        export_model(tiny.config, tree, tmp_path / "dangling")


def test_what_the_export_reads_from_is_not_replaced(tiny, tmp_path):
    tree = learnt_of(tiny)
    out = export_model(tiny.config, tree, tmp_path / "out")
    inside = [f"init.vision={out / 'vision'}"]
    refused(tiny, tree, out, StagingError, "where --out wants to write", inside, overwrite=True)


def test_an_empty_folder_and_an_older_export_give_way(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    export_model(tiny.config, learnt_of(tiny), tmp_path / "out", adapter=True)
    (tmp_path / "out" / "adapter" / "stale").write_text("")
    new = learnt_of(tiny, seed=9)
    refused(tiny, new, tmp_path / "out", ExportError, "--overwrite")
    export_model(tiny.config, new, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "adapter").exists()
    assert bits({"connector": new["connector"]}) == bits(
        unflatten({path: leaf.read() for path, leaf in read_exported(tmp_path / "out").learnt.items()})
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_ahead(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**3))
    refused(tiny, learnt_of(tiny), tmp_path / "out", StagingError, "no room for the export")


@pytest.mark.parametrize("step", ["save_siglip", "copy_tokenizer", "_hash_files"])
def test_a_failure_on_the_way_leaves_the_earlier_export(tiny, tmp_path, monkeypatch, step):
    out = export_model(tiny.config, learnt_of(tiny), tmp_path / "runs" / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(export, step, fail)
    for target in (out, tmp_path / "runs" / "new"):
        with pytest.raises(OSError, match="the disk is gone"):
            export_model(tiny.config, learnt_of(tiny, seed=3), target, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]


def test_a_stage_is_exported_by_its_own_configuration(tiny, tmp_path, capsys):
    config = json.loads(config_to_json(tiny.config))
    save_tree(
        tmp_path / "run" / "2b" / "final", learnt_of(tiny), config, METADATA | {"weights": tiny.weights}
    )
    command = ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    for words in (
        ["--config.model.llm.lora.alpha=1000"],
        ["--config.model.avts.time_scope=all"],
        ["--config", "x.py"],
    ):
        assert cli.main([*command, *words]) == 2
        assert "the configuration it was trained by" in capsys.readouterr().err
    tokenizer = shutil.copytree(tiny.config.text.tokenizer, tmp_path / "other") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert cli.main([*command, f"--config.text.tokenizer={tokenizer.parent}"]) == 2
    assert "other weights of tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(tiny.config.init.llm, tmp_path / "moved")
    assert cli.main([*command, f"--config.init.llm={moved}"]) == 0


def test_an_import_is_exported_again(tiny, tmp_path):
    tree = learnt_of(tiny)
    save_tree(tmp_path / "run" / "2b" / "final", tree, json.loads(config_to_json(tiny.config)), METADATA)
    source = tmp_path / "run"
    for number in (1, 2):
        out, back = tmp_path / f"out{number}", tmp_path / f"in{number}"
        assert cli.main(["export", "--workdir", str(source), "--out", str(out), "--adapter"]) == 0
        assert cli.main(["import-weights", "--model", str(out), "--out", str(back)]) == 0
        assert bits(load_tree(back / "imported" / "final")[0]) == bits(tree)
        source = back
    card = (tmp_path / "out2" / "README.md").read_text()
    assert card.count("| imported |") == 1
    (tmp_path / "out2" / "README.md").unlink()  # Whoever publishes it may write another.
    read_exported(tmp_path / "out2")
