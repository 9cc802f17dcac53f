"""Greedy generation with a key-value cache: one compiled prefill, one compiled loop over new tokens.

Prompts of a batch are right-padded to one length; each row goes on from its own last position, and a row that
is done waits for the others without being changed by them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, assemble, check_weights
from avlm_jax.checkpoints.stage_result import CONFIG_FILE, METADATA_FILE, load_tree
from avlm_jax.checkpoints.storage import CheckpointError
from avlm_jax.config import apply_overrides, config_from_json, load_config
from avlm_jax.llm.decoder import KVCache
from avlm_jax.models.api import System
from avlm_jax.sharding import put_batch, replicated, rows_of_process
from avlm_jax.state import Tree, flatten
from avlm_jax.weights.placement import place_params
from input_pipeline.conversation import Template, end_of_turn_id
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Qwen2 ends a turn with <|im_end|> and a text with this one (Qwen2-7B-Instruct, generation_config.json: eos_token_id).
END_OF_TEXT = "<|endoftext|>"
# Longest answer of the published recipes' multiple-choice runs is 16 (lmms-eval); an answer in words needs a
# few more.
DEFAULT_NEW_TOKENS = 32


class GenerationError(UserError):
    """The model gave numbers that are none; its parameters are damaged or its precision is too low."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a batch was answered, on the host.

    Attributes:
        tokens: i32 [b m], new tokens; behind a row's end stands its stop token or padding.
        lengths: i32 [b], tokens ahead of the stop token.
        stopped: bool [b]; False: cut off after m tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray


class Generator:
    """Answers batches of prompts, always with the likeliest next token.

    Args:
        assembly: tokenizer and system.
        params: all parameters; put on the mesh of the configuration.
        max_new_tokens: m, after which an answer is cut off.
        stop_ids: tokens that end an answer; default: `find_stop_ids`.

    Raises:
        UserError: max_new_tokens is below 1, or the tokenizer lacks what ends the template's turns.
    """

    def __init__(
        self,
        assembly: Assembly,
        params: Mapping[str, Any],
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop_ids: Sequence[int] | None = None,
    ):
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
        self.assembly = assembly
        self.max_new_tokens = max_new_tokens
        if stop_ids is None:
            stop_ids = find_stop_ids(assembly.tokenizer, assembly.template)
        self.stop_ids = tuple(stop_ids)
        self._mesh = assembly.mesh
        self._params = place_params(params, self._mesh)
        self._programs = _compile(assembly.system, max_new_tokens)

    def __call__(self, batch: Mapping[str, np.ndarray], names: Sequence[str] = ()) -> Generation:
        """Answers the prompts of a batch (`Batch` of spec.py, made with `Assembly.builder(prompt=True)`).

        Rows without a token (padding rows of `iter_eval`) get no answer: length 0. Of several processes each gives its own
        rows, see `share_of_batch`, and gets their answers.

        Args:
            batch: numpy arrays; every new shape is compiled anew.
            names: of the rows, for errors.

        Raises:
            GenerationError: a row's logits are not finite. They would be read as token 0, an answer of
                "!!!!".
        """
        prefill, decode = self._programs
        placed = self._place(batch)
        with jax.set_mesh(self._mesh):  # Attention kernels ask what they run on.
            logits, cache, seen = prefill(self._params, placed)
            stop_ids = np.asarray(self.stop_ids, np.int32)
            found, _ = decode(
                self._params, logits, (cache, seen), placed["positions"], placed["segment_ids"], stop_ids
            )
        tokens, lengths, stopped, broken = self._fetch(found, len(batch["tokens"]))
        if (broken >= 0).any():
            row = int(np.flatnonzero(broken >= 0)[0])
            name = f" ({names[row]})" if row < len(names) else ""
            raise GenerationError(
                f"row {row}{name}: the logits of new token {int(broken[row])} are not finite, so there is "
                "no answer. A parameter is NaN or infinite (check the checkpoint), or model.llm.dtype is too "
                "narrow; try float32"
            )
        return Generation(tokens, lengths, stopped)

    def texts(self, batch: Mapping[str, np.ndarray], names: Sequence[str] = ()) -> list[str]:
        """The answers as text, without control tokens; empty for padding rows.

        Arguments and errors are those of `__call__`.
        """
        found = self(batch, names)
        tokenizer = self.assembly.tokenizer
        return [
            tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True).strip()
            for ids, length in zip(found.tokens, found.lengths, strict=True)
        ]

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        rows = len(batch["tokens"])
        if jax.process_count() > 1 or rows % (self._mesh.shape["data"] * self._mesh.shape["fsdp"]) == 0:
            return put_batch(dict(batch), self._mesh)
        return jax.device_put(
            dict(batch), replicated(self._mesh)
        )  # Fewer rows than devices: one question, say.

    def _fetch(self, arrays: Sequence[jax.Array], rows: int) -> list[np.ndarray]:
        """This process's `rows` rows of what the devices hold."""
        if jax.process_count() == 1:
            return jax.device_get(arrays)
        own = rows_of_process(self._mesh, rows)
        return [multihost_utils.process_allgather(array, tiled=True)[own] for array in arrays]


def find_stop_ids(tokenizer: PreTrainedTokenizerFast, template: Template) -> list[int]:
    """Ids of the tokens that end an answer: what ends the template's turns, then what ends a whole text.

    Raises:
        UserError: the tokenizer has no token that ends the template's turns.
    """
    ends = tokenizer.get_added_vocab().get(END_OF_TEXT), tokenizer.eos_token_id
    found = [end_of_turn_id(tokenizer, template), *(end for end in ends if end is not None)]
    return list(dict.fromkeys(found))


