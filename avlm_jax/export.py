"""Writes a trained model as a folder that runs with PyTorch and without JAX.

    config.json, modeling_savenvideo.py    the whole model: `SaveNVideo.from_pretrained(folder)`
    vision/  audio/  connector/            encoders and connector as safetensors
    llm/                                   the language model for transformers, adapters merged into it; with --adapter
    adapter/                               the LoRA adapter for PEFT, and llm/ is the base it was trained on
    avlm_config.json                       the training configuration, so that `avlm import-weights --model` reads it back
    README.md  hashes.json                 a model card; the sha256 of every other file

Every backbone keeps the precision its files have, whatever was merged into it (sums are formed in fp32 and rounded once);
connector and adapter keep the fp32 of training. One tensor is in memory at a time. The folder appears under its name once it
is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.resources
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from avlm_jax import model_card, staging
from avlm_jax.assembly import Assembly, assemble, check_sizes, check_updates, check_weights, open_backbone
from avlm_jax.checkpoints.stage_result import load_tree
from avlm_jax.checkpoints.storage import CheckpointError
from avlm_jax.config import ConfigError, apply_overrides, config_to_json
from avlm_jax.generate import checkpoint_config, find_stop_ids, trained_stage
from avlm_jax.lora import MERGED, is_lora, retired_updates
from avlm_jax.models.api import init_params, smallest_batch
from avlm_jax.published import find_lineage, find_reports, find_stage
from avlm_jax.quantize import float_dtype
from avlm_jax.state import Tree, flatten, unflatten
from avlm_jax.weights import qwen2
from avlm_jax.weights.beats import save_beats
from avlm_jax.weights.connector import save_connector
from avlm_jax.weights.exported import (
    ADAPTER,
    CARD,
    CONNECTOR,
    FORMAT_VERSION,
    HASHES,
    MODEL_CONFIG,
    MODEL_TYPE,
    TRAINING_CONFIG,
)
from avlm_jax.weights.outgoing import Merge, Outgoing, Passage
from avlm_jax.weights.peft import save_adapter
from avlm_jax.weights.record import PARTS
from avlm_jax.weights.siglip import save_siglip
from avlm_jax.weights.tokenizer_folder import copy_tokenizer
from input_pipeline.conversation import ChatMLTemplate
from input_pipeline.errors import UserError
from input_pipeline.progress import track

MODELING = "modeling_savenvideo.py"

EPILOG = """\
examples:
  avlm export --workdir runs/demo/full --out exported
  avlm export --workdir runs/mine --stage 2a --out exported --adapter
      the base language model as it was, and the adapter of stage 2a beside it for PEFT
  avlm export --workdir runs/7b --out exported --config.init.llm=/new/place/llm
      where the weights lie now that the stage was trained on; their hashes are compared
  avlm import-weights --model exported --out weights
      the way back
"""


class ExportError(UserError):
    """Nothing was exported. The message names the folder or key and the remedy."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What is to be written; every check has passed and no tensor of a backbone was read.

    Attributes:
        assembly: tokenizer and system.
        parts: "vision", "audio", "llm", "connector", "adapter" (empty without one) -> flat leaves.
        llm_config: the language model's Hugging Face config.
        drawn: paths that no stage has trained and no file holds; drawn from config.seed as everywhere.
        merged: how many adapters of the lineage went into the language model.
    """

    assembly: Assembly
    parts: dict[str, dict[str, Any]]
    llm_config: dict[str, Any]
    drawn: tuple[str, ...]
    merged: int

    @property
    def nbytes(self) -> int:
        leaves = (leaf for part in self.parts.values() for leaf in part.values())
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def export_model(
    config: ConfigDict,
    learnt: Mapping[str, Any],
    out: str | Path,
    *,
    adapter: bool = False,
    metadata: Mapping[str, Any] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    reports: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
) -> Path:
    """Writes the folder described at the top of this file.

    Args:
        config: the training configuration; config.init names the backbones' folders.
        learnt: tree of a stage checkpoint, see `stage_result.load_tree`.
        out: the folder; must not exist or be empty.
        adapter: keep the adapter apart instead of merging it.
        metadata: of the stage checkpoint: stage, hash, parent, versions, and the hashes of the backbones that it was
            trained on, with which those in config.init are compared.
        lineage: metadata of the stages before it, oldest first; for the model card.
        reports: of `avlm evaluate` on this stage; for the model card.
        overwrite: replace an earlier export in `out`.

    Raises:
        ExportError: `out` is in the way, an adapter is asked for that does not exist, `learnt` is not finite.
        ConfigError: config.init lacks a folder, or configuration, folders and `learnt` do not fit each other.
        WeightError, SafetensorsError: the backbones' files. Up to here nothing was written.
        OSError: the disk; what was written is removed.
    """
    out = Path(out)
    check_replaceable(out, overwrite)
    staging.check_out(
        out, [config.init[part] for part in PARTS] + [config.text.tokenizer], overwrite=overwrite
    )
    export = plan_export(config, learnt, adapter, metadata)
    staging.check_space(out, export.nbytes, "the export")
    # hashes.json is what makes a folder an export.
    with staging.staged(out, last=(MODEL_CONFIG, HASHES)) as partial:
        _write(partial, export, adapter, dict(metadata or {}), lineage, reports)
        hashes = {str(path.relative_to(partial)): digest for path, digest in _hash_files(partial)}
        (partial / HASHES).write_text(json.dumps(hashes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises ExportError if writing `out` would lose anything but an export that may be replaced."""
    if staging.is_vacant(out) or (out.is_symlink() and not out.exists()) or not out.is_dir():
        return  # `staging.check_out` knows what to say of links and files.
    if not overwrite:
        raise ExportError(f"{out} is not empty; choose another --out, or replace an export with --overwrite")
    if not (out / HASHES).is_file() or _model_type(out) != MODEL_TYPE:
        raise ExportError(f"{out} is no export, so --overwrite leaves it alone; choose another --out")


