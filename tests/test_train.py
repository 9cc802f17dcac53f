"""The loop: it learns, hands stages on, and a run that was stopped in any way ends as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from avlm_jax import cli, lineage, train
from avlm_jax.assembly import assemble, check_weights
from avlm_jax.backbones.make import hf_config
from avlm_jax.checkpoints.stage_result import CONFIG_FILE, TREE_FILE, load_tree
from avlm_jax.config import ConfigError, config_from_json, config_to_json, load_config, to_dataclass
from avlm_jax.generate import load_model
from avlm_jax.lineage import check_same_config, load_parent
from avlm_jax.lora import is_lora, merge_kernel, retire, retired_updates
from avlm_jax.monitoring.meter import TIMED
from avlm_jax.monitoring.run_record import RUNS_FILE
from avlm_jax.monitoring.training_plot import PLOT_FILE
from avlm_jax.monitoring.writer import METRICS_FILE, read_metrics
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights.qwen2 import load_qwen2, save_qwen2
from input_pipeline.conversation import load_tokenizer
from input_pipeline.errors import UserError
from tests.tiny_system import CONFIG, SIZES, random_params, save_tokenizer, tiny_config, write_records

STEPS = {"1a": 3, "2b": 24}
SOURCE = {"1a": "visual_caption", "2b": "mcq"}
SAVE_EVERY = 8
SAMPLES, BATCH = 3, 2  # Which samples a batch holds depends on the position in the data.
# Two stages of the recipe. 2b is kept from the visual part here, so that its result shows what 1a had learnt;
# dropout makes it draw random numbers, which a continued run must draw again.
CHAIN = (
    "stages=1a,2b",
    "stage.1a.max_length=0",
    "stage.2b.max_length=0",
    "stage.2b.parent=1a",
    "stage.2b.trainable=('connector/audio_mlp/.*', 'llm/.*/lora_[ab]')",
    "stage.2b.optim.lr=0.01",
    "model.llm.lora.dropout=0.1",
    "log_every=1",
    f"max_lost_steps={2 * SAVE_EVERY}",
    *(f"stage.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stage.{stage}.batch_size={BATCH}" for stage in STEPS),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """An undisturbed run of both stages and the command it was made by."""

    workdir: Path
    tokenizer: Path
    overrides: tuple[str, ...]

    def command(self, workdir: Path, *more: str, arguments: str = "") -> list[str]:
        """`avlm` arguments; `more` are further overrides, `arguments` stand behind the configuration's name."""
        overrides = [f"--config.{override}" for override in (*self.overrides, *more)]
        return ["train", "--config", f"{CONFIG}:size=demo{arguments}", "--workdir", str(workdir), *overrides]

    def workdir_with_first_stage(self, folder: Path) -> Path:
        """A working directory as it is when stage 1a has just been finished."""
        shutil.copytree(self.workdir / "1a", folder / "1a")
        return folder

    def assert_ended_alike(self, workdir: Path) -> None:
        expected, found = (
            [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(path)]
            for path in (self.workdir / "2b", workdir / "2b")
        )
        assert found == expected
        for name in (f"final/{TREE_FILE}", "final/config.json", "final/metadata.json"):
            expected, found = ((folder / "2b" / name).read_bytes() for folder in (self.workdir, workdir))
            assert found == expected, f"{name} differs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("train")
    tokenizer = save_tokenizer(place / "tokenizer")
    assembly = assemble(tiny_config(tokenizer))
    records = write_records(place / "records", assembly.system.spec, videos=SAMPLES, questions=1)
    sources = [
        f"stage.{stage}.sources.{SOURCE[stage]}.{key}"
        for stage in STEPS
        for key in (f"records={records}", "tasks=()")
    ]
    # A fresh language model says everything with the same probability, and adapters alone do not change that.
    llm = {
        path: leaf for path, leaf in flatten(random_params(assembly)["llm"]).items() if "lora_" not in path
    }
    save_qwen2(place / "llm", hf_config(assembly.system.llm_config, assembly.tokenizer), unflatten(llm))
    folders = (f"text.tokenizer={tokenizer}", f"init.llm={place / 'llm'}")
    run = Run(place / "undisturbed", tokenizer, (*SIZES, *folders, *CHAIN, *sources))
    assert cli.main(run.command(run.workdir)) == 0
    return run


