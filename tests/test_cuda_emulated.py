"""The CUDA C++ kernels, compiled for the host and run on an emulator (``tests/emulator``): for machines without a GPU.

What is tested here is that the kernels compute the right thing, whatever the order of blocks, threads and copies. What
only a GPU can tell (that they compile for one, graphs, streams, speed) is in ``test_gpu_store``, ``test_gpu_decode``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from cuda_cases import BF16, F16, F32, attend, check, compare, pick, queries, same, scheduled, stored, truth
from emulator import BLOCKS_BACKWARDS, LATE_COPIES, SEED, THREADS_BACKWARDS, EmulatedDevice, emulated_device
from emulator.device import STRUCTURES
from emulator.ptx import UnknownInstructionError, translate
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import empty_cache, fill, make_cache, noise

from kvfold import ops
from kvfold.errors import ShapeError
from kvfold.layout import PageLayout
from kvfold.ops.cuda import decode, expand, prefill, references, runtime, store
from kvfold.ops.cuda import schedule as dealing
from kvfold.ops.options import AttentionOptions

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """A GPU of three multiprocessors: so few that small inputs are cut into stretches, and merged across blocks."""
    with emulated_device(multiprocessors=3) as device, ops.backend("cuda"):
        yield device


@pytest.fixture
def one_multiprocessor() -> Iterator[EmulatedDevice]:
    """For many steps a warp, in one piece of an item."""
    with emulated_device(multiprocessors=1, largest_piece=4096) as device, ops.backend("cuda"):
        yield device


SCHEDULES = (
    BLOCKS_BACKWARDS, THREADS_BACKWARDS, LATE_COPIES, BLOCKS_BACKWARDS | THREADS_BACKWARDS | LATE_COPIES,
    SEED, 2 * SEED | BLOCKS_BACKWARDS, 3 * SEED | THREADS_BACKWARDS,
)  # fmt: skip


# --- the emulator -----------------------------------------------------------------------------------------------------

FAULTS = {
    "lanes that part": ("if (threadIdx.x == 3) __syncwarp(); else __shfl_sync(~0u, 1, 0);", "different operations"),
    "a barrier that half of a warp reaches": ("if (threadIdx.x < 16) __syncwarp();", "wait for ever"),
    "a mask of some lanes": ("__shfl_sync(0xFFu, 1, 0);", "whole warps only"),
    "a write past shared memory": ("if (threadIdx.x == 0) shared[64] = 1;", "past the dynamic shared memory"),
    "an mbarrier without init": ("wait(address(shared), 0);", "before it is initialised"),
    "a copy that nobody expects": ("init(address(shared)); __syncwarp(); wait(address(shared), 0);", "wait for ever"),
    "a copy that nobody waits for": (
        "if (threadIdx.x == 0) { init(address(shared)); copy(address(shared + 16), (u64)x, 16, address(shared)); }",
        "under way",
    ),
    "an mbarrier that is overwritten": (
        "if (threadIdx.x == 0) init(address(shared)), shared[7] = 0;",
        "not been invalidated",
    ),
    "a copy that is not aligned": (
        "if (threadIdx.x == 0) { init(address(shared)); copy(address(shared + 8), (u64)x, 16, address(shared)); }",
        "not aligned",
    ),
}
FAULTY = """
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void init(u32 bar) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory"); }
__device__ void copy(u32 to, u64 from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ void wait(u32 bar, u32 parity) {
    asm volatile("{\\n.reg .pred P;\\nWAIT:\\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\\n"
                 "@P bra DONE;\\nbra WAIT;\\nDONE:\\n}" ::"r"(bar), "r"(parity) : "memory");
}
extern "C" __global__ void faulty(u32* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    STATEMENTS
}
"""


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_reports(
    name: str, device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements, message = FAULTS[name]
    (tmp_path / "faulty.cu").write_text(FAULTY.replace("STATEMENTS", statements))
    monkeypatch.setattr(runtime, "FOLDER", tmp_path)
    monkeypatch.setitem(STRUCTURES, "faulty.cu", {})
    kernel = device.kernel("faulty.cu", "faulty", torch.device("cpu"))
    device.schedule = LATE_COPIES
    with pytest.raises(AssertionError, match=message):
        kernel.launch((1, 1, 1), 32, 64, torch.zeros(8))


def test_asm_statements_are_translated() -> None:
    text = 'a; asm volatile("{.reg .pred P;\\nL: mul.rn.sat.f32 %0, %1, 2;}" : "=f"(x[0]) : "f"(f(y)) : "memory"); b;'
    with pytest.raises(UnknownInstructionError, match=r"some\.cu:1.*no L:"):
        translate(text, "some.cu")
    assert "ptx::mul_rn_sat_f32((x[0]), (f(y)), 2);" in translate(text.replace("L: mul", "L:\\nmul"), "some.cu")
    with pytest.raises(UnknownInstructionError, match=r"some\.cu:2.*sin\.approx\.f32"):
        translate('\nasm("sin.approx.f32 %0, %1;" : "=f"(x) : "f"(y));', "some.cu")


# --- structures -------------------------------------------------------------------------------------------------------


def test_python_and_cuda_agree_on_structures(device: EmulatedDevice) -> None:
    """Sizes of the parameters are checked at every launch; here each member's place."""
    layout, trellis = PageLayout.of("k4v4", 128), PageLayout.of("k3tv3t", 128)
    inputs, none = (BF16, True), torch.device("cpu")
    kernels = [
        device.kernel("store.cu", "store", none, **store._defines(layout, inputs, inputs)),
        device.kernel("store_trellis.cu", "store_trellis", none, **store._defines(trellis, inputs, inputs)),
        device.kernel("references.cu", "open_pages", none, **references._defines(layout, *inputs)),
        device.kernel("expand.cu", "expand", none, **expand._defines(layout, F16, False)),
        prefill._merge_kernel(False, True, BF16, 0)[0],
        decode._kernel(layout, 0, 1, BF16, False, False, False)[0],
        device.kernel("schedule.cu", "deal_out", none, WARPS=16),
    ]
    for kernel in kernels:
        for name, (structure, _) in STRUCTURES[kernel.file].items():  # type: ignore[attr-defined]
            offsets = [getattr(structure, field[0]).offset for field in structure._fields_]
            assert kernel.layout(name) == [ctypes.sizeof(structure), *offsets], name  # type: ignore[attr-defined]


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "page_size", "group", "dtype"),
    [
        ("k2v2", 16, 4, BF16), ("k2v3", 32, 4, F16), ("k2v4", 64, 4, F32),
        ("k3v2", 32, 4, F32), ("k3v3", 64, 4, BF16), ("k3v4", 16, 4, F16),
        ("k4v2", 64, 4, F16), ("k4v3", 16, 4, F32), ("k4v4", 32, 4, BF16),
        ("k2v3", 16, 8, BF16), ("k3v2", 64, 8, BF16), ("k4v4", 32, 8, F32),
        ("k4v4+mean", 64, 4, BF16), ("k3v2+mean", 32, 4, F32), ("k2v3+mean", 16, 4, F16),
        ("k2v4+mean", 64, 8, F32), ("k3v3+mean", 32, 8, BF16), ("k4v4+mean", 16, 8, F16),
        ("k2tv2t", 64, 4, BF16), ("k3tv3t", 32, 4, F16), ("k4tv4t", 16, 4, F32), ("k2tv3", 16, 4, F16),
        ("k3v4t", 64, 4, BF16), ("k4tv2", 32, 4, F32), ("k3tv2t+mean", 16, 4, BF16), ("k4tv4t+mean", 64, 4, F32),
        ("k2tv4t", 32, 8, F32), ("k4tv3t", 64, 8, BF16), ("k3tv2t+mean", 32, 8, F32),
    ],
)  # fmt: skip
def test_formats(spec: str, page_size: int, group: int, dtype: torch.dtype, device: EmulatedDevice) -> None:
    cache = stored((0, 1, 15, 16, 31, 32, 33, 64, 48, 300), spec, page_size, heads=2)
    check(cache, queries(cache, group, dtype=dtype))


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_groups_and_query_tokens(group: int, num_queries: int, device: EmulatedDevice) -> None:
    cache = stored((0, 1, 5, 32, 33, 64, 300))
    check(cache, queries(cache, group, num_queries))


