"""What ``kvfold needle`` measured, and how it is shown: figures of each format, table, JSON, heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.commands import table
from kvfold.commands.measure import ORDINARY
from kvfold.layerformats import ModelFormat

if TYPE_CHECKING:
    from kvfold.eval.bootstrap import Interval
    from kvfold.eval.needle import Prompt, Score

SHOWN_CELLS = 6


@dataclass(frozen=True)
class Task:
    """One needle of one cell.

    Attributes:
        length: Tokens asked for.
        depth: Percentage of the text before the needle.
        trial: From 0; trials of a cell differ in needle and text.
    """

    length: int
    depth: float
    trial: int
    prompt: Prompt

    @property
    def cell(self) -> tuple[int, float]:
        return self.length, self.depth

    def json(self) -> dict[str, object]:
        prompt = self.prompt
        about = {"length": self.length, "depth": self.depth, "trial": self.trial, "secret": prompt.needle.secret}
        return {**about, "tokens": len(prompt.ids), "at": prompt.at}


@dataclass
class Column:
    """One format, or the uncompressed model, and how it answered so far, needle by needle.

    Attributes:
        bits: The format's own all-in bits per element, over the compressed layers.
        cache: The cache, in words: which layers are not compressed.
    """

    name: str
    format: ModelFormat | None = None
    bits: float | None = None
    cache: str | None = None
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """What a format found of the needles of one length and depth; ``log_prob`` is their mean."""

    length: int
    depth: float
    needles: int
    found: int
    lost: int
    log_prob: float

    def json(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "needles"}


@dataclass(frozen=True)
class Row:
    """A format's figures; see ``kvfold needle --help``."""

    column: Column
    scores: list[Score]
    figures: dict[str, Interval]
    lost: int
    gained: int
    cells: list[Cell]

    @property
    def compressed(self) -> bool:
        return self.column.format is not None

    def json(self) -> dict[str, object]:
        column = self.column
        figures: dict[str, object] = {name: figure._asdict() for name, figure in self.figures.items()}
        if not self.compressed:  # it differs from itself in nothing
            figures |= {"recall_change": None, "log_prob_change": None}
        return {
            "format": column.name,
            "bits_per_element": column.bits,
            "cache": column.cache,
            **figures,
            "lost": self.lost,
            "gained": self.gained,
            "cells": [cell.json() for cell in self.cells],
            "found": [score.found for score in self.scores],
            "log_probs": [score.log_prob for score in self.scores],
        }


@dataclass(frozen=True)
class Result:
    """All figures of a run, over the needles that every column has answered."""

    tasks: Sequence[Task]
    rows: list[Row]

    @staticmethod
    def of(tasks: Sequence[Task], columns: Sequence[Column]) -> Result:
        """Compare the columns with the first, on the first ``len(tasks)`` needles, one at least."""
        from kvfold.eval.bootstrap import draw
        from kvfold.eval.needle import summarise

        base, draws, rows = columns[0].scores[: len(tasks)], draw(len(tasks)), []
        for column in columns:
            scores = column.scores[: len(tasks)]
            lost = [one.found and not other.found for one, other in zip(base, scores, strict=True)]
            gained = sum(other.found and not one.found for one, other in zip(base, scores, strict=True))
            cells = []
            for length, depth in sorted({task.cell for task in tasks}):
                mine = [index for index, task in enumerate(tasks) if task.cell == (length, depth)]
                found, missed = sum(scores[i].found for i in mine), sum(lost[i] for i in mine)
                mean = sum(scores[i].log_prob for i in mine) / len(mine)
                cells.append(Cell(length, depth, len(mine), found, missed, mean))
            rows.append(Row(column, scores, summarise(scores, base, draws), sum(lost), gained, cells))
        return Result(tasks, rows)

    @property
    def lengths(self) -> list[int]:
        return sorted({task.length for task in self.tasks})

    @property
    def depths(self) -> list[float]:
        return sorted({task.depth for task in self.tasks})

    @property
    def title(self) -> str:
        """How many needles there were."""
        parts = ((self.tasks, "needle"), (self.lengths, "length"), (self.depths, "depth"))
        needles, lengths, depths = (f"{len(values)} {what}{'s' * (len(values) > 1)}" for values, what in parts)
        return f"{needles} ({lengths} x {depths})"

    def json(self) -> dict[str, object]:
        return {"needles": [task.json() for task in self.tasks], "rows": [row.json() for row in self.rows]}


def text_of(result: Result) -> str:
    """The figures as tables, what they mean, and where needles were lost."""
    lines = [_figures(result), "", _marginals(result), "", *_notes(result)]
    for row in result.rows[1:]:
        if row.lost:
            cells = [cell for cell in row.cells if cell.lost]
            shown = [f"{c.length:,} at {c.depth:g} % ({c.lost} of {c.needles})" for c in cells[:SHOWN_CELLS]]
            more = f" and {len(cells) - SHOWN_CELLS} more cells" if len(cells) > SHOWN_CELLS else ""
            lines.append(f"{row.column.name} loses {row.lost}: {', '.join(shown)}{more}")
    lines += [
        f"{row.column.name}: {row.column.cache}"
        for row in result.rows
        if row.column.cache is not None and "uncompressed:" in row.column.cache
    ]
    return "\n".join(lines)


