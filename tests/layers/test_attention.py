"""Attention: the reference against the definition, each kernel against the reference, and what kernels refuse.

Tolerances. fp32 sums in another order: 1e-5 of values of size one. bf16 has 8 bits, so that one rounding moves a value by up
to 2^-9 = 0.2 %; a kernel rounds its scaled queries, weights and outputs elsewhere than the reference does, and what is
compared are sums of some hundred such terms: 2 % of the largest value.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avlm_jax.layers import attention as attention_module
from avlm_jax.layers import cudnn
from avlm_jax.layers.attention import attention, platform, reference
from avlm_jax.layers.mask import AttentionMask, causal_mask
from avlm_jax.layers.splash import splash_attention

ROWS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

PADDED = np.asarray([[1] * 20 + [0] * 4, [1] * 24])
PACKED = np.asarray([[1] * 9 + [2] * 11 + [0] * 4, [1] * 5 + [2] * 5 + [3] * 14])
HOLES = np.asarray([[1] * 6 + [0] * 5 + [1] * 13, [0] * 24])  # Masked media in the middle; a row of padding.
VALID = np.asarray([[True] * 18 + [False] * 22, [False, True] * 20])
SLOTS = np.concatenate([PADDED, np.ones((2, 3), int), np.zeros((2, 13), int)], axis=1)

# Name -> (queries, keys, mask).
CASES: dict[str, tuple[int, int, AttentionMask]] = {
    "everything": (24, 24, AttentionMask()),
    "causal": (24, 24, AttentionMask(causal=True)),
    "right-padded": (24, 24, causal_mask(jnp.asarray(PADDED))),
    "packed": (24, 24, causal_mask(jnp.asarray(PACKED))),
    "holes": (24, 24, causal_mask(jnp.asarray(HOLES))),
    "packed, both directions": (24, 24, AttentionMask(segments=jnp.asarray(PACKED))),
    "valid keys": (9, 40, AttentionMask(kv_valid=jnp.asarray(VALID))),
    "segments and valid keys": (
        24, 40, AttentionMask(segments=jnp.asarray(PACKED), kv_segments=jnp.asarray(SLOTS), kv_valid=jnp.asarray(VALID))
    ),
    "prefill": (
        24, 40, AttentionMask(causal=True, segments=jnp.asarray(PADDED), kv_segments=jnp.asarray(SLOTS))
    ),
    "one more token": (1, 40, AttentionMask(kv_valid=jnp.asarray(SLOTS[:, :40] > 0))),
    "three more tokens": (
        3, 40, AttentionMask(causal=True, slot=jnp.int32(24), segments=jnp.ones((2, 3), int), kv_segments=jnp.asarray(SLOTS))
    ),
    "the last slots": (3, 40, AttentionMask(causal=True, slot=jnp.int32(37), kv_valid=jnp.asarray(VALID))),
}  # fmt: skip
DENSE = AttentionMask(dense=jnp.asarray(np.random.default_rng(7).random((2, 1, 24, 24)) < 0.3))


def tensors(t: int, s: int, dtype: str = "float32", head_dim: int = HEAD_DIM) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(t * 1000 + s)
    shapes = ((t, HEADS), (s, KV_HEADS), (s, KV_HEADS))
    return tuple(jnp.asarray(rng.normal(size=(ROWS, n, h, head_dim)), dtype) for n, h in shapes)


def allowed(mask: AttentionMask, t: int, s: int) -> np.ndarray:
    """The docstring of AttentionMask, one pair at a time."""
    found = np.zeros((ROWS, HEADS, t, s), bool)
    slot = 0 if mask.slot is None else int(mask.slot)
    queries = None if mask.segments is None else np.asarray(mask.segments)
    keys = queries if mask.kv_segments is None else np.asarray(mask.kv_segments)
    dense = None if mask.dense is None else np.broadcast_to(mask.dense, found.shape)
    for b, h, i, j in np.ndindex(*found.shape):
        found[b, h, i, j] = (
            (not mask.causal or j <= slot + i)
            and (queries is None or queries[b, i] == keys[b, j] > 0)
            and (mask.kv_valid is None or bool(mask.kv_valid[b, j]))
            and (dense is None or dense[b, h, i, j])
        )
    return found


def by_definition(q, k, v, mask: AttentionMask, bias=None, scale: float = HEAD_DIM**-0.5) -> np.ndarray:
    """Softmax of the allowed logits, query by query, in fp64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    pairs, out = allowed(mask, q.shape[1], k.shape[1]), np.zeros(q.shape)
    for b, h, i in np.ndindex(*pairs.shape[:3]):
        seen, shared = pairs[b, h, i], h // (HEADS // KV_HEADS)
        if seen.any():
            logits = k[b, seen, shared] @ q[b, i, h] * scale
            if bias is not None:
                logits = logits + np.broadcast_to(bias, pairs.shape)[b, h, i, seen]
            weights = np.exp(logits - logits.max())
            out[b, i, h] = weights / weights.sum() @ v[b, seen, shared]
    return out


