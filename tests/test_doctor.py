"""The installation's check: what it calls a problem, and its two forms of report."""

from __future__ import annotations

import json

import pytest

from avlm_jax import cli, doctor

GOOD = dict.fromkeys(doctor.PACKAGES, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


def problems(**versions: str | None) -> list[str]:
    checks = doctor.check_packages(GOOD | versions)
    return [check.name for check in checks if check.status == doctor.PROBLEM and check.remedy]


def test_this_installation_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    values = {check["name"]: check["value"] for check in report["checks"]}
    assert {"python", "jax", "ffmpeg", "codecs", "devices", "memory", "cpu cores"} <= values.keys()


def test_the_report_for_people_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 0
    assert "All is well." in capsys.readouterr().out
    monkeypatch.setattr(doctor, "OLDEST_FFMPEG", (99,))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM  ffmpeg" in out and "1 problem(s) found." in out


def test_pairs_that_do_not_fit() -> None:
    assert problems() == []
    assert problems(jax="0.12.0.1", jaxlib="0.12.0.1", flax="0.12.12") == []
    assert problems(jax="0.12.0.1", jaxlib="0.12.0.1") == ["flax pair"]
    assert problems(flax="0.12.12") == ["flax pair"]
    assert problems(jaxlib="0.10.1") == ["jax pair"]


def test_what_is_missing_or_unsafe() -> None:
    assert problems(grain=None) == ["grain"]
    assert problems(torch="2.9.1+cpu") == ["torch"]
    assert problems(torch="2.13.0") == []


@pytest.mark.parametrize(
    ("version", "expected"), [("0.12.0.1", (0, 12, 0, 1)), ("n8.1.2-3-gabc", (8, 1, 2)), ("git", ())]
)
def test_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert doctor.numbers(version) == expected
