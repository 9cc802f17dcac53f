"""A folder made by `avlm export` read back: to the bit, and not at all if a byte is another."""

import functools
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.checkpoints.stage_result import load_tree, save_tree
from avlm_jax.config import apply_overrides, config_to_json
from avlm_jax.export import export_model
from avlm_jax.generate import checkpoint_config, load_model
from avlm_jax.state import flatten
from avlm_jax.train import train
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.exported import ExportedError, import_exported, read_exported
from avlm_jax.weights.qwen2 import load_qwen2
from avlm_jax.weights.table import WeightError
from input_pipeline.errors import UserError
from tests.exported_system import METADATA, backbones, bits, demo_assembly, learnt_of, tiny_assembly
from tests.tiny_system import make_media, padded, write_records


@pytest.fixture(scope="module")
def demo() -> Assembly:
    return demo_assembly()


@pytest.fixture(scope="module")
def learnt(demo) -> dict:
    return learnt_of(demo)


@pytest.fixture(scope="module")
def merged(demo, learnt, tmp_path_factory) -> Path:
    return export_model(demo.config, learnt, tmp_path_factory.mktemp("merged") / "out", metadata=METADATA)


@pytest.fixture(scope="module")
def adapted(demo, learnt, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "out"
    return export_model(demo.config, learnt, out, adapter=True, metadata=METADATA)


# There and back


def test_an_adapter_comes_back_to_the_bit(demo, learnt, adapted, tmp_path):
    original = save_tree(tmp_path / "original", learnt, {}, {})
    import_exported(adapted, tmp_path / "in")
    tree, _, metadata = load_tree(tmp_path / "in" / "imported" / "final")
    assert bits(tree) == bits(learnt)
    assert metadata["hash"] == original
    assert (metadata["stage"], metadata["parent"]) == ("imported", None)
    assert metadata["exported"]["hash"] == METADATA["hash"]
    config = checkpoint_config(tmp_path / "in" / "imported" / "final")
    assert config.init.llm == str((tmp_path / "in" / "llm").resolve())
    assert backbones(config) == backbones(demo.config)
    assert metadata["weights"] == assemble(config).weights


def test_a_merged_model_comes_back_to_the_bit(demo, learnt, merged, tmp_path):
    import_exported(merged, tmp_path / "in")
    tree, _, _ = load_tree(tmp_path / "in" / "imported" / "final")
    assert bits(tree) == bits({"connector": learnt["connector"]})
    found = backbones(checkpoint_config(tmp_path / "in" / "imported" / "final"))
    original = backbones(demo.config)
    exported = bits({"llm": load_qwen2(merged / "llm")[1]})
    assert {path for path in found if found[path] != original[path]} == {
        path for path in original if path.startswith("llm/layers/") and path.endswith("kernel")
    }
    assert {path: found[path] for path in exported} == exported


def test_logits_survive_the_way_there_and_back(tmp_path):
    """The whole model in JAX, before the export and after the import, with the adapter apart and merged."""
    tiny = tiny_assembly(tmp_path)
    learnt, batch = learnt_of(tiny), question(tiny)

    @functools.partial(jax.jit, static_argnums=0)
    def run(system, params, batch):
        return system.apply({"params": params}, batch, method="logits")

    def logits(checkpoint: Path) -> np.ndarray:
        model = load_model(checkpoint)
        return np.asarray(run(model.assembly.system, model.params, batch))[0, batch["segment_ids"][0] > 0]

    save_tree(
        tmp_path / "final", learnt, json.loads(config_to_json(tiny.config)), {"stage": "2b", "parent": None}
    )
    expected = logits(tmp_path / "final")
    for adapter in (True, False):
        out = export_model(tiny.config, learnt, tmp_path / f"out{adapter}", adapter=adapter)
        import_exported(out, tmp_path / f"in{adapter}")
        found = logits(tmp_path / f"in{adapter}" / "imported" / "final")
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        print(
            f"logits there and back, adapter {'apart' if adapter else 'merged'}: {difference:.1e} of the scale"
        )
        # Apart: the same numbers. Merged: fp32 sums in another order.
        assert difference == 0 if adapter else difference < 1e-5


def test_training_goes_on_from_an_import(tmp_path):
    """A merged export is a base for a further stage, whose adapter begins as one that changes nothing."""
    tiny = tiny_assembly(tmp_path)
    out = export_model(tiny.config, learnt_of(tiny), tmp_path / "out", metadata=METADATA)
    import_exported(out, tmp_path / "in")
    records = write_records(tmp_path / "records", tiny.system.spec, videos=2, questions=1)
    stage = {"parent": "imported", "steps": 1, "batch_size": 2, "sources.mcq.records": records}
    changes = [f"stage.2b.{key}={value}" for key, value in stage.items()]
    config = checkpoint_config(tmp_path / "in" / "imported" / "final")
    config = apply_overrides(config, ["stages=2b", "stage.2b.sources.mcq.tasks=()", *changes])
    final = train(config, tmp_path / "in")["2b"]
    tree, _, metadata = load_tree(final)
    imported, _, origin = load_tree(tmp_path / "in" / "imported" / "final")
    assert metadata["parent"] == origin["hash"] and origin["exported"]["hash"] == METADATA["hash"]
    moved = flatten(tree)["connector/tlp/bias"] - flatten(imported)["connector/tlp/bias"]
    assert 0 < np.abs(moved).max() < 0.01
    assert np.abs(flatten(tree)["llm/layers/attn/q/lora_b"]).max() < 0.01


def question(assembly: Assembly) -> dict[str, np.ndarray]:
    spec = assembly.system.spec
    sample = {"id": "x", "conversations": [{"from": "human", "value": "At 00:01, which?"}]}
    row = assembly.builder(prompt=True).build(padded(make_media(spec, 3), spec), sample)
    return {key: value[None] for key, value in row.arrays.items()}


# Reading back


@pytest.fixture
def copied(adapted, tmp_path) -> Path:
    shutil.copytree(adapted, tmp_path / "copied")
    return tmp_path / "copied"


def test_every_changed_file_is_named(copied, tmp_path):
    names = json.loads((copied / "hashes.json").read_text())
    for name in names.keys() - {"README.md", "config.json"}:
        original = (copied / name).read_bytes()
        (copied / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ExportedError, match=rf"{name}: is not what was exported"):
            import_exported(copied, tmp_path / "in")
        (copied / name).write_bytes(original)
    read_exported(copied)
    assert not (tmp_path / "in").exists()


def test_all_faults_of_a_folder_are_told_at_once(copied):
    (copied / "llm" / "tokenizer.json").unlink()
    (copied / "llm" / "model-00001-of-00002.safetensors").write_bytes(b"")
    (copied / "vision" / "config.json").write_text("{}")
    with pytest.raises(ExportedError) as caught:
        read_exported(copied)
    for told in (
        "tokenizer.json: missing",
        "model-00001-of-00002.safetensors: is not part of the export",
        "vision/config.json: is not what was exported",
    ):
        assert told in str(caught.value)


def test_a_card_may_be_edited_and_caches_may_lie_about(copied):
    (copied / "README.md").write_text("license: mine")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copied / "__pycache__").mkdir()
    (copied / "__pycache__" / "modeling_savenvideo.cpython-311.pyc").write_bytes(b"")
    read_exported(copied)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({}, "config.json: is not what was exported"),
    ],
)
def test_another_version_is_told_before_anything_else(copied, changes, told):
    file = copied / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes | {"llm_width": 1}))
    with pytest.raises(ExportedError, match=told):
        read_exported(copied)


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", '{"/etc/passwd": "0"}', '{"../x": "0"}', '{"config.json": 1}']
)
def test_damaged_hashes_are_told(copied, content):
    (copied / "hashes.json").write_text(content)
    with pytest.raises(ExportedError, match=r"hashes\.json"):
        read_exported(copied)


