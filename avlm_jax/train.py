"""`avlm train`: the loop. One for every system and every stage; read it from top to bottom.

    <workdir>/<stage>/metrics.jsonl   loss, accuracy, gradient norm and rate of every logged step, and how many steps were
                                      skipped so far; since the one before it, samples by source and how fast it went (see
                                      `meter`); training.png draws it when the stage is finished
    <workdir>/<stage>/runs.jsonl      a line for every start: command, configuration, versions, commit, devices
    <workdir>/<stage>/checkpoints/    resumable state: trainable tree, optimizer, data position
    <workdir>/<stage>/final/          what the stage publishes: all that training has learnt so far, config, lineage

The same command continues a run that was stopped: finished stages are recognised by their `final`, an unfinished one goes on
from its newest checkpoint and ends as it would have ended: to the bit on the same TPU slice or CPUs, within rounding elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import math
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, assemble, check_weights
from avlm_jax.checkpoints.checkpoint import Checkpointer
from avlm_jax.checkpoints.schedule import SaveSchedule
from avlm_jax.checkpoints.stage_result import save_tree
from avlm_jax.checkpoints.storage import naming
from avlm_jax.chips import find_chip
from avlm_jax.config import (
    ConfigError,
    add_config_arguments,
    config_from_args,
    config_to_json,
    enable_compilation_cache,
    to_dataclass,
)
from avlm_jax.features import check_untrained, open_features
from avlm_jax.flops import Flops, attention_kernel, step_flops
from avlm_jax.lineage import (
    check_finished,
    check_parent,
    check_same_config,
    check_same_plan,
    exists_for_all,
    load_parent,
)
from avlm_jax.models.api import System
from avlm_jax.monitoring.meter import Meter, Shape
from avlm_jax.monitoring.run_record import record_start, versions
from avlm_jax.monitoring.training_plot import save_training_plot
from avlm_jax.monitoring.watch import Profiler, WatchConfig
from avlm_jax.monitoring.writer import Console, MetricsWriter, import_wandb
from avlm_jax.optim import OptimConfig, learning_rate
from avlm_jax.prefetch import Prefetch
from avlm_jax.processes.multihost import Timeouts, initialize, is_first, ready, say
from avlm_jax.processes.peers import PUBLISHES, SAVES
from avlm_jax.processes.preemption import StopSignal
from avlm_jax.processes.watchdog import Watchdog
from avlm_jax.sharding import put_batch, put_replicated, share_of_batch
from avlm_jax.state import TrainState, Tree, describe, flatten, format_sizes, split, unflatten
from avlm_jax.step import InFlight, TrainStep, abstract_state, count_micro_batches, create_state, make_step
from input_pipeline.errors import UserError
from input_pipeline.loader import Loader
from input_pipeline.mixture import SourceConfig
from input_pipeline.transforms.sample import SampleBuilder

NAMED = 8  # So many samples of a step that failed are named.
LEAST = {"log_every": 1, "max_nonfinite": 1, "max_lost_steps": 2, "max_lost_minutes": 0}


class TrainingError(UserError):
    """Training cannot go on (step after step without a finite loss); what was saved before is sound."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a recipe.

    Attributes:
        trainable: regexes, each matching whole parameter paths.
        sources: what it trains on, by name.
        batch_size: rows per step over all devices: samples, unless rows are packed.
        rows_per_device: rows that a device takes at a time; a step is worked through in as many micro-batches as that makes.
            0: all at once.
        epochs: passes over the sources; used when steps is 0. The last step is filled up from the next pass.
        steps: optimizer steps, or 0.
        max_length: text positions, media included; 0 takes text.max_length. Captions need fewer than questions.
        buckets: shorter text lengths that a step's rows may have together, ascending; one program is compiled for each.
        pack: clips that may share a row of text; 1 packs none. See `input_pipeline.packing`.
        oversize: "error" refuses samples whose media and first round do not fit, "leave_out" counts and leaves them out.
        template: chat template in place of text.template, text.template_options and text.system; empty takes those.
            LLaVA-type recipes align with "plain". What the stage publishes is asked and exported with it as well.
        template_options: its own fields; null takes its defaults.
        parent: the stage whose result it begins from; empty for the first.
        fresh_lora: merge the adapter of earlier stages into the base and begin with a fresh one (LongVALE-LLM's
            second stage), instead of training it on.
        features: read cached features (`avlm cache-features`) in place of what of pixels and waveforms they hold.
        optim: learning rate and the rest of AdamW.
    """

    trainable: tuple[str, ...]
    sources: dict[str, SourceConfig]
    batch_size: int
    rows_per_device: int = 0
    epochs: float = 1.0
    steps: int = 0
    max_length: int = 0
    buckets: tuple[int, ...] = ()
    pack: int = 1
    oversize: str = "error"
    template: str = ""
    template_options: dict[str, Any] | None = None
    parent: str = ""
    fresh_lora: bool = False
    features: bool = False
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Path]:
    """Runs config.stages in order, skipping finished ones.

    Returns:
        The published folder of each stage.

    Raises:
        ConfigError: a stage of another configuration lies in `workdir`, a stage's parent is not finished, or a value of
            the configuration cannot be used.
        TrainingError: the loss was not finite config.max_nonfinite times in a row.
        PeerError: another process of the run did not come.
        Stopped: by SIGTERM or Ctrl-C; what was learnt is saved.
    """
    if "://" in str(workdir):
        raise ConfigError(
            f"--workdir is {workdir}; training writes to a folder: mount the bucket (launch/README.md says how) and name that"
        )
    for key, least in LEAST.items():
        if not config[key] >= least:
            raise ConfigError(f"config.{key} is {config[key]!r}; at least {least} is expected")
    workdir = Path(workdir)
    timeouts = to_dataclass(Timeouts, config.timeouts, "timeouts")
    assembly = assemble(config)
    finals = {}
    with Watchdog(timeouts) as watchdog, StopSignal(timeouts.grace, watchdog.describe) as stop:
        for name in config.stages:
            finals[name] = workdir / name / "final"
            watchdog.stage(name, workdir / name)
            if exists_for_all(finals[name]):
                check_finished(assembly, name, finals[name])
                say(f"stage {name}: finished before, {finals[name]}")
            else:
                # What is traced may ask for the mesh: activation constraints, attention kernels.
                with jax.set_mesh(assembly.mesh), naming(workdir / name):
                    run_stage(assembly, name, workdir, assembly.mesh, watchdog, stop)
        ready("the end")
    return finals


def run_stage(
    assembly: Assembly, name: str, workdir: Path, mesh: Mesh, watchdog: Watchdog, stop: StopSignal
) -> None:
    """Trains one stage from its parent's result to its own `final`, continuing from a checkpoint if there is one."""
    config = assembly.config
    stage = to_dataclass(StageConfig, config.stage[name], f"stage.{name}")
    watched = to_dataclass(WatchConfig, config.watch, "watch")
    first = is_first()  # The process that writes what there is one of.
    # What is wrong with text settings is told first.
    builder = assembly.of_stage(name).builder(max_length=stage.max_length)
    if first and watched.wandb:
        import_wandb(watched.wandb)
    parent_hash, learnt = load_parent(assembly, stage.parent, workdir, fresh_lora=stage.fresh_lora)
    try:
        trained = flatten(split(assembly.abstract_params(), stage.trainable)[0])
    except ValueError as error:  # A pattern that fits nothing.
        raise ConfigError(f"stage {name}: {error}") from error
    check_untrained(assembly, name, trained)
    sources, idle = open_features(
        assembly, name, stage.sources, {**flatten(learnt or {}), **trained}, beside=stage.features
    )
    # What is wrong with the data is told before gigabytes of weights are read.
    loader, micro_batches = open_loader(config, name, stage, sources, builder, mesh)
    # Rounded up: the last samples are trained on as well. (The tolerance is for 0.1 * 30 > 3.)
    total = stage.steps or max(1, math.ceil(loader.batches_in(stage.epochs) - 1e-6))
    check_same_plan(name, {**loader.state(), "steps": total})
    try:
        params, reports = assembly.parameters(learnt, mesh=mesh, fp32=trained, without=idle)
        trainable, frozen = split(params, stage.trainable)
    except UserError:
        raise
    except ValueError as error:  # Weights or a parent's result that do not fit the configuration.
        raise ConfigError(f"stage {name}: {error}") from error
    del params
    say(f"stage {name}\n{format_sizes(describe(trainable, frozen))}")
    say(loader.describe())
    for part, report in reports.items():
        say(f"{part}: {report}")

    expected = abstract_state(trainable, stage.optim, config.seed, mesh)
    step = make_step(assembly.system, dataclasses.replace(stage.optim, lr=0.0), config.loss_chunk, expected)
    metadata = {
        "stage": name,
        "parent": parent_hash,
        "weights": assembly.weights,
        "versions": versions(),
        "data": loader.summary(),
    }
    made_with = json.loads(config_to_json(config))
    timeouts = to_dataclass(Timeouts, config.timeouts, "timeouts")
    with loader, Checkpointer(workdir / name / "checkpoints", timeouts=timeouts) as checkpointer:
        start = 0
        if (found := checkpointer.restore_latest(expected)) is None:
            state = create_state(trainable, stage.optim, config.seed, mesh)
        else:
            state, data_state, saved = found
            check_same_config(config, name, saved["config"], workdir / name / "checkpoints")
            check_parent(saved["parent"], parent_hash, stage.parent, workdir / name)
            check_weights(saved.get("weights"), assembly.weights, workdir / name)
            loader.restore(data_state)
            start = int(state.step)
            say(f"stage {name}: continues at step {start} of {total}")
        del trainable, found  # The one's arrays are the state's by now, or the other's took their place.
        work = Work(
            name, config, stage, mesh, step, micro_batches, start, total, {**metadata, "config": made_with}
        )
        ready(f"stage {name}, before its first step")
        if first:
            record_start(workdir / name, made_with, mesh, start=start, total=total)
        writer = MetricsWriter(
            workdir / name, start or None, enabled=first, wandb=watched.wandb, config=made_with
        )
        profiler = Profiler(watched, workdir / name / "profile", enabled=first)
        with writer, profiler, make_meter(assembly.system, work, trained) as meter:
            state = loop(work, state, frozen, loader, checkpointer, writer, meter, profiler, watchdog, stop)
    watchdog.at(PUBLISHES)
    # What earlier stages learnt and this one left alone belongs to the result as well.
    published = unflatten(flatten(learnt or {}) | flatten(state.trainable))
    counts = {"steps": total, "skipped": int(state.skipped)}
    save_tree(workdir / name / "final", published, made_with, metadata | counts, timeouts.save)
    if first:
        save_training_plot(workdir / name)


