"""The operations as torch custom ops: schema, fake kernels, and a compiled step that gives what eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_cases import make_cache, noise

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops import library
from kvfold.ops.library import LayoutName
from kvfold.ops.options import AttentionOptions

NAME = LayoutName("k4v3", 32, 64, 16)
"""K and V differ in size, so that a fake kernel that confuses them is found out."""
MEAN = LayoutName("k3tv4+mean", 32, 64, 16)


def decode_arguments(**changes: Any) -> tuple[Any, ...]:
    cache = make_cache(NAME.layout(), (20, 7))
    arguments = {
        "q": noise(2, 3, 4, 32), "pages": cache.pages, "block_table": cache.table, "seq_lens": cache.lengths,
        "format": NAME.format, "head_size_v": 64, "page_size": 16, "scale": 0.2, "first": None, "query_start": None,
        "lag": 0, "window": None, "softcap": None, "mask": None,
        "batch_invariant": False,
        "inputs_ready": False,
    }  # fmt: skip
    return tuple((arguments | changes).values())


def prefill_arguments(exact: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    cache = make_cache(NAME.layout(), (20, 7))
    own = (noise(9, 2, 32, seed=1), noise(9, 2, 64, seed=2)) if exact else (None, None)
    return (
        noise(9, 4, 32, dtype=dtype), cache.pages, cache.table, cache.lengths, torch.tensor([0, 5, 9]), NAME.format, 64,
        16, 0.2, *own, None, None, None,
    )  # fmt: skip


def store_arguments(name: LayoutName = NAME) -> tuple[Any, ...]:
    cache = make_cache(name.layout(), (20,))
    slots, previous = torch.tensor([3, 17, -1, 32, 33]), torch.tensor([0, 0, 0, 1, 0])
    if name is NAME:
        return noise(5, 2, 32), noise(5, 2, 64), cache.pages, slots, None, name.format, 16
    return noise(5, 2, 32), noise(5, 2, 64), cache.pages, slots, previous, name.format, 16


def load_arguments() -> tuple[Any, ...]:
    cache = make_cache(NAME.layout(), (20, 20))
    return cache.pages, cache.table, 18, *NAME


CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "store_kv": (torch.ops.kvfold.store_kv, store_arguments),
    "store_kv-mean": (torch.ops.kvfold.store_kv, lambda: store_arguments(MEAN)),
    "load_kv": (torch.ops.kvfold.load_kv, load_arguments),
    "decode": (torch.ops.kvfold.decode_attention, decode_arguments),
    "decode-bfloat16": (
        torch.ops.kvfold.decode_attention,
        lambda: decode_arguments(q=noise(2, 3, 4, 32, dtype=torch.bfloat16)),
    ),
    "decode-everything": (
        torch.ops.kvfold.decode_attention,
        lambda: decode_arguments(
            first=torch.tensor([1, 0]), query_start=torch.tensor([17, 5]), lag=1, window=9, softcap=3.0,
            mask=torch.rand(2, 3, 20) < 0.7,
        ),
    ),
    "prefill-exact": (torch.ops.kvfold.prefill_attention, lambda: prefill_arguments(True)),
    "prefill-packed": (torch.ops.kvfold.prefill_attention, lambda: prefill_arguments(False, torch.float16)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, backend: str) -> None:
    op, arguments = CASES[case]
    torch.library.opcheck(op.default, arguments())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("store_kv")])
def test_fake_kernels_promise_what_comes(case: str, backend: str) -> None:
    """Shape, dtype and strides: what a compiled graph plans with."""
    op, build = CASES[case]
    arguments = build()
    real = op(*arguments)
    fake = op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor,
    previous: torch.Tensor | None, table: torch.Tensor, lengths: torch.Tensor, name: LayoutName,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What an engine's decode step does: store its token, then attend, twice to see that pages are not cached."""
    library.store_kv(k, v, pages, slots, previous, name)
    out, lse = library.decode_attention(q * 2, pages, table, lengths, name, AttentionOptions(0.2, window=30))
    library.store_kv(k.flip(0), v, pages, slots, previous, name)
    again, _ = library.decode_attention(q, pages, table, lengths, name, AttentionOptions(0.2))
    return out + again, lse


@pytest.mark.parametrize("name", [NAME, MEAN], ids=lambda name: name.format)
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_a_compiled_step_gives_what_eager_gives(engine: str, name: LayoutName, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=engine)
    for batch in (2, 3):  # the second size makes the graph dynamic
        cache = make_cache(name.layout(), [17] * batch)  # of which the last opens a page
        slots = torch.stack([cache.slots(b)[-1] for b in range(batch)])
        previous = cache.table[:, 0].long() if name is MEAN else None
        q, k, v = noise(batch, 1, 4, 32), noise(batch, 2, 32, seed=1), noise(batch, 2, 64, seed=2)
        pages = cache.pages.clone()
        want = step(q, k, v, pages, slots, previous, cache.table, cache.lengths, name)
        compiled_pages = cache.pages.clone()
        got = compiled(q, k, v, compiled_pages, slots, previous, cache.table, cache.lengths, name)
        assert torch.equal(compiled_pages, pages)
        assert not torch.equal(pages, cache.pages)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


def prefill_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    context = torch.tensor([20, 7])
    exact = library.prefill_attention(q, pages, table, context, bounds, NAME, k, v, AttentionOptions(0.2, softcap=5.0))
    packed = library.prefill_attention(
        q, pages, table, context, bounds, NAME, None, None, AttentionOptions(0.2, window=5)
    )
    return (*exact, *packed, *library.load_kv(pages, table, NAME, 18))


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_a_compiled_prefill_gives_what_eager_gives(engine: str, backend: str) -> None:
    torch._dynamo.reset()
    cache = make_cache(NAME.layout(), (20, 7))
    arguments = (
        noise(9, 4, 32), noise(9, 2, 32, seed=1), noise(9, 2, 64, seed=2), cache.pages.fill_(0), cache.table,
        torch.tensor([0, 5, 9]),
    )  # fmt: skip
    compiled = torch.compile(prefill_step, fullgraph=True, backend=engine)
    for x, y in zip(compiled(*arguments), prefill_step(*arguments), strict=True):
        assert torch.equal(x, y)


def test_eager_calls_are_the_plain_functions(backend: str) -> None:
    cache = make_cache(NAME.layout(), (20, 7))
    q = noise(2, 3, 4, 32)
    options: dict[str, Any] = {
        "scale": 0.2, "first": torch.tensor([1, 0]), "query_start": torch.tensor([17, 5]), "lag": 1, "window": 9,
        "softcap": 3.0, "mask": torch.rand(2, 3, 20) < 0.7, "batch_invariant": False, "inputs_ready": False,
    }  # fmt: skip
    plain = ops.decode_attention(q, cache.pages, cache.table, cache.lengths, NAME.layout(), **options)
    eager = library.decode_attention(q, cache.pages, cache.table, cache.lengths, NAME, AttentionOptions(**options))
    custom = torch.ops.kvfold.decode_attention(
        q, cache.pages, cache.table, cache.lengths, NAME.format, NAME.head_size_v, NAME.page_size, *options.values()
    )
    for x, y, z in zip(plain, eager, custom, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_a_layout_name_is_the_layout() -> None:
    assert NAME.layout() == PageLayout.of("k4v3", 32, 64, 16)
