"""Parameters that still lie in files: read whole, by layer or by the slice that one device holds, and hashed.

Nothing here keeps more than one layer's slice in memory, and pages of a mapped file are given back once they
were read, so a model of any size passes through a host that could not hold it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from avlm_jax.weights.safetensors_io import StoredTensor
from input_pipeline.progress import track

if TYPE_CHECKING:
    from avlm_jax.weights.table import Transform

HASH_THREADS = 8  # hashlib and file reads free the interpreter lock.
BLOCK_BYTES = 2**23  # Of a mapped file that are in memory at once.
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A tensor that is made when somebody looks: `np.asarray(tensor)`. Files of any size are written so."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.make())
        return array if dtype is None else array.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """One of our parameters, in files under names of theirs.

    Attributes:
        shape: of the parameter, with the layer axis if it is stacked.
        dtype: as stored.
        names: one tensor per layer, or a single one.
        stacked: whether names run along a leading layer axis.
        transform, part: the parameter is `transform.ours(tensor)[part]`.
        tensors: where the names are looked up.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]
    stacked: bool
    transform: Transform
    part: int
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)

    def _view(self, layer: int) -> np.ndarray:
        return self.transform.ours(np.asarray(self.tensors[self.names[layer]]))[self.part]

    def __getitem__(self, layer: int) -> np.ndarray:
        """One layer of a stacked parameter, a view of the file where the layout allows."""
        if not self.stacked:
            raise TypeError("only stacked parameters have layers")
        return self._view(layer)

    def layer(self, number: int) -> StoredLeaf:
        """One layer of a stacked parameter as a parameter of its own, still unread."""
        if not self.stacked:
            raise TypeError("only stacked parameters have layers")
        name = self.names[number]
        return dataclasses.replace(self, shape=self.shape[1:], names=(name,), stacked=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(dtype=dtype)

    def read(self, index: tuple[slice, ...] | None = None, dtype: Any = None) -> np.ndarray:
        """A slice of the parameter as a new C-ordered array.

        Args:
            index: one slice per axis, as `Sharding.devices_indices_map` gives them; None reads everything.
            dtype: to convert to on the way; None keeps the stored one.
        """
        index = tuple(slice(None) for _ in self.shape) if index is None else index
        sizes = [len(range(*axis.indices(size))) for axis, size in zip(index, self.shape, strict=True)]
        out = np.empty(sizes, self.dtype if dtype is None else np.dtype(dtype))
        if not self.stacked:
            self._copy(0, index, out)
            return out
        for row, layer in enumerate(range(*index[0].indices(self.shape[0]))):
            self._copy(layer, index[1:], out[row])
        return out

    def _copy(self, layer: int, index: tuple[slice, ...], out: np.ndarray) -> None:
        """out[...] = one layer's slice, in blocks that lie together in the file, giving pages back after each."""
        tensor = self.tensors[self.names[layer]]
        release = tensor.release if isinstance(tensor, StoredTensor) else lambda: None
        view = self._view(layer)[index]
        if out.dtype == view.dtype and out.dtype.itemsize in _UNSIGNED:
            # Numpy moves types it does not know (bfloat16) one by one; as integers they go faster.
            unsigned = _UNSIGNED[out.dtype.itemsize]
            out, view = out.view(unsigned), view.view(unsigned)
        if not out.ndim or not out.size:
            out[...] = view
            return release()
        axis = int(np.argmax(np.abs(view.strides)))
        step = max(1, BLOCK_BYTES // max(abs(view.strides[axis]), 1))
        for begin in range(0, view.shape[axis], step):
            block = (slice(None),) * axis + (slice(begin, begin + step),)
            np.copyto(out[block], view[block])
            release()


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        count, bytes: tensors used and their size as stored.
        sha256: over the sorted lines "name dtype shape sha256-of-the-data" of the tensors used: the same
            weights give the same value however they were sharded.
        ignored: reason -> names of the tensors left out for it.
    """

    count: int
    bytes: int
    sha256: str
    ignored: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.count} tensors, {self.bytes:,} bytes, sha256 {self.sha256}"]
        lines += [f"  ignored: {len(names)} tensors ({reason})" for reason, names in self.ignored.items()]
        return "\n".join(lines)


def make_report(
    names: Iterable[str],
    tensors: Mapping[str, Any],
    ignored: Mapping[str, tuple[str, ...]],
    label: str = "",
) -> LoadReport:
    """Reads every named tensor once, in pieces, and hashes it; with a label it shows its progress."""
    names = sorted(names)

    def line(name: str) -> str:
        tensor, digest = tensors[name], hashlib.sha256()
        for piece in _pieces(tensor):
            digest.update(piece)
        return f"{name} {np.dtype(tensor.dtype)} {list(tensor.shape)} {digest.hexdigest()}"

    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        lines = pool.map(line, names)
        lines = list(track(lines, len(names), label, "tensors") if label else lines)
    nbytes = sum(int(tensors[name].nbytes) for name in names)
    fingerprint = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return LoadReport(len(names), nbytes, fingerprint, dict(ignored))


def _pieces(tensor: Any) -> Iterator[Any]:
    if isinstance(tensor, StoredTensor):
        yield from tensor.pieces()
    else:
        yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
