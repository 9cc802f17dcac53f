"""Where every parameter of the 7B system lies, against a stored table for each of three meshes: nothing moves unseen.

A change that is meant is written down with `python -m tests.test_golden_shardings`, and read in the diff.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from avlm_jax import sharding
from avlm_jax.assembly import Assembly
from avlm_jax.config import load_config, to_dataclass
from avlm_jax.models.api import build_system
from avlm_jax.state import Tree, flatten
from avlm_jax.step import StepInputs, abstract_inputs
from avlm_jax.train import StageConfig

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "shardings"
# File -> data, fsdp, tensor: a v5e-16, four v5p hosts of two slices, a whole v5e pod without a data axis.
MESHES = {
    "7b_fsdp16.txt": (1, 16, 1),
    "7b_data2_fsdp8_tensor4.txt": (2, 8, 4),
    "7b_fsdp256.txt": (1, 256, 1),
}
COMMAND = "python -m tests.test_golden_shardings"
# What 256 devices cannot split (1152 = 2^7 * 9, 4304 = 2^4 * 269, 12 heads): SigLIP lies whole on each of them, 0.75 GiB.
WHOLE_AT_256 = {
    "vision/layers/attn/k/kernel",
    "vision/layers/attn/o/kernel",
    "vision/layers/attn/q/kernel",
    "vision/layers/attn/v/kernel",
    "vision/layers/mlp/fc1/kernel",
    "vision/layers/mlp/fc2/kernel",
}


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return make_assembly()


def make_assembly() -> Assembly:
    """The 7B system; the tokenizer, which is not at hand, changes no parameter."""
    config = load_config(f"{ROOT}/configs/savenvideo.py:size=7b")
    return Assembly(config, None, build_system(config, media_token_id=config.model.llm.vocab_size - 1))


def inputs(assembly: Assembly, stage: str, mesh: AbstractMesh, frozen_dtype: str) -> StepInputs:
    """What the training step of a stage is given."""
    section = to_dataclass(StageConfig, assembly.config.stage[stage], stage)
    return abstract_inputs(
        assembly.abstract_params(),
        section.trainable,
        section.optim,
        mesh,
        assembly.system.spec,
        rows=512,
        length=2048,
        frozen_dtype=frozen_dtype,
    )


def moments(given: StepInputs) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Adam's two, by path."""
    adam = next(part for part in given.state.opt_state if isinstance(part, optax.ScaleByAdamState))
    return [flatten(adam.mu), flatten(adam.nu)]


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def spelled(spec: Any, rank: int) -> str:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    entries += [(None,)] * (rank - len(entries))
    return "[" + ", ".join("*".join(name or "-" for name in entry) for entry in entries) + "]"


def table(assembly: Assembly, shape: tuple[int, int, int]) -> str:
    """One line per parameter, and the sums of each stage."""
    mesh = AbstractMesh(shape, sharding.AXES)
    given = {
        (stage, dtype): inputs(assembly, stage, mesh, dtype)
        for stage in assembly.config.stages
        for dtype in ("bfloat16", "int8")
    }
    rows: dict[str, dict[str, Any]] = {}
    for (stage, dtype), step in given.items():
        for path, leaf in flatten(step.frozen).items():
            row = rows.setdefault(path, {"shape": leaf.shape, "specs": set(), "stages": [], "trained": "-"})
            row[dtype] = f"{local_bytes(leaf):,}"
            row["specs"].add(spelled(leaf.sharding.spec, len(leaf.shape)))
        for path, leaf in flatten(step.state.trainable).items():
            row = rows.setdefault(path, {"shape": leaf.shape, "specs": set(), "stages": []})
            row["trained"] = f"{local_bytes(leaf) + sum(local_bytes(tree[path]) for tree in moments(step)):,}"
            row["specs"] |= {
                spelled(x.sharding.spec, len(x.shape))
                for x in (leaf, *(tree[path] for tree in moments(step)))
            }
            if dtype == "bfloat16":
                row["stages"].append(stage)
    lines = [
        ("parameter", "shape", "split over", "frozen", "in int8", "trained", "in stages"),
        *(
            (
                path,
                str(list(row["shape"])),
                " or ".join(sorted(row["specs"])),
                row.get("bfloat16", "-"),
                row.get("int8", "-"),
                row["trained"],
                " ".join(row["stages"]),
            )
            for path, row in sorted(rows.items())
        ),
    ]
    sums = [("stage", "trained", "its moments", "frozen", "in int8"), *stage_sums(assembly, given)]
    size = " x ".join(f"{name}={count}" for name, count in zip(sharding.AXES, shape, strict=True))
    return "\n".join(
        [
            f"Parameters of size=7b on a mesh of {size} devices; written by `{COMMAND}`.",
            "Bytes of one device: frozen in bf16 or int8, trained in fp32 with both of Adam's moments, which lie as it does.",
            "",
            *aligned(lines, left=3),
            "",
            "MiB of one device",
            *aligned(sums, left=1),
            "",
        ]
    )


