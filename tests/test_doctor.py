"""The installation's check: what it calls a problem, and its two forms of report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from avlm_jax import cli, doctor
from input_pipeline import tfio_audio
from input_pipeline.errors import UserError

GOOD = dict.fromkeys(doctor.PACKAGES, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


@pytest.fixture(autouse=True)
def no_tfio_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: to start it takes ten seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(tfio_audio.PYTHON_VARIABLE, raising=False)


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


# tensorflow-io's environment
# -------------------------------------------------------------------------------------------------------


def test_the_tfio_environment_is_reported_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(doctor.check_tfio()) == []
    versions = {"tensorflow_io": "0.37.1", "tensorflow": "2.16.2", "python": "3.11.7"}
    monkeypatch.setattr(tfio_audio, "backend_versions", lambda python: versions)
    (tmp_path / ".venv-tfio" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-tfio" / "bin" / "python").touch()
    (check,) = doctor.check_tfio()
    assert check.status == doctor.OK and "tensorflow-io 0.37.1 with tensorflow 2.16.2" in check.value


def test_a_tfio_environment_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tfio_audio.PYTHON_VARIABLE, sys.executable)  # without TensorFlow
    (check,) = doctor.check_tfio()
    assert check.status == doctor.PROBLEM and "No module named 'tensorflow'" in check.value


@pytest.fixture
def installer(tmp_path: Path) -> Path:
    """A repository whose installer says what it was called with, makes the folder, and fails for one name."""
    folder = tmp_path / "repository" / "requirements"
    folder.mkdir(parents=True)
    (folder / "tfio-py311.txt").touch()
    (folder / "install.py").write_text(
        "import os, sys\nprint(*sys.argv[1:])\nos.makedirs(sys.argv[1])\nsys.exit('broken' in sys.argv[1])",
        encoding="utf-8",
    )
    return folder.parent


def test_the_tfio_environment_is_made_from_its_lock_file(
    installer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if sys.version_info[:2] not in doctor.TFIO_PYTHONS:
        pytest.skip("needs Python 3.11 or 3.12")
    assert doctor.make_tfio_venv("new", installer) == str(tmp_path / "new" / "bin" / "python")
    captured = capfd.readouterr()
    assert captured.out == "", "standard output is the report's"
    lock = installer / "requirements" / "tfio-py311.txt"
    assert captured.err.split() == [str(tmp_path / "new"), "--only", str(lock)]
    with pytest.raises(UserError, match="exit code 1"):
        doctor.make_tfio_venv("broken", installer)


def test_nothing_is_overwritten_and_nothing_made_without_the_lock_file(
    installer: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for name in ("photos", "photos/cat.jpg"):
        with pytest.raises(UserError, match="something else"):
            doctor.make_tfio_venv(name, installer)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    with pytest.raises(UserError, match="checkout"):
        doctor.make_tfio_venv("new", tmp_path)


def test_another_environment_is_left_alone(installer: Path, tmp_path: Path) -> None:
    other = tmp_path / ".venv"
    (other / "bin").mkdir(parents=True)
    (other / "pyvenv.cfg").touch()
    with pytest.raises(UserError, match="name a new folder"):
        doctor.make_tfio_venv(".venv", installer)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="name a new folder"):
        doctor.make_tfio_venv("dangling", installer)
    with pytest.raises(UserError, match="is empty"):
        doctor.make_tfio_venv("", installer)
    assert not doctor.may_become_tfio(other)
    (other / doctor.TFIO_MARKER).touch()  # one whose installation was broken off
    assert doctor.may_become_tfio(other)
    (other / doctor.TFIO_MARKER).unlink()
    (other / "lib" / "python3.11" / "site-packages" / "tensorflow_io").mkdir(parents=True)
    assert doctor.may_become_tfio(other)
    (tmp_path / "empty").mkdir()
    assert doctor.may_become_tfio(tmp_path / "empty") and doctor.may_become_tfio(tmp_path / "new")


def test_the_installer_itself_leaves_other_environments_alone(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / ".venv"
    other.mkdir()
    (other / "pyvenv.cfg").touch()
    command = [
        sys.executable,
        str(repository / "requirements" / "install.py"),
        str(other),
        "--only",
        "none.txt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not an environment made for none.txt" in done.stderr
    assert (other / "pyvenv.cfg").exists()
    # A new folder is marked before anything is installed, so that it can be taken up again.
    command[2] = str(tmp_path / "new")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "none.txt" in done.stderr and doctor.may_become_tfio(tmp_path / "new")


def test_an_empty_folder_name_is_not_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--make-tfio-venv", ""]) == cli.EXIT_UNUSABLE
    assert "--make-tfio-venv is empty" in capsys.readouterr().err


def test_the_core_packages_are_looked_for(repository: Path) -> None:
    assert {"apache-beam", "array_record", "simplejpeg"} <= set(doctor.PACKAGES)


def test_a_tfio_python_that_is_named_and_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tfio_audio.PYTHON_VARIABLE, "nowhere/python")
    (check,) = doctor.check_tfio()
    assert check.status == doctor.PROBLEM and "there is no Python with tensorflow-io" in check.value


def test_a_python_that_fits_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"neither python3.11 nor python3.12.*install one"):
        doctor.find_tfio_python()
    for name, script in (("python3.11", "exit 127"), ("python3.12", "echo python3.12")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert doctor.find_tfio_python() == str(tmp_path / "python3.12"), "the other does not run"


def test_the_command_line_reports_what_it_could_not_make(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("a file", encoding="utf-8")
    assert cli.main(["doctor", "--make-tfio-venv", "taken"]) == cli.EXIT_UNUSABLE
    assert "taken" in capsys.readouterr().err


def test_little_shared_memory_is_noted(monkeypatch):
    for size, level in ((64 * 2**20, doctor.NOTE), (8 * 2**30, doctor.OK)):
        monkeypatch.setattr(doctor, "shared_memory_bytes", lambda size=size: size)
        (check,) = [check for check in doctor.check_system() if check.name == "shared memory"]
        assert check.status == level and ("shm-size" in check.remedy) == (level == doctor.NOTE)
    monkeypatch.setattr(doctor, "shared_memory_bytes", lambda: None)
    assert "shared memory" not in [check.name for check in doctor.check_system()]
