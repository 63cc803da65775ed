"""The Triton kernels: what they store, byte for byte, and what they attend to, against float64.

Without a GPU they run in Triton's interpreter, which must be asked for before Triton is first imported. With one they
run on it, under ``pytest -m gpu``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from ops_cases import Cache, Expected, Peak, State, empty_cache, expected, fill, make_cache, noise, sees  # noqa: E402
from test_ops import CHUNKS, CONTEXTS, STRIDES, assert_same_bytes, hard_keys, prefill_case  # noqa: E402

from kvfold.formats import PAGE_SIZES  # noqa: E402
from kvfold.layout import PageLayout  # noqa: E402
from kvfold.ops import reference  # noqa: E402
from kvfold.ops import triton as kernels  # noqa: E402
from kvfold.ops.options import AttentionOptions  # noqa: E402
from kvfold.ops.triton import decode, prefill, sides  # noqa: E402

pytestmark = [pytest.mark.gpu] if HAS_GPU else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-3, torch.float16: 2e-3}
"""Error of the output, relative in norm: prefill rounds probabilities to bfloat16, and the output is in q's dtype."""


def on(*values: Any) -> Any:
    """Tensors on the device that the kernels run on, anything else as it is."""
    moved = tuple(value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values)
    return moved if len(moved) > 1 else moved[0]


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Peak:
    """Without what the interpreter takes, which copies a kernel's arguments."""
    counted = Peak()
    if not HAS_GPU:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def uncounted(self: Any, *args: Any, **kwargs: Any) -> Any:
            with counted.uncounted():
                return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", uncounted)
    return counted


