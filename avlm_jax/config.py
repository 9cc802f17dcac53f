"""Configurations: load a file by path, override keys, and turn sections into frozen dataclasses.

A configuration is named as `path[:arguments]`, for instance `configs/savenvideo.py:size=demo,stage=1a`. The
file defines `get_config(arg: str) -> ConfigDict` and may import `parse_arg` from here. Single keys are
overridden on the command line as `--config.a.b=value`. Nothing here knows any one system; whoever reads a
section turns it into its own dataclass with `to_dataclass`, and a misspelt key fails there.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from input_pipeline.errors import UserError

T = TypeVar("T")

OVERRIDE_PREFIX = "--config."

# Of the compilation cache. Beyond it the least recently used programs go.
CACHE_BYTES = 4 * 2**30


class ConfigError(UserError, ValueError):
    """A configuration file, key or value that cannot be used. The message names the nearest right one."""


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the part of a configuration's name after the colon, `"size=demo,stage=1a"`.

    Args:
        arg: comma-separated `name=value` pairs; empty or None gives the defaults. A bare `name` sets a bool
            to True.
        **defaults: every argument the file understands; a value is converted to its default's type.

    Returns:
        ConfigDict of all arguments, readable as `parsed.size`.

    Raises:
        ConfigError: an unknown, repeated or unconvertible argument.
    """
    parsed = ConfigDict(defaults)
    seen: set[str] = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in defaults:
            known = f"known: {', '.join(sorted(defaults)) or 'none'}"
            raise ConfigError(f"unknown config argument {name!r}{_hint(name, defaults)}; {known}")
        if name in seen:
            raise ConfigError(f"config argument {name!r} is given twice in {arg!r}")
        seen.add(name)
        if not equals:
            if not isinstance(defaults[name], bool):
                raise ConfigError(f"config argument {name!r} needs a value, as in {name}={defaults[name]}")
            value = "true"
        parsed[name] = _convert(value, defaults[name], f"config argument {name!r}")
    return parsed


