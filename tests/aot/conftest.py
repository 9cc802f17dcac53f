"""Fixtures of tests that compile for TPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest

from avlm_jax.aot.topologies import describe_topology, parse_slice


@pytest.fixture(scope="session")
def compile_for_v5e() -> Callable[..., Any]:
    """compile(function, *arguments) for one v5e chip; arguments are (shape, dtype)."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; `make aot` makes an environment that has it")
    device = describe_topology(parse_slice("v5e:1x1")).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def compile_(function: Callable[..., Any], *arguments: tuple[tuple[int, ...], Any]) -> Any:
        abstract = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arguments)
        return jax.jit(function).lower(*abstract).compile()

    return compile_
