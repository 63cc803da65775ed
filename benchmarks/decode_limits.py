"""What limits the CUDA decode kernel: the same kernel with parts left out, beside itself, on one GPU.

    python benchmarks/decode_limits.py --shapes 8x32768 8x4096 --format k4v4 --json limits.json

`decode.cu` is compiled as it is and with lines of it changed, so that launch, queries, splits and merging are the same
in all of them:

* `frame`: warps go through their steps without bytes and without arithmetic: what is around the loop.
* `reading`: pages are copied to shared memory as ever, and nothing is done with them.
* `arithmetic`: each warp copies its first step, and works on that one again and again.
* `kernel`: as it is.

`wanted` is FlashAttention-3's time in bfloat16 in the same run over the factor that is aimed at. Where `reading` alone
takes as long, the memory forbids it to a kernel that copies so; where `kernel` takes longer than both parts, what is
between is how badly they overlap. Results of the changed ones are wrong, and nobody looks at them. Needs a GPU of
compute capability 9.0; for FlashAttention-3 vLLM or its own package.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

from kvfold.bench.cases import HEAD_SIZE, DecodeCase, PrefillCase, select
from kvfold.errors import NotBuiltError
from kvfold.formats import KVFormat

TIMES = {"k4v4": {"8x32768": 3.3, "32x8192": 3.3, "64x16384": 3.5, "1x131072": 3.0, "1x32768": 2.5, "8x4096": 2.5}}
"""How many times as fast as FlashAttention-3 a format should be."""
PAGE_SIZE = 64

_NO_STEP = (r"step<(true|false)>\(P, L, Q, S, slot[^;]*;", ";")
_WAIT = r"barrier_wait\(slot \+ STEP_END, [^;]*\);"
_NO_WAIT = (_WAIT, "")
_NO_COPY = (r"issued < copies && elected\(\)", "issued < min(copies, LAST_COPY) && elected()")
_NO_HELP = (r"shares\[warp - ROWS\]\.copies > STAGES &&", r"\g<0> filled < LAST_COPY &&")
_NO_PREFETCH = (r"&& from\) prefetch_bulk", "&& from && LAST_COPY > 0) prefetch_bulk")
_FIRST_STEP = (r"(step<(?:true|false)>\(P, L, Q, S, )slot", r"\1ring")
_FIRST_WAIT = (_WAIT, "barrier_wait(ring + STEP_END, 0);")


class Variant(NamedTuple):
    """Changes to decode.cu: patterns, what takes their place, how often they are found; and how many steps to copy."""

    changes: tuple[tuple[tuple[str, str], int], ...]
    last_copy: str = "copies"


VARIANTS = {
    "frame": Variant(((_NO_STEP, 2), (_NO_WAIT, 2), (_NO_COPY, 1), (_NO_HELP, 1), (_NO_PREFETCH, 1)), "0"),
    "reading": Variant(((_NO_STEP, 2),)),
    "arithmetic": Variant(((_FIRST_STEP, 2), (_FIRST_WAIT, 2), (_NO_COPY, 1), (_NO_HELP, 1), (_NO_PREFETCH, 1)), "1"),
    "kernel": Variant(()),
}


def changed(source: str, variant: Variant) -> str:
    """The text of decode.cu with a variant's changes.

    Raises:
        ValueError: A line that is to be changed is not there as often as it should be: decode.cu has moved on.
    """
    for (pattern, text), wanted in variant.changes:
        source, found = re.subn(pattern, text, source)
        if found != wanted:
            raise ValueError(
                f"decode.cu has {pattern!r} {found} times and not {wanted}; change decode_limits.py with it"
            )
    return f"#define LAST_COPY {variant.last_copy}\n{source}"


@contextmanager
def variant_of_kernel(name: str) -> Iterator[None]:
    """Compile decode.cu with the changes of a variant meanwhile."""
    from kvfold.ops.cuda import runtime

    folder = runtime.FOLDER
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        file = Path(copy, "decode.cu")
        file.write_text(changed(file.read_text(encoding="utf-8"), VARIANTS[name]), encoding="utf-8")
        try:
            compile_from(Path(copy))
            yield
        finally:
            compile_from(folder)


def compile_from(folder: Path) -> None:
    from kvfold.ops.cuda import decode, runtime

    runtime.FOLDER = folder
    for cache in (decode._kernel, runtime._kernel, runtime._module):  # they know a kernel by its file's name
        cache.cache_clear()


def measure(
    cases: Sequence[DecodeCase], formats: Sequence[KVFormat], replays: int, write: Callable[[dict[str, object]], None]
) -> None:
    """Times in microseconds, each the mean of two rounds' medians, as kvfold bench takes them.

    ``write`` gets what there is after every case, should the next one not end.
    """
    import torch

    from kvfold.bench import ours, rivals
    from kvfold.bench.kernel import Kernel, Setting, Unavailable
    from kvfold.bench.timing import Replayable, Timer, copy_bandwidth

    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting.of(device, PAGE_SIZE)
    timer = Timer(device, setting.l2_bytes)
    copy = copy_bandwidth(device)
    rows: list[dict[str, object]] = []
    for case in cases:
        torch.manual_seed(0)
        ready: dict[tuple[str, str], tuple[Kernel, Replayable]] = {}
        try:
            baseline = rivals.flash_attention_3_bf16(case, setting)
            tried = [(kernel, timer.capture(kernel.calls)) for kernel in baseline]
            ready["", "baseline"] = min(tried, key=lambda one: timer.time(one[1], 5) / len(one[0].calls))
        except Unavailable as error:
            print(f"{case.name}: no FlashAttention-3: {error}", file=sys.stderr, flush=True)
        for fmt in formats:
            for name in VARIANTS:
                with variant_of_kernel(name):
                    (kernel,) = ours.contender(fmt, "cuda").prepare(case, setting)
                    ready[str(fmt), name] = kernel, timer.capture(kernel.calls)
        rounds = [
            {key: timer.time(graph, replays) / len(kernel.calls) for key, (kernel, graph) in ready.items()}
            for _ in "12"
        ]
        times = {key: (rounds[0][key] + rounds[1][key]) / 2 for key in ready}
        for fmt in formats:
            size, factor = case.cache_bytes(fmt), TIMES.get(str(fmt), {}).get(case.name)
            baseline_us = times.get(("", "baseline"))
            row: dict[str, object] = {
                "case": case.name,
                "format": str(fmt),
                "bytes": size,
                "us_at_copy_rate": size / copy * 1e6,
            }
            row |= {name: times[str(fmt), name] for name in VARIANTS}
            row |= {"fa3_bf16": baseline_us, "factor": factor}
            row["wanted"] = baseline_us / factor if baseline_us and factor else None
            rows.append(row)
            print(line(row), flush=True)
        write({"copy_bytes_per_second": copy, "l2_bytes": setting.l2_bytes, "rows": rows})
        del ready
        torch.cuda.empty_cache()


COLUMNS = ("us_at_copy_rate", "frame", "reading", "arithmetic", "kernel", "wanted", "fa3_bf16")


def line(row: dict[str, object]) -> str:
    """One line of the table."""
    values = "".join("          -" if row[name] is None else f"{row[name]:11.1f}" for name in COLUMNS)
    return f"{row['case']:>12} {row['format']:<10}{values}"


def positive(text: str) -> int:
    """A number of replays on the command line."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