@pytest.mark.parametrize(("spec", "group", "num_queries"), [("k2tv4t", 1, 8), ("k4tv2t", 4, 2), ("k3tv3t", 8, 5)])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_groups_and_query_tokens_of_trellises(
    page_size: int, spec: str, group: int, num_queries: int, device: EmulatedDevice
) -> None:
    cache = stored((0, 1, 5, 32, 33, 64, 300), spec, page_size)
    check(cache, queries(cache, group, num_queries))
    check(cache, queries(cache, group, num_queries), batch_invariant=True, window=70)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (33, 3), (70, 2)])
def test_batches(batch: int, heads: int, device: EmulatedDevice) -> None:
    """More sequences than a warp has lanes, and more items than there are warps: several whole ones a warp."""
    cache = stored([0 if b % 7 == 3 else 1 + b * 7919 % 100 for b in range(batch)], heads=heads)
    check(cache, queries(cache))


def test_a_warp_copies_several_short_items_before_it_begins(one_multiprocessor: EmulatedDevice) -> None:
    """Three items of one step and one of two, again and again: the next one must be known to all lanes."""
    cache = stored((1, 1, 1, 64) * 16, heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize(("length", "window", "unseen"), [(40, None, [3, 4]), (100, 10, [0, 1, 2, 3, 4, 7])], ids=str)
def test_entries_of_unseen_pages_may_be_anything(
    length: int, window: int | None, unseen: list[int], device: EmulatedDevice
) -> None:
    """Two pages of 16 are a step, and one of them may be before the window or behind the end."""
    cache = make_cache(PageLayout.of("k4v4", 128, page_size=16), (length,), heads=1)
    table = torch.cat([cache.table, cache.table[:, :1]], dim=1).int()
    table[:, unseen] = -1
    q = queries(cache)
    got = decode.decode_attention(
        q, cache.pages, table, cache.lengths, cache.layout, AttentionOptions(128**-0.5, window=window)
    )
    compare(got, truth(cache, q, window=window) if window else truth(cache, q))


def test_pages_at_odd_addresses_are_refused(device: EmulatedDevice) -> None:
    """The copies that read them need 16 bytes; queries anywhere are copied."""
    cache, q = stored((40,)), noise(1, 1, 8, 128).to(BF16)
    odd = torch.empty(cache.pages.numel() + 1, dtype=torch.uint8)[1:].view(cache.pages.shape).copy_(cache.pages)
    with pytest.raises(ShapeError, match="pages have to begin at a multiple of 16 bytes"):
        attend(replace(cache, pages=odd), q)
    k = v = noise(80, 2, 128).to(BF16)
    with pytest.raises(ShapeError, match="pages have to begin at a multiple of 16 bytes"):
        ops.prefill_attention(
            noise(80, 8, 128).to(BF16), odd, cache.table, cache.lengths, torch.tensor([0, 80]), cache.layout, scale=0.1,
            k=k, v=v,
        )  # fmt: skip
    odd_q = torch.empty(q.numel() + 1, dtype=BF16)[1:].view(q.shape).copy_(q)
    assert same(attend(cache, odd_q), attend(cache, q))


@pytest.mark.parametrize("lengths", [(6144, 6144), (3000, 0, 9000), (400, 7000)], ids=str)
def test_long_pieces(lengths: tuple[int, ...], one_multiprocessor: EmulatedDevice) -> None:
    """A dozen steps and more in a piece; in the first two batches every warp gets one."""
    cache = stored(lengths, heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 1), (1, 0, 0), (0,) * 33 + (40,)], ids=str)