def open_loader(
    config: ConfigDict,
    name: str,
    stage: StageConfig,
    sources: Mapping[str, SourceConfig],
    builder: SampleBuilder,
    mesh: Mesh,
) -> tuple[Loader, int]:
    """The rows of each batch that this process's devices hold, and in how many micro-batches they come.

    Raises:
        ConfigError: the batch does not divide among the devices, or into micro-batches.
        UserError: records or their text cannot be used.
    """
    try:
        micro_batches = count_micro_batches(stage.batch_size, stage.rows_per_device, mesh)
    except ValueError as error:
        raise ConfigError(f"config.stage.{name}: {error}") from error
    share, shares = share_of_batch(mesh)
    loader = Loader(
        sources,
        builder,
        batch_size=stage.batch_size,
        accumulate=micro_batches,
        buckets=stage.buckets,
        pack=stage.pack,
        oversize=stage.oversize,
        seed=config.seed,
        process_index=share,
        process_count=shares,
        threads=config.loader.threads,
        workers=config.loader.workers,
    )
    return loader, micro_batches


@dataclasses.dataclass(frozen=True)
class Work:
    """What the loop of one stage is to do.

    Attributes:
        name: of the stage.
        config: resolved.
        stage: its section of config.stage.
        mesh: of all devices.
        step: the compiled step.
        micro_batches: of a step.
        start, total: steps done before, and steps in all.
        metadata: to be kept with each checkpoint.
    """

    name: str
    config: ConfigDict
    stage: StageConfig
    mesh: Mesh
    step: TrainStep
    micro_batches: int
    start: int
    total: int
    metadata: Mapping[str, Any]