def override_of(run: Run, key: str) -> Path:
    return Path(dict(override.split("=", 1) for override in run.overrides)[key])


def config_arguments(command: list[str]) -> tuple[str, list[str]]:
    """What `load_config` takes, out of a command line."""
    return command[command.index("--config") + 1], [word for word in command if word.startswith("--config.")]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], Any]], None]:
    """(step, change) -> from now on the batch of that step is what `change` makes of it."""

    def install(step: int, change: Callable[[Any], Any]) -> None:  # May be called for several steps.
        put_batch, asked = train.put_batch, iter(range(1, 1000))

        def put(batch: Any, mesh: Any) -> Any:
            return put_batch(change(batch) if next(asked) == step else batch, mesh)

        monkeypatch.setattr(train, "put_batch", put)

    return install


def saved_steps(workdir: Path) -> list[int]:
    return sorted(
        int(path.name) for path in (workdir / "2b" / "checkpoints").iterdir() if path.name.isdigit()
    )


def test_sources_are_reached_by_their_names() -> None:
    overrides = [
        "stage.2a.sources.vggsound.weight=0.5",
        "stage.2a.buckets=512,1024",
        "stage.2a.oversize=leave_out",
    ]
    config = load_config(f"{CONFIG}:size=7b", overrides)
    for form in (config, config_from_json(config_to_json(config))):
        stage = to_dataclass(train.StageConfig, form.stage["2a"])
        weights = {name: source.weight for name, source in stage.sources.items()}
        assert weights == {"internvid": 1.0, "vggsound": 0.5, "videoinstruct": 1.0}
        assert (stage.buckets, stage.pack, stage.oversize) == ((512, 1024), 1, "leave_out")
    with pytest.raises(ConfigError, match="did you mean 'stage.2a.sources.vggsound.weight'"):
        load_config(f"{CONFIG}:size=7b", ["stage.2a.sources.vgsound.weight=0.5"])


def test_every_step_is_in_the_trace(run: Run) -> None:
    for stage, steps in STEPS.items():
        lines = read_metrics(run.workdir / stage)
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        for line in lines:
            values = {"step", "loss", "accuracy", "targets", "tokens", "grad_norm", "skipped", "lr"}
            assert line.keys() - TIMED == values | {f"samples/{SOURCE[stage]}"}
            assert line[f"samples/{SOURCE[stage]}"] == BATCH and 0 <= line["data_wait"] <= 1
            assert (
                BATCH * 60 < line["tokens"] < BATCH * 160
                and line["positions_per_s"] > line["tokens_per_s"] > 0
            )
            assert line["memory_gib"] > 0 and "mfu" not in line  # The peak of a CPU is not known.
            assert np.isfinite(line["loss"]) and line["grad_norm"] > 0 and 0 <= line["accuracy"] <= 1
    assert (
        lines[0]["lr"] == pytest.approx(0.01) and lines[-1]["lr"] < 0.0001
    )  # One step of warm-up, then cosine.
    # Per row "b (B)", the end of the turn and a line's end, one token per byte.
    assert {line["targets"] for line in lines} == {BATCH * (len("b (B)") + 2)}


def test_the_loss_falls_on_what_is_seen_again_and_again(run: Run) -> None:
    losses = [line["loss"] for line in read_metrics(run.workdir / "2b")]
    assert np.mean(losses[-3:]) < 0.3 * losses[0]


