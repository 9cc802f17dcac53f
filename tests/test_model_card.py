"""The export as a command: which stage it takes, and what its model card says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli
from avlm_jax.assembly import Assembly
from avlm_jax.checkpoints.stage_result import load_tree, save_tree
from avlm_jax.config import apply_overrides, config_to_json
from avlm_jax.export import export_model
from avlm_jax.weights import safetensors_io
from tests.exported_system import learnt_of, tiny_assembly


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Assembly:
    return tiny_assembly(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def workdir(tiny, tmp_path) -> Path:
    """Three finished stages, the last one evaluated."""
    tree, config = learnt_of(tiny), json.loads(config_to_json(tiny.config))
    parent = None
    for number, stage in enumerate(("1a", "1b", "2a")):
        part = tree if stage == "2a" else {"connector": learnt_of(tiny, number + 1)["connector"]}
        metadata = {"stage": stage, "parent": parent, "steps": 10 * number}
        parent = save_tree(tmp_path / "run" / stage / "final", part, config, metadata)
    report = {"model": f"savenvideo/2a/{parent[:12]}", "benchmark": "noise", "modalities": ["video", "audio"],
              "protocol": "strict", "correct": 3, "total": 4, "accuracy": 0.75, "unparsed": 1, "missing": 0}  # fmt: skip
    for name, model in (("mine", report["model"]), ("other", "savenvideo/2a/0123456789ab")):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "metrics.json").write_text(
            json.dumps(report | {"model": model, "benchmark": name})
        )
    return tmp_path / "run"


def test_the_command_exports_the_last_stage_and_tells_how_to_run_it(workdir, tmp_path, capsys):
    assert cli.main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "out"), "--adapter"]) == 0
    told = capsys.readouterr().out
    assert "adapter/" in told and f"model = SaveNVideo.from_pretrained('{tmp_path / 'out'}')" in told
    source = json.loads((tmp_path / "out" / "config.json").read_text())["source"]
    assert source["stage"] == "2a"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mine | video + audio | strict | 3 of 4 | 75.0 % | 1 | 0 |" in card and "| other |" not in card
    stages = [line.split(" | ")[0] for line in card.splitlines() if line.startswith(("| 1", "| 2"))]
    assert stages == ["| 1a", "| 1b", "| 2a"]
    assert f"| 2a | 20 | `{source['hash'][:16]}` | `{source['parent'][:16]}` |" in card
    assert cli.main(["import-weights", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "in")]) == 0
    assert load_tree(tmp_path / "in" / "imported" / "final")[2]["hash"] == source["hash"]


def test_a_stage_is_chosen_by_name(workdir, tmp_path, capsys):
    arguments = ["export", "--workdir", str(workdir), "--out", str(tmp_path / "out"), "--stage"]
    assert cli.main([*arguments, "1b"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["source"]["stage"] == "1b"
    assert "No evaluation of this stage was found" in (tmp_path / "out" / "README.md").read_text()
    assert cli.main([*arguments, "3c"]) == 2
    assert "no finished stage '3c' (finished: 1a, 1b, 2a)" in capsys.readouterr().err


def test_the_command_s_refusals(workdir, tmp_path, capsys, tiny):
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["export", "--workdir", str(tmp_path / "nowhere"), *out]) == 2
    assert "no finished stage" in capsys.readouterr().err
    run = ["export", "--workdir", str(workdir), *out]
    assert cli.main([*run, "--config.init.llm="]) == 2
    assert "config.init.llm is empty" in capsys.readouterr().err
    save_tree(workdir / "fork" / "final", learnt_of(tiny, 8), {}, {"stage": "fork", "parent": None})
    assert cli.main(run) == 2
    assert "several last stages: 2a, fork" in capsys.readouterr().err
    tensors = workdir / "2a" / "final" / "trainable.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x55")
    assert cli.main([*run, "--stage", "2a"]) == 2
    assert "copy the checkpoint again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The card


def test_sizes_stand_in_the_card(tiny, tmp_path):
    adapted = export_model(tiny.config, learnt_of(tiny), tmp_path / "out", adapter=True)
    card = (adapted / "README.md").read_text()
    stored = safetensors_io.read_folder(adapted / "llm")
    count = sum(int(np.prod(tensor.shape)) for tensor in stored.values())
    assert f"| `llm/` | {count:,} | {sum(tensor.nbytes for tensor in stored.values()):,} | float32 |" in card
    assert 'PeftModel.from_pretrained(llm, "exported/adapter")' in card
    assert card.startswith("---\n") and card.count("\n---\n") == 1


def test_licence_files_and_sources_of_the_backbones_go_along(tiny, tmp_path):
    weights = tmp_path / "weights"
    for part in ("vision", "audio", "llm"):
        shutil.copytree(tiny.config.init[part], weights / part)
    (weights / "vision" / "LICENSE").write_text("terms")
    counted = {
        "tensors": 1,
        "bytes": 4,
        "sha256": "0" * 64,
        "dtypes": [],
        "files": {},
        "ignored": {},
        "warnings": [],
    }
    sources = {"vision": "google/siglip-so400m-patch14-384@0123abc", "audio": "/data/BEATs_iter3.pt"}
    parts = {part: {"source": source, **counted} for part, source in sources.items()}
    record = {"format_version": 1, "parts": parts}
    (weights / "import.json").write_text(json.dumps(record))
    config = apply_overrides(
        tiny.config, [f"init.{part}={weights / part}" for part in ("vision", "audio", "llm")]
    )
    out = export_model(config, learnt_of(tiny), tmp_path / "out")
    assert (out / "vision" / "LICENSE").read_text() == "terms"
    card = (out / "README.md").read_text()
    assert 'base_model:\n- "google/siglip-so400m-patch14-384"\ntags:' in card
    assert "| google/siglip-so400m-patch14-384@0123abc |" in card
    assert "| BEATs_iter3.pt |" in card and "/data" not in card
    assert "| language model: media tokens and text to an answer | not recorded | not recorded |" in card