def test_batches_of_next_to_nothing(lengths: tuple[int, ...], device: EmulatedDevice) -> None:
    cache = stored(lengths)
    check(cache, queries(cache))
    check(cache, queries(cache), batch_invariant=True)


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ((138,) * 3, 2), ((20,) * 4, 2), ((70, 32, 150, 290), 2), ((530,), 2), ((96, 0, 352, 65), 2), ((1, 0, 600), 1),
        ((20, 20, 300), 1), ((20,) * 5 + (300,), 3), ((0,) * 30 + (3, 0, 40, 70), 2),
    ],
    ids=str,
)  # fmt: skip
def test_warps_to_spare(lengths: tuple[int, ...], heads: int, group: int) -> None:
    """Items of a step and of many, each in one block, with gaps behind them whose warps help at the end."""
    with emulated_device(multiprocessors=12) as device, ops.backend("cuda"):
        cache = stored(lengths, heads=heads)
        q = queries(cache, group)
        want, made = check(cache, q), scheduled(cache, q)
        for schedule in SCHEDULES[3:5]:
            device.schedule = schedule
            assert same(attend(cache, q, inputs_ready=True, schedule=made), want)


def test_one_long_sequence_among_short_ones(device: EmulatedDevice) -> None:
    """All blocks have parts of the long one's items, and the last to come merges them."""
    cache = stored((3, 5000, 0, 65), "k3v4", heads=1)
    check(cache, queries(cache))


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("invariant", [False, True])
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(
    invariant: bool, group: int, device: EmulatedDevice
) -> None:
    """Nor does what scratch holds."""
    cache = stored((900, 1, 0, 64, 333, 40), page_size=16)
    q = queries(cache, group)
    want = check(cache, q, batch_invariant=invariant)
    for schedule in SCHEDULES:
        device.schedule = schedule
        for floats in decode._scratch(None).floats.values():
            floats.fill_(torch.nan)
        assert same(attend(cache, q, batch_invariant=invariant), want), schedule
        assert not decode._scratch(None).counters.any()


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("invariant", [False, True])
def test_inputs_that_are_ready_change_no_bit(invariant: bool, page_size: int, device: EmulatedDevice) -> None:
    cache = stored((900, 1, 0, 64, 333, 40), page_size=page_size)
    q = queries(cache)
    want = attend(cache, q, batch_invariant=invariant)
    ready = {"batch_invariant": invariant, "inputs_ready": True}
    assert same(attend(cache, q, **ready), want)  # but for the schedule, where there is none
    ready["schedule"] = scheduled(cache, q)
    device.launches.clear()
    assert same(attend(cache, q, **ready), want)
    assert [name for name, _ in device.launches] == ["decode"]
    # these are copied first, by a kernel that is ahead then
    strided = q.transpose(1, 3).contiguous().transpose(1, 3)
    assert same(attend(cache, strided, **ready), want)
    given = torch.full_like(q, torch.nan)
    got = attend(cache, q, batch_invariant=invariant, out=given)
    assert got[0] is given
    assert same(got, want)


