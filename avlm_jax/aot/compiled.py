"""Compiles a stage's training step for a slice that is not there, and says what it needs.

The programs are those that `avlm train` runs (`avlm_jax.step`), with the shapes and shardings it gives them; nothing is read
from disk: neither weights nor records nor a tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avlm_jax.aot import hlo, traffic
from avlm_jax.aot.topologies import Slice, describe_topology
from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.models.api import System, abstract_params, build_system
from avlm_jax.sharding import check_heads, make_mesh
from avlm_jax.state import Tree
from avlm_jax.step import StepInputs, abstract_inputs, count_micro_batches, make_step
from avlm_jax.train import StageConfig
from input_pipeline.spec import PIXELS, FeatureShapes

logger = logging.getLogger(__name__)

# Called with what begins; holds while that goes on.
Progress = Callable[[str], contextlib.AbstractContextManager[None]]


def quiet(what: str) -> contextlib.AbstractContextManager[None]:
    """Tells nobody."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Setup:
    """A stage's step on a slice, ready to be compiled.

    Attributes:
        config: that it was made from.
        system: the model.
        name, stage: which stage.
        slice_: where.
        mesh: over the slice's devices.
        rows: of text per device and micro-batch (device: a place along data x fsdp).
        micro_batches: per optimizer step.
        length: text positions.
        video, audio: how the batch comes: "pixels" or "samples", "features", or "none" where no source of the stage has it.
        inputs: shapes and shardings of the step's arguments.
    """

    config: ConfigDict
    system: System
    name: str
    stage: StageConfig
    slice_: Slice
    mesh: Mesh
    rows: int
    micro_batches: int
    length: int
    video: str
    audio: str
    inputs: StepInputs


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        name: "finish", of `avlm_jax.step.TrainStep`.
        runs: per optimizer step.
        arguments, outputs, aliased, temporaries, code: bytes of a device, as XLA says; `aliased` of the outputs lie where
            arguments lay.
        peak: XLA's own, without what lies in the host's memory (remat offload).
        collectives: of one run.
        traffic: bytes read and written in HBM in one run.
        kernels: calls of hand-written kernels (Pallas) in one run.
        unknown_loops: loops whose trip count XLA does not know; their bodies count once.
        seconds: that compiling took.
    """

    name: str
    runs: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    collectives: tuple[hlo.Collective, ...]
    traffic: float
    kernels: int
    unknown_loops: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """XLA refused: the program needs more HBM than a device has.

    Attributes:
        name: of the program.
        used, limit: bytes, as XLA says; used is 0 where it does not say.
        message: XLA's first lines.
        seconds: until it refused.
    """

    name: str
    used: int
    limit: int
    message: str
    seconds: float
    runs: int = 1


def prepare(
    config: ConfigDict,
    name: str,
    slice_: Slice,
    *,
    mesh: Mapping[str, int] | None = None,
    rows: int | None = None,
    length: int | None = None,
    remat: str | None = None,
) -> Setup:
    """Everything about a stage's step but the compilation.

    Args:
        config: of a system.
        name: of the stage.
        slice_: where it shall run.
        mesh: sizes of axes in place of config.mesh's; an axis that is left out keeps its own.
        rows: per device and micro-batch in place of the stage's rows_per_device.
        length: text positions in place of the stage's max_length.
        remat: policy in place of model.llm.remat.

    Raises:
        ConfigError: there is no such stage, or its batch does not divide among the slice's devices.
        TopologyError: libtpu does not know the slice.
    """
    if remat is not None:
        config = ConfigDict(config.to_dict())
        config.model.llm.remat = remat
    if name not in config.stage:
        raise ConfigError(f"the configuration has no stage {name!r}; stages: {', '.join(config.stage)}")
    stage = to_dataclass(StageConfig, config.stage[name], f"stage.{name}")
    # No tokenizer, so no id that it leaves free; all that the program needs is one beyond the language model's table.
    system = build_system(config, media_token_id=config.model.llm.vocab_size)
    topology = describe_topology(slice_)
    sizes = {**config.mesh.to_dict(), **(mesh or {})}
    try:
        placed = make_mesh(**sizes, devices=topology.devices)
        check_heads(system.heads, placed)
        rows = stage.rows_per_device if rows is None else rows
        micro_batches = count_micro_batches(stage.batch_size, rows, placed)
    except ValueError as error:
        raise ConfigError(f"stage {name} on {slice_.name}: {error}") from error
    global_rows = stage.batch_size // micro_batches
    length = length or stage.max_length or config.text.max_length
    if length <= system.num_media_tokens:
        raise ConfigError(
            f"a row has {length} text positions and {system.num_media_tokens} media tokens; choose a greater --length"
        )
    modalities = {modality for source in stage.sources.values() for modality in source.modalities}
    video, audio, features, without = _media(system, modalities, stage.features)
    inputs = abstract_inputs(
        _abstract_params(system),
        stage.trainable,
        stage.optim,
        placed,
        system.spec,
        rows=global_rows,
        length=length,
        clips_per_row=stage.pack,
        features=features,
        frozen_dtype=config.frozen_dtype,
        without=without,
    )
    shares = placed.shape["data"] * placed.shape["fsdp"]
    return Setup(
        config,
        system,
        name,
        stage,
        slice_,
        placed,
        global_rows // shares,
        micro_batches,
        length,
        video,
        audio,
        inputs,
    )


@functools.lru_cache(maxsize=8)
def _abstract_params(system: System) -> Tree:
    """Tracing it takes a second, and a search asks again and again."""
    return abstract_params(system)


def _media(
    system: Any, modalities: set[str], cached: bool
) -> tuple[str, str, FeatureShapes, tuple[str, ...]]:
    """(video, audio, which features a batch holds, parts of the system that are then not there)."""
    video = "pixels" if "video" in modalities else "none"
    audio = "samples" if "audio" in modalities else "none"
    if not cached:
        return video, audio, PIXELS, ()
    encoders = system.encoders
    shapes = {name: tuple(encoders[name].shape) for name in ("video", "audio")}
    parts = tuple(encoders[name].part for name in shapes)
    as_features = ("features" if video != "none" else "none", "features" if audio != "none" else "none")
    return *as_features, FeatureShapes(**shapes), parts


def compile_step(
    setup: Setup, *, cache: Path | None = None, progress: Progress = quiet
) -> Program | OutOfMemory:
    """`finish`, the larger of a step's two programs: it does all that `accumulate` does, with the same gradients beside it, and
    updates the parameters on top. It stands for both and counts as often as the step has micro-batches.

    Args:
        setup: what.
        cache: a folder in which figures of programs are kept, by their text, slice, compiler, its options and the code that
            reads them; a damaged file is said and made again. None: none.
        progress: is told what begins.
    """
    inputs, k = setup.inputs, setup.micro_batches
    step = make_step(
        setup.system,
        dataclasses.replace(setup.stage.optim, lr=0.0),
        setup.config.loss_chunk,
        inputs.state,
    )
    between = (inputs.gradients, inputs.totals) if k > 1 else (None, None)
    what = f"stage {setup.name}, {setup.slice_.name}, {setup.rows} rows a device: compiling"
    with progress(what), jax.set_mesh(setup.mesh), without_cache():
        lowered = step.finish.lower(inputs.state, inputs.frozen, *between, inputs.batch, inputs.lr)
        return _look_up("finish", k, lowered, setup, cache)


def _look_up(
    name: str, runs: int, lowered: jax.stages.Lowered, setup: Setup, cache: Path | None
) -> Program | OutOfMemory:
    if cache is None:
        return dataclasses.replace(_compile(name, lowered, setup), runs=runs)
    mark = hashlib.sha256(f"{setup.slice_.name} {_compiler()} {name}\n".encode())
    mark.update(lowered.as_text().encode())
    file = cache / f"{mark.hexdigest()[:32]}.json"
    found = _read_kept(file) if file.exists() else None
    if found is None:
        found = _compile(name, lowered, setup)
        part = file.with_suffix(f".{os.getpid()}.part")  # Two commands may share a folder.
        part.write_text(json.dumps(write_program(found)), encoding="utf-8")
        part.rename(file)
    return dataclasses.replace(found, runs=runs)


def _read_kept(file: Path) -> Program | OutOfMemory | None:
    """What an earlier command found; None if the file is damaged."""
    try:
        return read_program(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s is damaged (%s: %s); its program is compiled again", file, type(error).__name__, error
        )
        return None


def _compiler() -> str:
    """All but a program's text that its figures depend on: compiler, its options, and the code that reads what it made."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (hlo, traffic))
    options = {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
    versions = f"jax {jax.__version__} libtpu {importlib.metadata.version('libtpu')}"
    return f"{versions} {options} {hashlib.sha256(code).hexdigest()}"


def write_program(program: Program | OutOfMemory) -> dict[str, Any]:
    """Plain values, of which `read_program` makes the same program."""
    return {"kind": type(program).__name__, **dataclasses.asdict(program)}


def read_program(stored: Mapping[str, Any]) -> Program | OutOfMemory:
    """The inverse of `write_program`."""
    kind = stored["kind"]
    values = {key: value for key, value in stored.items() if key != "kind"}
    if kind == "OutOfMemory":
        return OutOfMemory(**values)
    collectives = tuple(
        hlo.Collective(**{**item, "groups": tuple(tuple(group) for group in item["groups"])})
        for item in values["collectives"]
    )
    return Program(**{**values, "collectives": collectives, "unknown_loops": tuple(values["unknown_loops"])})


def _compile(name: str, lowered: jax.stages.Lowered, setup: Setup) -> Program | OutOfMemory:
    begun = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(name, str(error), time.monotonic() - begun)
        if refused is None:
            raise
        return refused
    seconds = time.monotonic() - begun
    memory = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text())
    return Program(
        name=name,
        runs=1,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes - memory.host_temp_size_in_bytes,  # XLA's counts both memories.
        collectives=tuple(hlo.collectives(module, setup.mesh.size, setup.slice_.count)),
        traffic=traffic.hbm_bytes(module),
        kernels=hlo.count_kernels(module),
        unknown_loops=tuple(module.unknown_loops),
        seconds=seconds,
    )


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """No compiled program is looked up or kept on disk: one for a TPU cannot be loaded here."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = r"([\d.]+)([KMGT]?)"


def out_of_memory(name: str, message: str, seconds: float) -> OutOfMemory | None:
    """What XLA's refusal says; None if the message is of something else."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    used = limit = 0
    if found := re.search(rf"Used {_NUMBER} of {_NUMBER} hbm", message):
        used, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
    elif found := re.search(rf"\({_NUMBER}\) exceeds available HBM \({_NUMBER}\)", message):
        used, limit = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
    return OutOfMemory(name, used, limit, "\n".join(message.splitlines()[:6]), seconds)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings: what one device holds of them, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
