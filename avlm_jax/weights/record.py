"""import.json: what `avlm import-weights` put into a folder, where it came from, and its hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avlm_jax.weights.json_file import read_json_object
from input_pipeline.errors import UserError

PARTS = ("vision", "audio", "llm")
RECORD = "import.json"
FORMAT_VERSION = 1
# What every part's entry has; source_sha256 stands beside it where the source was a .pt.
_FIELDS = {
    "source": str, "tensors": int, "bytes": int, "sha256": str, "dtypes": list, "files": dict, "ignored": dict,
    "warnings": list,
}  # fmt: skip
_REMEDY = "Remove the file; an import of the same weights will write it again"


class RecordError(UserError):
    """import.json is damaged or of another version."""


def read_record(folder: str | Path) -> dict[str, dict[str, Any]]:
    """By part, in the order of `PARTS`, what import.json says of the parts that are there; {} without the file.

    Raises:
        RecordError, JsonFileError: it is not a file of this program.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        return {}
    content = read_json_object(file)
    version, parts = content.get("format_version"), content.get("parts")
    if version != FORMAT_VERSION:
        raise RecordError(
            f"{file}: format_version is {version!r}; this program knows {FORMAT_VERSION}. {_REMEDY}"
        )
    if not isinstance(parts, dict):
        raise RecordError(f"{file}: its parts are {parts!r:.80}, not keys and values. {_REMEDY}")
    for part, entry in parts.items():
        for key, kind in _FIELDS.items():
            if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                raise RecordError(f"{file}: {part} has no {key} ({kind.__name__}). {_REMEDY}")
    return {part: parts[part] for part in PARTS if part in parts and (Path(folder) / part).is_dir()}


def write_record(folder: str | Path, parts: Mapping[str, Mapping[str, Any]], version: str) -> None:
    """Writes import.json; `version` is the program's."""
    content = {"format_version": FORMAT_VERSION, "avlm_jax": version, "parts": parts}
    partial = Path(folder) / f".{RECORD}.partial"
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, Path(folder) / RECORD)


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each content."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def report_table(folder: str | Path) -> str:
    """import.json for people: a line a part, and what was left out of it. Hashes are cut to 16 digits."""
    lines = [f"{'part':<8}{'tensors':>8}{'bytes':>16}  {'sha256':<16}  source"]
    for part, record in read_record(folder).items():
        lines.append(
            f"{part:<8}{record['tensors']:>8}{record['bytes']:>16,}  {record['sha256'][:16]}  {record['source']}"
        )
        if "source_sha256" in record:
            lines.append(f"{'':<34}{record['source_sha256'][:16]}  of that file")
        lines += [f"{'':<8}{len(names):>8} left out: {reason}" for reason, names in record["ignored"].items()]
    return "\n".join(lines)
