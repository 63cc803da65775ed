"""What was measured, as a table, as JSON and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.bench.cases import Case, StoreCase
from kvfold.commands import UsageError, table

if TYPE_CHECKING:
    from kvfold.bench.kernel import Contender, Kernel
    from kvfold.bench.timing import Timing

TITLES = {
    "decode": "Decode attention",
    "store": "Store",
    "prefill": "Prefill of a chunk on a stored prefix",
}


_SAME_IN_JSON = ("kind", "case", "kernel", "ours", "us", "spread", "bytes", "replays", "note", "ratio")


@dataclass(frozen=True)
class Row:
    """One kernel on one case.

    Attributes:
        kind: ``decode``, ``store`` or ``prefill``.
        case: Name of the case.
        kernel: Name of the contender.
        ours: Whether it is kvfold's.
        us: Microseconds per call; the mean of both rounds' medians.
        rounds: The medians of the two rounds.
        spread: Their distance relative to ``us``.
        bytes: Bytes per call that the rate counts.
        flops: Operations of both products; 0 for a store.
        replays: Replays in each round.
        calls: Calls in a replay, each on a copy of the data of its own.
        note: How the kernel was called.
        ratio: The baseline's time over this one's: how often this is as fast. None without a baseline.
        share: The rate as a share of the measured copy bandwidth.
    """

    kind: str
    case: str
    kernel: str
    ours: bool
    us: float
    rounds: tuple[float, float]
    spread: float
    bytes: int
    flops: int
    replays: int
    calls: int
    note: str = ""
    ratio: float | None = None
    share: float | None = None

    @staticmethod
    def of(case: Case, contender: Contender, kernel: Kernel, timing: Timing) -> Row:
        """A row that does not know the others yet; :meth:`Report.add` adds what compares."""
        return Row(
            kind=case.kind,
            case=case.name,
            kernel=contender.name,
            ours=contender.ours,
            us=timing.us,
            rounds=(timing.first, timing.second),
            spread=timing.spread,
            bytes=kernel.bytes,
            flops=0 if isinstance(case, StoreCase) else case.flops,
            replays=timing.replays,
            calls=timing.calls,
            note=kernel.note,
        )

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / (self.us * 1e-6)

    @property
    def flops_per_second(self) -> float:
        return self.flops / (self.us * 1e-6)

    def json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "case": self.case,
            "kernel": self.kernel,
            "ours": self.ours,
            "us": self.us,
            "us_rounds": list(self.rounds),
            "spread": self.spread,
            "ratio": self.ratio,
            "bytes": self.bytes,
            "tb_per_second": self.bytes_per_second / 1e12,
            "share_of_copy": self.share,
            "tflops": self.flops_per_second / 1e12,
            "replays": self.replays,
            "calls_per_replay": self.calls,
            "note": self.note,
        }


@dataclass(frozen=True)
class Check:
    """How far an output is from what it should be.

    Attributes:
        case: Name of the case, of which a smaller batch was taken.
        kernel: Name of the contender.
        what: ``relative error`` or ``differing bytes`` (a share).
        value: NaN counts as wrong.
        limit: What is allowed.
    """

    case: str
    kernel: str
    what: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit

    def json(self) -> dict[str, object]:
        value = self.value if math.isfinite(self.value) else None  # JSON has no NaN
        return {**asdict(self), "value": value, "ok": self.ok}


@dataclass(frozen=True)
class Missing:
    """A contender that did not take part in a case, and why."""

    case: str
    kernel: str
    reason: str


@dataclass
class Report:
    """Everything of one run.

    Attributes:
        baselines: Contender that a kind of case is compared with.
        copy_bytes_per_second: Measured copy bandwidth, bytes read and written; 0 before it is measured.
        failures: What should have run and did not: it fails the run.
    """

    baselines: dict[str, str]
    copy_bytes_per_second: float = 0.0
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Take the rows of one case, and return them with what compares them."""
        base = next((row for row in rows if row.kernel == self.baselines[row.kind]), None)
        copy = self.copy_bytes_per_second
        added = [
            replace(
                row,
                ratio=None if base is None else base.us / row.us,
                share=row.bytes_per_second / copy if copy else None,
            )
            for row in rows
        ]
        self.rows += added
        return added

    @property
    def wrong(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.ok]

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.failures

    def json(self) -> dict[str, object]:
        return {
            "copy_tb_per_second": self.copy_bytes_per_second / 1e12,
            "baselines": self.baselines,
            "rows": [row.json() for row in self.rows],
            "checks": [check.json() for check in self.checks],
            "missing": [asdict(entry) for entry in self.missing],
            "failures": list(self.failures),
        }

    @staticmethod
    def of_json(data: dict[str, Any]) -> Report:
        """What :meth:`json` wrote.

        Raises:
            KeyError, TypeError: It is something else.
        """
        rows = [
            Row(
                rounds=(row["us_rounds"][0], row["us_rounds"][1]),
                flops=round(row["tflops"] * 1e12 * row["us"] * 1e-6),
                calls=row["calls_per_replay"],
                share=row["share_of_copy"],
                **{name: row[name] for name in _SAME_IN_JSON},
            )
            for row in data["rows"]
        ]
        checks = [
            Check(c["case"], c["kernel"], c["what"], math.nan if c["value"] is None else c["value"], c["limit"])
            for c in data["checks"]
        ]
        missing = [Missing(**entry) for entry in data["missing"]]
        copy = data["copy_tb_per_second"] * 1e12
        return Report(dict(data["baselines"]), copy, rows, checks, missing, list(data["failures"]))


