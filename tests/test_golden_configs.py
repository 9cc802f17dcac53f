"""Every resolved configuration against a stored copy: nothing changes in a recipe unseen.

A change that is meant is written down with `python -m tests.test_golden_configs`, and read in the diff.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avlm_jax.config import config_to_json, load_config
from avlm_jax.lineage import flatten_json

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
# File of tests/golden -> configuration it is the resolved form of.
CONFIGS = {
    "savenvideo_demo.json": "configs/savenvideo.py:size=demo",
    "savenvideo_0.5b.json": "configs/savenvideo.py:size=0.5b",
    "savenvideo_1.5b.json": "configs/savenvideo.py:size=1.5b,weights=elsewhere",
    "savenvideo_7b.json": "configs/savenvideo.py:size=7b",
}
COMMAND = "python -m tests.test_golden_configs"


def resolve(name: str) -> str:
    return config_to_json(load_config(f"{ROOT}/{name}"))


def differences(stored: Any, resolved: Any) -> list[str]:
    """ "key: stored value -> resolved value" of every leaf that differs."""
    old, new = flatten_json(stored), flatten_json(resolved)
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
    ]


@pytest.mark.parametrize("file", CONFIGS)
def test_a_resolved_config_is_as_stored(file: str) -> None:
    path, resolved = GOLDEN / file, resolve(CONFIGS[file])
    assert path.is_file(), f"{path} is missing; write it with `{COMMAND}`"
    changed = differences(json.loads(path.read_text()), json.loads(resolved))
    assert not changed, f"{CONFIGS[file]} changed:\n" + "\n".join(changed) + f"\nif meant: `{COMMAND}`"
    # Also what has no leaf, like an emptied section, and the form itself.
    assert path.read_text() == resolved, f"{file} differs in form; `{COMMAND}`"


def test_every_stored_config_has_a_source() -> None:
    assert {path.name for path in GOLDEN.glob("*.json")} == set(CONFIGS)


@pytest.mark.parametrize("file", CONFIGS)
def test_a_stage_argument_changes_nothing_but_what_runs(file: str) -> None:
    whole = json.loads(resolve(CONFIGS[file]))
    for stage in whole["stages"]:
        one = json.loads(resolve(f"{CONFIGS[file]},stage={stage}"))
        assert one.pop("stages") == [stage]
        assert one == {key: value for key, value in whole.items() if key != "stages"}


def test_a_difference_is_told_by_its_key() -> None:
    stored = {"a": {"b": [1, 2]}, "gone": None}
    assert differences(stored, {"a": {"b": [1, 3]}, "new": 0}) == [
        "a.b.1: 2 -> 3",
        "gone: None -> 'absent'",
        "new: 'absent' -> 0",
    ]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, name in CONFIGS.items():
        (GOLDEN / file).write_text(resolve(name))
        print(GOLDEN / file)