def test_a_stage_publishes_all_that_was_learnt_and_its_lineage(run: Run) -> None:
    (first, first_config, first_meta), (last, last_config, last_meta) = (
        load_tree(run.workdir / stage / "final") for stage in STEPS
    )
    first, last = flatten(first), flatten(last)
    assert {path.split("/")[1] for path in first} == {"visual_mlp", "tlp", "resampler"}
    learnt = set(last) - set(first)
    assert {path.split("/")[1] for path in learnt} == {"audio_mlp", "layers"}
    assert all(path.startswith("connector/audio_mlp/") or "/lora_" in path for path in learnt)
    for path, value in first.items():  # What 1a learnt and 2b left alone is there, to the last bit.
        np.testing.assert_array_equal(last[path], value, err_msg=path)
    assert any(
        np.any(value) for path, value in last.items() if path.endswith("lora_b")
    )  # They began at zero.
    assert first_meta["parent"] is None and last_meta["parent"] == first_meta["hash"] != last_meta["hash"]
    assert (first_meta["stage"], last_meta["stage"]) == ("1a", "2b")
    assert last_meta["data"]["mcq"]["samples"] == last_meta["data"]["mcq"]["per_epoch"] == SAMPLES
    assert last_meta["steps"] == STEPS["2b"] and {"jax", "flax", "avlm_jax"} <= set(last_meta["versions"])
    assert first_config == last_config and last_config["stage"]["2b"]["optim"]["lr"] == 0.01


def test_a_stage_begins_from_its_parents_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    split = train.split

    def stop(params: Any, patterns: Any) -> Any:
        if isinstance(next(iter(flatten(params).values())), jax.ShapeDtypeStruct):
            return split(params, patterns)
        raise Begun(params)

    workdir = run.workdir_with_first_stage(tmp_path)
    monkeypatch.setattr(train, "split", stop)
    with pytest.raises(Begun) as begun:
        cli.main(run.command(workdir))
    begins = flatten(begun.value.args[0])
    for path, value in flatten(load_tree(run.workdir / "1a" / "final")[0]).items():
        np.testing.assert_array_equal(begins[path], value, err_msg=path)


def test_a_stage_can_merge_the_adapter_and_begin_with_a_fresh_one(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.workdir / "2b", tmp_path / "2b")
    source = override_of(run, "stage.2b.sources.mcq.records")
    names = ("av_caption", "av_pairs", "open_qa")
    sources = [
        f"stage.2a.sources.{name}.{key}" for name in names for key in (f"records={source}", "tasks=()")
    ]
    settings = ("stages=2a", "stage.2a.parent=2b", "stage.2a.steps=2", "stage.2a.batch_size=2")
    command = run.command(tmp_path, *settings, "stage.2a.fresh_lora=True", "stage.2a.max_length=0", *sources)
    assert cli.main(command) == 0
    before, config, _ = load_tree(tmp_path / "2b" / "final")
    after, _, _ = load_tree(tmp_path / "2a" / "final")
    old, new = flatten(before), flatten(after)
    adapters = {path for path in old if is_lora(path)}
    assert adapters and {path for path in new if path.startswith("merged/")} == {
        f"merged/0/{p}" for p in adapters
    }
    assembly = assemble(config_from_json(json.dumps(config)))
    lora = assembly.config.model.llm.lora
    for path in adapters:
        scale = np.float32(lora.alpha / lora.rank if path.endswith("lora_b") else 1)
        np.testing.assert_array_equal(new[f"merged/0/{path}"], old[path] * scale)
        assert np.any(new[path] != old[path])
    base, released = flatten(assembly.parameters(after)[0]), flatten(assembly.parameters()[0])
    for path, pairs in retired_updates(new).items():
        expected = merge_kernel(np.asarray(released[path]), pairs, 1.0)
        np.testing.assert_allclose(base[path], expected, rtol=1e-6, err_msg=path)
        assert np.any(np.asarray(released[path]) != expected)