def decoded(cache: Cache, q: torch.Tensor, options: AttentionOptions) -> State:
    out, lse = kernels.decode_attention(
        on(q), *on(cache.pages, cache.table, cache.lengths), cache.layout, AttentionOptions(*map(on, options))
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    return out.cpu(), lse.cpu()


def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of the latest launch of decode's attention kernel."""
    launched: dict[str, Any] = {}
    real = decode._attend

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launched.update(options) or real[grid](*args, **options)

    monkeypatch.setattr(decode, "_attend", Kernel())
    return launched


def assert_near(got: State, want: Expected, dtype: torch.dtype) -> None:
    """Who sees nothing gets exactly 0 and -inf; the rest is near the truth."""
    (out, lse), (true_out, true_lse) = got, want.truth
    assert out.shape == true_out.shape
    assert lse.shape == true_lse.shape
    nothing = true_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (out[nothing.transpose(-1, -2)] == 0).all()
    assert (out.double() - true_out).norm() <= TOLERANCE[dtype] * true_out.norm()
    # prefill's queries are the sum of two bfloat16, 2^-17 of a score that may be as large as its condition
    allowed = 2.0**-15 * want.condition + 1e-5 * (1 + true_lse.abs())
    assert ((lse.double() - true_lse).abs() <= allowed)[~nothing].all()


def check_decode(cache: Cache, q: torch.Tensor, scale: float | None = None, **options: Any) -> State:
    """Decode a batch and hold it against float64, sequence by sequence."""
    scale = cache.layout.head_size**-0.5 if scale is None else scale
    got = decoded(cache, q, AttentionOptions(scale, **options))
    wanted = []
    for b, length in enumerate(cache.lengths.tolist()):
        seen = {
            name: value if value is None or name in ("lag", "window") else value[b] if name == "mask" else int(value[b])
            for name, value in options.items()
            if name not in ("softcap", "batch_invariant")
        }
        visible = sees(q.shape[1], length, **seen)
        wanted.append(expected(q[b].float(), *cache.vectors(b), visible, scale, options.get("softcap")))
    assert_near(got, Expected.stack(wanted), q.dtype)
    return got


# --- store and load ---------------------------------------------------------------------------------------------------


def stored(k: torch.Tensor, v: torch.Tensor, cache: Cache, slots: torch.Tensor) -> Cache:
    """A cache like this one after the kernels stored its first sequence in it."""
    pages = on(cache.pages.clone())
    kernels.store_kv(on(k), on(v), pages, on(slots), cache.layout, on(cache.previous(0)))
    return Cache(cache.layout, pages.cpu(), cache.table, cache.lengths)


SMALL = ((64, 32),)
SEVERAL = ((128, 64), (33, 80), (32, 256))


@pytest.mark.parametrize(
    ("spec", "all_sizes"),
    [
        *((f"k{bits}v{9 - bits}", SMALL) for bits in range(1, 9)),
        *(("k4v4", SEVERAL), ("k3v2", SEVERAL), ("k4v4+plain", SMALL), ("k4v3+nc", SMALL), ("k8v2+mse+pre5", SMALL)),
        *(("k2tv3t", ((32, 24),)), ("k4tv2+nc", ((32, 24),)), ("k3tv4t+mean", ((48, 24),)), ("k4v4+mean", SMALL)),
    ],
    ids=str,
)
def test_store_writes_the_reference_bytes(spec: str, all_sizes: tuple[tuple[int, int], ...]) -> None:
    for index, sizes in enumerate(all_sizes):
        layout = PageLayout.of(spec, *sizes, PAGE_SIZES[index])
        cache = empty_cache(layout, [40], seed=index)
        k, v = (noise(40, 2, size, seed=index, dtype=DTYPES[index]) for size in sizes)
        slots = cache.slots(0)
        got = stored(k, v, cache, slots)
        fill(cache, 0, k, v)
        assert_same_bytes(got.records(slots), cache.records(slots), k, v, layout, cache.references(slots))


OPENING = (
    *((40,), (19, 1, 1, 19), (3, 37)),  # own keys; too few of them, with the page before as it is stored; no page
    (16, 17, 7),  # too few, and the page before comes in the same call
    *((5, 12, 23), (14, 4, 22)),  # the page before in part: its keys of this call, or the stored ones
)
"""Tokens that are stored at a time, in pages of 16."""


@pytest.mark.parametrize(
    ("steps", "spec"),
    [
        *((steps, spec) for steps in OPENING for spec in ("k4v4+mean", "k4v4+mean+sinks4")),
        ((5, 12, 23), "k2tv4+mean"),
    ],
    ids=str,
)
def test_pages_are_opened_as_the_reference_opens_them(steps: tuple[int, ...], spec: str) -> None:
    layout = PageLayout.of(spec, 40, page_size=16)
    cache = empty_cache(layout, [40])
    k, v = noise(40, 2, 40, seed=1) + 3 * noise(2, 40, seed=2), noise(40, 2, 40, seed=3)
    k[18, 1, 5], k[20, 0] = torch.nan, k[20, 0] * 1e4
    slots, previous = cache.slots(0), cache.previous(0)
    assert previous is not None
    got, want = on(cache.pages.clone()), cache.pages.clone()
    begin = 0
    for count in steps:
        part = slice(begin, begin + count)
        kernels.store_kv(*on(k[part], v[part]), got, on(slots[part]), layout, on(previous[part]))
        reference.store_kv(k[part], v[part], want, slots[part], layout, previous[part])
        begin += count
    pages = cache.table[0, :3].long()
    mine, its = (layout.decode_reference(each[pages]) for each in (got.cpu(), want))
    assert its.isfinite().all()
    # a code's rounding may differ by one, and scales not at all
    torch.testing.assert_close(mine, its, rtol=0, atol=1.01 * float(its.abs().max()) / 127)
    assert (mine != its).float().mean() < 0.01


@pytest.mark.parametrize("stride", STRIDES)
def test_strides_of_vectors_do_not_matter(stride: str) -> None:
    cache = empty_cache(PageLayout.of("k3v4", 64, 80, 16), [20])
    k, v = (STRIDES[stride](noise(20, 2, size, seed=size, dtype=torch.bfloat16)) for size in (64, 80))
    slots = cache.slots(0)
    assert torch.equal(stored(k, v, cache, slots).pages, stored(k.contiguous(), v.contiguous(), cache, slots).pages)


def test_negative_slots_are_dropped_and_neighbours_keep_their_bytes() -> None:
    layout = PageLayout.of("k3v2", 64, 32, 32)
    pages = torch.randint(0, 256, layout.page_shape(4, 2), dtype=torch.uint8)
    slots = torch.randperm(4 * 32)[:50]
    slots[::7] = -1 - slots[::7]
    k, v = noise(50, 2, 64, seed=1), noise(50, 2, 32, seed=2)
    before = Cache(layout, pages, torch.empty(0), torch.empty(0))
    after = stored(k, v, before, slots)
    kept = slots >= 0
    others = torch.tensor(sorted(set(range(4 * 32)) - set(slots.tolist())))
    assert torch.equal(after.records(others), before.records(others))
    assert_same_bytes(after.records(slots[kept]), layout.encode(k[kept], v[kept]), k[kept], v[kept], layout)


def test_zero_huge_tiny_and_bad_vectors_are_stored_as_the_reference_does() -> None:
    layout = PageLayout.of("k4v4", 64, page_size=16)
    cache = empty_cache(layout, [8], heads=1)
    k = noise(8, 1, 64)
    k[0], k[1, 0, 3], k[2, 0, 5] = 0.0, torch.nan, torch.inf
    k[3] *= 1e30
    k[4] *= 1e-30
    slots = cache.slots(0)
    got = stored(k, k.flip(0), cache, slots).records(slots)
    fill(cache, 0, k, k.flip(0))
    want = cache.records(slots)
    for x, y in zip(layout.decode(got), layout.decode(want), strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        torch.testing.assert_close(x, y, rtol=2.0**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        *(("k4v3", (64, 80)), ("k7v8", (64, 32)), ("k1v5", (33, 64))),
        *(("k3tv4t", (80, 40)), ("k2tv2t+mean", (40, 64)), ("k2tv3t", (64, 64)), ("k4tv2t", (64, 128))),
    ],
)
def test_load(spec: str, sizes: tuple[int, int]) -> None:
    cache = make_cache(PageLayout.of(spec, *sizes, 16), (40, 17))
    loaded = kernels.load_kv(*on(cache.pages, cache.table), cache.layout, 17)
    for b in range(2):
        for x, want in zip(loaded, cache.vectors(b), strict=True):
            assert (x[b].cpu().double() - want[:17]).norm() <= 1e-6 * want[:17].norm()


# --- decode -----------------------------------------------------------------------------------------------------------


TRELLIS_AND_MEAN = ["k2tv3t", "k3tv2t", "k4tv4t", "k4v4+mean", "k3tv2t+mean", "k6v3+mean"]


@pytest.mark.parametrize(
    "spec", [f"k{bits}v{9 - bits}" for bits in range(1, 9)] + ["k4v4", "k3v3", "k2v2", *TRELLIS_AND_MEAN]
)
def test_decode_formats(spec: str) -> None:
    for sizes, page_size in (((64, 32), 16), ((128, 64), 64)):
        cache = make_cache(PageLayout.of(spec, *sizes, page_size), (1, 65), heads=1)
        check_decode(cache, noise(2, 1, 2, sizes[0]))


@pytest.mark.parametrize(
    ("spec", "head_size", "deep"),
    [
        *(("k1v4", 128, 4), ("k2v4+mean", 128, 2), ("k3v4+mean", 128, 4), ("k3tv4+mean", 128, 1), ("k2tv4", 128, 1)),
        *(("k2v4", 96, 2), ("k3v4", 96, 4), ("k3v4", 80, 1), ("k3tv4", 192, 1), ("k3v4+mean", 256, 4)),
        *(("k2v4", 112, 2), ("k3v4", 64, 1), ("k4v4", 128, 1), ("k5v4", 128, 1), ("k4tv4", 128, 1)),
    ],
)  # fmt: skip
def test_decode_of_units_in_another_order(spec: str, head_size: int, deep: int) -> None:
    """Keys in narrow planes, read so many units to an element; padded heads; rows that end within an element."""
    layout = PageLayout.of(spec, head_size, 32, 16)
    assert sides.packed(layout, False).deep == deep
    check_decode(make_cache(layout, (21, 34), heads=1), noise(2, 1, 2, head_size))


@pytest.mark.parametrize(
    ("spec", "head_size", "num_queries", "stages"),
    [
        *(("k4v4", 128, 1, 2), ("k2v3", 128, 1, 2), ("k5v4", 128, 1, 2), ("k4tv4", 128, 1, 3)),
        *(("k3v2", 128, 1, 1), ("k2tv4", 128, 1, 3), ("k3tv4", 128, 2, 3), ("k3v2", 64, 1, 1)),  # narrow; one warp
        *(("k3v2", 128, 16, 2), ("k3v4", 256, 1, 2), ("k5v4", 256, 1, 1)),  # several warps; no room for two
    ],
)  # fmt: skip
def test_stages_of_loads(
    spec: str, head_size: int, num_queries: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(PageLayout.of(spec, head_size, head_size, 64), (65,), heads=1)
    launched = launches(monkeypatch)
    check_decode(cache, noise(1, num_queries, 4, head_size))
    assert launched["num_stages"] == stages


@pytest.mark.parametrize("sizes", [(128, 80), (40, 96)], ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_decode_of_trellises_and_references(sizes: tuple[int, int], page_size: int) -> None:
    layout = PageLayout.of("k3tv2t+mean", *sizes, page_size)
    check_decode(make_cache(layout, [70, 1, 33]), noise(3, 2, 4, sizes[0]))


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [("k4tv4t", (128, 128)), ("k2tv3t", (120, 100)), ("k3tv4t+mean", (256, 256)), ("k8v2t", (64, 160))],
    ids=str,
)
def test_decode_of_trellises_head_sizes(spec: str, sizes: tuple[int, int]) -> None:
    """Whole words, parts of words, and two warps; of V alone beside wide keys."""
    check_decode(make_cache(PageLayout.of(spec, *sizes, 64), (33, 70), heads=1), noise(2, 1, 3, sizes[0]))


@pytest.mark.parametrize("sizes", [(32, 32), (80, 112), (96, 64), (192, 128), (256, 256)], ids=str)
def test_decode_head_sizes(sizes: tuple[int, int]) -> None:
    check_decode(make_cache(PageLayout.of("k4v3", *sizes, 16), (33, 70), heads=1), noise(2, 1, 3, sizes[0]))


@pytest.mark.parametrize(("group", "num_queries"), [(1, 1), (3, 2), (8, 1), (8, 2), (20, 1), (4, 17)])
def test_decode_groups_and_queries(group: int, num_queries: int) -> None:
    """Up to 4 rows are stacked, up to 16 fill a tile of one warp, more take larger tiles and several blocks."""
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), (0, 5, 70), seed=group)
    check_decode(cache, noise(3, num_queries, 2 * group, 64, seed=num_queries))