def _model_type(folder: Path) -> Any:
    try:
        return json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def plan_export(
    config: ConfigDict,
    learnt: Mapping[str, Any],
    adapter: bool,
    metadata: Mapping[str, Any] | None = None,
) -> Export:
    """Checks everything and keeps no tensor of the backbones; arguments and errors as `export_model`.

    Without "weights" in `metadata` (by backbone, the sha256 that training noted) that comparison is left out.
    """
    metadata = metadata or {}
    if config.system != MODEL_TYPE:
        raise ExportError(f"config.system is {config.system!r}; only {MODEL_TYPE} can be exported so far")
    for part in PARTS:
        if not config.init[part]:
            raise ConfigError(
                f"config.init.{part} is empty, so there is no {part} model to export; name the folder that the training "
                f"began from with --config.init.{part}=DIR"
            )
        if not Path(config.init[part]).is_dir():
            raise ConfigError(
                f"config.init.{part} names the folder {config.init[part]!r}, which does not exist; "
                f"set --config.init.{part}=DIR"
            )
    assembly = assemble(config, trained_stage(metadata))
    if assembly.text.template != "chatml":
        key = "text.template"
        if assembly.stage and config.stage[assembly.stage].get("template"):
            key = f"stage.{assembly.stage}.template"
        raise ExportError(
            f"{key} is {assembly.text.template!r}; {MODELING} lays prompts out as 'chatml' only, so no other model can be "
            "exported so far"
        )
    expected = flatten(assembly.abstract_params())
    flat = {path: np.asarray(leaf) for path, leaf in flatten(learnt).items()}
    lora = config.model.llm.lora
    if adapter and not lora.rank:
        raise ExportError("model.llm.lora.rank is 0: the model has no adapter; export it without --adapter")
    adapters = [path for path in expected if is_lora(path)]
    trained = any(path in flat for path in adapters)
    if adapter and not trained:
        raise ExportError("this stage has learnt no adapter; export it without --adapter")
    merges = _check_learnt(flat, expected)

    wanted = [path for path in expected if path.startswith("connector/") or (trained and is_lora(path))]
    drawn = tuple(path for path in wanted if path not in flat)
    flat |= _draw(assembly, drawn)
    if trained and not adapter:
        for path in filter(lambda path: path.endswith("/lora_a"), adapters):
            layer = path.removesuffix("/lora_a")
            pair = (flat[path], flat[f"{layer}/lora_b"])
            merges.setdefault(f"{layer}/kernel", []).append(([pair], lora.alpha / lora.rank))

    parts: dict[str, dict[str, Any]] = {"connector": {}, "adapter": {}}
    for path in wanted:
        top, _, rest = path.partition("/")
        if top == "connector":
            parts["connector"][rest] = flat[path]
        elif adapter:
            parts["adapter"][rest] = flat[path]
    own = {
        "vision": assembly.system.vision_config,
        "audio": assembly.system.audio_config,
        "llm": assembly.system.llm_config,
    }
    complete = ConfigDict({"model": {part: dataclasses.asdict(sizes) for part, sizes in own.items()}})
    for part in PARTS:
        folder = config.init[part]
        sizes, plan = open_backbone(part, folder, config.model[part].get("feature_layer"))
        check_sizes(complete, part, folder, sizes)
        passage = Passage(f"writing {part}", sum(len(leaf.names) for leaf in plan.leaves.values()))
        parts[part] = {
            path: Outgoing(
                f"{part}/{path}",
                leaf,
                flat.get(f"{part}/{path}"),
                tuple(merges.get(f"{part}/{path}", ())),
                passage,
            )
            for path, leaf in plan.leaves.items()
        }
    check_weights(metadata.get("weights"), assembly.weights, "the stage")
    numbers = {path.split("/")[1] for path in flat if path.startswith(f"{MERGED}/")}
    merged = len(numbers) + (trained and not adapter)
    return Export(assembly, parts, qwen2.read_config(config.init.llm), drawn, merged)


