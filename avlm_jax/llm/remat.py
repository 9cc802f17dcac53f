"""What a decoder block keeps for its backward pass and what that computes anew, by name.

Bytes per token and layer, bf16, beside the block's weights; h query heads, hk key/value heads of d channels, width w. In
brackets Qwen2-7B's (h 28, hk 4, d 128, w 3584).

    none     everything [351 kB; 474 kB with LoRA of rank 128 and dropout; the reference attention's logits come on top]
    full     the block's input, 2 w [7 kB]; the block is computed again
    minimal  the same, queries, keys and values behind the rotation, 2 (h + 2 hk) d [9 kB], and, with splash, what the
             kernel needs, (2 d + 4) h [7 kB]: neither projections nor kernel run again. cuDNN's kernel and the reference
             give that nobody to keep; they run again
    offload  what minimal keeps and the block's input, in the host's memory: on the device only what is on its way
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from avlm_jax.layers.splash import RESIDUALS

BLOCK_INPUT, QKV = "block_input", "qkv"

# None: nothing is computed again. Else what `jax.checkpoint` takes as its policy.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.save_only_these_names(QKV, RESIDUALS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT, QKV, RESIDUALS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is one of `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"llm.remat is {name!r}; use one of {', '.join(POLICIES)}")


def rematerialised(block: type[nn.Module], name: str) -> type[nn.Module]:
    """`block`, one layer inside a scan, under the policy `name`."""
    policy = POLICIES[name]
    # prevent_cse is only needed outside of scan.
    return block if policy is None else nn.remat(block, prevent_cse=False, policy=policy)
