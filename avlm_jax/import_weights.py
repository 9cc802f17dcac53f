"""Checks released weights and gathers them in one folder that a configuration can name.

Everything is checked, for all parts, before the first byte is written: headers, names, shapes, dtypes, sizes, tokenizer,
space on the disk. Without torch; only BEATs' published .pt, a pickle, is converted by it in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from avlm_jax import __version__
from avlm_jax.assembly import check_sizes, open_backbone
from avlm_jax.config import ConfigError, load_config
from avlm_jax.staging import (
    check_out,
    check_space,
    is_vacant,
    lies_in,
    nearest_folder,
    remove,
    restore,
    staged,
)
from avlm_jax.weights import beats, qwen2, siglip
from avlm_jax.weights.beats import convert_checkpoint
from avlm_jax.weights.hub import resolve, source_name
from avlm_jax.weights.json_file import file_sha256, read_json_object
from avlm_jax.weights.record import PARTS, digests, read_record, report_table, write_record
from avlm_jax.weights.safetensors_io import INDEX_FILE, StoredTensor, write_folder
from avlm_jax.weights.stored import LoadReport, make_report
from avlm_jax.weights.table import canonical_tensors
from avlm_jax.weights.text import TOKENIZER_FILES, check_tokenizer
from input_pipeline.errors import UserError

EPILOG = """\
examples:
  avlm import-weights --vision google/siglip-so400m-patch14-384 --llm Qwen/Qwen2-7B-Instruct \\
      --audio BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt --out weights
  avlm import-weights --llm /models/Qwen2-7B-Instruct --out weights --config configs/savenvideo.py:size=7b
  avlm import-weights --model exported --out imported

A part is a folder in Hugging Face form (config.json and safetensors, in shards or not) or the hub's owner/name[@revision];
a folder always works, the hub where there is a network. BEATs is published as a .pt, which torch 2.10 or newer converts
once: `pip install "torch>=2.10"`, or --torch-python names a Python that has it. OUT gets the folders vision, audio and
llm, and import.json, which says where they come from; a part that is there already is not imported again.
"""

SIZES = {896: "0.5b", 1536: "1.5b", 3584: "7b"}  # Qwen2's hidden_size -> size of configs/savenvideo.py


class ImportWeightsError(UserError):
    """Parts that cannot be imported, each with its reason; nothing was written."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A part that passed every check.

    Attributes:
        part: "vision", "audio" or "llm".
        source: owner/name@commit, or a path.
        tensors: what will be written, by name, unread.
        report: on these tensors.
        files: the other files of the folder, by name.
        warnings: what the user should know.
        source_sha256: of the .pt that it was converted from; "" for other sources.
        present: it is in OUT already, and its folder has not to be written.
        unrecorded: it is present, and import.json does not say so.
    """

    part: str
    source: str
    tensors: dict[str, StoredTensor]
    report: LoadReport
    files: dict[str, bytes]
    warnings: tuple[str, ...] = ()
    source_sha256: str = ""
    present: bool = False
    unrecorded: bool = False

    @property
    def nbytes(self) -> int:
        """What it takes on the disk, but for headers."""
        return self.report.bytes + sum(map(len, self.files.values()))

    def record(self) -> dict[str, Any]:
        """The part's entry in import.json."""
        return {
            "source": self.source,
            **({"source_sha256": self.source_sha256} if self.source_sha256 else {}),
            "tensors": self.report.count,
            "bytes": self.report.bytes,
            "sha256": self.report.sha256,
            "dtypes": sorted({str(np.dtype(tensor.dtype)) for tensor in self.tensors.values()}),
            "files": digests(self.files),
            "ignored": {reason: list(names) for reason, names in self.report.ignored.items()},
            "warnings": list(self.warnings),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", metavar="DIR", help="SigLIP: folder or hub name")
    parser.add_argument("--audio", metavar="FILE", help="BEATs: the published .pt, or a folder made of it")
    parser.add_argument("--llm", metavar="DIR", help="Qwen2 or LLaMA with its tokenizer: folder or hub name")
    parser.add_argument("--model", metavar="DIR", help="instead of these: a folder made by `avlm export`")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="gets the parts")
    parser.add_argument(
        "--config", metavar="FILE[:ARGS]", help="first compare the sizes with this configuration's"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace parts that this command put into OUT from other sources",
    )
    parser.add_argument(
        "--torch-python", metavar="FILE", default=sys.executable, help="Python whose torch converts a .pt"
    )


