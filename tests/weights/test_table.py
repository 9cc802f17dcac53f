import jax
import ml_dtypes
import numpy as np
import pytest

from avlm_jax.weights.table import (
    TRANSPOSE,
    Ignored,
    Row,
    Table,
    WeightError,
    export_params,
    flatten,
    import_params,
    patch_kernel,
    permute,
    reshape,
    split,
)

TABLE = Table(
    "Toy",
    rows=(
        Row("embed", "tok.weight", aliases=("old.tok.weight",)),
        Row("layers/fc/kernel", "blocks.{i}.fc.weight", TRANSPOSE),
        Row("layers/fc/bias", "blocks.{i}.fc.bias"),
        Row("shared", "blocks.{i}.table", shared=True),
        Row(("head/q", "head/k"), "head.in_proj", split(2, transpose=True)),
    ),
    ignored=(Ignored(r"extra\..*", "not needed"),),
    depth=3,
)
EXPECTED = {
    "embed": np.empty((5, 2)),
    "layers": {"fc": {"kernel": np.empty((3, 2, 4)), "bias": np.empty((3, 4))}},
    "shared": np.empty((6,)),
    "head": {"q": np.empty((2, 3)), "k": np.empty((2, 3))},
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"tok.weight": (5, 2), "head.in_proj": (6, 2), "extra.a": (9,)}
    for i in range(3):
        shapes |= {f"blocks.{i}.fc.weight": (4, 2), f"blocks.{i}.fc.bias": (4,)}
    result = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    table = rng.normal(size=6).astype(np.float32)
    return result | {f"blocks.{i}.table": table for i in range(3)}


def problems(change: dict, drop: tuple[str, ...] = (), expected=EXPECTED) -> list[str]:
    broken = {name: array for name, array in (tensors() | change).items() if name not in drop}
    with pytest.raises(WeightError) as error:
        import_params(TABLE, broken, expected)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


def test_import_stacks_transposes_and_splits():
    source = tensors()
    params, report = import_params(TABLE, source, EXPECTED)
    np.testing.assert_array_equal(params["layers"]["fc"]["kernel"][2], source["blocks.2.fc.weight"].T)
    np.testing.assert_array_equal(params["layers"]["fc"]["bias"][1], source["blocks.1.fc.bias"])
    np.testing.assert_array_equal(params["head"]["k"], source["head.in_proj"][3:].T)
    np.testing.assert_array_equal(params["shared"], source["blocks.0.table"])
    assert {p: a.shape for p, a in flatten(params).items()} == {
        p: a.shape for p, a in flatten(EXPECTED).items()
    }
    used = {name: array for name, array in source.items() if not name.startswith("extra")}
    assert report.count == len(used) and report.bytes == sum(a.nbytes for a in used.values())
    assert report.ignored == {"not needed": ("extra.a",)}
    assert "11 tensors" in str(report) and "ignored: 1 tensors (not needed)" in str(report)


def test_export_is_the_inverse_to_the_bit():
    source = tensors()
    params, first = import_params(TABLE, source, EXPECTED)
    exported = export_params(TABLE, params)
    assert exported.keys() == source.keys() - {"extra.a"}
    for name, tensor in exported.items():
        array = np.asarray(tensor)
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert array.dtype == source[name].dtype and array.tobytes() == source[name].tobytes(), name
    again, second = import_params(TABLE, exported, EXPECTED)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    assert first.sha256 == second.sha256  # ignored tensors are not part of it


def test_the_hash_notices_one_bit_and_a_swap_of_names():
    _, clean = import_params(TABLE, tensors(), EXPECTED)
    flipped = tensors()
    flipped["blocks.1.fc.bias"].view(np.uint8)[0] ^= 1
    swapped = tensors()
    a, b = "blocks.0.fc.bias", "blocks.1.fc.bias"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    hashes = {import_params(TABLE, t, EXPECTED)[1].sha256 for t in (flipped, swapped)}
    assert len(hashes | {clean.sha256}) == 3


