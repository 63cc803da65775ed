"""Where the time of a launch of the CUDA decode kernel goes, by warp: clocks at points inside it, on one GPU.

    python benchmarks/decode_timeline.py --shapes 8x4096 1x32768 --format k4v4 --json timeline.json

`decode.cu` is compiled with stamps. They say when a warp comes to a point, in microseconds since it entered: the
median and the 98 % quantile over the warps that have steps, in the last call of every replay. What a warp has asked
for need not be there then; the point behind the first use of it tells.

* `entry`; `item`: the warp has its part of the schedule, which was made ahead;
* `looked up`: pages are asked for; `rows`: so are the rows of q; `addresses`: those of the first pages are there;
* `q there`: for all warps of the CTA; `rotated`: q is in registers; `waited`: the kernels ahead have ended;
* `filled`: the ring's copies are under way; `first data`: the first one's bytes are there; `steps`: all are done;
* `saved`: the partial result is written; `met`: so are those of the CTA's other warps; `merged`: the warp's share is,
  and of items that this CTA has alone it is in the output; `counted`: whether there are others is known; `end`.

Where lengths differ, a warp may have several items: then what lies between `filled` and `saved` has all of them in
it, and `steps` and `saved` are of the last. `ends` are the loops' ends (`steps`) since the first of all warps entered,
`between` how far CTAs' last ones are apart, `within` how far those of a CTA's warps are, on average: medians of the
replays. `the last entry` is of the warps that have steps.

A replay is what kvfold bench times, calls on copies of the data with a cold L2; where it has several, a replay of one
call follows, to which the kernel's code is cold as well. The time of a call is from events around replays, of the
kernel as it is and `stamped`: the difference is what stamps cost. Needs a GPU of compute capability 9.0.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from decode_limits import PAGE_SIZE, TIMES, command_line, compile_from, writer

from kvfold.bench.cases import DecodeCase
from kvfold.formats import KVFormat

if TYPE_CHECKING:
    import torch


class Point(NamedTuple):
    """A place in decode.cu: a pattern, what takes its place, and how often it is found.

    In the text STAMP is the SM's clock, which costs little and tells a warp's points apart. TIME is the device's, which
    is coarse and takes long to read, but is the same for all SMs. MET is a STAMP behind a barrier: it waits for a load
    from shared memory, as nothing else keeps a warp from reading the clock before the barrier has let it pass.
    """

    name: str
    pattern: str
    text: str
    found: int = 1


POINTS = (
    # behind the device's clock, which would take its time before all other points; at the end likewise, so that cycles
    # and microseconds are of the same stretch
    Point("entry", r"const int cta_slot = .*;", r"\g<0> TIME STAMP"),
    Point("item", r"Query Q;", r"STAMP \g<0>"),
    Point("looked up", r"const u32 upcoming = .*;", r"\g<0> STAMP"),
    Point("rows", r"load_rows\(.*, rank, ranks, lane\);", r"\g<0> STAMP"),
    Point("addresses", r"addresses\[warp\]\[lane\] = from;", r"\g<0> STAMP"),
    Point("q there", r"__syncthreads_or\(.*;", r"\g<0> MET"),
    Point("rotated", r"if \(P\.ready\) wait_for_predecessors\(\); // the pages", r"MET \g<0>"),
    Point("waited", r"if \(P\.ready\) wait_for_predecessors\(\); // the pages.*\n", r"\g<0>    STAMP\n"),
    Point("filled", r"filled\+\+\) fetch\(.*;", r"\g<0> STAMP"),
    # the step's own wait is over at once then; a point behind that would cost every step something
    Point(
        "first data",
        r"if \(run <= 0\) \{\n *(barrier_wait\(.*;)",
        r"if (issued == min(copies, STAGES)) { \1 STAMP }\n            \g<0>",
    ),
    Point("steps", r"left = remaining\(\);\n", r"STAMP TIME \g<0>"),
    Point("saved", r"save\(S, place.*;", r"\g<0> STAMP"),
    # two branches, of which a launch takes one
    Point("met", r"__syncthreads\(\);\n(?= *(if \(helps\)|// Merge what the CTA's)) *", r"\g<0>MET ", 2),
    Point("merged", r" *__syncthreads\(\);\n\n *// The CTA that comes last", r"    STAMP\n\g<0>"),
    Point("counted", r"#pragma unroll 1\n *for \(int slot = 0; slot < 2;", r"    MET\n\g<0>"),
    Point("end", r"\n\}\s*\Z", r"\n    TIME STAMP\n}\n"),
)
NAMES = [point.name for point in POINTS]
TIMED = [point.name for point in POINTS if "TIME" in point.text]
WARPS = 32
"""Places of a CTA in the buffer: as many as it can have."""

COLUMNS = len(NAMES) + len(TIMED)
# not `clock`, of 32 bits: that is often read to a uniform register, which takes longer
_MACROS = f"""\
#define READ(clock, column) if (lane == 0) {{ \\
    u64 now; \\
    asm volatile("mov.u64 %0, %%" clock ";" : "=l"(now)::"memory"); \\
    ((u64*)P.mask)[(cta_slot * {WARPS} + warp) * {COLUMNS} + (column)] = now; \\
}}
#define STAMP(column) READ("clock64", column)
#define TIME(column) READ("globaltimer", column)
#define MET(column) if (*(volatile int*)&shares[warp].copies >= 0) STAMP(column)
"""


def stamped(source: str) -> str:
    """The text of decode.cu with a stamp at every point.

    Raises:
        ValueError: What a point is known by is not there as often as it should be: decode.cu has moved on.
    """
    for k, point in enumerate(POINTS):
        text = re.sub("STAMP|MET", rf"\g<0>({k})", point.text)
        if point.name in TIMED:
            text = text.replace("TIME", f"TIME({len(NAMES) + TIMED.index(point.name)})")
        source, found = re.subn(point.pattern, text, source)
        if found != point.found:
            raise ValueError(
                f"decode.cu has the point {point.name!r}, {point.pattern!r}, {found} times and not {point.found}; "
                "change decode_timeline.py with it"
            )
    head, include, rest = source.partition('#include "decode_step.cuh"\n')
    return head + include + _MACROS + rest


@contextmanager
def stamped_kernel(buffer: torch.Tensor) -> Iterator[None]:
    """Compile decode.cu with stamps meanwhile; launches, replays of captured ones too, write them to the buffer."""
    from kvfold.ops.cuda import runtime, schedule

    folder, params = runtime.FOLDER, schedule.Params
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        file = Path(copy, "decode.cu")
        file.write_text(stamped(file.read_text(encoding="utf-8")), encoding="utf-8")
        try:
            compile_from(Path(copy))
            # a call without a mask does not set it, and the kernel that is compiled for such calls does not look at it
            schedule.Params = partial(params, mask=buffer.data_ptr())
            yield
        finally:
            schedule.Params = params
            compile_from(folder)


def evaluate(stamps: torch.Tensor) -> dict[str, Any]:
    """What the stamps ``[replays, CTAs, WARPS, columns]`` say, in microseconds; 0 is where a warp has not come to."""
    clocks, times = stamps[..., : len(NAMES)], dict(zip(TIMED, stamps[..., len(NAMES) :].unbind(-1), strict=True))
    busy = clocks[..., NAMES.index("steps")] != 0
    cycles = clocks - clocks[..., :1]
    mhz = float(cycles[..., -1][busy].sum() / (times["end"] - times["entry"])[busy].sum() * 1000)
    points: dict[str, dict[str, float] | None] = {}
    for k, name in enumerate(NAMES):
        us = cycles[..., k][busy & (clocks[..., k] != 0)].double() / mhz
        points[name] = {"median": float(us.median()), "p98": float(us.quantile(0.98))} if len(us) else None
    rounds = []
    for entered, ended, here in zip(times["entry"], times["steps"], busy, strict=True):
        first = entered[entered != 0].min()
        ends = (ended - first).double() / 1000
        ctas = [its[warps] for its, warps in zip(ends, here, strict=True) if warps.any()]
        last = [float(its.max()) for its in ctas]
        rounds.append(
            {
                "last_entry": float(entered[here].max() - first) / 1000,
                "min": float(ends[here].min()), "mean": float(ends[here].mean()), "max": max(last),
                "between_ctas": max(last) - min(last),
                "within_cta": mean(float(its.max() - its.min()) for its in ctas),
            }
        )  # fmt: skip
    loop_ends = {key: median(each[key] for each in rounds) for key in rounds[0]}
    return {"mhz": mhz, "warps": int(busy[-1].sum()), "points": points, "loop_ends": loop_ends}


def measure(
    cases: Sequence[DecodeCase], formats: Sequence[KVFormat], replays: int, write: Callable[[dict[str, object]], None]
) -> None:
    """Take the stamps of replays, and the times of others.

    ``write`` gets what there is after every case, should the next one not end.
    """
    import torch

    from kvfold.bench import ours
    from kvfold.bench.kernel import Setting
    from kvfold.bench.timing import Timer

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    setting = Setting.of(device, PAGE_SIZE)
    timer = Timer(device, setting.l2_bytes)
    buffer = torch.zeros(properties.multi_processor_count, WARPS, COLUMNS, dtype=torch.int64, device=device)
    rows: list[dict[str, object]] = []
    for case in cases:
        for fmt in formats:
            torch.manual_seed(0)
            (kernel,) = ours.contender(fmt, "cuda").prepare(case, setting)
            for calls in [kernel.calls, kernel.calls[:1]] if len(kernel.calls) > 1 else [kernel.calls]:
                as_it_is = timer.time(timer.capture(calls)) / len(calls)
                with stamped_kernel(buffer):
                    graph = timer.capture(calls)
                buffer.zero_()  # of warps that have no steps now
                torch.cuda.synchronize(device)
                taken = []
                for _ in range(replays):
                    timer.time(graph, 1)
                    taken.append(buffer.cpu())
                row: dict[str, object] = {"case": case.name, "format": str(fmt), "calls": len(calls), "us": as_it_is}
                row |= {"us_stamped": timer.time(graph) / len(calls)} | evaluate(torch.stack(taken))
                rows.append(row)
                print(table(row), flush=True)
            del kernel, calls, graph
        write({"l2_bytes": setting.l2_bytes, "points": NAMES, "replays": replays, "rows": rows})
        torch.cuda.empty_cache()


def table(row: dict[str, Any]) -> str:
    """The lines of a case."""
    calls, ends = row["calls"], row["loop_ends"]
    lines = [
        f"{row['case']} {row['format']}, replays of {calls} call{'s' if calls > 1 else ''}: {row['us']:.2f} us a call, "
        f"{row['us_stamped']:.2f} stamped; {row['warps']} warps have steps; {row['mhz']:.0f} MHz",
        f"{'us since entry':>16}{'median':>9}{'98 %':>9}",
    ]
    for name, its in row["points"].items():
        lines.append(f"{name:>16}" + (f"{its['median']:9.2f}{its['p98']:9.2f}" if its else "        -        -"))
    lines.append(
        f"{'ends':>16} min {ends['min']:.2f}, mean {ends['mean']:.2f}, max {ends['max']:.2f}; between CTAs "
        f"{ends['between_ctas']:.2f}, within one {ends['within_cta']:.2f}; the last entry {ends['last_entry']:.2f}\n"
    )
    return "\n".join(lines)


def main() -> None:
    cases, formats, args = command_line(
        __doc__ or "", DecodeCase, list(TIMES["k4v4"]), "--replays", 8, "whose stamps are read"
    )
    measure(cases, formats, args.replays, writer(args.json))


if __name__ == "__main__":
    main()
