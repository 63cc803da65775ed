"""The four operations on pages: store, decode attention, prefill attention, load.

Each function here checks its arguments and hands them to an implementation, chosen by :func:`choose`; the reference in
:mod:`kvfold.ops.reference` specifies them. Shapes, everywhere:

    B   sequences              H    KV heads            dk, dv   head sizes of K and V
    Tq  query tokens           Hq   query heads         P        pages of the longest sequence
    T   tokens of all sequences of a batch, one after the other

``pages`` is uint8 ``[num_pages, H, page_bytes]`` (:class:`~kvfold.layout.PageLayout`); a *slot* is
``page * page_size + offset``; ``block_table`` ``[B, P]`` lists each sequence's pages in order. Nothing reads a page
beyond a sequence's length, so unwritten pages and unused table entries may hold anything (entries must be valid pages).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from kvfold.errors import FormatError, ShapeError
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.lengths import remember_lengths
from kvfold.ops.options import AttentionOptions, DecodeSchedule
from kvfold.ops.reference import apply_sink_logits, merge_states

__all__ = [
    "apply_sink_logits",
    "backend",
    "choose",
    "decode_attention",
    "exact_attention",
    "load_kv",
    "merge_states",
    "prefill_attention",
    "remember_lengths",
    "schedule_decode",
    "store_kv",
]

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_wanted: ContextVar[str] = ContextVar("kvfold_backend", default="auto")


def choose(device: torch.device, layout: PageLayout) -> ModuleType:
    """The implementation for pages of a layout on a device.

    On the CPU numba's kernels where numba is installed. On a GPU the CUDA kernels where the chip (sm_90) and the format
    are those they are built for, else the Triton kernels, else the PyTorch reference, which is slow and says so once.
    Override it for a block of code with :func:`backend`.

    Raises:
        FormatError: The backend that was asked for cannot serve these pages on this device; the message says why.
    """
    wanted = _wanted.get()
    if wanted == "reference":
        return reference
    if wanted != "auto":
        reason = _why_not(wanted, device, layout)
        if reason:
            raise FormatError(
                f"backend {wanted!r} cannot serve this: {reason}; ops.backend('auto') chooses one that can"
            )
        return _module(wanted)
    reasons = []
    for name in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        reason = _why_not(name, device, layout)
        if not reason:
            return _module(name)
        reasons.append(reason)
    _slow(device.type, str(layout.format), "; ".join(reasons))
    return reference


def _why_not(name: str, device: torch.device, layout: PageLayout) -> str | None:
    """Why a backend cannot serve pages of a layout on a device, or None if it can."""
    try:
        module = _module(name)
    except ImportError as error:
        extra = {"cpu": "cpu", "triton": "triton", "cuda": "cuda"}[name]
        return f"{error.name or error} is not installed (pip install 'kvfold[{extra}]')"
    return module.available(device) or module.supports(layout)


@lru_cache(maxsize=8)
def _module(name: str) -> ModuleType:
    return import_module(f"kvfold.ops.{name}")


@lru_cache(maxsize=256)
def _slow(device: str, fmt: str, reasons: str) -> None:
    """Say once for each cause that the reference has to do."""
    logging.getLogger("kvfold").warning("%s on %s runs on the slow PyTorch reference: %s", fmt, device, reasons)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one implementation inside a ``with`` block: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Raises:
        FormatError: The name is unknown.
    """
    if name not in BACKENDS:
        raise FormatError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, *,
    previous: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Rotate, quantise and pack vectors, and write them into their slots of the pages, in place.

    In a ``+mean`` format the first slot of a page opens it: the page's key reference is chosen then
    (:mod:`kvfold.ops.references`). So the first slot is the first that is written, and a sequence's tokens are
    consecutive here, in order.

    Args:
        k: ``[T, H, dk]``, any floating dtype and strides.
        v: ``[T, H, dv]``.
        pages: uint8 ``[num_pages, H, page_bytes]``, contiguous.
        slots: int64 ``[T]``, all different; a negative slot's token is dropped.
        layout: The layout of the pages.
        previous: int64 ``[T]``, of a ``+mean`` format only, which needs it: of tokens in the first slot of a page the
            page before it in their sequence, or -1; of others anything.

    Raises:
        ShapeError: A tensor has the wrong shape, dtype or device, or ``previous`` is missing.
    """
    _check_pages(pages, layout)
    heads = pages.shape[1]
    _check("k", k, (None, heads, layout.head_size), pages.device)
    _check("v", v, (k.shape[0], heads, layout.head_size_v), pages.device)
    _check_integer("slots", slots, (k.shape[0],), pages.device, torch.int64)
    if not len(slots):
        return
    if pages.device.type == "cpu" and int(slots.max()) >= len(pages) * layout.page_size:
        raise ShapeError(f"slot {int(slots.max())} lies beyond the {len(pages)} pages of {layout.page_size} tokens")
    implementation = choose(pages.device, layout)
    if not layout.format.mean:
        implementation.store_kv(k, v, pages, slots, layout)
        return
    if previous is None:
        raise ShapeError(f"{layout.format} has key references: store_kv needs previous, the page before each new page")
    _check_integer("previous", previous, (k.shape[0],), pages.device, torch.int64)
    if pages.device.type == "cpu":
        opening = (slots >= 0) & (slots % layout.page_size == 0)
        if bool((previous[opening] >= len(pages)).any()):
            raise ShapeError(f"previous names pages beyond the {len(pages)} that there are")
    implementation.store_kv(k, v, pages, slots, layout, previous)


def load_kv(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """De-quantise the first tokens of some sequences, in the model's basis.

    Args:
        pages: uint8 ``[num_pages, H, page_bytes]``.
        block_table: int32 or int64 ``[B, P]``.
        tokens: How many tokens of each sequence, at most ``P * page_size``.

    Returns:
        K ``[B, tokens, H, dk]`` and V ``[B, tokens, H, dv]`` in float32.

    Raises:
        ShapeError: A tensor has the wrong shape, dtype or device, or the table is too short.
    """
    _check_pages(pages, layout)
    _check_integer("block_table", block_table, (None, None), pages.device)
    if not 0 <= tokens <= block_table.shape[1] * layout.page_size:
        raise ShapeError(f"{tokens} tokens do not fit {block_table.shape[1]} pages of {layout.page_size}")
    if not len(block_table):
        shape = (0, tokens, pages.shape[1])
        return pages.new_empty(*shape, layout.head_size, dtype=torch.float32), pages.new_empty(
            *shape, layout.head_size_v, dtype=torch.float32
        )
    _check_pages_read(pages, block_table, torch.full((len(block_table),), tokens), layout)
    k, v = choose(pages.device, layout).load_kv(pages, block_table, layout, tokens)
    return k, v


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    scale: float,
    first: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    lag: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    batch_invariant: bool = False,
    inputs_ready: bool = False,
    schedule: DecodeSchedule | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few query tokens per sequence to packed pages.

    The query t of sequence b has position ``p = query_start[b] + t`` and sees the token at position j if
    ``first[b] <= j < seq_lens[b]``, ``j <= p - lag``, ``j > p - window`` and ``mask[b, t, j]``.

    Args:
        q: ``[B, Tq, Hq, dk]`` in the model's basis, Hq a multiple of H: query head i uses KV head ``i // (Hq // H)``.
        block_table: int32 ``[B, P]``.
        seq_lens: int32 or int64 ``[B]``, tokens in the pages.
        scale: Factor of the scores, usually ``dk ** -0.5``.
        first: ``[B]`` first visible position; default 0.
        query_start: ``[B]`` position of the first query; default ``seq_lens - Tq``, the queries being the last tokens.
        lag: Tokens closer than this to the query are left to somebody else, who has them exact.
        window: Visible tokens per query, its own included.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        mask: bool ``[B, Tq, >= max(seq_lens)]``.
        batch_invariant: Whether the bits of a sequence's result may not depend on what else is in the batch. On a GPU
            that costs speed, as work is dealt out by sequence; the CPU's implementations always are.
        inputs_ready: The caller's promise that all tensors but the pages were complete before the kernel that precedes
            this call on its stream began, the schedule's among them, as they are where that is :func:`store_kv`'s. With
            a schedule, or in batch-invariant mode, the CUDA kernel then reads them while that kernel still runs; others
            take no notice. A broken promise reads old values, of which an old schedule is the worst.
        schedule: What :func:`schedule_decode` made of the same lengths and options. Without one the CUDA kernel's
            launch is preceded by one that makes it. Where lengths or other positions have changed since, anything may
            happen: wrong results, faults, a kernel that never ends. In batch-invariant mode it is not looked at.
        out: Where the result is to be written: ``[B, Tq, Hq, dv]`` of q's dtype, contiguous. It is returned then.

    Returns:
        out ``[B, Tq, Hq, dv]`` in q's dtype and the model's basis, and the scores' log-sum-exp ``[B, Hq, Tq]`` in
        float32 (natural logarithm); a query that sees nothing gets 0 and -inf. Partial results over disjoint tokens
        are joined by :func:`merge_states`.

    Raises:
        ShapeError: A tensor has the wrong shape, dtype or device; the schedule was made for another call.
    """
    _check_pages(pages, layout)
    _check("q", q, (None, None, None, layout.head_size), pages.device)
    batch = q.shape[0]
    _check_groups(q.shape[2], pages.shape[1])
    _check_integer("block_table", block_table, (batch, None), pages.device)
    for name, positions in (("seq_lens", seq_lens), ("first", first), ("query_start", query_start)):
        if positions is not None:
            _check_integer(name, positions, (batch,), pages.device)
    _check_mask(mask, (batch, q.shape[1]), pages.device)
    _check_options(window, softcap)
    _check_out(out, q, layout)
    if not (batch and q.shape[1]):
        return q.new_empty(*q.shape[:3], layout.head_size_v) if out is None else out, q.new_empty(
            batch, q.shape[2], q.shape[1], dtype=torch.float32
        )
    _check_pages_read(pages, block_table, seq_lens, layout, mask)
    options = AttentionOptions(scale, first, query_start, lag, window, softcap, mask, batch_invariant, inputs_ready)
    implementation = choose(pages.device, layout)
    more: dict[str, object] = {}
    if schedule is not None and implementation.SCHEDULES and not batch_invariant:
        if not isinstance(schedule, DecodeSchedule):
            raise ShapeError(f"a schedule is what schedule_decode returns, not a {type(schedule).__name__}")
        group = q.shape[2] // pages.shape[1]
        wanted = DecodeSchedule(  # of a tensor that only tells the device
            seq_lens, batch, q.shape[1], pages.shape[1], group, lag, window, first is not None, query_start is not None
        )
        if wrong := schedule.differences(wanted):
            raise ShapeError(f"the schedule was made for {wrong}; schedule_decode makes one for this call")
        more["made"] = schedule
    if out is not None and implementation.WRITES_OUT:
        _, lse = implementation.decode_attention(q, pages, block_table, seq_lens, layout, options, out=out, **more)
        return out, lse
    result, lse = implementation.decode_attention(q, pages, block_table, seq_lens, layout, options, **more)
    return result if out is None else out.copy_(result), lse