# --- text -------------------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The tables, what did not take part, and the checks."""
    parts = [
        f"{title}\n{_table(rows, report.baselines[kind])}"
        for kind, title in TITLES.items()
        if (rows := [row for row in report.rows if row.kind == kind])
    ]
    parts.append(_notes(report))
    if report.missing:
        parts.append("Did not take part:\n" + "\n".join(_missing(report.missing)))
    parts.append(_checks(report))
    if report.failures:
        parts.append("FAILED:\n" + "\n".join(f"  {failure}" for failure in report.failures))
    return "\n\n".join(part for part in parts if part)


def _table(rows: Sequence[Row], baseline: str) -> str:
    with_flops = rows[0].kind == "prefill"
    header = ["shape", "kernel", "us", f"x {baseline}", "TB/s", "of copy", "spread"]
    cells, last = [], ""
    for row in rows:
        cells.append(
            [
                row.case if row.case != last else "",
                row.kernel,
                f"{row.us:,.1f}",
                _or_dash(row.ratio, "{:.2f}"),
                f"{row.bytes_per_second / 1e12:.2f}",
                _or_dash(row.share, "{:.0%}"),
                f"{row.spread:.1%}",
            ]
        )
        if with_flops:
            cells[-1].append(f"{row.flops_per_second / 1e12:.0f}")
        last = row.case
    return table([*header, "TFLOP/s"] if with_flops else header, cells, (0, 1))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _notes(report: Report) -> str:
    copy = report.copy_bytes_per_second / 1e12
    return (
        "us: of one call, replayed from a CUDA graph (prefill: launched) with a cold L2; the mean of two rounds'\n"
        "medians. spread: how far the rounds are apart. TB/s: the bytes that the format stores for the live tokens\n"
        f"(attention), or what is read and written (store). of copy: of a large copy on this device, {copy:.2f} TB/s."
    )


def _missing(missing: Iterable[Missing]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in missing:
        reasons.setdefault((entry.kernel, entry.reason), []).append(entry.case)
    return [f"  {kernel} ({_few(cases)}): {reason}" for (kernel, reason), cases in reasons.items()]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _checks(report: Report) -> str:
    if not report.checks:
        return ""
    lines = []
    for what in dict.fromkeys(check.what for check in report.checks):
        checks = [check for check in report.checks if check.what == what]
        worst = max(checks, key=lambda check: check.value if math.isfinite(check.value) else math.inf)
        lines.append(
            f"Checked {len(checks)} times: {what}, the largest {worst.value:.2g} ({worst.kernel}, {worst.case}), "
            f"allowed {worst.limit:.2g}."
        )
    lines += [f"  WRONG: {c.case}, {c.kernel}: {c.what} {c.value:.2g}, allowed {c.limit:.2g}" for c in report.wrong]
    return "\n".join(lines)


# --- plot -------------------------------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Refuse before anything is measured.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'kvfold[plot]'") from None


def plot(report: Report, path: Path, title: str) -> None:
    """Bars of how often each kernel is as fast as the baseline, shape by shape, of the decode cases.

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to compare.
    """
    rows = [row for row in report.rows if row.kind == "decode" and row.ratio is not None]
    if not rows:
        raise UsageError(f"nothing to plot: no decode shape was timed together with {report.baselines['decode']}")
    require_matplotlib()
    from matplotlib import colormaps  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    shapes, kernels = (list(dict.fromkeys(names)) for names in zip(*((r.case, r.kernel) for r in rows), strict=True))
    ratios = {(row.case, row.kernel): row.ratio for row in rows}
    kernels.remove(report.baselines["decode"])  # the line at 1
    figure = Figure(figsize=(max(8.0, 1.3 * len(shapes)), 5.5), layout="constrained")
    axes: Any = figure.subplots()
    axes.set_prop_cycle(color=list(colormaps["tab20"](range(20))))
    width = 0.85 / max(len(kernels), 1)
    for place, kernel in enumerate(kernels):
        shown = [index for index, shape in enumerate(shapes) if (shape, kernel) in ratios]
        offset = (place - (len(kernels) - 1) / 2) * width
        heights = [ratios[shapes[index], kernel] for index in shown]
        axes.bar([index + offset for index in shown], heights, width, label=kernel)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes.set_ylabel(f"speed, {report.baselines['decode']} = 1")
    axes.set_title(title)
    figure.legend(loc="outside lower center", fontsize="small", ncols=5)
    figure.savefig(path, dpi=150)