def test_every_problem_is_listed_at_once():
    found = problems(
        {
            "blocks.3.fc.bias": np.zeros(4, np.float32),
            "old.tok.weight": np.zeros((5, 2), np.float32),
            "blocks.0.fc.weight": np.zeros((2, 4), np.float32),
            "stray": np.zeros(1, np.float32),
        },
        drop=("blocks.2.fc.bias", "head.in_proj"),
    )
    text = "\n".join(found)
    assert len(found) == 6
    assert "unknown tensor blocks.3.fc.bias of shape [4]" in text
    assert "unknown tensor stray of shape [1]" in text
    assert "embed: set twice, by tok.weight and old.tok.weight" in text
    assert "blocks.0.fc.weight has shape [2, 4], which gives layers/fc/kernel [4, 2]" in text
    assert "expects [2, 4]" in text
    assert "missing tensor blocks.2.fc.bias (for layers/fc/bias)" in text
    assert "missing tensor head.in_proj (for head/q, head/k)" in text


def test_an_alias_stands_in():
    renamed = {("old." + n if n == "tok.weight" else n): a for n, a in tensors().items()}
    params, _ = import_params(TABLE, renamed, EXPECTED)
    np.testing.assert_array_equal(params["embed"], renamed["old.tok.weight"])


def test_copies_of_a_shared_tensor_must_agree_and_may_be_left_out():
    different = tensors()["blocks.0.table"] + 1
    assert problems({"blocks.2.table": different}) == [
        "blocks.2.table must equal blocks.0.table, of which it is a copy"
    ]
    alone = {n: a for n, a in tensors().items() if n not in ("blocks.1.table", "blocks.2.table")}
    params, _ = import_params(TABLE, alone, EXPECTED)
    assert set(export_params(TABLE, params)) == tensors().keys() - {"extra.a"}
    assert problems({}, drop=("blocks.0.table",)) == ["missing tensor blocks.0.table (for shared)"]


def test_dtypes():
    as_bf16 = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors().items()}
    params, _ = import_params(TABLE, as_bf16, EXPECTED)
    assert {str(a.dtype) for a in flatten(params).values()} == {"bfloat16"}
    assert problems({"tok.weight": np.zeros((5, 2), np.int8)}) == [
        "tok.weight is int8; embed needs floating-point numbers"
    ]
    (message,) = problems({"blocks.1.fc.bias": np.zeros(4, np.float16)})
    assert message == "layers/fc/bias: its layers are stored as float16, float32; use one dtype"


def test_table_and_model_must_cover_each_other():
    bigger = EXPECTED | {"norm": np.empty(2)}
    assert problems({}, expected=bigger) == ["norm: the model has it, but no row sets it"]
    smaller = {path: leaf for path, leaf in EXPECTED.items() if path != "embed"}
    assert problems({}, expected=smaller) == ["embed: the table sets it, but the model has no such parameter"]
    deeper = EXPECTED | {"layers": {"fc": {"kernel": np.empty((4, 2, 4)), "bias": np.empty((3, 4))}}}
    assert problems({}, expected=deeper) == ["layers/fc/kernel: the model stacks 4 layers, the table 3"]
    with pytest.raises(WeightError, match="a: set by two rows"):
        Table("Toy", (Row("a", "x"), Row("a", "y")), (), 1)


def test_export_refuses_other_parameters():
    params, _ = import_params(TABLE, tensors(), EXPECTED)
    with pytest.raises(WeightError, match="lora_a: no row of the table writes it"):
        export_params(TABLE, params | {"lora_a": np.zeros(1)})
    with pytest.raises(WeightError, match="embed: missing from the parameters"):
        export_params(TABLE, {p: v for p, v in params.items() if p != "embed"})
    short = params | {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    with pytest.raises(WeightError, match=r"bias: shape \[2, 4\] does not stack 3 layers"):
        export_params(TABLE, short)


@pytest.mark.parametrize(
    "transform,shape,results",
    [
        (TRANSPOSE, (3, 5), [(5, 3)]),
        (reshape((1, 4, 1, 1), (4,)), (1, 4, 1, 1), [(4,)]),
        (permute(2, 0, 1), (2, 3, 4), [(4, 2, 3)]),
        (patch_kernel(2, 3), (5, 3, 2, 2), [(12, 5)]),
        (split(3, transpose=True), (6, 4), [(4, 2)] * 3),
        (split(3, transpose=False), (6,), [(2,)] * 3),
    ],
)
def test_transforms_invert(transform, shape, results):
    x = np.random.default_rng(0).normal(size=shape)
    ours = transform.ours(x)
    assert [a.shape for a in ours] == results
    np.testing.assert_array_equal(transform.theirs(*ours), x)
    with pytest.raises(ValueError):
        transform.ours(np.zeros((7, 1, 2, 5, 3)))
