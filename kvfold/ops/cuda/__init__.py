"""The operations in CUDA C++, compiled on the machine that runs them: Hopper (sm_90), head size 128, 2 to 4 bits.

formats     which pages are served
runtime     compiling with NVRTC, the cache on disk, launching
store       K and V to pages
references  the key references of pages that are opened
decode      attention of a few query tokens per sequence
prefill     attention of chunks, over windows that ``expand`` de-quantises
"""

from __future__ import annotations

from kvfold.ops.cuda.decode import decode_attention
from kvfold.ops.cuda.formats import supports
from kvfold.ops.cuda.prefill import prefill_attention
from kvfold.ops.cuda.runtime import available
from kvfold.ops.cuda.store import store_kv
from kvfold.ops.reference import load_kv

WRITES_OUT = True
"""Whether the attentions take ``out``; where they do not, their caller copies."""

__all__ = ["WRITES_OUT", "available", "decode_attention", "load_kv", "prefill_attention", "store_kv", "supports"]