@pytest.mark.parametrize(("group", "rows"), [(1, 8), (4, 8), (6, 16)])
def test_decode_in_the_tiles_of_an_older_triton(group: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.4 wants as many columns as rows: tiles are wider, and filled with nothing."""
    monkeypatch.setattr(decode, "LEAST_COLUMNS", 16)
    launched = launches(monkeypatch)
    cache = make_cache(PageLayout.of("k3tv4", 64, page_size=16), (5, 70))
    check_decode(cache, noise(2, 1, 2 * group, 64))
    assert launched["ROWS"] == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_dtypes_and_strides(dtype: torch.dtype) -> None:
    cache = make_cache(PageLayout.of("k4v4", 64, page_size=16), (17, 70))
    q = noise(2, 2, 4, 64, dtype=dtype)
    plain = check_decode(cache, q)
    strided = Cache(cache.layout, cache.pages, cache.table.long().T.contiguous().T, cache.lengths.int())
    again = check_decode(strided, q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    for x, y in zip(plain, again, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-18, 1e18])
@pytest.mark.parametrize("spec", ["k4v4", "k3v6"])
def test_decode_of_values_that_float16_does_not_hold(spec: str, size: float) -> None:
    """Weights and queries go to float16 relative to their largest, which grows in one sequence and falls in another."""
    cache = empty_cache(PageLayout.of(spec, 64, page_size=16), [200, 200, 200], heads=1)
    k, v = noise(200, 1, 64), noise(200, 1, 64, seed=1)
    exponents = torch.linspace(-6, 6, 200)[:, None, None]
    for b, exponent in enumerate((exponents * 0, exponents, -exponents)):
        fill(cache, b, k / size, size * v * 10**exponent)
    check_decode(cache, size * noise(3, 1, 4, 64))


LENGTHS = (0, 1, 17, 64, 128)
VISIBILITY: dict[str, dict[str, Any]] = {
    "window-1": {"window": 1},
    "window-50": {"window": 50},
    "window-huge": {"window": 10**12},
    "softcap": {"softcap": 2.5},
    "lag-30": {"lag": 30},
    "first": {"first": torch.tensor([0, 0, 3, 64, 77])},
    "query-start": {"query_start": torch.tensor([5, -1, 3, 1000, 80])},
    "mask": {"mask": torch.rand(5, 3, 137, generator=torch.Generator().manual_seed(3)) < 0.5},
    "all": {
        "window": 40, "softcap": 3.0, "lag": 2, "first": torch.tensor([0, 0, 1, 30, 100]),
        "query_start": torch.tensor([0, 3, 14, 60, 120]),
        "mask": torch.rand(5, 3, 137, generator=torch.Generator().manual_seed(4)) < 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", VISIBILITY.values(), ids=VISIBILITY)
@pytest.mark.parametrize(("spec", "page_size"), [("k4v3", 16), ("k3tv4t", 64)])
def test_decode_visibility(spec: str, page_size: int, options: dict[str, Any]) -> None:
    cache = make_cache(PageLayout.of(spec, 32, 64, page_size), LENGTHS, heads=1)
    check_decode(cache, noise(5, 3, 2, 32), **options)


@pytest.mark.parametrize("options", [{"first": 0}, {"query_start": 0, "window": 50}], ids=["first", "query-start"])
@pytest.mark.parametrize(("spec", "page_size"), [("k4v4", 16), ("k3tv4t", 64), ("k2v3t", 16)])
def test_positions_far_beyond_all_tokens(spec: str, page_size: int, options: dict[str, Any]) -> None:
    """Tables of trellises are read ahead: not where a sum of such positions overflows to."""
    cache = make_cache(PageLayout.of(spec, 32, page_size=page_size), (300, 70), heads=1)
    far = {name: value or torch.tensor([2**31 - 1, 2**31 - 65], dtype=torch.int32) for name, value in options.items()}
    out, lse = check_decode(cache, noise(2, 1, 2, 32), **far)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "options", [{}, VISIBILITY["all"], {"batch_invariant": True}], ids=["plain", "all", "invariant"]
)
def test_a_batch_that_needs_more_scratch_is_cut(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, q = make_cache(PageLayout.of("k4v3", 32, 64, 16), LENGTHS, heads=1), noise(5, 3, 2, 32)
    whole = check_decode(cache, q, **options)
    batches, attend = [], decode._attend_and_combine

    def watch(some: torch.Tensor, *rest: Any) -> None:
        batches.append(len(some))
        attend(some, *rest)

    monkeypatch.setattr(decode, "_attend_and_combine", watch)
    row_bytes = 4 * (32 + 1) + 4 * (64 + 2)  # with one split
    for rows in (1, 2 * 6 + 1):  # less than a sequence, and two sequences
        monkeypatch.setattr(decode, "SCRATCH_BYTES", rows * row_bytes)
        batches.clear()
        for x, y in zip(check_decode(cache, q, **options), whole, strict=True):
            assert torch.equal(x, y)
        assert len(batches) > 1
        assert sum(batches) == 5


@pytest.mark.parametrize("invariant", [False, True])
def test_scratch_of_decodes_is_bounded(invariant: bool, peak: Peak, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream #40420 and others: a long context and many rows, like the tokens of a prompt that are rows."""
    cache, rows = make_cache(PageLayout.of("k4v4", 32, page_size=64), (1100,), heads=1), 12
    row = cache.table.expand(rows, -1), torch.arange(1100 - rows, 1100) + 1
    q = on(noise(rows, 1, 2, 32))
    pages, *of_rows = on(cache.pages, *row)
    room = 2**12
    monkeypatch.setattr(decode, "SCRATCH_BYTES", room)
    options = AttentionOptions(0.2, batch_invariant=invariant)
    kernels.decode_attention(q[:1], pages, *(x[:1] for x in of_rows), cache.layout, options)  # makes tables
    with peak:
        out, lse = kernels.decode_attention(q, pages, *of_rows, cache.layout, options)
    assert 0 < peak.most - 4 * (out.numel() + lse.numel()) <= room


@pytest.mark.parametrize(("spec", "page_size"), [("k4v4", 16), ("k3tv4t", 64)])
def test_sequences_that_see_nothing_give_zero_and_minus_infinity(spec: str, page_size: int) -> None:
    cache = make_cache(PageLayout.of(spec, 32, page_size=page_size), (0, 20, 20), heads=1)
    out, lse = check_decode(cache, noise(3, 2, 2, 32), first=torch.tensor([0, 20, 0]))
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.equal(lse[:2], torch.full_like(lse[:2], -torch.inf))
    assert lse[2].isfinite().all()


@pytest.mark.parametrize("spec", ["k4v4", "k3v6", "k3tv4t"])
def test_bytes_that_nobody_wrote_do_not_leak(spec: str) -> None:
    cache = make_cache(PageLayout.of(spec, 32, page_size=16), (0, 1, 40), heads=1)
    results = []
    for byte in (0xFF, 0x00, 0x7F):
        other = Cache(cache.layout, torch.full_like(cache.pages, byte), cache.table, cache.lengths)
        for b in range(3):
            slots = cache.slots(b)
            other.pages.view(-1)[reference._record_addresses(cache.pages, slots, cache.layout)] = cache.records(slots)
        results.append(decoded(other, noise(3, 2, 2, 32), AttentionOptions(0.2)))
    for result in results:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)
            assert not x.isnan().any()