C = TypeVar("C", DecodeCase, PrefillCase)


def command_line(
    about: str, kind: type[C], shapes: Sequence[str], counted: str, default: int, help: str
) -> tuple[list[C], list[KVFormat], argparse.Namespace]:
    """What is to be measured. Wrong input is refused, and so is a machine that cannot measure it.

    Args:
        about: The script's description.
        kind: Of shapes.
        shapes: Those that are measured if none are named.
        counted: An option that takes a number of something, like ``--replays``.
        default: That number's.
        help: And what it says of itself.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(shapes), help=f"{kind.kind} shapes of kvfold bench")
    parser.add_argument("--format", nargs="+", default=["k4v4"], help="formats")
    parser.add_argument(counted, type=positive, default=default, help=f"{help} (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        cases = [case for case in select(args.shapes) if isinstance(case, kind)]
        formats = [KVFormat.parse(text).require_built() for text in args.format]
    except (ValueError, NotBuiltError) as error:
        parser.error(str(error))
    if not cases:
        parser.error(f"{', '.join(args.shapes)}: no {kind.kind} shape; there are {', '.join(shapes)}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"{args.json}: there is no folder {args.json.absolute().parent}")
    import torch

    from kvfold.layout import PageLayout
    from kvfold.ops import cuda

    for fmt in formats:
        if reason := cuda.supports(PageLayout.of(fmt, HEAD_SIZE, None, PAGE_SIZE)):
            parser.error(f"{fmt}: {reason}")
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device, and this measures the CUDA kernels on one")
    if reason := cuda.available(torch.device("cuda", torch.cuda.current_device())):
        sys.exit(reason)
    return cases, formats, args


def writer(file: Path | None) -> Callable[[dict[str, object]], None]:
    """Writes results to the file, if there is one, with what tells where they are from."""
    from kvfold.commands.bench import environment_of_gpu

    facts = {
        "command": shlex.join(sys.argv), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment_of_gpu(None),
    }  # fmt: skip

    def write(result: dict[str, object]) -> None:
        if file is not None:
            file.write_text(json.dumps(facts | result, indent=1) + "\n", encoding="utf-8")

    return write


def main() -> None:
    cases, formats, args = command_line(
        __doc__ or "", DecodeCase, list(TIMES["k4v4"]), "--replays", 30, "of each measurement"
    )
    from kvfold.bench.rivals import load_libraries

    load_libraries()
    print(
        f"{'shape':>12} {'format':<10}"
        + "".join(f"{name.replace('us_at_copy_rate', 'at copy'):>11}" for name in COLUMNS)
    )
    measure(cases, formats, args.replays, writer(args.json))


if __name__ == "__main__":
    main()
