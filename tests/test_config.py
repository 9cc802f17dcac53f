"""Configurations: loading by path, overrides, dataclasses; and that every mistake names its remedy."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict

from avlm_jax import cli
from avlm_jax import config as config_lib
from avlm_jax.config import ConfigError, apply_overrides, load_config, parse_arg, to_dataclass

FILE = """
from ml_collections import ConfigDict
from avlm_jax.config import parse_arg

def get_config(arg):
    arg = parse_arg(arg, size="demo", layers=2, fast=False)
    return ConfigDict({
        "system": "example",
        "model": {"width": 64 if arg.size == "demo" else 3584, "layers": arg.layers, "fast": arg.fast,
                  "rate": 0.1, "name": "small", "folder": None, "shape": (2, 3)},
        "stages": ("1a", "2b"),
        "stage": {"1a": {"lr": 1e-3, "trainable": ["connector/.*"],
                         "sources": [{"records": "a", "weight": 1.0}, {"records": "b", "weight": 1.0}]},
                  "2b": {"lr": 1e-4, "sources": ({"records": "c", "weight": 1.0},)}},
    })
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "example.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def config(file: Path) -> ConfigDict:
    return load_config(str(file))


def test_arguments_choose_size_and_keep_types(file: Path) -> None:
    config = load_config(f"{file}:size=7b,layers=28,fast")
    assert (config.model.width, config.model.layers, config.model.fast) == (3584, 28, True)
    assert load_config(str(file)).model.width == 64


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("sise=7b", r"'sise'; did you mean 'size'\?"),
        ("layers=two", "'layers' is int .*'two' is str"),
        ("size=a,size=b", "given twice"),
        ("size", "needs a value"),
    ],
)
def test_bad_arguments(arg: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arg(arg, size="demo", layers=2)


def test_overrides_reach_every_kind_of_value(config: ConfigDict) -> None:
    changed = apply_overrides(
        config,
        [
            "--config.model.rate=1",
            "--config.model.name=12",
            "--config.model.fast=true",
            "--config.model.folder=weights/llm",
            "--config.model.shape=(4, 5, 6)",
            "--config.stages=2b",
            "--config.stage.1a.trainable=['llm/(a|b)', 'connector/.*']",
            "--config.stage.1a.sources.1.weight=3",
            "--config.stage.2b.sources.0.records=d",
        ],
    )
    assert changed.model.rate == 1.0 and isinstance(changed.model.rate, float)
    assert changed.model.name == "12"
    assert changed.model.fast is True
    assert changed.model.folder == "weights/llm"
    assert changed.model.shape == (4, 5, 6)
    assert changed.stages == ("2b",)
    assert list(changed.stage["1a"].trainable) == ["llm/(a|b)", "connector/.*"]
    assert [source.weight for source in changed.stage["1a"].sources] == [1.0, 3.0]
    assert changed.stage["2b"].sources[0].records == "d"


def test_overrides_leave_the_original_alone(config: ConfigDict) -> None:
    before = config_lib.config_to_json(config)
    apply_overrides(config, ["--config.stage.1a.sources.0.weight=9", "--config.model.width=1"])
    assert config_lib.config_to_json(config) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", r"unknown config key 'model.widht'; did you mean 'model.width'\?"),
        ("modle.width=3", r"unknown config key 'modle'; did you mean 'model.width'\?"),
        ("lr=1", r"did you mean 'stage.1a.lr'\?"),
        ("stage.1a.sources.0.wieght=1", r"did you mean 'stage.1a.sources.0.weight'\?"),
        ("stage.1a.sources.2.weight=1", "has 2 items"),
        ("model.width=1.5", "config.model.width is int .*'1.5' is float"),
        ("model.width=wide", "config.model.width is int .*'wide' is str"),
        ("model.rate=(1,)", "is float .* is tuple"),
        ("model.fast=7", "is bool .* is int"),
        ("model.shape=(1, 'x')", "tuple of int; 'x' .* is str"),
        ("model=3", "is a section; set one of its keys: .*width"),
        ("model.width", "cannot read the override"),
    ],
)
def test_bad_overrides_name_key_and_types(config: ConfigDict, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, [f"--config.{override}"])


