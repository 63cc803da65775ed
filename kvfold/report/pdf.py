"""A report as PDF: the summary, and the same figures as in HTML, a page each."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from kvfold.commands import table
from kvfold.report.document import SUMMARY_NOTE, Picture, Report
from kvfold.report.drawing import INK, SOFT, WIDTH, new_figure, style

CHARACTER = 0.0602
"""Inches of a character of 100 in DejaVu Sans Mono at 7.2 points."""
LINE_WIDTH = 150


def pages(report: Report) -> bytes:
    """The whole file."""
    from matplotlib.backends.backend_pdf import PdfPages

    written = io.BytesIO()
    with style(), PdfPages(written, metadata={"Title": "kvfold report"}) as pdf:
        pdf.savefig(_first(report), bbox_inches="tight", pad_inches=0.5)
        for number, section in enumerate(report.sections, 1):
            for picture in section.pictures:
                title = f"{number}. {section.title}: {picture.title}"
                pdf.savefig(_captioned(picture, title, section.facts), bbox_inches="tight", pad_inches=0.4)
    return written.getvalue()


def _captioned(picture: Picture, title: str, facts: str) -> Any:
    """The figure with its words above and below it."""
    figure = picture.draw()
    width, height = figure.get_size_inches()
    per_line = int(LINE_WIDTH * width / WIDTH)
    above = textwrap.wrap(facts, per_line)
    figure.text(0, 1 + 0.12 / height, "\n".join(above), fontsize=8, va="bottom", color=SOFT, linespacing=1.4)
    title = textwrap.fill(title, int(0.6 * per_line))
    figure.text(0, 1 + (0.2 + 0.16 * len(above)) / height, title, fontsize=12, va="bottom", fontweight="bold")
    lines = [picture.caption]
    for origin in picture.origins:
        command = f": {origin.command}" if origin.command else ""
        remarks = "".join(f" ({remark})" for remark in origin.remarks)
        facts_of_file = f"; {origin.facts}" if origin.facts else ""
        lines.append(f"From {origin.file}{command}{facts_of_file}.{remarks}")
    below = "\n".join(textwrap.fill(line, per_line) for line in lines)
    figure.text(0, -0.1 / height, below, fontsize=8, va="top", color=SOFT, linespacing=1.4)
    return figure


def _first(report: Report) -> Any:
    """The title page: the summary as a table of plain text, and what its numbers mean."""
    summary = report.summary()
    numbers = ["", *(f"({number})" for _, number, span in summary.groups for _ in range(span))]
    rows = [[f"{cell}" for cell in row] for row in summary.rows]
    head = [f"{name} {number}".strip() for name, number in zip(summary.header, numbers, strict=True)]
    lines = table(head, rows) if rows else ""
    listed = [f"({number}) {section.title}. {section.facts}" for number, section in enumerate(report.sections, 1)]
    left_out = [f"Not in it: {name}: {reason}" for name, reason in report.left_out]
    width = max(WIDTH, CHARACTER * max(map(len, lines.splitlines()), default=0))
    per_line = int(LINE_WIDTH * width / WIDTH)
    words = "\n".join(
        textwrap.fill(line, per_line, subsequent_indent="     ") for line in (SUMMARY_NOTE, *listed, *left_out)
    )
    height = 0.145 * (lines.count("\n") + words.count("\n") + 4) + 0.6
    figure = new_figure(height, width)
    figure.text(0, 1, "kvfold report", fontsize=16, fontweight="bold", va="top", color=INK)
    figure.text(0, 1 - 0.35 / height, report.made, fontsize=8, va="top", color=SOFT)
    figure.text(0, 1 - 0.65 / height, lines, fontsize=7.2, family="DejaVu Sans Mono", va="top", linespacing=1.25)
    below = 0.65 + 0.127 * (lines.count("\n") + 2)
    figure.text(0, 1 - below / height, words, fontsize=8, va="top", color=SOFT, linespacing=1.4)
    return figure