def test_a_fresh_adapter_may_have_another_rank_and_alpha(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.workdir / "2b", tmp_path / "2b")
    settings = ("stages=2a", "stage.2a.parent=2b", "stage.2a.fresh_lora=True")
    changed = ("model.llm.lora.rank=4", "model.llm.lora.alpha=1000.0")
    config = load_config(*config_arguments(run.command(tmp_path, *settings, *changed)))
    assembly = assemble(config)
    _, learnt = load_parent(assembly, "2b", tmp_path, fresh_lora=True)
    before, made_by, _ = load_tree(tmp_path / "2b" / "final")
    old, lora = flatten(before), made_by["model"]["llm"]["lora"]
    kernels, released = flatten(assembly.parameters(learnt)[0]), flatten(assembly.parameters()[0])
    layer = "llm/layers/mlp/down"
    update = [(old[f"{layer}/lora_a"], old[f"{layer}/lora_b"])]
    expected = merge_kernel(np.asarray(released[f"{layer}/kernel"]), update, lora["alpha"] / lora["rank"])
    np.testing.assert_allclose(kernels[f"{layer}/kernel"], expected, rtol=1e-5, atol=1e-6)
    assert kernels[f"{layer}/lora_a"].shape[-1] == 4
    with pytest.raises(ConfigError, match="model.llm.lora.alpha: .* 1000.0 now"):
        load_parent(assembly, "2b", tmp_path)