def run(args: argparse.Namespace) -> int:
    given = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    if bool(given) == bool(args.model):
        raise UserError("give --model alone, or at least one of --vision, --audio, --llm")
    overrides = getattr(args, "config_overrides", [])
    config = load_config(args.config, overrides) if args.config else None
    if args.model:
        from avlm_jax.weights.exported import import_exported

        if config is not None:
            raise UserError("--model brings its own configuration; leave --config out")
        import_exported(Path(args.model), args.out, overwrite=args.overwrite)
        print(report_table(args.out))
        ask = f"avlm ask --checkpoint {shlex.quote(str(args.out / 'imported' / 'final'))} VIDEO QUESTION"
        print(f"\nnext: {ask}")
        return 0
    import_backbones(
        **given, out=args.out, config=config, overwrite=args.overwrite, torch_python=args.torch_python
    )
    print(report_table(args.out))
    print(f"\nnext: {next_command(args.out, args.config, overrides)}")
    return 0


def import_backbones(
    *,
    vision: str | Path | None = None,
    audio: str | Path | None = None,
    llm: str | Path | None = None,
    out: str | Path,
    config: ConfigDict | None = None,
    overwrite: bool = False,
    torch_python: str | Path = sys.executable,
) -> dict[str, LoadReport]:
    """Checks the given parts, writes each into its folder of `out` and notes it in `out`/import.json.

    A part is written under another name and renamed when it is complete. One that `out` holds already, the same
    weights and files whoever put them there, is left alone.

    Args:
        vision, audio, llm: folder, hub name or (audio) .pt file; None leaves a part as it is.
        out: made if missing.
        config: the parts' sizes must be this configuration's.
        overwrite: replace a part of `out` that import.json knows and that has other weights.
        torch_python: see `convert_checkpoint`.

    Returns:
        By part, what its folder now holds; `ignored` tells which tensors of the source were left out.

    Raises:
        UserError: anything that keeps a part from being imported; the message names every part's problem.
            Nothing was written then.
    """
    out = Path(out)
    check_out(out)
    for part in PARTS:
        restore(out / part)
    records = read_record(out)
    sources = {"vision": vision, "audio": audio, "llm": llm}
    planned: list[Planned] = []
    problems: list[UserError] = []
    with contextlib.ExitStack() as stack:
        for part, name in sources.items():
            if name is None:
                continue
            try:
                plan = _plan(part, name, out, config, records.get(part), torch_python, stack)
                planned.append(_compare_with_present(plan, out, records.get(part), overwrite))
            except UserError as error:
                problems.append(error)
        new = [plan for plan in planned if not plan.present]
        if new and not problems:
            # A part that is replaced stays until its successor is complete, so nothing is subtracted for it.
            check_space(out, sum(plan.nbytes for plan in new), ", ".join(plan.part for plan in new))
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ImportWeightsError("nothing was imported\n" + "\n".join(map(str, problems)))
        for plan in planned:
            if plan.present:
                print(f"{plan.part}: {out / plan.part} holds {plan.source} already", file=sys.stderr)
                if not plan.unrecorded:
                    continue
            else:
                for warning in plan.warnings:
                    print(f"warning: {warning}", file=sys.stderr)
                _write(plan, out)
            records[plan.part] = plan.record()
            write_record(out, records, __version__)
    return {plan.part: plan.report for plan in planned}


# Checking