@pytest.mark.parametrize("bad", ["k", "v"])
def test_only_queries_that_see_a_bad_token_suffer(bad: str) -> None:
    layout = PageLayout.of("k4v4", 32, page_size=16)
    cache = empty_cache(layout, [30], heads=1)
    k, v = noise(30, 1, 32), noise(30, 1, 32, seed=1)
    (k if bad == "k" else v)[28] = torch.nan
    fill(cache, 0, k, v)
    out, lse = decoded(cache, noise(1, 4, 2, 32), AttentionOptions(0.2))  # positions 26 to 29
    assert out[0, 2:].isnan().all()
    assert not out[0, :2].isnan().any()
    assert not lse[0, :, :2].isnan().any()
    if bad == "k":
        assert lse[0, :, 2:].isnan().all()


@pytest.mark.parametrize("sign", [1, -1], ids=["towards", "away"])
@pytest.mark.parametrize(
    "kind", ["peaked", "rising", "falling", "constant", "zero", "one huge first", "one huge in the middle"]
)
def test_hard_scores(kind: str, sign: int) -> None:
    cache = empty_cache(PageLayout.of("k4v4", 32, page_size=64), [200], heads=1)
    k, scale = hard_keys(kind, 200, 32)
    fill(cache, 0, k, noise(200, 1, 32, seed=9))
    q = torch.cat([sign * noise(1, 1, 1, 32), sign * noise(1, 1, 1, 32, seed=1)], dim=2)
    check_decode(cache, q, scale=scale)


