"""Converts a published BEATs checkpoint (a pickle) into a folder of safetensors. Stands alone.

    python beats_checkpoint.py BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt FOLDER

It needs torch 2.10 or newer and nothing else; `avlm import-weights --audio FILE.pt` runs it as a process of its own. The
folder gets model.safetensors (the tensors of "model" as stored, under their names) and config.json (the
values of "cfg", and "source_sha256", the hash of the file).

A pickle is a program. Before torch sees the file, its instructions are listed and refused if they call for anything that
a state dict does not need; torch then reads it with `weights_only=True`; where the system allows it, the process gives up
its network first.

Exit codes: 0 done, 2 the file is refused or the folder cannot be written (the reason is on stderr), 3 no usable torch.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import pickletools
import re
import sys
import zipfile
from pathlib import Path
from typing import IO, Any, NoReturn

REFUSED, NO_TORCH = 2, 3

# Before 2.6 weights_only ran code of the file (CVE-2025-32434), before 2.10 it could corrupt the heap (CVE-2026-24747).
OLDEST_TORCH = (2, 10)

# All that torch.save writes for a dict of plain values and tensors (torch/_utils.py, torch/storage.py).
ALLOWED = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.storage\.(UntypedStorage|TypedStorage)|torch\.Size"
)
LEGACY_PICKLES = (
    5  # magic number, protocol, system, the object, storage keys (torch.serialization, before torch 1.6)
)
MAX_PICKLE_BYTES = 64 * 2**20  # Names and shapes alone: the published ones take 30 kB.

# torch dtype -> safetensors' code. What kinds of numbers the encoder accepts is judged when the folder is read.
CODES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip


class Refused(Exception):
    """The file is not what it should be. The message names it."""


def main() -> int:
    parser = argparse.ArgumentParser(description="BEATs' .pt to a folder of safetensors")
    parser.add_argument("file", type=Path, help="the published checkpoint")
    parser.add_argument("folder", type=Path, help="gets model.safetensors and config.json")
    args = parser.parse_args()
    give_up_network()
    try:
        print(convert(args.file, args.folder))
    except Refused as error:
        print(error, file=sys.stderr)
        return REFUSED
    except OSError as error:  # A full disk does not name a file.
        print(
            f"{args.file}: cannot be converted ({error.filename or args.folder}: {error.strerror})",
            file=sys.stderr,
        )
        return REFUSED
    except ImportError as error:
        print(f'{error}; this conversion needs pip install "torch>=2.10"', file=sys.stderr)
        return NO_TORCH
    return 0


def give_up_network() -> None:
    """Moves this process into a network of its own, without any interface, if the system (Linux) lets it."""
    new_user, new_network = 0x10000000, 0x40000000  # linux/sched.h: CLONE_NEWUSER, CLONE_NEWNET
    try:
        unshare = ctypes.CDLL(None).unshare
        # Root may do the one alone; others may do both, where unprivileged user namespaces are on.
        if unshare(new_network) != 0:
            unshare(new_user | new_network)
    except (AttributeError, OSError, TypeError):  # Not Linux.
        pass


def convert(file: Path, folder: Path) -> str:
    """Writes the folder and says what went into it.

    Raises:
        Refused: `file` is no such checkpoint, is damaged, or asks for more than data.
        ImportError: there is no torch, or one that is too old.
    """
    if not file.is_file():
        raise Refused(f"{file}: no such file")
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    check_instructions(file)
    checkpoint = load(file)
    cfg, tensors = take_apart(file, checkpoint)
    unused = sorted(str(key) for key in checkpoint if key not in ("cfg", "model"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # Last to come: without it the folder is no folder.
    count, nbytes = write_safetensors(folder / "model.safetensors", tensors)
    cfg |= {"model_type": "beats", "source_sha256": digest}
    if unused:
        cfg["source_unused_keys"] = unused
    partial = folder / ".config.json.partial"
    partial.write_text(json.dumps(cfg, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
    return f"{folder}: {count} tensors, {nbytes} bytes, from {file}, sha256 {digest}"


def check_instructions(file: Path) -> None:
    """Refuses a file whose pickles call for something outside `ALLOWED`; none of them is run.

    Raises:
        Refused: naming the file and what it calls for, or what is damaged.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            handle.seek(0)
            for number in range(LEGACY_PICKLES):
                check_pickle(file, handle, first=number == 0)
            return
    try:
        with zipfile.ZipFile(file) as archive:
            for item in archive.infolist():
                # torch stores without compression, so a member that unpacks to more than it takes is none of its own.
                if item.compress_type != zipfile.ZIP_STORED or item.file_size > file.stat().st_size:
                    raise Refused(f"{file}: {item.filename} is compressed, which torch never does; refused")
            damaged = archive.testzip()
            if damaged is not None:
                raise Refused(f"{file}: {damaged} is damaged (its checksum differs); fetch the file again")
            pickles = [item for item in archive.infolist() if item.filename.endswith(".pkl")]
            if not pickles:
                raise Refused(f"{file}: a zip archive without data.pkl, not one of torch's")
            for item in pickles:
                if item.file_size > MAX_PICKLE_BYTES:
                    raise Refused(f"{file}: {item.filename} has {item.file_size} bytes, no state dict's size")
                with archive.open(item) as handle:
                    check_pickle(file, handle)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Refused(f"{file}: truncated or damaged ({error}); fetch the file again") from None