def _plan(
    part: str,
    name: str | Path,
    out: Path,
    config: ConfigDict | None,
    record: Mapping[str, Any] | None,
    torch_python: str | Path,
    stack: contextlib.ExitStack,
) -> Planned:
    """Checks one part; `stack` keeps a converted .pt until it is written."""
    path = resolve(name)
    source, digest = source_name(name, path), ""
    check_out(out / part)
    for other in PARTS:  # Also one that is not imported now.
        held = lies_in(path, out / other)
        if held is not None:
            raise ImportWeightsError(
                f"{held}: lies in {out / other}, which is --out's own; name another --out, or move the source first"
            )
    if path.is_file():
        if part != "audio":
            raise ImportWeightsError(
                f"{path}: a file; --{part} names a folder with config.json and safetensors"
            )
        if path.suffix == ".safetensors":
            raise ImportWeightsError(f"{path}: name its folder, which must hold BEATs' cfg as config.json")
        digest = file_sha256(path)
        if record and record.get("source_sha256") == digest and _holds(out, part, record):
            if config is not None:
                check_sizes(config, part, source, open_backbone(part, out / part)[0])
            report = LoadReport(
                record["tensors"],
                record["bytes"],
                record["sha256"],
                {reason: tuple(names) for reason, names in record["ignored"].items()},
            )
            return Planned(part, source, {}, report, {}, tuple(record["warnings"]), digest, present=True)
        # Its tensors lie there once converted and once as the part.
        check_space(out, 2 * path.stat().st_size, f"the conversion of {path}")
        print(f"{part}: converting {path}", file=sys.stderr, flush=True)
        folder = stack.enter_context(_passing_folder(out))
        convert_checkpoint(path, folder, python=torch_python)
        path = folder
    _refuse_pickles(part, path)
    layer = config.model.vision.feature_layer if config is not None and part == "vision" else None
    try:
        tensors, ignored, sizes = _open(part, path, layer)
        files, warnings = _other_files(part, path, layer)
    except UserError as error:
        if not digest:
            raise
        # The user knows the .pt, not the folder it was converted to, which will be gone.
        raise ImportWeightsError(str(error).replace(str(path), source)) from None
    if config is not None:
        check_sizes(config, part, source, sizes)
    report = make_report(tensors, tensors, ignored, label=f"{part}: reading")
    return Planned(part, source, tensors, report, files, tuple(warnings), digest)


@contextlib.contextmanager
def _passing_folder(out: Path) -> Iterator[Path]:
    """A folder on the disk of `out`, for as long as the context lasts. What a killed run has left of it goes."""
    # Always the same for one `out`, so that it can be found again; not in `out`, which may never come to be.
    name = f".avlm-import-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}"
    for above in (out.absolute(), *out.absolute().parents):
        remove(above / name)
    folder = nearest_folder(out) / name
    folder.mkdir()
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # Of a broken disk; the error that matters is on its way.
            remove(folder)


def _refuse_pickles(part: str, folder: Path) -> None:
    """A folder whose weights are pickles alone gets a better answer than that its safetensors are missing."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not found or any(folder.glob("*.safetensors")):
        return
    remedy = (
        "take a repository or revision with safetensors, or let transformers save the model again elsewhere"
    )
    if part == "audio":
        remedy = f"name the file itself: --audio {folder / found[0]}"
    raise ImportWeightsError(
        f"{folder}: its weights are pickles ({', '.join(found)}), which are never read here; {remedy}"
    )


def _open(
    part: str, folder: Path, feature_layer: int | None
) -> tuple[dict[str, StoredTensor], Mapping[str, tuple[str, ...]], dict[str, Any]]:
    """(used tensors under their published names, ignored tensors by reason, sizes) of a part's folder."""
    sizes, plan = open_backbone(part, folder, feature_layer)
    if part == "vision":
        table = siglip.siglip_table(siglip.read_config(folder, feature_layer))
    elif part == "audio":
        table = beats.beats_table(beats.read_config(folder)[0])
    else:
        table = qwen2.qwen2_table(qwen2.read_config(folder))
    return canonical_tensors(table, plan), plan.ignored, sizes


def _other_files(part: str, folder: Path, feature_layer: int | None) -> tuple[dict[str, bytes], list[str]]:
    """(what a part's folder holds beside its tensors, warnings); config.json describes the tensors that are kept."""
    content = read_json_object(folder / "config.json")
    warnings: list[str] = []
    if part == "vision":
        kept = ["preprocessor_config.json"]
        config = siglip.read_config(folder, feature_layer)
        warnings = list(_compare_preprocessing(folder, config.image_size))
        content = dict(content.get("vision_config", content)) | {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            "feature_layer": config.feature_layer,
        }
    elif part == "audio":
        kept = []
        # The tagging head is not kept.
        content = {key: value for key, value in content.items() if key != "predictor_class"}
        content |= {"model_type": "beats", "finetuned_model": False}
    else:
        kept = [*TOKENIZER_FILES, "generation_config.json"]
        warnings = check_tokenizer(folder, qwen2.read_config(folder))
    kept += sorted(file.name for file in folder.iterdir() if file.name.startswith(("LICENSE", "NOTICE")))
    files = {name: (folder / name).read_bytes() for name in kept if (folder / name).is_file()}
    own = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return files | {"config.json": (folder / "config.json").read_bytes() if part == "llm" else own}, warnings


