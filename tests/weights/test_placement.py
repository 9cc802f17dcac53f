"""From files onto devices: the same bits wherever they lie, and never more on the host than one slice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from avlm_jax.sharding import make_mesh, replicated
from avlm_jax.weights.placement import place

ROOT = Path(__file__).parents[2]

EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from avlm_jax.sharding import make_mesh
from avlm_jax.weights import qwen2, safetensors_io, stored
from avlm_jax.weights.placement import place
from avlm_jax.weights.table import export_params, flatten, unflatten

hf = dict(model_type="qwen2", vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
          num_key_value_heads=2, intermediate_size=48, rope_theta=1e6, tie_word_embeddings=False, rms_norm_eps=1e-6)
rng = np.random.default_rng(0)
params = {path: rng.normal(size=leaf.shape).astype(ml_dtypes.bfloat16)
          for path, leaf in flatten(qwen2.expected_params(hf)).items()}
folder = Path(sys.argv[1])
qwen2.save_qwen2(folder, hf, unflatten(params), max_shard_bytes=20_000)
assert len(list(folder.glob("*.safetensors"))) > 3
reads = []
read = stored.StoredLeaf.read
def counted(leaf, index=None, dtype=None):
    found = read(leaf, index, dtype)
    reads.append(found.size)
    return found
stored.StoredLeaf.read = counted
specs = {2: (P(), P("fsdp"), P(None, "fsdp"), P("fsdp", "tensor")),
         3: (P(), P("fsdp"), P(None, "fsdp"), P(None, "tensor", "fsdp"), P("data", "fsdp"))}
for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
    mesh = make_mesh(*sizes)
    plan = qwen2.open_qwen2(folder)[1]
    assert plan.leaves.keys() == params.keys()
    for path, leaf in plan.leaves.items():
        for spec in specs.get(len(leaf.shape), (P(),)):
            sharding = NamedSharding(mesh, spec)
            try:
                sharding.shard_shape(leaf.shape)
            except ValueError:
                continue  # This mesh does not divide that axis.
            for dtype in (None, "float32"):
                reads.clear()
                array = place(leaf, sharding, dtype)
                assert array.sharding == sharding and array.dtype == (dtype or "bfloat16")
                np.testing.assert_array_equal(np.asarray(array), params[path].astype(array.dtype), err_msg=path)
                one = int(np.prod(sharding.shard_shape(leaf.shape)))
                assert reads == [one] * (leaf_size := params[path].size // one), (path, spec, reads, leaf_size)
print("placed to the bit")
"""

# A channel's inputs lie on several devices in the second and third layout.
EIGHT_DEVICES_IN_INT8 = """
import sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from avlm_jax.lora import merge_kernel
from avlm_jax.quantize import quantise
from avlm_jax.sharding import make_mesh
from avlm_jax.weights import qwen2, stored
from avlm_jax.weights.placement import place_quantised
from avlm_jax.weights.table import flatten, unflatten

hf = dict(model_type="qwen2", vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
          num_key_value_heads=2, intermediate_size=48, rope_theta=1e6, tie_word_embeddings=False, rms_norm_eps=1e-6)
rng = np.random.default_rng(0)
params = {path: rng.normal(size=leaf.shape).astype(ml_dtypes.bfloat16)
          for path, leaf in flatten(qwen2.expected_params(hf)).items()}
folder, path = Path(sys.argv[1]), "layers/mlp/up/kernel"
qwen2.save_qwen2(folder, hf, unflatten(params))
leaf = qwen2.open_qwen2(folder)[1].leaves[path]
pair = rng.normal(size=(4, 32, 2)).astype(np.float32), rng.normal(size=(4, 2, 48)).astype(np.float32)
exact = merge_kernel(params[path].astype(np.float32), [pair], 1.0)
reads = []
read = stored.StoredLeaf.read
def counted(leaf, index=None, dtype=None):
    found = read(leaf, index, dtype)
    reads.append(found.size)
    return found
stored.StoredLeaf.read = counted
mesh = make_mesh(2, 2, 2)
for kernel, scale in ((P(), P()), (P(None, "fsdp", "tensor"), P(None, "tensor")), (P(None, ("fsdp", "tensor")), P())):
    where = NamedSharding(mesh, kernel), NamedSharding(mesh, scale)
    one = int(np.prod(where[0].shard_shape(leaf.shape))) // 4
    for updates in ((), (tuple(map(jax.numpy.asarray, pair)),)):
        reads.clear()
        found = place_quantised(leaf, *where, updates)
        assert (found[0].sharding, found[1].sharding) == where
        assert reads == [one] * (32 * 48 // one * 4), reads  # One layer's slice at a time, each once.
        expected = quantise(jax.numpy.asarray(exact if updates else params[path]))
        # The sums of the adapter differ in their last bits; without one the bits are the same.
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6 * len(updates))
        np.testing.assert_allclose(found[0], np.asarray(expected[0]), rtol=0, atol=len(updates))
print("placed to the bit")
"""


@pytest.mark.multidevice
@pytest.mark.parametrize("program", [EIGHT_DEVICES, EIGHT_DEVICES_IN_INT8], ids=["as stored", "int8"])
def test_eight_devices_get_their_slices_and_the_host_reads_each_once(program: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0 and "placed to the bit" in process.stdout, process.stderr


def test_arrays_that_are_no_files_are_placed_as_well() -> None:
    sharding = replicated(make_mesh())
    for leaf in (np.arange(6.0, dtype=np.float32), jax.numpy.arange(6.0), np.float32(2).reshape(())):
        found = place(leaf, sharding, "bfloat16")
        assert found.dtype == "bfloat16" and found.sharding == sharding
        np.testing.assert_array_equal(np.asarray(found, np.float32), leaf)


@pytest.mark.multidevice
def test_the_benchmark_runs_at_its_small_size() -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "import_weights.py"), "--size", "tiny"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["same_hash"] and found["streamed"]["tensors"] == 6 * 12 + 2
    assert found["streamed"]["excess"] < 0.6 * found["whole"]["excess"]
