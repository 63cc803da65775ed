"""Files of ``kvfold needle``: heat maps of what is found, the uncompressed model beside every few formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kvfold.commands.measure import ORDINARY
from kvfold.eval.bootstrap import Interval
from kvfold.report.document import Column, Origin, Picture, Section, Table
from kvfold.report.drawing import WIDTH, new_figure
from kvfold.report.entries import LINE, Damaged, Entry

ACROSS = 5
"""Formats beside the uncompressed model in one figure."""


class Cell(NamedTuple):
    """What was found at one length and depth."""

    length: int
    depth: float
    found: int
    log_prob: float


@dataclass(frozen=True)
class Row:
    """A format, or the uncompressed model."""

    format: str
    bits: float | None
    recall: Interval
    log_prob: Interval
    log_prob_change: Interval | None
    lost: int
    gained: int
    cells: list[Cell]


@dataclass(frozen=True)
class Run:
    """One file; ``needles`` counts them by length and depth."""

    origin: Origin
    model: str
    dtype: str
    text_file: str
    guess: float
    needles: dict[tuple[int, float], int]
    rows: list[Row]

    @property
    def total(self) -> int:
        return sum(self.needles.values())


def read(data: Entry, origin: Origin) -> Run:
    """Read what ``kvfold needle --json`` wrote; raises :class:`Damaged`."""
    settings = data["settings"]
    needles: dict[tuple[int, float], int] = {}
    for needle in data["needles"].list():
        cell = needle["length"].whole(), needle["depth"].number()
        needles[cell] = needles.get(cell, 0) + 1
    guess = settings["log_prob_of_a_guess"]
    if guess.number() >= 0:
        raise Damaged(f"{guess.place} is not below 0: {guess.value}")
    return Run(
        origin,
        settings["model"].text(),
        settings["dtype"].text(),
        re.split(r"[\\/]", settings["text"]["file"].text(LINE))[-1],
        guess.number(),
        needles,
        [_row(row) for row in data["rows"].list()],
    )


def _row(row: Entry) -> Row:
    bits, change = row.maybe("bits_per_element"), row.maybe("log_prob_change")
    return Row(
        format=row["format"].text(),
        bits=None if bits is None else bits.positive(),
        recall=row["recall"].interval(),
        log_prob=row["log_prob"].interval(),
        log_prob_change=None if change is None else change.interval(),
        lost=row["lost"].whole(),
        gained=row["gained"].whole(),
        cells=[
            Cell(c["length"].whole(), c["depth"].number(), c["found"].whole(), c["log_prob"].number())
            for c in row["cells"].list()
        ],
    )


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each file."""
    return [_section(run) for run in runs]


def _section(run: Run) -> Section:
    ordinary = [row for row in run.rows if row.format == ORDINARY]
    formats = [row for row in run.rows if row.format != ORDINARY]
    pieces = [formats[start : start + ACROSS] for start in range(0, len(formats), ACROSS)] or [[]]
    lengths, depths = (sorted(set(values)) for values in zip(*run.needles, strict=True)) if run.needles else ([], [])
    pictures = [
        Picture(
            f"What is found, and how sure of it the model is{_part(place, pieces)}",
            "Above: needles found of those hidden, by length of the prompt and depth in the text. Below: mean "
            f"log-probability of the number, nats per digit; who knows nothing has {run.guess:.2f}. {ORDINARY}: the "
            "model without compression.",
            [run.origin],
            partial(heat_maps, run, [*ordinary, *piece]),
        )
        for place, piece in enumerate(pieces)
    ]
    return Section(
        title=f"Needles: {run.model} in {run.text_file}",
        facts=f"{run.total} needles, {len(lengths)} lengths by {len(depths)} depths; {run.dtype}.",
        blocks=[*(pictures if run.needles and run.rows else []), _table(run)],
        columns=[
            Column("found", {row.format: f"{round(row.recall.value * run.total)}/{run.total}" for row in run.rows})
        ],
        bits={row.format: row.bits for row in formats if row.bits is not None},
    )


def _part(place: int, pieces: Sequence[object]) -> str:
    return f" ({place + 1} of {len(pieces)})" if len(pieces) > 1 else ""