def _check_learnt(flat: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, list[Merge]]:
    """Kernel path -> what its retired adapters add to it, as one merge.

    Raises:
        ConfigError: a parameter is not the configuration's.
        ExportError: one is not finite.
    """
    problems = []
    try:
        # A learnt kernel was trained with everything retired already in it.
        retired = {path: pairs for path, pairs in retired_updates(flat).items() if path not in flat}
        check_updates(retired, expected)
    except ValueError as error:
        raise ConfigError(f"the checkpoint does not fit the configuration: {error}") from error
    for path, leaf in flat.items():
        if path.startswith(f"{MERGED}/"):
            continue
        if path not in expected or tuple(expected[path].shape) != leaf.shape:
            wanted = f"shape {list(expected[path].shape)}" if path in expected else "no such parameter"
            problems.append(f"{path} {list(leaf.shape)}; this configuration wants {wanted}")
    if problems:
        raise ConfigError("the checkpoint does not fit the configuration: " + "; ".join(problems[:8]))
    broken = [path for path, leaf in flat.items() if not np.isfinite(leaf).all()]
    if broken:
        raise ExportError(f"the checkpoint holds numbers that are not finite: {', '.join(broken[:8])}")
    return {path: [(pairs, 1.0)] for path, pairs in retired.items()}