def outcome(run: Callable, *inputs: jax.Array) -> dict[str, np.ndarray]:
    """Output and gradients of a sum that weighs every output differently."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def weighed(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = run(*inputs)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(weighed)(*inputs)
    named = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    return {name: np.asarray(value, np.float32) for name, value in named.items()}


def assert_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        assert np.isfinite(found[name]).all(), name
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=name
        )


# The reference
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, "dense"])
def test_the_reference_is_the_definition(name: str) -> None:
    t, s, mask = (24, 24, DENSE) if name == "dense" else CASES[name]
    q, k, v = tensors(t, s)
    found = attention(q, k, v, mask=mask, backend="reference")
    np.testing.assert_allclose(found, by_definition(q, k, v, mask), atol=2e-6)
    matrix, sees = mask.matrix(t, s), mask.sees(t, s)
    pairs = allowed(mask, t, s)
    assert np.array_equal(np.broadcast_to(True if matrix is None else matrix, pairs.shape), pairs)
    expected = pairs.any(axis=-1).transpose(0, 2, 1)[..., None]
    assert np.array_equal(np.broadcast_to(True if sees is None else sees, expected.shape), expected)


def test_bias_and_scale() -> None:
    q, k, v = tensors(24, 24)
    bias = np.random.default_rng(1).normal(size=(1, HEADS, 24, 24)).astype(np.float32)
    _, _, mask = CASES["packed"]
    found = attention(q, k, v, mask=mask, bias=jnp.asarray(bias), scale=0.7)
    np.testing.assert_allclose(found, by_definition(q, k, v, mask, bias, 0.7), atol=2e-6)


@pytest.mark.parametrize("name", ["packed", "holes"])
def test_who_sees_nobody_gets_zeros_and_no_gradient(name: str) -> None:
    t, s, mask = CASES[name]
    blind = np.asarray(mask.segments) == 0
    found = outcome(lambda q, k, v: attention(q, k, v, mask=mask), *tensors(t, s))
    for part, value in found.items():
        assert not value[blind].any(), part  # Not its own, and as nobody sees it, not its key's and value's.
        if part != "dq":  # Who sees but one key gives it all weight, whatever the query.
            assert (np.abs(value[~blind]).max(axis=(1, 2)) > 0).all(), part


# Splash
# --------------------------------------------------------------------------------------------------------

SPLASH_CASES = [
    *((name, "float32") for name in CASES),
    *((name, "bfloat16") for name in ("right-padded", "packed", "prefill", "three more tokens")),
]


@pytest.mark.parametrize("name,dtype", SPLASH_CASES)
def test_splash_is_the_reference(name: str, dtype: str) -> None:
    t, s, mask = CASES[name]
    inputs, scale = tensors(t, s, dtype), HEAD_DIM**-0.5
    found = outcome(lambda q, k, v: splash_attention(q, k, v, mask, scale, interpret=True), *inputs)
    expected = outcome(lambda q, k, v: reference(q, k, v, mask, None, scale), *inputs)
    assert_alike(found, expected, TOLERANCE[dtype])


def test_splash_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 positions in two blocks, the second one partly padding; packed, so that blocks and segments cross."""
    monkeypatch.setattr("avlm_jax.layers.splash.BLOCKS", (128,))
    segments = jnp.asarray([[1] * 70 + [2] * 90 + [0] * 40, [0] * 130 + [1] * 70])
    inputs, mask = tensors(200, 200, head_dim=72), causal_mask(segments)
    found = outcome(lambda q, k, v: splash_attention(q, k, v, mask, 0.1, interpret=True), *inputs)
    expected = outcome(lambda q, k, v: reference(q, k, v, mask, None, 0.1), *inputs)
    assert_alike(found, expected, TOLERANCE["float32"])


