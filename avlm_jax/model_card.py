"""README.md of an exported model: what it is, where it comes from, how to run it, what it cannot do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avlm_jax import __version__
from avlm_jax.weights.record import read_record
from input_pipeline.errors import UserError

if TYPE_CHECKING:
    from avlm_jax.export import Export

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PURPOSE = {
    "vision": "SigLIP: frames to patch features",
    "audio": "BEATs: sound to features",
    "connector": "features and times to media tokens",
    "llm": "language model: media tokens and text to an answer",
    "adapter": "LoRA update of the language model",
}
_TAGS = ("video", "audio", "audio-visual", "video-question-answering", "savenvideo")


def write_card(
    export: Export,
    *,
    adapter: bool,
    metadata: Mapping[str, Any],
    lineage: Sequence[Mapping[str, Any]] = (),
    reports: Sequence[Mapping[str, Any]] = (),
    auto_tokenizer: bool = True,
) -> str:
    """The text of README.md.

    Args:
        export: what was written.
        adapter: whether the adapter lies apart.
        metadata, lineage, reports: see `export.export_model`.
        auto_tokenizer: whether AutoTokenizer reads the same ids as the model was trained with.
    """
    sources = backbone_sources(export)
    blocks = [
        _front_matter(sources),
        _introduction(export, adapter),
        _running(adapter, auto_tokenizer),
        _origin(export, metadata, lineage, sources),
        _sizes(export),
        _evaluation(reports),
        _limits(export),
        _licences(sources),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def snippet(out: Path | str) -> list[str]:
    """The lines of Python that load an exported folder."""
    return [
        f"import sys; sys.path.insert(0, {str(out)!r})",
        "from modeling_savenvideo import SaveNVideo",
        f"model = SaveNVideo.from_pretrained({str(out)!r})",
    ]


def backbone_sources(export: Export) -> dict[str, str]:
    """Backbone -> where it was published, "" if nobody wrote that down.

    `avlm import-weights` leaves a record beside the folders; transformers leaves a name in config.json.
    """
    init = export.assembly.config.init
    sources = {}
    for part in ("vision", "audio", "llm"):
        folder = Path(init[part])
        try:
            source = read_record(folder.parent).get(part, {}).get("source", "")
        except UserError:
            source = ""
        if not source:
            try:
                source = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
                    "_name_or_path", ""
                )
            except (OSError, ValueError, AttributeError):
                source = ""
        name = str(source).partition("@")[0]
        if _HUB_ID.fullmatch(name) and not Path(name).exists():
            sources[part] = str(source)
        else:  # A folder of the machine that trained says nothing to anybody else; its own name may.
            sources[part] = "" if Path(name).name == part else Path(name).name
    return sources


def _front_matter(sources: Mapping[str, str]) -> str:
    """What the hub reads. The licence is left to whoever publishes: it follows from the backbones and the data."""
    bases = sorted(
        {
            source.partition("@")[0]
            for source in sources.values()
            if _HUB_ID.fullmatch(source.partition("@")[0])
        }
    )
    lines = ["---", "library_name: avlm_jax", "pipeline_tag: video-text-to-text"]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in _TAGS), "---"])


def _introduction(export: Export, adapter: bool) -> str:
    system = export.assembly.system
    spec = system.spec
    seconds = spec.max_windows * spec.window_hop / 16_000
    form = (
        "The language model in `llm/` is the base, and what training added to it is the LoRA adapter in `adapter/`."
        if adapter
        else "What training added to the language model is merged into it."
        if export.merged
        else "The language model is the base as it was: this stage has trained no adapter."
    )
    return (
        f"# SAVEnVideo on {export.llm_config['model_type']}, {export.llm_config['num_hidden_layers']} layers\n\n"
        "A video language model: it is shown a video, hears its sound, is told the times that a question names, and "
        "answers in text. It is built after the SAVEn-Vid paper (SigLIP, BEATs, Temporal Linear Projection, AVTS "
        f"resampler, language model), and was exported to PyTorch by avlm_jax {__version__}. {form}\n\n"
        f"One question sees {spec.num_frames} frames of {spec.image_size} x {spec.image_size} pixels, hears up to "
        f"{seconds:.0f} s of sound in {spec.max_windows} windows, and names up to {spec.max_intervals} times; all that "
        f"becomes {system.num_media_tokens} tokens ahead of the text."
    )


def _running(adapter: bool, auto_tokenizer: bool) -> str:
    loader = "AutoTokenizer" if auto_tokenizer else "PreTrainedTokenizerFast"
    lines = [
        "## Running it",
        "",
        "The whole model needs `torch` and `transformers`, no remote code and no JAX. From the folder above this one "
        "(here called `exported`):",
        "",
        "```python",
        *snippet("exported"),
        'print(model.generate("What is heard?", frames=[picture], waveform=samples))  # PIL images; 16 kHz mono in [-1, 1]',
        "```",
        "",
        "The language model alone is one for transformers:",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM, {loader}",
        'llm = AutoModelForCausalLM.from_pretrained("exported/llm")',
        f'tokenizer = {loader}.from_pretrained("exported/llm")',
        "```",
    ]
    if not auto_tokenizer:
        lines += [
            "",
            "Do not use AutoTokenizer: for this model type it replaces the normaliser and the word pattern of "
            "`tokenizer.json` by its own, and gives other ids than the model was trained with.",
        ]
    if adapter:
        lines += [
            "",
            "and the adapter one for PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            'llm = PeftModel.from_pretrained(llm, "exported/adapter")',
            "```",
        ]
    lines += [
        "",
        "Back in JAX, to ask, evaluate or train on:",
        "",
        "```sh",
        "avlm import-weights --model exported --out imported",
        'avlm ask holiday.mp4 "What is heard?" --checkpoint imported/imported/final',
        "```",
        "",
        "That compares every file but this one with `hashes.json` first.",
    ]
    return "\n".join(lines)


def _origin(
    export: Export,
    metadata: Mapping[str, Any],
    lineage: Sequence[Mapping[str, Any]],
    sources: Mapping[str, str],
) -> str:
    lines = ["## Where it comes from", ""]
    stages = [stage for stage in (*lineage, metadata) if stage]
    if stages:
        rows = [
            (
                str(stage.get("stage", "?")),
                str(stage.get("steps", "?")),
                f"`{str(stage.get('hash', '?'))[:16]}`",
                f"`{str(stage['parent'])[:16]}`" if stage.get("parent") else "none",
            )
            for stage in stages
        ]
        lines += [_table(("stage", "steps", "hash of what it published", "began from"), rows), ""]
    hashes = metadata.get("weights") or {}
    rows = [
        (
            part,
            _PURPOSE[part],
            source or "not recorded",
            f"`{hashes[part][:16]}`" if part in hashes else "not recorded",
        )
        for part, source in sources.items()
    ]
    lines += [_table(("backbone", "what it does", "source", "sha256 of the tensors trained on"), rows), ""]
    if export.merged:
        lines.append(
            f"Merged into the language model: {export.merged} LoRA adapter{'s' * (export.merged > 1)}."
        )
    lines.append(
        "The training configuration is `avlm_config.json`; versions and hashes are in `config.json` under `source`."
    )
    if export.drawn:
        modules = sorted({path.rpartition("/")[0] for path in export.drawn})
        lines += [
            "",
            f"**Untrained.** No stage has trained these modules; their {len(export.drawn)} tensors are random draws from "
            f"the configuration's seed: {', '.join(f'`{name}`' for name in modules)}.",
        ]
    return "\n".join(lines)


def _sizes(export: Export) -> str:
    rows = []
    for part in _PURPOSE:
        leaves = export.parts[part].values()
        if leaves:
            count = sum(math.prod(leaf.shape) for leaf in leaves)
            nbytes = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
            dtypes = ", ".join(sorted({str(np.dtype(leaf.dtype)) for leaf in leaves}))
            rows.append((f"`{part}/`", f"{count:,}", f"{nbytes:,}", dtypes))
    return "## Sizes\n\n" + _table(("folder", "parameters", "bytes", "stored as"), rows)


def _evaluation(reports: Sequence[Mapping[str, Any]]) -> str:
    if not reports:
        return "## Evaluation\n\nNo evaluation of this stage was found when it was exported."
    rows = []
    for report in reports:
        accuracy = report.get("accuracy")
        rows.append(
            (
                str(report.get("benchmark", "?")),
                " + ".join(report.get("modalities", ())) or "text alone",
                str(report.get("protocol", "?")),
                f"{report.get('correct', '?')} of {report.get('total', '?')}",
                "?" if accuracy is None else f"{100 * accuracy:.1f} %",
                str(report.get("unparsed", "?")),
                str(report.get("missing", "?")),
            )
        )
    heads = ("questions", "shown", "protocol", "right", "accuracy", "unparsed", "missing")
    return (
        "## Evaluation\n\nMeasured in JAX by `avlm evaluate` on this stage, ahead of the export:\n\n"
        + _table(heads, rows)
    )


def _limits(export: Export) -> str:
    spec = export.assembly.system.spec
    return "\n".join(
        [
            "## Limits",
            "",
            "- It does not transcribe: BEATs tells kinds of sound apart (speech, music, a dog), not words, and nothing "
            "here was trained to recognise speech.",
            f"- It sees {spec.num_frames} moments of a video however long that is; what happens between them is not seen, "
            "and text or faces smaller than a few pixels of a frame are lost.",
            "- Sound beyond the last window is not heard. What moves faster than the frames follow each other has no order.",
            "- Answers can be wrong and sound certain. The biases of the backbones and of the training data are in it, and "
            "nothing was measured but what stands under Evaluation.",
        ]
    )


def _licences(sources: Mapping[str, str]) -> str:
    named = [f"{part}: {source}" for part, source in sources.items() if source]
    look = f" Look them up where they were published ({'; '.join(named)})." if named else ""
    return (
        "## Licences\n\nNo licence is stated here. This folder holds weights derived from a SigLIP, a BEATs and a language "
        f"model, each under its own terms, and the data that it was trained on has terms as well.{look} Licence files that "
        "lay beside the backbones are in their folders. Whoever publishes the folder names a licence that goes with all of "
        "them. `modeling_savenvideo.py` is part of avlm_jax, Apache License 2.0."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
