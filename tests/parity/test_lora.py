"""LoRA against PEFT: the same update, the same start, the same dropout, the same merge."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from avlm_jax.layers.mask import causal_mask  # noqa: E402
from avlm_jax.lora import ALL_TARGETS, LoraConfig, LoraDense, merge_lora  # noqa: E402
from avlm_jax.weights.qwen2 import load_qwen2, save_qwen2  # noqa: E402
from avlm_jax.weights.table import flatten, unflatten  # noqa: E402
from tests.parity.decoder_peers import (  # noqa: E402
    SIZES,
    decoder_of,
    make_peer,
    our_logits,
    places,
    their_logits,
    tokens_of,
)
from tests.parity.peers import relative_error  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # fp32 on both sides
RANK, ALPHA = 4, 10.0  # a scale of 2.5, and a rank that is no size of the model
MASK = np.ones((2, 12), bool)
MASK[1, 8:] = False


def adapt(peer: torch.nn.Module, targets: tuple[str, ...], seed: int | None) -> torch.nn.Module:
    """The peer in PEFT's wrapper, its adapter fresh (seed None) or with random A and B."""
    wrapped = peft.get_peft_model(
        peer,
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            target_modules=[f"{name}_proj" for name in targets],
        ),
    ).eval()  # fmt: skip
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(generator=generator).mul_(0.3)
    return wrapped


def adapter_of(wrapped: torch.nn.Module, depth: int) -> dict[str, np.ndarray]:
    """PEFT's A [r in] and B [out r] as our lora_a [L in r] and lora_b [L r out]."""
    tensors = {name: value.numpy() for name, value in peft.get_peft_model_state_dict(wrapped).items()}
    leaves = {}
    for room, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            theirs = (
                f"base_model.model.model.layers.{{}}.{'self_attn' if room == 'attn' else 'mlp'}.{name}_proj"
            )
            for ours, half in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                keys = [f"{theirs.format(layer)}.{half}.weight" for layer in range(depth)]
                if keys[0] in tensors:
                    leaves[f"layers/{room}/{name}/{ours}"] = np.stack([tensors.pop(key).T for key in keys])
    assert not tensors
    return leaves


def both(tmp_path, targets: tuple[str, ...], seed: int | None, dtype: torch.dtype = torch.float32):
    """(PEFT's model, our decoder with the same base and adapter, its parameters, the base's config).

    PEFT keeps adapters of a bf16 base in fp32.
    """
    peer = make_peer("qwen2", SIZES).to(dtype)
    peer.save_pretrained(tmp_path / "base")
    hf, base, _ = load_qwen2(tmp_path / "base")
    wrapped = adapt(peer, targets, seed)
    params = unflatten(flatten(base) | adapter_of(wrapped, SIZES["num_hidden_layers"]))
    return wrapped, decoder_of(hf, LoraConfig(RANK, ALPHA, 0.0, targets)), params, hf


def logits_of(decoder, params) -> np.ndarray:
    tokens, positions = tokens_of(90, MASK.shape), places(MASK)
    return np.asarray(our_logits(decoder, params, tokens, positions, causal_mask(jnp.asarray(MASK, int)))[0])


def peer_logits(peer) -> torch.Tensor:
    return their_logits(peer, tokens_of(90, MASK.shape), places(MASK), MASK).logits


@pytest.mark.parametrize("targets", [ALL_TARGETS, ("q", "v"), ("o", "down")])
def test_logits_with_an_adapter(tmp_path, targets):
    wrapped, decoder, params, hf = both(tmp_path, targets, seed=1)
    expected, found = peer_logits(wrapped), logits_of(decoder, params)
    error = relative_error(found, expected, MASK)
    with wrapped.disable_adapter():
        effect = relative_error(expected.numpy(), peer_logits(wrapped), MASK)
    print(f"LoRA on {', '.join(targets)}: {error:.1e} of the scale; the adapter changes {effect:.1e}")
    assert error < TOLERANCE and effect > 0.1


def test_a_fresh_adapter_is_the_identity_on_both_sides(tmp_path):
    wrapped, decoder, params, hf = both(tmp_path, ALL_TARGETS, seed=None)
    drawn = flatten(params)
    assert all(not leaf.any() for path, leaf in drawn.items() if path.endswith("lora_b"))
    bare = {path: leaf for path, leaf in drawn.items() if "lora_" not in path}
    expected = logits_of(decoder_of(hf), unflatten(bare))
    np.testing.assert_array_equal(logits_of(decoder, params), expected)
    with wrapped.disable_adapter():
        untouched = peer_logits(wrapped)
    assert torch.equal(peer_logits(wrapped), untouched)
    # Drawn by us: the same leaves, of the same shapes.
    embeddings, positions = jnp.zeros((1, 2, SIZES["hidden_size"])), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        decoder.init, jax.random.key(0), embeddings, positions, causal_mask(positions + 1)
    )
    assert {path: leaf.shape for path, leaf in flatten(shapes["params"]).items()} == {
        path: leaf.shape for path, leaf in drawn.items()
    }