def _compare_preprocessing(folder: Path, image_size: int) -> Iterator[str]:
    """Warns where the published preprocessing is another than this project's (SigLIP's: bicubic, to -1..1)."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return
    found = read_json_object(file)
    ours = {
        "size": [{"height": image_size, "width": image_size}],
        "resample": [3],  # PIL's number for bicubic
        "image_mean": [[0.5] * 3],
        "image_std": [[0.5] * 3],
        "rescale_factor": [1 / 255],
        "do_resize": [True],
        "do_rescale": [True],
        "do_normalize": [True],
        "do_center_crop": [False, None],
    }
    for key, value in found.items():
        if key in ours and value not in ours[key]:
            yield f"{file}: {key} is {value!r}, this project's pictures are made with {ours[key][0]!r}"


def _compare_with_present(
    plan: Planned, out: Path, record: Mapping[str, Any] | None, overwrite: bool
) -> Planned:
    """`plan`, marked as present if `out` holds just that; UserError if it holds something that must stay."""
    target = out / plan.part
    if plan.present or is_vacant(target):
        return plan
    wanted = plan.record()
    recorded = record is not None and all(record[key] == wanted[key] for key in ("sha256", "files"))
    # A run that was killed before it could write import.json leaves a part without a record, or with that of before.
    if _holds(out, plan.part, wanted, exactly=not recorded):
        return dataclasses.replace(plan, present=True, unrecorded=not recorded)
    if record is None:
        raise ImportWeightsError(
            f"{target}: was not put there by this command, so it stays, with --overwrite too; move it away or choose "
            "another --out"
        )
    if not (recorded or overwrite):  # What was damaged since is written again.
        raise ImportWeightsError(
            f"{target}: holds {record['source']} (sha256 {record['sha256'][:16]}), not {plan.source} (sha256 "
            f"{plan.report.sha256[:16]}); --overwrite replaces it, another --out leaves it"
        )
    check_out(target, overwrite=True)
    return plan


def _holds(out: Path, part: str, record: Mapping[str, Any], *, exactly: bool = False) -> bool:
    """Whether a part in `out` is what a record says, to the bit; `exactly`: and nothing else is in its folder."""
    folder = out / part
    try:
        tensors, ignored, _ = _open(part, folder, None)
        if exactly:
            files = {*record["files"], INDEX_FILE, *(tensor.file.name for tensor in tensors.values())}
            if ignored or {entry.name for entry in folder.iterdir()} - files:
                return False
        if {name: file_sha256(folder / name) for name in record["files"]} != record["files"]:
            return False
        return make_report(tensors, tensors, ignored).sha256 == record["sha256"]
    except (UserError, OSError):
        return False


# Writing


def _write(plan: Planned, out: Path) -> None:
    """Puts a part in its place, in one rename."""
    with staged(out / plan.part, last=("config.json",)) as partial:
        write_folder(partial, plan.tensors, label=f"{plan.part}: writing")
        for name, content in plan.files.items():
            (partial / name).write_bytes(content)


def next_command(out: Path, config: str | None, overrides: list[str]) -> str:
    """The command that trains on what `out` holds, with the sizes that the configuration does not have."""
    held: dict[str, Mapping[str, Any]] = {}
    for part in read_record(out):
        try:
            held[part] = open_backbone(part, out / part)[0]
        except UserError:  # Damaged since; to be told when it is imported or used.
            held[part] = {}
    width = held.get("llm", {}).get("width")
    name = config or f"configs/savenvideo.py:size={SIZES.get(width, '7b')}"
    try:
        model = load_config(name, overrides).model
        more = [item for part, sizes in held.items() for item in _sizes_to_set(part, sizes, model[part])]
    except ConfigError:  # Not started where the configurations are; the 7b's sizes are known not to fit.
        more = list(_sizes_to_set("llm", held["llm"], None)) if width and width not in SIZES else []
    if set(held) == set(PARTS):
        name += f"{',' if ':' in name else ':'}weights={out}"
    else:
        more += [f"--config.init.{part}={out / part}" for part in held]
        if "llm" in held:
            more.append(f"--config.text.tokenizer={out / 'llm'}")
    return shlex.join(["avlm", "train", "--config", name, *overrides, *more, "--workdir", "W"])


def _sizes_to_set(part: str, sizes: Mapping[str, Any], section: Mapping[str, Any] | None) -> Iterator[str]:
    """Overrides for the sizes that config.model.<part> does not have; for all of them where it is unknown (None)."""
    for key, value in sizes.items():
        unset = section is None or section.get(key) is None
        if key == "head_dim" and unset and value * sizes["num_heads"] == sizes["width"]:
            continue  # Null means width / num_heads.
        if section is None or (key in section and section[key] != value):
            yield f"--config.model.{part}.{key}={value}"
