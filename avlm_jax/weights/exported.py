"""The way back: a folder made by `avlm export` as backbones and a stage checkpoint of this project."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from avlm_jax.assembly import assemble
from avlm_jax.checkpoints.stage_result import load_tree, save_tree
from avlm_jax.config import apply_overrides, config_from_json, config_to_json
from avlm_jax.import_weights import import_backbones
from avlm_jax.lora import is_lora
from avlm_jax.monitoring.run_record import versions
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights.beats import file_sha256
from avlm_jax.weights.connector import open_connector
from avlm_jax.weights.peft import open_adapter
from avlm_jax.weights.record import PARTS
from avlm_jax.weights.stored import LoadReport, StoredLeaf
from input_pipeline.errors import UserError
from input_pipeline.progress import track

FORMAT_VERSION = 1
MODEL_TYPE = "savenvideo"
CONNECTOR, ADAPTER = "connector", "adapter"
MODEL_CONFIG, TRAINING_CONFIG, HASHES, CARD = "config.json", "avlm_config.json", "hashes.json", "README.md"
STAGE = "imported"  # The name of the stage that an import leaves in OUT.


class ExportedError(UserError):
    """A folder that is no export, is damaged or was changed, or whose parts do not fit each other."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported folder, every file of which is as `avlm export` wrote it.

    Attributes:
        directory: the folder.
        model: its config.json.
        config: the training configuration, locked; init.* and text.tokenizer name the folder's own parts.
        learnt: flat paths -> connector and, if the adapter lies apart, adapter; unread.
    """

    directory: Path
    model: dict[str, Any]
    config: ConfigDict
    learnt: dict[str, StoredLeaf]


def read_exported(directory: str | Path) -> Exported:
    """Checks an exported folder and opens it; no tensor but what the checks need is read.

    The format's version comes first, then every file's hash. README.md may be edited: whoever publishes the folder adds
    a licence to it. Hidden files (.gitattributes) and Python's caches are passed over.

    Raises:
        ExportedError: no export, one of another version, or a file that is missing, changed or not listed; by name.
        ConfigError, WeightError, SafetensorsError: configuration and tensors do not fit each other.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ExportedError(f"{directory}: no such folder; --model names one made by `avlm export`")
    model = _read_object(directory / MODEL_CONFIG)
    if model.get("model_type") != MODEL_TYPE:
        raise ExportedError(
            f"{directory / MODEL_CONFIG}: model_type is {model.get('model_type')!r}, not {MODEL_TYPE!r}; "
            "--model names a folder made by `avlm export`"
        )
    if model.get("format_version") != FORMAT_VERSION:
        raise ExportedError(
            f"{directory / MODEL_CONFIG}: format_version is {model.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; export the model again, or read it with the avlm_jax that wrote it"
        )
    check_hashes(directory)
    if model.get("adapter") not in (None, ADAPTER):
        raise ExportedError(
            f"{directory / MODEL_CONFIG}: adapter is {model['adapter']!r}, not {ADAPTER!r} or null"
        )
    try:
        trained = config_from_json((directory / TRAINING_CONFIG).read_text(encoding="utf-8"))
        config = rooted(trained, directory)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ExportedError(f"{directory / TRAINING_CONFIG}: no training configuration ({error})") from error
    expected = flatten(assemble(config).abstract_params())
    learnt = _open_connector(directory, expected)
    if model["adapter"]:
        learnt |= _open_adapter(directory, expected, config)
    return Exported(directory, model, config, learnt)


def _open_connector(directory: Path, expected: Mapping[str, Any]) -> dict[str, StoredLeaf]:
    top = f"{CONNECTOR}/"
    shapes = {path.removeprefix(top): leaf for path, leaf in expected.items() if path.startswith(top)}
    plan = open_connector(directory / CONNECTOR, unflatten(shapes))
    return {top + path: leaf for path, leaf in plan.leaves.items()}