@pytest.mark.parametrize("spec", ["k4v4", "k4v4+mean", "k2v2"])
@pytest.mark.parametrize("largest_piece", [1, 4096])
@pytest.mark.parametrize("page_size", [16, 64])
def test_rings_that_other_warps_fill(page_size: int, largest_piece: int, spec: str) -> None:
    """Many steps a warp, of one item or several: rings of those that rotate queries are filled by their neighbours."""
    with emulated_device(multiprocessors=2, largest_piece=largest_piece) as device, ops.backend("cuda"):
        cache = stored((3000, 700, 0, 2900), spec, page_size, heads=1)
        q = queries(cache)
        want, made = check(cache, q), scheduled(cache, q)
        for schedule in SCHEDULES:
            device.schedule = schedule
            assert same(attend(cache, q, inputs_ready=True, schedule=made), want), schedule


@settings(max_examples=60, deadline=None)
@given(
    multiprocessors=st.sampled_from([3, 12, 132]),
    lengths=st.one_of(
        st.lists(st.integers(0, 5000), min_size=1, max_size=200),
        st.builds(lambda n, length: [length] * n, st.integers(1, 130), st.integers(1, 40_000)),
    ),
    heads=st.sampled_from([1, 2, 8]),
    group=st.sampled_from([1, 4, 8]),
)
def test_every_step_is_dealt_out_once(multiprocessors: int, lengths: list[int], heads: int, group: int) -> None:
    with emulated_device(multiprocessors, largest_piece=4096), ops.backend("cuda"):
        made = ops.schedule_decode(torch.tensor(lengths), PageLayout.of("k4v4", 128), heads * group, heads)
    assert made is not None
    blocks = dealing.blocks_of(1, group)
    warps, names = multiprocessors * dealing.WARPS[blocks], [field[0] for field in dealing.Share._fields_]
    records = made.data.view(warps, len(names))
    steps, items = torch.tensor([-(-length // 32) for length in lengths]), heads * -(-group // (4 * blocks))
    copies, goes_on = records[:, names.index("copies")], records[0, names.index("total")]
    assert copies.sum() == steps.sum() * items
    if goes_on:  # equal stretches of the line of all steps
        assert goes_on == steps.sum() * items
        assert copies.max() - copies.min() <= 1
        return
    pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for record in records[copies > 0].tolist():
        its = dict(zip(names, record, strict=True))
        piece = its["begin"], its["begin"] + its["copies"]
        pieces.setdefault((its["sequence"], its["head"]), []).append(piece)
    average = int(steps.sum()) * items / warps
    assert copies.max() <= max(average + 3, average * (33 / 32) ** 2 + 1)
    for (sequence, _), its in pieces.items():
        assert [begin for begin, _ in its] == [0, *(end for _, end in its[:-1])]
        assert its[-1][1] == steps[sequence]
    assert len(pieces) == (steps > 0).sum() * items


@pytest.mark.parametrize("steps", [(19, 19), (43,), (30, 7)], ids=str)
def test_warps_with_as_many_steps_as_a_ring_beside_warps_with_more(steps: tuple[int, ...]) -> None:
    """The former fill their own rings, and nobody else does."""
    with emulated_device(multiprocessors=1), ops.backend("cuda"):
        cache = stored([32 * n for n in steps], heads=1)
        q = queries(cache)
        assert same(attend(cache, q, inputs_ready=True, schedule=scheduled(cache, q)), check(cache, q))


def test_a_schedule_is_renewed_for_other_lengths(device: EmulatedDevice) -> None:
    """In place, and of fewer sequences than the call has, as in a graph whose last rows are empty."""
    cache = stored((900, 1, 0, 64, 333, 40))
    q = queries(cache)
    made = scheduled(cache, q)
    assert made is not None
    before = made.data.clone()
    shorter = replace(cache, lengths=torch.tensor([70, 1, 0, 3, 0, 0]))
    want = check(shorter, q)
    again = ops.schedule_decode(shorter.lengths[:4], cache.layout, q.shape[2], 2, out=made)
    assert again is not None
    assert again.data is made.data
    assert (again.batch, made.batch) == (4, 6)
    assert not torch.equal(made.data, before)
    assert same(attend(shorter, q, schedule=made, inputs_ready=True), want)
    ops.schedule_decode(shorter.lengths[:0], cache.layout, q.shape[2], 2, out=made)
    nothing = torch.full_like(q, 7)
    empty = replace(cache, lengths=torch.zeros(6, dtype=torch.long))
    assert not attend(empty, q, schedule=made, inputs_ready=True, out=nothing)[0].any()


def test_schedules_with_options(device: EmulatedDevice) -> None:
    cache = stored((900, 1, 0, 64, 333, 40))
    q = queries(cache, tokens=3)
    options = {"window": 100, "lag": 1, "query_start": cache.lengths.long() - 2, "first": torch.arange(6)}
    assert same(attend(cache, q, schedule=scheduled(cache, q, **options), **options), check(cache, q, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 2}, "query_tokens 1 and not 2"),
        ({"group": 2}, "group 4 and not 2"),
        ({"window": 5}, "window None and not 5"),
        ({"lag": 2}, "lag 0 and not 2"),
        ({"rows": [0, 1]}, "batch 3 and not 2"),
        ({"first": torch.zeros(3, dtype=torch.int32)}, "first False and not True"),
        ({"query_start": torch.ones(3, dtype=torch.int32)}, "query_start False and not True"),
    ],
    ids=str,
)
def test_a_schedule_of_another_call_is_refused(change: dict, message: str, device: EmulatedDevice) -> None:
    cache = stored((90, 1, 30))
    made = scheduled(cache, queries(cache))
    options = {name: change[name] for name in ("window", "lag", "first", "query_start") if name in change}
    cache = pick(cache, change.get("rows", [0, 1, 2]))
    q = queries(cache, change.get("group", 4), change.get("tokens", 1))
    with pytest.raises(ShapeError, match=f"made for {message}; schedule_decode makes one"):
        attend(cache, q, schedule=made, **options)
    if "rows" not in change:
        with pytest.raises(ShapeError, match=f"for {message}; make another one"):
            ops.schedule_decode(
                cache.lengths, cache.layout, q.shape[2], 2, query_tokens=q.shape[1], out=made, **options
            )
    attend(cache, q, batch_invariant=True, schedule=made, **options)  # which deals out by itself


def test_a_schedule_that_is_none_is_refused(device: EmulatedDevice) -> None:
    cache = stored((90,))
    made = scheduled(cache, queries(cache))
    assert made is not None
    with pytest.raises(ShapeError, match="what schedule_decode returns, not a Tensor"):
        attend(cache, queries(cache), schedule=made.data)


@pytest.mark.parametrize("tokens", [0, -3])
def test_a_schedule_of_no_query_token_is_refused(tokens: int, device: EmulatedDevice) -> None:
    with pytest.raises(ShapeError, match=f"1 query token or more of a sequence, not of {tokens}"):
        ops.schedule_decode(torch.tensor([70]), PageLayout.of("k4v4", 128), 8, 2, query_tokens=tokens)


@pytest.mark.parametrize("group", [4, 8])
def test_batch_invariance(group: int, device: EmulatedDevice) -> None:
    cache = stored((300, 0, 1200, 1, 31, 700), heads=1)
    q = queries(cache, group)
    out, lse = check(cache, q, batch_invariant=True)
    rows = list(range(len(q)))
    wider = torch.cat([cache.table, cache.table[1:2, :1].expand(len(q), 9)], dim=1)
    for some in ([2], [3], [1, 5], rows[::-1]):
        for table in (cache.table, wider):
            got = attend(pick(replace(cache, table=table), some), q[some], batch_invariant=True)
            assert same(got, (out[some], lse[some])), some


def test_batch_invariance_when_launches_are_split(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = stored((100, 0, 600, 33, 64), heads=2)
    q = queries(cache)
    want = check(cache, q, batch_invariant=True)
    monkeypatch.setattr(decode, "_INVARIANT_SCRATCH", 2 * 4 * 4 * 132 * decode._SPLITS * 2)  # two sequences' partials
    device.launches.clear()
    assert same(attend(cache, q, batch_invariant=True), want)
    assert [grid[2] for _, grid in device.launches] == [2, 2, 1]


# --- decode: who sees what --------------------------------------------------------------------------------------------

FIRST, START = [0, -3, 10, 64, 399], [0, 3, 20, 200, 500]  # of sequences of VISIBLE tokens
VISIBLE = (0, 1, 33, 300, 400)
VISIBILITY: dict[str, dict[str, Any]] = {
    "window": {"window": 70},
    "window of one": {"window": 1},
    "lag": {"lag": 40},
    "nothing between lag and window": {"lag": 5, "window": 5},
    "first": {"first": FIRST},
    "query start, lag, window and first": {"query_start": START, "lag": 3, "window": 150, "first": FIRST},
    "soft cap and window": {"softcap": 20.0, "window": 90, "scale": 1.0},
    "mask": {"mask": 0.7},
    "mask of few, window": {"mask": 0.05, "window": 99, "query_start": START},
    "everything": {"mask": 0.6, "window": 200, "lag": 2, "softcap": 3.0, "first": FIRST, "query_start": START},
}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", VISIBILITY)
def test_visibility(name: str, group: int, device: EmulatedDevice) -> None:
    options = dict(VISIBILITY[name])
    cache = stored(VISIBLE, page_size=32)
    for vector in options.keys() & {"first", "query_start"}:
        options[vector] = torch.tensor(options[vector])
    if "mask" in options:
        options["mask"] = torch.rand(len(VISIBLE), 3, 410) < options["mask"]
        options["mask"][2, 1] = False
    q = queries(cache, group, tokens=3)
    want = check(cache, q, **options)
    narrow = {name: x.int() if name in ("first", "query_start") else x for name, x in options.items()}
    assert same(attend(replace(cache, lengths=cache.lengths.int(), table=cache.table.long()), q, **narrow), want)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("group", [1, 4])
def test_only_queries_that_see_a_bad_token_suffer(group: int, side: str, device: EmulatedDevice) -> None:
    """Token 50 of head 1 is NaN, and two of three queries see it."""
    vectors = {name: noise(100, 2, 128, seed=seed) for seed, name in enumerate("kv")}
    vectors[side][50, 1, 77] = torch.nan
    cache = empty_cache(PageLayout.of("k4v4", 128), (100,))
    fill(cache, 0, **vectors)
    for options, suffering in (
        ({"query_start": torch.tensor([49])}, [False, True, True]),
        ({"query_start": torch.tensor([58]), "window": 10}, [True, True, False]),
    ):
        out, _ = check(cache, queries(cache, group, tokens=3), **options)
        bad = out[0].isnan().all(-1)  # [Tq, Hq]
        assert not bad[:, :group].any()
        assert bad[:, group:].all(-1).tolist() == suffering


# --- decode: what is hard for fixed point -----------------------------------------------------------------------------

# Made of normal k and v, of u, which is part of every query (u times u is a score of 11.3), and of t, 0 to 1 by token.
HARD: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "peaked scores": lambda k, v, u, t: (8 * k, v),
    "rising scores": lambda k, v, u, t: (k + 5 * t * u, v),
    "scores that rise steeply": lambda k, v, u, t: (0.1 * k + 40 * t * u, v),
    "falling scores": lambda k, v, u, t: (k + 5 * (1 - t) * u, v),
    "scores in waves": lambda k, v, u, t: (k + 3 * torch.sin(300 * t) * u, v),
    "very low scores": lambda k, v, u, t: (k - 20 * u, v),
    "a sink": lambda k, v, u, t: (torch.where(t == t[5], u * (11 / 11.3), 0.1 * k), v),
    "zero keys": lambda k, v, u, t: (0 * k, v),
    "zero values": lambda k, v, u, t: (k, 0 * v),
    "a common mean": lambda k, v, u, t: (k, v + 3 * u),
    "enormous values": lambda k, v, u, t: (0.1 * k + 2.2 * t * u, 1e30 * v),
    "the largest values first": lambda k, v, u, t: (k, v * 10 ** (20 - 40 * t)),
    "the largest values last": lambda k, v, u, t: (k, v * 10 ** (40 * t - 20)),
}


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("name", HARD)
def test_hard(name: str, group: int, one_multiprocessor: EmulatedDevice) -> None:
    tokens = 1500
    u = noise(128, seed=3)
    u *= 128**0.5 / u.norm()
    k, v = HARD[name](
        noise(tokens, 1, 128, seed=1), noise(tokens, 1, 128, seed=2), u, torch.linspace(0, 1, tokens)[:, None, None]
    )
    cache = empty_cache(PageLayout.of("k4v4", 128), (tokens,), heads=1)
    fill(cache, 0, k.contiguous(), v.contiguous())
    q = (u + 0.3 * queries(cache, group, dtype=F32)).to(BF16)
    check(cache, q)  # a few tokens a warp
    check(cache, q, times=12)  # hundreds


def test_a_row_that_sees_nothing_while_sums_of_others_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values are the same, so every row's result is, too; one row sees the last hundred of 128 000 tokens alone."""
    tokens, x = 128_000, noise(128, seed=3).expand(64, 1, 128).contiguous()
    monkeypatch.setattr(dealing, "WARPS", {1: 4, 2: 8})  # so each has a sequence
    with emulated_device(1, largest_piece=4096), ops.backend("cuda"):
        cache = empty_cache(PageLayout.of("k2v2", 128), (64,), heads=1)
        fill(cache, 0, x, x)
        long = replace(cache, table=cache.table[:1, :1].expand(4, tokens // 64), lengths=torch.full((4,), tokens))
        mask = torch.ones(4, 4, tokens, dtype=torch.bool)
        mask[:, 0, :-100] = False
        q = queries(cache, 1, 4)
        out, _ = attend(long, q.expand(4, -1, -1, -1), mask=mask, query_start=long.lengths)
        want, _ = attend(cache, q, query_start=torch.tensor([64]))
    assert ((out - want).float().norm(dim=-1) < 0.01 * want.float().norm(dim=-1)).all()


@pytest.mark.parametrize("group", [4, 8])
def test_sums_that_would_overflow(group: int, one_multiprocessor: EmulatedDevice) -> None:
    """The largest weights, of values that do not cancel, in so many steps of a warp that it looks at its sums."""
    tokens = 20_000
    x = noise(128, seed=3).expand(64, 1, 128).contiguous()
    cache = empty_cache(PageLayout.of("k2v2", 128), (64,), heads=1)
    fill(cache, 0, x, x)
    q = queries(cache, group)
    warps = dealing.WARPS[1 if group == 4 else 2]
    long = replace(
        cache, table=cache.table[:1, :1].expand(warps, tokens // 64 + 1), lengths=torch.full((warps,), tokens)
    )
    out, lse = attend(long, q.expand(warps, -1, -1, -1))
    want_out, want_lse, allowed = truth(cache, q)  # all tokens are the same
    want_lse += torch.log(torch.tensor(tokens / 64))
    compare((out, lse), tuple(x.expand(warps, *x.shape[1:]) for x in (want_out, want_lse, allowed)))