def stage_sums(assembly: Assembly, given: dict[tuple[str, str], StepInputs]) -> Iterator[tuple[str, ...]]:
    def mebibytes(*trees: Tree) -> str:
        return f"{sum(local_bytes(leaf) for tree in trees for leaf in jax.tree.leaves(tree)) / 2**20:,.1f}"

    for stage in assembly.config.stages:
        step = given[stage, "bfloat16"]
        yield (
            stage,
            mebibytes(step.state.trainable),
            mebibytes(*moments(step)),
            mebibytes(step.frozen),
            mebibytes(given[stage, "int8"].frozen),
        )


def aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Columns of equal width; the first `left` and the last of seven begin on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left or number == 6 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@pytest.mark.parametrize("file", MESHES)
def test_every_parameter_lies_as_stored(file: str, assembly: Assembly) -> None:
    path, found = GOLDEN / file, table(assembly, MESHES[file])
    assert path.is_file(), f"{path} is missing; write it with `{COMMAND}`"
    stored = path.read_text()
    changed = [line for line in found.splitlines() if line not in set(stored.splitlines())]
    assert stored == found, f"{file} changed:\n" + "\n".join(changed) + f"\nif meant: `{COMMAND}`"
    # One place for each, whatever the stage; also for the moments.
    assert " or " not in found.partition("\n\n")[2]


def test_every_table_has_a_mesh() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(MESHES)


@pytest.mark.parametrize("file", MESHES)
def test_rules_cover_every_parameter_and_few_cannot_be_split(
    file: str, assembly: Assembly, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = AbstractMesh(MESHES[file], sharding.AXES)
    abstract = assembly.abstract_params()
    unruled = [p for p in flatten(abstract) if not any(re.fullmatch(regex, p) for regex, _ in sharding.RULES)]
    assert unruled == []
    with caplog.at_level(logging.INFO, logger="avlm_jax.sharding"):
        specs = {path: x.spec for path, x in flatten(sharding.param_shardings(abstract, mesh)).items()}
    told = [record.getMessage() for record in caplog.records]
    if mesh.shape["fsdp"] < 256:
        assert told == []
    else:
        assert {text.split()[0] for text in told if "holds it whole" in text} == WHOLE_AT_256
    # No device holds the whole of anything large, and nobody walks along split layers.
    for path, leaf in flatten(abstract).items():
        if leaf.size >= sharding.FALLBACK_SIZE and not (mesh.shape["fsdp"] == 256 and path in WHOLE_AT_256):
            assert "fsdp" in str(specs[path]), path
        if "/layers/" in path:
            assert not specs[path] or specs[path][0] is None, path


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file, shape in MESHES.items():
        (GOLDEN / file).write_text(table(make_assembly(), shape))
        print(GOLDEN / file)
