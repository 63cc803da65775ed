"""Arguments that are wrong, empty or at the edge, and numbers that no model should produce but one day does."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ops_cases import (
    ALONE,
    FORMATS,
    Expected,
    assert_close,
    empty_cache,
    expected,
    fill,
    make_cache,
    noise,
    sees,
)

from kvfold import ops
from kvfold.errors import FormatError, ShapeError
from kvfold.formats import PAGE_SIZES
from kvfold.layout import PageLayout

LAYOUT = PageLayout.of("k4v4", 32, 64, 16)
REFUSED = (ShapeError, FormatError)

Arguments = dict[str, Any]


# --- calls that are right, and one argument of them made wrong --------------------------------------------------------


def store() -> Arguments:
    pages = torch.zeros(LAYOUT.page_shape(4, 2), dtype=torch.uint8)
    return {"k": noise(5, 2, 32), "v": noise(5, 2, 64), "pages": pages, "slots": torch.arange(5), "layout": LAYOUT}


def load() -> Arguments:
    cache = make_cache(LAYOUT, (20, 20))
    return {"pages": cache.pages, "block_table": cache.table, "layout": LAYOUT, "tokens": 20}


def decode() -> Arguments:
    cache = make_cache(LAYOUT, (20, 40))
    return {
        "q": noise(2, 3, 4, 32), "pages": cache.pages, "block_table": cache.table, "seq_lens": cache.lengths,
        "layout": LAYOUT, "scale": 0.2, "first": torch.tensor([1, 2]), "query_start": torch.tensor([17, 37]),
        "mask": torch.ones(2, 3, 40, dtype=torch.bool),
    }  # fmt: skip


def decode_many() -> Arguments:
    """More queries than the compiled kernel takes at once, which go another way."""
    return decode() | {"q": noise(2, 20, 4, 32), "mask": torch.ones(2, 20, 40, dtype=torch.bool)}


def prefill() -> Arguments:
    cache = make_cache(LAYOUT, (20, 40))
    return {
        "q": noise(9, 4, 32), "pages": cache.pages, "block_table": cache.table, "context_lens": cache.lengths,
        "cu_seqlens": torch.tensor([0, 5, 9]), "layout": LAYOUT, "scale": 0.2,
    }  # fmt: skip


def prefill_exact() -> Arguments:
    return prefill() | {"k": noise(9, 2, 32), "v": noise(9, 2, 64)}


def exact() -> Arguments:
    return {
        "q": noise(2, 3, 4, 32), "k": noise(2, 7, 2, 32), "v": noise(2, 7, 2, 64), "scale": 0.2,
        "key_start": torch.tensor([0, 1]), "query_start": torch.tensor([4, 5]),
    }  # fmt: skip


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "store": (ops.store_kv, store),
    "load": (ops.load_kv, load),
    "decode": (ops.decode_attention, decode),
    "decode many": (ops.decode_attention, decode_many),
    "prefill": (ops.prefill_attention, prefill),
    "prefill exact": (ops.prefill_attention, prefill_exact),
    "exact": (ops.exact_attention, exact),
}

Change = Callable[[Any], Any]

CHANGES: dict[str, Change] = {
    "meta": lambda x: x.to("meta"),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "int16": lambda x: x.to(torch.int16),
    "int32": lambda x: x.int(),
    "int64": lambda x: x.long(),
    "one row less": lambda x: x[:-1],
    "one row more": lambda x: torch.cat([x, x[:1]]),
    "one head less": lambda x: x[..., :-1, :],
    "one column less": lambda x: x[..., :-1],
    "one dimension less": lambda x: x[0],
    "one dimension more": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "too large": lambda x: x + 1000,
    "minus one": lambda x: x - 1000,
    "beyond 32 bits": lambda x: x.long() + 2**32,
    "short": lambda x: x[..., :17],
    "wrong": lambda x: x + 1,
    "decreasing": lambda x: x.flip(0),
    "none": lambda x: None,
}

WRONG = [
    *(("store", name, change) for name in ("k", "v") for change in (
        "meta", "int32", "one row less", "one head less", "one column less", "one dimension less",
        "one dimension more")),
    *(("store", "slots", change) for change in (
        "meta", "int32", "float", "one row less", "one dimension more", "too large", "beyond 32 bits")),
    *(("store", "pages", change) for change in (
        "meta", "float", "one head less", "one column less", "one dimension less", "strided")),
    *(("load", "block_table", change) for change in (
        "meta", "float", "one dimension less", "too large", "minus one", "beyond 32 bits")),
    ("load", "pages", "strided"), ("load", "tokens", "too large"), ("load", "tokens", "minus one"),
    *(("decode", "q", change) for change in (
        "meta", "int32", "one row less", "one head less", "one column less", "one dimension less",
        "one dimension more")),
    *((call, "block_table", change) for call in ("decode", "decode many", "prefill", "prefill exact") for change in (
        "meta", "float", "one row less", "one dimension more", "too large", "minus one", "beyond 32 bits",
        "short table")),
    *(("decode", name, change) for name in ("seq_lens", "first", "query_start") for change in (
        "meta", "float", "int16", "one row less", "one dimension more")),
    *((call, name, "too large") for call, name in (
        ("decode", "seq_lens"), ("decode many", "seq_lens"), ("prefill", "context_lens"),
        ("prefill exact", "context_lens"))),
    *((call, "mask", change) for call in ("decode", "decode many") for change in (
        "float", "one row less", "one dimension less", "one dimension more", "short")),
    ("decode", "pages", "one column less"), ("decode", "pages", "strided"), ("decode", "pages", "int32"),
    *(("prefill", "q", change) for change in (
        "meta", "int32", "one row less", "one row more", "one head less", "one column less", "one dimension more")),
    *(("prefill", name, change) for name in ("cu_seqlens", "context_lens") for change in (
        "meta", "float", "one row less", "one dimension more")),
    ("prefill", "cu_seqlens", "wrong"), ("prefill", "cu_seqlens", "decreasing"),
    ("prefill", "context_lens", "minus one"),
    *(("prefill exact", name, change) for name in ("k", "v") for change in (
        "none", "meta", "int32", "one row less", "one head less", "one column less", "one dimension more")),
    *(("exact", name, change) for name in ("k", "v") for change in (
        "meta", "one row less", "one dimension less")),
    ("exact", "k", "one column less"), ("exact", "q", "one head less"),
]  # fmt: skip

CHANGES["short table"] = lambda x: x[:, :1]

ROWS = ("block_table", "context_lens", "seq_lens", "cu_seqlens", "query_start")
ALSO_NAMED: dict[str, tuple[str, ...]] = {
    "k": ("v", "key heads", "KV heads"), "v": ("k",), "q": ("query heads", *ROWS), "block_table": ("table", *ROWS),
    "seq_lens": ("block_table",), "context_lens": ("block_table", "cu_seqlens", "seq_lens"), "cu_seqlens": (),
    "pages": ("on meta", "num_pages"), "slots": (), "tokens": ("pages",), "mask": (), "first": (), "query_start": (),
}  # fmt: skip
"""Where two arguments disagree, either may be the one that is named."""


@pytest.mark.parametrize(("call", "name", "change"), WRONG, ids=lambda text: text.replace(" ", "_"))
def test_a_wrong_argument_is_refused(call: str, name: str, change: str, backend: str) -> None:
    function, build = CALLS[call]
    arguments = build()
    arguments[name] = CHANGES[change](arguments[name])
    with pytest.raises(REFUSED, match="|".join(rf"\b{word}" for word in [name.removesuffix("s"), *ALSO_NAMED[name]])):
        function(**arguments)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_right_as_they_are(call: str, backend: str) -> None:
    function, build = CALLS[call]
    result = function(**build())
    assert result is None or all(x.isfinite().all() for x in result)


META_MASK = """
import sys
import pytest
sys.path.insert(0, {folder!r})
from test_ops_hostile import ops, CALLS, REFUSED
for call in ("decode", "decode many"):
    arguments = CALLS[call][1]()
    with ops.backend({backend!r}), pytest.raises(REFUSED, match="mask"):
        ops.decode_attention(**(arguments | {{"mask": arguments["mask"].to("meta")}}))
