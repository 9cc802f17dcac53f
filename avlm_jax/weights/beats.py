"""BEATs under the names of its checkpoints (microsoft/unilm: beats/BEATs.py, backbone.py).

The published checkpoint is a pickle {"cfg": ..., "model": ...}; the folder read here holds the same two
things as config.json (the cfg) and model.safetensors. `convert_checkpoint` makes the one from the other, in a
process of its own; nothing here ever reads a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avlm_jax.encoders.beats import BeatsClassifier, BeatsConfig, BeatsEncoder
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.json_file import file_sha256, read_json_object
from avlm_jax.weights.table import (
    IDENTITY,
    TRANSPOSE,
    Ignored,
    ImportPlan,
    LoadReport,
    Row,
    Table,
    Transform,
    export_params,
    open_params,
    patch_kernel,
    permute,
    reshape,
)
from input_pipeline.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "pytorch" / "beats_checkpoint.py"
SCRIPT_REFUSED, SCRIPT_NO_TORCH = 2, 3  # Its exit codes.
CONVERSION_SECONDS = (
    600.0  # The 360 MB of a published file take 10 s; torch alone may need a minute on a slow disk.
)

# Our field -> (cfg key, value where the cfg leaves it out: BEATsConfig's own default in BEATs.py).
_CONFIG_KEYS: dict[str, tuple[str, Any]] = {
    "patch_size": ("input_patch_size", -1),
    "embed_dim": ("embed_dim", 512),
    "width": ("encoder_embed_dim", 768),
    "depth": ("encoder_layers", 12),
    "num_heads": ("encoder_attention_heads", 12),
    "mlp_dim": ("encoder_ffn_embed_dim", 3072),
    "conv_pos_kernel": ("conv_pos", 128),
    "conv_pos_groups": ("conv_pos_groups", 16),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "gru_gate": ("gru_rel_pos", False),
    "deep_norm": ("deep_norm", False),
}
# cfg key -> (the only value supported, BEATsConfig's default). All released checkpoints have these values.
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "conv_bias": (False, False),
    "layer_norm_first": (False, False),
    "activation_fn": ("gelu", "gelu"),
    "relative_position_embedding": (True, False),
}


class ConversionError(UserError):
    """A published checkpoint could not be converted. The message names it and says what can be done."""


def beats_table(config: BeatsConfig, classifier: bool = False) -> Table:
    """Rows of `BeatsEncoder`'s parameters, or of `BeatsClassifier`'s."""

    def linear(ours: str, theirs: str) -> list[Row]:
        return [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE), Row(f"{ours}/bias", f"{theirs}.bias")]

    def norm(ours: str, theirs: str) -> list[Row]:
        return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]

    def weight_norm(ours: str, old: str, new: str, transform: Transform = IDENTITY) -> Row:
        # torch renamed weight norm's tensors when it became a parametrization (torch 2.0).
        conv = "encoder.pos_conv.0"
        return Row(ours, f"{conv}.{old}", transform, aliases=(f"{conv}.parametrizations.weight.{new}",))

    taps, heads = config.conv_pos_kernel, config.num_heads
    layer, attn = "encoder.layers.{i}", "encoder.layers.{i}.self_attn"
    rows = [
        Row("patch_embed/kernel", "patch_embedding.weight", patch_kernel(config.patch_size, 1)),
        *norm("patch_ln", "layer_norm"),
        weight_norm("pos_conv/g", "weight_g", "original0", reshape((1, 1, taps), (taps,))),
        weight_norm("pos_conv/v", "weight_v", "original1", permute(2, 1, 0)),
        Row("pos_conv/bias", "encoder.pos_conv.0.bias"),
        *norm("pos_ln", "encoder.layer_norm"),
        Row("rel_pos/embedding", f"{attn}.relative_attention_bias.weight", shared=True),
        *norm("layers/ln1", f"{layer}.self_attn_layer_norm"),
        *norm("layers/ln2", f"{layer}.final_layer_norm"),
        *linear("layers/mlp/fc1", f"{layer}.fc1"),
        *linear("layers/mlp/fc2", f"{layer}.fc2"),
    ]
    if config.embed_dim != config.width:
        rows += linear("proj", "post_extract_proj")
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rows += linear(f"layers/attn/{ours}", f"{attn}.{theirs}")
    if config.gru_gate:
        rows += linear("layers/attn/gate", f"{attn}.grep_linear")
        rows.append(Row("layers/attn/gate_scale", f"{attn}.grep_a", reshape((1, heads, 1, 1), (heads,))))
    ignored: tuple[Ignored, ...] = ()
    if classifier:
        rows += linear("predictor", "predictor")
    else:
        ignored = (Ignored(r"predictor\.(weight|bias)", "the tagging head; features are read before it"),)
    return Table("BEATs", tuple(rows), ignored, config.depth)


def read_config(directory: str | Path) -> tuple[BeatsConfig, int | None]:
    """`BeatsConfig` and number of classes (None if not fine-tuned) of a folder's config.json.

    Raises:
        ValueError: config.json is missing, is no cfg of BEATs, or asks for something this encoder cannot do.
    """
    file = Path(directory) / "config.json"
    cfg = read_json_object(file, "a BEATs folder holds its cfg as config.json beside model.safetensors")
    for key, (wanted, default) in _REQUIRED.items():
        if cfg.get(key, default) != wanted:
            raise ValueError(f"{file}: {key} is {cfg.get(key, default)!r}; only {wanted!r} is supported")
    sizes = {ours: cfg.get(theirs, default) for ours, (theirs, default) in _CONFIG_KEYS.items()}
    try:
        config = BeatsConfig(**sizes, num_mel=cfg.get("num_mel_bins", 128))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config, cfg.get("predictor_class", 527) if cfg.get("finetuned_model", False) else None


def expected_params(config: BeatsConfig, num_classes: int | None = None) -> dict[str, Any]:
    """The parameter tree as shapes; `BeatsClassifier`'s if num_classes is given."""
    model = BeatsEncoder(config) if num_classes is None else BeatsClassifier(config, num_classes=num_classes)
    fbank = jax.ShapeDtypeStruct((1, config.patch_size, config.num_mel), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, config.patch_size), jnp.bool_)
    return jax.eval_shape(model.init, jax.random.key(0), fbank, mask)["params"]


