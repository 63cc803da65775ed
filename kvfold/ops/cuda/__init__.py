"""The operations in CUDA C++, compiled on the machine that runs them: Hopper (sm_90), head size 128, 2 to 4 bits.

formats     which pages are served
runtime     compiling with NVRTC, the cache on disk, launching
store       K and V to pages
references  the key references of pages that are opened
schedule    which warp of the decode kernel does what
decode      attention of a few query tokens per sequence
prefill     attention of chunks, over windows that ``expand`` de-quantises
"""

from __future__ import annotations

from kvfold.ops.cuda.decode import decode_attention
from kvfold.ops.cuda.formats import supports
from kvfold.ops.cuda.prefill import prefill_attention
from kvfold.ops.cuda.runtime import available
from kvfold.ops.cuda.schedule import schedule_decode
from kvfold.ops.cuda.store import store_kv
from kvfold.ops.reference import load_kv

WRITES_OUT = True
"""Whether the attentions take ``out``; where they do not, their caller copies."""
SCHEDULES = True
"""Whether there is a ``schedule_decode``, and decode attention takes what it makes."""

__all__ = [
    "SCHEDULES", "WRITES_OUT", "available", "decode_attention", "load_kv", "prefill_attention", "schedule_decode",
    "store_kv", "supports",
]  # fmt: skip
