"""import.json: what `avlm import-weights` put into a folder, where it came from, and its hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from input_pipeline.errors import UserError

PARTS = ("vision", "audio", "llm")
RECORD = "import.json"
FORMAT_VERSION = 1


class RecordError(UserError):
    """import.json is damaged or of another version."""


def read_record(folder: str | Path) -> dict[str, dict[str, Any]]:
    """By part, in the order of `PARTS`, what import.json says of the parts that are there; {} without the file.

    Raises:
        RecordError: it is not a file of this program.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, parts = content["format_version"], dict(content["parts"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(
            f"{file}: not a record of avlm import-weights ({error!r}); remove it, and import with --overwrite"
        ) from None
    if version != FORMAT_VERSION:
        raise RecordError(f"{file}: format_version is {version!r}; this program knows {FORMAT_VERSION}")
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
