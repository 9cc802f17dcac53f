"""Which TPU slice a name means, and libtpu's description of it, for which XLA compiles without a TPU.

A slice is named by its shape ("v5e:4x4", "v5p:2x2x1") or as it is rented ("v5litepod-16", "v6e-8", "v5p-8"). The number in a
rented name counts chips for v5e and v6e, cores (two a chip) for v4, v5p and tpu7x.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from avlm_jax.chips import Chip, chip_named
from input_pipeline.errors import UserError

INSTALL = "pip install -e '.[tpu]'"

# Read by libtpu and JAX when they are first loaded. Without a TPU, libtpu would otherwise ask a metadata server that is not
# there, and refuse to be loaded by two processes at a time.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Of this machine, were it a TPU host; without it libtpu complains.
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Shapes in which a number of chips is rented (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Configurations").
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CUBES = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
}
CORES_COUNTED = ("v4", "v5p", "tpu7x")  # A rented name counts cores, two to a chip.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "trillium": "v6e", "ironwood": "tpu7x"}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")

EXAMPLES = "v5e:4x4, v5litepod-256, v6e-8, v5p-8, v4:2x2x1, tpu7x:2x2x1"


class TopologyError(UserError, ValueError):
    """A slice that does not exist, or libtpu is not installed."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """`count` equal slices of one kind of TPU, joined by the data-centre network if there are several.

    Attributes:
        chip: its kind.
        shape: chips along each dimension of the torus or mesh.
        count: slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.count

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def name(self) -> str:
        """ "v5e:4x4", or "2 x v5e:4x4"."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.count == 1 else f"{self.count} x {one}"

    @property
    def rented(self) -> str:
        """As Cloud TPU calls one of the slices: "v5litepod-16", "v5p-8"."""
        number = math.prod(self.shape) * (2 if self.chip.name in CORES_COUNTED else 1)
        return f"{'v5litepod' if self.chip.name == 'v5e' else self.chip.name}-{number}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions close to a ring: of v5e and v6e those of 16 chips, of the others all if each is a multiple of 4.

        Source: docs.cloud.google.com/tpu/docs/v4 "3D mesh and 3D torus", and .../v5e "2D torus" of the full pod.
        """
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse_slice(name: str, count: int = 1) -> Slice:
    """The slice(s) a name means.

    Raises:
        TopologyError: no such kind, shape or number; the message names what there is.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?::(\d+(?:x\d+){1,2})|-(\d+))", name.strip().lower())
    if count < 1:
        raise TopologyError(f"--slices is {count}; it must be at least 1")
    if match is None:
        raise TopologyError(f"cannot read the topology {name!r}; write it as one of {EXAMPLES}")
    kind, dims, number = match.groups()
    kind = ALIASES.get(kind, kind)
    if kind not in TPUS:
        near = difflib.get_close_matches(kind, [*TPUS, *ALIASES], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TopologyError(f"topology {name!r}: unknown TPU {kind!r}{hint} (known: {', '.join(TPUS)})")
    chip = chip_named(kind)
    assert chip is not None
    shapes = FLAT if kind in ("v5e", "v6e") else CUBES
    if number is not None:
        chips = int(number) // 2 if kind in CORES_COUNTED else int(number)
        if chips not in shapes or (kind in CORES_COUNTED and int(number) % 2):
            factor = 2 if kind in CORES_COUNTED else 1
            known = ", ".join(f"{kind}-{size * factor}" for size in shapes)
            what = "cores, two a chip" if factor == 2 else "chips"
            raise TopologyError(f"there is no slice {name!r} (the number counts {what}); known: {known}")
        return Slice(chip, shapes[chips], count)
    shape = tuple(map(int, dims.split("x")))
    wanted = len(next(iter(shapes.values())))
    if len(shape) != wanted:
        example = "x".join(map(str, shapes[8]))
        raise TopologyError(f"topology {name!r}: {kind} has {wanted} dimensions, e.g. {kind}:{example}")
    if min(shape) < 1:
        raise TopologyError(f"topology {name!r} has a dimension of 0 chips")
    return Slice(chip, shape, count)


def prepare_environment() -> None:
    """Sets what JAX and libtpu read when they are loaded; to be called before `import jax`.

    Raises:
        TopologyError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"libtpu, XLA's compiler for TPUs, is not installed (it runs on any CPU machine, Linux x86-64): {INSTALL}"
        )
    os.environ.update(ENVIRONMENT)


def describe_topology(slice_: Slice) -> Any:
    """libtpu's description, `jax.experimental.topologies.TopologyDescription`, whose `devices` XLA compiles for.

    Raises:
        TopologyError: libtpu is not installed, or does not know the shape.
    """
    prepare_environment()
    from jax.experimental import topologies  # Not at the top: `prepare_environment` comes before JAX.

    shape, kind = slice_.shape, slice_.chip.name
    options: dict[str, Any] = {"num_slices": slice_.count} if slice_.count > 1 else {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1,) * 3
    elif len(shape) == 3:
        options["chips_per_host_bounds"] = (2, 2, 1)
    if kind in ("v4", "v5p"):  # Both cores of a chip as one device, as on real machines.
        options |= {"chip_config_name": "megacore", "wrap": slice_.wraps}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, shape))}", **options
        )
    except Exception as error:  # libtpu raises JaxRuntimeError and ValueError alike.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TopologyError(f"libtpu does not know the slice {slice_.name}: {first}") from error
