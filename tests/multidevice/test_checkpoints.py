"""Checkpoints of many devices and processes: restored to the bit anywhere, and all processes agree on what is bad."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process_group import Group

ROOT = Path(__file__).parents[2]

# argv: process, processes, port, directory, action, mesh as "data,fsdp,tensor"; prints one line of JSON.
PROGRAM = """
import json, logging, sys
import jax
index, count, port = map(int, sys.argv[1:4])
directory, action = sys.argv[4:6]
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import ml_dtypes, numpy as np
from jax.sharding import PartitionSpec as P
from avlm_jax.checkpoints import checkpoint
from avlm_jax import optim
from avlm_jax.sharding import make_mesh, param_shardings, state_shardings
from avlm_jax.state import TrainState

warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("avlm_jax").addHandler(Keep(logging.WARNING))

RULES = [("rows", P("fsdp")), ("columns", P(None, "fsdp")), ("both", P("fsdp", "tensor")), ("depth", P(None, None, "tensor"))]
mesh = make_mesh(*map(int, sys.argv[6].split(",")))

def host(step):
    generator = np.random.default_rng(step)
    return {
        "rows": generator.normal(size=(16, 24)).astype(np.float32),
        "columns": generator.normal(size=(6, 32)).astype(ml_dtypes.bfloat16),
        "both": np.full((8, 16), -0.0, np.float32),
        "depth": generator.integers(0, 2, (3, 5, 8)).astype(np.float32) * np.float32(1e-45),
        "whole": np.float32(step) + np.arange(7, dtype=np.float32),
        "scalar": np.float32(-0.0),
    }

def state_at(step):
    abstract = jax.eval_shape(lambda: TrainState.create(host(0), optim.make_optimizer(optim.OptimConfig()), seed=0))
    shardings = state_shardings(abstract, mesh, param_shardings(abstract.trainable, mesh, RULES))
    filled = jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), abstract).replace(trainable=host(step))
    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.tree.map(put, filled, shardings)

def same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype, (ours.sharding, theirs.sharding)
        for one, two in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            assert np.asarray(one.data).tobytes() == np.asarray(two.data).tobytes()
    return True

result = {}
checkpointer = checkpoint.Checkpointer(directory, keep=3)
if action.startswith("save"):
    if action == "save-fails" and index == count - 1:
        def full(*_):
            raise OSError(28, "No space left on device")
        checkpoint.hash_blocks = full
    for step in map(int, sys.argv[7:]):
        state = state_at(step)
        try:
            checkpointer.save(step, state, {"at": step}, {})
            checkpointer.wait()
        except checkpoint.CheckpointError as error:
            result["error"] = str(error)
else:
    gathers, real = [], checkpoint.damaged_leaves
    from avlm_jax.checkpoints import digests
    to_host = digests.to_host
    digests.to_host = lambda leaf: gathers.append(leaf.shape) or to_host(leaf)
    if action == "restore-one-sees-damage" and index == count - 1:
        seen = []
        def one_bad(leaves, flat):
            real(leaves, flat)
            return [] if seen else seen.append(1) or ["trainable/rows"]
        checkpoint.damaged_leaves = one_bad
    if action == "restore-one-cannot-read" and index == count - 1:
        handler, tried = checkpointer._handler, []
        restore = handler.restore
        def fails_once(*args, **kwargs):
            if not tried:
                tried.append(1)
                raise ValueError("cannot read")
            return restore(*args, **kwargs)
        handler.restore = fails_once
    found = checkpointer.restore_latest(state_at(0))
    if found is not None:
        step = int(found[0].step)
        result = {"step": step, "same": same(found[0], state_at(step)), "data": found[1], "gathers": len(gathers)}