@pytest.mark.parametrize("width,rank", [(256, 64), (1024, 16)])
def test_a_starts_as_peft_draws_it(width, rank):
    linear = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(width, 8)})
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(linear, peft.LoraConfig(r=rank, target_modules=["q_proj"]))
    theirs = wrapped.base_model.model["q_proj"].lora_A["default"].weight.detach().numpy()
    layer = LoraDense(8, lora=LoraConfig(rank=rank))
    ours = np.asarray(layer.init(jax.random.key(0), jnp.zeros((1, width)))["params"]["lora_a"])
    assert ours.shape == theirs.T.shape
    bound = width**-0.5
    for drawn in (ours, theirs):
        # 16,384 uniform numbers reach within 1/1000 of their bound but for 1 seed in 10^7; std is within 2 %.
        assert 0.999 * bound < np.abs(drawn).max() <= bound
        assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert abs(drawn.mean()) < 0.02 * bound
    print(
        f"A [{width} {rank}]: largest {np.abs(ours).max():.5f}, PEFT {np.abs(theirs).max():.5f}; "
        f"std {ours.std():.5f}, PEFT {theirs.std():.5f}"
    )


def test_dropout_keeps_its_scale():
    """Of an identity A B and a zero kernel the output shows dropout itself: 0, or x / (1 - p) times alpha / r."""
    size, rate, alpha = 64, 0.25, 160.0
    x = np.random.default_rng(0).normal(1, 0.1, (400, size)).astype(np.float32)

    linear = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(size, size, bias=False)})
    config = peft.LoraConfig(r=size, lora_alpha=alpha, lora_dropout=rate, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(linear, config)
    module = wrapped.base_model.model["q_proj"]
    with torch.no_grad():
        module.base_layer.weight.zero_()
        module.lora_A["default"].weight.copy_(torch.eye(size))
        module.lora_B["default"].weight.copy_(torch.eye(size))
    torch.manual_seed(0)
    theirs = module.train()(torch.from_numpy(x)).detach().numpy()

    layer = LoraDense(size, lora=LoraConfig(size, alpha, rate))
    params = {"kernel": jnp.zeros((size, size)), "lora_a": jnp.eye(size), "lora_b": jnp.eye(size)}
    ours = np.asarray(layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)}))
    still = np.asarray(layer.apply({"params": params}, x))

    np.testing.assert_allclose(still, alpha / size * x, rtol=1e-6)
    np.testing.assert_allclose(module.eval()(torch.from_numpy(x)).detach().numpy(), still, rtol=1e-6)
    for drawn in (ours, theirs):
        kept = drawn != 0
        np.testing.assert_allclose(drawn[kept], (still / (1 - rate))[kept], rtol=1e-6)
        # 25,600 draws: the kept share has a standard deviation of 0.0027.
        assert kept.mean() == pytest.approx(1 - rate, abs=0.015)
        assert drawn.mean() == pytest.approx(still.mean(), rel=0.02)
    print(f"dropout {rate}: kept {(ours != 0).mean():.4f}, PEFT {(theirs != 0).mean():.4f}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_agrees(tmp_path, dtype):
    """PEFT's merge and ours, read back by transformers; both round the sum once to the base's dtype."""
    wrapped, decoder, params, hf = both(tmp_path, ALL_TARGETS, seed=2, dtype=dtype)
    merged = jax.tree.map(np.asarray, merge_lora(params, LoraConfig(RANK, ALPHA)))
    assert not any("lora_" in path for path in flatten(merged))
    save_qwen2(tmp_path / "merged", hf, merged)
    ours = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    theirs = wrapped.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    worst, differing, total = 0.0, 0, 0
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == dtype
        if "_proj.weight" not in name:
            assert torch.equal(ours[name], tensor), name
            continue
        worst = max(worst, relative_error(ours[name].float(), tensor))
        differing, total = differing + int((ours[name] != tensor).sum()), total + tensor.numel()
    print(
        f"merged, {dtype}: {worst:.1e} of the largest weight; {differing / total:.2%} of the weights differ"
    )
    if dtype is torch.float32:
        assert worst < 1e-6
        error = relative_error(logits_of(decoder_of(hf), merged), logits_of(decoder, params), MASK)
        print(f"merged against attached: {error:.1e} of the scale")
        assert error < TOLERANCE
    else:
        # Sums that fall between two bf16 numbers may be rounded to either: a step of 2^-8, and rarely.
        assert worst <= 2**-8 and differing < 0.001 * total
