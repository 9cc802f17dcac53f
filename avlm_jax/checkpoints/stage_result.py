"""What a finished stage publishes: trainable.safetensors (paths as names), config.json and metadata.json in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from avlm_jax.checkpoints.digests import digest_json, json_values, leaf_digests, to_host
from avlm_jax.checkpoints.storage import CheckpointError, is_bucket, replace_folder, resolve
from avlm_jax.processes.agreement import Agreement
from avlm_jax.processes.multihost import Timeouts
from avlm_jax.state import Tree, flatten, unflatten

if TYPE_CHECKING:
    from etils import epath

SCHEMA = 2  # 2: config.json and metadata.json have sums too.
TREE_FILE, CONFIG_FILE, METADATA_FILE = "trainable.safetensors", "config.json", "metadata.json"


def save_tree(
    directory: str | os.PathLike,
    tree: Tree,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    timeout: float = Timeouts.save,
) -> str:
    """Publishes a stage's trainable tree; replaces `directory` as a whole or leaves it as it was.

    A bucket cannot replace a folder as a whole: there metadata.json, without which there is no checkpoint, is removed
    first and written last.

    Args:
        directory: local folder or bucket address; gets trainable.safetensors (paths as names), config.json, metadata.json.
        tree: nested dict of arrays.
        config: the resolved configuration, JSON values.
        metadata: stage, versions, and the lineage: "parent" is the hash of the stage checkpoint this one
            began from, or None. "hash", "leaves" and the sums of the two JSON files are added here.
        timeout: seconds that the other processes wait for process 0, which writes.

    Returns:
        The checkpoint's hash: sha256 over paths, shapes, dtypes and contents of all leaves.
    """
    first = jax.process_index() == 0
    config, metadata = json_values(config, "config"), json_values(metadata, "metadata")
    host: dict[str, np.ndarray] = {}
    for path, leaf in flatten(tree).items():
        whole = to_host(leaf)  # One at a time, and only process 0 keeps it.
        if first:
            host[path] = np.ascontiguousarray(whole).reshape(whole.shape)

    def publish() -> str:
        return _publish(resolve(directory), host, config, metadata) if first else ""

    return Agreement("save_tree", timeout).everywhere(publish)[0]


def _publish(target: epath.Path, host: dict[str, np.ndarray], config: dict, metadata: dict) -> str:
    from safetensors.numpy import save_file

    digests = leaf_digests(host)
    metadata |= {
        "schema": SCHEMA,
        "hash": digest_json(digests),
        "leaves": digests,
        "config_sha256": digest_json(config),
    }
    metadata["sha256"] = digest_json(metadata)
    writers: dict[str, Callable[[epath.Path], Any]] = {TREE_FILE: lambda file: save_file(host, file)}
    for name, value in ((CONFIG_FILE, config), (METADATA_FILE, metadata)):
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        writers[name] = lambda file, text=text: file.write_text(text)
    replace_folder(target, writers)
    return metadata["hash"]


def load_tree(directory: str | os.PathLike) -> tuple[Tree, dict[str, Any], dict[str, Any]]:
    """What `save_tree` wrote: (tree of numpy arrays, config, metadata), everything checked against its sha256.

    Raises:
        FileNotFoundError: a file of the three is missing.
        CheckpointError: a file is damaged; the message names it and the first bad leaf.
    """
    directory = resolve(directory)
    for name in (TREE_FILE, CONFIG_FILE, METADATA_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no stage checkpoint: {name} is missing")
    config, metadata = (_read_json(directory / name) for name in (CONFIG_FILE, METADATA_FILE))
    if metadata.get("schema") not in (1, SCHEMA):
        raise CheckpointError(
            f"{directory / METADATA_FILE} has schema {metadata.get('schema')!r}, this version reads 1 and {SCHEMA}"
        )
    digests = metadata.get("leaves")
    sound = metadata.get("hash") == digest_json(digests)
    if metadata["schema"] == SCHEMA:
        sound &= metadata.pop("sha256", None) == digest_json(metadata)
    if not sound:
        raise CheckpointError(f"{directory / METADATA_FILE} does not match its own hash")
    # Schema 1 had no sum of the configuration.
    if metadata.pop("config_sha256", None) not in (digest_json(config), None):
        raise CheckpointError(f"{directory / CONFIG_FILE} is not what was published: its sha256 differs")
    flat = _read_leaves(directory / TREE_FILE)
    found = leaf_digests(flat)
    for path in sorted(digests.keys() | found.keys()):
        if digests.get(path) != found.get(path):
            raise CheckpointError(
                f"{directory / TREE_FILE}: {path} is not what was saved: its sha256 differs from that in {METADATA_FILE}"
            )
    return unflatten(flat), config, metadata


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    return value


def _read_leaves(file: epath.Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        local = file
        if is_bucket(file):
            local = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), TREE_FILE)
            file.copy(local)
        try:
            # "np" gives bf16 as ml_dtypes' type; `load_file` of safetensors.numpy refuses it.
            with safe_open(local, framework="np") as opened:
                return {path: opened.get_tensor(path) for path in opened.keys()}
        except Exception as error:  # SafetensorError derives from Exception alone.
            raise CheckpointError(f"{file} is damaged: {error}") from error
