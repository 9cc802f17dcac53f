"""XLA's text: loops count as often as they run, collectives once where they start, bytes as the shapes say.

scan.hlo is in the form in which libtpu writes a program, cut down to what the parsers read: a scan over four layers that
gathers a slice of a stacked weight (no note of its trip count, the collective asynchronous), in it a loop whose count XLA does
note, and beside it a conditional.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from avlm_jax.aot import hlo
from avlm_jax.aot.traffic import hbm_bytes, moved

SCAN = Path(__file__).with_name("scan.hlo").read_text()
BODY = "wide.region_15.21_spmd.sunk"


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.parse(SCAN)


def test_loops_count_as_often_as_they_run(module: hlo.Module) -> None:
    assert module.entry == "main.9_spmd"
    assert module.runs == {
        "main.9_spmd": 1.0,
        BODY: 4.0,  # By its counter: from 0 in steps of 1 to 4.
        "region_2.2_spmd": 12.0,  # By XLA's note, 3 times in each of these.
        "branch_0.1_spmd": 1.0,
        "branch_1.1_spmd": 1.0,
    }
    assert module.unknown_loops == []


def test_a_loop_that_is_no_counter_is_named() -> None:
    text = SCAN.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    module = hlo.parse(text)
    assert module.unknown_loops == ["while.2"]
    assert module.runs["region_2.2_spmd"] == 4.0


@pytest.mark.parametrize(("start", "step", "count"), [(0, 1, 4), (1, 1, 3), (0, 3, 2), (7, 1, 0)])
def test_counters(start: int, step: int, count: int) -> None:
    text = SCAN.replace(
        "%constant.70 = s32[]{:T(128)} constant(0)", f"%constant.70 = s32[] constant({start})"
    )
    text = text.replace("%constant.40 = s32[]{:T(128)} constant(1)", f"%constant.40 = s32[] constant({step})")
    module = hlo.parse(text)
    assert (
        module.trip_count(module.computations["main.9_spmd"]["while.1"], module.computations["main.9_spmd"])
        == count
    )


def test_collectives(module: hlo.Module) -> None:
    every = hlo.collectives(module, 8)
    assert len(every) == 6
    found = {item.kind: item for item in every if item.name not in ("all-gather.91", "reduce-scatter.2")}
    gather = found["all-gather"]
    assert (gather.times, gather.payload, gather.group_size) == (4.0, 512 * 32 * 2, 8)
    assert gather.wire_bytes == 512 * 32 * 2 * 7 / 8
    reduce = found["all-reduce"]
    assert (reduce.times, reduce.payload) == (12.0, 32)
    assert reduce.groups == ((0, 4), (1, 5), (2, 6), (3, 7))  # [4,2]<=[2,4]T(1,0)
    assert reduce.wire_bytes == 2 * 32 / 2
    scatter = found["reduce-scatter"]
    assert (scatter.payload, scatter.groups) == (16, ((0, 1, 2, 3), (4, 5, 6, 7)))
    permute = found["collective-permute"]
    assert (permute.groups, permute.wire_bytes) == (((0, 1), (1, 0)), 32.0)


@pytest.mark.parametrize(
    ("transfer", "kind", "payload", "wire"),
    [
        # libtpu's own lines: what `send` holds is a device's part; of a gather it is 1 of 2 that come back.
        ("ALL_REDUCE", "all-reduce", 4096, 4096),
        ("ALL_GATHER", "all-gather", 8192, 4096),
        ("REDUCE_SCATTER", "reduce-scatter", 4096, 2048),
        ("ALL_TO_ALL", "all-to-all", 4096, 2048),
        ("ONE_TO_ONE", "collective-permute", 4096, 4096),
    ],
)
def test_what_goes_from_slice_to_slice(transfer: str, kind: str, payload: int, wire: int) -> None:
    (found,) = hlo.collectives(hlo.parse(between_slices(transfer)), 8, slices=2)
    assert (found.kind, found.payload, found.wire_bytes, found.times) == (kind, payload, wire, 1.0)
    assert found.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_an_unknown_transfer_between_slices_is_an_error() -> None:
    with pytest.raises(
        hlo.HloError, match=r"send\.1: a transfer between slices of an unknown kind.*ALL_KINDS"
    ):
        hlo.collectives(hlo.parse(between_slices("ALL_KINDS")), 8, slices=2)


def between_slices(transfer: str) -> str:
    told = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{transfer}"}}'
    )
    kind = "(f32[8,128]{1,0:T(8,128)}, u32[], token[])"
    return f"""ENTRY %main (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = {kind} send(%p, %after-all.1), channel_id=2, {told}
  %recv.1 = {kind} recv(%after-all.1), channel_id=1, {told}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, {told}
  %recv-done.1 = (f32[8,128], token[]) recv-done(%recv.1), channel_id=1, {told}
  ROOT %got = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%recv-done.1), index=0
}}
"""


def test_an_asynchronous_collective_counts_where_it_begins(module: hlo.Module) -> None:
    """It is shown three times a layer by the kernels that advance it and once by the one that begins it."""
    (found,) = [item for item in hlo.collectives(module, 8) if item.payload == 64 * 8 * 2]
    assert (found.name, found.times) == ("all-gather.91", 4.0)


def test_no_groups_means_all_devices(module: hlo.Module) -> None:
    (found,) = [item for item in hlo.collectives(module, 8) if item.name == "reduce-scatter.2"]
    assert (found.groups, found.payload) == ((tuple(range(8)),), 8 * 4)


def test_kernels_of_a_loop_count_as_often(module: hlo.Module) -> None:
    assert hlo.count_kernels(module) == 4


def test_a_slice_of_a_stack_counts_as_the_slice(module: hlo.Module) -> None:
    body = module.computations[BODY]
    # Read from HBM and written to the core's own memory; the counter is read as well.
    assert moved(body["fusion.1"], body, module) == 64 * 32 * 2 + 4
    # The row is read and written in place.
    assert moved(body["fusion.2"], body, module) == 8 * 4 + 4 + 8 * 4
    assert moved(body["all-gather-start.1"], body, module) == 512 * 32 * 2
    assert moved(body["all-gather-done.1"], body, module) == 0
    assert moved(body["custom-call.7"], body, module) == 512 * 32 * 2 + 32


def test_a_prefetched_slice_counts_as_the_slice() -> None:
    """libtpu's lines: half of an array goes to the core's own memory, the other half elsewhere in HBM."""
    module = hlo.parse(
        """ENTRY %main (p: s8[4096], q: s32[]) -> s8[2048] {
  %p = s8[4096]{0:T(1024)(128)(4,1)} parameter(0)
  %q = s32[]{:T(128)} parameter(1)
  %slice-start = ((s8[4096]{0:T(1024)}), s8[2048]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2048]}
  %slice-done = s8[2048]{0:T(1024)S(1)} slice-done(%slice-start)
  %dynamic-slice-start = ((s8[4096]{0:T(1024)}, s32[]{:T(128)}), s8[2048]{0:T(1024)}, s32[]{:S(2)}) dynamic-slice-start(%p, %q)
  ROOT %dynamic-slice-done = s8[2048]{0:T(1024)} dynamic-slice-done(%dynamic-slice-start)
}
"""
    )
    main = module.computations["main"]
    assert moved(main["slice-start"], main, module) == 2048
    assert moved(main["dynamic-slice-start"], main, module) == 2 * 2048
    assert moved(main["slice-done"], main, module) == moved(main["dynamic-slice-done"], main, module) == 0


def test_traffic_counts_loops_as_often_as_they_run(module: hlo.Module) -> None:
    once = {name: sum(moved(i, c, module) for i in c.values()) for name, c in module.computations.items()}
    expected = sum(times * once[name] for name, times in module.runs.items())
    assert hbm_bytes(module) == expected > 4 * once[BODY]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (hlo.Shape("bf16", (4, 3)), 24),
        (hlo.Shape("pred", (5,)), 5),
        (hlo.Shape("s4", (3,)), 2),
        (hlo.Shape("f32", ()), 4),
        (hlo.Shape("token", ()), 0),
    ],
)
def test_bytes(shape: hlo.Shape, size: int) -> None:
    assert shape.bytes == size


def test_what_it_cannot_read_is_said() -> None:
    with pytest.raises(hlo.HloError, match="no ENTRY computation"):
        hlo.parse("module {}")
    with pytest.raises(hlo.HloError, match="'q7' is unknown"):
        _ = hlo.Shape("q7", (1,)).bytes