def test_a_loaded_config_is_locked_down_to_sections_in_lists(config: ConfigDict) -> None:
    with pytest.raises(AttributeError):
        config.model.widht = 3
    with pytest.raises(AttributeError):
        config.stage["1a"].sources[0].wieght = 3


def test_bad_files(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"exampel.py.*did you mean '.*example.py'\?"):
        load_config(str(tmp_path / "exampel.py"))
    with pytest.raises(ConfigError, match=r"example.py: unknown config argument 'stge'"):
        load_config(f"{file}:stge=1a")
    file.write_text("def get_config(arg):\n    return {\n")
    with pytest.raises(ConfigError, match=r"example.py, line \d"):
        load_config(str(file))
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no get_config"):
        load_config(str(file))


@dataclasses.dataclass(frozen=True)
class Tower:
    width: int
    rate: float = 0.0
    pool: Literal["mean", "max"] = "mean"
    sizes: tuple[int, ...] = ()
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Tower
    right: Tower | None = None


def test_to_dataclass_builds_nested_ones_and_fits_types() -> None:
    section = ConfigDict({"left": {"width": 3, "rate": 1, "sizes": [1, 2]}, "right": None})
    assert to_dataclass(Pair, section) == Pair(Tower(3, 1.0, sizes=(1, 2)))
    assert isinstance(to_dataclass(Pair, section).left.rate, float)


@dataclasses.dataclass(frozen=True)
class Village:
    towers: dict[str, Tower]


def test_to_dataclass_builds_the_values_of_a_mapping() -> None:
    towers = {"north": {"width": 3}, "south": {"width": 4, "rate": 1}}
    assert to_dataclass(Village, ConfigDict({"towers": towers})) == Village(
        {"north": Tower(3), "south": Tower(4, 1.0)}
    )
    with pytest.raises(ConfigError, match="config.towers.south has no field 'widht'; did you mean 'width'"):
        to_dataclass(Village, ConfigDict({"towers": {"south": {"widht": 4}}}), "config")
    with pytest.raises(ConfigError, match="config.towers is tuple"):
        to_dataclass(Village, ConfigDict({"towers": ()}), "config")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"left": {"widht": 3}}, r"config.model.left has no field 'widht'; did you mean 'width'\?"),
        ({"left": {"rate": 1.0}}, "config.model.left lacks 'width'"),
        ({"left": {"width": "3"}}, "config.model.left.width is str .*int is expected"),
        ({"left": {"width": True}}, "config.model.left.width is bool .*int is expected"),
        ({"left": {"width": 1.0}}, "config.model.left.width is float .*int is expected"),
        ({"left": {"width": 3, "pool": "men"}}, r"config.model.left.pool is 'men'; did you mean 'mean'\?"),
        ({"left": {"width": 3, "sizes": (1, "2")}}, "config.model.left.sizes.1 is str"),
        ({"left": {"width": 3, "folder": 7}}, "config.model.left.folder is int"),
        ({"left": {"width": 0}}, "config.model.left: width is 0"),
        ({"left": 3}, "config.model.left is int .*section for Tower"),
    ],
)
def test_to_dataclass_names_section_and_key(section: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_dataclass(Pair, ConfigDict(section), "config.model")


def test_json_round_trip_and_hash(config: ConfigDict) -> None:
    back = config_lib.config_from_json(config_lib.config_to_json(config))
    assert config_lib.config_hash(back) == config_lib.config_hash(config)
    assert back.stage["2b"].sources[0].records == "c"
    other = apply_overrides(config, ["--config.stage.2b.lr=2e-4"])
    assert config_lib.config_hash(other) != config_lib.config_hash(config)


def test_command_line_collects_overrides_in_both_spellings(file: Path) -> None:
    parser = argparse.ArgumentParser()
    config_lib.add_config_arguments(parser)
    parser.add_argument("--workdir")
    argv = ["--config", str(file), "--config.model.width=5", "--workdir", "w", "--config.model.rate", "-2"]
    args = cli.parse_args(parser, argv)
    assert args.workdir == "w"
    config = config_lib.config_from_args(args)
    assert (config.model.width, config.model.rate) == (5, -2.0)
