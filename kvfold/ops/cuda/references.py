"""The key references of pages that are opened, by the CUDA C++ kernel in ``references.cu``.

:func:`kvfold.ops.references.open_pages` without the host. References equal its but where float32 rounding decides: keys
are averaged before they are rotated, and sums run in another order, so that a code may differ by one.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from kvfold.codebooks import lloyd_max
from kvfold.codecs import trellis
from kvfold.layout import PageLayout
from kvfold.ops.cuda import runtime
from kvfold.ops.cuda.formats import DTYPES, HEAD_SIZE, side_defines, sign_words

_WARPS = 8  # of a block, as in references.cu
_CHUNK = 16  # tokens of a block, of which it opens one page after the other
_FEW = 4096  # vectors (tokens x heads) up to which a block has one token: batches may open all their pages at once


class _Opening(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("token", "head", "coordinate")),
        *((name, ctypes.c_void_p) for name in ("slots", "previous", "pages")),
        ("page_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("tokens", "heads", "chunk")),
        ("levels", ctypes.c_float * 32),
    )


class _Plan(NamedTuple):
    kernel: runtime.Kernel
    levels: ctypes.Array[ctypes.c_float]  # of every code, of a trellis ``trellis.stored_levels``


def _defines(layout: PageLayout, dtype: torch.dtype, vector: bool) -> dict[str, int | str]:
    return {
        "PAGE": layout.page_size,
        "TILE_BYTES": layout.tile_bytes,
        **side_defines("K", layout.format.k, layout.k_planes, layout.k_scales),
        "SINKS": layout.format.sinks,
        "TYPE": DTYPES[dtype],
        "VECTOR": int(vector),
        **sign_words(),
    }


@lru_cache(maxsize=1024)
def _plan(layout: PageLayout, dtype: torch.dtype, vector: bool, device: torch.device) -> _Plan:
    k = layout.format.k
    bits = int(k.bits)
    coded = k.family == "trellis"
    levels = trellis.stored_levels(bits, torch.device("cpu")) if coded else lloyd_max(bits, HEAD_SIZE).levels
    return _Plan(
        runtime.kernel("references.cu", "open_pages", device, **_defines(layout, dtype, vector)),
        (ctypes.c_float * 32)(*levels.tolist()),
    )


def open_pages(
    k: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor, layout: PageLayout, vector: bool
) -> None:
    """See :func:`kvfold.ops.references.open_pages`; queued, and nothing is read on the host.

    Args:
        slots: Contiguous.
        vector: Whether the vectors of ``k`` can be loaded 16 bytes at a time.
    """
    tokens, heads = len(k), pages.shape[1]
    if not tokens:
        return
    previous = previous.contiguous()
    plan = _plan(layout, k.dtype, vector, pages.device)
    chunk = 1 if tokens * heads <= _FEW else _CHUNK
    opening = _Opening(
        k.data_ptr(), *k.stride(), slots.data_ptr(), previous.data_ptr(), pages.data_ptr(), layout.page_bytes,
        tokens, heads, chunk, plan.levels,
    )  # fmt: skip
    plan.kernel.launch((-(-tokens // chunk), heads, 1), 32 * _WARPS, 0, opening, early=True)