def open_beats(directory: str | Path, *, classifier: bool = False) -> tuple[BeatsConfig, ImportPlan]:
    """Config of a folder and its parameters, checked and unread.

    Args:
        directory: config.json with the checkpoint's cfg, and its tensors as safetensors.
        classifier: load `BeatsClassifier`'s parameters; the checkpoint must be a fine-tuned one.

    Raises:
        ValueError: config.json, see `read_config`; or a classifier is wanted from a checkpoint without one.
        SafetensorsError, WeightError: the files, or what is in them.
    """
    config, num_classes = read_config(directory)
    if classifier and num_classes is None:
        raise ValueError(f"{directory}: finetuned_model is false, so there is no classifier to load")
    tensors = safetensors_io.read_folder(directory)
    expected = expected_params(config, num_classes if classifier else None)
    return config, open_params(beats_table(config, classifier), tensors, expected)


def load_beats(
    directory: str | Path, *, classifier: bool = False
) -> tuple[BeatsConfig, dict[str, Any], LoadReport]:
    """Config, parameters (numpy, in the stored dtype) and report of a folder; see `open_beats`."""
    config, plan = open_beats(directory, classifier=classifier)
    return config, plan.read(), plan.report()


def save_beats(
    directory: str | Path, config: BeatsConfig, params: Mapping[str, Any], label: str = ""
) -> None:
    """Writes config.json and safetensors, of `BeatsClassifier` if the parameters have a predictor.

    With a label it shows its progress. torch reads them with `BEATs(BEATsConfig(cfg)).load_state_dict(...)`.

    Raises:
        WeightError: the parameters are neither model's for this config.
    """
    classifier = "predictor" in params
    tensors = export_params(beats_table(config, classifier), params)
    cfg = {theirs: getattr(config, ours) for ours, (theirs, _) in _CONFIG_KEYS.items()}
    cfg |= {key: wanted for key, (wanted, _) in _REQUIRED.items()}
    cfg |= {"model_type": "beats", "num_mel_bins": config.num_mel, "finetuned_model": classifier}
    if classifier:
        cfg["predictor_class"] = int(params["predictor"]["bias"].shape[0])
    safetensors_io.write_folder(directory, tensors, label=label)
    (Path(directory) / "config.json").write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")


def convert_checkpoint(
    file: str | Path,
    folder: str | Path,
    *,
    python: str | Path = sys.executable,
    timeout: float = CONVERSION_SECONDS,
) -> str:
    """Converts a published .pt into a folder that `load_beats` reads, and returns the file's sha256.

    `avlm_jax/pytorch/beats_checkpoint.py` does it, as a process without network and without this one's
    environment: the file is refused if it asks for code, read by torch with `weights_only`, and its hash
    stands in the folder's config.json as "source_sha256".

    Args:
        file: {"cfg": ..., "model": ...}, pre-trained or fine-tuned.
        folder: gets model.safetensors and config.json; made if missing.
        python: an interpreter whose torch is 2.10 or newer.
        timeout: seconds after which the process is stopped.

    Raises:
        ConversionError: no such file or interpreter, no usable torch, a file that is damaged, holds other
            keys or calls for code, or the time is up.
    """
    file, folder = Path(file).absolute(), Path(folder).absolute()
    if not file.is_file():
        raise ConversionError(f"{file}: no such file")
    interpreter = shutil.which(python)
    if interpreter is None:
        raise ConversionError(f"{python}: no such Python to convert {file} with")
    digest = file_sha256(file)
    folder.mkdir(parents=True, exist_ok=True)
    kept = (
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
    )  # What an interpreter may need to start at all.
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "PATH": os.defpath,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        done = subprocess.run(
            [os.path.abspath(interpreter), "-I", str(SCRIPT), str(file), str(folder)],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ConversionError(
            f"{file}: its conversion took more than {timeout:.0f} s and was stopped"
        ) from None
    except OSError as error:
        raise ConversionError(f"{python}: cannot be run as Python ({error.strerror})") from None
    told = done.stderr.strip()
    if done.returncode == SCRIPT_REFUSED:
        raise ConversionError(told)
    if done.returncode == SCRIPT_NO_TORCH:
        raise ConversionError(
            f"{file} is a pickle, and {python} has no torch to convert it with ({told}). Either install it "
            f"there, or name another Python that has it (--torch-python), or run `python {SCRIPT} {file.name} "
            "FOLDER` on any machine with torch and give FOLDER in place of the file"
        )
    if done.returncode != 0:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = f"killed by {signal.Signals(-done.returncode).name}"
        raise ConversionError(f"{file}: its conversion failed, {how}: {told[-500:] or 'no message'}")
    if read_json_object(folder / "config.json").get("source_sha256") != digest:
        raise ConversionError(f"{file}: changed while it was being converted")
    return digest
