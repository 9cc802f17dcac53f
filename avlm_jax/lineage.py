"""Which stage came out of which, and on what: refuses to go on where anything differs that a result depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, check_weights
from avlm_jax.checkpoints.stage_result import load_tree
from avlm_jax.config import ConfigError, config_to_json
from avlm_jax.lora import retire
from avlm_jax.processes.multihost import gather
from avlm_jax.state import Tree
from input_pipeline.errors import UserError


def load_parent(
    assembly: Assembly, parent: str, workdir: Path, *, fresh_lora: bool = False
) -> tuple[str | None, Tree | None]:
    """(hash, tree) of what stage `parent` published, with its adapter retired if its successor wants a fresh one.

    (None, None) for a first stage, whose parent is "".

    Raises:
        ConfigError: the parent is not finished, or was trained on other weights or another model.
    """
    if not parent:
        return None, None
    folder = workdir / parent / "final"
    if not folder.exists():
        raise ConfigError(
            f"this stage begins from stage {parent}, which has no result in {folder}; "
            f"run it first with the argument stage={parent}, or all stages by leaving stage out"
        )
    tree, made_by, metadata = load_tree(folder)
    check_weights(metadata.get("weights"), assembly.weights, folder)
    check_same_model(assembly.config, made_by, folder, but=("llm.lora",) if fresh_lora else ())
    if fresh_lora:
        lora = made_by["model"]["llm"]["lora"]  # Its own: this stage may choose another rank and alpha.
        tree = retire(tree, lora["alpha"] / lora["rank"]) if lora["rank"] else tree
    return metadata["hash"], tree


def check_finished(assembly: Assembly, name: str, final: Path) -> None:
    """Raises ConfigError if `final` was made by another configuration, on other weights, or from another result of its
    parent stage."""
    config = assembly.config
    _, made_by, metadata = load_tree(final)
    check_same_config(config, name, made_by, final)
    check_weights(metadata.get("weights"), assembly.weights, final)
    parent = config.stage[name].parent
    beginning = final.parents[1] / parent / "final"
    if parent and beginning.exists():
        check_parent(metadata["parent"], load_tree(beginning)[2]["hash"], parent, final.parent)


def check_parent(begun_from: str | None, parent_hash: str | None, parent: str, folder: Path) -> None:
    """Raises ConfigError if what lies in `folder` was begun from another result of its parent stage than there is now."""
    if begun_from != parent_hash:
        raise ConfigError(
            f"{folder} was begun from another result of stage {parent or '(none)'} than the one there is now; "
            f"delete {folder} to train it again"
        )


# Last parts of keys of config.model that say how a model is computed, not what it is.
COMPUTED = ("remat", "backend", "attention_backend", "chunk")


def check_same_config(config: ConfigDict, name: str, made_by: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError naming what differs if what lies in `where` was made by another configuration.

    Counted are the keys that stage `name` and the stages it descends from depend on.
    """
    ours, theirs = (flatten_json(c) for c in (json.loads(config_to_json(config)), made_by))
    lineage, ancestor = set(), name
    while ancestor and ancestor not in lineage:
        lineage.add(ancestor)
        ancestor = config.stage[ancestor].parent if ancestor in config.stage else ""
    # Which stages a command runs, what it logs, on which devices it computes and how do not change what a stage is (but
    # for the order of sums); where its weights and its tokenizer lie does not either, what they are is compared by hash
    # (`check_weights`).
    free = (
        "stages",
        "log_every",
        "max_lost_steps",
        "max_lost_minutes",
        "save_every",  # What max_lost_* took the place of.
        "save_minutes",
        "max_nonfinite",
        "loss_chunk",
        "mesh",
        "loader",
        "timeouts",
        "watch",
        "init",
        "text.tokenizer",
    )

    def counts(key: str) -> bool:
        first, _, rest = key.partition(".")
        named = any(key == name or key.startswith(f"{name}.") for name in free)
        named |= first == "stage" and rest.endswith(".rows_per_device")
        named |= first == "model" and rest.rpartition(".")[2] in COMPUTED
        return not named and (first != "stage" or rest.partition(".")[0] in lineage)

    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k) and counts(k))
    if keys:
        told = "; ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in keys[:5])
        raise ConfigError(f"{where} was made by another configuration ({told}); choose another --workdir")


def check_same_model(
    config: ConfigDict, made_by: Mapping[str, Any], where: Path, but: tuple[str, ...] = ()
) -> None:
    """Raises ConfigError if parameters in `where` would mean something else under `config`.

    Keys below `but` may differ, and those that change how a model is computed but not what it is.
    """
    free = ("dtype", "dropout", *COMPUTED)
    ours, theirs = (flatten_json(c["model"]) for c in (json.loads(config_to_json(config)), made_by))
    keys = sorted(
        key
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
        and key.rpartition(".")[2] not in free
        and not key.startswith(tuple(f"{prefix}." for prefix in but))
    )
    if keys:
        told = "; ".join(f"model.{k}: {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in keys[:5])
        raise ConfigError(
            f"{where} was trained as another model ({told}); use its configuration, or train it again"
        )


def check_same_plan(name: str, plan: Mapping[str, Any]) -> None:
    """Compares between the processes what each is going to train on; every process calls it, and one alone is content.

    Args:
        name: of the stage, for messages.
        plan: JSON values: the loader's state, the steps.

    Raises:
        UserError: in every process, naming those whose plan is not process 0's.
        PeerError: naming those that did not come.
    """
    told = json.dumps(dict(plan), sort_keys=True)
    found = gather(f"the data of stage {name}", told)
    if others := [process for process, plan_there in enumerate(found) if plan_there != found[0]]:
        raise UserError(
            f"stage {name}: processes {', '.join(map(str, others))} would train on other data than process 0 ({found[0]} "
            f"there, {told} here). Records, tokenizer and configuration must be the same on every host; copy them from one, "
            "or let all name one shared folder"
        )


def exists_for_all(folder: Path) -> bool:
    """Whether a stage's result is there; every process calls it.

    Raises:
        UserError: some processes see it and others do not.
    """
    found = gather(f"look for {folder}", str(folder.exists()))
    if len(set(found)) > 1:
        there = [str(process) for process, answer in enumerate(found) if answer == str(True)]
        raise UserError(
            f"{folder} is there for processes {', '.join(there)} and not for the others; --workdir must be one folder that all "
            "hosts share"
        )
    return found[0] == str(True)


def flatten_json(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON values as {"a.b.0": leaf}."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {prefix: value}
    return {k: v for key, item in items for k, v in flatten_json(item, f"{prefix}.{key}".lstrip(".")).items()}
