"""`avlm preflight`: its options, exit codes and output; the compiler is stood in for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import avlm_jax.preflight as verb
from avlm_jax import cli
from avlm_jax.aot import compiled, search, slices, topologies
from avlm_jax.preflight import read_mesh
from tests.aot import stand_in
from tests.tiny_system import CONFIG, SIZES

TINY = ["--config", f"{CONFIG}:size=demo,stage=2a", *(f"--config.{item}" for item in SIZES)]
FULL = ["--config.model.llm.remat=full"]


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.use_cpu(monkeypatch)
    for module in (compiled, search, slices):
        monkeypatch.setattr(module, "compile_step", stand_in.compile_step)
    monkeypatch.setattr(verb, "prepare_environment", lambda: None)


def run(*options: str) -> int:
    return cli.main(["preflight", *TINY, *options])


def test_what_fits_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--topology", "v5e:1x1", "--rows-per-chip", "4", "--samples", "1000", *FULL) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage 2a on v5e:1x1 (v5litepod-1, 1 chips): mesh data 1 x fsdp 1 x tensor 1")
    assert "4 micro-batches of 4 rows a device" in out and "fits, " in out and "1,000 samples:" in out


def test_what_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--topology", "v5e:1x1", "--rows-per-chip", "16", *FULL) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--topology", "v5e:1x1", "--rows-per-chip", "4", "--json", *FULL) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    (stage,) = found["stages"]
    assert stage["stage"] == "2a" and stage["hbm"]["needed"] == sum(stage["hbm"]["parts"].values())
    assert stage["seconds"]["fastest"] <= stage["seconds"]["slowest"]
    assert "hours" not in stage


def test_json_tells_the_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--topology", "v5e:1x1", "--rows-per-chip", "4", "--json", "--samples", "57600", *FULL) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["samples"] == 57600  # An hour of steps of 16.
    assert stage["hours"] == pytest.approx([stage["seconds"][name] for name in ("fastest", "slowest")])


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--topology", "v5e:1x1", "--search", *FULL) == 0
    out = capsys.readouterr().out
    assert out.count("<- best") == 1 and "fits, " in out


def test_a_search_in_which_nothing_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "PER_ROW", dict.fromkeys(stand_in.PER_ROW, 2**36))
    assert run("--topology", "v5e:1x1", "--search", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["stages"][0]["trials"][0]["fits"] is False


def test_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICES", ("v5e:1x1",))
    assert run("--table", str(tmp_path / "S.md"), "--workdir", str(tmp_path / "w"), *FULL) == 0
    assert "| v5e:1x1 |" in (tmp_path / "S.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one of --topology SLICE"),
        (["--topology", "v5e:1x1", "--table", "x.md"], "name one of --topology SLICE"),
        (["--table", "x.md", "--search"], "leave --search away: --table takes its own slices"),
        (["--table", "x.md", "--length", "200", "--json"], "leave --length, --json away"),
        (["--table", "x.md", "--samples", "10", "--mesh", "fsdp=2"], "leave --mesh, --samples away"),
        (
            ["--table", "x.md", "--slices", "2", "--rows-per-chip", "0"],
            "leave --slices, --rows-per-chip away",
        ),
        (
            ["--topology", "v5e:1x1", "--rows-per-chip", "-4"],
            "--rows-per-chip is -4; it must be at least 1, or 0",
        ),
        (["--topology", "v7"], "cannot read the topology 'v7'"),
        (["--topology", "v5e:1x1", "--rows-per-chip", "3"], "does not divide"),
        (["--topology", "v5e:1x1", "--mesh", "fsdp=4"], "does not fit 1 devices"),
        (["--topology", "v5e:1x1", "--mesh", "model=4"], "'model=4' is not one of data=N"),
    ],
)
def test_what_is_unusable_exits_with_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "prepare_environment", topologies.prepare_environment)
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    assert run("--topology", "v5e:1x1") == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


def test_a_mesh_is_read() -> None:
    assert read_mesh("data=2,fsdp=-1") == {"data": 2, "fsdp": -1}
    for text in ("data", "data=x", "data=1,data=2", "rows=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            read_mesh(text)