def check_pickle(file: Path, handle: IO[bytes], first: bool = False) -> None:
    """Reads one pickle's instructions, up to its STOP."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(handle):
            if opcode.name in ("GLOBAL", "INST"):
                allow(file, argument.replace(" ", "."))
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                # Names made while the pickle runs, here guessed at. torch.save's protocol 2 has none of them.
                refuse(file, ".".join(strings) or "something without a name")
            elif isinstance(argument, str):
                strings.append(argument)
                del strings[:-2]
    except (ValueError, UnicodeDecodeError) as error:
        what = "neither torch's zip archive nor a pickle" if first else f"truncated or damaged ({error})"
        raise Refused(f"{file}: {what}; fetch the file again") from None


def allow(file: Path, name: str) -> None:
    if not ALLOWED.fullmatch(name):
        refuse(file, name)


def refuse(file: Path, name: str) -> NoReturn:
    raise Refused(
        f"{file}: refused, its pickle calls for {name}, which no BEATs checkpoint needs; loading it could run code"
    )


def load(file: Path) -> dict[str, Any]:
    """The checkpoint, read by torch."""
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise ImportError(
            f"torch {torch.__version__} can be taken over by a crafted file (CVE-2026-24747)", name="torch"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, EOFError, KeyError, ...
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise Refused(f"{file}: torch cannot read it ({reason[0]}); fetch the file again") from None


def take_apart(file: Path, checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(cfg as plain JSON values, tensors by name).

    Raises:
        Refused: naming the key that is missing or holds something else.
    """
    import torch

    if not isinstance(checkpoint, dict):
        raise Refused(
            f"{file}: holds a {type(checkpoint).__name__}, not a dict with the keys 'cfg' and 'model'"
        )
    for key in ("cfg", "model"):
        if not isinstance(checkpoint.get(key), dict):
            found = f"is a {type(checkpoint[key]).__name__}" if key in checkpoint else "is missing"
            keys = ", ".join(map(repr, checkpoint)) or "nothing"
            raise Refused(
                f"{file}: the key {key!r} {found}; a BEATs checkpoint has 'cfg' and 'model' (found: {keys[:200]})"
            )
    cfg = {key: plain(file, f"cfg[{key!r}]", value) for key, value in checkpoint["cfg"].items()}
    for name in (*cfg, *checkpoint["model"]):
        if not isinstance(name, str):
            raise Refused(f"{file}: the key {name!r} is a {type(name).__name__}, not a name")
    for name, tensor in checkpoint["model"].items():
        dense = (
            isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        )
        if not dense or tensor.device.type != "cpu" or str(tensor.dtype) not in CODES:
            kind = (
                f"{tensor.layout} {tensor.dtype} on {tensor.device}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__
            )
            raise Refused(f"{file}: model[{name!r}] is {kind}, not an ordinary tensor")
    return cfg, dict(checkpoint["model"])


def plain(file: Path, where: str, value: Any) -> Any:
    """`value` if JSON has its like."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (list, tuple):
        return [plain(file, f"{where}[{place}]", item) for place, item in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: plain(file, f"{where}[{key!r}]", item) for key, item in value.items()}
    raise Refused(f"{file}: {where} is {value!r:.80} ({type(value).__name__}), which JSON cannot hold")


def write_safetensors(file: Path, tensors: dict[str, Any]) -> tuple[int, int]:
    """(number of tensors, bytes). Format: huggingface/safetensors, README "Format"."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    ordered = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # Keeps each one aligned.
    for name in ordered:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": CODES[str(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            if tensors[name].numel():
                handle.write(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    os.replace(partial, file)
    return len(ordered), offset


if __name__ == "__main__":
    sys.exit(main())
