"""What a run leaves on disk: resumable checkpoints while it trains, a publishable one per finished stage.

`Checkpointer` stands between the loop and Orbax, whose interfaces change and whose restore does not notice
flipped bits. A step is a folder that appears by one rename once it is complete:

    <directory>/<step>/state/                    trainable tree, optimizer state, step, random key (by Orbax)
    <directory>/<step>/manifest/manifest.json    data position, metadata; shape, dtype, sha256 of every leaf
    <directory>/quarantine/<step>-<n>/           a step that failed its check, for a person to look at

`save_tree` writes the checkpoint one publishes: trainable.safetensors, config.json, metadata.json.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from avlm_jax import __version__
from avlm_jax.state import TrainState, Tree, flatten, unflatten
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

SCHEMA = 1
STATE, MANIFEST, QUARANTINE = "state", "manifest", "quarantine"
MANIFEST_FILE = "manifest.json"
TREE_FILE, CONFIG_FILE, METADATA_FILE = "trainable.safetensors", "config.json", "metadata.json"
THREADED_ELEMENTS = 2**22  # Below, starting threads costs more than it saves.
HASH_THREADS = 8  # hashlib frees the interpreter lock: 2 GB of LoRA state (7B) hash in half a second.


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is damaged, does not fit the run that asks for it, or could not be written."""


