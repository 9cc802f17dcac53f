"""A run that is killed at any time ends as one left alone, and never loses more than config.max_lost_steps."""

from __future__ import annotations

import random
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.killed_training import (
    STAGE,
    Recipe,
    Trained,
    begun_steps,
    complete_steps,
    reached,
)

STEPS, SAVE_EVERY = 60, 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.make(tmp_path_factory.mktemp("recipe"), STEPS, 2 * SAVE_EVERY)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = recipe.finish(tmp_path_factory.mktemp("undisturbed") / "run")
    assert [line["step"] for line in trained.metrics] == list(range(1, STEPS + 1))
    return trained


def kill_at_steps(recipe: Recipe, workdir: Path, count: int, seed: int) -> list[int]:
    """Kills the run `count` times, each time after some random step has been reached that was not before."""
    goals = sorted(random.Random(seed).sample(range(reached(workdir) + 1, STEPS - SAVE_EVERY), count))
    return [recipe.kill(workdir, lambda goal=goal: reached(workdir) >= goal) for goal in goals]


def kill_inside_a_save(recipe: Recipe, workdir: Path) -> None:
    """The run is killed while a checkpoint is half written, in whichever start that succeeds."""
    for _ in range(5):
        recipe.kill(workdir, lambda: bool(begun_steps(workdir) and complete_steps(workdir)))
        if begun_steps(workdir):
            return
    raise AssertionError("no kill fell into a save")


@pytest.mark.e2e
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_steps_and_inside_a_save_ends_as_if_it_had_not(
    recipe: Recipe, undisturbed: Trained, tmp_path: Path, kills: int
) -> None:
    assert_kills_leave_no_trace(recipe, undisturbed, tmp_path / "run", kills)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_run_of_micro_batches_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = Recipe.make(tmp_path, STEPS, 2 * SAVE_EVERY, f"stage.{STAGE}.rows_per_device=1")
    assert_kills_leave_no_trace(recipe, recipe.finish(tmp_path / "undisturbed"), tmp_path / "run", kills=1)


@pytest.mark.e2e
@pytest.mark.multidevice
@pytest.mark.slow
def test_a_killed_run_of_two_processes_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """One of the two is killed; the other ends as well."""
    recipe = Recipe.make(tmp_path, STEPS, 2 * SAVE_EVERY, processes=2)
    assert_kills_leave_no_trace(recipe, recipe.finish(tmp_path / "undisturbed"), tmp_path / "run", kills=1)


def assert_kills_leave_no_trace(recipe: Recipe, undisturbed: Trained, workdir: Path, kills: int) -> None:
    kill_inside_a_save(recipe, workdir)
    steps = kill_at_steps(recipe, workdir, kills, seed=kills)
    assert not (workdir / STAGE / "final").exists()
    trained = recipe.finish(workdir)
    print(f"killed inside a save and at steps {steps}; continued at steps {recipe.resumed_at(workdir)}")
    assert recipe.resumed_at(workdir), recipe.printed(workdir)
    assert trained.leaves == undisturbed.leaves
    assert trained.data == undisturbed.data
    assert trained.metrics == undisturbed.metrics
    assert trained.files == undisturbed.files
    assert not begun_steps(workdir)  # What the killed ones left is gone.


@pytest.mark.e2e
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_time_loses_at_most_max_lost_steps(tmp_path: Path, kills: int) -> None:
    """Every second kill falls into a save. What is being saved at a kill is lost, and never what was saved before."""
    max_lost = 20 if kills < 10 else 50
    recipe = Recipe.make(tmp_path, 100_000, max_lost)
    workdir, rng = tmp_path / "run", random.Random(kills)
    lost, inside, expected = [], 0, []
    for kill in range(kills + 1):  # The last one shows where the one before it was continued.
        into_save, goal = (
            kill % 2 == 0,
            max(complete_steps(workdir), default=0) + rng.randint(1, 4 * max_lost),
        )
        step = recipe.kill(
            workdir,
            lambda: reached(workdir) >= goal and (not into_save or bool(begun_steps(workdir))),  # noqa: B023
            delay=rng.uniform(0, 0.05 if into_save else 0.5),
        )
        complete, begun = complete_steps(workdir), begun_steps(workdir)
        newest = max(complete, default=0)
        if kill < kills:
            inside += bool(begun)
            lost.append(step - newest)
            expected += [newest] if newest else []
            assert step - newest <= max_lost
            # Nothing is begun before the save before it is complete.
            assert newest >= max(begun, default=newest) - max_lost // 2
    assert recipe.resumed_at(workdir) == expected
    assert not list((workdir / STAGE / "checkpoints").glob("quarantine/*"))
    print(
        f"{kills} kills, {inside} inside a save; all continued at the newest complete checkpoint, {expected}"
    )
    print(f"steps lost, of at most {max_lost}: {lost}")


def refusal(recipe: Recipe, workdir: Path) -> str:
    """The one line that tells why the run ended; Orbax's threads may still complain after it."""
    (line,) = [text for text in recipe.printed(workdir).splitlines() if text.startswith("avlm train: ")]
    return line


def told_by_a_full_disk(recipe: Recipe, workdir: Path, **options) -> str:
    """Why a run ends that has no room to write; its complete steps stay."""
    before = complete_steps(workdir)
    assert recipe.start(workdir, **options).wait() == [2]
    after = complete_steps(workdir)
    assert after and after[: len(before)] == before and not (workdir / STAGE / "final").exists()
    return refusal(recipe, workdir)


def of_the_save(workdir: Path, reason: str) -> str:
    """A pattern for what a save tells that failed for want of room."""
    after, folder = complete_steps(workdir), re.escape(str(workdir / STAGE / "checkpoints"))
    told = rf"avlm train: saving step {after[-1] + SAVE_EVERY} to {folder} failed .*{reason}"
    return rf"{told}.*complete steps on disk: {re.escape(str(after))}; the disk at .* GiB free\. Check free space"


def kill_after_two_checkpoints(recipe: Recipe, workdir: Path) -> None:
    recipe.kill(workdir, lambda: len(complete_steps(workdir)) >= 2)


@pytest.mark.e2e
def test_a_save_that_does_not_fit_ends_the_run_and_spoils_nothing(
    recipe: Recipe, undisturbed: Trained, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the full disk: it needs no rights and fails where one would."""
    workdir, limit = tmp_path / "run", 2**15
    kill_after_two_checkpoints(recipe, workdir)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    told = told_by_a_full_disk(recipe, workdir, preexec_fn=limited)
    assert re.match(of_the_save(workdir, "File too large"), told)
    trained = recipe.finish(workdir)
    assert (trained.leaves, trained.files) == (undisturbed.leaves, undisturbed.files)
    assert not begun_steps(workdir)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_spoils_nothing(
    recipe: Recipe, undisturbed: Trained, tmp_path: Path
) -> None:
    disk, free = tmp_path / "disk", 2**16
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        workdir = disk / "run"
        kill_after_two_checkpoints(recipe, workdir)
        filler = disk / "filler"
        with filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - free))
        told = told_by_a_full_disk(recipe, workdir)
        # Who writes first finds it full: the metrics, or a save.
        of_metrics = (
            rf"avlm train: no space left on the disk while writing {workdir / STAGE}.*; make some, then start"
        )
        assert re.match(f"{of_the_save(workdir, 'No space left on device')}|{of_metrics}", told), told
        filler.unlink()
        trained = recipe.finish(workdir)
        assert (trained.leaves, trained.files) == (undisturbed.leaves, undisturbed.files)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
