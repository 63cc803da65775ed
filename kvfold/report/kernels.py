"""Files of ``kvfold bench``: how many times as fast as the baseline of the same run, shape by shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfold.bench.report import TITLES
from kvfold.report.document import Column, Origin, Picture, Section, Table
from kvfold.report.drawing import INK, SOFT, WIDTH, hue, log_axis, log_limits, new_figure, place_axes, room_for
from kvfold.report.entries import Entry

RIVAL_MARKS = ("x", "+", "1", "^", "v", "<", ">", "s")
BACKEND_MARKS = {"cuda": "o", "triton": "D"}
LINE, GAP = 0.24, 0.62
"""Inches of a shape's line, and between two panels."""


class Row(NamedTuple):
    """One kernel on one shape; ``ratio`` is the baseline's time over its."""

    kind: str
    case: str
    kernel: str
    ours: bool
    us: float
    ratio: float | None

    @property
    def backend(self) -> str:
        """Of a kernel of kvfold's, whose names are ``kvfold-<backend> <format>``."""
        return self.kernel.partition(" ")[0].partition("-")[2]

    @property
    def format(self) -> str:
        return self.kernel.partition(" ")[2] or self.kernel


@dataclass(frozen=True)
class Run:
    """One file."""

    origin: Origin
    baselines: dict[str, str]
    copy: float
    rows: list[Row]
    wrong: list[str]
    failures: list[str]

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]


