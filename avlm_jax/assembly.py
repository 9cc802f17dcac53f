"""From a configuration to something that runs: tokenizer, system, parameters. Shared by every verb that needs a model.

Weights are loaded first and only what no file holds is drawn: the backbones come from the folders of `config.init`, what
training has learnt from a stage checkpoint, the rest from the seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avlm_jax.config import ConfigError
from avlm_jax.models.api import System, build_system, init_params
from avlm_jax.state import Tree, flatten, unflatten
from avlm_jax.weights.beats import load_beats
from avlm_jax.weights.qwen2 import load_qwen2
from avlm_jax.weights.siglip import load_siglip
from avlm_jax.weights.table import LoadReport
from input_pipeline.conversation import find_media_token_id, load_tokenizer, make_template
from input_pipeline.transforms.sample import SampleBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Hugging Face config key of each decoder field that must agree with the checkpoint.
_LLM_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_dim": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A configuration's tokenizer and system; parameters are made by `parameters`."""

    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast
    system: System

    def builder(self, *, prompt: bool = False, max_length: int = 0) -> SampleBuilder:
        """What turns a record's sample into arrays for this system.

        Args:
            prompt: leave the answer open, for generation.
            max_length: text positions of a row; 0 takes text.max_length.
        """
        text = self.config.text
        return SampleBuilder(
            spec=self.system.spec,
            tokenizer=self.tokenizer,
            media_token_id=self.system.media_token_id,
            num_media_tokens=self.system.num_media_tokens,
            max_length=max_length or text.max_length,
            prompt=prompt,
            template=make_template(text.template),
            system=text.system,
        )

    def abstract_params(self) -> Tree:
        """Shape and dtype of every parameter; nothing is computed."""
        return jax.eval_shape(lambda: init_params(self.system, self._zeros(), 0))

    def _zeros(self) -> dict[str, jax.Array]:
        length = self.system.num_media_tokens + 8
        shapes = self.system.spec.batch_shapes(1, length)
        return {key: jnp.zeros(shape, dtype) for key, (shape, dtype) in shapes.items()}

    def parameters(self, learnt: Mapping[str, Any] | None = None) -> tuple[Tree, dict[str, LoadReport]]:
        """All parameters: the backbones' from files, then `learnt` over them, the rest drawn from config.seed.

        Args:
            learnt: tree of a stage checkpoint, or None.

        Returns:
            (parameters, load report by backbone).

        Raises:
            ConfigError: a backbone's sizes are not the configuration's.
            ValueError: `learnt` holds a parameter that the system lacks, or of another shape.
        """
        expected = flatten(self.abstract_params())
        known, reports = load_backbones(self.config)
        for path, value in flatten(learnt or {}).items():
            if path not in expected or expected[path].shape != value.shape:
                wanted = f"shape {list(expected[path].shape)}" if path in expected else "no such parameter"
                raise ValueError(
                    f"checkpoint holds {path} {list(value.shape)}; this configuration wants {wanted}"
                )
            known[path] = value
        missing = tuple(path for path in expected if path not in known)

        @functools.partial(jax.jit, static_argnums=0)
        def draw(paths: tuple[str, ...]) -> dict[str, jax.Array]:
            # Only what is asked for leaves the program, so XLA never draws the backbones.
            drawn = flatten(init_params(self.system, self._zeros(), self.config.seed))
            return {path: drawn[path] for path in paths}

        fresh = draw(missing) if missing else {}
        return unflatten({path: known.get(path, fresh.get(path)) for path in expected}), reports


def assemble(config: ConfigDict) -> Assembly:
    """Tokenizer and system of a configuration.

    Raises:
        UserError: the tokenizer folder is missing; a section of the configuration is wrong.
    """
    tokenizer = load_tokenizer(config.text.tokenizer)
    media_token_id = find_media_token_id(tokenizer, config.model.llm.vocab_size)
    return Assembly(config, tokenizer, build_system(config, media_token_id))


def load_backbones(config: ConfigDict) -> tuple[dict[str, np.ndarray], dict[str, LoadReport]]:
    """Flat parameters of vision, audio and llm from the folders of config.init; an empty folder name means none.

    Raises:
        ConfigError: a folder is missing, or its sizes differ from config.model's.
    """
    known: dict[str, np.ndarray] = {}
    reports: dict[str, LoadReport] = {}
    for part in ("vision", "audio", "llm"):
        folder = config.init[part]
        if not folder:
            continue
        if not Path(folder).is_dir():
            raise ConfigError(f"config.init.{part} names the folder {folder!r}, which does not exist")
        section = config.model[part]
        if part == "vision":
            found, tree, reports[part] = load_siglip(folder, feature_layer=section.feature_layer)
            _agree(part, folder, section, dataclasses.asdict(found), ("dtype", "backend", "feature_layer"))
        elif part == "audio":
            found, tree, reports[part] = load_beats(folder)
            _agree(part, folder, section, dataclasses.asdict(found), ("dtype", "backend", "mask"))
        else:
            hf, tree, reports[part] = load_qwen2(folder)
            _agree(part, folder, section, {ours: hf[theirs] for ours, theirs in _LLM_KEYS.items()}, ())
        known |= flatten({part: tree})
    return known, reports


def _agree(
    part: str, folder: str, section: ConfigDict, found: Mapping[str, Any], free: tuple[str, ...]
) -> None:
    for key, value in found.items():
        if key in section and key not in free and section[key] != value:
            raise ConfigError(
                f"config.model.{part}.{key} is {section[key]!r} but the checkpoint in {folder} has {value!r}; "
                f"set --config.model.{part}.{key}={value}"
            )
