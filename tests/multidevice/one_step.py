"""A program: one training step of stages of the tiny system on meshes, the results in a file for the tests to compare.

    python -m tests.multidevice.one_step FOLDER 2b:2x4x1:2 ...

A case is stage:mesh:micro-batches, the mesh data x fsdp x tensor. FOLDER is what `prepare` made; of several processes (see
`avlm_jax.processes.multihost`) each loads its share of the rows alone; the first one writes FOLDER/<number of processes>.npz.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from avlm_jax.assembly import assemble
from avlm_jax.config import to_dataclass
from avlm_jax.processes.multihost import Timeouts, initialize
from avlm_jax.sharding import check_heads, make_mesh, put_batch, replicated, share_of_batch
from avlm_jax.state import flatten, split
from avlm_jax.step import create_state, make_step
from avlm_jax.train import StageConfig
from avlm_jax.weights.placement import place_params
from input_pipeline.loader import Loader
from tests.tiny_system import random_params, save_tokenizer, tiny_config, write_records

SOURCES = {"1a": "visual_caption", "1b": "audio_caption", "2a": "av_caption", "2b": "mcq"}
ROWS = 16
LEARNING_RATE = 1e-2
# Adam divides by |gradient| + eps: with its usual 1e-8 the update of a weight whose gradient is all but zero is plus or minus
# the whole learning rate, by the noise of its last digit. With this one it is smooth, and so are tolerances.
EPS = 1e-3
# Programs this small take far longer to compile than to run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"


def prepare(folder: Path) -> Path:
    """Tokenizer and records of sixteen questions."""
    tokenizer = save_tokenizer(folder / "tokenizer")
    spec = assemble(tiny_config(tokenizer)).system.spec
    write_records(folder / "records", spec, videos=ROWS // 2)
    return folder


def run(folder: Path, case: str) -> dict[str, np.ndarray]:
    """One step: parameters and first moments by path, loss and norm of the gradient."""
    stage, sizes, micro_batches = case.split(":")
    shape, micro_batches = tuple(map(int, sizes.split("x"))), int(micro_batches)
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    config = tiny_config(
        folder / "tokenizer",
        "model.avts.time_scope=all",
        # A factor of 1 for the random adapters of rank 2, in place of 16: with that all attention is arg max, and gradients
        # hang on the last digits of what goes in.
        "model.llm.lora.alpha=2.0",
        f"stage.{stage}.sources.{SOURCES[stage]}.records={folder / 'records'}",
        f"stage.{stage}.sources.{SOURCES[stage]}.tasks=()",
        f"stage.{stage}.max_length=0",
    )
    assembly = assemble(config, stage)
    check_heads(assembly.system.heads, mesh)
    section = to_dataclass(StageConfig, config.stage[stage], f"stage.{stage}")
    optim = dataclasses.replace(section.optim, lr=0.0, eps=EPS)
    index, count = share_of_batch(mesh)
    with jax.set_mesh(mesh):
        trainable, frozen = split(place_params(random_params(assembly), mesh), section.trainable)
        state = create_state(trainable, optim, 0, mesh)
        step = make_step(assembly.system, optim, config.loss_chunk, state)
        lr = jax.device_put(np.float32(LEARNING_RATE), replicated(mesh))
        with Loader(
            {SOURCES[stage]: section.sources[SOURCES[stage]]},
            assembly.builder(),
            batch_size=ROWS,
            accumulate=micro_batches,
            process_index=index,
            process_count=count,
            threads=0,
        ) as loader:
            assert loader.local_batch_size == ROWS // micro_batches // count
            batches = (put_batch(batch, mesh) for batch in loader)
            wanted = jax.tree.map(lambda leaf: leaf.sharding, state)
            state, metrics = step(state, frozen, batches, lr, micro_batches)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
    moments = next(part for part in state.opt_state if hasattr(part, "mu")).mu
    found = {
        **{f"parameter/{path}": leaf for path, leaf in flatten(state.trainable).items()},
        **{f"moment/{path}": leaf for path, leaf in flatten(moments).items()},
        **{f"metric/{name}": metrics[name] for name in ("loss", "grad_norm", "targets", "skipped")},
    }
    return multihost_utils.process_allgather(found, tiled=True)


def main(folder: Path, cases: list[str]) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    initialize(Timeouts())
    results = {f"{case}/{name}": value for case in cases for name, value in run(folder, case).items()}
    if jax.process_index() == 0:
        np.savez(folder / f"{jax.process_count()}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
