"""The metrics file survives kills and continues without a seam; the console is plain off a terminal."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.monitoring import writer
from avlm_jax.monitoring.writer import Console, MetricsWriter, read_metrics
from input_pipeline.errors import UserError


def loss(step: int) -> np.float32:
    return np.float32(1) / np.float32(step + 2)


def run(directory: Path, first: int, last: int, resume_step: int | None) -> None:
    with MetricsWriter(directory, resume_step, tensorboard=False) as metrics:
        for step in range(first, last + 1):
            metrics.write_scalars(step, {"loss": loss(step)})


def test_lines_are_there_before_close_and_floats_return_exactly(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.write_scalars(1, {"loss": jnp.float32(0.1), "lr": 2e-4, "tokens": np.int64(7), "stage": "2a"})
    (line,) = read_metrics(tmp_path)
    assert line == {"step": 1, "loss": float(np.float32(0.1)), "lr": 2e-4, "tokens": 7, "stage": "2a"}
    assert np.float32(line["loss"]) == np.float32(0.1)
    metrics.close()


def test_what_is_synced_has_been_closed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted bucket takes a file when it is closed."""
    synced = []
    monkeypatch.setattr(writer.os, "fsync", lambda descriptor: synced.append(descriptor))
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        for step in (1, 2):
            before = metrics._file
            metrics.write_scalars(step, {"loss": loss(step)})
            metrics.sync()
            assert before.closed and len(synced) == step
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_killed_and_continued_trace_equals_the_undisturbed_one(tmp_path: Path) -> None:
    run(tmp_path / "undisturbed", 1, 30, None)
    run(tmp_path / "killed", 1, 27, None)
    file = tmp_path / "killed/metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 28, "lo')  # SIGKILL in the middle of a line
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, 28))
    run(tmp_path / "killed", 21, 30, 20)  # the newest checkpoint was step 20's
    assert file.read_bytes() == (tmp_path / "undisturbed/metrics.jsonl").read_bytes()


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    run(tmp_path, 1, 5, None)
    run(tmp_path, 1, 2, None)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_foreign_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        MetricsWriter(tmp_path, resume_step=1)


def test_non_finite_values_stay_valid_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True) as metrics:
        metrics.write_scalars(1, {"loss": float("nan"), "norm": np.float32("inf"), "ok": True})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": "nan", "norm": "inf", "ok": True}


def test_arrays_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        with pytest.raises(ValueError, match="shape"):
            metrics.write_scalars(1, {"loss": np.zeros(3)})


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format's writer: 12 byte header)

    with MetricsWriter(tmp_path) as metrics:
        metrics.write_scalars(3, {"loss": 0.25, "note": "text"})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content, offset, found = file.read_bytes(), 0, []
    while offset < len(content):
        length = int.from_bytes(content[offset : offset + 8], "little")
        event = event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        offset += 12 + length + 4
    assert found == [(3, "loss", 0.25)]


def test_works_without_tensorboardx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run_directory = tmp_path / "run"
    with MetricsWriter(run_directory) as metrics:
        metrics.write_scalars(1, {"loss": 1.0})
    assert [path.name for path in run_directory.iterdir()] == ["metrics.jsonl"]


def test_console_prints_plain_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(100, start_step=40, label="stage 2a", stream=stream)
    for step in range(41, 61):
        now[0] += 1.0
        console.update(step, samples=8, loss=0.5)
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stage 2a: 50/100 steps, loss 0.5000, 8.0 samples/s, 50 s left"
    assert lines[1].startswith("stage 2a: 60/100 steps") and "40 s left" in lines[1]
    assert lines[2] == "stage 2a: 60/100 steps in 20.0 s, 8.0 samples/s" and len(lines) == 3


def test_console_draws_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(4, label="stage 1a", stream=stream)
    for step in range(1, 5):
        console.update(step, samples=2, loss=1.0 / step)
    console.close()
    assert "4/4" in stream.getvalue() and "loss=0.2500" in stream.getvalue()


def test_only_the_process_that_may_writes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False, wandb="project") as metrics:
        metrics.write_scalars(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class FakeWandb(types.ModuleType):
    """What `MetricsWriter` asks of wandb; remembers it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.codes: list[int] = []

    def init(self, **settings: object) -> FakeWandb:
        self.runs.append(settings)
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    return fake


def test_wandb_gets_what_is_logged_and_goes_on_with_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    stage = tmp_path / "mine" / "2a"
    for resume_step, step in ((None, 1), (1, 2), (None, 1)):
        with MetricsWriter(stage, resume_step, wandb="videos", config={"seed": 1}) as metrics:
            metrics.write_scalars(step, {"loss": np.float32(0.5)})
    assert wandb.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), (1, {"loss": 0.5})]
    first, continued, afresh = wandb.runs
    assert first["id"] == continued["id"] != afresh["id"] and continued["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("videos", "mine/2a", {"seed": 1})
    assert wandb.codes == [0, 0, 0]


def test_wandb_is_told_of_a_failed_run(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(RuntimeError), MetricsWriter(tmp_path, wandb="videos"):
        raise RuntimeError
    assert wandb.codes == [1]


def test_wandb_that_cannot_work_is_told_before_anything_is_written(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="WANDB_API_KEY.*WANDB_MODE=offline"):
        MetricsWriter(tmp_path / "run", wandb="videos")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.watch.wandb is 'videos'.*avlm_jax\[wandb\]"):
        MetricsWriter(tmp_path / "run", wandb="videos")
    assert list(tmp_path.iterdir()) == [] and wandb.runs == []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    MetricsWriter(tmp_path / "run", wandb="videos").close()
    assert len(wandb.runs) == 1
