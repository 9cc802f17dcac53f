"""What the parity tests share: random weights for the peers, and the measure of an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter away from its initial value: biases and norms start at constants that hide mistakes.

    Norm weights are spread around 1; the rest has variance 1 / fan in, so that activations keep their scale.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(0.2).add_(1)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.div_(fan_in**0.5)


def relative_error(ours: Any, theirs: Any, where: Any = None) -> float:
    """Largest difference, relative to the largest magnitude of theirs; of the entries `where` alone, if given.

    A not-a-number counts as an infinite error.
    """
    ours = np.asarray(ours, np.float32)
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[np.asarray(where)], theirs[np.asarray(where)]
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return error if np.isfinite(error) else float("inf")


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The two modules hold the same tensors, to the bit."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