Prefill = Callable[[Tree, dict[str, Array]], tuple[Array, KVCache, Array]]
Decode = Callable[..., tuple[tuple[Array, Array, Array, Array], tuple[KVCache, Array]]]


@functools.lru_cache(maxsize=8)
def _compile(system: System, max_new_tokens: int) -> tuple[Prefill, Decode]:
    """The two programs; generators of one system share them, whatever their parameters."""

    @jax.jit
    def prefill(params: Tree, batch: dict[str, Array]) -> tuple[Array, KVCache, Array]:
        # The last new token is never read, so it needs no slot.
        slots = batch["tokens"].shape[1] + max_new_tokens - 1
        return system.apply({"params": params}, batch, slots, method="prefill")

    # The cache is given back though nobody wants it: only so can the loop write into the one it was given.
    @functools.partial(jax.jit, donate_argnums=2)
    def decode(
        params: Tree,
        logits: Float[Array, "b v"],
        memory: tuple[KVCache, Bool[Array, "b s"]],
        positions: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"],
        stop_ids: Int[Array, " k"],
    ) -> tuple[tuple[Array, Array, Array, Array], tuple[KVCache, Array]]:
        def choose(logits: Float[Array, "b v"], alive: Bool[Array, " b"]) -> tuple[Array, Array, Array]:
            """Next tokens [b], which rows go on behind them, and which rows are broken."""
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            broken = alive & ~jnp.all(jnp.isfinite(logits), axis=-1)
            token = jnp.where(alive, token, stop_ids[0])
            return token, alive & ~jnp.isin(token, stop_ids) & ~broken, broken

        last = jnp.sum(segment_ids > 0, axis=1) - 1
        # Position of a row's first new token.
        first = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
        token, alive, bad = choose(logits, last >= 0)
        tokens = jnp.full((len(token), max_new_tokens), stop_ids[0], jnp.int32).at[:, 0].set(token)
        broken = jnp.where(bad, 0, -1)

        def unfinished(state: tuple) -> Array:
            step, alive = state[0], state[2]
            return (step < max_new_tokens) & jnp.any(alive)

        def extend(state: tuple) -> tuple:
            step, token, alive, tokens, lengths, broken, memory = state
            logits, *memory = system.apply(
                {"params": params}, token, first + step - 1, *memory, method="extend"
            )
            token, alive, bad = choose(logits, alive)
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
            broken = jnp.where(bad, step, broken)
            return step + 1, token, alive, tokens, lengths + alive, broken, tuple(memory)

        start = (jnp.ones((), jnp.int32), token, alive, tokens, alive.astype(jnp.int32), broken, memory)
        _, _, alive, tokens, lengths, broken, memory = jax.lax.while_loop(unfinished, extend, start)
        return (tokens, lengths, ~alive, broken), memory

    return prefill, decode


@dataclasses.dataclass(frozen=True)
class Model:
    """A published checkpoint, ready to run.

    Attributes:
        assembly, params: what `Generator` takes.
        metadata: of the checkpoint: stage, hash, parent, versions.
        name: system, stage and the first digits of the hash; stands in predictions.
    """

    assembly: Assembly
    params: Tree
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.assembly.config.system}/{self.metadata.get('stage', '?')}/{self.metadata['hash'][:12]}"


def checkpoint_config(checkpoint: str | Path) -> ConfigDict:
    """The configuration that a published checkpoint was made by, locked; no parameter is read.

    Raises:
        UserError: no checkpoint is there, or its configuration is damaged.
    """
    folder = Path(checkpoint)
    for name in (METADATA_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is no checkpoint of a finished stage (it has no {name}); run `make demo` for the "
                "demo's, or pass --checkpoint WORKDIR/STAGE/final of a training run"
            )
    try:
        return config_from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged ({error}); copy the checkpoint again") from error


def trained_stage(metadata: Mapping[str, Any]) -> str:
    """The stage of its configuration that made a checkpoint, by the checkpoint's metadata; empty if that is not known."""
    # What was exported and imported again is published under another name.
    return metadata.get("exported", metadata).get("stage") or ""


def checkpoint_stage(checkpoint: str | Path) -> str:
    """`trained_stage` of a published checkpoint; no parameter is read.

    Raises:
        UserError: its metadata are damaged.
    """
    file = Path(checkpoint) / METADATA_FILE
    try:
        return trained_stage(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy the checkpoint again") from error


def load_model(
    checkpoint: str | Path, config: ConfigDict | str | None = None, overrides: Sequence[str] = ()
) -> Model:
    """Loads what a stage published.

    Args:
        checkpoint: its folder, <workdir>/<stage>/final.
        config: path[:arguments], or resolved; default: the configuration stored with the checkpoint.
        overrides: `--config.a.b=value` strings on top of a path's or the stored configuration.

    Raises:
        UserError: no checkpoint is there, it is damaged, or it does not fit the configuration.
    """
    folder = Path(checkpoint)
    stored = checkpoint_config(folder)
    if isinstance(config, str):
        resolved = load_config(config, overrides)
    else:
        resolved = apply_overrides(stored if config is None else config, overrides)
    assembly = assemble(resolved, checkpoint_stage(folder))
    try:
        learnt, _, metadata = load_tree(folder)
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(f"{error}; copy the checkpoint again") from error
    check_weights(metadata.get("weights"), assembly.weights, folder)
    try:
        # All that was learnt in fp32, as it is stored, the backbones in frozen_dtype, as in training.
        params, _ = assembly.parameters(learnt, fp32=flatten(learnt))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{folder} does not fit the configuration: {error}") from error
    return Model(assembly, params, metadata)
