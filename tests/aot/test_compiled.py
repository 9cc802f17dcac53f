"""What is compiled for a stage on a slice, and what comes of a refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from avlm_jax.aot import compiled
from avlm_jax.aot.compiled import out_of_memory, prepare, read_program, write_program
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.config import ConfigError, apply_overrides
from tests.aot import stand_in
from tests.tiny_system import tiny_config

ONE = parse_slice("v5e:1x1")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    stand_in.use_cpu(monkeypatch)
    return tiny_config(Path("no/such/tokenizer"))


def test_nothing_is_read_from_disk(config: ConfigDict) -> None:
    """The tokenizer's folder does not exist, nor do the records."""
    setup = prepare(config, "2a", ONE)
    assert (setup.rows, setup.micro_batches, setup.length) == (16, 1, 120)
    assert setup.inputs.batch["tokens"].shape == (16, 120)
    assert setup.system.media_token_id >= config.model.llm.vocab_size


def test_rows_per_device_make_micro_batches(config: ConfigDict) -> None:
    setup = prepare(config, "2a", ONE, rows=4, length=200)
    assert (setup.rows, setup.micro_batches) == (4, 4)
    assert setup.inputs.batch["tokens"].shape == (4, 200)


def test_an_option_leaves_the_configuration_alone(config: ConfigDict) -> None:
    setup = prepare(config, "2a", ONE, remat="full")
    assert setup.system.llm_config.remat == "full"
    assert config.model.llm.remat == "none"


def test_modalities_are_those_of_the_sources(config: ConfigDict) -> None:
    setup = prepare(config, "1a", ONE)
    assert (setup.video, setup.audio) == ("pixels", "none")
    cached = prepare(apply_overrides(config, ["stage.2a.features=True"]), "2a", ONE)
    assert (cached.video, cached.audio) == ("features", "features")
    assert "frame_features" in cached.inputs.batch and "vision" not in cached.inputs.frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "3a"}, "no stage '3a'; stages: 1a, 1b"),
        ({"rows": 3}, "does not divide"),
        ({"mesh": {"fsdp": 2, "data": 1}}, "does not fit 1 devices"),
        ({"length": 8}, "media tokens"),
    ],
)
def test_what_does_not_go(config: ConfigDict, options: dict, message: str) -> None:
    name = options.pop("name", "2a")
    with pytest.raises(ConfigError, match=message):
        prepare(config, name, ONE, **options)


@pytest.mark.parametrize(
    ("message", "used", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.97G of 15.75G "
            "hbm. Exceeded hbm capacity by 6.22G.",
            21.97 * 2**30,
            15.75 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.19T) exceeds "
            "available HBM (15.75G).",
            1.19 * 2**40,
            15.75 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.", 0, 0),
    ],
)
def test_a_refusal_is_read(message: str, used: float, limit: float) -> None:
    found = out_of_memory("finish", message, 3.0)
    assert (found.used, found.limit, found.seconds) == (int(used), int(limit), 3.0)


def test_another_error_is_no_refusal() -> None:
    assert out_of_memory("finish", "INTERNAL: Mosaic failed to compile TPU kernel", 1.0) is None
    assert out_of_memory("finish", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", 1.0) is None


def test_figures_of_programs_are_kept(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepare(config, "2a", ONE, rows=1)
    made = stand_in.compile_step(setup)
    refused = out_of_memory("finish", "RESOURCE_EXHAUSTED: Used 2G of 1G hbm", 1.0)
    for program in (made, refused):
        assert read_program(json.loads(json.dumps(write_program(program)))) == program

    calls = []

    def fake(name: str, lowered: jax.stages.Lowered, setup: compiled.Setup) -> compiled.Program:
        calls.append(name)
        return dataclasses.replace(made, name=name, runs=1)

    monkeypatch.setattr(compiled, "_compile", fake)
    monkeypatch.setattr(compiled, "_compiler", lambda: "a compiler")
    first = compiled.compile_step(setup, cache=tmp_path)
    again = compiled.compile_step(setup, cache=tmp_path)
    assert first == again and calls == ["finish"]
    assert (first.name, first.runs) == ("finish", 16)
    # Another shape is another program.
    compiled.compile_step(prepare(config, "2a", ONE, rows=16), cache=tmp_path)
    assert calls == ["finish", "finish"]


@pytest.mark.parametrize("damaged", ["", "{", "null", "[]", '{"kind": "Program"}', '{"name": "finish"}'])
def test_a_damaged_file_is_said_and_made_again(
    damaged: str,
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = prepare(config, "2a", ONE, rows=1)
    made = dataclasses.replace(stand_in.compile_step(setup), runs=1)
    lowered = SimpleNamespace(as_text=lambda: "a program")
    monkeypatch.setattr(compiled, "_compile", lambda *_: made)
    monkeypatch.setattr(compiled, "_compiler", lambda: "a compiler")
    first = compiled._look_up("finish", 1, lowered, setup, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damaged)
    with caplog.at_level(logging.WARNING):
        assert compiled._look_up("finish", 1, lowered, setup, tmp_path) == first
    assert f"{file} is damaged" in caplog.text
    assert file.read_text() == whole and list(tmp_path.iterdir()) == [file]


def test_options_of_the_compiler_and_what_reads_its_text_are_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled.importlib.metadata, "version", lambda name: "1")
    marks = [compiled._compiler()]
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "--xla_something=1")
        marks.append(compiled._compiler())
    for name in ("hlo", "traffic"):
        changed = tmp_path / f"{name}.py"
        changed.write_text("# other code")
        monkeypatch.setattr(getattr(compiled, name), "__file__", str(changed))
        marks.append(compiled._compiler())
    assert len(set(marks)) == 5


def test_the_peak_is_that_of_the_devices_memory() -> None:
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    memory = SimpleNamespace(
        **{f"{name}_size_in_bytes": 1 for name in sizes}, peak_memory_in_bytes=10, host_temp_size_in_bytes=7
    )
    text = "ENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n"
    program = SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: text)
    setup = SimpleNamespace(mesh=SimpleNamespace(size=1), slice_=SimpleNamespace(count=1))
    found = compiled._compile("finish", SimpleNamespace(compile=lambda: program), setup)
    assert (found.peak, found.temporaries) == (3, 1)