def _open_adapter(directory: Path, expected: Mapping[str, Any], config: ConfigDict) -> dict[str, StoredLeaf]:
    shapes = {path.removeprefix("llm/"): leaf for path, leaf in expected.items() if is_lora(path)}
    lora, plan = open_adapter(directory / ADAPTER, unflatten(shapes))
    stated = config.model.llm.lora
    if (lora.rank, lora.alpha) != (stated.rank, float(stated.alpha)):
        raise ExportedError(
            f"{directory / ADAPTER}: rank {lora.rank} and alpha {lora.alpha:g}; {TRAINING_CONFIG} says "
            f"{stated.rank} and {stated.alpha:g}"
        )
    return {f"llm/{path}": leaf for path, leaf in plan.leaves.items()}


def check_hashes(directory: Path) -> None:
    """Raises ExportedError with every file that is missing, changed, or not in hashes.json."""
    listed = _read_object(directory / HASHES)
    problems = []
    for name, digest in track(sorted(listed.items()), label="checking", unit="files"):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(digest, str):
            problems.append(f"{directory / HASHES}: {name!r} is no file below the folder")
        elif name == CARD:
            continue
        elif not (directory / name).is_file():
            problems.append(f"{directory / name}: missing; copy the export again")
        elif file_sha256(directory / name) != digest:
            problems.append(
                f"{directory / name}: is not what was exported (sha256 differs); copy the export again"
            )
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if file.is_file() and not hidden and inside.as_posix() not in {*listed, HASHES, CARD}:
            problems.append(f"{file}: is not part of the export; remove it")
    if problems:
        raise ExportedError("\n".join(problems))


def rooted(config: ConfigDict, root: Path) -> ConfigDict:
    """`config` with the backbones and the tokenizer in the folders below `root`."""
    places = {f"init.{part}": root / part for part in PARTS} | {"text.tokenizer": root / "llm"}
    return apply_overrides(config, [f"{key}={path.resolve()}" for key, path in places.items()])


def import_exported(
    exported: str | Path | Exported, out: str | Path, *, overwrite: bool = False
) -> dict[str, LoadReport]:
    """Makes an export a model of this project again, to the bit.

    OUT gets vision, audio and llm as `import_backbones` leaves them, and imported/final: the checkpoint of a stage
    "imported" with the connector and, if the adapter lay apart, the adapter. Where the adapter was merged, a fresh one
    that changes nothing takes its place.

    Args:
        exported: folder, or what `read_exported` made of it.
        out: made if missing.
        overwrite: replace other parts and another import in `out`.

    Returns:
        By backbone, what its folder now holds.

    Raises:
        UserError: as `read_exported` and `import_backbones`, or `out` holds another import. Nothing was written then.
    """
    source = exported if isinstance(exported, Exported) else read_exported(exported)
    out = Path(out)
    if out.resolve() == source.directory.resolve():
        raise ExportedError(f"{out} is the export itself; choose another --out")
    config = rooted(source.config, out)
    plain = json.loads(config_to_json(config))
    tree = unflatten({path: leaf.read() for path, leaf in source.learnt.items()})
    final = out / STAGE / "final"
    present = final.exists() and _holds(final, tree, plain)
    if final.exists() and not present and not overwrite:
        raise ExportedError(f"{final} holds another model; --overwrite replaces it, another --out leaves it")
    folders = {part: source.directory / part for part in PARTS}
    reports = import_backbones(**folders, out=out, config=source.config, overwrite=overwrite)
    if not present:
        origin = dict(source.model.get("source") or {})
        metadata = {
            "stage": STAGE,
            "parent": None,  # Of another run: its tree may have this one's hash. `exported` names it.
            "weights": assemble(config).weights,
            "versions": versions(),
            "exported": origin,
        }
        save_tree(final, tree, plain, metadata)
    return reports


def _holds(final: Path, tree: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is this one already."""
    try:
        found, made_with, _ = load_tree(final)
    except (UserError, OSError):
        return False
    ours, theirs = flatten(tree), flatten(found)
    return (
        made_with == config
        and ours.keys() == theirs.keys()
        and all(
            ours[path].dtype == theirs[path].dtype and ours[path].tobytes() == theirs[path].tobytes()
            for path in ours
        )
    )


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ExportedError: there is none.
    """
    if not file.is_file():
        raise ExportedError(f"{file}: missing; --model names a folder made by `avlm export`")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportedError(f"{file}: no valid JSON ({error}); copy the export again") from None
    if not isinstance(value, dict):
        raise ExportedError(f"{file}: holds a {type(value).__name__}, not an object; copy the export again")
    return value
