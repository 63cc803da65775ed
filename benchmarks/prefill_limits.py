"""What limits the CUDA prefill: its parts, each timed by itself, beside the whole and FlashAttention-3 on one GPU.

    python benchmarks/prefill_limits.py --format k4v4 --json limits.json

One call of `prefill_attention` is made and watched: what it gives FlashAttention-3, and what this package's own kernels
are asked for, is kept, windows and all, and called again part by part.

* `kernel`: the whole call, as `kvfold bench` times it.
* `attention`: its calls of FlashAttention-3 alone, in float16 on the windows that were expanded and in bfloat16 on the
  chunk. `bfloat16`: the same calls all in bfloat16, which has kernels of its own.
* `windows`: expanding the windows. `around`: rotating, joining and finding peaks.
* `in order`: all of these launches as they were made, one after the other on one stream, without what the operation
  does on the host between them. `hidden` is by how much the call, on two streams, is faster.

A few calls of each in turns, many times, each time in another order: after a millisecond of matrix products the chip is
hot and its clock low, and who is measured first is measured cool.

`wanted` is FlashAttention-3's time in bfloat16, on a bfloat16 prefix, over .95. Needs a GPU of compute capability 9.0
and FlashAttention-3 (vLLM's, or its own package).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch
from decode_limits import command_line, writer

from kvfold.bench.cases import PrefillCase
from kvfold.errors import FormatError
from kvfold.formats import KVFormat

FACTOR = 0.95
"""How many times as fast as FlashAttention-3 in bfloat16 a prefill should be."""
PAGE_SIZE = 64
AT_ONCE = 3
"""Calls of a part in a round, behind as many that are not timed."""
COLUMNS = (
    "bytes at copy", "windows", "around", "attention", "bfloat16", "in order", "hidden", "kernel", "wanted", "fa3_bf16",
)
"""Of the table, microseconds."""

Call = Callable[[], object]


class Watched:
    """What one call of ``prefill_attention`` did.

    Attributes:
        attention: Arguments of each call of FlashAttention-3; tensors are copies, so that a window which is expanded
            again for other heads stays what it was.
        windows: Calls that expand windows.
        around: All other launches of this package.
        in_order: All of them, as they were made.
        window_bytes: Bytes that ``windows`` write.
    """

    def __init__(self) -> None:
        self.attention: list[tuple[Any, ...]] = []
        self.windows: list[Call] = []
        self.around: list[Call] = []
        self.in_order: list[Call] = []
        self.window_bytes = 0


@contextmanager
def watched() -> Iterator[Watched]:
    """Watch what is called meanwhile."""
    from kvfold.ops.cuda import dense, expand, prefill

    seen, kept = Watched(), {}

    def watch(module: Any, name: str, note: Callable[..., None]) -> None:
        function = kept[module, name] = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            seen.in_order.append(call := partial(function, *args, **kwargs))
            note(call, *args)  # before a result takes the place of an argument
            return function(*args, **kwargs)

        setattr(module, name, called)

    def attention(call: partial[object], *args: Any) -> None:
        kept_args = [copied(x) if isinstance(x, torch.Tensor) else x for x in args]
        seen.attention.append((*kept_args, None, 0, None, call.keywords.get("splits", 1)))  # no bounds, no place

    def window(call: Call, _plan: object, _pages: object, _table: object, k: torch.Tensor, *_: object) -> None:
        seen.windows.append(call)
        seen.window_bytes += 2 * k.numel() * k.element_size()

    def other(call: Call, *_: object) -> None:
        seen.around.append(call)

    watch(dense, "flash_attention_3", attention)
    watch(expand, "expand_heads", window)
    for module, name in ((prefill, "rotate"), (prefill, "merge"), (expand, "find_peaks")):
        watch(module, name, other)
    try:
        yield seen
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy with x's strides in memory of its own."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    memory = x.new_empty(size)
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def attention_of(seen: Watched, change: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, x: x) -> list[Call]:
    """The calls of FlashAttention-3, with their tensors (0: q, 1: k, 2: v) changed."""
    from kvfold.ops.cuda import dense

    calls = []
    for args in seen.attention:
        changed = [change(at, x) if isinstance(x, torch.Tensor) else x for at, x in enumerate(args)]
        calls.append(partial(dense.flash_attention_3, *changed))
    return calls


def in_bfloat16(_: int, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device).copy_(x)


def row_of(
    case: str, fmt: str, times: dict[str, float], packed_bytes: int, window_bytes: int, copy: float
) -> dict[str, object]:
    """A row of the results: times in microseconds, and what follows from them."""
    at_copy = (packed_bytes + window_bytes) / copy * 1e6
    wanted = times["fa3_bf16"] / FACTOR
    return {
        "case": case, "format": fmt, "packed_bytes": packed_bytes, "window_bytes": window_bytes,
        "bytes at copy": at_copy, **times, "factor": FACTOR, "wanted": wanted,
        "hidden": times["in order"] - times["kernel"],
    }  # fmt: skip


def measure(
    cases: Sequence[PrefillCase], formats: Sequence[KVFormat], rounds: int, write: Callable[[dict[str, object]], None]
) -> None:
    """Times in microseconds, each the median of all rounds."""
    from kvfold.bench import ours, rivals
    from kvfold.bench.kernel import Setting
    from kvfold.bench.timing import Timer, copy_bandwidth

    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting.of(device, PAGE_SIZE)
    timer, copy = Timer(device, setting.l2_bytes), copy_bandwidth(device)
    rows: list[dict[str, object]] = []
    for case in cases:
        torch.manual_seed(0)
        baseline = min(
            (list(kernel.calls) for kernel in rivals.flash_attention_3_bf16(case, setting)),
            key=lambda calls: timer.time(timer.capture(calls, graph=False), 5),
        )
        for fmt in formats:
            (kernel,) = ours.contender(fmt, "cuda").prepare(case, setting)
            kernel.calls[0]()  # compiles
            with watched() as seen:
                kernel.calls[0]()
            if not seen.attention:
                raise FormatError(f"{case.name} is not prefilled by FlashAttention-3, whose limits these are")
            parts: dict[str, list[Call]] = {
                "windows": seen.windows,
                "around": seen.around,
                "attention": attention_of(seen),
                "bfloat16": attention_of(seen, in_bfloat16),
                "in order": seen.in_order,
                "kernel": list(kernel.calls),
                "fa3_bf16": baseline,
            }
            graphs = {name: timer.capture(calls, graph=False) for name, calls in parts.items()}
            names, order, turns = list(graphs), Random(0), []
            for _ in range(rounds):
                order.shuffle(names)  # who always came behind short ones would always be measured cool
                turns.append({name: timer.time(graphs[name], AT_ONCE) for name in names})
            times = {name: median(turn[name] for turn in turns) for name in parts}
            rows.append(row_of(case.name, str(fmt), times, case.cache_bytes(fmt), seen.window_bytes, copy))
            print(line(rows[-1]), flush=True)
            write({"copy_bytes_per_second": copy, "l2_bytes": setting.l2_bytes, "rounds": rounds, "rows": rows})
            del parts, graphs, kernel, seen
            torch.cuda.empty_cache()


def line(row: dict[str, object]) -> str:
    """One line of the table."""
    return f"{row['case']:>19} {row['format']:<8}" + "".join(f"{row[name]:14,.1f}" for name in COLUMNS)


def main() -> None:
    cases, formats, args = command_line(
        __doc__ or "", PrefillCase, ["prefill-2048+30720"], "--rounds", 15, "of a few calls of each part"
    )
    from kvfold.bench.rivals import load_libraries
    from kvfold.ops.cuda import dense

    device = torch.device("cuda", torch.cuda.current_device())
    load_libraries()
    if dense.choose(device) != "fa3":
        sys.exit("this measures prefills by FlashAttention-3, which is not here: install vllm or flash_attn_interface")
    print(" " * 28 + "".join(f"{name:>14}" for name in COLUMNS))
    measure(cases, formats, args.rounds, writer(args.json))


if __name__ == "__main__":
    main()