def _table(run: Run) -> Table:
    header = ["format", "bits", "found", "nats per digit", "change", "lost", "gained"]
    cells = []
    for row in run.rows:
        own = row.log_prob_change
        cells.append(
            [
                row.format,
                "" if row.bits is None else f"{row.bits:.3f}",
                f"{row.recall.value:.1%}\n{_range(row.recall, '{:.1%}')}",
                f"{row.log_prob.value:.3f}\n{_range(row.log_prob, '{:.3f}')}",
                "" if own is None else f"{own.value:+.3f}\n{_range(own, '{:+.3f}')}",
                *(["", ""] if row.format == ORDINARY else [str(row.lost), str(row.gained)]),
            ]
        )
    return Table("All needles together, with 95 % intervals", header, cells)


def _range(figure: Interval, form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{form.format(figure.low).rstrip('%')} … {form.format(figure.high)}"


def heat_maps(run: Run, rows: Sequence[Row]) -> Any:
    """Needles found, and below them their log-probability: lengths to the right, depths downwards, a row a panel."""
    from matplotlib import colormaps

    lengths, depths = (sorted(set(values)) for values in zip(*run.needles, strict=True))
    panel_height = 0.26 * len(depths) + 0.1
    height = 2 * panel_height + 1.25
    width = max(WIDTH, 1.6 + (0.3 * len(lengths) + 0.15) * len(rows))
    figure = new_figure(height, width)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.75 / width, top=1 - 0.35 / height, bottom=0.55 / height, wspace=0.06, hspace=0.12
    )
    panels = figure.subplots(2, len(rows), sharex=True, sharey=True, squeeze=False)
    kinds = (("found", 0.0, 1.0), ("nats per digit", run.guess, 0.0))
    colors = colormaps["RdYlBu"]
    for line, (label, low, high) in enumerate(kinds):
        for axes, row in zip(panels[line], rows, strict=True):
            grid = [[float("nan")] * len(lengths) for _ in depths]
            for cell in row.cells:
                if (cell.length, cell.depth) not in run.needles:
                    continue
                x, y = lengths.index(cell.length), depths.index(cell.depth)
                needles = run.needles[cell.length, cell.depth]
                grid[y][x] = cell.log_prob if line else cell.found / needles
                words = f"{cell.log_prob:.2f}" if line else f"{cell.found}/{needles}"
                red, green, blue, _ = colors(max(0.0, min(1.0, (grid[y][x] - low) / (high - low))))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=7,
                          color="#ffffff" if dark else "#000000")  # fmt: skip
            mesh = axes.pcolormesh(grid, cmap=colors, vmin=low, vmax=high, edgecolors="none", antialiased=False)
            axes.set_xticks([x + 0.5 for x in range(len(lengths))], [f"{length:,}" for length in lengths])
            axes.set_yticks([y + 0.5 for y in range(len(depths))], [f"{depth:g} %" for depth in depths])
            axes.tick_params(length=0, labelsize=7)
            axes.tick_params(axis="x", labelrotation=90 if len(lengths) > 4 or len(rows) > 5 else 0)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            if not line:
                axes.set_title(row.format if row.bits is None else f"{row.format}, {row.bits:.2f} bits", fontsize=9)
        box = panels[line][-1].get_position()
        scale = figure.add_axes((1 - 0.62 / width, box.y0, 0.12 / width, box.height))
        _color_scale(scale, mesh, label)
    panels[0][0].set_ylim(len(depths), 0)
    figure.text(0.5, 0.12 / height, "tokens", ha="center", fontsize=9)
    figure.text(0.12 / width, 0.5, "depth of the needle", rotation=90, va="center", fontsize=9)
    return figure


def _color_scale(axes: Any, mesh: Any, label: str) -> None:
    """The scale of a heat map's colours, of 32 plain pieces: matplotlib's own is an image or has seams."""
    low, high = mesh.get_clim()
    steps = [[low + (high - low) * (place + 0.5) / 32] for place in range(32)]
    edges = [low + (high - low) * place / 32 for place in range(33)]
    axes.pcolormesh([0, 1], edges, steps, cmap=mesh.cmap, vmin=low, vmax=high, edgecolors="face", linewidth=0.3)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