def read(data: Entry, origin: Origin) -> Run:
    """Read what ``kvfold bench --json`` wrote; raises :class:`Damaged`."""
    rows = [
        Row(
            row["kind"].text(),
            row["case"].text(),
            row["kernel"].text(),
            row["ours"].flag(),
            row["us"].positive(),
            None if (ratio := row.maybe("ratio")) is None else ratio.positive(),
        )
        for row in data["rows"].list()
    ]
    return Run(
        origin,
        {kind: data["baselines"][kind].text() for kind in TITLES},
        data["copy_tb_per_second"].number(),
        rows,
        [
            f"{check['kernel'].text()}, {check['case'].text()}"
            for check in data["checks"].list()
            if not check["ok"].flag()
        ],
        [failure.text() for failure in data["failures"].list()],
    )


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each file: a figure of another run is no comparison."""
    return [_section(run) for run in runs]


def _section(run: Run) -> Section:
    base = run.baselines["decode"]
    compared = [row for row in run.rows if row.ratio is not None and row.kernel != run.baselines.get(row.kind)]
    kinds = [kind for kind in TITLES if any(row.kind == kind for row in compared)]
    blocks: list[Table | Picture] = []
    if kinds:
        against = ", ".join(f"{TITLES[kind].lower()} {run.baselines[kind]}" for kind in kinds)
        blocks.append(
            Picture(
                "Speed by shape",
                f"How many times as fast as the baseline in the same run ({against}), on a logarithmic axis: at 1 as "
                "fast, to the right faster. Colours are kvfold's formats, markers its backends; grey are others.",
                [run.origin],
                lambda: speeds(run, kinds),
            )
        )
    blocks += [_table(run, kind) for kind in TITLES if run.of(kind)]
    shapes = len({row.case for row in run.rows})
    copy = f" A large copy on this device: {run.copy:.2f} TB/s, read and written bytes counted." if run.copy else ""
    notes = []
    if run.wrong:
        notes.append(f"WRONG outputs: {'; '.join(run.wrong)}.")
    if run.failures:
        notes.append(f"FAILED: {'; '.join(run.failures)}.")
    return Section(
        title=f"Kernels: {run.origin.device or 'unknown device'}",
        facts=f"{shapes} shape{'s' * (shapes != 1)}.{copy}",
        blocks=blocks,
        notes=notes,
        columns=[Column(f"decode, x {base}", spread)] if (spread := _spread(run)) else [],
    )


def _spread(run: Run) -> dict[str, str]:
    """By format how fast decoding is, from the slowest shape to the fastest, with the fastest backend of each."""
    best: dict[str, dict[str, float]] = {}
    for row in run.of("decode"):
        if row.ours and row.ratio is not None:
            cases = best.setdefault(row.format, {})
            cases[row.case] = max(row.ratio, cases.get(row.case, 0.0))
    return {name: _from_to(min(cases.values()), max(cases.values())) for name, cases in best.items()}


def _from_to(low: float, high: float) -> str:
    return f"{low:.2f}x" if low == high else f"{low:.2f} … {high:.2f}x"


def _table(run: Run, kind: str) -> Table:
    rows, base = run.of(kind), run.baselines[kind]
    kernels = sorted(dict.fromkeys(row.kernel for row in rows), key=lambda name: (name != base, not _ours(rows, name)))
    found = {(row.case, row.kernel): row for row in rows}
    cells = [
        [case, *(_cell(found.get((case, kernel)), kernel == base) for kernel in kernels)]
        for case in dict.fromkeys(row.case for row in rows)
    ]
    return Table(f"{TITLES[kind]}: µs, and times as fast as {base}", ["shape", *kernels], cells)


def _ours(rows: Sequence[Row], kernel: str) -> bool:
    return any(row.ours for row in rows if row.kernel == kernel)


def _cell(row: Row | None, is_base: bool) -> str:
    if row is None:
        return ""
    ratio = "" if is_base or row.ratio is None else f"\n{row.ratio:.2f}x"
    return f"{row.us:,.1f}{ratio}"


def speeds(run: Run, kinds: Sequence[str]) -> Any:
    """A line for each shape, a panel for each kind of it, and a point for each kernel."""
    shown = {
        kind: [r for r in run.of(kind) if r.ratio is not None and r.kernel != run.baselines[kind]] for kind in kinds
    }
    cases = {kind: list(dict.fromkeys(row.case for row in rows)) for kind, rows in shown.items()}
    ours = [row for rows in shown.values() for row in rows if row.ours]
    formats = list(dict.fromkeys(row.format.partition("+pre")[0] for row in ours))
    backends = list(dict.fromkeys(row.backend for row in ours))
    rivals = list(dict.fromkeys(row.kernel for rows in shown.values() for row in rows if not row.ours))
    left = 0.25 + room_for((case for found in cases.values() for case in found), 8)
    right = 0.65 + max(1.0, room_for([*formats, *rivals], 8))
    heights = {kind: LINE * len(found) for kind, found in cases.items()}
    handles = _legend(formats, backends, rivals, ours)
    figure = new_figure(max(sum(heights.values()) + GAP * len(kinds) + 0.25, 0.2 * len(handles) + 0.2))
    ratios = [row.ratio for rows in shown.values() for row in rows if row.ratio is not None]
    top = 0.25
    for kind in kinds:
        axes = place_axes(figure, left, top, WIDTH - left - right, heights[kind])
        top += heights[kind] + GAP
        log_axis(axes.xaxis, base=2)
        axes.set_xlim(log_limits([*ratios, 1.0], 1.2))
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_title(f"{TITLES[kind]}, {run.baselines[kind]} = 1", loc="left")
        axes.set_yticks(range(len(cases[kind])), cases[kind])
        axes.set_ylim(len(cases[kind]) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for row in sorted(shown[kind], key=lambda row: row.ours):  # kvfold's over the others
            axes.plot([row.ratio], [cases[kind].index(row.case)], **_mark(row, formats, rivals))
    axes.set_xlabel("times as fast")
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1 - (right - 0.1) / WIDTH, 1), labelspacing=0.55)
    return figure


def _mark(row: Row, formats: Sequence[str], rivals: Sequence[str]) -> dict[str, Any]:
    if not row.ours:
        marker = RIVAL_MARKS[rivals.index(row.kernel) % len(RIVAL_MARKS)]
        return {"marker": marker, "color": SOFT, "markersize": 5, "markerfacecolor": "none", "linestyle": "none"}
    name, _, prescale = row.format.partition("+pre")
    color = hue(formats.index(name))
    return {
        "marker": BACKEND_MARKS.get(row.backend, "s"),
        "color": color,
        "markersize": 5.5,
        "markerfacecolor": "none" if prescale else color,
        "linestyle": "none",
    }


def _legend(formats: Sequence[str], backends: Sequence[str], rivals: Sequence[str], ours: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    def handle(label: str, marker: str, color: str, face: str | None = None, size: float = 5.5) -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, color=color, markerfacecolor=face or color,
                      markersize=size, label=label)  # fmt: skip

    handles = [handle(name, "o", hue(place), size=7) for place, name in enumerate(formats)]
    handles += [handle(f"kvfold, {name}", BACKEND_MARKS.get(name, "s"), INK) for name in backends]
    counts = sorted({row.format.partition("+pre")[2] for row in ours} - {""})
    handles += [handle(f"hollow: +pre{', +pre'.join(counts)}", "o", INK, "none")] if counts else []
    others = [handle(name, RIVAL_MARKS[i % len(RIVAL_MARKS)], SOFT, "none", 5) for i, name in enumerate(rivals)]
    return handles + others
