"""What a run can be continued from: checkpoints of the training state.

`Checkpointer` stands between the loop and Orbax, whose interfaces change, whose restore does not notice flipped bits
and whose processes wait for each other when one has failed. Orbax writes and reads the arrays; when a step counts,
what it must hold and what happens when it does not is decided here and in `step_folders`.

    <directory>/<step>/state/           trainable tree, optimizer state, step, random key (by Orbax)
    <directory>/<step>/manifest.json    data position, metadata; of every leaf shape, dtype, sha256 and its blocks'

What a finished stage publishes is another thing, see `stage_result`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from avlm_jax.checkpoints.digests import (
    damaged_leaves,
    digest_json,
    first_misfit,
    hash_blocks,
    json_values,
    merge_blocks,
    nonfinite_leaves,
    owned_blocks,
)
from avlm_jax.checkpoints.step_folders import MANIFEST_FILE, StepFolders
from avlm_jax.checkpoints.storage import CheckpointError, is_trouble, resolve
from avlm_jax.processes.agreement import Agreement, Shared
from avlm_jax.processes.multihost import Timeouts
from avlm_jax.processes.rendezvous import PeerError
from avlm_jax.state import TrainState, fields_of, flatten_state
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from etils import epath

logger = logging.getLogger(__name__)

SCHEMA = 2  # 2: a sum per block.
STATE = "state"


class _Damaged(Shared):
    """What is on disk is not what was saved."""


class Checkpointer:
    """Saves and restores `TrainState`, data position and metadata; every process calls each method.

    In a `with`, what ended the run first is the news: that the last save failed as well is only logged then.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        async_: bool = True,
        timeouts: Timeouts | None = None,
    ) -> None:
        """Opens `directory` (made if missing) and removes what an interrupted save left there.

        Args:
            directory: local folder or bucket address that all processes see; one run writes to it at a time.
            keep: how many of the newest steps stay. Below 2 there is nothing to fall back to.
            async_: True: `save` returns once the arrays are copied, hashing and writing go on beside the training.
            timeouts: how long processes wait for each other: `ready` to set up and restore, `save` to save.
        """
        # Here, so that importing this module for `load_tree` alone stays cheap.
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"checkpoint keep is {keep}; at least 1 step has to stay")
        self._ocp = ocp
        self._folders = StepFolders(directory)
        self._keep, self._async = keep, async_
        # Trained floats hardly shrink, and compressing them would take the cores from the training.
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        timeouts = timeouts or Timeouts()
        self._setup, self._saving = Agreement("restore", timeouts.ready), Agreement("save", timeouts.save)
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._setup.everywhere(lambda: self._folders.clear() if jax.process_index() == 0 else None)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except UserError as second:
            if error is None:
                raise
            logger.error("besides (%s): %s", type(error).__name__, second)

    def steps(self) -> list[int]:
        """Complete steps on disk, ascending; a save under way is waited for."""
        self.wait()
        return self._folders.steps()

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
            CheckpointError: a parameter or moment is not finite, or an earlier save failed while it was written.
            PeerError: a process did not take part.
            TypeError: data_state or metadata holds something that is not JSON.
        """
        self.wait()
        tree = fields_of(state)
        flat = flatten_state(tree)
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "processes": jax.process_count(),
            "data_state": json_values(data_state, "data_state"),
            "metadata": json_values(metadata, "metadata"),
        }
        # These copies to the host are meant, also where the loop forbids unmeant ones.
        with jax.transfer_guard("allow"):
            if bad := nonfinite_leaves(flat):
                raise CheckpointError(
                    f"step {step} is not saved: {bad[0]} holds NaN or infinity"
                    f"{f', and {len(bad) - 1} more leaves' if len(bad) > 1 else ''}; complete steps in "
                    f"{self._folders.directory}: {self._folders.steps() or 'none'}"
                )
            try:
                if (folder := self._begin(step)) is None:
                    return False
                # Orbax copies the arrays before it returns, and writes them in threads of its own.
                saving = self._handler.async_save(folder / STATE, args=self._ocp.args.PyTreeSave(tree))
                writes = asyncio.run(saving) or []
                blocks = owned_blocks(flat)
            except Exception as error:
                raise self._save_failed(step, error) from error
        shapes = {path: (tuple(leaf.shape), leaf.dtype.name) for path, leaf in flat.items()}
        self._pending = step, self._writer.submit(self._write, folder, writes, blocks, shapes, manifest)
        if not self._async:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when the save under way is on disk; CheckpointError if it failed, PeerError for want of a process."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            try:
                future.result()
            except Exception as error:
                raise self._save_failed(step, error) from error

    def close(self) -> None:
        """Waits and frees the writer's thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._handler.close()

    def _begin(self, step: int) -> epath.Path | None:
        """The folder to write to, made by process 0; None if the step is there already."""

        def make() -> str:
            if jax.process_index() or step in self._folders.steps():
                return ""
            folder = self._folders.begin(step)
            (folder / STATE).mkdir(parents=True, exist_ok=True)
            return str(folder)

        folder = self._saving.everywhere(make)[0]
        return resolve(folder) if folder else None

    def _write(self, folder: epath.Path, writes: list, blocks: dict, shapes: dict, manifest: dict) -> None:
        """The part of a save that runs beside the training, in a thread and without collectives."""

        def write() -> None:
            digests = hash_blocks(blocks)
            for future in writes:
                future.result()
            (folder / _part(jax.process_index())).write_text(json.dumps(digests))

        def commit() -> None:
            if jax.process_index():
                return
            self._handler.finalize(folder / STATE)
            parts = [folder / _part(process) for process in range(jax.process_count())]
            manifest["leaves"] = merge_blocks(shapes, [json.loads(part.read_text()) for part in parts])
            for part in parts:
                part.unlink()
            manifest["sha256"] = digest_json(manifest)
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
            self._folders.finish(manifest["step"], folder)
            self._folders.keep_newest(self._keep)

        self._saving.everywhere(write)
        self._saving.everywhere(commit)

    def _save_failed(self, step: int, error: Exception) -> UserError:
        if isinstance(error, PeerError):
            return PeerError(f"saving step {step} to {self._folders.directory} failed: {error}")
        space = self._folders.space()
        return CheckpointError(
            f"saving step {step} to {self._folders.directory} failed ({type(error).__name__}: {error}); "
            f"complete steps on disk: {self._folders.steps() or 'none'}{space and '; '}{space}. "
            f"Check free space and rights, then start the same command again."
        )

    def restore_latest(self, abstract_state: TrainState) -> tuple[TrainState, dict, dict] | None:
        """The newest step that passes its checks, placed on devices as `abstract_state` says.

        A step that is damaged (incomplete, or a leaf whose sha256 is not the manifest's) is moved to quarantine/
        with a warning, by all processes if one finds it so, and the next older one is tried.

        Args:
            abstract_state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`; leaves with a sharding are
                restored to it, which may be of another mesh and another number of processes than the saving
                run's, others to the first local device.

        Returns:
            (state, data_state, metadata), or None if no step was ever there.

        Raises:
            CheckpointError: the step is sound but of another model, optimizer or version, or cannot be read for want
                of rights, network or device; nothing is moved then. Or there were steps, and none of them is sound.
            PeerError: a process did not take part.
        """
        self.wait()
        abstract = jax.tree.map(_abstract, fields_of(abstract_state))
        steps = self._setup.everywhere(self._folders.steps)[0]
        while steps:
            step = steps.pop()
            try:
                with jax.transfer_guard("allow"):
                    manifest = self._read_manifest(step)
                    tree = self._read_state(step, manifest, abstract)
                return TrainState(**tree), manifest["data_state"], manifest["metadata"]
            except _Damaged as damage:
                self._quarantine(step, str(damage), steps)
        if self._setup.everywhere(self._folders.quarantine.exists)[0]:
            raise CheckpointError(
                f"no sound step is left in {self._folders.directory}; the damaged ones lie in {self._folders.quarantine}, "
                f"see the warnings of the start that moved them. To train the stage from its beginning, delete "
                f"{self._folders.directory}; then start the same command again"
            )
        return None

    def _read_manifest(self, step: int) -> dict:
        manifest: dict = {}
        file = self._folders[step] / MANIFEST_FILE

        def read() -> str:
            try:
                content = file.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                if (file.parent / "manifest" / MANIFEST_FILE).exists():  # Where schema 1 had it.
                    raise _other_schema(file.parent, 1) from error
                raise _Damaged(f"{file}: {type(error).__name__}: {error}") from error
            except (
                Exception
            ) as error:  # Nothing is parsed yet: whatever a bucket's client raises is no damage.
                raise _unreadable(file, error) from error
            try:
                manifest.update(json.loads(content))
                told, found = manifest.pop("sha256"), digest_json(manifest)
                sound = told == found and manifest["step"] == step
            except Exception as error:  # A damaged file raises whatever its parser likes.
                raise _Damaged(f"{file}: {type(error).__name__}: {error}") from error
            if not sound:
                raise _Damaged(f"{file} does not match its own sha256")
            if manifest["schema"] != SCHEMA:
                raise _other_schema(file.parent, manifest["schema"])
            return told

        sums = self._setup.everywhere(read, _Damaged)
        if len(set(sums)) > 1:
            raise _Damaged(f"{file} is not the same for all processes: {sums}")
        return manifest

    def _read_state(self, step: int, manifest: dict, abstract: dict) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        folder = self._folders[step] / STATE

        def read() -> None:
            if misfit := first_misfit(manifest["leaves"], flatten_state(abstract)):
                raise CheckpointError(
                    f"{folder.parent} is of another model or optimizer: {misfit}. "
                    f"Use the configuration that wrote it, or another working directory."
                )
            try:
                wanted = self._ocp.checkpoint_utils.construct_restore_args(abstract)
                tree.update(
                    self._handler.restore(
                        folder, args=self._ocp.args.PyTreeRestore(item=abstract, restore_args=wanted)
                    )
                )
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # The device's trouble, not the checkpoint's.
            except Exception as error:
                if is_trouble(error):
                    raise _unreadable(folder, error) from error
                raise _Damaged(f"{folder}: {type(error).__name__}: {error}") from error

        def check() -> None:
            if bad := damaged_leaves(manifest["leaves"], flatten_state(tree)):
                more = f", and {len(bad) - 1} more blocks" if len(bad) > 1 else ""
                raise _Damaged(
                    f"{folder}: {bad[0]} is not what was saved{more}: its sha256 differs from the manifest's"
                )

        self._setup.everywhere(read, _Damaged)
        self._setup.everywhere(check, _Damaged)
        return tree

    def _quarantine(self, step: int, reason: str, older: list[int]) -> None:
        """Moves a damaged step out of sight; nothing is deleted."""

        def move() -> str:
            return "" if jax.process_index() else str(self._folders.set_aside(step))

        target = self._setup.everywhere(move)[0]
        logger.warning(
            "checkpoint %s is damaged (%s); moved to %s; %s",
            self._folders[step],
            " ".join(reason.split())[:500],
            target,
            f"trying step {older[-1]}" if older else "no older step is left",
        )


def _part(process: int) -> str:
    return f"digests-{process}.json"


def _unreadable(path: epath.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read now ({type(error).__name__}: {' '.join(str(error).split())[:500]}); nothing was moved, the "
        f"step may be sound. Mend the access to it (mount, network, rights, disk), then start the same command again"
    )


def _other_schema(folder: epath.Path, schema: Any) -> CheckpointError:
    return CheckpointError(
        f"{folder} has schema {schema}, this version reads {SCHEMA}; finish the stage with the version that began it, "
        f"or delete {folder.parent} to train the stage from its beginning"
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