def _figures(result: Result) -> str:
    """The figures over all needles, each with its interval below it."""
    from kvfold.eval.needle import FIGURES

    header = ["format", "bits", "found", "change", "log-prob", "change", "lost", "gained"]
    lines = []
    for row in result.rows:
        shown = [name for name in FIGURES if row.compressed or not name.endswith("_change")]
        pairs = {name: _cells(name, row.figures[name]) for name in shown}
        values, spreads = ([pairs[name][part] if name in pairs else "" for name in FIGURES] for part in (0, 1))
        bits = "" if row.column.bits is None else f"{row.column.bits:.3f}"
        counts = [str(row.lost), str(row.gained)] if row.compressed else ["", ""]
        lines.append([row.column.name, bits, *values, *counts])
        if any(spreads):
            lines.append(["", "", *spreads, "", ""])
    return table(header, lines)


def _marginals(result: Result) -> str:
    """How many are found, by length and by depth."""
    header = ["found", *(f"{length:,}" for length in result.lengths), *(f"{depth:g} %" for depth in result.depths)]
    lines = []
    for row in result.rows:
        of_length = [[cell for cell in row.cells if cell.length == length] for length in result.lengths]
        of_depth = [[cell for cell in row.cells if cell.depth == depth] for depth in result.depths]
        shares = [(sum(c.found for c in cells), sum(c.needles for c in cells)) for cells in (*of_length, *of_depth)]
        lines.append([row.column.name, *(f"{found}/{needles}" for found, needles in shares)])
    return table(header, lines)


def _notes(result: Result) -> list[str]:
    from kvfold.eval.bootstrap import CONFIDENCE
    from kvfold.eval.needle import DIGITS, GUESS

    notes = [
        f"found: all {DIGITS} digits, as greedy decoding would write them. log-prob: of the number, nats per digit; a "
        f"guess has {GUESS:.2f}.",
        f"change: against the model without compression ({ORDINARY}), needle by needle. lost: found by it and not by "
        "the format.",
        f"Below a figure: its {CONFIDENCE:.0%} bootstrap interval over the needles."
        if len(result.tasks) > 1
        else "Intervals need more than one needle.",
    ]
    count = len(result.tasks)
    if count > 1 and any(row.figures["recall"].value in (0, 1) for row in result.rows):
        notes.append(
            f"An interval without width means that all {count} were alike: of many more, {min(1, 3 / count):.1%} may "
            "still differ."
        )
    recall = result.rows[0].figures["recall"].value
    if recall < 0.5:
        notes.append(
            f"The model itself finds {recall:.0%}: such a test says little about caches. Give a smaller --length, or "
            "another --model."
        )
    return notes


def _cells(name: str, figure: Interval) -> tuple[str, str]:
    """A figure and its interval, as the table shows them."""
    value = _number(name, figure.value)
    if figure.low is None or figure.high is None:
        return value, ""
    return value, f"{_number(name, figure.low).rstrip('%')}..{_number(name, figure.high)}"


def _number(name: str, value: float) -> str:
    sign = "+" if name.endswith("_change") else ""
    shown = f"{value:{sign}.1%}" if name.startswith("recall") else f"{value:{sign}.3f}"
    nothing = not shown.strip("+-0.%")
    return f"{sign}{shown.lstrip('+-')}" if nothing else shown  # no minus before a zero


def draw_plot(result: Result, path: Path, title: str) -> None:
    """For each format how many needles are found, and below it their log-probability; depth downwards."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    from kvfold.eval.needle import GUESS

    lengths, depths, rows = result.lengths, result.depths, result.rows
    width = max(1.6, 0.62 * len(lengths) + 0.4)
    figure = Figure(figsize=(1.6 + width * len(rows), 2.0 + 0.76 * len(depths)), layout="constrained")
    panels = figure.subplots(2, len(rows), sharex=True, sharey=True, squeeze=False)
    kinds: tuple[tuple[str, float, float], ...] = (("found", 0, 1), ("log-probability, nats per digit", GUESS, 0))
    for line, (label, low, high) in enumerate(kinds):
        for axes, row in zip(panels[line], rows, strict=True):
            grid = [[float("nan")] * len(lengths) for _ in depths]
            for cell in row.cells:
                x, y = lengths.index(cell.length), depths.index(cell.depth)
                grid[y][x] = cell.log_prob if line else cell.found / cell.needles
                words = f"{cell.log_prob:.2f}" if line else f"{cell.found}/{cell.needles}"
                light = 0.15 < (grid[y][x] - low) / (high - low) < 0.85
                axes.text(x, y, words, ha="center", va="center", fontsize=7, color="black" if light else "white")
            image = axes.imshow(grid, cmap="RdYlBu", vmin=low, vmax=high, aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=90, fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=7)
            if not line:
                axes.set_title(row.column.name, fontsize=9)
        figure.colorbar(image, ax=list(panels[line]), label=label)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