ON_EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from avlm_jax.layers.attention import reference
from avlm_jax.layers.mask import AttentionMask, causal_mask
from avlm_jax.layers.splash import splash_attention

errors = {}
# (mesh, rows, query heads, key/value heads): an axis that does not divide them is left out.
for shape, rows, heads, shared in (((2, 2, 2), 4, 4, 2), ((8, 1, 1), 8, 2, 1), ((1, 2, 4), 3, 4, 2)):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, 12, n, 8)), jnp.float32) for n in (heads, shared, shared))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (rows, 12)), axis=1)[:, ::-1])
    for name, mask in {"packed": causal_mask(segments), "keys": AttentionMask(kv_valid=segments > 0)}.items():
        def loss(run):
            weights = jnp.arange(8.0)[None, None, None]
            return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(run(*x)) * weights), argnums=(0, 1, 2)))
        expected = loss(lambda q, k, v: reference(q, k, v, mask, None, 0.3))(q, k, v)
        with jax.set_mesh(mesh):
            split = rows % (shape[0] * shape[1]) == 0
            rule = NamedSharding(mesh, PartitionSpec(("data", "fsdp") if split else None))
            placed = [jax.device_put(x, rule) for x in (q, k, v)]
            found = loss(lambda q, k, v: splash_attention(q, k, v, mask, 0.3, interpret=True))(*placed)
        worst = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])))
        errors[f"{shape} {name}"] = max(worst, abs(float(found[0] - expected[0])) / 100)
