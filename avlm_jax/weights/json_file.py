"""What lies beside the tensors of a folder: JSON objects, and any file's digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from input_pipeline.errors import UserError


class JsonFileError(UserError, ValueError):
    """A file that should hold a JSON object and does not. The message names it and the remedy."""


def read_json_object(file: str | Path, missing: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: UTF-8, as RFC 8259 wants it, whatever this system's own encoding is.
        missing: said where there is no such file, beside what can be done about it.

    Raises:
        JsonFileError: the file is missing, no UTF-8, no JSON, nested deeper than can be read, or holds something else
            than an object.
    """
    file = Path(file)
    if not file.is_file():
        raise JsonFileError(f"{file}: missing; {missing or 'fetch or copy it again'}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise JsonFileError(f"{file}: no valid JSON (nested too deep); fetch or copy it again") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such.
        raise JsonFileError(f"{file}: no valid JSON ({error}); fetch or copy it again") from None
    if not isinstance(value, dict):
        raise JsonFileError(
            f"{file}: holds a {type(value).__name__}, not an object of keys and values; fetch or copy it again"
        )
    return value


def file_sha256(file: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
