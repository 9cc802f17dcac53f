"""From a configuration to something that runs: tokenizer, system, parameters. Shared by every verb that needs a model.

Weights are loaded first and only what no file holds is drawn: the backbones come from the folders of `config.init`, what
training has learnt from a stage checkpoint, the rest from the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.lora import MERGED, merge_stacked, retired_updates
from avlm_jax.models.api import System, abstract_params, build_system, init_params, smallest_batch
from avlm_jax.quantize import SCALE, abstract_frozen, check_frozen_dtype, quantise
from avlm_jax.sharding import check_heads, make_mesh, param_shardings
from avlm_jax.state import Tree, flatten, unflatten
from avlm_jax.weights.beats import open_beats
from avlm_jax.weights.placement import place, place_quantised
from avlm_jax.weights.qwen2 import has_qkv_bias, head_dim, open_qwen2
from avlm_jax.weights.siglip import open_siglip
from avlm_jax.weights.stored import LoadReport, StoredLeaf
from avlm_jax.weights.table import ImportPlan
from input_pipeline.conversation import (
    TEMPLATES,
    Template,
    end_of_turn_id,
    find_media_token_id,
    load_tokenizer,
)
from input_pipeline.errors import UserError
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
class TextConfig:
    """How text becomes tokens.

    Attributes:
        tokenizer: its Hugging Face folder.
        max_length: text positions of a row, media included.
        template: chat template, see `input_pipeline.templates`.
        system: system text instead of the template's; empty for none.
        template_options: the template's own fields, e.g. {"drop_question": True} for "plain"; null takes its defaults.
    """

    tokenizer: str
    max_length: int
    template: Literal["chatml", "vicuna", "plain"] = "chatml"
    system: str | None = None
    template_options: dict[str, Any] | None = None

    def make_template(self, where: str = "text") -> Template:
        """Raises ConfigError, naming the section `where`, if the template has no such option, or one of another type."""
        options = {} if self.template_options is None else self.template_options
        if not isinstance(options, ConfigDict | Mapping):
            raise ConfigError(
                f"{where}.template_options is {options!r}; a mapping like {{'drop_question': True}} is expected"
            )
        return to_dataclass(TEMPLATES[self.template], options, f"{where}.template_options")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A configuration's tokenizer and system; parameters are made by `parameters`.

    Attributes:
        config, tokenizer, system: what they say.
        stage: the one that is trained, or that made the checkpoint: its template goes for text, prompts and the tokens
            that end an answer. Empty: config.text's.
    """

    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast
    system: System
    stage: str = ""

    def of_stage(self, stage: str) -> Assembly:
        """The same as stage `stage` uses it.

        Raises:
            UserError: there is no such stage, or its template does not fit the tokenizer.
        """
        found = dataclasses.replace(self, stage=stage)
        end_of_turn_id(self.tokenizer, found.template)
        return found

    def builder(self, *, prompt: bool = False, max_length: int = 0) -> SampleBuilder:
        """What turns a record's sample into arrays for this system.

        Args:
            prompt: leave the answer open, for generation.
            max_length: text positions of a row; 0 takes text.max_length.
        """
        return SampleBuilder(
            spec=self.system.spec,
            tokenizer=self.tokenizer,
            media_token_id=self.system.media_token_id,
            num_media_tokens=self.system.num_media_tokens,
            max_length=max_length or self.text.max_length,
            prompt=prompt,
            template=self.template,
            system=self.text.system,
        )

    @functools.cached_property
    def text(self) -> TextConfig:
        """The section config.text, checked; a template of the stage's own stands in it, without text.system."""
        if self.stage and self.stage not in self.config.stage:
            raise ConfigError(
                f"the configuration has no stage {self.stage!r}, so its chat template is not known; use the one that the "
                f"checkpoint was trained by (stages: {', '.join(self.config.stage)})"
            )
        own = self.config.stage[self.stage] if self.stage else {}
        if own.get("template"):
            changes = {
                "template": own["template"],
                "template_options": own.get("template_options"),
                "system": None,
            }
            return to_dataclass(TextConfig, {**self.config.text, **changes}, f"stage.{self.stage}")
        if own.get("template_options") is not None:
            raise ConfigError(
                f"stage.{self.stage}.template_options is set, but stage.{self.stage}.template is empty"
            )
        return to_dataclass(TextConfig, self.config.text, "text")

    @functools.cached_property
    def template(self) -> Template:
        """The chat template that the stage or config.text names."""
        text = self.text
        own = self.stage and self.config.stage[self.stage].get("template")
        return text.make_template(f"stage.{self.stage}" if own else "text")

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices as config.mesh arranges them.

        Raises:
            ConfigError: sizes that do not fit the devices, see `make_mesh`, or the system's heads.
        """
        mesh = make_mesh(**self.config.mesh)
        check_heads(self.system.heads, mesh)
        return mesh

    def abstract_params(self) -> Tree:
        """Shape and dtype of every parameter as it is drawn; nothing is computed."""
        return abstract_params(self.system)

    def abstract_parameters(self, *, fp32: Collection[str] = (), without: Collection[str] = ()) -> Tree:
        """Shape and dtype of everything that `parameters` gives, of which these arguments are; nothing is computed."""
        parts = {part: tree for part, tree in self.abstract_params().items() if part not in without}
        return abstract_frozen(parts, self.config.frozen_dtype, fp32)

    def parameters(
        self,
        learnt: Mapping[str, Any] | None = None,
        *,
        mesh: Mesh | None = None,
        fp32: Collection[str] = (),
        without: Collection[str] = (),
    ) -> tuple[Tree, dict[str, LoadReport]]:
        """All parameters on their devices: the backbones' from files, `learnt` over them, the rest drawn from config.seed.

        Files are read slice by slice into the devices' memory, see `weights.placement`. Adapters that a lineage has
        retired (`lora.retire`) are added to their kernels. With config.frozen_dtype "int8" the kernels that
        `quantize.is_quantised` are, with their scales beside them.

        Args:
            learnt: tree of a stage checkpoint, or None.
            mesh: of the devices; None makes config.mesh.
            fp32: paths that stay in single precision (what is trained); all others get config.frozen_dtype.
            without: top-level parts ("vision") that nothing will ask for; they are neither read nor placed.

        Returns:
            (parameters, load report by backbone).

        Raises:
            ConfigError: a backbone's sizes are not the configuration's.
            ValueError: `learnt` holds a parameter that the system lacks, or of another shape.
        """
        mesh = self.mesh if mesh is None else mesh
        target = flatten(self.abstract_parameters(fp32=fp32, without=without))
        shardings = flatten(param_shardings(unflatten(target), mesh))
        int8 = {path for path in target if path + SCALE in target}
        scales = {path + SCALE for path in int8}
        expected = {path: leaf for path, leaf in target.items() if path not in scales}
        stored, reports = self.backbones
        known: dict[str, Any] = dict(stored)
        flat = flatten(learnt or {})
        # A learnt kernel was trained with everything retired already in it.
        updates = {path: pairs for path, pairs in retired_updates(flat).items() if path not in flat}
        for path, value in flat.items():
            if path.startswith(f"{MERGED}/"):
                continue
            if path not in expected or expected[path].shape != value.shape:
                wanted = f"shape {list(expected[path].shape)}" if path in expected else "no such parameter"
                raise ValueError(
                    f"checkpoint holds {path} {list(value.shape)}; this configuration wants {wanted}"
                )
            known[path] = value
        check_updates(updates, expected)
        missing = [path for path in expected if path not in known]

        def draw() -> dict[str, jax.Array]:
            # Only what is asked for leaves the program, so XLA never draws the backbones.
            tree, found = flatten(init_params(self.system, smallest_batch(self.system), self.config.seed)), {}
            for path in missing:
                if path in updates:
                    found[path] = tree[path]  # Converted when the adapters are in.
                elif path in int8:
                    found[path], found[path + SCALE] = quantise(tree[path])
                else:
                    found[path] = tree[path].astype(target[path].dtype)
            return found

        fresh: dict[str, jax.Array] = {}
        if missing:
            drawn = missing + [path + SCALE for path in missing if path in int8 and path not in updates]
            fresh = jax.jit(draw, out_shardings={path: shardings[path] for path in drawn})()
        placed: dict[str, jax.Array] = {}
        for path in expected:
            pairs = tuple(_place_adapter(path, pair, mesh) for pair in updates.get(path, ()))
            if path in fresh and not pairs:
                leaves = (path, path + SCALE) if path in int8 else (path,)
                placed |= {leaf: fresh[leaf] for leaf in leaves}
            elif path in int8:
                source = fresh[path] if path in fresh else known[path]
                where = shardings[path], shardings[path + SCALE]
                placed[path], placed[path + SCALE] = place_quantised(source, *where, pairs)
            elif pairs:  # In the stored precision until the adapters are in.
                kernel = fresh[path] if path in fresh else place(known[path], shardings[path])
                placed[path] = merge_stacked(kernel, pairs, scale=1.0, dtype=str(target[path].dtype))
            else:
                placed[path] = place(known[path], shardings[path], target[path].dtype)
        return unflatten(placed), reports

    @functools.cached_property
    def backbones(self) -> tuple[dict[str, StoredLeaf], dict[str, LoadReport]]:
        """`load_backbones` of the configuration; opened and hashed once."""
        return load_backbones(self.config)

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """sha256 of what this configuration begins with, by part: the backbones of config.init, and the tokenizer."""
        hashes = {part: report.sha256 for part, report in self.backbones[1].items()}
        tokenizer = (Path(self.config.text.tokenizer) / "tokenizer.json").read_bytes()
        return hashes | {"tokenizer": hashlib.sha256(tokenizer).hexdigest()}


def _place_adapter(kernel: str, pair: tuple[Any, Any], mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    layer = kernel.rpartition("/")[0]
    paths = (f"{layer}/lora_a", f"{layer}/lora_b")
    shardings = flatten(param_shardings(unflatten(dict(zip(paths, pair, strict=True))), mesh))
    a, b = (place(half, shardings[path], "float32") for path, half in zip(paths, pair, strict=True))
    return a, b


def check_updates(updates: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError if a retired adapter has no kernel among the parameters, or one of another shape."""
    for path, pairs in updates.items():
        shape = tuple(expected[path].shape) if path in expected else None
        for a, b in pairs:
            found = (*a.shape[:-1], b.shape[-1])
            if found != shape or a.shape[-1] != b.shape[-2]:
                wanted = f"{list(shape)}" if shape else "no such parameter"
                raise ValueError(
                    f"checkpoint holds an adapter {list(a.shape)} x {list(b.shape)} for {path}; this configuration "
                    f"wants {wanted}"
                )


