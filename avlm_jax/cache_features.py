"""Runs the frozen encoders once over records and stores their bf16 features beside them, for training to read.

Each folder of records gets <records>.features: the same records and samples in the same order and shards, in which features
stand in for pictures, sound or both. It has its name only when it is whole; the same command takes up a killed run after
its last finished shard and then makes the same bytes. A stage reads it with config.stage.<name>.features=True.

The features of a frame or a window depend on that frame or window alone. Which others are encoded in the same step may change
how fp32 and bf16 sums are rounded, no more; with the same batch size on the same kind of device not even that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.config import (
    ConfigError,
    add_config_arguments,
    config_from_args,
    enable_compilation_cache,
    to_dataclass,
)
from avlm_jax.features import describe_features, feature_counts, features_folder
from avlm_jax.processes.multihost import Timeouts, initialize, say
from avlm_jax.processes.preemption import StopSignal
from avlm_jax.sharding import batch_sharding, make_mesh
from avlm_jax.state import Tree
from input_pipeline.errors import UserError
from input_pipeline.features import replace_media
from input_pipeline.progress import track
from input_pipeline.records import (
    REJECTED,
    RecordReader,
    finish_records,
    finished_shard,
    unpack_record,
    write_shard,
)
from input_pipeline.spec import FEATURE_DTYPE
from input_pipeline.transforms.media import decode_record
from input_pipeline.working_folder import WorkingFolder

BATCH_SIZE = 16  # As many frames as SAVEnVideo takes of a video.
READERS = 2  # Threads that decode JPEG ahead of the encoder.
WRITERS = 2  # Shards in the making: one is hashed and flushed to the disk while the next one is filled.
QUEUED = 4  # Clips that wait for a shard's writer; a video's features take 26 MB.

EPILOG = """\
examples:
  avlm cache-features --config configs/savenvideo.py:size=7b                      # records of all stages
  avlm cache-features --config configs/savenvideo.py:size=7b --modalities audio --records records/audiocaps
  avlm train --config configs/savenvideo.py:size=7b,features=true --workdir W     # then reads them

A frame of SigLIP so400m/14-384 takes 1.6 MiB (a video of 16 frames 25.6 MiB), ten seconds of BEATs 0.75 MiB. Pictures are
worth caching when decoding or encoding them holds training up, or over several epochs; sound always is. Several hosts
that see the same folders share the work.
"""


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen encoders on the devices of this process; hosts work independently of each other.

    Attributes:
        assembly, params: the system and the encoders' parameters.
        modalities: what is encoded.
        size: frames or windows of one step, over all devices.
        sharding: of their first axis.
    """

    assembly: Assembly
    params: Tree
    modalities: tuple[str, ...]
    size: int
    sharding: jax.sharding.NamedSharding

    @functools.cached_property
    def _steps(self) -> dict[str, Callable[..., jax.Array]]:
        def step(method: str) -> Callable[..., jax.Array]:
            def encode(params: Tree, *inputs: jax.Array) -> jax.Array:
                features = self.assembly.system.apply({"params": params}, *inputs, method=method)
                return features.astype(jnp.bfloat16)

            return jax.jit(encode)

        return {"video": step("encode_frames"), "audio": step("encode_audio")}

    def start(self, modality: str, *inputs: np.ndarray) -> list[tuple[jax.Array, int]]:
        """Sets the devices to work on n frames, or on n windows with their spans and masks; does not wait for them.

        Returns:
            Of each step its output and how many of its rows count; steps are padded with zeros.
        """
        outputs = []
        for start in range(0, len(inputs[0]), self.size):
            parts = [array[start : start + self.size] for array in inputs]
            padded = [
                np.concatenate([part, np.zeros((self.size - len(part), *part.shape[1:]), part.dtype)])
                for part in parts
            ]
            placed = [jax.device_put(array, self.sharding) for array in padded]
            with jax.set_mesh(self.sharding.mesh):  # Attention kernels ask what they run on.
                outputs.append((self._steps[modality](self.params, *placed), len(parts[0])))
        return outputs

    def collect(self, modality: str, outputs: list[tuple[jax.Array, int]]) -> np.ndarray:
        """bf16 features [n k d] of what was started."""
        shape = self.assembly.system.encoders[modality].shape
        return np.concatenate(
            [np.zeros((0, *shape), FEATURE_DTYPE), *(np.asarray(out)[:count] for out, count in outputs)]
        )


def make_encoders(assembly: Assembly, modalities: Sequence[str], batch_size: int = BATCH_SIZE) -> Encoders:
    """Loads the encoders of `modalities`; `batch_size` frames or windows per device and step."""
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    mesh = make_mesh(devices=jax.local_devices())
    wanted = {assembly.system.encoders[modality].part for modality in modalities}
    params, reports = assembly.parameters(mesh=mesh, without=assembly.abstract_params().keys() - wanted)
    for part in sorted(wanted):
        say(f"{part}: {reports.get(part, f'drawn from config.seed {assembly.config.seed}')}")
    return Encoders(assembly, params, tuple(modalities), batch_size * mesh.size, batch_sharding(mesh))