print(json.dumps(errors))
"""


@pytest.mark.multidevice
def test_splash_on_eight_devices(repository) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6 and max(errors.values()) < 1e-4, errors  # Of values of size ten.
    assert "3 rows over 2 devices of ('data', 'fsdp'); each does all" in done.stderr


# cuDNN
# --------------------------------------------------------------------------------------------------------

CUDNN_CASES = [*CASES, "dense"]


@pytest.mark.parametrize("name", CUDNN_CASES)
def test_what_cudnn_is_told_is_the_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call, answered by the other implementation of JAX's own function."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    t, s, mask = (24, 24, DENSE) if name == "dense" else CASES[name]
    inputs, scale = tensors(t, s), HEAD_DIM**-0.5
    found = outcome(lambda q, k, v: cudnn.cudnn_attention(q, k, v, mask, None, scale), *inputs)
    assert_alike(found, outcome(lambda q, k, v: reference(q, k, v, mask, None, scale), *inputs), 1e-5)


def test_cudnn_with_a_bias_and_odd_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    q, k, v = tensors(23, 39)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, HEADS, 23, 39)), jnp.float32)
    mask = AttentionMask(kv_valid=jnp.asarray(VALID[:, :39]))
    for case in (mask, AttentionMask()):
        found = outcome(lambda q, k, v: cudnn.cudnn_attention(q, k, v, case, bias, 0.3), q, k, v)  # noqa: B023
        expected = outcome(lambda q, k, v: reference(q, k, v, case, bias, 0.3), q, k, v)  # noqa: B023
        assert_alike(found, expected, 1e-5)


def test_which_rows_cudnn_may_take_by_their_length() -> None:
    def fits(segments) -> bool:
        ids = jnp.asarray(segments)
        return bool(cudnn.right_padded(ids, ids)[1])

    assert fits(PADDED) and fits([[0, 0], [1, 1]])
    assert not fits(PACKED) and not fits(HOLES) and not fits([[2, 2]]) and not fits([[0, 1]])


def lowered_for_cuda(run: Callable, *inputs: jax.Array, monkeypatch: pytest.MonkeyPatch) -> str:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    # JAX asks the cuDNN that is installed for its version before it lowers; none is, and 9.10 would say this.
    monkeypatch.setattr(fused, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91000))
    return jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def test_lowering_for_cuda_has_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    t, s, mask = CASES["right-padded"]
    inputs = tensors(t, s, "bfloat16", head_dim=64)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, mask=mask).astype(jnp.float32))

    text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *inputs, monkeypatch=monkeypatch)
    # By length, and with the mask as a bias; which one is decided when it runs.
    assert "stablehlo.case" in text
    for name in (
        "fmhaSoftmax",
        "fmhaScaleBiasSoftmax",
        "fmhaSoftmaxBackward",
        "fmhaScaleBiasSoftmaxBackward",
    ):
        assert f"__cudnn${name}" in text, name
    assert "PADDING_CAUSAL" in text

    siglip = jax.ShapeDtypeStruct((1, 729, 16, 72), jnp.bfloat16)
    text = lowered_for_cuda(attention, siglip, siglip, siglip, monkeypatch=monkeypatch)
    assert "__cudnn$fmhaSoftmax" in text and "Bias" not in text and "stablehlo.dot_general" not in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; JAX_PLATFORMS=cuda where there is one")
@pytest.mark.parametrize("name", CUDNN_CASES)
def test_cudnn_is_the_reference(name: str) -> None:
    t, s, mask = (24, 24, DENSE) if name == "dense" else CASES[name]
    inputs = tensors(t, s, "bfloat16", head_dim=64)
    if t == 1:  # A decoding step: nobody trains it, and cuDNN could not with a mask.
        found = attention(*inputs, mask=mask, backend="cudnn")
        assert_alike(
            {"out": np.asarray(found, np.float32)}, {"out": by_definition(*inputs, mask, scale=0.125)}, 2e-2
        )
        return
    found = outcome(lambda q, k, v: attention(q, k, v, mask=mask, backend="cudnn"), *inputs)
    expected = outcome(lambda q, k, v: attention(q, k, v, mask=mask, backend="reference"), *inputs)
    assert_alike(found, expected, TOLERANCE["bfloat16"])


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; JAX_PLATFORMS=cuda where there is one")
def test_cudnn_with_beats_bias() -> None:
    q, k, v = tensors(48, 48, "bfloat16", head_dim=64)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, HEADS, 48, 48)), jnp.float32)
    mask = AttentionMask(kv_valid=jnp.asarray(np.arange(48)[None] < [[48], [16]]))
    found, expected = (
        {"out": np.asarray(attention(q, k, v, mask=mask, bias=bias, backend=name), np.float32)}
        for name in ("cudnn", "reference")
    )
    assert_alike(found, expected, TOLERANCE["bfloat16"])


# Choosing and refusing
# --------------------------------------------------------------------------------------------------------

BF16 = functools.partial(jnp.zeros, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "backend,where,change,message",
    [
        ("flash", "cpu", {}, "attention backend 'flash' is unknown; use one of auto, reference, cudnn, splash"),
        ("splash", "cpu", {}, "'splash' cannot take platform 'cpu': it is a TPU kernel; use backend 'auto'"),
        ("cudnn", "tpu", {}, "'cudnn' cannot take platform 'tpu': it is a kernel of NVIDIA GPUs"),
        ("splash", "tpu", {"mask": DENSE}, "'splash' cannot take a dense boolean mask; say it as causality"),
        ("splash", "tpu", {"bias": BF16((1, 4, 24, 24))}, "'splash' cannot take a bias; use backend 'reference'"),
        ("splash", "tpu", {"q": BF16((2, 24, 4, 20)), "k": BF16((2, 24, 2, 20))}, "head dimension 20"),
        ("splash", "tpu", {"q": jnp.zeros((2, 24, 4, 64))}, "queries of float32 with keys of bfloat16"),
        ("cudnn", "gpu", {"q": jnp.zeros((2, 24, 4, 64)), "k": jnp.zeros((2, 24, 2, 64))}, "queries of float32"),
        ("cudnn", "gpu", {"q": BF16((2, 24, 4, 256)), "k": BF16((2, 24, 2, 256))}, "head dimension 256"),
        ("auto", "cpu", {"q": BF16((2, 24, 3, 64))}, "3 query heads cannot share 2 key/value heads evenly"),
        ("auto", "cpu", {"mask": AttentionMask(slot=jnp.int32(3))}, "set causal=True or leave it out"),
        ("auto", "cpu", {"mask": AttentionMask(kv_segments=jnp.ones((2, 24), int))}, "kv_segments needs segments"),
        ("auto", "cpu", {"mask": causal_mask(jnp.ones((2, 23), int))}, "need kv_segments for the 24 keys|expected"),
        ("auto", "cpu", {"mask": AttentionMask(kv_valid=jnp.ones((2, 1), bool))}, r"kv_valid is \[2, 1\]"),
        ("auto", "cpu", {"mask": AttentionMask(dense=jnp.ones((24, 24), bool))}, r"dense is \[24, 24\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused(
    backend: str, where: str, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "platform", lambda: where)
    call = {"q": BF16((2, 24, 4, 64)), "k": BF16((2, 24, 2, 64)), **change}
    with pytest.raises(ValueError, match=message):
        attention(
            call["q"], call["k"], call["k"], mask=call.get("mask"), bias=call.get("bias"), backend=backend
        )


def test_auto_takes_the_kernel_of_the_platform(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    taken = []
    monkeypatch.setattr(
        attention_module.splash, "splash_attention", lambda q, *_: taken.append("splash") or q
    )
    monkeypatch.setattr(attention_module.cudnn, "cudnn_attention", lambda q, *_: taken.append("cudnn") or q)
    caplog.set_level(logging.INFO)
    q, k = BF16((2, 24, 4, 64)), BF16((2, 24, 2, 64))
    for where in ("tpu", "gpu", "cpu"):
        monkeypatch.setattr(attention_module, "platform", lambda: where)  # noqa: B023
        attention(q, k, k)
        attention(q[:, :1], k, k)  # A decoding step.
    assert taken == ["splash", "cudnn"] and not caplog.records
    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")
    for _ in range(2):
        attention(q, k, k, mask=DENSE)
    assert [r.getMessage() for r in caplog.records] == [
        "attention [2, 24, 4, 64] x [2, 24, 2, 64]: reference, as splash cannot take a dense boolean mask; say it as "
        "causality, segment ids or key validity, or use backend 'reference'"
    ]
    assert taken == ["splash", "cudnn"]


# Ahead of time for a TPU
# --------------------------------------------------------------------------------------------------------


def tpu_mesh() -> Mesh:
    """Of four v5e chips that need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(
        np.asarray(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


@pytest.mark.aot
@pytest.mark.parametrize(
    "length,heads,kv_heads,head_dim,form",
    [(2048, 4, 2, 128, "causal"), (729, 4, 4, 72, "everything"), (256, 4, 4, 64, "valid keys")],
    ids=["language model", "SigLIP", "AVTS"],
)
def test_splash_compiles_for_a_tpu(length: int, heads: int, kv_heads: int, head_dim: int, form: str) -> None:
    """Forward and backward, sharded; three kernels, and no logits anywhere."""
    mesh = tpu_mesh()
    keys = 12_704 if form == "valid keys" else length

    def loss(q, k, v, segments):
        assert platform() == "tpu"
        masks = {"causal": causal_mask(segments), "valid keys": AttentionMask(kv_valid=segments > 0)}
        return jnp.sum(attention(q, k, v, mask=masks.get(form)).astype(jnp.float32))

    def array(shape: tuple[int, ...], dtype, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    wide = PartitionSpec(("data", "fsdp"), None, "tensor")
    sizes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (array((2, n, h, head_dim), jnp.bfloat16, wide) for n, h in sizes)
    segments = array((2, keys), jnp.int32, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, segments).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text and "all-to-all" not in text
    assert (
        compiled.memory_analysis().temp_size_in_bytes < heads * length * keys
    )  # A quarter of one row's fp32 logits.