def schedule_decode(
    seq_lens: torch.Tensor,
    layout: PageLayout,
    num_heads: int,
    num_kv_heads: int,
    *,
    query_tokens: int = 1,
    first: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    lag: int = 0,
    window: int | None = None,
    out: DecodeSchedule | None = None,
) -> DecodeSchedule | None:
    """Deal out, once, the work of all :func:`decode_attention` that will see the same lengths: of a step's layers.

    It is one launch on the current stream, which waits for nothing. A captured graph that has been given a schedule
    serves any lengths if ``out`` renews the schedule before each replay, for as many sequences as the graph's call has
    or for the first ones, the others being of length 0; never for more. Between this and a decode with
    ``inputs_ready`` there has to be another kernel.

    Args:
        seq_lens: int32 or int64 ``[B]``, on the device of the pages.
        layout: Of the pages.
        num_heads: Query heads (Hq). num_kv_heads: KV heads (H).
        query_tokens: Of a sequence (Tq).
        first, query_start, lag, window: As they will be passed to :func:`decode_attention`.
        out: A schedule of as many query tokens and heads and of the same options, whose memory is written again.

    Returns:
        The schedule, or None if the implementation that :func:`choose` takes has no use for one.

    Raises:
        ShapeError: A tensor has the wrong shape, dtype or device; there are no query tokens; ``out`` is a schedule of
            other heads, query tokens or options.
    """
    _check_integer("seq_lens", seq_lens, (None,), seq_lens.device)
    for name, positions in (("first", first), ("query_start", query_start)):
        if positions is not None:
            _check_integer(name, positions, (seq_lens.shape[0],), seq_lens.device)
    _check_groups(num_heads, num_kv_heads)
    _check_options(window, None)
    if query_tokens < 1:
        raise ShapeError(f"a schedule is of 1 query token or more of a sequence, not of {query_tokens}")
    implementation = choose(seq_lens.device, layout)
    if not implementation.SCHEDULES:
        return None
    made = DecodeSchedule(
        seq_lens, len(seq_lens), query_tokens, num_kv_heads, num_heads // num_kv_heads, lag, window, first is not None,
        query_start is not None,
    )  # fmt: skip
    if out is not None and (wrong := out._replace(batch=made.batch).differences(made)):
        raise ShapeError(f"out is a schedule for {wrong}; make another one")
    return made._replace(data=implementation.schedule_decode(made, seq_lens, first, query_start, out and out.data))


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    key_start: torch.Tensor,
    query_start: torch.Tensor,
    first: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention to tokens that are at hand exactly: the current chunk, sinks, the recent tail.

    Args:
        q: ``[B, Tq, Hq, dk]``.
        k: ``[B, L, H, dk]`` of the tokens at positions ``key_start[b]`` to ``key_start[b] + L``.
        v: ``[B, L, H, dv]``.
        key_start: ``[B]``.
        query_start: ``[B]`` position of the first query.
        first: ``[B]`` first visible position; default ``key_start``.
        window, softcap, mask: As in :func:`decode_attention`; the mask is indexed by position.

    Returns:
        As :func:`decode_attention`.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q is [B, Tq, Hq, dk] and k [B, L, H, dk], not {_describe(q)} and {_describe(k)}")
    _check("k", k, (q.shape[0], None, None, q.shape[3]), q.device)
    _check("v", v, (*k.shape[:3], None), q.device)
    _check_mask(mask, tuple(q.shape[:2]), q.device)
    for name, positions in (("key_start", key_start), ("query_start", query_start), ("first", first)):
        if positions is not None:
            _check_integer(name, positions, (q.shape[0],), q.device)
    _check_groups(q.shape[2], k.shape[2])
    _check_options(window, softcap)
    # plain tensor arithmetic on every device, which dynamo traces as it is
    options = AttentionOptions(scale, first, query_start, 0, window, softcap, mask)
    return reference.exact_attention(q, k, v, key_start, options)


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    layout: PageLayout,
    *,
    scale: float,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a varlen batch of chunks, each to its sequence's packed prefix and to itself.

    With k and v (``chunk=exact``) a chunk's queries see the chunk's own K and V unquantised and the ``context_lens``
    tokens before it packed. Without (``chunk=packed``) the chunk has been stored first, ``context_lens`` includes it,
    and every query reads page bytes, its own token's included (design, invariant 7).

    Args:
        q: ``[T, Hq, dk]``, the chunks of all sequences one after the other.
        context_lens: ``[B]`` tokens to read from the pages; 0 where a request begins.
        cu_seqlens: int32 or int64 ``[B + 1]``, where each chunk begins in q; ``cu_seqlens[B] = T``.
        k: ``[T, H, dk]`` or None. v: ``[T, H, dv]`` or None.
        window, softcap: As in :func:`decode_attention`.
        mask: bool ``[B, longest chunk, >= tokens]``, by position.
        out: Where the result is to be written: ``[T, Hq, dv]`` of q's dtype, contiguous. It is returned then.

    Returns:
        out ``[T, Hq, dv]`` and log-sum-exp ``[Hq, T]``.
    """
    _check_pages(pages, layout)
    _check("q", q, (None, None, layout.head_size), pages.device)
    _check_groups(q.shape[1], pages.shape[1])
    _check_integer("context_lens", context_lens, (None,), pages.device)
    batch = context_lens.shape[0]
    _check_options(window, softcap)
    _check_integer("cu_seqlens", cu_seqlens, (batch + 1,), pages.device)
    _check_integer("block_table", block_table, (batch, None), pages.device)
    if (k is None) != (v is None):
        raise ShapeError("prefill_attention takes k and v together (chunk=exact) or neither (chunk=packed)")
    if k is not None and v is not None:
        _check("k", k, (q.shape[0], pages.shape[1], layout.head_size), pages.device)
        _check("v", v, (q.shape[0], pages.shape[1], layout.head_size_v), pages.device)
    _check_mask(mask, (batch, None), pages.device)
    _check_pages_read(pages, block_table, context_lens, layout, mask)
    _check_chunks(cu_seqlens, context_lens, q.shape[0], k is None, mask)
    _check_out(out, q, layout)
    options = AttentionOptions(scale, window=window, softcap=softcap, mask=mask)
    implementation = choose(pages.device, layout)
    arguments = (q, pages, block_table, context_lens, cu_seqlens, layout, options, k, v)
    if out is not None and implementation.WRITES_OUT:
        _, lse = implementation.prefill_attention(*arguments, out=out)
        return out, lse
    result, lse = implementation.prefill_attention(*arguments)
    return result if out is None else out.copy_(result), lse


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _matches(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or want == got for got, want in zip(shape, wanted, strict=True)
    )


def _check(name: str, tensor: torch.Tensor, wanted: tuple[int | None, ...], device: torch.device) -> None:
    if not tensor.dtype.is_floating_point or tensor.device != device or not _matches(tensor.shape, wanted):
        shape = ", ".join("..." if want is None else str(want) for want in wanted)
        raise ShapeError(f"{name} is a floating tensor [{shape}] on {device}, not {_describe(tensor)}")


def _check_integer(
    name: str,
    tensor: torch.Tensor,
    wanted: tuple[int | None, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    allowed = (dtype,) if dtype else (torch.int32, torch.int64)
    if tensor.dtype not in allowed or tensor.device != device or not _matches(tensor.shape, wanted):
        shape = ", ".join("..." if want is None else str(want) for want in wanted)
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise ShapeError(f"{name} is {kinds} [{shape}] on {device}, not {_describe(tensor)}")


def _check_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    if (
        pages.dtype != torch.uint8
        or pages.dim() != 3
        or pages.shape[2] != layout.page_bytes
        or not pages.is_contiguous()
    ):
        raise ShapeError(
            f"pages of {layout.format} with head sizes {layout.head_size}/{layout.head_size_v} and "
            f"{layout.page_size} tokens "
            f"are contiguous uint8 [num_pages, num_kv_heads, {layout.page_bytes}], not {_describe(pages)}"
        )


def _check_mask(mask: torch.Tensor | None, wanted: tuple[int | None, ...], device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.device != device or not _matches(mask.shape, (*wanted, None)):
        shape = ", ".join("..." if want is None else str(want) for want in (*wanted, None))
        raise ShapeError(f"mask is bool [{shape}] on {device}, not {_describe(mask)}")


# What follows reads values. On a GPU that would wait for it, so there they are the caller's promise.


def _check_pages_read(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageLayout,
    mask: torch.Tensor | None = None,
) -> None:
    """Refuse to read beyond a block table, the pages or the mask."""
    if pages.device.type != "cpu" or not len(lengths):
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 0 or longest > block_table.shape[1] * layout.page_size:
        raise ShapeError(
            f"sequence lengths (seq_lens, context_lens) from {shortest} to {longest} do not fit a block_table of "
            f"{block_table.shape[1]} pages of {layout.page_size} tokens"
        )
    if mask is not None and longest > mask.shape[-1]:
        raise ShapeError(f"the mask has {mask.shape[-1]} tokens, and a sequence {longest}")
    if block_table.numel() and not (int(block_table.min()) >= 0 and int(block_table.max()) < len(pages)):
        raise ShapeError(f"block_table names pages outside 0 to {len(pages) - 1}")


def _check_chunks(
    cu_seqlens: torch.Tensor, context_lens: torch.Tensor, tokens: int, packed: bool, mask: torch.Tensor | None
) -> None:
    """Refuse chunks that are not cut out of the queries one after the other."""
    if cu_seqlens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((lengths < 0).any()):
        raise ShapeError(f"cu_seqlens rises from 0 to the {tokens} query tokens, and is {cu_seqlens.tolist()}")
    if packed and bool((context_lens < lengths).any()):
        raise ShapeError("context_lens includes the chunk when k and v are left out, and is shorter than a chunk")
    if mask is not None and len(lengths):
        longest = int(lengths.max())
        reach = int((context_lens if packed else context_lens + lengths).max())
        if mask.shape[1] < longest or mask.shape[2] < reach:
            raise ShapeError(
                f"mask is [B, longest chunk, tokens], at least [..., {longest}, {reach}], not {_describe(mask)}"
            )


def _check_out(out: torch.Tensor | None, q: torch.Tensor, layout: PageLayout) -> None:
    if out is None:
        return
    shape = (*q.shape[:-1], layout.head_size_v)
    if out.shape != shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise ShapeError(f"out is a contiguous {q.dtype} tensor {list(shape)} on {q.device}, not {_describe(out)}")
    if out.data_ptr() % 16 and out.device.type != "cpu":
        raise ShapeError("out has to begin at a multiple of 16 bytes; pass a tensor that does")


def _check_options(window: int | None, softcap: float | None) -> None:
    if window is not None and window < 1:
        raise ShapeError(f"window is a number of tokens from 1, or None for all; not {window}")
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"softcap is a positive number, or None for none; not {softcap}")


def _check_groups(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