def test_what_is_no_export_is_told(tmp_path):
    with pytest.raises(ExportedError, match="no such folder"):
        read_exported(tmp_path / "nowhere")
    with pytest.raises(ExportedError, match=r"config\.json: missing"):
        read_exported(tmp_path)


def rehash(folder: Path) -> None:
    """Forged consistently: what the hashes cannot find, the other checks must."""
    names = json.loads((folder / "hashes.json").read_text())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "hashes.json").write_text(json.dumps(digests))


def test_parts_that_do_not_fit_each_other_are_refused_before_anything_is_written(copied, tmp_path):
    file = copied / "adapter" / "adapter_config.json"
    original = file.read_text()
    file.write_text(json.dumps(json.loads(original) | {"lora_alpha": 999}))
    rehash(copied)
    with pytest.raises(ExportedError, match="alpha 999; avlm_config.json says 16 and 32"):
        import_exported(copied, tmp_path / "in")
    file.write_text(original)
    connector = copied / "connector" / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in safetensors_io.read_file(connector).items()}
    tensors.pop("tlp.bias")
    safetensors_io.write_file(connector, tensors)
    rehash(copied)
    with pytest.raises(WeightError, match=r"missing tensor tlp\.bias"):
        import_exported(copied, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_an_import_is_repeated_but_not_replaced(adapted, merged, tmp_path):
    out = tmp_path / "in"
    import_exported(adapted, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    import_exported(adapted, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times
    with pytest.raises(UserError, match="--overwrite replaces it"):
        import_exported(merged, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times
    import_exported(merged, out, overwrite=True)
    assert "llm" not in load_tree(out / "imported" / "final")[0]
    with pytest.raises(ExportedError, match="is the export itself"):
        import_exported(merged, merged)
