"""A trace holds the chosen steps and no others; a start leaves a record without secrets; the plot shows a run."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.monitoring import run_record
from avlm_jax.monitoring.run_record import RUNS_FILE, git_state, record_start, redacted
from avlm_jax.monitoring.training_plot import PLOT_FILE, save_training_plot
from avlm_jax.monitoring.watch import Profiler, WatchConfig
from avlm_jax.monitoring.writer import MetricsWriter
from avlm_jax.sharding import make_mesh


def steps_in_trace(folder: Path) -> set[int]:
    """The step numbers that a trace's annotations name."""
    (file,) = folder.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    return {
        int(value)
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("train")
        for name, value in event.stats
        if name == "step_num"
    }


def run_steps(config: WatchConfig, folder: Path, first: int, last: int, enabled: bool = True) -> None:
    with Profiler(config, folder, enabled=enabled) as profiler:
        for number in range(first, last + 1):
            with profiler.step(number):
                result = jnp.ones(8) * number
            profiler.started(number, result)


@pytest.mark.parametrize(
    ("first", "expected"), [(1, {3, 4}), (4, {4}), (5, set())], ids=["fresh", "inside", "behind"]
)
def test_the_trace_holds_the_chosen_steps(tmp_path: Path, first: int, expected: set[int]) -> None:
    run_steps(WatchConfig(profile_start=3, profile_steps=2), tmp_path / "profile", first, 6)
    assert (tmp_path / "profile").exists() == bool(expected)
    if expected:
        assert steps_in_trace(tmp_path / "profile") == expected


def test_no_trace_unless_asked_for_and_none_by_other_processes(tmp_path: Path) -> None:
    run_steps(WatchConfig(), tmp_path / "a", 1, 3)
    run_steps(WatchConfig(profile_start=1), tmp_path / "b", 1, 3, enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_inside_the_window_leaves_its_trace(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        with Profiler(WatchConfig(profile_start=1, profile_steps=9), tmp_path / "profile") as profiler:
            with profiler.step(1):
                raise RuntimeError("stopped")
    assert steps_in_trace(tmp_path / "profile") == {1}


def test_steps_that_are_none_are_refused() -> None:
    for key, value in (("profile_start", -1), ("profile_steps", 0)):
        with pytest.raises(ConfigError, match=f"watch: {key} is {value}"):
            to_dataclass(WatchConfig, {key: value}, "watch")


def test_every_start_leaves_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["avlm", "train", "--config.api_key=1234", "--seed", "3"])
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-5678")
    monkeypatch.setenv("XLA_FLAGS", "--some_flag")
    mesh = make_mesh()
    for start in (0, 8):
        record_start(tmp_path / "2a", {"seed": 7}, mesh, start=start, total=24)
    text = (tmp_path / "2a" / RUNS_FILE).read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["start"], second["start"], second["steps"]) == (0, 8, 24)
    assert first["config"] == {"seed": 7} and first["command"][-2:] == ["--seed", "3"]
    assert first["devices"] == {"kind": "cpu", "platform": "cpu", "count": jax.device_count()}
    assert first["mesh"] == {"data": jax.device_count(), "fsdp": 1, "tensor": 1} and first["processes"] == 1
    assert {"jax", "jaxlib", "flax", "python"} <= first["versions"].keys()
    assert first["environment"]["XLA_FLAGS"] == "--some_flag"
    assert "1234" not in text and "5678" not in text


def test_what_is_named_like_a_secret_is_not_written() -> None:
    command = [
        "avlm",
        "--token",
        "abc",
        "--hf_token=abc",
        "--config.text.tokenizer=weights/llm",
        "--config.a=1",
    ]
    assert redacted(command) == ["avlm", "--token", "...", "--hf_token=...", *command[4:]]


def test_the_commit_is_told_and_whether_the_code_differs_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("2\n")
    assert git_state(tmp_path)["dirty"]
    # An environment that lies inside of somebody's repository is not of that repository.
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None


def test_an_archive_knows_its_commit(tmp_path: Path) -> None:
    """As the launch scripts ship the code: the machines get no repository."""
    archive, git = tmp_path / "code.tar", ["git", "-C", str(run_record.ROOT)]
    subprocess.run([*git, "archive", "--prefix=code/", f"--output={archive}", "HEAD"], check=True)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert git_state(tmp_path / "code") == {"commit": head, "dirty": False}
    assert git_state(run_record.ROOT)["commit"] == head  # The checkout's own file holds no commit.


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(run_record.ROOT) is None


def test_the_plot_shows_what_was_logged(tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert save_training_plot(tmp_path / "1a") is None
    with MetricsWriter(tmp_path / "2a", tensorboard=False) as writer:
        for step in range(1, 9):
            writer.write_scalars(step, {"loss": 1 / step if step != 4 else float("nan"), "lr": 1e-3})
    path = save_training_plot(tmp_path / "2a")
    picture = imread(path)[..., :3]
    assert path.name == PLOT_FILE and picture.shape == (900, 1200, 3)
    left, right = picture[:300, :600], picture[:300, 600:]
    blue = (
        np.array([0x1F, 0x77, 0xB4]) / 255
    )  # matplotlib's first colour: the curve is there, where it was logged.
    assert (np.abs(left - blue).max(axis=2) < 0.02).any() and not (
        np.abs(right - blue).max(axis=2) < 0.02
    ).any()
