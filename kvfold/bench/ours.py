"""kvfold's own operations as contenders, and the check of what they compute.

Pages are filled with random bytes and plausible scales: every bit pattern is a valid code of 1 to 8 bits or of a
trellis, and storing gigabytes of vectors would take longer than timing them. Queries go in and outputs come out in the
model's basis, so the rotation of q and the un-rotation of the output are in the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from kvfold import ops
from kvfold.bench.cases import Case, DecodeCase, PrefillCase, StoreCase
from kvfold.bench.kernel import PREFILL_COPIES, Contender, Kernel, Setting, block_tables, lengths, queries
from kvfold.bench.report import Check
from kvfold.formats import SCALE_BYTES, TILE, KVFormat, Side
from kvfold.layout import PageLayout
from kvfold.ops.cuda import dense as prefill_engines

PRESCALES = (1, 3)
"""Candidates of the prescale search with which a store is timed."""
ERROR_LIMIT = 4e-3
"""Largest relative error of an output in bfloat16; rounding the exact one to bfloat16 alone makes 1.7e-3."""
DIFFERING_LIMIT = 1e-3
"""Largest share of a store's bytes that may differ from the reference's: coordinates within rounding of a threshold."""
_CHECKED_ROWS = 32


def contender(fmt: KVFormat, backend: str) -> Contender:
    """A format on one implementation of the operations."""
    return Contender(f"kvfold-{backend} {fmt}", partial(_prepare, fmt=fmt, backend=backend), ours=True)


def store_formats(fmt: KVFormat) -> list[KVFormat]:
    """The format with each count of prescale candidates of :data:`PRESCALES`."""

    def side(given: Side, count: int) -> Side:
        return replace(given, prescales=count) if given.family in ("lloyd", "trellis") else given

    return list(dict.fromkeys(replace(fmt, k=side(fmt.k, count), v=side(fmt.v, count)) for count in PRESCALES))


def _prepare(case: Case, setting: Setting, *, fmt: KVFormat, backend: str) -> Sequence[Kernel]:
    if isinstance(case, DecodeCase):
        return [_decode(case, setting, fmt, backend)]
    if isinstance(case, PrefillCase):
        return [_prefill(case, setting, fmt, backend)]
    return [_store(case, setting, fmt, backend)]


def random_pages(layout: PageLayout, num_pages: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """Pages of random codes; the scales are those of vectors whose coordinates are of size one, give or take 25 %.

    Key references are random as well, and of that size.
    """
    pages = torch.empty(layout.page_shape(num_pages, num_kv_heads), dtype=torch.uint8, device=device).random_(0, 256)
    tiles = pages[..., : layout.reference].unflatten(2, (-1, layout.tile_bytes))
    for offset, side in ((layout.k_scales, layout.format.k), (layout.v_scales, layout.format.v)):
        if side.scaled:
            tiles[..., offset : offset + TILE * SCALE_BYTES].view(torch.bfloat16).uniform_(0.75, 1.25)
    if layout.format.mean:
        # int8 codes of any value have a root mean square of 74
        pages[..., -SCALE_BYTES:].view(torch.bfloat16).uniform_(0.75 / 74, 1.25 / 74)
    return pages


# --- what is timed ----------------------------------------------------------------------------------------------------


def _decode(case: DecodeCase, setting: Setting, fmt: KVFormat, backend: str) -> Kernel:
    layout = PageLayout.of(fmt, case.head_size, None, setting.page_size)
    call_bytes = case.cache_bytes(fmt)
    tables, num_pages = block_tables(case, setting.decodes(case), setting.page_size, setting.device)
    pages = random_pages(layout, num_pages, case.num_kv_heads, setting.device)
    q, seq_lens = queries(case, setting.device), lengths(case, setting.device)
    with ops.backend(backend):  # a step's layers share it, as FlashAttention-3's do its metadata
        schedule = ops.schedule_decode(
            seq_lens, layout, case.num_heads, case.num_kv_heads, query_tokens=case.query_tokens
        )

    def call(table: torch.Tensor) -> object:
        with ops.backend(backend):
            return ops.decode_attention(
                q, pages, table, seq_lens, layout, scale=case.head_size**-0.5, inputs_ready=True, schedule=schedule
            )

    note = "inputs_ready, scheduled" if backend == "cuda" else ""
    return Kernel([partial(call, table) for table in tables], call_bytes, note)


@dataclass(frozen=True)
class _Chunk:
    """The tensors of a prefill of one sequence."""

    layout: PageLayout
    pages: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens: torch.Tensor

    def attend(self, table: torch.Tensor) -> torch.Tensor:
        out, _ = ops.prefill_attention(
            self.q, self.pages, table, self.context_lens, self.cu_seqlens, self.layout,
            scale=self.layout.head_size**-0.5, k=self.k, v=self.v,
        )  # fmt: skip
        return out


def _chunk(case: PrefillCase, setting: Setting, fmt: KVFormat, copies: int) -> tuple[_Chunk, torch.Tensor]:
    """A chunk, and the page tables ``[copies, 1, P]`` of its prefix."""
    device = setting.device
    layout = PageLayout.of(fmt, case.head_size, None, setting.page_size)
    tables, num_pages = block_tables(
        DecodeCase(case.name, (case.prefix,), case.num_heads, case.num_kv_heads, case.head_size),
        copies,
        setting.page_size,
        device,
    )
    chunk = _Chunk(
        layout=layout,
        pages=random_pages(layout, num_pages, case.num_kv_heads, device),
        q=torch.randn(case.chunk, case.num_heads, case.head_size, device=device, dtype=torch.bfloat16),
        k=torch.randn(case.chunk, case.num_kv_heads, case.head_size, device=device, dtype=torch.bfloat16),
        v=torch.randn(case.chunk, case.num_kv_heads, case.head_size, device=device, dtype=torch.bfloat16),
        context_lens=torch.tensor([case.prefix], device=device, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, case.chunk], device=device, dtype=torch.int32),
    )
    return chunk, tables


def _prefill(case: PrefillCase, setting: Setting, fmt: KVFormat, backend: str) -> Kernel:
    chunk, tables = _chunk(case, setting, fmt, PREFILL_COPIES)

    def call(table: torch.Tensor) -> object:
        with ops.backend(backend):
            return chunk.attend(table)

    note = f"chunk=exact, windows by {prefill_engines.choose(setting.device)}" if backend == "cuda" else "chunk=exact"
    return Kernel([partial(call, table) for table in tables], case.cache_bytes(fmt), note)


def _store(case: StoreCase, setting: Setting, fmt: KVFormat, backend: str) -> Kernel:
    layout = PageLayout.of(fmt, case.head_size, None, setting.page_size)
    call_bytes = case.input_bytes + case.cache_bytes(fmt)
    copies = setting.copies(call_bytes)
    k, v, slots, num_pages = store_inputs(case, copies, setting)
    pages = torch.zeros(layout.page_shape(num_pages, case.num_kv_heads), dtype=torch.uint8, device=setting.device)
    previous = _previous(layout, slots[0])

    def call(copy: int) -> None:
        with ops.backend(backend):
            ops.store_kv(k[copy], v[copy], pages, slots[copy], layout, previous=previous)

    return Kernel([partial(call, copy) for copy in range(copies)], call_bytes)


def _previous(layout: PageLayout, slots: torch.Tensor) -> torch.Tensor | None:
    """The page before each page that is opened, where the format wants it: none, as if each began a sequence."""
    return torch.full_like(slots, -1) if layout.format.mean else None


def store_inputs(
    case: StoreCase, copies: int, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """K and V, bfloat16 ``[copies, T, H, d]``; their slots, int64 ``[copies, T]``; the number of pages.

    Up to a page of tokens they are of as many decoding sequences, and lie anywhere. More are a prompt's: they fill
    pages in order, and the pages lie anywhere.
    """
    shape = (copies, case.tokens, case.num_kv_heads, case.head_size)
    k, v = (torch.randn(shape, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    num_pages = -(-copies * case.tokens // setting.page_size)
    if case.tokens <= setting.page_size:
        slots = torch.randperm(num_pages * setting.page_size, device=setting.device)
    else:
        first = torch.randperm(num_pages, device=setting.device) * setting.page_size
        slots = (first[:, None] + torch.arange(setting.page_size, device=setting.device)).flatten()
    slots = slots[: copies * case.tokens]
    return k, v, slots.view(copies, case.tokens), num_pages


# --- what is checked --------------------------------------------------------------------------------------------------


def check(case: Case, setting: Setting, fmt: KVFormat, backend: str) -> Check:
    """Compare kvfold's output on one implementation with float64 attention over ``ops.load_kv``, or its bytes.

    Raises:
        FormatError: The implementation does not serve this format or device.
    """
    name = contender(fmt, backend).name
    if isinstance(case, StoreCase):
        share = _check_store(case, setting, fmt, backend)
        return Check(case.name, name, "differing bytes", share, DIFFERING_LIMIT)
    if isinstance(case, DecodeCase):
        error = _check_decode(case, setting, fmt, backend)
    else:
        error = _check_prefill(case, setting, fmt, backend)
    return Check(case.name, name, "relative error", error, ERROR_LIMIT)


def _check_decode(whole: DecodeCase, setting: Setting, fmt: KVFormat, backend: str) -> float:
    case = whole.reduced()
    layout = PageLayout.of(fmt, case.head_size, None, setting.page_size)
    tables, num_pages = block_tables(case, 1, setting.page_size, setting.device)
    pages = random_pages(layout, num_pages, case.num_kv_heads, setting.device)
    q, seq_lens = queries(case, setting.device), lengths(case, setting.device)
    with ops.backend(backend):
        out, _ = ops.decode_attention(q, pages, tables[0], seq_lens, layout, scale=case.head_size**-0.5)
    wanted = []
    for b, length in enumerate(case.lengths):
        with ops.backend("reference"):
            k, v = ops.load_kv(pages, tables[0, b : b + 1], layout, length)
        wanted.append(dense(q[b], k[0], v[0], length - case.query_tokens))
    return relative_error(out, torch.stack(wanted))


def _check_prefill(case: PrefillCase, setting: Setting, fmt: KVFormat, backend: str) -> float:
    chunk, tables = _chunk(case, setting, fmt, 1)
    with ops.backend(backend):
        out = chunk.attend(tables[0])
    with ops.backend("reference"):
        k, v = ops.load_kv(chunk.pages, tables[0], chunk.layout, case.prefix)
    k, v = torch.cat([k[0], chunk.k.float()]), torch.cat([v[0], chunk.v.float()])
    last = case.chunk - _CHECKED_ROWS
    got = torch.cat([out[:_CHECKED_ROWS], out[last:]])
    wanted = [dense(chunk.q[row : row + _CHECKED_ROWS], k, v, case.prefix + row) for row in (0, last)]
    return relative_error(got, torch.cat(wanted))


def _check_store(case: StoreCase, setting: Setting, fmt: KVFormat, backend: str) -> float:
    layout = PageLayout.of(fmt, case.head_size, None, setting.page_size)
    k, v, slots, num_pages = store_inputs(case, 1, setting)
    got, wanted = (
        torch.zeros(layout.page_shape(num_pages, case.num_kv_heads), dtype=torch.uint8, device=setting.device)
        for _ in range(2)
    )
    for name, pages in ((backend, got), ("reference", wanted)):
        with ops.backend(name):
            ops.store_kv(k[0], v[0], pages, slots[0], layout, previous=_previous(layout, slots[0]))
    return float((got != wanted).sum()) / case.cache_bytes(fmt)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_start: int) -> torch.Tensor:
    """Causal attention in float64 of q ``[Tq, Hq, d]``, which begins at ``query_start``, to K and V ``[n, H, d]``."""
    num_kv_heads = k.shape[1]
    grouped = q.double().unflatten(1, (num_kv_heads, -1)) * k.shape[2] ** -0.5  # [Tq, H, group, d]
    position = query_start + torch.arange(len(q), device=q.device)
    hidden = torch.arange(len(k), device=q.device) > position[:, None]
    out = []
    for head in range(num_kv_heads):
        scores = torch.einsum("tgd,nd->tgn", grouped[:, head], k[:, head].double())
        weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), dim=-1)
        out.append(weights @ v[:, head].double())
    return torch.cat(out, dim=1)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted))
