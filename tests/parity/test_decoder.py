"""The decoder against transformers' Qwen2 and LLaMA with random weights, in fp32, through files they write."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402

from avlm_jax.layers.mask import AttentionMask, causal_mask  # noqa: E402
from avlm_jax.layers.rope import inverse_frequencies  # noqa: E402
from avlm_jax.llm.decoder import KVCache  # noqa: E402
from avlm_jax.weights.qwen2 import load_qwen2, save_qwen2  # noqa: E402
from tests.parity.decoder_peers import (  # noqa: E402
    SIZES,
    decoder_of,
    make_peer,
    our_logits,
    places,
    their_logits,
    tokens_of,
)
from tests.parity.peers import assert_same_state, randomise, relative_error  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides; sums of up to 18,944 terms are ordered differently.
TOLERANCE = 1e-4

# Values that no released checkpoint has, each large enough to be seen in the logits.
UNUSUAL = dict(rms_norm_eps=0.02, rope_parameters={"rope_type": "default", "rope_theta": 50.0})

CASES = {
    "Qwen2": ("qwen2", {}),
    "Qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "Qwen2, wide heads": ("qwen2", dict(head_dim=20)),
    "Qwen2, unusual constants": ("qwen2", UNUSUAL),
    "Qwen2, one key/value head": ("qwen2", dict(num_key_value_heads=1)),
    "LLaMA": ("llama", dict(num_key_value_heads=6, rms_norm_eps=1e-5)),
    "LLaMA, default rotation": ("llama", dict(num_key_value_heads=6, rope_parameters=None)),
    "LLaMA, grouped, tied, narrow heads": (
        "llama", dict(tie_word_embeddings=True, head_dim=4, **UNUSUAL)
    ),
}  # fmt: skip

# Rows: whole; padded on the right; with holes, as masked media leave them, and padded.
MASK = np.ones((3, 14), bool)
MASK[1, 9:] = False
MASK[2, [2, 3, 4, 7, 13]] = False


@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, name):
    kind, change = CASES[name]
    peer = make_peer(kind, SIZES | change)
    peer.save_pretrained(tmp_path)
    hf, params, report = load_qwen2(tmp_path)
    assert not report.ignored
    tokens = tokens_of(90, MASK.shape)
    for positions in (places(MASK), np.broadcast_to(np.arange(14), MASK.shape).copy()):
        expected = their_logits(peer, tokens, positions, MASK).logits
        found, _ = our_logits(decoder_of(hf), params, tokens, positions, causal_mask(jnp.asarray(MASK, int)))
        error = relative_error(found, expected, MASK)
        print(f"{name}: {error:.1e} of the scale, {report.count} tensors")
        assert error < TOLERANCE


def test_shards_and_a_padded_vocabulary(tmp_path):
    """As Qwen2-7B is published: in several files, with more rows than the tokenizer has tokens."""
    peer = make_peer("qwen2", SIZES)
    peer.resize_token_embeddings(90, pad_to_multiple_of=64)
    randomise(peer, seed=1)
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    hf, params, _ = load_qwen2(tmp_path)
    assert hf["vocab_size"] == 128 == params["head"]["kernel"].shape[1]
    tokens, positions = tokens_of(90, (2, 9)), np.tile(np.arange(9), (2, 1))
    mask = np.ones((2, 9), bool)
    expected = their_logits(peer, tokens, positions, mask).logits
    found, _ = our_logits(decoder_of(hf), params, tokens, positions, causal_mask(jnp.asarray(mask, int)))
    error = relative_error(found, expected)
    print(f"Qwen2, sharded, padded vocabulary: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", ["Qwen2", "LLaMA"])
def test_a_cache_filled_and_extended(tmp_path, name):
    """Prompts of three lengths with holes, then four more tokens, one and two at a time."""
    kind, change = CASES[name]
    peer = make_peer(kind, SIZES | change)
    peer.save_pretrained(tmp_path)
    hf, params, _ = load_qwen2(tmp_path)
    decoder = decoder_of(hf)
    prompt, length = MASK.shape[1], MASK.shape[1] + 4
    seen = np.concatenate([MASK, np.ones((3, 4), bool)], axis=1)
    tokens, positions = tokens_of(90, seen.shape), places(seen)
    full, _ = our_logits(decoder, params, tokens, positions, causal_mask(jnp.asarray(seen, int)))
    slots = length + 3
    keys = jnp.asarray(np.pad(seen, ((0, 0), (0, 3))), int)

    ours, theirs, begin = [], [], 0
    ours_cache, their_cache = KVCache.zeros(decoder.config, 3, slots), transformers.DynamicCache()
    for size in (prompt, 1, 2, 1):
        cut = slice(begin, begin + size)
        mask = AttentionMask(causal=True, segments=keys[:, cut], kv_segments=keys, slot=ours_cache.index)
        found, ours_cache = our_logits(decoder, params, tokens[:, cut], positions[:, cut], mask, ours_cache)
        begin += size
        expected = their_logits(
            peer, tokens[:, cut], positions[:, cut], seen[:, :begin],
            past_key_values=their_cache, use_cache=True,
        )  # fmt: skip
        ours.append(np.asarray(found))
        theirs.append(expected.logits.numpy())
    assert int(ours_cache.index) == length == their_cache.get_seq_length()
    ours, theirs = np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)
    against_peer, against_full = relative_error(ours, theirs, seen), relative_error(ours, full, seen)
    print(f"{name}, cached: {against_peer:.1e} from the cached peer, {against_full:.1e} from our full pass")
    assert against_peer < TOLERANCE and against_full < TOLERANCE


WIDE = {
    "Qwen2-7B": (
        "qwen2",
        dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
    ),
    "LLaMA-2-7B": (
        "llama",
        dict(
            hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
            rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_one_layer_at_the_published_width(tmp_path, name):
    kind, change = WIDE[name]
    peer = make_peer(kind, SIZES | change | dict(num_hidden_layers=1, vocab_size=1000))
    peer.save_pretrained(tmp_path, max_shard_size="400MB")
    hf, params, report = load_qwen2(tmp_path)
    tokens = tokens_of(1000, (2, 20))
    mask = np.ones((2, 20), bool)
    mask[1, 15:] = False
    # Far into the context the rotation's angles are thousands of radians.
    positions = np.arange(20) + np.array([[0], [30_000]])
    expected = their_logits(peer, tokens, positions, mask).logits
    found, _ = our_logits(decoder_of(hf), params, tokens, positions, causal_mask(jnp.asarray(mask, int)))
    error = relative_error(found, expected, mask)
    print(f"{name}, one layer: {error:.1e} of the scale, {report.bytes:,} bytes")
    assert error < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen2, tied", "LLaMA"])
def test_transformers_reads_what_we_write(tmp_path, name, dtype):
    kind, change = CASES[name]
    peer = make_peer(kind, SIZES | change).to(dtype)
    peer.save_pretrained(tmp_path / "theirs")
    hf, params, _ = load_qwen2(tmp_path / "theirs")
    save_qwen2(tmp_path / "ours", hf, params, max_shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    again, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert_same_state(again, peer)
    assert again.config.rope_parameters == peer.config.rope_parameters
    assert again.config.rms_norm_eps == peer.config.rms_norm_eps


@pytest.mark.parametrize("width,theta", [(128, 1e6), (64, 1e6), (128, 1e4), (20, 50.0), (80, 5e5)])
def test_rotary_frequencies_to_the_last_bit(width, theta):
    config = transformers.Qwen2Config(
        hidden_size=2 * width, num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    rotary = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(config)
    expected = rotary.inv_freq.numpy()
    # torch's fp32 power itself misses the nearest number now and then, by one unit in the last place.
    np.testing.assert_array_max_ulp(inverse_frequencies(width, theta), expected, maxulp=1)
    assert (inverse_frequencies(width, theta) == expected).mean() > 0.95