def load_config(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `path[:arguments]` and applies `overrides` to it.

    Args:
        name: path of a Python file (relative to the working directory), optionally followed by a colon and
            the arguments its `get_config` takes.
        overrides: see `apply_overrides`.

    Returns:
        The resolved, locked configuration.

    Raises:
        ConfigError: no such file, no `get_config` in it, or anything `parse_arg` and `apply_overrides`
            refuse.
    """
    path_text, _, arg = name.partition(":")
    path = Path(path_text)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        candidates = [str(file) for file in sorted(folder.glob("*.py"))]
        near = _hint(path_text, candidates)
        raise ConfigError(
            f"no config file {path_text!r} in {Path.cwd()}{near}; a config is named path.py[:arguments]"
        )
    spec = importlib.util.spec_from_file_location(f"avlm_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path_text} is not a Python file; a config is named path.py[:arguments]")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path_text}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path_text} defines no get_config(arg)")
    try:
        config = module.get_config(arg)
    except ConfigError as error:
        raise ConfigError(f"{path_text}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path_text}: get_config returned {type(config).__name__}, not an ml_collections.ConfigDict"
        )
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A locked copy of `config` with keys replaced.

    References between keys are resolved first, so that a key does not follow another one's override.

    Args:
        config: left as it is.
        overrides: strings `--config.a.b=value`, the prefix optional. Items of a list or tuple are addressed
            by position (`--config.stage.2b.trainable.0=llm/.*`). A value keeps the type the key has: an int
            may stand for a float, a list or tuple is a Python literal or plain words between commas, and any
            literal may replace None.

    Raises:
        ConfigError: an unknown key (naming the nearest one) or a value of another type (naming both types).
    """
    result = _copy(config.copy_and_resolve_references())
    for override in overrides:
        path, equals, value = override.removeprefix(OVERRIDE_PREFIX).partition("=")
        if not equals or not path:
            raise ConfigError(
                f"cannot read the override {override!r}; write {OVERRIDE_PREFIX}key.of.config=value"
            )
        _set(result, path, value)
    return _lock(result)


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Gives a verb `--config`. `--config.a.b=value` is collected into `args.config_overrides` by the cli."""
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGS]",
        default=default,
        required=default is None,
        help="configuration by path, e.g. configs/savenvideo.py:size=demo,stage=1a; "
        "single keys follow as --config.key.of.config=value",
    )


def config_from_args(args: argparse.Namespace) -> ConfigDict:
    """The configuration that `--config` and the `--config.a.b=value` of a command line name."""
    return load_config(args.config, getattr(args, "config_overrides", ()))


def to_dataclass(cls: type[T], section: Mapping[str, Any] | ConfigDict, name: str = "") -> T:
    """Builds the frozen dataclass a module works with from its section of the configuration.

    Sections inside become the dataclasses their fields are annotated with (or those of their values, where a
    dict is annotated), lists become tuples where a tuple is annotated, and an int may stand for a float.

    Args:
        cls: a dataclass.
        section: mapping of field names to values; fields left out take their defaults.
        name: dotted path of the section, for messages; the class name if empty.

    Raises:
        ConfigError: naming section and key, for an unknown key (with the nearest field), a missing field, a
            value of another type, or whatever the class's own `__post_init__` refuses.
    """
    name = name or cls.__name__
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key in section:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(
                f"{name} has no field {key!r}{_hint(key, fields)}; {cls.__name__} knows: {known}"
            )
        values[key] = _fit(section[key], hints[key], f"{name}.{key}")
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise ConfigError(f"{name} lacks {key!r}, which {cls.__name__} requires")
    try:
        return cls(**values)
    except (ValueError, UserError) as error:
        raise ConfigError(f"{name}: {error}") from error


def config_to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """The configuration as JSON text with sorted keys: what is stored beside a checkpoint and hashed."""
    return json.dumps(_plain(config), indent=2, sort_keys=True, allow_nan=True) + "\n"


def config_from_json(text: str) -> ConfigDict:
    """The locked configuration that `config_to_json` wrote; lists come back as tuples."""
    return _lock(_copy(_tuples(json.loads(text))))


def config_hash(config: ConfigDict | Mapping[str, Any]) -> str:
    """SHA-256 of the configuration's JSON, 64 hexadecimal digits: equal for equal configurations."""
    return hashlib.sha256(config_to_json(config).encode()).hexdigest()


def enable_compilation_cache() -> Path:
    """Lets JAX keep compiled programs on disk, so that the second run of a command starts quickly.

    `JAX_COMPILATION_CACHE_DIR` chooses the folder; without it the user's cache folder is taken and held below
    CACHE_BYTES. Returns the folder. To be called by a verb before it compiles anything.
    """
    import jax  # Not at the top: `avlm --help` and config files load this module without JAX.

    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        folder = Path(chosen)
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(root).expanduser() / "avlm_jax" / "jax"
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps only what took a second; small models consist of many programs just below that.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _copy(value: Any) -> Any:
    """A deep, unlocked copy. ConfigDict's own copy shares the sections that stand in lists and tuples."""
    if isinstance(value, ConfigDict | dict):
        # type_safe=False: `_convert` has its own, stricter idea of which type a key may take.
        return ConfigDict({key: _copy(value[key]) for key in value}, type_safe=False)
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _lock(value: Any) -> Any:
    """Locks every section below `value`, also those in lists, which ConfigDict.lock passes over."""
    if isinstance(value, ConfigDict):
        value.lock()
        for key in value:
            _lock(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _lock(item)
    return value


def _set(config: ConfigDict, path: str, text: str) -> None:
    """Replaces the leaf at the dotted `path` of `config`, in place."""
    keys = path.split(".")
    parent: Any = config
    trail: list[tuple[Any, Any]] = []  # (container, key), from the root down
    for depth, key in enumerate(keys):
        where = ".".join(keys[: depth + 1])
        position: Any = key
        if isinstance(parent, list | tuple):
            if not key.isdecimal() or int(key) >= len(parent):
                got = ".".join(keys[:depth])
                raise ConfigError(
                    f"config.{got} has {len(parent)} items, numbered from 0; {key!r} is none of them"
                )
            position = int(key)
        elif not isinstance(parent, ConfigDict | dict) or key not in parent:
            raise ConfigError(f"unknown config key {where!r}{_path_hint(path, config)}")
        trail.append((parent, position))
        parent = parent[position]
    if isinstance(parent, ConfigDict | dict):
        inside = ", ".join(sorted(map(str, parent)))
        raise ConfigError(f"config.{path} is a section; set one of its keys: {inside}")
    value = _convert(text, parent, f"config.{path}")
    for container, key in reversed(trail):
        if isinstance(container, tuple):
            value = (*container[:key], value, *container[key + 1 :])
            continue
        container[key] = value
        break


def _convert(text: str, current: Any, where: str) -> Any:
    """`text` as a value of `current`'s type, or ConfigError naming both types."""
    if isinstance(current, str):
        literal = _literal(text)
        return literal if isinstance(literal, str) and text[:1] in "'\"" else text
    if isinstance(current, bool):
        flags = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() in flags:
            return flags[text.lower()]
    elif isinstance(current, float):
        try:
            return float(text)
        except ValueError:
            pass
    elif isinstance(current, list | tuple):
        return _convert_sequence(text, current, where)
    elif current is None:
        literal = _literal(text)
        return text if literal is _NO_LITERAL else literal
    else:
        literal = _literal(text)
        if type(literal) is type(current):
            return literal
    raise ConfigError(
        f"{where} is {_type_name(current)} ({current!r}); {text!r} is {_type_name(_literal(text))}"
    )


def _convert_sequence(text: str, current: Sequence[Any], where: str) -> Any:
    """A list or tuple like `current` from a literal, `(1, 2)`, or from bare words, `1a,1b`."""
    literal = _literal(text)
    if literal is _NO_LITERAL:
        if any(bracket in text for bracket in "()[]{}"):
            raise ConfigError(f"{where} is {_type_name(current)}; {text!r} is not a Python literal")
        literal = tuple(word.strip() for word in text.split(",") if word.strip())
    if not isinstance(literal, list | tuple):
        literal = (literal,)
    kinds = {type(item) for item in current}
    if len(kinds) == 1 and (kind := kinds.pop()) in (bool, int, float, str):
        for item in literal:
            if type(item) is not kind and not (kind is float and type(item) is int):
                raise ConfigError(
                    f"{where} is a {type(current).__name__} of {kind.__name__}; "
                    f"{item!r} in {text!r} is {_type_name(item)}"
                )
        literal = [kind(item) for item in literal]
    return type(current)(_copy(item) for item in literal)


class _NoLiteral:
    """Marks text that is no Python literal: a bare word, as the shell delivers it."""


_NO_LITERAL = _NoLiteral()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NO_LITERAL


def _type_name(value: Any) -> str:
    if isinstance(value, _NoLiteral):
        return "str"
    return "None" if value is None else type(value).__name__


def _fit(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or ConfigError. An unknown annotation lets anything pass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            try:
                return _fit(value, option, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = _hint(str(value), map(str, choices))
            raise ConfigError(
                f"{where} is {value!r}{near}; one of {', '.join(map(repr, choices))} is expected"
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, ConfigDict | Mapping):
            return to_dataclass(hint, value, where)
        raise ConfigError(
            f"{where} is {_type_name(value)} ({value!r}); a section for {hint.__name__} is expected"
        )
    if origin is dict and isinstance(value, ConfigDict | Mapping):
        _, inner = typing.get_args(hint)
        return {key: _fit(value[key], inner, f"{where}.{key}") for key in value}
    if (origin or hint) in (tuple, list) and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            if len(inner) != len(value):
                raise ConfigError(f"{where} has {len(value)} items ({value!r}); {len(inner)} are expected")
            item_hints: Sequence[Any] = inner
        else:
            item_hints = [inner[0] if inner else Any] * len(value)
        items = [
            _fit(item, kind, f"{where}.{i}")
            for i, (item, kind) in enumerate(zip(value, item_hints, strict=True))
        ]
        return (origin or hint)(items)
    if hint is float and type(value) is int:
        return float(value)
    scalar = hint in (int, float, str, bool, type(None)) or (origin or hint) in (tuple, list, dict)
    # type(), not isinstance: True must not pass for the int 1.
    if scalar and type(value) is not (origin or hint):
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{where} is {_type_name(value)} ({value!r}); {expected} is expected")
    return value


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys below `node`, sections included."""
    if isinstance(node, ConfigDict | dict):
        children: Iterable[tuple[Any, Any]] = ((key, node[key]) for key in node)
    elif isinstance(node, list | tuple):
        children = (
            (i, item) for i, item in enumerate(node) if isinstance(item, ConfigDict | dict | list | tuple)
        )
    else:
        return
    for key, child in children:
        path = f"{prefix}{key}"
        yield path
        yield from _paths(child, f"{path}.")


def _path_hint(wrong: str, config: ConfigDict) -> str:
    """The known path most like `wrong`, as a whole or in its last part (`lr` finds `stage.1a.lr`)."""

    def likeness(path: str) -> float:
        whole = difflib.SequenceMatcher(None, wrong, path).ratio()
        last = difflib.SequenceMatcher(None, wrong.rpartition(".")[2], path.rpartition(".")[2]).ratio()
        return max(whole, 0.6 * last + 0.4 * whole)

    best = max(_paths(config), key=likeness, default=None)
    return f"; did you mean {best!r}?" if best is not None and likeness(best) > 0.5 else ""


def _hint(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _plain(value: Any) -> Any:
    """`value` out of dicts, lists and scalars only."""
    if isinstance(value, ConfigDict):
        value = value.copy_and_resolve_references()
    if isinstance(value, ConfigDict | Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"a config holds {value!r} of type {type(value).__name__}; only JSON values can be stored"
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, the form config files write."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