def assemble(config: ConfigDict, stage: str = "") -> Assembly:
    """Tokenizer and system of a configuration, as `stage` uses them.

    Raises:
        UserError: the tokenizer folder is missing or does not fit the template; a section of the configuration is wrong.
    """
    check_frozen_dtype(config.frozen_dtype)
    tokenizer = load_tokenizer(config.text.tokenizer)
    media_token_id = find_media_token_id(tokenizer, config.model.llm.vocab_size)
    return Assembly(config, tokenizer, build_system(config, media_token_id)).of_stage(stage)


def load_backbones(config: ConfigDict) -> tuple[dict[str, StoredLeaf], dict[str, LoadReport]]:
    """Flat parameters of vision, audio and llm in the folders of config.init, checked; "" means none.

    The arrays are read later, slice by slice; for the reports' hashes every file is read once here, on every host.

    Raises:
        ConfigError: a folder is missing, or its sizes differ from config.model's.
        WeightError, SafetensorsError: see `weights.table.open_params`.
    """
    known: dict[str, StoredLeaf] = {}
    reports: dict[str, LoadReport] = {}
    for part in ("vision", "audio", "llm"):
        folder = config.init[part]
        if not folder:
            continue
        if not Path(folder).is_dir():
            raise ConfigError(
                f"config.init.{part} names the folder {folder!r}, and there is no {Path(folder).absolute()}; "
                f"`avlm import-weights` makes such folders, --config.init.{part}=DIR names another"
            )
        sizes, plan = open_backbone(part, folder, config.model[part].get("feature_layer"))
        check_sizes(config, part, folder, sizes)
        reports[part] = plan.report(label=f"{part}: hashing")
        known |= {f"{part}/{path}": leaf for path, leaf in plan.leaves.items()}
    return known, reports


