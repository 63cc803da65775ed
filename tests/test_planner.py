"""The planner against figures worked out by hand, against the allocated layout, and against its own promise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold import planner
from kvfold.errors import FormatError, NotBuiltError, UnsupportedModelError
from kvfold.layerformats import ModelFormat
from kvfold.layout import PageLayout
from kvfold.planner import LayerGroup, ModelShape, PlanError, cache_bytes, parse_memory, plan

QWEN3_8B = ModelShape.uniform(36, 8, 128)
GEMMA3_1B = ModelShape((LayerGroup("sliding", 22, 1, 256, 256, 512), LayerGroup("full", 4, 1, 256, 256)))
MISTRAL_V01 = ModelShape((LayerGroup("sliding", 32, 8, 128, 128, 4096),))
DEEPSEEK_V3 = ModelShape.uniform(61, 1, 512, 64)
GIB = 2**30

# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "token"),  # bytes of a token of one KV head, d = 128: codes + scales
    [("bf16", 512), ("fp8", 260), ("k8v4", 128 + 64 + 4), ("k4v4", 132), ("k4v2", 64 + 32 + 4), ("k2v2", 68)],
)
def test_qwen3_8b(format: str, token: int) -> None:
    assert cache_bytes(QWEN3_8B, format, 64) == 64 * token * 8 * 36
    row = plan(QWEN3_8B, 40 * GIB, 32768, [format])[-1 if format not in planner.BASELINES else format == "fp8"]
    assert row.bytes_per_token == token * 8 * 36
    assert row.bits_per_element == 8 * token / 256
    assert row.tokens == 40 * GIB // (64 * token * 288) * 64
    assert row.requests == 40 * GIB // (32768 * token * 288)


def test_qwen3_8b_figures() -> None:
    """The figures that the README and the docs quote."""
    bf16, fp8, k4v4 = plan(QWEN3_8B, 40 * GIB, 32768, ["k4v4"])
    assert (bf16.bytes_per_token, bf16.requests, bf16.ratio) == (147456, 8, 1.0)
    assert (fp8.bytes_per_token, fp8.requests) == (74880, 17)
    assert (k4v4.bytes_per_token, k4v4.requests) == (38016, 34)
    assert k4v4.ratio == pytest.approx(3.88, abs=0.005)
    assert k4v4.tokens is not None
    assert bf16.tokens is not None
    assert k4v4.ratio == k4v4.tokens / bf16.tokens


def test_pages_are_whole() -> None:
    for page_size in (16, 32, 64):
        one = cache_bytes(QWEN3_8B, "k4v4", 1, page_size)
        assert one == page_size * 38016
        assert cache_bytes(QWEN3_8B, "k4v4", page_size, page_size) == one
        assert cache_bytes(QWEN3_8B, "k4v4", page_size + 1, page_size) == 2 * one
    assert cache_bytes(QWEN3_8B, "k4v4", 0) == 0


def test_sequences_have_their_own_pages_sinks_and_tail() -> None:
    exact = (4 + 128) * 256 * 2 * 8 * 36
    assert cache_bytes(QWEN3_8B, "k4v4+sinks4+tail128", 100) == 128 * 38016 + exact
    assert cache_bytes(QWEN3_8B, "k4v4+sinks4+tail128", 100, sequences=7) == 7 * (128 * 38016 + exact)
    assert cache_bytes(QWEN3_8B, "k4v4", 100, sequences=0) == 0
    row = plan(QWEN3_8B, 40 * GIB, 32768, ["k4v4+sinks4+tail128"])[-1]
    assert row.requests == 40 * GIB // (32768 * 38016 + exact)
    assert row.bytes_per_token == 38016


def test_exact_tokens_and_windows_have_the_models_dtype() -> None:
    float32 = ModelShape(GEMMA3_1B.groups, itemsize=4)
    assert cache_bytes(float32, "k4v4", 64) - cache_bytes(GEMMA3_1B, "k4v4", 64) == 22 * 64 * 512 * 2
    assert cache_bytes(float32, "k4v4+tail128", 64) - cache_bytes(float32, "k4v4", 64) == 4 * 128 * 512 * 4


def test_sliding_layers_are_not_compressed_and_stop_growing() -> None:
    for tokens in (64, 512, 6400):
        windows = 22 * min(tokens, 512) * 2 * 256 * 2
        assert cache_bytes(GEMMA3_1B, "k4v4", tokens) == windows + 4 * tokens * (2 * 128 + 4)
        assert cache_bytes(GEMMA3_1B, "bf16", tokens) == windows + 4 * tokens * 1024
    row = plan(GEMMA3_1B, GIB, 4096, ["k4v4"])[-1]
    assert (row.compressed_layers, row.uncompressed_layers) == (4, 22)
    assert row.uncompressed == ("22 sliding (1 KV head of 256, window 512)",)
    assert row.bits_per_element == 8 * 260 / 512
    assert row.ratio is not None
    assert row.ratio < 1024 / 260  # the windows take their share


def test_layers_without_a_cache_cost_nothing() -> None:
    full = LayerGroup("full", 12, 2, 256, 256)
    shape = ModelShape((LayerGroup("linear", 36), full, LayerGroup("shared", 3)))
    assert cache_bytes(shape, "k4v4", 1000) == cache_bytes(ModelShape((full,)), "k4v4", 1000)
    assert plan(shape, GIB, 1000)[0].uncompressed == ("36 linear", "3 shared")


def test_k_and_v_of_different_sizes() -> None:
    assert cache_bytes(DEEPSEEK_V3, "k4v4", 64) == 64 * 61 * (256 + 32 + 4)
    assert plan(DEEPSEEK_V3, GIB, 64, ["k4v4"])[-1].bits_per_element == 8 * 292 / 576


def test_a_cache_that_stops_growing_has_no_limit() -> None:
    enough = 32 * 4096 * 8 * 2 * 128 * 2
    for memory, limited in ((enough, False), (enough - 1, True)):
        bf16, fp8 = plan(MISTRAL_V01, memory, 8192, [])
        assert (bf16.tokens is not None) is limited
        assert (bf16.bytes_per_token, bf16.bits_per_element) == (0, None)
        assert fp8.requests == (0 if limited else 1)
    assert bf16.tokens == 4096 - 64
    assert plan(MISTRAL_V01, enough, 8192, [])[0].ratio is None


def test_memory_that_holds_nothing() -> None:
    bf16, _, k4v4 = plan(QWEN3_8B, 1000, 100, ["k4v4+sinks4"])
    assert (bf16.tokens, bf16.requests, bf16.ratio) == (0, 0, None)
    assert (k4v4.tokens, k4v4.requests, k4v4.ratio) == (0, 0, None)


def test_rows_begin_with_the_baselines_and_have_no_doubles() -> None:
    rows = plan(QWEN3_8B, GIB, 100, ["k4v4", "turboquant", 4, "bf16", {"k": 8, "v": 4}])
    assert [str(row.format) for row in rows] == ["kbf16vbf16", "kf8vf8", "k4v4", "k8v4"]
    assert len(plan(QWEN3_8B, GIB, 100)) == 2 + len(planner.DEFAULT_FORMATS)


# --- what is planned is what is allocated -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", ["bf16", "exact", "fp8", "fp8_cast", "k4v4", "k3v5", "kf8v1", "k3tv2t", "k4v4+mean", "k2tvf8+mean"]
)
@pytest.mark.parametrize("sizes", [(128, 128), (80, 80), (512, 64), (9, 31)])
def test_equals_the_layout(format: str, sizes: tuple[int, int]) -> None:
    for page_size in (16, 32, 64):
        page = PageLayout.of(format, *sizes, page_size=page_size)
        shape = ModelShape.uniform(3, 2, *sizes)
        pages, heads, page_bytes = page.page_shape(5, 2)
        assert cache_bytes(shape, format, 5 * page_size, page_size) == 3 * pages * heads * page_bytes


def test_refuses_the_heads_that_the_layout_refuses() -> None:
    with pytest.raises(FormatError, match="too small for k4v4"):
        PageLayout.of("k4v4", 7)
    small = ModelShape.uniform(1, 1, 7)
    with pytest.raises(FormatError, match="too small for k4v4"):
        cache_bytes(small, "k4v4", 1)
    assert cache_bytes(small, "exact", 16, 16) == 16 * 7 * 8


# --- the promise: what is said to fit fits, and a page more does not --------------------------------------------------

COUNT, SIZE = st.integers(1, 9), st.integers(8, 300)
GROUPS = st.one_of(
    st.builds(LayerGroup, st.just("full"), COUNT, COUNT, SIZE, SIZE),
    st.builds(LayerGroup, st.just("sliding"), COUNT, COUNT, SIZE, SIZE, st.integers(1, 5000)),
    st.builds(LayerGroup, st.sampled_from(["linear", "shared"]), COUNT),
)
SHAPES = st.builds(ModelShape, st.lists(GROUPS, min_size=1, max_size=4).map(tuple), st.sampled_from([2, 4]))
FORMATS = st.sampled_from(["bf16", "fp8", "k4v4", "k2v3+sinks4", "k8v1+tail100"])


@settings(max_examples=200, deadline=None)
@given(SHAPES, FORMATS, st.integers(1, 10**10), st.integers(1, 10**6), st.sampled_from([16, 32, 64]))
def test_what_fits_fits(shape: ModelShape, format: str, memory: int, context: int, page_size: int) -> None:
    if not any(group.kind in ("full", "sliding") for group in shape.groups):
        with pytest.raises(UnsupportedModelError):
            plan(shape, memory, context)
        return
    fmt = ModelFormat.parse(format)
    row = next(row for row in plan(shape, memory, context, [format], page_size) if row.format == fmt)
    assert cache_bytes(shape, fmt, context, page_size, row.requests) <= memory
    assert cache_bytes(shape, fmt, context, page_size, row.requests + 1) > memory
    if row.tokens is None:
        assert not shape.compressed
        assert cache_bytes(shape, fmt, 10**12, page_size) <= memory
        return
    assert row.tokens % page_size == 0
    assert row.tokens == 0 or cache_bytes(shape, fmt, row.tokens, page_size) <= memory
    assert cache_bytes(shape, fmt, row.tokens + page_size, page_size) > memory


# --- sizes of memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("40GiB", 40 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 TiB", 3 * 2**39),
        (" 24gb ", 24 * 10**9),
        ("0.1GB", 10**8),  # exact: no binary fraction in between
        ("7", 7),
        ("7B", 7),
        ("1KB", 1000),
        ("1kib", 1024),
        (123, 123),
    ],
)
def test_memory(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("40G", "40GB .* or 40GiB"),
        ("40gi", "40GB .* or 40GiB"),
        ("40 XB", "unknown unit"),
        ("much", "not a size"),
        ("", "not a size"),
        ("-1GB", "not a size"),
        ("1e3GB", "not a size"),
        ("1,5GB", "not a size"),
        ("0", "whole number from 1"),
        ("0.1B", "whole number from 1"),
        (0, "whole number from 1"),
        (True, "whole number from 1"),
    ],
)
def test_memory_that_is_none(text: str | int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        parse_memory(text)


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_input() -> None:
    for tokens in (-1, 1.5, True):
        with pytest.raises(PlanError, match="tokens"):
            cache_bytes(QWEN3_8B, "k4v4", tokens)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="sequences"):
        cache_bytes(QWEN3_8B, "k4v4", 1, sequences=-1)
    with pytest.raises(PlanError, match="memory"):
        plan(QWEN3_8B, 0, 1)
    with pytest.raises(PlanError, match="context"):
        plan(QWEN3_8B, 1, 0)
    with pytest.raises(FormatError, match="page_size"):
        plan(QWEN3_8B, 1, 1, page_size=48)
    with pytest.raises(FormatError, match="did you mean"):
        plan(QWEN3_8B, 1, 1, ["k9v9"])
    with pytest.raises(NotBuiltError, match="not built yet"):
        plan(QWEN3_8B, 1, 1, ["k4qv4q"])
    with pytest.raises(UnsupportedModelError, match="nothing to plan"):
        plan(ModelShape((LayerGroup("linear", 24),)), 1, 1)
