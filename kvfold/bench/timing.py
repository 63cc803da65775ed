"""The clock: CUDA-graph replays with a cold L2.

A replay is a graph of calls, each on a copy of the data of its own (:meth:`~kvfold.bench.kernel.Setting.decodes`,
:meth:`~kvfold.bench.kernel.Setting.copies`), and the time of a call is the replay's time over their number. Two things
keep what a call reads out of the L2:

* its data is touched once in a replay, and the copies of a replay exceed the L2 several times;
* before each replay, outside the time, a buffer of eight times the L2 is *read*. Small data, whose copies do not fill
  the L2, is evicted by that. It is read and not written because a written L2 is full of lines that the timed kernel
  would have to wait for on their way to memory. The read also keeps the device busy while the replay is submitted, so
  that what the processor needs for that is not timed.

The calls of a replay follow each other on one stream, so the time of a call has its launches' gaps in it.

Prefills are launched and not replayed, as engines do. The device is kept reading until all launches of a call are
queued, as it is in an engine, so that what is timed is the device's work and not the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

FLUSH_MULTIPLE = 8
LAUNCH_FLUSHES = 16
"""Reads of the buffer before launches, some 2 ms: longer than a host that has other work, too, needs for a prefill."""
MIN_REPLAYS = 30
_WARM_UP_REPLAYS = 3
_COPY_BYTES = 2**32


@dataclass(frozen=True)
class Timing:
    """Two rounds of one kernel, microseconds per call.

    Attributes:
        first: Median of the first round.
        second: Median of the second, after every other kernel of the case had its first.
        replays: Replays in each round.
        calls: Calls in a replay.
    """

    first: float
    second: float
    replays: int
    calls: int

    @property
    def us(self) -> float:
        return (self.first + self.second) / 2

    @property
    def spread(self) -> float:
        """How far the rounds are apart, relative to their mean: a smaller difference of two kernels is noise."""
        return abs(self.first - self.second) / self.us


class Replayable(Protocol):
    """A graph, or what stands for one."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class Launches:
    """Calls that are launched one after the other each time."""

    calls: Sequence[Callable[[], object]]

    def replay(self) -> None:
        for call in self.calls:
            call()


class Timer:
    """Captures calls on a stream of its own and times replays of them there.

    Args:
        device: A CUDA device.
        l2_bytes: Size of its L2 cache.
    """

    def __init__(self, device: torch.device, l2_bytes: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._flush = torch.zeros(FLUSH_MULTIPLE * l2_bytes // 4, device=device)
        self._sink = torch.zeros((), device=device)

    def capture(self, calls: Sequence[Callable[[], object]], graph: bool = True) -> Replayable:
        """The calls as one CUDA graph, or as launches.

        Each runs once before on the stream of the capture, so that nothing compiles or grows a workspace in it.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for call in calls:
                call()
        self.stream.synchronize()
        if not graph:
            return Launches(calls)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=self.stream):
            for call in calls:
                call()
        return captured

    def time(self, graph: Replayable, replays: int = MIN_REPLAYS) -> float:
        """Median time of a replay in microseconds."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP_REPLAYS):
                graph.replay()
            for begin, end in events:
                for _ in range(LAUNCH_FLUSHES if isinstance(graph, Launches) else 1):
                    torch.sum(self._flush, dim=0, out=self._sink)
                begin.record(self.stream)
                graph.replay()
                end.record(self.stream)
        self.stream.synchronize()
        return median(begin.elapsed_time(end) * 1000 for begin, end in events)


def copy_bandwidth(device: torch.device, replays: int = 20) -> float:
    """Bytes per second of a large copy inside the device, counting what is read and what is written."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    target.copy_(source)
    for begin, end in events:
        begin.record()
        target.copy_(source)
        end.record()
    torch.cuda.synchronize(device)
    return 2 * _COPY_BYTES / (median(begin.elapsed_time(end) for begin, end in events) / 1000)