"""


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mask_on_another_device_is_refused(name: str) -> None:
    """In a process of its own: a kernel that takes its address crashes."""
    code = META_MASK.format(folder=str(Path(__file__).parent), backend=name)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr or f"signal {-result.returncode}"


@pytest.mark.parametrize("change", ["float", "one row less", "one dimension less", "short"])
def test_a_wrong_mask_of_a_prefill_is_refused(change: str, backend: str) -> None:
    mask = CHANGES[change](torch.ones(2, 5, 40, dtype=torch.bool))
    with pytest.raises(REFUSED, match="mask"):
        ops.prefill_attention(**prefill(), mask=mask)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (1, 2), (5, 4)])
def test_query_heads_are_a_multiple_of_kv_heads(heads: int, kv_heads: int, backend: str) -> None:
    cache = make_cache(LAYOUT, (20,), heads=kv_heads)
    call: tuple[Any, ...] = (cache.pages, cache.table, cache.lengths)
    with pytest.raises(ShapeError, match=f"{heads} query heads .* {kv_heads} KV heads"):
        ops.decode_attention(noise(1, 1, heads, 32), *call, LAYOUT, scale=1.0)
    with pytest.raises(ShapeError, match=f"{heads} query heads .* {kv_heads} KV heads"):
        ops.prefill_attention(noise(4, heads, 32), *call, torch.tensor([0, 4]), LAYOUT, scale=1.0)


@pytest.mark.parametrize("spec", ["k4v3", "k4v4+plain", "bf16"])
def test_pages_of_another_format_are_refused(spec: str, backend: str) -> None:
    """Where the number of bytes tells; ``k4v4+plain`` has the same bytes, and the same decoder."""
    other = PageLayout.of(spec, 32, 64, 16)
    arguments = decode() | {"layout": other}
    if other.page_bytes == LAYOUT.page_bytes:
        assert ops.decode_attention(**arguments)[0].isfinite().all()
        return
    with pytest.raises(ShapeError, match=re.escape(str(other.format))):
        ops.decode_attention(**arguments)


def test_an_unknown_backend_is_refused_and_the_choice_is_unchanged() -> None:
    device, layout = torch.device("cpu"), PageLayout.of("k4v4", 32)
    before = ops.choose(device, layout)
    with pytest.raises(FormatError, match="unknown backend 'metal'"), ops.backend("metal"):
        pass
    assert ops.choose(device, layout) is before


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("option", [{"window": 0}, {"window": -5}, {"softcap": 0.0}, {"softcap": -1.0}], ids=str)
def test_a_window_or_softcap_below_one_means_the_same_to_everybody(option: dict[str, Any], many: bool) -> None:
    """Refused, or the same result: never one thing here and another there."""
    results = []
    for name in BACKENDS:
        with ops.backend(name):
            try:
                results.append(ops.decode_attention(**((decode_many if many else decode)() | option)))
            except REFUSED:
                results.append(None)
    assert (results[0] is None) == (results[1] is None)
    if results[0] is not None:
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("first", [-1, -16, -100])
def test_a_negative_first_position_hides_nothing(first: int, many: bool, backend: str) -> None:
    arguments = (decode_many if many else decode)()
    negative = ops.decode_attention(**(arguments | {"first": torch.tensor([first, first])}))
    zero = ops.decode_attention(**(arguments | {"first": torch.tensor([0, 0])}))
    for x, y in zip(negative, zero, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# --- nothing at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FORMATS)
def test_storing_no_tokens_changes_nothing(spec: str, backend: str) -> None:
    layout = PageLayout.of(spec, 32, 64, 16)
    pages = torch.randint(0, 256, layout.page_shape(2, 2), dtype=torch.uint8)
    before = pages.clone()
    ops.store_kv(torch.empty(0, 2, 32), torch.empty(0, 2, 64), pages, torch.empty(0, dtype=torch.int64), layout)
    assert torch.equal(pages, before)


@pytest.mark.parametrize(("batch", "num_queries", "pages"), [(0, 1, 3), (0, 3, 0), (2, 0, 3), (0, 0, 0)])
def test_decoding_nothing(batch: int, num_queries: int, pages: int, backend: str) -> None:
    cache = make_cache(LAYOUT, (20,))
    table = torch.zeros(batch, pages, dtype=torch.int32)
    lengths = torch.full((batch,), 20)
    out, lse = ops.decode_attention(noise(batch, num_queries, 4, 32), cache.pages, table, lengths, LAYOUT, scale=0.2)
    assert out.shape == (batch, num_queries, 4, 64)
    assert lse.shape == (batch, 4, num_queries)


def test_decoding_sequences_without_pages(backend: str) -> None:
    pages = torch.empty(LAYOUT.page_shape(0, 2), dtype=torch.uint8)
    table, lengths = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    out, lse = ops.decode_attention(noise(2, 1, 4, 32), pages, table, lengths, LAYOUT, scale=0.2)
    assert torch.equal(out, torch.zeros(2, 1, 4, 64))
    assert torch.equal(lse, torch.full((2, 4, 1), -torch.inf))


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("chunk", ["packed", "exact"])
def test_prefilling_nothing(chunk: str, bounds: list[int], backend: str) -> None:
    cache = make_cache(LAYOUT, (20, 40))
    batch = len(bounds) - 1
    own = {"k": torch.empty(0, 2, 32), "v": torch.empty(0, 2, 64)} if chunk == "exact" else {}
    out, lse = ops.prefill_attention(
        noise(0, 4, 32), cache.pages, cache.table[:batch], cache.lengths[:batch], torch.tensor(bounds), LAYOUT,
        scale=0.2, **own,
    )  # fmt: skip
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize("batch", [0, 1])
def test_loading_nothing(batch: int, backend: str) -> None:
    cache = make_cache(LAYOUT, (20,))
    for tokens in {0, 20 * (1 - batch)}:
        k, v = ops.load_kv(cache.pages, cache.table[:batch], LAYOUT, tokens)
        assert (k.shape, v.shape) == ((batch, tokens, 2, 32), (batch, tokens, 2, 64))


@pytest.mark.parametrize("spec", FORMATS)
def test_one_token_is_its_own_value(spec: str, backend: str) -> None:
    layout = PageLayout.of(spec, 32, 64, 16)
    cache = make_cache(layout, (1, 1))
    out, _ = ops.decode_attention(noise(2, 1, 4, 32), cache.pages, cache.table, cache.lengths, layout, scale=0.2)
    for b in range(2):
        value = cache.vectors(b)[1][0].repeat_interleave(2, dim=0)
        torch.testing.assert_close(out[b, 0].double(), value, rtol=1e-5, atol=1e-6)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e15, 1e-15])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("spec", ["k2v2", "k4v4", "k3v5+nc", "k8v8+mse", "kf8vf8", "bf16", "exact"])
def test_enormous_and_tiny_vectors(spec: str, side: str, size: float, backend: str) -> None:
    """All of K or V, so that an overflow or a scale that vanishes shows; and one vector among ordinary ones."""
    for everything in (True, False):
        layout = PageLayout.of(spec, 32, page_size=16)
        cache = empty_cache(layout, [21])
        vectors = {"k": noise(21, 2, 32, seed=1), "v": noise(21, 2, 32, seed=2)}
        vectors[side] = (
            vectors[side] * torch.where(torch.arange(21) == 7, size, size if everything else 1.0)[:, None, None]
        )
        ops.store_kv(vectors["k"], vectors["v"], cache.pages, cache.slots(0), layout)
        k, v = cache.vectors(0)
        for name, x in (("k", k), ("v", v)):
            original = vectors[name].double()
            assert ((x - original).norm(dim=-1) < 0.9 * original.norm(dim=-1)).all()
        q = noise(1, 2, 4, 32)
        out, lse = ops.decode_attention(q, cache.pages, cache.table, cache.lengths, layout, scale=0.2)
        assert out.isfinite().all()
        assert_close((out[0], lse[0]), expected(q[0], k, v, sees(2, 21), 0.2))


BAD = {"nan": float("nan"), "inf": float("inf"), "minus-inf": -float("inf")}
ROTATED = ["k1v3", "k4v4", "k8v8+plain", "k5v2+nc", "k2v6+mse"]


@pytest.mark.parametrize("where", ["one coordinate", "every coordinate"])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("spec", [*ROTATED, "kf8vf8"])
def test_a_vector_that_is_not_finite_is_stored_as_nan(
    spec: str, value: str, side: str, where: str, backend: str
) -> None:
    """It, and no other vector of the same call."""
    layout = PageLayout.of(spec, 64, page_size=16)
    cache = empty_cache(layout, [40])
    clean = {"k": noise(40, 2, 64, seed=1), "v": noise(40, 2, 64, seed=2)}
    vectors = {name: x.clone() for name, x in clean.items()}
    vectors[side][11, 1, 5 if where == "one coordinate" else slice(None)] = BAD[value]
    ops.store_kv(vectors["k"], vectors["v"], cache.pages, cache.slots(0), layout)
    other = empty_cache(layout, [40])
    fill(other, 0, clean["k"], clean["v"])
    for name, x, y in zip("kv", cache.vectors(0), other.vectors(0), strict=True):
        spoilt = torch.zeros(40, 2, dtype=torch.bool)
        spoilt[11, 1] = name == side
        assert x[spoilt].isnan().all()
        torch.testing.assert_close(x[~spoilt], y[~spoilt], rtol=0.02, atol=0.05)


SIGHT: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "everybody": ({}, [True, True, True]),
    "causal": ({"query_start": torch.tensor([10])}, [False, True, True]),
    "nobody-yet": ({"query_start": torch.tensor([8])}, [False, False, False]),
    "window": ({"query_start": torch.tensor([14]), "window": 5}, [True, True, False]),
    "lag": ({"query_start": torch.tensor([14]), "lag": 4}, [False, True, True]),
    "first": ({"first": torch.tensor([12])}, [False, False, False]),
    "mask": ({"mask": torch.tensor([True, False, True]).repeat_interleave(40).view(1, 3, 40)}, [True, False, True]),
}


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("spec", ["k4v4", "k3v8", "kf8vf8", "exact"])
def test_only_queries_that_see_a_bad_token_suffer(spec: str, sight: str, value: str, side: str, backend: str) -> None:
    """NaN where an uncompressed cache has it, and elsewhere the bits of a cache without the bad token."""
    layout = PageLayout.of(spec, 32, page_size=16)
    options, who = SIGHT[sight]
    mask = options.get("mask")
    if mask is not None:
        mask = mask.clone()
        mask[0, 1] = torch.arange(40) != 11  # the query in the middle sees everything else
        options = options | {"mask": mask}
    q = noise(1, 3, 4, 32)
    results = []
    for bad in (True, False):
        cache = empty_cache(layout, [40])
        k, v = noise(40, 2, 32, seed=1), noise(40, 2, 32, seed=2)
        if bad:
            (k if side == "k" else v)[11, 1] = BAD[value]
        fill(cache, 0, k, v)
        results.append(
            ops.decode_attention(q, cache.pages, cache.table, cache.lengths, layout, scale=0.2, **options)[0][0]
        )
    spoilt, clean = results
    sees_it = torch.zeros(3, 4, dtype=torch.bool)
    sees_it[:, 2:] = torch.tensor(who)[:, None]
    if spec != "exact":
        assert spoilt[sees_it].isnan().all()
    elif not (side == "k" and value != "nan"):  # an exact key of ±inf may as well have no weight
        assert not spoilt[sees_it].isfinite().any()
    torch.testing.assert_close(spoilt[~sees_it], clean[~sees_it], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_bad_token_of_an_exact_chunk_spoils_only_later_queries(side: str, backend: str) -> None:
    arguments = prefill_exact()
    clean, _ = ops.prefill_attention(**arguments)
    arguments[side][7] = float("nan")  # the third token of the second chunk
    spoilt, _ = ops.prefill_attention(**arguments)
    assert spoilt[7:].isnan().all()
    torch.testing.assert_close(spoilt[:7], clean[:7], rtol=1e-5, atol=1e-6)


def test_a_bad_query_spoils_only_itself(backend: str) -> None:
    arguments = decode()
    clean, clean_lse = ops.decode_attention(**arguments)
    arguments["q"][0, 1, 2, 5] = float("nan")
    spoilt, lse = ops.decode_attention(**arguments)
    bad = torch.zeros(2, 3, 4, dtype=torch.bool)
    bad[0, 1, 2] = True
    assert spoilt[bad].isnan().all()
    assert torch.equal(spoilt[~bad], clean[~bad])
    assert torch.equal(lse.transpose(1, 2)[~bad], clean_lse.transpose(1, 2)[~bad])


# --- properties -------------------------------------------------------------------------------------------------------

MODEST = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


SIZES = (8, 9, 24, 33, 40, 64)
"""Few, because each has codebooks of its own to compute."""


@MODEST
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape_attends_right(name: str, data: st.DataObject) -> None:
    draw = data.draw
    layout = PageLayout.of(*(draw(st.sampled_from(values)) for values in (FORMATS, SIZES, SIZES, PAGE_SIZES)))
    heads, group, num_queries = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    cache = make_cache(layout, lengths, heads, seed=draw(st.integers(0, 100)))
    few = st.lists(st.integers(0, 80), min_size=len(lengths), max_size=len(lengths))
    first, start = draw(st.none() | few), draw(st.none() | few)
    lag, window = draw(st.integers(0, 20)), draw(st.none() | st.integers(1, 80))
    softcap = draw(st.none() | st.floats(0.5, 50))
    q = noise(len(lengths), num_queries, heads * group, layout.head_size)
    with ops.backend(name):
        got = ops.decode_attention(
            q, cache.pages, cache.table, cache.lengths, layout, scale=0.2, lag=lag, window=window, softcap=softcap,
            first=None if first is None else torch.tensor(first),
            query_start=None if start is None else torch.tensor(start),
        )  # fmt: skip
    wanted = []
    for b, length in enumerate(lengths):
        begin, position = 0 if first is None else first[b], None if start is None else start[b]
        visible = sees(num_queries, length, query_start=position, first=begin, lag=lag, window=window)
        wanted.append(expected(q[b], *cache.vectors(b), visible, 0.2, softcap))
    assert_close(got, Expected.stack(wanted))


SAFE = sorted(set(CHANGES) - {"none", "beyond 32 bits"})
"""A length beyond 32 bits that is believed would be attended to for hours."""


@MODEST
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_whatever_is_changed_is_served_or_refused(call: str, name: str, data: st.DataObject) -> None:
    """Any change to one or two tensors: a result of the right shape, or an error of ours, and nothing else."""
    function, build = CALLS[call]
    arguments = build()
    tensors = [each for each, value in arguments.items() if isinstance(value, torch.Tensor)]
    for each in data.draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique=True)):
        change = data.draw(st.sampled_from(SAFE))
        if each == "mask" and change == "meta":
            continue  # has a test of its own, in a process of its own
        with contextlib.suppress(RuntimeError, IndexError):  # the change itself may not apply
            arguments[each] = CHANGES[change](arguments[each])
    with ops.backend(name):
        try:
            result = function(**arguments)
        except REFUSED:
            return
    if call.startswith(("decode", "prefill", "exact")):
        assert result[0].shape == (*arguments["q"].shape[:-1], 64)
        assert result[0].dtype == arguments["q"].dtype


@MODEST
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_numbers_are_stored_without_touching_a_neighbour(name: str, data: st.DataObject) -> None:
    """Whatever one token holds, the tokens before and after it, in the same call, are stored as beside a zero."""
    layout = PageLayout.of(data.draw(st.sampled_from(ALONE)), 16, page_size=16)
    special = st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e30, 3e38, float("nan"), float("inf"), -float("inf")])
    x = torch.tensor(data.draw(st.lists(st.floats(width=32) | special, min_size=16, max_size=16)))
    results = []
    for middle in (x, torch.zeros(16)):
        k, v = noise(3, 1, 16, seed=1), noise(3, 1, 16, seed=2)
        k[1, 0], v[1, 0] = middle, middle
        cache = empty_cache(layout, [3], heads=1)
        with ops.backend(name):
            ops.store_kv(k, v, cache.pages, cache.slots(0), layout)
        results.append(cache.records(cache.slots(0)))
    changed, zero = results
    assert torch.equal(changed[[0, 2]], zero[[0, 2]])
    for restored in layout.decode(changed[1]):
        assert restored.isnan().all() or not restored.isnan().any() or not x.isfinite().all()