class Checkpointer:
    """Saves and restores `TrainState`, data position and metadata; every process calls each method."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2, async_: bool = True) -> None:
        """Opens `directory` (made if missing) and removes what an interrupted save left there.

        Args:
            directory: local folder or bucket address; one run writes to it at a time.
            keep: how many of the newest steps stay. Below 2 there is nothing to fall back to.
            async_: True: `save` returns once the arrays are copied, the writing goes on beside the training.
        """
        # Here, so that importing this module for `load_tree` alone stays cheap.
        import orbax.checkpoint as ocp
        from etils import epath

        if keep < 1:
            raise ValueError(f"checkpoint keep is {keep}; at least 1 step has to stay")
        self._ocp = ocp
        self._directory = epath.Path(directory if "://" in str(directory) else os.path.abspath(directory))
        self._manager: ocp.CheckpointManager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=async_,
                save_root_metadata=False,
            ),
            item_handlers={
                STATE: ocp.StandardCheckpointHandler(),
                MANIFEST: ocp.JsonCheckpointHandler(filename=MANIFEST_FILE),
            },
        )
        self._pending: int | None = None

    def steps(self) -> list[int]:
        """Complete steps on disk, ascending; a save under way is waited for."""
        self.wait()
        return self._steps_on_disk()

    def _steps_on_disk(self) -> list[int]:
        # Orbax keeps its own list, in which a step whose asynchronous save failed still stands.
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data_state: Mapping, metadata: Mapping) -> bool:
        """Writes `state` as `step`; the caller may donate the state's buffers as soon as this returns.

        Waits for an earlier save that is still being written.

        Args:
            step: finished optimizer updates; equals `state.step`.
            state: what to save. Frozen parameters are not part of it.
            data_state: position in the data, JSON values.
            metadata: whatever the run wants to find again (stage, versions, hash of the parent), JSON values.

        Returns:
            False if that step is there already, and nothing was written.

        Raises:
            CheckpointError: an earlier save failed while it was written.
            TypeError: data_state or metadata holds something that is not JSON.
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        tree = _as_tree(state)
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "leaves": leaf_digests(_flatten_state(tree)),
            "data_state": _json_values(data_state, "data_state"),
            "metadata": _json_values(metadata, "metadata"),
        }
        manifest["sha256"] = _digest_json(manifest)
        arguments = self._ocp.args.Composite(
            **{STATE: self._ocp.args.StandardSave(tree), MANIFEST: self._ocp.args.JsonSave(manifest)}
        )
        self._pending = step
        try:
            # force: Orbax would else skip, without a word, a step that is not larger than the latest one.
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._save_failed(step, error) from error
        return True

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(self._pending, error) from error
        self._pending = None

    def close(self) -> None:
        """Waits and frees the writer's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _save_failed(self, step: int | None, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"saving step {step} to {self._directory} failed ({type(error).__name__}: {error}); "
            f"complete steps on disk: {self._steps_on_disk() or 'none'}. "
            f"Check free space and rights, then start the same command again."
        )

    def restore_latest(self, abstract_state: TrainState) -> tuple[TrainState, dict, dict] | None:
        """The newest step that passes its checks, placed on devices as `abstract_state` says.

        A step that is damaged (unreadable, incomplete, or a leaf whose sha256 is not the manifest's) is moved
        to quarantine/ with a warning, and the next older one is tried.

        Args:
            abstract_state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`; leaves with a sharding are
                restored to it, which may be another mesh than the saving run's, others to the first local
                device.

        Returns:
            (state, data_state, metadata), or None if no step is left.

        Raises:
            CheckpointError: the step is sound but of another model or optimizer; nothing is moved.
        """
        self.wait()
        abstract = jax.tree.map(_abstract, _as_tree(abstract_state))
        for step in reversed(self._steps_on_disk()):
            try:
                manifest = self._read_manifest(step)
            except Exception as error:  # A damaged file raises whatever its parser likes.
                self._quarantine(step, error)
                continue
            self._check_fits(step, manifest, abstract)
            try:
                arguments = self._ocp.args.Composite(**{STATE: self._ocp.args.StandardRestore(abstract)})
                tree = self._manager.restore(step, args=arguments)[STATE]
                _check_digests(manifest["leaves"], _flatten_state(tree))
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # The device's trouble, not the checkpoint's.
            except Exception as error:
                self._quarantine(step, error)
                continue
            return TrainState(**tree), manifest["data_state"], manifest["metadata"]
        return None

    def _read_manifest(self, step: int) -> dict:
        arguments = self._ocp.args.Composite(**{MANIFEST: self._ocp.args.JsonRestore()})
        manifest = self._manager.restore(step, args=arguments)[MANIFEST]
        if manifest.pop("sha256", None) != _digest_json(manifest) or manifest["step"] != step:
            raise CheckpointError(f"{MANIFEST_FILE} does not match its own sha256")
        return manifest

    def _check_fits(self, step: int, manifest: dict, abstract: dict) -> None:
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{self._directory / str(step)} has schema {manifest['schema']}, this version reads {SCHEMA}"
            )
        saved = {path: (tuple(leaf["shape"]), leaf["dtype"]) for path, leaf in manifest["leaves"].items()}
        wanted = {path: (leaf.shape, leaf.dtype.name) for path, leaf in _flatten_state(abstract).items()}
        for path in sorted(saved.keys() | wanted.keys()):
            there, here = saved.get(path), wanted.get(path)
            if there != here:
                raise CheckpointError(
                    f"{self._directory / str(step)} is of another model or optimizer: "
                    f"{path} is {_spell(there)} in the checkpoint and {_spell(here)} in this run. "
                    f"Use the configuration that wrote it, or another working directory."
                )

    def _quarantine(self, step: int, error: Exception) -> None:
        """Moves a damaged step out of Orbax's sight; nothing is deleted."""
        source, target = self._directory / str(step), self._directory / QUARANTINE
        reason = f"{type(error).__name__}: {error}"
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            count = sum(1 for path in target.iterdir() if path.name.startswith(f"{step}-"))
            target = target / f"{step}-{count}"
            source.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"quarantine_{step}")
        older = self._steps_on_disk()
        logger.warning(
            "checkpoint %s is damaged (%s); moved to %s; %s",
            source,
            reason.splitlines()[0][:300],
            target,
            f"trying step {older[-1]}" if older else "no older step is left",
        )


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _flatten_state(tree: Any) -> dict[str, Any]:
    """{path: leaf}; unlike `state.flatten` it walks the optimizer's named tuples too."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _to_host(leaf: Any) -> np.ndarray:
    """The whole leaf in host memory, wherever its shards lie."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def leaf_digests(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{path: {shape, dtype, sha256}}; the hash is over the row-major bytes and thus independent of sharding.

    Leaves spread over several processes are gathered one at a time.
    """

    def digest(leaf: np.ndarray) -> dict[str, Any]:
        data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return {
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    if sum(leaf.size for leaf in flat.values()) < THREADED_ELEMENTS:
        return {path: digest(_to_host(leaf)) for path, leaf in flat.items()}
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        futures = {path: pool.submit(digest, _to_host(leaf)) for path, leaf in flat.items()}
        return {path: future.result() for path, future in futures.items()}


def _check_digests(expected: Mapping[str, dict], flat: Mapping[str, Any]) -> None:
    found = leaf_digests(flat)
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise CheckpointError(f"{path} is not what was saved: its sha256 differs from the manifest's")


def _spell(shape_and_dtype: tuple | None) -> str:
    return "absent" if shape_and_dtype is None else f"{shape_and_dtype[1]}{list(shape_and_dtype[0])}"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _digest_json(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _json_values(value: Mapping, name: str) -> Any:
    """`value` as JSON gives it back (tuples become lists): its hash agrees with the one after reading."""
    try:
        return json.loads(_canonical(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint {name} must hold JSON values only: {error}") from error


def save_tree(
    directory: str | os.PathLike, tree: Tree, config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> str:
    """Publishes a stage's trainable tree; replaces `directory` as a whole or leaves it as it was.

    Args:
        directory: local folder; becomes trainable.safetensors (paths as names), config.json, metadata.json.
        tree: nested dict of arrays.
        config: the resolved configuration, JSON values.
        metadata: stage, versions, and the lineage: "parent" is the hash of the stage checkpoint this one
            began from, or None. "hash" and "leaves" are added here.

    Returns:
        The checkpoint's hash: sha256 over paths, shapes, dtypes and contents of all leaves.
    """
    from safetensors.numpy import save_file

    flat = flatten(tree)
    digests = leaf_digests(flat)
    checkpoint_hash = _digest_json(digests)
    config = _json_values(config, "config")
    metadata = _json_values(metadata, "metadata")
    metadata |= {"schema": SCHEMA, "hash": checkpoint_hash, "leaves": digests}
    host = {path: np.ascontiguousarray(_to_host(leaf)) for path, leaf in flat.items()}
    if jax.process_index() == 0:
        target = Path(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
        staged.mkdir()
        try:
            save_file(host, staged / TREE_FILE)
            (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            (staged / METADATA_FILE).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
            for file in (*staged.iterdir(), staged):
                _flush(file)
            _replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_tree")
    return checkpoint_hash


def _flush(path: Path) -> None:
    """Without this a machine that stops may keep the rename and lose the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(staged: Path, target: Path) -> None:
    if target.exists():
        old = staged.with_suffix(".old")
        target.rename(old)
        staged.rename(target)
        shutil.rmtree(old)
    else:
        staged.rename(target)


def load_tree(directory: str | os.PathLike) -> tuple[Tree, dict[str, Any], dict[str, Any]]:
    """What `save_tree` wrote: (tree of numpy arrays, config, metadata), every leaf checked against its
    sha256.

    Raises:
        FileNotFoundError: a file of the three is missing.
        CheckpointError: a file is damaged; the message names it and the first bad leaf.
    """
    from safetensors import safe_open

    directory = Path(directory)
    for name in (TREE_FILE, CONFIG_FILE, METADATA_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no stage checkpoint: {name} is missing")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        metadata = json.loads((directory / METADATA_FILE).read_text())
        digests, checkpoint_hash = metadata["leaves"], metadata["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: {CONFIG_FILE} or {METADATA_FILE}: {error!r}") from error
    if _digest_json(digests) != checkpoint_hash:
        raise CheckpointError(f"{directory / METADATA_FILE} does not match its own hash")
    try:
        # "np" gives bf16 as ml_dtypes' type; `load_file` of safetensors.numpy refuses it.
        with safe_open(directory / TREE_FILE, framework="np") as file:
            flat = {path: file.get_tensor(path) for path in file.keys()}
    except Exception as error:  # SafetensorError derives from Exception alone.
        raise CheckpointError(f"{directory / TREE_FILE} is damaged: {error}") from error
    try:
        _check_digests(digests, flat)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / TREE_FILE}: {error}") from error
    return unflatten(flat), config, metadata


def versions() -> dict[str, str]:
    """What a result depends on besides configuration and data."""
    import flax
    import optax

    found = {"python": platform.python_version(), "avlm_jax": __version__}
    return found | {m.__name__: m.__version__ for m in (jax, flax, optax, np)}
