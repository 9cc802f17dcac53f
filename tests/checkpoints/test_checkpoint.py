"""What comes back from disk is what was saved, to the bit; what is damaged is never taken for sound."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from avlm_jax import optim
from avlm_jax.checkpoints import checkpoint
from avlm_jax.checkpoints.checkpoint import Checkpointer
from avlm_jax.checkpoints.digests import digest_json
from avlm_jax.checkpoints.stage_result import load_tree, save_tree
from avlm_jax.checkpoints.storage import CheckpointError, naming, resolve
from avlm_jax.processes.rendezvous import PeerError
from avlm_jax.state import TrainState, flatten, unflatten
from tests import fake_gcs

# Orbax's readers are coroutines; when one fails on a damaged file its siblings complain at collection.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step: int, width: int = 24) -> TrainState:
    """A state whose every leaf depends on `step`, with the values that are easiest to lose."""
    generator = np.random.default_rng(step)
    awkward = np.array([-0.0, 0.0, 3.4e38, -3.4e38, 1e-45, np.pi], np.float32)
    trainable = {
        "connector": {"proj": {"kernel": generator.normal(size=(width, 40)).astype(np.float32)}},
        "llm": {
            "lora_a": generator.normal(size=(2, width)).astype(ml_dtypes.bfloat16),
            "lora_b": np.full((3, 5), -0.0, np.float32),
            "awkward": awkward,
        },
    }
    trainable = jax.tree.map(jnp.asarray, trainable)
    state = TrainState.create(trainable, optim.make_optimizer(optim.OptimConfig()), seed=step)
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), state.opt_state)
    return state.replace(step=jnp.asarray(step, jnp.int32), opt_state=moments)


def assert_same_bits(found: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def fill(directory: Path, steps: tuple[int, ...], keep: int = 3) -> None:
    checkpointer = Checkpointer(directory, keep=keep)
    for step in steps:
        assert checkpointer.save(step, make_state(step), {"next_index": step * 8}, {"stage": "2a"})
    checkpointer.close()


def test_restores_the_newest_step_bit_for_bit_and_keeps_two(tmp_path: Path) -> None:
    fill(tmp_path, (2, 4, 6), keep=2)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [4, 6]
    state, data_state, metadata = checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0)))
    assert_same_bits(state, make_state(6))
    assert (data_state, metadata) == ({"next_index": 48}, {"stage": "2a"})
    assert checkpointer.save(6, state, {}, {}) is False  # it is there already
    checkpointer.close()


def test_an_empty_directory_has_nothing_to_restore(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "new")
    assert checkpointer.restore_latest(make_state(0)) is None
    checkpointer.close()


def test_frozen_parameters_are_not_on_disk(tmp_path: Path) -> None:
    fill(tmp_path, (1,))
    leaves = json.loads((tmp_path / "1/manifest.json").read_text())["leaves"]
    trainable = set(flatten(make_state(1).trainable))
    roots = {"step", "rng", "skipped"} | {f"trainable/{path}" for path in trainable}
    assert roots <= set(leaves)
    moments = {path for path in leaves if path.startswith("opt_state/") and not path.endswith("/count")}
    assert all(path.endswith(tuple(trainable)) for path in moments)
    assert len(leaves) == 3 + 1 + 3 * len(trainable)  # Adam has a count.


def test_buffers_may_be_donated_while_the_save_runs(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    train_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 1, state), donate_argnums=0)
    state = make_state(3, width=20_000)  # megabytes: the writing outlasts the next step
    checkpointer.save(3, state, {}, {})
    # XLA either overwrites the buffers or, where the writer still reads them, copies; the saved values stay.
    jax.block_until_ready(train_step(state))
    restored, _, _ = checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0, width=20_000)))
    assert_same_bits(restored, make_state(3, width=20_000))
    checkpointer.close()


def test_a_save_does_not_wait_for_hashing_or_writing(tmp_path: Path, monkeypatch) -> None:
    """Nor does it matter that the buffers are donated before they are hashed."""
    donated = threading.Event()
    hash_blocks = checkpoint.hash_blocks

    def hash_late(blocks: dict) -> dict:
        assert donated.wait(60)
        return hash_blocks(blocks)

    monkeypatch.setattr(checkpoint, "hash_blocks", hash_late)
    train_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 1, state), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path)
    state = jax.block_until_ready(make_state(3, width=400_000))  # 190 MB with its moments
    begun = time.monotonic()
    checkpointer.save(3, state, {}, {})
    blocked = time.monotonic() - begun
    state = jax.block_until_ready(train_step(state))
    assert not (tmp_path / "3").exists()
    donated.set()
    assert checkpointer.steps() == [3]
    print(
        f"a save of {sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20:.0f} MiB blocks {blocked:.2f} s"
    )
    assert blocked < 10  # The hashing waits a minute; what is left is a look for NaN and a copy.
    restored, _, _ = checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0, width=400_000)))
    assert_same_bits(restored, make_state(3, width=400_000))
    checkpointer.close()


@pytest.mark.slow
def test_a_gibibyte_blocks_the_step_for_less_than_a_second(tmp_path: Path) -> None:
    width = 2**30 // 12 // 40
    state = jax.block_until_ready(make_state(1, width=width))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {}, {})  # It compiles the look for NaN.
    checkpointer.wait()
    begun = time.monotonic()
    checkpointer.save(2, state, {}, {})
    blocked = time.monotonic() - begun
    begun = time.monotonic()
    checkpointer.wait()
    written = time.monotonic() - begun
    begun = time.monotonic()
    restored = jax.block_until_ready(checkpointer.restore_latest(state)[0])
    read = time.monotonic() - begun
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(restored)) / 2**30
    print(
        f"{size:.2f} GiB: save blocks {blocked:.2f} s, is on disk {written:.2f} s later, restored in {read:.2f} s"
    )
    checkpointer.close()
    assert blocked < 1


@pytest.mark.parametrize("place", ["trainable", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, place: str, value: float) -> None:
    def spoil(path: tuple, leaf: jax.Array) -> jax.Array:
        spoilt = "lora_a" in jax.tree_util.keystr(path) and leaf.ndim == 2
        return leaf.at[-1, -1].set(value) if spoilt else leaf

    state = make_state(2)
    bad = jax.tree_util.tree_map_with_path(spoil, getattr(state, place))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1), {}, {})
    with pytest.raises(CheckpointError, match=rf"step 2 is not saved: {place}/.*lora_a holds NaN .*\[1\]"):
        checkpointer.save(2, state.replace(**{place: bad}), {}, {})
    assert checkpointer.steps() == [1] and not list(tmp_path.glob("*.partial"))
    checkpointer.close()


def test_where_no_sound_step_is_left_the_run_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    fill(tmp_path, (10, 20))
    for step in (10, 20):
        (tmp_path / f"{step}/manifest.json").unlink()
    for _ in range(2):  # Also of a later start, which finds nothing to move any more.
        told = rf"no sound step is left in {tmp_path}; the damaged ones lie in {tmp_path}/quarantine, .* delete {tmp_path};"
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=told):
            checkpointer.restore_latest(make_state(0))
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["10-0", "20-0"]
    shutil.rmtree(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(make_state(0)) is None


# As TensorStore words them; what a file of another length or none raises is damage, see DAMAGES.
TROUBLES = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError('PERMISSION_DENIED: Error reading "rows": local file "d/0"'),
    ValueError('UNAVAILABLE: Error reading "rows": gs://bucket/3/state'),
    ValueError("UNKNOWN: Error reading local file \"d/0\": Input/output error [os_error_code='5']"),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda error: str(error).split(":")[0])
@pytest.mark.parametrize("place", ["manifest.json", "state"])
def test_what_cannot_be_read_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, trouble: Exception
) -> None:
    fill(tmp_path, (10, 20))

    def fails(*_: object, **__: object) -> None:
        raise trouble

    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patched:
            if place == "state":
                patched.setattr(checkpointer._handler, "restore", fails)
            else:
                patched.setattr(type(resolve(tmp_path)), "read_bytes", fails)
            told = rf"{tmp_path}/20/{place} cannot be read now .*; nothing was moved, .* Mend the access"
            with pytest.raises(CheckpointError, match=told):
                checkpointer.restore_latest(make_state(0))
        assert checkpointer.steps() == [10, 20] and not (tmp_path / "quarantine").exists()
        assert_same_bits(checkpointer.restore_latest(make_state(0))[0], make_state(20))


@pytest.mark.parametrize("earlier", [None, ValueError("what ended the run")])
def test_a_failed_save_does_not_hide_what_ended_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    earlier: Exception | None,
) -> None:
    monkeypatch.setattr(checkpoint, "hash_blocks", lambda blocks: 1 / 0)
    with pytest.raises(type(earlier) if earlier else CheckpointError), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, {})
        if earlier is not None:
            raise earlier
    assert ("saving step 1" in caplog.text) == (earlier is not None)


def test_a_process_that_is_lost_during_a_save_ends_the_others_by_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> list[str]:
        raise PeerError("save: process 1 (host-b) did not come within 34 s")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, {})
        checkpointer.wait()
        monkeypatch.setattr(checkpointer._saving, "exchange", lost)
        with pytest.raises(
            PeerError, match=rf"saving step 2 to {tmp_path} failed: save: process 1 \(host-b\)"
        ):
            checkpointer.save(2, make_state(2), {}, {})
        monkeypatch.undo()
        hash_blocks = checkpoint.hash_blocks

        def then_lost(blocks: dict) -> dict:
            monkeypatch.setattr(checkpointer._saving, "exchange", lost)
            return hash_blocks(blocks)

        monkeypatch.setattr(checkpoint, "hash_blocks", then_lost)
        checkpointer.save(2, make_state(2), {}, {})
        with pytest.raises(PeerError, match="saving step 2"):
            checkpointer.wait()


@pytest.mark.parametrize("schema", [1, 3])
def test_another_version_is_told_and_moves_nothing(tmp_path: Path, schema: int) -> None:
    fill(tmp_path, (1,))
    file = tmp_path / "1/manifest.json"
    manifest = json.loads(file.read_text()) | {"schema": schema}
    manifest["sha256"] = digest_json({k: v for k, v in manifest.items() if k != "sha256"})
    if schema == 1:
        file.unlink()
        file = tmp_path / "1/manifest/manifest.json"
        file.parent.mkdir()
    file.write_text(json.dumps(manifest))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"has schema {schema}, this version reads 2; finish the stage"
    ):
        checkpointer.restore_latest(make_state(0))
    assert checkpointer.steps() == [1]
    checkpointer.close()


def data_files(step: Path) -> list[Path]:
    """The files that hold array contents, largest first."""
    files = [path for path in step.rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def damage_flip(step: Path) -> None:
    file = data_files(step)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def damage_truncate(step: Path) -> None:
    file = data_files(step)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_remove(step: Path) -> None:
    data_files(step)[0].unlink()


def damage_manifest(step: Path) -> None:
    file = step / "manifest.json"
    file.write_text(re.sub(r'"next_index": \d+', '"next_index": 7', file.read_text()))


def damage_manifest_syntax(step: Path) -> None:
    (step / "manifest.json").write_bytes(b"\xff{")


DAMAGES = [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_manifest_syntax]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_step_is_quarantined_and_the_older_one_used(
    tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, (10, 20))
    damage(tmp_path / "20")
    checkpointer = Checkpointer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="avlm_jax.checkpoints.checkpoint"):
        state, data_state, _ = checkpointer.restore_latest(make_state(0))
    assert_same_bits(state, make_state(10))
    assert data_state == {"next_index": 80}
    assert str(tmp_path / "20") in caplog.text and "trying step 10" in caplog.text
    if damage is damage_flip:  # Orbax reads it without a complaint; our sum is what notices
        assert "sha256 differs" in caplog.text
    assert checkpointer.steps() == [10] and (tmp_path / "quarantine/20-0/state").is_dir()
    # The run that goes on reaches the same step again.
    assert checkpointer.save(20, make_state(20), {"next_index": 160}, {})
    assert_same_bits(checkpointer.restore_latest(make_state(0))[0], make_state(20))
    checkpointer.close()


def damage_somewhere(files: list[Path], generator: np.random.Generator, number: int) -> tuple[Path, bytes]:
    """A flip of one bit, or, every fifth time, a truncation; returns the file and what it held.

    Two thirds of the damages fall on any byte of the folder, one third on any file, however small.
    """
    by_size = np.array([path.stat().st_size for path in files], np.float64)
    by_size /= by_size.sum()
    file = files[generator.choice(len(files), p=None if number % 3 == 0 else by_size)]
    original = file.read_bytes()
    content = bytearray(original)
    if number % 5 == 4:
        del content[generator.integers(len(content)) :]
    else:
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    file.write_bytes(content)
    return file, original


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_no_damage_anywhere_in_a_step_is_silent(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, (5,))
    generator = np.random.default_rng(0)
    expected = make_state(6, width=500)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(6, expected, {"next_index": 40}, {})
    checkpointer.close()
    files = [path for path in sorted((tmp_path / "6").rglob("*")) if path.is_file() and path.stat().st_size]
    found = harmless = 0
    older = jax.eval_shape(lambda: make_state(0, width=500))
    for number in range(count):
        file, original = damage_somewhere(files, generator, number)
        checkpointer = Checkpointer(tmp_path)
        caplog.clear()
        try:
            restored = checkpointer.restore_latest(older)
        except CheckpointError as error:  # It fell back to step 5, which is of another size.
            restored = None
            assert str(tmp_path / "5") in str(error)
        checkpointer.close()
        if restored is None:
            found += 1
            assert "is damaged" in caplog.text and str(tmp_path / "6") in caplog.text
            next((tmp_path / "quarantine").iterdir()).rename(tmp_path / "6")
        else:  # a byte that carries nothing: what comes back must be right
            harmless += 1
            assert_same_bits(restored[0], expected)
            assert restored[1] == {"next_index": 40}
        file.write_bytes(original)
    print(
        f"{count} flips and truncations in {len(files)} files: {found} found, {harmless} harmless, 0 silent"
    )
    assert found >= count // 2


def test_another_model_is_an_error_and_moves_nothing(tmp_path: Path) -> None:
    fill(tmp_path, (1,))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"connector/proj/kernel is float32\[24, 40\] in the checkpoint"
    ):
        checkpointer.restore_latest(make_state(0, width=25))
    state = make_state(0)
    more = state.replace(trainable=state.trainable | {"vision": {"kernel": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match="trainable/vision/kernel is absent in the checkpoint"):
        checkpointer.restore_latest(more)
    assert checkpointer.steps() == [1]
    checkpointer.close()


def test_only_json_enters_the_manifest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(TypeError, match="data_state"):
        checkpointer.save(1, make_state(1), {"next_index": np.int64(3)}, {})
    checkpointer.save(1, make_state(1), {"indices": (1, 2)}, {"name": "Grüße"})
    _, data_state, metadata = checkpointer.restore_latest(make_state(0))
    assert data_state == {"indices": [1, 2]} and metadata == {"name": "Grüße"}
    checkpointer.close()


KILLED_DURING_SAVE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, make_state
checkpointer = Checkpointer({directory!r})
checkpointer.save(1, make_state(1, width=100_000), {{}}, {{}})
checkpointer.wait()
checkpointer.save(2, make_state(2, width=100_000), {{}}, {{}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_during_a_save_leaves_the_older_step(tmp_path: Path) -> None:
    program = KILLED_DURING_SAVE.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    unfinished = [path.name for path in tmp_path.iterdir() if path.name.startswith("2")]
    assert unfinished and "2" not in unfinished  # the kill did hit the middle of the save
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [1]
    state, _, _ = checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0, width=100_000)))
    assert_same_bits(state, make_state(1, width=100_000))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # leftovers are cleared away
    assert checkpointer.save(2, make_state(2), {}, {})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]


def test_a_failed_write_is_reported_and_does_not_count_as_a_step(tmp_path: Path, monkeypatch) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1), {}, {})
    checkpointer.wait()
    path_type = type(resolve(tmp_path))
    write_text = path_type.write_text

    def full_disk(path, content: str, *args, **kwargs) -> int:
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return write_text(path, content, *args, **kwargs)

    monkeypatch.setattr(path_type, "write_text", full_disk)
    with pytest.raises(
        CheckpointError, match=r"saving step 2 .*No space left.*complete steps on disk: \[1\]"
    ):
        checkpointer.save(2, make_state(2), {}, {})
        checkpointer.wait()
    monkeypatch.undo()
    assert_same_bits(checkpointer.restore_latest(make_state(0))[0], make_state(1))
    assert checkpointer.save(2, make_state(2), {}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def published(directory: Path | str) -> tuple[dict, str]:
    tree = make_state(9).trainable
    return tree, save_tree(directory, tree, {"model": {"width": 8}}, {"stage": "1a", "parent": None})


def test_published_tree_round_trip(tmp_path: Path) -> None:
    tree, digest = published(tmp_path / "deep/1a")
    found, config, metadata = load_tree(tmp_path / "deep/1a")
    assert flatten(found).keys() == flatten(tree).keys()
    for path, leaf in flatten(found).items():
        assert leaf.dtype == flatten(tree)[path].dtype
        assert leaf.tobytes() == np.asarray(flatten(tree)[path]).tobytes()
    assert config == {"model": {"width": 8}}
    assert (metadata["stage"], metadata["parent"], metadata["hash"]) == ("1a", None, digest)


def test_published_hash_depends_on_content_alone(tmp_path: Path) -> None:
    tree, digest = published(tmp_path / "1a")
    assert save_tree(tmp_path / "1a", tree, {}, {}) == digest
    assert load_tree(tmp_path / "1a")[1] == {}  # the older one is replaced
    flat = flatten(tree)
    flat["llm/lora_b"] = -flat["llm/lora_b"]  # -0.0 becomes 0.0
    assert save_tree(tmp_path / "1b", unflatten(flat), {}, {"parent": digest}) != digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1a", "1b"]


def test_what_killed_runs_left_beside_a_published_tree_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is an exception that nobody cleans up after."""
    keep = [tmp_path / name for name in (".final.tmp", ".final.0123456.tmp", ".other.01234567.tmp")]
    for path in keep:
        path.mkdir()
    path_type = type(resolve(tmp_path))
    rename, rmtree = path_type.rename, path_type.rmtree

    def killed(count: int) -> None:
        """While the folder is put in its place, at the `count`th rename."""
        left = iter(range(count - 1))

        def die(path, to):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(path, to)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(path_type, "rename", die)
            patched.setattr(path_type, "rmtree", lambda path: None)
            published(tmp_path / "final")

    killed(1)
    assert len(list(tmp_path.iterdir())) == 4
    published(tmp_path / "final")
    for count in (1, 2):
        killed(count)
    assert not (tmp_path / "final").exists() and list(tmp_path.glob(".final.*.old"))
    published(tmp_path / "final")
    assert path_type.rmtree is rmtree and set(tmp_path.iterdir()) == {*keep, tmp_path / "final"}
    load_tree(tmp_path / "final")