result |= {"steps": checkpointer.steps(), "warnings": warnings}
checkpointer.close()
print(json.dumps(result), flush=True)
"""


def run(
    directory: Path, action: str, mesh: str, *steps: int, processes: int = 1, devices: int = 8
) -> list[dict]:
    """Each process's result; `devices` is their number in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM]
            + [str(word) for word in (index, processes, port, directory, action, mesh, *steps)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    results = []
    for process in started:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise
        assert process.returncode == 0, err[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


def flip(step: Path) -> None:
    """One bit of the largest file of array contents."""
    file = max((p for p in step.rglob("d/*") if p.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def spoil(step: Path) -> None:
    """Bits here and there in all files of array contents: of many small blocks a single one may lie where nothing reads it."""
    for file in (path for path in step.rglob("d/*") if path.is_file()):
        content = bytearray(file.read_bytes())
        for place in range(len(content) // 2, len(content), 16):
            content[place] ^= 4
        file.write_bytes(content)


@pytest.mark.multidevice
def test_any_other_mesh_and_number_of_processes_restores_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path, "save", "2,2,2", 1, 2)
    manifest = json.loads((tmp_path / "2" / "manifest.json").read_text())
    assert len(manifest["leaves"]["trainable/both"]["blocks"]) == 4
    assert len(manifest["leaves"]["trainable/whole"]["blocks"]) == 1
    for mesh, devices, processes in (("1,4,1", 4, 1), ("1,1,1", 1, 1), ("1,1,8", 8, 2)):
        for found in run(tmp_path, "restore", mesh, devices=devices, processes=processes):
            assert (found["step"], found["same"], found["data"]) == (2, True, {"at": 2})
            assert found["warnings"] == []
            assert found["gathers"] == 0 or processes > 1
    spoil(tmp_path / "2")
    (found,) = run(tmp_path, "restore", "1,1,4", devices=4)
    assert (found["step"], found["same"]) == (1, True) and "trying step 1" in found["warnings"][0]


@pytest.mark.multidevice
def test_two_processes_save_what_one_and_two_restore(tmp_path: Path) -> None:
    for found in run(tmp_path, "save", "1,8,1", 1, 2, 3, 4, processes=2):
        assert found["steps"] == [2, 3, 4] and "error" not in found
    leaves = json.loads((tmp_path / "4" / "manifest.json").read_text())["leaves"]
    assert len(leaves["trainable/rows"]["blocks"]) == 8
    assert not list(tmp_path.glob("4/digests-*")) and not list(tmp_path.glob("*.partial"))
    (one,) = run(tmp_path, "restore", "1,1,1", devices=1)
    assert (one["step"], one["same"], one["warnings"]) == (4, True, [])
    # As it was saved: no leaf is gathered.
    for found in run(tmp_path, "restore", "1,8,1", processes=2):
        assert (found["step"], found["same"], found["gathers"]) == (4, True, 0)


@pytest.mark.multidevice
def test_blocks_that_lie_across_processes_are_gathered_and_checked(tmp_path: Path) -> None:
    run(tmp_path, "save", "1,1,1", 1, 2, devices=1)
    for found in run(tmp_path, "restore", "1,8,1", processes=2):
        assert (found["step"], found["same"]) == (2, True) and found["gathers"] > 0
    flip(tmp_path / "2")
    for found in run(tmp_path, "restore", "1,8,1", processes=2):
        assert (found["step"], found["same"]) == (1, True)
        assert "sha256 differs" in found["warnings"][0] and "trying step 1" in found["warnings"][0]


@pytest.mark.multidevice
def test_what_one_process_finds_bad_is_bad_for_all(tmp_path: Path) -> None:
    run(tmp_path, "save", "1,2,1", 1, 2, 3, devices=2)
    for action, good in (("restore-one-sees-damage", 2), ("restore-one-cannot-read", 1)):
        results = run(tmp_path, action, "1,2,1", devices=2, processes=2)
        for found in results:
            assert (found["step"], found["same"], found["steps"]) == (good, True, [1, 2][:good])
            assert "process 1:" in found["warnings"][0]
        assert results[0]["warnings"] == results[1]["warnings"]
        assert (tmp_path / "quarantine" / f"{good + 1}-0" / "manifest.json").exists()


@pytest.mark.multidevice
def test_a_save_that_fails_in_one_process_fails_in_all(tmp_path: Path) -> None:
    run(tmp_path, "save", "1,2,1", 1, devices=2, processes=2)
    first, second = run(tmp_path, "save-fails", "1,2,1", 2, devices=2, processes=2)
    for found in (first, second):
        assert found["steps"] == [1]
        assert re.search(r"saving step 2 .*No space left.*complete steps on disk: \[1\]", found["error"])
    assert "process 1: OSError" in first["error"]
    (tmp_path / "1" / "manifest.json").stat()
    for found in run(tmp_path, "restore", "1,2,1", devices=2, processes=2):
        assert (found["step"], found["same"]) == (1, True)
    assert not list(tmp_path.glob("*.partial"))


# argv: directory, what becomes of process 1 while it saves.
LOSES_ONE = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from avlm_jax.processes import agreement
from avlm_jax.checkpoints import checkpoint
from avlm_jax import optim
from avlm_jax.processes.multihost import Timeouts, initialize, leave
from avlm_jax.processes.rendezvous import PeerError
from avlm_jax.sharding import make_mesh
from avlm_jax.state import TrainState

directory, fate = sys.argv[1:]
timeouts = Timeouts(save=300 if fate == "killed" else 4)
initialize(timeouts)
agreement.LOST_SECONDS = 6.0
everywhere = jax.sharding.NamedSharding(make_mesh(), P())
state = TrainState.create({"kernel": np.ones((4, 4), np.float32)}, optim.make_optimizer(optim.OptimConfig()), seed=0)
def put(leaf):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])
state = jax.tree.map(put, state)
def stays_away(blocks):
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
if jax.process_index() == 1:
    checkpoint.hash_blocks = stays_away
try:
    with checkpoint.Checkpointer(directory, timeouts=timeouts) as checkpointer:
        checkpointer.save(1, state, {}, {})
        print("saves", flush=True)
except PeerError as error:
    print(error, flush=True)
    leave(error.exit_code, str(error))
"""


@pytest.mark.multidevice
@pytest.mark.parametrize("fate", ["killed", "slow"])
def test_a_process_that_does_not_save_ends_the_others_by_75(tmp_path: Path, fate: str) -> None:
    directory = tmp_path / "checkpoints"
    with Group(tmp_path / "logs", [str(directory), fate], 2, code={0: LOSES_ONE, 1: LOSES_ONE}) as group:
        assert group.wait(300) == {0: 75, 1: -signal.SIGKILL if fate == "killed" else 75}
        told = group.text(0)
    name = re.escape(f"process 1 ({socket.gethostname()})")
    assert re.search(rf"saving step 1 to {directory} failed: save: {name} did not come within \d+ s", told)
    assert (f"process 1 ({socket.gethostname()}) gives no sign of life" in told) == (fate == "killed")
    assert not (directory / "1").exists()