def _draw(assembly: Assembly, paths: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Parameters that nobody has trained, as `Assembly.parameters` draws them and `avlm ask` runs them."""
    if not paths:
        return {}
    config = assembly.config

    @jax.jit
    def draw() -> dict[str, jax.Array]:
        drawn = flatten(init_params(assembly.system, smallest_batch(assembly.system), config.seed))
        return {path: drawn[path].astype(float_dtype(config.frozen_dtype)) for path in paths}

    return {path: np.asarray(leaf).astype(np.float32) for path, leaf in jax.device_get(draw()).items()}


def _write(
    folder: Path,
    export: Export,
    adapter: bool,
    metadata: dict[str, Any],
    lineage: Sequence[Mapping[str, Any]],
    reports: Sequence[Mapping[str, Any]],
) -> None:
    system, config = export.assembly.system, export.assembly.config
    trees: dict[str, Tree] = {part: unflatten(leaves) for part, leaves in export.parts.items()}
    save_connector(folder / CONNECTOR, trees["connector"])
    for part in PARTS:
        if part == "vision":
            save_siglip(folder / part, system.vision_config, trees[part])
        elif part == "audio":
            save_beats(folder / part, system.audio_config, trees[part])
        else:
            qwen2.save_qwen2(folder / part, export.llm_config, trees[part])
        next(iter(export.parts[part].values())).passage.close()
        for file in Path(config.init[part]).iterdir():
            if file.is_file() and file.name.startswith(("LICENSE", "NOTICE")):
                shutil.copyfile(file, folder / part / file.name)
    if adapter:
        source = model_card.backbone_sources(export)["llm"].partition("@")[0]
        base = source if "/" in source else None  # A hub's owner/name, where it is known.
        save_adapter(folder / ADAPTER, system.llm_config.lora, trees["adapter"], base)
    _write_json(folder / "llm" / "generation_config.json", generation_config(export))
    faithful = copy_tokenizer(Path(config.text.tokenizer), folder / "llm")
    _write_json(folder / MODEL_CONFIG, model_config(export, adapter, metadata))
    (folder / TRAINING_CONFIG).write_text(config_to_json(config).rstrip() + "\n", encoding="utf-8")
    modeling = importlib.resources.files("avlm_jax.pytorch").joinpath(MODELING)
    (folder / MODELING).write_bytes(modeling.read_bytes())
    card = model_card.write_card(
        export,
        adapter=adapter,
        metadata=metadata,
        lineage=lineage,
        reports=reports,
        auto_tokenizer=faithful,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def model_config(export: Export, adapter: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the whole model."""
    system, text = export.assembly.system, export.assembly.text
    tokenizer, template = export.assembly.tokenizer, export.assembly.template
    assert isinstance(template, ChatMLTemplate)  # See `plan_export`.
    return {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "adapter": ADAPTER if adapter else None,
        "media": dataclasses.asdict(system.spec),
        "vision": dataclasses.asdict(system.vision_config),
        "audio": dataclasses.asdict(system.audio_config),
        "time": dataclasses.asdict(system.time_config),
        "avts": dataclasses.asdict(system.avts_config),
        "llm_width": system.llm_config.width,
        "text": {
            "template": text.template,
            "system": template.system if text.system is None else text.system,
            "stop_tokens": tokenizer.convert_ids_to_tokens(find_stop_ids(tokenizer, template)),
            "max_length": text.max_length,
        },
        "media_token_id": system.media_token_id,
        "num_media_tokens": system.num_media_tokens,
        "source": {
            "stage": trained_stage(metadata) or None,
            **{key: metadata.get(key) for key in ("hash", "parent", "weights", "versions")},
            "merged_adapters": export.merged,
            "drawn": list(export.drawn),
        },
    }


def generation_config(export: Export) -> dict[str, Any]:
    """generation_config.json: greedy, as the model was evaluated, and every token that ends an answer."""
    tokenizer = export.assembly.tokenizer
    stops = find_stop_ids(tokenizer, export.assembly.template)
    pad = tokenizer.pad_token_id
    return {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[-1] if pad is None else pad}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, sha256) of every file below `folder`, which is on the disk for good afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in track(files, label="hashing", unit="files"):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        yield file, digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`avlm export`'s arguments."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of the training run")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--stage", metavar="NAME", help="default: the last finished stage")
    parser.add_argument(
        "--adapter", action="store_true", help="keep the LoRA adapter apart, for PEFT, instead of merging it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    # Only so that the command line hands over single keys; the configuration is the stage's own.
    parser.add_argument("--config", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 0 when the folder is there."""
    begun = time.monotonic()
    workdir, out = Path(args.workdir), Path(args.out)
    if jax.process_count() > 1:
        raise ExportError("export runs in one process; start it on one host")
    final = find_stage(workdir, args.stage)
    other = [
        key
        for key in args.config_overrides
        if not key.startswith(("--config.init.", "--config.text.tokenizer="))
    ]
    if args.config is not None or other:
        raise ExportError(
            f"--config{'' if args.config is None else ' ' + args.config}{' '.join(['', *other])}: a stage is exported with "
            "the configuration it was trained by; only --config.init.<part>=DIR and --config.text.tokenizer=DIR can be "
            "given, where its weights lie now"
        )
    config = apply_overrides(checkpoint_config(final), args.config_overrides)
    try:
        learnt, _, metadata = load_tree(final)
    except (CheckpointError, FileNotFoundError) as error:
        raise ExportError(f"{error}; copy the checkpoint again") from error
    export_model(
        config,
        learnt,
        out,
        adapter=args.adapter,
        metadata=metadata,
        lineage=find_lineage(workdir, metadata),
        reports=find_reports(workdir, metadata["hash"]),
        overwrite=args.overwrite,
    )
    print(describe(out, time.monotonic() - begun))
    return 0


def describe(out: Path, seconds: float) -> str:
    """What an exported folder holds, and how PyTorch runs it; for people."""
    lines = [f"{out}: written in {seconds:.1f} s"]
    for entry in sorted(out.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        files = [path for path in entry.rglob("*") if path.is_file()] if entry.is_dir() else [entry]
        size = sum(file.stat().st_size for file in files)
        lines.append(f"  {entry.name + '/' * entry.is_dir():<24} {size:>16,} bytes")
    return "\n".join([*lines, "in PyTorch, without JAX:", *("  " + line for line in model_card.snippet(out))])