def test_retired_adapters_also_join_a_base_that_no_file_holds(run: Run) -> None:
    learnt = load_tree(run.workdir / "2b" / "final")[0]
    config = load_config(*config_arguments(run.command(run.workdir, "init.llm=")))
    assembly = assemble(config)
    path = "llm/layers/attn/q/kernel"
    drawn = flatten(assembly.parameters()[0])[path]
    retired = retire(learnt, 2.0)
    expected = merge_kernel(np.asarray(drawn), retired_updates(flatten(retired))[path], 1.0)
    assert np.abs(expected - drawn).max() > 1e-3
    np.testing.assert_allclose(flatten(assembly.parameters(retired)[0])[path], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def other_llm(run: Run, tmp_path: Path) -> str:
    """A folder with a language model of the same sizes and other weights."""
    hf, params, _ = load_qwen2(override_of(run, "init.llm"))
    params["norm"]["scale"][0] += 1
    save_qwen2(tmp_path / "llm", hf, params)
    return f"init.llm={tmp_path / 'llm'}"


def test_what_was_trained_on_other_weights_is_refused(run: Run, other_llm: str, tmp_path: Path) -> None:
    final = run.workdir / "2b" / "final"
    report = load_qwen2(override_of(run, "init.llm"))[2]
    weights = json.loads((final / "metadata.json").read_text())["weights"]
    assert weights.keys() == {"llm", "tokenizer"} and weights["llm"] == report.sha256
    load_model(final)
    with pytest.raises(ConfigError, match=f"other weights of llm .*{report.sha256} there"):
        load_model(final, overrides=[other_llm])
    with pytest.raises(ConfigError, match="other weights of llm .*none now"):
        load_model(final, overrides=["init.llm="])
    tokenizer = shutil.copytree(run.tokenizer, tmp_path / "tokenizer") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(ConfigError, match="other weights of tokenizer"):
        load_model(final, overrides=[f"text.tokenizer={tokenizer.parent}"])
    check_weights(None, weights, final)  # Of an older version: nothing is known.


def test_no_stage_begins_or_is_skipped_on_other_weights(
    run: Run, other_llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = run.workdir_with_first_stage(tmp_path / "run")
    for stages in ("stages=2b", "stages=1a"):
        assert cli.main(run.command(workdir, stages, other_llm)) == 2
        assert "1a/final was trained on other weights of llm" in capsys.readouterr().err
    assert not (workdir / "2b").exists()


def test_finished_stages_are_left_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(run.workdir.rglob("*"))}
    # How often it logs does not change what a stage is.
    assert cli.main(run.command(run.workdir, "log_every=5")) == 0
    printed = capsys.readouterr().out
    assert "stage 1a: finished before" in printed and "stage 2b: finished before" in printed
    assert {path: path.stat().st_mtime_ns for path in sorted(run.workdir.rglob("*"))} == before


def test_another_configuration_in_the_same_workdir_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(run.command(run.workdir, "stage.1a.optim.lr=0.5", "model.avts.num_layers=2")) == 2
    error = capsys.readouterr().err
    assert "stage.1a.optim.lr: 0.002 there, 0.5 now" in error
    assert "model.avts.num_layers: 1 there, 2 now" in error and "--workdir" in error


def test_a_stage_without_its_parent_names_the_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [item for item in run.command(tmp_path, arguments=",stage=2b") if "config.stages" not in item]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "begins from stage 1a" in error and "stage=1a" in error and str(tmp_path) in error
    with pytest.raises(ConfigError, match="no result"):
        assembly = assemble(load_config(*config_arguments(run.command(tmp_path))))
        load_parent(assembly, "1b", tmp_path)


def test_parameters_that_do_not_fit_are_told_by_their_path(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = run.workdir_with_first_stage(tmp_path)
    assert cli.main(run.command(workdir, "stages=2b", "stage.2b.trainable=('connector/audio/.*',)")) == 2
    error = capsys.readouterr().err
    assert "stage 2b: trainable pattern" in error and "nearest paths: connector/audio_mlp" in error
    assert cli.main(run.command(workdir, "stages=2b", "model.avts.d_model=16")) == 2
    error = capsys.readouterr().err
    assert "model.avts.d_model: 32 there, 16 now" in error


def test_a_run_stopped_by_an_error_continues_as_if_undisturbed(
    run: Run, tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(batch: Any) -> Any:
        raise KeyboardInterrupt

    workdir = run.workdir_with_first_stage(tmp_path)
    at_step(2 * SAVE_EVERY + 3, stop)
    # A trace of its last steps is wanted; what is watched does not change what a stage is, so it goes on without.
    watch = f"watch.profile_start={2 * SAVE_EVERY + 2}"
    assert cli.main(run.command(workdir, watch)) == cli.EXIT_INTERRUPTED
    assert saved_steps(workdir) == [SAVE_EVERY, 2 * SAVE_EVERY]
    assert not (workdir / "2b" / "final").exists()
    assert list((workdir / "2b" / "profile").rglob("*.xplane.pb"))
    # Half a stage is not continued at another rate, also where no finished stage is looked at.
    assert cli.main(run.command(workdir, "stages=2b", "stage.2b.optim.lr=0.5")) == 2
    assert "stage.2b.optim.lr: 0.01 there, 0.5 now" in capsys.readouterr().err
    assert cli.main(run.command(workdir)) == 0
    assert f"stage 2b: continues at step {2 * SAVE_EVERY} of {STEPS['2b']}" in capsys.readouterr().out
    run.assert_ended_alike(workdir)
    starts = [json.loads(line) for line in (workdir / "2b" / RUNS_FILE).read_text().splitlines()]
    assert [line["start"] for line in starts] == [0, 2 * SAVE_EVERY]
    assert [line["config"]["watch"]["profile_start"] for line in starts] == [2 * SAVE_EVERY + 2, 0]
    assert (workdir / "2b" / PLOT_FILE).stat().st_size > 10_000


def test_of_many_samples_of_a_broken_step_some_are_named(
    run: Run, tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(1, lambda batch: dict(batch, duration=batch["duration"] * np.float32("nan")))
    workdir = run.workdir_with_first_stage(tmp_path)
    assert cli.main(run.command(workdir, "stages=2b", "stage.2b.batch_size=12", "max_nonfinite=1")) == 1
    told = capsys.readouterr().err.partition("samples of that step: ")[2]
    assert told.count("-q1") == train.NAMED and " (8 of 12). It is the 1. such step in a row" in told


def test_processes_must_train_on_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lineage, "gather", lambda name, told: [told, told, told.replace("0", "1"), told])
    with pytest.raises(UserError, match="stage 1a: processes 2 would train on other data than process 0"):
        lineage.check_same_plan("1a", {"seed": 0})
    plans: list[dict] = []
    monkeypatch.setattr(lineage, "gather", lambda name, told: [told] * 4)
    lineage.check_same_plan("1a", {"seed": 0})
    monkeypatch.undo()

    def stop(name: str, plan: dict) -> None:
        plans.append({"stage": name, **plan})
        raise UserError("stopped")

    monkeypatch.setattr(train, "check_same_plan", stop)
    assert cli.main(run.command(tmp_path)) == 2
    (plan,) = plans
    assert (plan["stage"], plan["steps"], plan["batch_size"]) == ("1a", STEPS["1a"], BATCH)
    assert len(plan["fingerprint"]) == 32


def test_processes_must_see_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lineage.exists_for_all(tmp_path / "final")
    (tmp_path / "final").mkdir()
    assert lineage.exists_for_all(tmp_path / "final")
    monkeypatch.setattr(lineage, "gather", lambda name, told: [told, str(False), told])
    with pytest.raises(
        UserError, match="final is there for processes 0, 2 and not for the others; --workdir"
    ):
        lineage.exists_for_all(tmp_path / "final")


def test_rows_can_be_packed_and_batches_be_of_one_length(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 1a once more: two clips a row, then rows that are as long as their bucket."""
    options = ("stages=1a", "stage.1a.steps=0", "stage.1a.epochs=3.0")
    packed = ("stage.1a.pack=2", "stage.1a.max_length=320")
    assert cli.main(run.command(tmp_path / "packed", *options, *packed)) == 0
    printed = capsys.readouterr().out
    assert "source visual_caption: 3 samples, 3 an epoch" in printed
    assert "an epoch: 3 samples in 2 rows of 320 positions" in printed and "75.0% of 2 clips a row" in printed
    lines = read_metrics(tmp_path / "packed" / "1a")
    # Three epochs of two rows are three steps of two rows, with all nine samples.
    assert [line["samples/visual_caption"] for line in lines] == [3, 3, 3]
    assert {line["targets"] for line in lines} == {3 * (len("b (B)") + 2)}
    assert cli.main(run.command(tmp_path / "buckets", *options, "stage.1a.buckets=(64,150)")) == 0
    assert "rows of 64, 150 or 160 positions" in capsys.readouterr().out
    lines = read_metrics(tmp_path / "buckets" / "1a")
    # Nine samples in rows of two: the last step is filled up from the fourth epoch.
    assert [line["samples/visual_caption"] for line in lines] == [2] * 5
    assert cli.main(run.command(tmp_path / "both", *options, *packed, "stage.1a.buckets=64")) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.main(run.command(tmp_path / "short", *options, "stage.1a.max_length=60")) == 2
    assert "3 samples do not fit 60 tokens" in capsys.readouterr().err


def test_steps_without_a_finite_loss_are_skipped_and_too_many_end_the_run(
    run: Run, tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = run.workdir_with_first_stage(tmp_path)
    bad = SAVE_EVERY + 2
    poisoned = []

    def poison(batch: Any) -> Any:
        poisoned.append(batch["tokens"])
        return dict(batch, duration=batch["duration"] * np.float32("nan"))

    for step in (bad, bad + 2, bad + 3):
        at_step(step, poison)
    assert cli.main(run.command(workdir, "max_nonfinite=2")) == train.TrainingError.exit_code == 1
    error = capsys.readouterr().err
    # Sample "v1-q1" asks "At 00:01, which?1".
    texts = load_tokenizer(run.tokenizer).batch_decode(poisoned[0])
    ids = [f"v{text.partition('which?')[2][0]}-q1" for text in texts]
    first, _, third = [line for line in error.splitlines() if "stage 2b, step" in line]
    assert len(ids) == BATCH and first == (
        f"stage 2b, step {bad}: loss nan, gradient norm nan. The samples of that step: {', '.join(ids)}; skipped, 1 so far"
    )
    assert f"stage 2b, step {bad + 3}: loss nan" in third and "config.stage.2b.optim.lr" in third
    assert "It is the 2. such step in a row" in third
    assert saved_steps(workdir) == [SAVE_EVERY] and not (workdir / "2b" / "final").exists()
    lines = read_metrics(workdir / "2b")
    assert [line["step"] for line in lines] == list(range(1, bad + 4))
    assert [line["skipped"] for line in lines[bad - 2 :]] == [0, 1, 1, 2, 3]
    assert [line["loss"] == "nan" for line in lines[bad - 2 :]] == [False, True, False, True, True]
    assert cli.main(run.command(workdir)) == 0  # The next time nothing is wrong with those batches.
    run.assert_ended_alike(workdir)


@pytest.mark.parametrize("key", train.LEAST)
def test_numbers_of_the_loop_that_cannot_be_used_are_refused(
    run: Run, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = train.LEAST[key] - 1
    assert cli.main(run.command(tmp_path, f"{key}={value}")) == 2
    assert f"config.{key} is {float(value) if key.endswith('minutes') else value}" in capsys.readouterr().err


def test_it_also_saves_when_minutes_have_passed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    save = train.Checkpointer.save
    monkeypatch.setattr(
        train.Checkpointer, "save", lambda self, step, *rest: saves.append(step) or save(self, step, *rest)
    )
    workdir = run.workdir_with_first_stage(tmp_path)
    options = ("stages=2b", "stage.2b.steps=6", "max_lost_steps=100", "log_every=2", "max_lost_minutes=1e-9")
    assert cli.main(run.command(workdir, *options)) == 0
    assert saves == [2, 3, 4, 5, 6]  # From the first look at the clock on.


def test_what_does_not_change_a_result_may_be_changed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Another slice may need other micro-batches, kernels and recomputation."""
    free = (
        "model.llm.remat=full",
        "model.llm.attention_backend=reference",
        "model.vision.chunk=2",
        "loss_chunk=16",
    )
    others = ("stage.1a.rows_per_device=1", "mesh.data=1", "max_lost_minutes=1.0", "max_nonfinite=1")
    assert cli.main(run.command(run.workdir, *free, *others)) == 0
    assert capsys.readouterr().out.count("finished before") == len(STEPS)


def test_a_run_from_before_a_key_had_its_name_may_go_on(run: Run) -> None:
    made_by = json.loads((run.workdir / "1a" / "final" / CONFIG_FILE).read_text())
    config = config_from_json(json.dumps(made_by))
    for key in ("max_lost_steps", "max_lost_minutes"):
        del made_by[key]
    check_same_config(config, "1a", made_by | {"save_every": 200, "save_minutes": 10.0}, run.workdir)
    with pytest.raises(ConfigError, match="seed"):
        check_same_config(config, "1a", made_by | {"seed": config.seed + 1}, run.workdir)


def test_a_bucket_is_no_working_directory(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command = run.command(run.workdir)
    command[command.index("--workdir") + 1] = "gs://bucket/run"
    assert cli.main(command) == 2
    assert (
        "--workdir is gs://bucket/run; training writes to a folder: mount the bucket"
        in capsys.readouterr().err
    )


def test_a_skipped_step_is_counted_in_what_is_published(run: Run, tmp_path: Path, at_step: Callable) -> None:
    at_step(2, lambda batch: dict(batch, duration=batch["duration"] * np.float32("nan")))
    assert cli.main(run.command(tmp_path, "stages=1a")) == 0
    tree, _, metadata = load_tree(tmp_path / "1a" / "final")
    assert (metadata["steps"], metadata["skipped"]) == (STEPS["1a"], 1)
    assert all(np.isfinite(leaf).all() for leaf in flatten(tree).values())


# The process ends itself, so that it always ends at the same step, with the checkpoint before it half written.
KILLED = """
import os, signal, sys
from avlm_jax import cli, train
learning_rate = train.learning_rate
def rate(config, step, total):
    if step + 1 == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(config, step, total)
train.learning_rate = rate
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_continues_as_if_undisturbed(run: Run, tmp_path: Path, repository: Path) -> None:
    workdir = run.workdir_with_first_stage(tmp_path)
    code = KILLED.format(step=2 * SAVE_EVERY + 1)
    command = [sys.executable, "-c", code, *run.command(workdir)]
    killed = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = [json.loads(line) for line in (workdir / "2b" / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2 * SAVE_EVERY + 1))
    assert not (workdir / "2b" / "final").exists()
    assert cli.main(run.command(workdir)) == 0
    run.assert_ended_alike(workdir)
