"""The MediaSpec of a configuration file, read without anything of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from input_pipeline.errors import UserError
from input_pipeline.spec import MediaSpec

SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(MediaSpec))


def media_spec_from_config(name: str, overrides: Sequence[str] = ()) -> MediaSpec:
    """The MediaSpec in `config.media` of a configuration file, `path.py[:arguments]`.

    Args:
        name: of the configuration.
        overrides: strings `--config.media.key=value`; nothing else of a configuration is used here.

    Raises:
        UserError: no such file, it has no `get_config` or no `media`, or media has an unknown or unusable
            field; an override of anything else.
    """
    path, separator, arguments = name.partition(".py:")
    path = path + ".py" if separator else name
    if not Path(path).is_file():
        raise UserError(f"--config {name}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("avlm_prepare_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config {name}: {path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {name}: {path} defines no get_config(arg)")
    config = module.get_config(arguments)
    if "media" not in config:
        raise UserError(f"--config {name}: the configuration has no section media")
    fields = dict(config["media"])
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        if not key.startswith("media."):
            raise UserError(f"{override}: `avlm prepare` reads the section media only; leave it out")
        fields[key.removeprefix("media.")] = value
    for key, value in fields.items():
        if key not in SPEC_FIELDS:
            near = difflib.get_close_matches(key, SPEC_FIELDS, 1, 0.0)
            raise UserError(f"--config {name}: media.{key} is unknown; did you mean media.{near[0]}?")
        fields[key] = _converted(key, value)
    try:
        return MediaSpec(**fields)
    except ValueError as error:
        raise UserError(f"--config {name}: {error}") from None


def _converted(key: str, value: Any) -> Any:
    """`value` of a configuration, or the text of an override, as the field's type."""
    wanted = type(getattr(MediaSpec(), key))
    if wanted is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    if type(value) is not wanted:
        what = {int: "a whole number", str: "a text"}[wanted]
        raise UserError(f"media.{key}={value!r}: it must be {what}")
    return value