def loop(
    work: Work,
    state: TrainState,
    frozen: Tree,
    loader: Loader,
    checkpointer: Checkpointer,
    writer: MetricsWriter,
    meter: Meter,
    profiler: Profiler,
    watchdog: Watchdog,
    stop: StopSignal,
) -> TrainState:
    """Steps `work.start`..`work.total`. Metrics are read one step late, so that the host never waits for the device."""
    config, mesh, total = work.config, work.mesh, work.total
    stream = sys.stderr if is_first() else io.StringIO()  # The others have no progress to show.
    console = Console(total, start_step=work.start, label=f"stage {work.name}", stream=stream)
    nonfinite = Nonfinite(work, loader)
    pending: tuple[int, dict[str, Array], np.float32] | None = None
    schedule = SaveSchedule(
        config.max_lost_steps,
        config.max_lost_minutes,
        look_every=config.log_every,
        start=work.start,
        total=total,
    )
    in_flight = InFlight()

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        number, metrics, lr = pending
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        pending = None
        meter.step(values["tokens"], loader.num_samples(number - 1))
        if number == work.start + 1:
            say(f"stage {work.name}: {meter.describe()}")
        if number % config.log_every == 0 or number == total:
            since = (number - 1) // config.log_every * config.log_every  # The logged step before this one.
            samples = {f"samples/{k}": n for k, n in loader.count_samples(since, number).items()}
            writer.write_scalars(number, {**values, "lr": float(lr), **samples, **meter.read(batches.waited)})
        nonfinite.check(number, values)
        console.update(number, loader.num_samples(number - 1), values["loss"])

    def save(number: int) -> None:
        schedule.saved(number)
        report()
        writer.sync()  # Metrics up to a checkpoint are on disk before it is, so a continued run has them all.
        watchdog.at(SAVES)
        # One step after the other: the loader itself is ahead of that.
        checkpointer.save(number, state, loader.state(number), work.metadata)

    place = functools.partial(put_batch, mesh=mesh)
    with stop.deferred(), Prefetch(loader, place, config.loader.prefetch) as batches:
        watched = meter.watch(batches)
        for number in range(work.start + 1, total + 1):
            if stop.reached(number - 1):
                if number - 1 > work.start:
                    save(number - 1)
                    checkpointer.wait()
                stop.end(number - 1)
            watchdog.step(number)
            lr = learning_rate(work.stage.optim, number - 1, total)
            rate = put_replicated(lr, mesh)
            # Whatever crosses between host and devices in a step was put there on purpose before.
            with profiler.step(number), jax.transfer_guard("disallow"):
                state, metrics = work.step(
                    state, frozen, watchdog.reading(watched), rate, work.micro_batches, in_flight
                )
            profiler.started(number, metrics)
            report()
            pending = (number, metrics, lr)
            if schedule.due(number):
                save(number)
    console.close()
    return state