def test_a_damaged_published_tree_is_refused(tmp_path: Path) -> None:
    published(tmp_path / "1a")
    weights = tmp_path / "1a/trainable.safetensors"
    original = weights.read_bytes()
    flipped = bytearray(original)
    flipped[-3] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"trainable.safetensors: .*sha256"):
        load_tree(tmp_path / "1a")
    weights.write_bytes(original[:-5])
    with pytest.raises(CheckpointError, match="trainable.safetensors is damaged"):
        load_tree(tmp_path / "1a")
    weights.write_bytes(original)
    metadata = tmp_path / "1a/metadata.json"
    metadata.write_text(metadata.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(CheckpointError, match="metadata.json does not match"):
        load_tree(tmp_path / "1a")
    published(tmp_path / "1a")
    config = tmp_path / "1a/config.json"
    config.write_text(config.read_text().replace("8", "9"))
    with pytest.raises(CheckpointError, match="config.json is not what was published"):
        load_tree(tmp_path / "1a")
    metadata.unlink()
    with pytest.raises(FileNotFoundError, match="metadata.json is missing"):
        load_tree(tmp_path / "1a")


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_no_damage_of_a_published_tree_is_silent(tmp_path: Path, count: int) -> None:
    published(tmp_path / "1a")
    tree, config, metadata = load_tree(tmp_path / "1a")
    generator, files = np.random.default_rng(0), sorted((tmp_path / "1a").iterdir())
    found = harmless = 0
    for number in range(count):
        file, original = damage_somewhere(files, generator, number)
        try:
            other = load_tree(tmp_path / "1a")
        except CheckpointError as error:
            found += 1
            assert str(tmp_path / "1a") in str(error)
        else:
            harmless += 1
            assert other[1:] == (config, metadata)
            for path, leaf in flatten(other[0]).items():
                assert leaf.tobytes() == flatten(tree)[path].tobytes()
        file.write_bytes(original)
    print(f"{count} flips and truncations of a published stage: {found} found, {harmless} harmless, 0 silent")
    assert found >= count // 2


def test_what_an_older_version_published_is_still_read(tmp_path: Path) -> None:
    tree, digest = published(tmp_path / "1a")
    file = tmp_path / "1a/metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["sha256"], metadata["config_sha256"]
    file.write_text(json.dumps(metadata | {"schema": 1}))
    assert load_tree(tmp_path / "1a")[2]["hash"] == digest
    file.write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not match its own hash"):
        load_tree(tmp_path / "1a")


def test_a_stage_is_published_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path))
    fake_gcs.register()
    tree, digest = published("gs://bucket/run/1a/final")
    written = sorted((tmp_path / "bucket/run/1a/final").iterdir())
    assert [path.name for path in written] == ["config.json", "metadata.json", "trainable.safetensors"]
    found, config, metadata = load_tree("gs://bucket/run/1a/final")
    assert (config, metadata["hash"]) == ({"model": {"width": 8}}, digest)
    assert {p: x.tobytes() for p, x in flatten(found).items()} == {
        p: np.asarray(x).tobytes() for p, x in flatten(tree).items()
    }
    flipped = bytearray(written[2].read_bytes())
    flipped[-1] ^= 1
    written[2].write_bytes(flipped)
    with pytest.raises(CheckpointError, match="gs://bucket/run/1a/final/trainable.safetensors: .*sha256"):
        load_tree("gs://bucket/run/1a/final")
    assert published("gs://bucket/run/1a/final")[1] == digest
    load_tree("gs://bucket/run/1a/final")


def test_a_full_disk_that_names_no_file_gets_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path):
        Path("/dev/full").write_text("a line")
    assert caught.value.filename == str(tmp_path)
    # With a name these would lose their text, or be taken for something that a user can mend.
    for error in (OSError("a reader's own words"), PermissionError(1, "Operation not permitted")):
        before = str(error)
        with pytest.raises(OSError) as caught, naming(tmp_path):
            raise error
        assert str(caught.value) == before and caught.value.filename is None
