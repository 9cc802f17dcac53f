"""Reading and writing safetensors with numpy alone (format: huggingface/safetensors, README "Format").

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
data. A folder holds one `model.safetensors`, or several shards and `model.safetensors.index.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.progress import track

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit (safetensors/src/tensor.rs)
MAX_AXES = 32  # numpy itself stops at 64; the product of more, each of them large, takes forever
MAX_SHARD_BYTES = 5 * 10**9  # transformers' long-standing default for save_pretrained

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SafetensorsError(UserError, ValueError):
    """A file that is no valid safetensors, or a folder whose parts do not agree. Names file and key."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is on disk until somebody looks: `np.asarray(tensor)` is a read-only view of the file.

    Only the pages that are touched are read, so slicing the view reads the slice.

    Attributes:
        file: where it lies; name, shape, dtype: as the header says.
        begin: absolute byte offset in `file`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not self.nbytes:
            view = np.empty(self.shape, self.dtype)
        else:
            view = np.ndarray(self.shape, self.dtype, buffer=_map(self.file), offset=self.begin)
        if dtype is not None and np.dtype(dtype) != self.dtype:
            return view.astype(dtype)
        return view.copy() if copy else view

    def release(self) -> None:
        """Gives back the memory of the pages that were read; views stay valid and read them again."""
        if self.nbytes:
            begin = self.begin - self.begin % mmap.PAGESIZE
            _map(self.file).madvise(mmap.MADV_DONTNEED, begin, self.begin + self.nbytes - begin)

    def pieces(self, size: int = 2**22) -> Iterator[bytes]:
        """The data as bytes of at most `size`, read from the file and not from the map."""
        with open(self.file, "rb") as handle:
            handle.seek(self.begin)
            left = self.nbytes
            while left:
                piece = handle.read(min(size, left))
                if not piece:
                    raise SafetensorsError(f"{self.file}: became shorter while tensor {self.name!r} was read")
                yield piece
                left -= len(piece)