class Nonfinite:
    """Tells of steps that were skipped because their loss or gradient was not finite; too many in a row end the run."""

    def __init__(self, work: Work, loader: Loader) -> None:
        self._work, self._loader, self._in_a_row = work, loader, 0

    def check(self, number: int, values: Mapping[str, float]) -> None:
        """To be called for every step, in order.

        Raises:
            TrainingError: this was the config.max_nonfinite-th skipped step in a row.
        """
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        name, limit = self._work.name, self._work.config.max_nonfinite
        ids = self._loader.sample_ids(number - 1, whole=True)
        more = f" ({NAMED} of {len(ids)})" if len(ids) > NAMED else ""
        told = (
            f"stage {name}, step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}. The samples of that "
            f"step: {', '.join(ids[:NAMED])}{more}"
        )
        if self._in_a_row >= limit:
            raise TrainingError(
                f"{told}. It is the {self._in_a_row}. such step in a row (config.max_nonfinite); lower "
                f"config.stage.{name}.optim.lr or remove what these samples have in common, then start the same command again"
            )
        if is_first():
            print(f"{told}; skipped, {values['skipped']:.0f} so far", file=sys.stderr, flush=True)


def make_meter(system: System, work: Work, trained: Collection[str]) -> Meter:
    """What counts the work of a stage that trains the parameters of these paths."""
    device = work.mesh.devices.flat[0]
    backend = attention_kernel(system.llm_config.attention_backend, device.platform)
    modalities = {name for source in work.stage.sources.values() for name in source.modalities}

    def flops(shape: Shape) -> Flops:
        """Of a micro-batch that has every modality that some source of the stage has."""
        video = "features" if "video" in shape.features else "pixels"
        audio = "features" if "audio" in shape.features else "samples"
        return step_flops(
            system,
            trained,
            rows=shape.rows,
            length=shape.length,
            clips=shape.clips,
            video=video if "video" in modalities else "none",
            audio=audio if "audio" in modalities else "none",
            backend=backend,
        )

    chip = find_chip(device.device_kind)
    return Meter(flops, micro_batches=work.micro_batches, devices=work.mesh.size, chip=chip)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm train`'s arguments."""
    parser.description = (
        "Train a system's stages in order; the same command continues a run that was stopped."
    )
    parser.epilog = (
        "examples:\n"
        "  avlm train --config configs/savenvideo.py:size=demo --workdir runs/mine\n"
        "  avlm train --config configs/savenvideo.py:size=7b,stage=1b --workdir /mnt/bucket/run --config.seed=1\n"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where stages leave metrics, checkpoints, results"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when every stage is finished."""
    config = config_from_args(args)
    initialize(to_dataclass(Timeouts, config.timeouts, "timeouts"))
    enable_compilation_cache()
    begun = time.monotonic()
    finals = train(config, args.workdir)
    say(
        f"{len(finals)} stages in {time.monotonic() - begun:.0f} s; the last one's result: {list(finals.values())[-1]}"
    )
    return 0
