"""What the loss needs beside its arguments on a TPU, for 8,192 tokens of Qwen2's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from avlm_jax.chips import GIB
from avlm_jax.config import load_config
from avlm_jax.losses import masked_cross_entropy

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 2048, 3584, 152_064
CHUNK = 128  # loss_chunk of configs/savenvideo.py:size=7b, positions of each row
ARGUMENTS = (
    ((ROWS, LENGTH, WIDTH), jnp.bfloat16),
    ((WIDTH, VOCABULARY), jnp.bfloat16),
    ((ROWS, LENGTH), jnp.int32),
    ((ROWS, LENGTH), jnp.bool_),
)


def chunked(hidden: jax.Array, head: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    total, count, _ = masked_cross_entropy(hidden, head, tokens, mask, chunk=CHUNK)
    return total / count


def whole(hidden: jax.Array, head: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    logits = jnp.einsum("bld,dv->blv", hidden, head, preferred_element_type=jnp.float32)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * mask[:, 1:]) / jnp.sum(mask[:, 1:])


def test_the_chunk_is_that_of_the_recipe(repository: Path) -> None:
    assert load_config(f"{repository}/configs/savenvideo.py:size=7b").loss_chunk == CHUNK


@pytest.mark.aot
def test_logits_never_exist_whole(compile_for_v5e: Callable[..., Any]) -> None:
    """At most 0.6 GiB with gradients (measured: 0.40). Logits that exist whole are 4.64 GiB in fp32, with theirs 6.96."""
    memory = compile_for_v5e(jax.value_and_grad(chunked), *ARGUMENTS).memory_analysis()
    assert memory.temp_size_in_bytes <= 0.6 * GIB
    memory = compile_for_v5e(jax.value_and_grad(whole), *ARGUMENTS).memory_analysis()
    assert memory.temp_size_in_bytes >= 4.64 * GIB
