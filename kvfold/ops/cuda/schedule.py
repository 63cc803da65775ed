"""Deals the work of decode attention out to the warps of its kernel, by ``schedule.cu``.

A schedule depends on lengths alone, so one launch serves all layers that see the same: 2 112 records on an H200, of 48
bytes, one for each warp. It is made on the device, and so can stand in a CUDA graph, or be rewritten in place before
each replay of one.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from kvfold.ops.cuda import runtime
from kvfold.ops.options import DecodeSchedule

ROWS = 4
"""Query rows of a KV head in a block; a warp serves one block or two."""
WARPS = {1: 16, 2: 12}
"""Of a CTA of the decode kernel, by blocks: as many as their registers allow."""
_FAR = 2**30  # tokens: more than any sequence has
_LARGEST_PIECE = 4096  # steps up to which items are cut so that no warp goes on from one to another


class Share(ctypes.Structure):
    """What a warp has to do: Share in decode_spans.cuh."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("sequence", "head", "first_step", "steps", "begin", "copies")),
        *((name, ctypes.c_int32) for name in ("first_warp", "last_warp", "sharing", "idle")),
        *((name, ctypes.c_uint32) for name in ("total", "item_begin")),
    )


class Params(ctypes.Structure):
    """What both kernels are called with: Params in decode_params.cuh. The schedule's needs the first part only."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("seq_lens", "first", "query_start")),
        *((name, ctypes.c_int32) for name in ("batch", "num_queries", "heads", "row_blocks", "group")),
        *((name, ctypes.c_int32) for name in ("lag", "window", "wide")),
        ("largest_piece", ctypes.c_uint32),
        ("ready", ctypes.c_int32),
        ("warps_inverse", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("schedule", "table", "q", "pages")),
        ("page_stride", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("table_stride", "pages_per_sequence")),
        *((name, ctypes.c_uint32) for name in ("table_bytes", "q_bytes", "minus_one", "low_nibbles")),
        ("scale_log2", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("q_stride_b", "q_stride_t", "q_stride_h")),
        *((name, ctypes.c_void_p) for name in ("scratch", "counters", "out", "lse", "mask")),
        *((name, ctypes.c_int64) for name in ("mask_stride_b", "mask_stride_t")),
        *((name, ctypes.c_int32) for name in ("splits", "begin")),
        *((name, ctypes.c_float) for name in ("softcap_log2", "softcap_inv")),
    )


def blocks_of(query_tokens: int, group: int) -> int:
    """Blocks of query rows that a warp serves."""
    return 1 if query_tokens * group <= ROWS else 2


@lru_cache(maxsize=64)
def multiprocessors(index: int) -> int:
    """CTAs of a launch."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def params_of(
    batch: int,
    query_tokens: int,
    heads: int,
    group: int,
    lag: int,
    window: int | None,
    positions: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> tuple[Params, tuple[torch.Tensor | None, ...]]:
    """Both kernels' first part, and the positions as they are read, which have to live until the launch is queued."""
    blocks = blocks_of(query_tokens, group)
    params = Params(
        batch=batch, num_queries=query_tokens, heads=heads, group=group,
        row_blocks=-(-query_tokens * group // (ROWS * blocks)), lag=min(lag, _FAR), window=min(window or 0, _FAR),
    )  # fmt: skip
    read = []
    for bit, (name, given) in enumerate(zip(("seq_lens", "first", "query_start"), positions, strict=True)):
        if given is not None:
            given = given if given.stride(0) == 1 else given.contiguous()
            setattr(params, name, given.data_ptr())
            params.wide |= (given.dtype == torch.int64) << bit
        read.append(given)
    return params, tuple(read)


def words(index: int, blocks: int) -> int:
    """int32 of a schedule."""
    return multiprocessors(index) * WARPS[blocks] * ctypes.sizeof(Share) // 4


def launch(params: Params, index: int, blocks: int, address: int) -> None:
    """Write the schedule of ``params``."""
    sms, warps = multiprocessors(index), WARPS[blocks]
    params.schedule, params.largest_piece, params.warps_inverse = address, _LARGEST_PIECE, -(-(2**64) // (sms * warps))
    _kernel(index, warps).launch((sms, 1, 1), 32 * warps, 0, params, early=True)


@lru_cache(maxsize=64)
def _kernel(index: int, warps: int) -> runtime.Kernel:
    return runtime.kernel("schedule.cu", "deal_out", torch.device("cuda", index), WARPS=warps)


def schedule_decode(
    made: DecodeSchedule, seq_lens: torch.Tensor, first: torch.Tensor | None, query_start: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The data of a schedule that is ``made`` for certain calls; see :func:`kvfold.ops.schedule_decode`."""
    index, blocks = seq_lens.device.index, blocks_of(made.query_tokens, made.group)
    params, read = params_of(
        made.batch, made.query_tokens, made.num_kv_heads, made.group, made.lag, made.window,
        (seq_lens, first, query_start),
    )  # fmt: skip
    data = torch.empty(words(index, blocks), dtype=torch.int32, device=seq_lens.device) if out is None else out
    launch(params, index, blocks, data.data_ptr())
    del read  # alive until the launch is queued
    return data
