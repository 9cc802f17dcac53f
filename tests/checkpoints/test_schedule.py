"""When checkpoints are begun, against the time and the steps that a kill may cost."""

from __future__ import annotations

import pytest

from avlm_jax.checkpoints.schedule import SaveSchedule


def saves(seconds: float, steps: int, **options: float) -> list[int]:
    """Steps that are saved in a run whose steps take so long."""
    now = 0.0
    options = {"max_lost_steps": 200, "max_lost_minutes": 10.0, "look_every": 10, "start": 0} | options
    schedule = SaveSchedule(**options, total=steps, clock=lambda: now)
    found = []
    for number in range(1 + options["start"], steps + 1):
        now += seconds
        if schedule.due(number):
            found.append(number)
            schedule.saved(number)
    return found


def test_quick_steps_are_saved_by_their_number() -> None:
    assert saves(0.1, 250) == [100, 200, 250]
    assert saves(0.1, 7, max_lost_steps=2) == [1, 2, 3, 4, 5, 6, 7]
    assert saves(0.1, 9, max_lost_steps=5, start=4) == [6, 8, 9]


@pytest.mark.parametrize("seconds", [3.3, 17.0, 53.0, 65.0, 100.0, 299.0])
def test_what_a_kill_costs_stays_within_the_minutes(seconds: float) -> None:
    """A kill costs at most two distances between saves: the one that is being written is lost as well."""
    found = saves(seconds, 300)
    distances = [later - earlier for earlier, later in zip(found, found[1:], strict=False)]
    assert found[0] <= max(10, 300 / seconds)  # Before its first look at the clock it knows no pace.
    assert 2 * max(distances) * seconds <= 600


def test_steps_longer_than_the_half_of_it_are_saved_each() -> None:
    assert saves(400.0, 15) == [10, 11, 12, 13, 14, 15]


def test_steps_that_become_slower_are_saved_more_often() -> None:
    now = 0.0
    schedule = SaveSchedule(1000, 10.0, look_every=10, start=0, total=1000, clock=lambda: now)
    found = []
    for number in range(1, 101):
        now += 5.0 if number <= 50 else 50.0
        if schedule.due(number):
            found.append((number, now))
            schedule.saved(number)
    times = [when for number, when in found if number > 60]
    assert max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) <= 300


def test_without_minutes_nobody_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avlm_jax.checkpoints.schedule.gather", None)
    assert saves(1000.0, 20, max_lost_minutes=0.0) == [20]
