"""Goes through the cases: every contender is prepared, all are timed one after the other, and then all once more."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from kvfold.bench import ours
from kvfold.bench.cases import Case, PrefillCase, StoreCase
from kvfold.bench.kernel import Contender, Kernel, Setting, Unavailable
from kvfold.bench.report import Missing, Report, Row
from kvfold.bench.rivals import BASELINES, load_libraries, rivals
from kvfold.bench.timing import Replayable, Timer, Timing, copy_bandwidth
from kvfold.errors import FormatError, NotBuiltError
from kvfold.formats import KVFormat

_VARIANT_REPLAYS = 5
_CANNOT = (Unavailable, FormatError, NotBuiltError)
"""What a contender raises that does not do a case; anything else of kvfold's own is a failure."""


class DeviceLost(Exception):
    """The CUDA context is beyond use: nothing more can be measured in this process."""


@dataclass
class _Ready:
    """A contender whose fastest variant is captured, and its rounds so far."""

    contender: Contender
    kernel: Kernel
    graph: Replayable
    rounds: list[float]


def measure(
    cases: Sequence[Case],
    formats: Sequence[KVFormat],
    backends: Sequence[str],
    setting: Setting,
    report: Report,
    *,
    replays: int,
    with_rivals: bool,
    say: Callable[[str], None],
) -> None:
    """Time and check every case, adding to ``report`` as it goes, so that what is done survives a later failure."""
    begun = time.perf_counter()
    torch.manual_seed(0)
    report.copy_bytes_per_second = copy_bandwidth(setting.device)
    timer = Timer(setting.device, setting.l2_bytes)
    say(f"device-to-device copy: {report.copy_bytes_per_second / 1e12:.2f} TB/s, read and written")
    if with_rivals:
        load_libraries()
    for case in cases:
        try:
            _check(case, formats, backends, setting, report)
            rows = _time(case, _contenders(case, formats, backends, with_rivals), setting, timer, report, replays)
        except DeviceLost as lost:
            report.failures.append(f"{case.name}: {lost}; nothing after it was measured")
            return
        finally:
            gc.collect()
            with suppress(RuntimeError):  # of a lost device, which has been reported
                torch.cuda.empty_cache()
        best = min((row for row in rows if row.ours), key=lambda row: row.us, default=None)
        result = "nothing of kvfold's ran" if best is None else f"{best.kernel} {best.us:.1f} us{_times(best)}"
        say(f"{case.name}: {len(rows)} kernels, {result} ({time.perf_counter() - begun:.0f} s)")


def _times(row: Row) -> str:
    return "" if row.ratio is None else f", {row.ratio:.2f} x {BASELINES[row.kind]}"


def _formats(case: Case, formats: Sequence[KVFormat]) -> list[KVFormat]:
    if isinstance(case, StoreCase):
        return [variant for fmt in formats for variant in ours.store_formats(fmt)]
    return list(formats)


def _contenders(case: Case, formats: Sequence[KVFormat], backends: Sequence[str], with_rivals: bool) -> list[Contender]:
    own = [ours.contender(fmt, backend) for fmt in _formats(case, formats) for backend in backends]
    return [*(rivals() if with_rivals else ()), *own]


def _check(case: Case, formats: Sequence[KVFormat], backends: Sequence[str], setting: Setting, report: Report) -> None:
    for fmt in _formats(case, formats):
        for backend in backends:
            name = ours.contender(fmt, backend).name
            try:
                report.checks.append(ours.check(case, setting, fmt, backend))
            except _CANNOT:
                pass  # the same reason comes when it is to be timed, and is reported then
            except Exception as error:
                _failed(case, name, error, report)


def _time(
    case: Case, contenders: Sequence[Contender], setting: Setting, timer: Timer, report: Report, replays: int
) -> list[Row]:
    ready = []
    for contender in contenders:
        try:
            ready.append(_fastest(contender, case, setting, timer))
        except _CANNOT as error:
            report.missing.append(Missing(case.name, contender.name, str(error)))
        except Exception as error:
            if contender.ours:
                _failed(case, contender.name, error, report)
            else:
                _still_alive(error)
                report.missing.append(Missing(case.name, contender.name, describe(error)))
    for _ in range(2):
        for entry in ready:
            try:
                entry.rounds.append(timer.time(entry.graph, replays) / len(entry.kernel.calls))
            except Exception as error:  # what a replay does wrong shows at the next wait for the device
                raise DeviceLost(f"{entry.contender.name}: {describe(error)}") from error
    rows = []
    for entry in ready:
        timing = Timing(entry.rounds[0], entry.rounds[1], replays, len(entry.kernel.calls))
        rows.append(Row.of(case, entry.contender, entry.kernel, timing))
    return report.add(rows)


def _fastest(contender: Contender, case: Case, setting: Setting, timer: Timer) -> _Ready:
    """The fastest of a contender's variants, by a short measurement if there are several."""
    graphs = not isinstance(case, PrefillCase)
    captured = [(kernel, timer.capture(kernel.calls, graphs)) for kernel in contender.prepare(case, setting)]
    if len(captured) > 1:
        captured.sort(key=lambda pair: timer.time(pair[1], _VARIANT_REPLAYS) / len(pair[0].calls))
    kernel, graph = captured[0]
    return _Ready(contender, kernel, graph, [])


def _failed(case: Case, name: str, error: Exception, report: Report) -> None:
    _still_alive(error)
    report.failures.append(f"{case.name}: {name}: {describe(error)}")


def _still_alive(error: Exception) -> None:
    """Raise :class:`DeviceLost` if an error left the device unusable."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        raise DeviceLost(describe(error)) from error


def describe(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
