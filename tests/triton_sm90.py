"""Compiles the Triton kernels for sm_90 without a GPU: ``python tests/triton_sm90.py [--whole] [FORMAT ...]``.

The interpreter runs what the compiler refuses, such as a name that has two shapes in two branches. Every launch of the
operations is compiled in place of being run, as far as Triton's intermediate language, where types and shapes are
checked; with ``--whole`` as far as machine code, which takes ten times as long. A line for each format; ends with 1 if
one fails.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.compiler
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction, driver

from kvfold.layout import PageLayout
from kvfold.ops import triton as kernels
from kvfold.ops.options import AttentionOptions
from kvfold.ops.picked import Picked
from kvfold.ops.triton.exact import picked_attention

CASES = (
    ("k4v4", 128, 128, 64), ("k3v2", 128, 128, 16), ("k1v8", 64, 32, 32), ("k5v6+plain", 33, 80, 16),
    ("k4v3+nc", 64, 64, 64), ("k8v2+mse+pre5", 32, 256, 32), ("k4v4+mean", 128, 64, 64), ("k2tv3t", 64, 64, 64),
    ("k3tv4t+mean", 80, 40, 16), ("k4tv2", 128, 128, 32), ("k2tv2t+mean", 64, 64, 64), ("k3tv4t", 128, 128, 64),
)  # fmt: skip
"""Format, head sizes of K and V, page size."""


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def check_types(source: Any, target: GPUTarget, options: dict[str, Any], **others: Any) -> None:
    """The first step of ``triton.compile``, in its place. Without a kernel nothing is launched."""
    backend = make_backend(target)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def compile_all(whole: bool, spec: str, head_size: int, head_size_v: int, page_size: int) -> int:
    """Every launch of a format; how many kernels there were."""
    layout = PageLayout.of(spec, head_size, head_size_v, page_size)
    heads, tokens, compiled = 2, 70, 0
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only  # type: ignore[method-assign]
    if not whole:
        triton.compiler.compile = check_types  # which every kernel takes from there at its first launch
    try:
        pages = torch.zeros(layout.page_shape(10, heads), dtype=torch.uint8)
        slots = torch.arange(tokens)
        previous = torch.full((tokens,), -1) if layout.format.mean else None
        table = torch.arange(5, dtype=torch.int32)[None]
        lengths = torch.tensor([tokens], dtype=torch.int32)
        starts = torch.tensor([0, 20], dtype=torch.int32)
        for dtype in (torch.bfloat16, torch.float32):
            k, v = (torch.zeros(tokens, heads, size, dtype=dtype) for size in (head_size, head_size_v))
            kernels.store_kv(k, v, pages, slots, layout, previous)
            options = AttentionOptions(0.1)
            q = torch.zeros(1, 1, 2 * heads, head_size, dtype=dtype)
            kernels.decode_attention(q, pages, table, lengths, layout, options)
            full = AttentionOptions(0.1, softcap=5.0, window=30, mask=torch.ones(1, 3, 128, dtype=torch.bool))
            kernels.decode_attention(q.expand(1, 3, -1, -1).contiguous(), pages, table, lengths, layout, full)
            kernels.decode_attention(
                q, pages, table, lengths, layout, AttentionOptions(0.1, first=lengths, query_start=lengths, lag=2)
            )
            picked = Picked(*torch.zeros(3, 1, 40, dtype=torch.int32))
            at, before = AttentionOptions(0.1, query_start=lengths, softcap=5.0), (v[:1, None, :1], lengths.float())
            picked_attention(q, k, v, picked, at, None)
            picked_attention(q, k.half(), v.half(), picked, at, before)
            chunk = torch.zeros(20, 2 * heads, head_size, dtype=dtype)
            kernels.prefill_attention(chunk, pages, table, lengths, starts, layout, options, None, None)
            kernels.prefill_attention(chunk, pages, table, lengths, starts, layout, options, k[:20], v[:20])
        kernels.load_kv(pages, table, layout, tokens)
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return compiled


def main() -> int:
    whole, names = "--whole" in sys.argv, [name for name in sys.argv[1:] if name != "--whole"]
    driver.set_active(Driver())  # type: ignore[no-untyped-call,unused-ignore]
    failed = 0
    for case in [case for case in CASES if not names or case[0] in names]:
        try:
            print(f"{case}: {compile_all(whole, *case)} kernels compile", flush=True)
        except triton.CompilationError as error:
            failed += 1
            print(f"{case}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
