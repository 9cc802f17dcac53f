"""One training step of every stage on meshes and in several processes agrees with one device's, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.multidevice.one_step import LEARNING_RATE, SOURCES, prepare
from tests.process_group import Group

pytestmark = pytest.mark.multidevice  # Some twenty programs are compiled, three minutes on two cores.

PROGRAM = "import runpy; runpy.run_module('tests.multidevice.one_step', run_name='__main__', alter_sys=True)"
DEADLINE = 1800.0  # Seconds; a cold compilation cache on a busy machine.
ONE_DEVICE = "1x1x1:1"
MESHES = ("8x1x1", "2x4x1", "4x2x1", "2x2x2")
# Stages 2a and 2b train the same parameters and share their programs, so it is three programs a mesh. Micro-batches are the
# same for all stages.
CASES = (*(f"{stage}:{mesh}:1" for mesh in MESHES for stage in SOURCES), "2b:2x2x2:2")
# Processes -> devices of each, and what they run. Four with a device each divide the tensor groups of 1x2x2 among them: two
# and two hold the same rows.
PROCESSES = {
    2: (4, tuple(f"{stage}:2x4x1:1" for stage in SOURCES) + ("2b:2x4x1:2",)),
    4: (1, ("1b:1x2x2:1", "2b:1x2x2:1", "2b:2x2x1:2")),
}
# Devices and micro-batches add up partial sums in another order, so the last digits of gradients differ. Adam's first update
# is at most the learning rate. Seen in stage 1a: parameters 1.2e-7, moments 5e-9, loss and norm 1.2e-7.
PARAMETERS = 2e-3 * LEARNING_RATE
# A tenth of the gradient, whose norm is clipped to 1. Some gradients are zero but for rounding, a key's bias for one, so
# nothing is measured relative to each.
MOMENTS = 1e-6
METRICS = {"loss": 1e-5, "grad_norm": 2e-5, "targets": 0.0, "skipped": 0.0}  # Relative.

Results = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("one_step"))


def run(folder: Path, cases: list[str], processes: int, devices: int) -> Results:
    code = dict.fromkeys(range(processes), PROGRAM)
    with Group(
        folder / f"logs{processes}", [str(folder), *cases], processes, code=code, devices=devices
    ) as group:
        codes = group.wait(DEADLINE)
        assert set(codes.values()) == {0}, "\n".join(map(group.text, group.logs))
    return np.load(folder / f"{processes}.npz")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Results:
    cases = [*(f"{stage}:{ONE_DEVICE}" for stage in SOURCES), *CASES]
    return run(folder, cases, processes=1, devices=8)


def check_alike(found: Results, case: str, reference: Results) -> None:
    """What `case` ended with against one device with one micro-batch."""
    expected_case = f"{case.partition(':')[0]}:{ONE_DEVICE}"
    expected = {
        name.removeprefix(f"{expected_case}/"): reference[name]
        for name in reference
        if name.startswith(f"{expected_case}/")
    }
    assert expected and {name for name in found if name.startswith(f"{case}/")} == {
        f"{case}/{name}" for name in expected
    }
    for name, value in expected.items():
        if name.startswith("metric/"):
            rtol = METRICS[name.removeprefix("metric/")]
            np.testing.assert_allclose(found[f"{case}/{name}"], value, rtol=rtol, err_msg=name)
        else:
            atol = PARAMETERS if name.startswith("parameter/") else MOMENTS
            np.testing.assert_allclose(found[f"{case}/{name}"], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_does_what_one_device_does(case: str, one_process: Results) -> None:
    check_alike(one_process, case, one_process)


@pytest.mark.parametrize("stage", SOURCES)
def test_the_step_that_is_compared_moves_parameters(stage: str, one_process: Results) -> None:
    case = f"{stage}:{ONE_DEVICE}"
    moments = [one_process[name] for name in one_process if name.startswith(f"{case}/moment/")]
    # (1 - b1) of a gradient that is clipped to 1; the tolerance is far below what is compared.
    norm = np.sqrt(sum(np.square(moment.astype(np.float64)).sum() for moment in moments))
    assert one_process[f"{case}/metric/skipped"] == 0 and one_process[f"{case}/metric/targets"] > 0
    np.testing.assert_allclose(norm, 0.1 * min(one_process[f"{case}/metric/grad_norm"], 1), rtol=1e-4)
    assert max(np.abs(moment).max() for moment in moments) > 100 * MOMENTS


@pytest.mark.parametrize(
    "processes", [pytest.param(n, marks=[pytest.mark.slow] if n > 2 else []) for n in PROCESSES]
)
def test_processes_that_load_their_own_rows_do_what_one_does(
    processes: int, folder: Path, one_process: Results
) -> None:
    devices, cases = PROCESSES[processes]
    found = run(folder, list(cases), processes, devices)
    for case in cases:
        check_alike(found, case, one_process)