def open_backbone(
    part: str, folder: str | Path, feature_layer: int | None = None
) -> tuple[dict[str, Any], ImportPlan]:
    """(sizes as config.model.<part> names them, parameters unread) of one backbone's folder.

    Raises:
        ConfigError: config.json is missing or asks for something this backbone cannot do.
        WeightError, SafetensorsError: see `weights.table.open_params`.
    """
    try:
        if part == "vision":
            found, plan = open_siglip(folder, feature_layer=feature_layer)
            return _without(dataclasses.asdict(found), "dtype", "backend", "chunk", "feature_layer"), plan
        if part == "audio":
            found, plan = open_beats(folder)
            return _without(dataclasses.asdict(found), "dtype", "backend", "chunk", "mask"), plan
        hf, plan = open_qwen2(folder)
    except UserError:
        raise
    except ValueError as error:  # From config.json.
        raise ConfigError(str(error)) from error
    return {ours: hf[theirs] for ours, theirs in _LLM_KEYS.items()} | {
        "head_dim": head_dim(hf),
        "qkv_bias": has_qkv_bias(hf),
    }, plan


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name not in names}


def check_sizes(config: ConfigDict, part: str, folder: str | Path, sizes: Mapping[str, Any]) -> None:
    """Raises ConfigError with every size of config.model.<part> that a checkpoint contradicts, and how to set it."""
    section = config.model[part]
    found = dict(sizes)
    if (
        part == "llm"
        and section.get("head_dim") is None
        and found["head_dim"] * section.num_heads == section.width
    ):
        del found["head_dim"]  # Null means width / num_heads.
    wrong = [key for key, value in found.items() if key in section and section[key] != value]
    if wrong:
        told = "; ".join(f"{key} is {section[key]!r}, the checkpoint's {found[key]!r}" for key in wrong)
        remedy = " ".join(f"--config.model.{part}.{key}={found[key]}" for key in wrong)
        raise ConfigError(
            f"config.model.{part} does not fit the checkpoint in {folder}: {told}. Set {remedy}"
        )


def check_weights(made_with: Mapping[str, str] | None, now: Mapping[str, str], where: str | Path) -> None:
    """Raises ConfigError if what lies in `where` was trained on other weights or another tokenizer.

    Args:
        made_with: sha256 by part, from the metadata; None where an older version wrote none.
        now: `Assembly.weights` of the configuration.
        where: checkpoint or run, for the message.
    """
    if made_with is None:
        return
    changed = sorted(part for part in made_with.keys() | now.keys() if made_with.get(part) != now.get(part))
    if changed:
        told = "; ".join(
            f"{part}: sha256 {made_with.get(part, 'none')} there, {now.get(part, 'none')} now"
            for part in changed
        )
        keys = {part: "text.tokenizer" if part == "tokenizer" else f"init.{part}" for part in changed}
        raise ConfigError(
            f"{where} was trained on other weights of {', '.join(changed)} than the configuration names now ({told}); "
            f"let {', '.join(f'--config.{key}=DIR' for key in keys.values())} name the same ones, or train again"
        )