@functools.lru_cache(maxsize=256)
def _open_map(file: Path, size: int, modified_ns: int) -> mmap.mmap:
    with open(file, "rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def _map(file: Path) -> mmap.mmap:
    stat = file.stat()
    return _open_map(file, stat.st_size, stat.st_mtime_ns)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise SafetensorsError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def read_file(file: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one file, by name; the data stay on disk.

    Raises:
        SafetensorsError: the file is truncated or longer than it says, its header is too large or no valid
            JSON, or a tensor has an unknown dtype, or a range that leaves the file, overlaps another one or
            does not fit its shape.
    """
    file = Path(file)
    if not file.is_file():
        raise SafetensorsError(f"{file}: no such file")
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise SafetensorsError(f"{file}: {size} bytes are no safetensors file; fetch it again")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise SafetensorsError(f"{file}: a header of {length} bytes is too large for a safetensors file")
        if 8 + length > size:
            raise SafetensorsError(f"{file}: truncated inside its header ({size} bytes); fetch it again")
        raw = handle.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except SafetensorsError as error:
        raise SafetensorsError(f"{file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{file}: the header is no valid JSON ({error}); fetch it again") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{file}: the header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _stored(file, name, entry, start, size) for name, entry in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin != end:
            fault = "overlaps another tensor" if tensor.begin < end else "leaves a hole before it"
            raise SafetensorsError(f"{file}: tensor {tensor.name!r} {fault} (byte {tensor.begin - start})")
        end += tensor.nbytes
    if end != size:
        raise SafetensorsError(f"{file}: {size - end} bytes follow the last tensor; fetch the file again")
    return tensors


def _stored(file: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise SafetensorsError(f"{where}: the header entry lacks dtype, shape or data_offsets") from None
    if not isinstance(code, str) or code not in _DTYPES:
        raise SafetensorsError(f"{where}: dtype {repr(code)[:40]} is unknown; known: {', '.join(_DTYPES)}")
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        shown = f"shape {repr(list(shape[:MAX_AXES]))[:200]}, offsets [{repr(begin)[:30]}, {repr(end)[:30]}]"
        raise SafetensorsError(f"{where}: {shown}: no sizes of an array")
    if start + end > size:
        raise SafetensorsError(
            f"{where}: ends at byte {start + end} of {size}; truncated, fetch the file again"
        )
    # A zero among the sizes must not hide others that no array can have.
    if math.prod(n or 1 for n in shape) * _DTYPES[code].itemsize >= 2**63:
        raise SafetensorsError(f"{where}: shape {list(shape)} is too large for an array")
    tensor = StoredTensor(file, name, shape, _DTYPES[code], start + begin)
    if end - begin != tensor.nbytes:
        raise SafetensorsError(f"{where}: {end - begin} bytes, but {code}{list(shape)} takes {tensor.nbytes}")
    return tensor


def read_folder(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a folder (one file, or shards with an index) or of a single file; the data stay on disk.

    Raises:
        SafetensorsError: as `read_file`; or neither or both forms are present, a shard is missing, or index
            and shards disagree about a tensor.
    """
    path = Path(path)
    if path.is_file():
        return read_file(path)
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file() and index.is_file():
        raise SafetensorsError(f"{path}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one")
    if single.is_file():
        return read_file(single)
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in path.glob("*")))[:200] if path.is_dir() else "no such folder"
        raise SafetensorsError(
            f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} (found: {found or 'nothing'})"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique_pairs)[
            "weight_map"
        ]
        shards = {name: str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SafetensorsError(
            f"{index}: not an index with a weight_map ({error!r}); fetch it again"
        ) from None
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise SafetensorsError(f"{index}: shard {shard!r} is not a plain file name")
        if not (path / shard).is_file():
            raise SafetensorsError(f"{path / shard}: missing, though {INDEX_FILE} names it; fetch it")
        stored = read_file(path / shard)
        named = {name for name, where in shards.items() if where == shard}
        for name in sorted(stored.keys() ^ named):
            fault = (
                "is in the index but not in the file" if name in named else "is in the file but not the index"
            )
            raise SafetensorsError(f"{path / shard}: tensor {name!r} {fault}")
        tensors.update(stored)
    return tensors


def write_file(
    file: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[], object] = lambda: None,
) -> None:
    """Writes `tensors` (anything with shape, dtype and `np.asarray`) to one file, one at a time.

    The file appears under its name only when it is complete. The default metadata {"format": "pt"} is what
    transformers wants to see. `written` is called after every tensor.

    Raises:
        SafetensorsError: a dtype that the format does not know.
    """
    file = Path(file)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    ordered = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    for name in ordered:  # Widest dtype first keeps every tensor aligned to its item size.
        dtype, shape = np.dtype(tensors[name].dtype), tuple(tensors[name].shape)
        if dtype not in _CODES:
            raise SafetensorsError(
                f"{file}: tensor {name!r} has dtype {dtype}, which safetensors does not know"
            )
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as handle:
            handle.write(len(raw).to_bytes(8, "little") + raw)
            for name in ordered:
                # View as bytes: numpy's own writer refuses the extension dtypes of ml_dtypes.
                handle.write(np.ascontiguousarray(np.asarray(tensors[name])).reshape(-1).view(np.uint8).data)
                if hasattr(tensors[name], "release"):  # Of another file: its pages have done their work.
                    tensors[name].release()
                written()
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(
    directory: str | os.PathLike,
    tensors: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    label: str = "",
) -> list[Path]:
    """Writes `tensors` as `model.safetensors`, or as numbered shards with an index if they exceed a shard.

    With a label it shows its progress. Returns the files written. Raises SafetensorsError as `write_file`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name in sorted(tensors):
        nbytes = math.prod(tensors[name].shape) * np.dtype(tensors[name].dtype).itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + nbytes, total + nbytes
    stale = [directory / SINGLE_FILE, directory / INDEX_FILE, *directory.glob("model-*-of-*.safetensors")]
    if len(shards) == 1:
        files = [directory / SINGLE_FILE]
    else:
        files = [
            directory / f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
        ]
    ticks = track(range(len(tensors)), label=label, unit="tensors") if label else iter(())
    next(ticks, None)  # The clock runs.
    for file, names in zip(files, shards, strict=True):
        write_file(file, {name: tensors[name] for name in names}, written=lambda: next(ticks, None))
    written = list(files)
    if len(shards) > 1:
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(directory / INDEX_FILE)
    for file in stale:  # An older export of another size would make the folder ambiguous.
        if file not in written:
            file.unlink(missing_ok=True)
    return written