@dataclasses.dataclass
class Tally:
    """What one process has encoded since it started, and how long that took, compilation included."""

    clips: int = 0
    frames: int = 0
    windows: int = 0
    seconds: float = 0.0


# What process 0 tells the others before the work.
_FAILED, _WANTED, _THERE = -1, 0, 1


def cache_features(
    encoders: Encoders,
    records: str,
    out_dir: str = "",
    *,
    overwrite: bool = False,
    tally: Tally | None = None,
) -> dict[str, Any]:
    """Writes the features of a folder of records; every process calls it and takes its share of the shards.

    Args:
        encoders: see `make_encoders`.
        records: folder made by `avlm prepare`.
        out_dir: where to; "" is <records>.features, where training looks.
        overwrite: replace features of other encoders or records.
        tally: counts what is encoded (and not what a killed run had finished).

    Returns:
        The manifest. Features that are there already are left alone.

    Raises:
        UserError: the records cannot be used, or something else lies in `out_dir`.
    """
    reader = RecordReader(records, encoders.assembly.system.spec)
    if "features" in reader.manifest:
        raise ConfigError(f"{records} holds features already; name the folder that `avlm prepare` made")
    section = {
        **describe_features(encoders.assembly, encoders.modalities),
        "source_manifest": reader.digest,
    }
    plan = hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()
    out = out_dir or features_folder(records)
    work = WorkingFolder(out, plan, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        problem: UserError | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(work)
            except UserError as error:
                problem = error
        state = _told_by_first(_FAILED if problem else _WANTED if work.finished is None else _THERE)
        if problem:
            raise problem
        if state == _FAILED:
            raise UserError(f"{out}: process 0 cannot write there; its own message says why")
        if state == _WANTED:
            _write_share(encoders, reader, work, tally or Tally())
            _meet("features written")
            if jax.process_index() == 0:
                _finish(reader, work, section, plan)
            _meet("features in place")
        elif jax.process_index() == 0:
            work.discard()
    return RecordReader(out).manifest


def _told_by_first(value: int) -> int:
    """`value` of process 0, in every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _write_share(encoders: Encoders, reader: RecordReader, work: WorkingFolder, tally: Tally) -> None:
    """Every process_count-th shard, those an earlier run has finished left out."""
    begun = time.monotonic()
    shards, first = reader.manifest["shards"], 0
    todo: dict[int, range] = {}
    for index, shard in enumerate(shards):
        mine = index % jax.process_count() == jax.process_index()
        if mine and finished_shard(work.path, index, len(shards)) is None:
            todo[index] = range(first, first + shard["count"])
        first += shard["count"]
    # One bar over all shards; each takes from it what is its own.
    clips = track(
        (clip for numbers in todo.values() for clip in _encoded(encoders, reader, numbers, tally)),
        sum(map(len, todo.values())),
        f"features of {reader.directory.name}",
        "clips",
    )
    with ThreadPoolExecutor(WRITERS) as pool:
        writing: list[Future] = []
        for index, numbers in todo.items():
            feed: queue.Queue = queue.Queue(QUEUED)
            writing.append(pool.submit(write_shard, work.path, index, len(shards), _packed(feed)))
            try:
                for clip in itertools.islice(clips, len(numbers)):
                    _put(feed, clip, writing[-1])
            except BaseException as error:
                _put(
                    feed, error, writing[-1]
                )  # Else the writer would wait for more, and the pool for the writer.
                raise
            _put(feed, None, writing[-1])
            if len(writing) >= WRITERS:
                writing.pop(0).result()
        for future in writing:
            future.result()
    next(clips, None)  # Nothing is left; the bar ends.
    tally.seconds += time.monotonic() - begun


def _put(feed: queue.Queue, item: Any, writer: Future) -> None:
    """Hands `item` to a writer, unless that has ended; then its own error is the one to tell."""
    while not writer.done():
        with contextlib.suppress(queue.Full):
            feed.put(item, timeout=0.1)
            return
    if item is not None and not isinstance(item, BaseException):
        writer.result()


def _packed(feed: queue.Queue) -> Iterator[bytes]:
    """What is put into `feed`, as it is stored, until None comes; an exception that comes is raised."""
    while (item := feed.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        record, features = item
        yield replace_media(record, **features)


def _encoded(
    encoders: Encoders, reader: RecordReader, numbers: range, tally: Tally
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """(record as stored, its features), in order. What is encoded together never depends on other shards or on a kill."""
    started: Callable[[], Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]] | None = None
    for group in _read_ahead(encoders, reader, numbers):
        following = _start(encoders, group, tally)  # Before the results of the last group are waited for.
        if started is not None:
            yield from started()
        started = following
    if started is not None:
        yield from started()


def _start(
    encoders: Encoders, group: list[tuple[dict[str, Any], dict[str, Any]]], tally: Tally
) -> Callable[[], Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]]:
    """Sets the devices to work on a group; the result waits for them and gives each record with its features."""
    outputs: dict[str, list[tuple[jax.Array, int]]] = {}
    counts: dict[str, list[int]] = {}
    rows = [row for _, row in group]
    if "video" in encoders.modalities:
        counts["video"] = [int(row["frame_mask"].sum()) for row in rows]
        frames = np.concatenate([row["frames"][row["frame_mask"]] for row in rows])
        outputs["video"] = encoders.start("video", frames)
    if "audio" in encoders.modalities:
        keys = ("audio", "audio_spans", "audio_mask")
        counts["audio"] = [int(row["audio_mask"].sum()) for row in rows]
        windows = [np.concatenate([row[key][row["audio_mask"]] for row in rows]) for key in keys]
        outputs["audio"] = encoders.start("audio", *windows)
    records = [record for record, _ in group]

    def finish() -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        parts = {
            name: np.split(encoders.collect(name, outputs[name]), np.cumsum(counts[name])[:-1])
            for name in outputs
        }
        for i, record in enumerate(records):
            yield record, {name: parts[name][i] for name in parts}
        tally.clips += len(records)
        tally.frames += sum(counts.get("video", ()))
        tally.windows += sum(counts.get("audio", ()))

    return finish


def _read_ahead(
    encoders: Encoders, reader: RecordReader, numbers: range
) -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Groups of (record as stored, its arrays); the next group is decoded while one is encoded."""
    shown = {"frames": "video" in encoders.modalities, "audio": "audio" in encoders.modalities}

    def read(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        data = reader[number]
        return unpack_record(data), decode_record(data, reader.spec, **shown)

    with ThreadPoolExecutor(READERS) as pool:
        ahead: list[Future] = []
        # A group of images fills one step, one of videos several.
        for start in range(0, len(numbers), encoders.size):
            group, ahead = ahead, [pool.submit(read, n) for n in numbers[start : start + encoders.size]]
            if group:
                yield [future.result() for future in group]
        if ahead:
            yield [future.result() for future in ahead]


def _finish(reader: RecordReader, work: WorkingFolder, section: dict[str, Any], plan: str) -> None:
    """Manifest and lists; RuntimeError if the features are not one to one what the records are."""
    shards = reader.manifest["shards"]
    entries = [finished_shard(work.path, index, len(shards), verify=False) for index in range(len(shards))]
    if None in entries:
        raise UserError(
            f"{work.path}: shard {entries.index(None)} is missing; do all processes see the same folder?"
        )
    counts = reader.manifest["counts"]
    with open(reader.directory / REJECTED, encoding="utf-8") as file:
        rejected = [json.loads(line) for line in file]
    made = finish_records(
        work.path,
        reader.spec,
        entries,
        plan=plan,
        manifest_lines=counts["manifest_lines"],
        rejected=rejected,
        features=section,
    )
    found = [entry["count"] for entry in entries]
    if made["counts"] != counts or found != [shard["count"] for shard in shards]:
        raise RuntimeError(f"{work.path} holds {made['counts']}, {reader.directory} {counts}")
    work.put_in_place()


def all_records(config: ConfigDict) -> list[str]:
    """Folders of records of all stages that a configuration runs, each once; sources of weight 0 are left out."""
    sources = [source for name in config.stages for source in config.stage[name].sources.values()]
    return list(dict.fromkeys(source.records for source in sources if source.get("weight", 1.0)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm cache-features`' arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--records",
        nargs="+",
        metavar="DIR",
        help="folders of records (default: those of the config's stages)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="for one folder of records (default: <records>.features)"
    )
    parser.add_argument(
        "--modalities",
        default="video,audio",
        choices=("video,audio", "video", "audio"),
        metavar="A[,B]",
        help="video, audio or both: what becomes features; the rest stays as it is (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="frames or windows per device and step (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace features of other encoders or records"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when all features are there."""
    config = config_from_args(args)
    folders = [str(folder) for folder in args.records or all_records(config)]
    if args.out and len(folders) != 1:
        raise UserError(f"--out is for one folder of records, and there are {len(folders)}; leave it out")
    timeouts = to_dataclass(Timeouts, config.timeouts, "timeouts")
    initialize(timeouts)
    enable_compilation_cache()
    with StopSignal(timeouts.grace):
        return _cache_all(config, folders, args)


def _cache_all(config: ConfigDict, folders: Sequence[str], args: argparse.Namespace) -> int:
    encoders = make_encoders(assemble(config), args.modalities.split(","), args.batch_size)
    for folder in folders:
        tally = Tally()
        manifest = cache_features(encoders, folder, args.out or "", overwrite=args.overwrite, tally=tally)
        counts, size = manifest["counts"], sum(shard["bytes"] for shard in manifest["shards"])
        say(
            f"{args.out or features_folder(folder)}: {counts['records']:,} clips with {counts['samples']:,} samples, "
            f"{feature_counts(manifest)}, {size:,} bytes"
        )
        if tally.clips:
            print(
                f"  encoded {tally.clips:,} clips ({tally.frames:,} frames, {tally.windows:,} audio windows) in "
                f"{tally.seconds:.1f} s, {tally.clips / tally.seconds:.2f} clips/s"
            )
        else:
            print("  all of it was there before")
    return 0