def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch() -> None:
    lengths = (1100, 1, 17, 600)
    cache = make_cache(PageLayout.of("k4v4", 32, page_size=16), lengths, heads=1)
    q = noise(len(lengths), 1, 2, 32)
    together = check_decode(cache, q, batch_invariant=True)
    for b, length in enumerate(lengths):
        row = cache.row(b)
        row = Cache(row.layout, row.pages, row.table[:, : -(-length // 16)], row.lengths)
        alone = decoded(row, q[b : b + 1], AttentionOptions(32**-0.5, batch_invariant=True))
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[0], y[b])


def test_many_splits_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than are read at once; some have no tokens."""
    monkeypatch.setattr(decode, "MIN_SPLIT_STEPS", 1)
    cache = make_cache(PageLayout.of("k4v4", 32, page_size=64), (2400, 100), heads=1)
    monkeypatch.setattr(decode, "_warps", lambda device: 80)
    check_decode(cache, noise(2, 1, 2, 32))


def test_the_portable_look_up_gives_the_same_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On NVIDIA levels are looked up by its own instructions; here, and on other chips, by arithmetic."""
    cache = make_cache(PageLayout.of("k4v3", 64, page_size=16), (70,))
    q = noise(1, 1, 4, 64)
    results = [check_decode(cache, q)]
    plain = sides.packed
    monkeypatch.setattr(sides, "packed", lambda layout, is_value: plain(layout, is_value)._replace(unpack=()))
    results.append(check_decode(cache, q))
    for x, y in zip(*results, strict=True):  # compiled, both may add in different orders
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# --- prefill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{}, {"window": 12}, {"softcap": 2.0}, {"mask": True}], ids=str)
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("k4v4", torch.float32), ("k3v5", torch.bfloat16), ("k3tv4t+mean", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("chunk", ["exact", "packed"])
def test_prefill(chunk: str, spec: str, dtype: torch.dtype, option: dict[str, Any]) -> None:
    layout = PageLayout.of(spec, 64, 32, 16)
    cache, q, k, v, bounds = prefill_case(layout, group=2)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    option = dict(option)
    if "mask" in option:
        option["mask"] = torch.rand(len(CHUNKS), max(CHUNKS), 64) < 0.6
    own = (k, v) if chunk == "exact" else (None, None)
    context = torch.tensor(CONTEXTS) if chunk == "exact" else cache.lengths
    out, lse = kernels.prefill_attention(
        *on(q, cache.pages, cache.table, context.int(), bounds.int()), layout,
        AttentionOptions(0.125, **{name: on(value) for name, value in option.items()}), *on(*own),
    )  # fmt: skip
    assert out.dtype == dtype
    wanted = []
    for b, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        keys, values = cache.vectors(b)
        if chunk == "exact":
            keys = torch.cat([keys[: CONTEXTS[b]], k[begin:end].double()])
            values = torch.cat([values[: CONTEXTS[b]], v[begin:end].double()])
        mask = option["mask"][b, : end - begin] if "mask" in option else None
        visible = sees(end - begin, len(keys), window=option.get("window"), mask=mask)
        wanted.append(expected(q[begin:end].float(), keys, values, visible, 0.125, option.get("softcap")))
    assert_near((out.cpu(), lse.cpu()), Expected.stack(wanted, varlen=True), dtype)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    "spec", ["k2tv2t", "k2tv2t+mean", "k3tv3t", "k3tv2t+mean", "k4tv4t", "k2tv4t", "k4tv2t+mean", "k2v3", "k3v2+mean"]
)
def test_prefill_of_every_width(spec: str, head_size: int) -> None:
    """Whole pages of 64, as a model's prompt is: a compiler's fault may lie in a single width."""
    cache, scale = make_cache(PageLayout.of(spec, head_size, page_size=64), (70,), heads=1), head_size**-0.5
    q = noise(70, 1, head_size)
    out, lse = kernels.prefill_attention(
        *on(q, cache.pages, cache.table, cache.lengths.int(), torch.tensor([0, 70])), cache.layout,
        AttentionOptions(scale),
    )  # fmt: skip
    keys, values = cache.vectors(0)
    wanted = Expected.stack([expected(q, keys, values, sees(70, 70), scale)], varlen=True)
    assert_near((out.cpu(), lse.cpu()), wanted, torch.float32)


@pytest.mark.parametrize("option", [{}, {"window": 12}, {"softcap": 2.0}, {"mask": True}], ids=str)
@pytest.mark.parametrize("chunk", ["exact", "packed"])
def test_a_prefill_that_needs_more_scratch_is_cut(
    chunk: str, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between sequences, and a sequence of 30 tokens into parts of 12."""
    tokens, attend = [], prefill._attend

    def watch(some: torch.Tensor, *rest: Any) -> None:
        tokens.append(len(some))
        attend(some, *rest)

    monkeypatch.setattr(prefill, "_attend", watch)
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 12 * 4 * (4 * 64 + 4 * 32))  # of four heads
    test_prefill(chunk, "k4v4", torch.float32, option)
    assert tokens == [12, 5, 10, 12, 12, 6]


@pytest.mark.parametrize("chunk", ["exact", "packed"])
def test_scratch_of_prefills_is_bounded(chunk: str, peak: Peak, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PageLayout.of("k4v4", 32, page_size=16)
    cache, count = make_cache(layout, (100,), heads=1), 150
    q, k, v = (on(noise(count, heads, 32, seed=heads).to(torch.bfloat16)) for heads in (2, 1, 1))
    pages, table, lens, bounds = on(cache.pages, cache.table, cache.lengths, torch.tensor([0, count]))
    own = (k, v) if chunk == "exact" else ()
    options = AttentionOptions(0.2)
    kernels.prefill_attention(q[:1], pages, table, lens, bounds[:2].clamp(max=1), layout, options, *own)  # tables
    room = 2**14
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", room)
    with peak:
        out, lse = kernels.prefill_attention(q, pages, table, lens, bounds, layout, options, *own)
    beside = peak.most - 2 * out.numel() - 4 * lse.numel()
    assert room // 2 < beside <= room * (1 if HAS_GPU else 3) + 2**10  # a CPU un-rotates in float64


@pytest.mark.parametrize(("head_size", "head_size_v"), [(80, 96), (32, 192)])
def test_prefill_of_several_blocks(head_size: int, head_size_v: int) -> None:
    """A chunk of more than one block of rows and of tokens, groups that do not divide a block, odd heads."""
    layout = PageLayout.of("k4v2", head_size, head_size_v, 32)
    cache = make_cache(layout, (90, 3), heads=1)
    chunks = (70, 1)
    k, v, q = noise(71, 1, head_size, seed=5), noise(71, 1, head_size_v, seed=6), noise(71, 3, head_size)
    bounds = torch.tensor([0, 70, 71])
    out, lse = kernels.prefill_attention(
        *on(q, cache.pages, cache.table, cache.lengths, bounds), layout, AttentionOptions(0.1), *on(k, v)
    )
    wanted = []
    for b, count in enumerate(chunks):
        begin = int(bounds[b])
        keys, values = (
            torch.cat([x, y[begin : begin + count].double()]) for x, y in zip(cache.vectors(b), (k, v), strict=True)
        )
        wanted.append(expected(q[begin : begin + count], keys, values, sees(count, len(keys)), 0.1))
    assert_near((out.cpu(), lse.cpu()), Expected.stack(wanted, varlen=True), torch.float32)


@pytest.mark.parametrize("bad", ["k", "v"])
def test_a_bad_vector_of_the_chunk_reaches_only_who_sees_it(bad: str) -> None:
    layout = PageLayout.of("k4v4", 32, page_size=16)
    cache = empty_cache(layout, [0], heads=1)
    k, v = noise(10, 1, 32), noise(10, 1, 32, seed=1)
    (k if bad == "k" else v)[6, 0, 3] = torch.nan
    out, _ = kernels.prefill_attention(
        *on(noise(10, 2, 32), cache.pages, cache.table, cache.lengths, torch.tensor([0, 10])), layout,
        AttentionOptions(0.2), *on(k, v),
    )  # fmt: skip
    assert out[6:].isnan().all()
    assert not out[:6].isnan().any()


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "word"), [("kf8vf8", "f8"), ("bf16", "bf16"), ("k4v4", None), ("k3tv8+mean", None)])
def test_supports(spec: str, word: str | None) -> None:
    reason = kernels.supports(PageLayout.of(spec, 64))
    assert reason is None if word is None else word in str(reason)


def test_heads_that_are_too_large_are_refused() -> None:
    assert "576" in str(kernels.supports(PageLayout.of("k4v4", 576, 512)))


def test_available() -> None:
    assert kernels.available(DEVICE) is None


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_store_decode_and_prefill_are_captured_into_a_graph() -> None:
    layout = PageLayout.of("k4v4", 128, page_size=64)
    cache = make_cache(layout, (300, 65))
    pages, table, lengths, slots = on(cache.pages, cache.table, cache.lengths, cache.slots(0)[:2])
    q, k, v = on(noise(2, 1, 8, 128), noise(2, 2, 128), noise(2, 2, 128))
    bounds = on(torch.tensor([0, 1, 2]))

    def step() -> list[torch.Tensor]:
        kernels.store_kv(k, v, pages, slots, layout)
        options = AttentionOptions(0.1)
        return [
            *kernels.decode_attention(q, pages, table, lengths, layout, options),
            *kernels.prefill_attention(q[:, 0], pages, table, lengths, bounds, layout, options, k, v),
        ]

    want = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
