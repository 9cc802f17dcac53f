"""Reports, the search for the best combination, and the table for the documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from avlm_jax.aot import search as searching
from avlm_jax.aot import slices
from avlm_jax.aot.compiled import OutOfMemory, Program, Setup, prepare
from avlm_jax.aot.report import Report, format_report, make_report
from avlm_jax.aot.search import best, candidates, format_trials, search
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.chips import GIB
from avlm_jax.config import apply_overrides
from avlm_jax.step import IN_FLIGHT
from tests.aot import stand_in
from tests.tiny_system import tiny_config

ONE = parse_slice("v5e:1x1")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    stand_in.use_cpu(monkeypatch)
    monkeypatch.setattr(searching, "compile_step", stand_in.compile_step)
    monkeypatch.setattr(slices, "compile_step", stand_in.compile_step)
    return tiny_config(Path("none"), "model.llm.remat=full")


def test_a_report_says_where_memory_goes(config: ConfigDict) -> None:
    setup = prepare(config, "2a", ONE, rows=4)
    report = make_report(setup, stand_in.compile_step(setup))
    memory = report.memory
    assert memory.fits and memory.needed == sum(memory.parts.values())
    assert memory.parts["optimizer"] >= 2 * memory.parts["trainable"] > 0
    assert memory.parts["gradients"] >= memory.parts["trainable"]
    assert memory.parts["temporaries"] == 8 * GIB
    # What the loop has placed ahead: config.loader.prefetch batches, and those of programs that wait for the device.
    assert memory.parts["waiting"] == memory.parts["batch"] * (config.loader.prefetch + IN_FLIGHT)
    assert report.donated
    assert report.to_dict()["collectives"][0]["count"] == 28 * 4
    low, high = report.hours(16 * 3600)
    assert low == pytest.approx(report.time.fastest) and high == pytest.approx(report.time.slowest)
    text = format_report(report, samples=1000)
    assert "fits, " in text and "28" not in text.splitlines()[0] and "1,000 samples" in text


def test_one_micro_batch_needs_no_gradients_between(config: ConfigDict) -> None:
    setup = prepare(config, "2a", parse_slice("v5p:1x1x1"), rows=0)
    report = make_report(setup, stand_in.compile_step(setup))
    assert report.memory.parts["gradients"] == 0 and report.program.runs == 1


def test_what_xla_refuses_does_not_fit(config: ConfigDict) -> None:
    setup = prepare(config, "2a", ONE, rows=16)
    report = make_report(setup, stand_in.compile_step(setup))
    assert not report.memory.fits and report.memory.needed >= 32 * GIB
    assert report.time is None and report.hours(100) == (0.0, 0.0) and report.donated is None
    text = format_report(report)
    assert "DOES NOT FIT: 16.2" in text and "XLA refused finish" in text
    found = report.to_dict()
    assert found["fits"] is False and "seconds" not in found


def test_a_batch_that_waits_counts(config: ConfigDict) -> None:
    """XLA knows of one batch; the loop has more of them on the device."""
    setup = prepare(config, "2a", ONE, rows=4)
    program = stand_in.compile_step(setup)
    report = make_report(setup, program)
    spare = report.memory.headroom
    waiting = report.memory.parts["waiting"]
    tight = dataclasses.replace(program, temporaries=program.temporaries + spare + waiting // 2)
    assert not make_report(setup, tight).memory.fits


def test_candidates() -> None:
    assert candidates(8) == (1, 2, 4, 8)
    assert candidates(12) == (1, 2, 4, 12)
    assert candidates(1) == (1,)


def test_more_rows_are_not_tried_once_they_did_not_fit(config: ConfigDict) -> None:
    trials = search(config, "2a", ONE)
    tried = [(trial.remat, trial.rows, trial.fits) for trial in trials]
    assert tried == [
        *(("offload", 1, True), ("offload", 2, True), ("offload", 4, True), ("offload", 8, True)),
        ("offload", 16, False),
        *(("full", 1, True), ("full", 2, True), ("full", 4, True), ("full", 8, False)),
        *(("minimal", 1, True), ("minimal", 2, True), ("minimal", 4, False)),
        *(("none", 1, True), ("none", 2, False)),
    ]
    chosen = best(trials)
    assert chosen.fits
    others = [trial for trial in trials if trial.fits and trial.remat != "offload"]
    assert chosen.report.time.slowest == min(trial.report.time.slowest for trial in others)
    table = format_trials(trials)
    assert table.count("<- best") == 1 and table.count("does not fit") == 4


def test_offload_is_recommended_only_where_nothing_else_fits(config: ConfigDict) -> None:
    """On paper it is the fastest here: it takes the most rows, and moving to the host and back costs nothing."""
    trials = search(config, "2a", ONE)
    offload = [trial for trial in trials if trial.remat == "offload"]
    fastest = min((trial for trial in trials if trial.fits), key=lambda trial: trial.report.time.slowest)
    assert fastest.remat == "offload" and best(trials).remat != "offload"
    assert best(offload) is fastest
    assert "transfers to the host's memory (remat offload) and the latency" in format_report(fastest.report)


def test_nothing_fits(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "PER_ROW", dict.fromkeys(stand_in.PER_ROW, 20 * GIB))
    trials = search(config, "2a", ONE)
    assert [(trial.remat, trial.rows) for trial in trials] == [("offload", 1)]
    assert best(trials) is None and "best" not in format_trials(trials)


def test_the_table(config: ConfigDict, tmp_path: Path) -> None:
    config = apply_overrides(config, ["stage.1a.rows_per_device=4"])
    file = slices.write_table(
        config, "c.py:size=7b", tmp_path / "launch" / "SLICES.md", None, slices=("v5e:1x1", "v6e:1x1")
    )
    text = file.read_text()
    assert text.count("## Stage") == 4
    rows = [line for line in text.splitlines() if line.startswith(("| v5e", "| v6e"))]
    assert len(rows) == 8 and all(row.count("|") == 12 for row in rows)
    assert "avlm preflight --config c.py:size=7b --table" in text
    assert [row.split("|")[3].strip() for row in rows[:3]] == [
        "4",
        "4",
        "16",
    ]  # The recipe's; 1b's are all at once.
    assert list(file.parent.iterdir()) == [file] and "Not compiled yet" not in text
    assert "- stage 1a: FLOPs: no source of stage 1a has audio" in text
    assert "- v5e: compute: v5e attains" in text and "- v6e: memory: kernels attain" in text
    assert text.count("- FLOPs: matrix products only") == 1


def test_a_table_that_was_stopped_says_what_it_lacks(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def compile_step(setup: Setup, **options: object) -> Program | OutOfMemory:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(setup)
        return stand_in.compile_step(setup)

    monkeypatch.setattr(slices, "compile_step", compile_step)
    config = apply_overrides(config, ["stages=2a,2b"])
    with pytest.raises(KeyboardInterrupt):
        slices.write_table(config, "c.py", tmp_path / "S.md", None, slices=("v5e:1x1", "v6e:1x1"))
    text = (tmp_path / "S.md").read_text()
    assert "goes on with them: 2b on v5e:1x1, 2b on v6e:1x1." in text and text.count("## Stage") == 1


def test_the_table_names_loops_that_any_program_leaves_uncounted(config: ConfigDict) -> None:
    def report(stage: str, name: str, loops: tuple[str, ...]) -> Report:
        setup = prepare(config, stage, parse_slice(name), rows=4)
        return make_report(setup, dataclasses.replace(stand_in.compile_step(setup), unknown_loops=loops))

    places = [(stage, name) for stage in ("1b", "2a") for name in ("v5e:1x1", "v6e:1x1")]
    text = slices.format_table(
        [report(*place, ("while.7",) if place == ("2a", "v6e:1x1") else ()) for place in places], "c.py"
    )
    assert (
        "- stage 2a on v6e:1x1: loops without a known trip count, whose bodies are counted once: 1 (while.7)"
        in text
    )


def test_without_a_folder_the_table_keeps_figures_while_it_is_made(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def compile_step(setup: Setup, *, cache: Path, progress: object) -> Program | OutOfMemory:
        assert cache.is_dir()
        folders.append(cache)
        return stand_in.compile_step(setup)

    monkeypatch.setattr(slices, "compile_step", compile_step)
    slices.write_table(config, "c.py", tmp_path / "S.md", None, slices=("v5e:1x1",))
    assert len(folders) == 4 and len(set(folders)) == 1 and not folders[0].exists()
