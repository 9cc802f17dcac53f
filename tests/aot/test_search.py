"""Reports, the search for the best combination, and the table for the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from avlm_jax.aot import search as searching
from avlm_jax.aot import slices
from avlm_jax.aot.compiled import prepare
from avlm_jax.aot.report import format_report, make_report
from avlm_jax.aot.search import best, candidates, format_trials, search
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.chips import GIB
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
    # What the loop has placed ahead: config.loader.prefetch batches and what waits for the device.
    assert memory.parts["waiting"] == memory.parts["batch"] * (config.loader.prefetch + 1)
    assert report.donated
    assert report.to_dict()["collectives"][0]["count"] == 28 * 4
    low, high = report.hours(16 * 3600)
    assert low == pytest.approx(report.time.fastest) and high == pytest.approx(report.time.slowest)
    text = format_report(report, samples=1000)
    assert "fits, " in text and "28" not in text.splitlines()[0] and "1,000 samples" in text


def test_one_micro_batch_needs_no_gradients_between(config: ConfigDict) -> None:
    setup = prepare(config, "2a", parse_slice("v5p:1x1x1"), rows=0)
    report = make_report(setup, stand_in.compile_step(setup))
    assert report.memory.parts["gradients"] == 0 and len(report.programs) == 1


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
    tight = [type(p)(**{**vars(p), "temporaries": p.temporaries + spare + waiting // 2}) for p in program]
    assert not make_report(setup, tight).memory.fits


def test_candidates() -> None:
    assert candidates(8) == (1, 2, 4, 8)
    assert candidates(12) == (1, 2, 4, 12)
    assert candidates(1) == (1,)


def test_more_rows_are_not_tried_once_they_did_not_fit(config: ConfigDict) -> None:
    trials = search(config, "2a", ONE)
    tried = [(trial.remat, trial.rows, trial.fits) for trial in trials]
    assert tried == [
        *(("full", 1, True), ("full", 2, True), ("full", 4, True), ("full", 8, False)),
        *(("offload", 1, True), ("offload", 2, True), ("offload", 4, True)),
        *(("minimal", 1, True), ("minimal", 2, True), ("minimal", 4, False)),
        *(("none", 1, True), ("none", 2, False)),
    ]
    chosen = best(trials)
    assert chosen.fits
    assert chosen.report.time.slowest == min(t.report.time.slowest for t in trials if t.fits)
    table = format_trials(trials)
    assert table.count("<- best") == 1 and table.count("does not fit") == 3


def test_nothing_fits(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "PER_ROW", dict.fromkeys(stand_in.PER_ROW, 20 * GIB))
    trials = search(config, "2a", ONE)
    assert [(trial.remat, trial.rows) for trial in trials] == [("full", 1)]
    assert best(trials) is None and "best" not in format_trials(trials)


def test_the_table(config: ConfigDict, tmp_path: Path) -> None:
    file = slices.write_table(
        config, "c.py:size=7b", tmp_path / "launch" / "SLICES.md", None, slices=("v5e:1x1", "v6e:1x1")
    )
    text = file.read_text()
    assert text.count("## Stage") == 4
    rows = [line for line in text.splitlines() if line.startswith(("| v5e", "| v6e"))]
    assert len(rows) == 8 and all(row.count("|") == 12 for row in rows)
    assert "avlm preflight --config c.py:size=7b --table" in text
    assert [row.split("|")[3].strip() for row in rows[:2]] == ["4", "4"]
    assert list(file.parent.iterdir()) == [file]
