"""LoRA adapters in PEFT's form (huggingface/peft: tuners/lora/config.py, utils/save_and_load.py).

    adapter_config.json          rank r, alpha, dropout, target modules
    adapter_model.safetensors    base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r in], lora_B.weight [out r]

Ours are stacked over the layers and transposed, layers/attn/q/lora_a [L in r], lora_b [L r out]; both sides scale the
update by alpha / r.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avlm_jax.lora import ALL_TARGETS, LoraConfig
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.table import (
    TRANSPOSE,
    ImportPlan,
    Row,
    Table,
    WeightError,
    export_params,
    flatten,
    open_params,
)

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
# The base's own names stand behind this: one "model" is PEFT's wrapper, one the base's attribute.
_PREFIX = "base_model.model.model.layers.{i}"
_MODULES = {
    name: ("attn", f"self_attn.{name}_proj") if name in "qkvo" else ("mlp", f"mlp.{name}_proj")
    for name in ALL_TARGETS
}
_TARGET_OF = {theirs.rpartition(".")[2]: ours for ours, (_, theirs) in _MODULES.items()}

# Keys that say where an adapter comes from, or how to go on training it, and nothing about what it computes.
_SILENT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
# How A and B were drawn. Others of PEFT's values (pissa, olora, corda, loftq) change the base as well.
_DRAWN = (True, False, "gaussian", "eva", "orthogonal")
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "bias"}
)


class AdapterError(WeightError):
    """An adapter that this decoder cannot compute, or whose configuration is damaged."""


def adapter_table(targets: tuple[str, ...], depth: int) -> Table:
    """Rows of an adapter on `targets` (names of `lora.ALL_TARGETS`) of a decoder with `depth` layers."""
    rows = []
    for name in targets:
        ours, theirs = _MODULES[name]
        for half in "ab":
            theirs_half = f"{_PREFIX}.{theirs}.lora_{half.upper()}.weight"
            rows.append(Row(f"layers/{ours}/{name}/lora_{half}", theirs_half, TRANSPOSE))
    return Table("PEFT adapter", tuple(rows), (), depth)


def read_config(directory: str | Path) -> LoraConfig:
    """The `LoraConfig` of a folder's adapter_config.json.

    Raises:
        AdapterError: the file is missing or damaged, or sets anything that a plain LoRA on the linear layers of a
            decoder cannot do (rsLoRA, DoRA, biases, ranks by layer, modules saved beside, ...); every such key by name.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise AdapterError("PEFT", [f"{file}: missing; a PEFT adapter is {CONFIG_FILE} and {TENSOR_FILE}"])
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError("PEFT", [f"{file}: no valid JSON ({error})"]) from None
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        kind = stored.get("peft_type") if isinstance(stored, dict) else type(stored).__name__
        raise AdapterError("PEFT", [f"{file}: peft_type is {kind!r}; only 'LORA' can be read"])
    problems = [
        f"{file}: {key} is {value!r}, which a plain LoRA cannot do; only an adapter without it can be read"
        for key, value in sorted(stored.items())
        if key not in _READ | _SILENT and value not in (None, False, {}, [])
    ]
    if stored.get("bias", "none") != "none":
        problems.append(f"{file}: bias is {stored['bias']!r}; only 'none' can be read")
    if stored.get("init_lora_weights", True) not in _DRAWN:
        problems.append(
            f"{file}: init_lora_weights is {stored['init_lora_weights']!r}, which changes the base as well; "
            "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    targets = stored.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(map(str, targets)) <= _TARGET_OF.keys():
        problems.append(
            f"{file}: target_modules is {targets!r}; a list out of {', '.join(_TARGET_OF)} is expected"
        )
    rank, alpha, dropout = (stored.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or rank < 1:
        problems.append(f"{file}: r is {rank!r}; a whole number from 1 on is expected")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        problems.append(f"{file}: lora_alpha is {alpha!r}; a number above 0 is expected")
    dropout = 0.0 if dropout is None else dropout
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        problems.append(f"{file}: lora_dropout is {dropout!r}; a number from 0 to below 1 is expected")
    if problems:
        raise AdapterError("PEFT", problems)
    named = {_TARGET_OF[name] for name in targets}
    ordered = tuple(name for name in ALL_TARGETS if name in named)
    return LoraConfig(rank=rank, alpha=float(alpha), dropout=float(dropout), targets=ordered)


def open_adapter(directory: str | Path, expected: Mapping[str, Any]) -> tuple[LoraConfig, ImportPlan]:
    """An adapter in a folder, checked and unread.

    Args:
        directory: see the module's docstring.
        expected: nested dict of the decoder's adapter leaves (`layers/attn/q/lora_a` ...) with `shape`.

    Raises:
        AdapterError: see `read_config`.
        SafetensorsError, WeightError: the tensors are damaged, or are not those of `expected`.
    """
    lora = read_config(directory)
    depths = {leaf.shape[0] for leaf in flatten(expected).values()}
    table = adapter_table(lora.targets, depths.pop() if len(depths) == 1 else 0)
    return lora, open_params(table, safetensors_io.read_file(Path(directory) / TENSOR_FILE), expected)


def save_adapter(
    directory: str | Path, lora: LoraConfig, params: Mapping[str, Any], base: str | None = None
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained(model, directory)` reads.

    Args:
        directory: made if missing.
        lora: rank, alpha, dropout and targets.
        params: nested dict of the adapter's leaves, in the dtypes they are to have.
        base: name or folder of the base model, for AutoPeftModel.

    Raises:
        WeightError: the leaves are not those of `lora`.
    """
    directory = Path(directory)
    flat = flatten(params)
    wrong = [
        f"{path}: shape {list(leaf.shape)} is not of rank {lora.rank}"
        for path, leaf in flat.items()
        if leaf.shape[-1 if path.endswith("lora_a") else -2] != lora.rank
    ]
    if wrong:
        raise WeightError("PEFT adapter", wrong)
    depth = max((leaf.shape[0] for leaf in flat.values()), default=0)
    tensors = export_params(adapter_table(lora.targets, depth), params)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha)
        if float(lora.alpha).is_integer()
        else lora.alpha,  # PEFT's type is int.
        "lora_dropout": lora.dropout,
        "target_modules": [_MODULES[name][1].rpartition(".")[2] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_file(directory / TENSOR_FILE, tensors)
    (directory / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
