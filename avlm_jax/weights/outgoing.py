"""A backbone's parameters on their way from its files into an export: merged, rounded and written one tensor at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from avlm_jax.lora import Updates, merge_kernel
from avlm_jax.weights.stored import StoredLeaf
from avlm_jax.weights.table import WeightError
from input_pipeline.progress import track

Merge = tuple[Updates, float]  # Updates that are added together, and the scale of each.


class Passage:
    """Gives the pages of the tensor before back to the system, and counts."""

    def __init__(self, label: str, total: int) -> None:
        self._ticks = track(range(total), total, label, "tensors")
        self._behind: Any = None

    def read(self, leaf: StoredLeaf, layer: int) -> np.ndarray:
        """One layer (0 if not stacked), a view of the file where the layout allows."""
        tensor = leaf.tensors[leaf.names[layer]]
        self._release()
        self._behind = tensor
        next(self._ticks, None)
        return leaf.transform.ours(np.asarray(tensor))[leaf.part]

    def close(self) -> None:
        self._release()
        for _ in self._ticks:
            pass

    def _release(self) -> None:
        if hasattr(self._behind, "release"):
            self._behind.release()


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A backbone's parameter on its way from one file to another; read by layer when somebody looks.

    Attributes:
        path: for messages.
        stored: as the backbone's folder has it.
        learnt: what replaces it, or None.
        merges: added one after the other, each rounded to the kernel's own dtype: retired adapters first, since a
            fresh adapter was trained on their rounded sum.
        passage: see there.
    """

    path: str
    stored: StoredLeaf
    learnt: np.ndarray | None
    merges: tuple[Merge, ...]
    passage: Passage

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def __getitem__(self, layer: int) -> np.ndarray:
        if not self.stored.stacked:
            raise TypeError("only stacked parameters have layers")
        return self._make(layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.stored.stacked:
            raise TypeError(f"{self.path} is read by layer, so that only one is in memory")
        return self._make(None)

    def _make(self, layer: int | None) -> np.ndarray:
        kernel = self.passage.read(self.stored, layer or 0)
        if self.learnt is not None:
            kernel = self.learnt if layer is None else self.learnt[layer]
        if self.learnt is None and not self.merges:
            return kernel
        with np.errstate(over="ignore"):  # Told below, with a name.
            for updates, scale in self.merges:
                kernel = merge_kernel(kernel, [(a[layer], b[layer]) for a, b in updates], scale)
            kernel = kernel.astype(self.dtype)
        if not np.isfinite(kernel).all():
            where = self.path if layer is None else f"{self.path}, layer {layer}"
            raise WeightError("export", [f"{where}: what was learnt does not fit into {self.dtype}"])
        return kernel
