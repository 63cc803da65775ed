"""Files of ``kvfold fidelity``: those of the same model, text and windows share a section, and no others do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvfold.commands.measure import ORDINARY
from kvfold.eval.bootstrap import Interval
from kvfold.report import fidelity_figures as figures
from kvfold.report.document import Column, Origin, Picture, Section, Table, own_format
from kvfold.report.entries import LINE, Entry

METRICS = ("kl_mean", "kl_median", "kl_p999", "top1", "perplexity_change")
SAME_PERPLEXITY = 0.01
"""How far, relatively, the uncompressed model's perplexity may differ between files that share a section: a folder's
name does not say which weights are in it."""


class Setting(NamedTuple):
    """What has to be the same for figures to stand beside each other."""

    model: str
    dtype: str
    text: str
    windows: int
    window_tokens: int
    begins_with_bos: bool
    first_position: int
    chunk: str
    chunk_tokens: int
    page_size: int


class Bin(NamedTuple):
    """Mean KL of the positions ``first`` to ``last``."""

    first: int
    last: int
    kl: Interval


@dataclass(frozen=True)
class Row:
    """The figures of a format, or of the noise floor, whose bits are 0."""

    kind: str
    format: str
    bits: float
    bytes_per_token: float | None
    cache: str | None
    source: str | None
    figures: dict[str, Interval]
    positions: list[Bin]
    origin: Origin

    @property
    def system(self) -> str:
        """Whose format it is; of kvfold's own also which family."""
        if self.kind == "rival":
            return self.format.partition(":")[0]
        fmt = own_format(self.format)
        sides = () if fmt is None else [side for own in fmt.formats for side in (own.k, own.v)]
        families = {side.family for side in sides}
        special = "trellis-coded" if "trellis" in families else "fp8" if families & {"fp8", "fp8cast"} else ""
        return f"kvfold, {special}" if special else "kvfold"

    @property
    def has_exact_tokens(self) -> bool:
        """Whether it keeps first or last tokens, which are not in its bits."""
        fmt = own_format(self.format)
        return fmt is not None and any(own.sinks or own.tail for own in fmt.formats)


@dataclass(frozen=True)
class Run:
    """One file."""

    origin: Origin
    setting: Setting
    text_file: str
    perplexity: Interval
    scored_tokens: int
    rows: list[Row]


def read(data: Entry, origin: Origin) -> Run:
    """Read what ``kvfold fidelity --json`` wrote; raises :class:`Damaged`."""
    settings = data["settings"]
    text = settings["text"]
    setting = Setting(
        model=settings["model"].text(),
        dtype=settings["dtype"].text(),
        text=text["sha256"].text(),
        windows=data["measured_windows"].whole(),
        window_tokens=settings["window_tokens"].whole(),
        begins_with_bos=settings["begins_with_bos"].flag(),
        first_position=settings["first_position"].whole(),
        chunk=settings["chunk"].text(),
        chunk_tokens=settings["chunk_tokens"].whole(),
        page_size=settings["page_size"].whole(),
    )
    return Run(
        origin,
        setting,
        re.split(r"[\\/]", text["file"].text(LINE))[-1],
        data["baseline"]["perplexity"].interval(),
        data["scored_tokens"].whole(),
        [_row(row, origin) for row in data["rows"].list()],
    )


def _row(row: Entry, origin: Origin) -> Row:
    stored, cache, source = (row.maybe(key) for key in ("bytes_per_token", "cache", "source"))
    kind = row["kind"].text()
    return Row(
        kind=kind,
        format=row["format"].text(),
        bits=0.0 if kind == "noise" else row["bits_per_element"].positive(),
        bytes_per_token=None if stored is None else stored.number(),
        cache=None if cache is None else cache.text(LINE),
        source=None if source is None else source.text(),
        figures={name: row[name].interval() for name in METRICS},
        positions=[Bin(b["first"].whole(), b["last"].whole(), b["kl"].interval()) for b in row["positions"].list()],
        origin=origin,
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each model, text and choice of windows."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if _belong_together(group[0], run)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return [_section(group) for group in groups]


def _belong_together(one: Run, other: Run) -> bool:
    near = abs(one.perplexity.value - other.perplexity.value) <= SAME_PERPLEXITY * one.perplexity.value
    return one.setting == other.setting and near


def _section(runs: Sequence[Run]) -> Section:
    first, setting = runs[0], runs[0].setting
    rows, doubles = _join(runs)
    noise = [row for run in runs for row in run.rows if row.kind == "noise"]
    pictures = _pictures(rows, noise, [run.origin for run in runs]) if rows else []
    windows = f"{setting.windows} window{'s' * (setting.windows != 1)}"
    chunk = "" if setting.chunk == "packed" else f", chunk={setting.chunk} ({setting.chunk_tokens} tokens)"
    return Section(
        title=f"Fidelity: {setting.model} on {first.text_file}",
        facts=(
            f"{windows} of {setting.window_tokens:,} tokens, {first.scored_tokens:,} tokens scored "
            f"from position {setting.first_position} on{chunk}; {setting.dtype}; pages of {setting.page_size}. "
            f"Perplexity of the uncompressed model: {first.perplexity.value:.2f}{_of(first.perplexity, '{:.2f}')}."
        ),
        blocks=[*pictures, _table(rows, noise, len(runs) > 1)],
        notes=_notes(rows, noise, doubles, setting),
        columns=[
            Column("bits", {row.format: f"{row.bits:.3f}" for row in rows}),
            Column("KL", {row.format: f"{row.figures['kl_mean'].value:.3g}" for row in rows}),
            Column("top-1", {row.format: f"{row.figures['top1'].value:.1%}" for row in rows}),
            Column(
                "perplexity",
                {ORDINARY: f"{first.perplexity.value:.2f}"}
                | {row.format: _change(row.figures["perplexity_change"].value) for row in rows},
            ),
        ]
        if rows
        else [],
        bits={row.format: row.bits for row in rows},
    )


def _pictures(rows: Sequence[Row], noise: Sequence[Row], origins: Sequence[Origin]) -> list[Picture]:
    return [
        Picture(
            "KL against bits",
            "Mean KL divergence of the next-token distribution from the uncompressed model's, with 95 % bootstrap "
            "intervals over the windows, against all-in bits per element. Lower left is better. The stairs are the "
            "Pareto frontier: no other format here has both fewer bits and a lower divergence. Noise floor: the "
            "uncompressed model against itself in another batch shape.",
            origins,
            lambda: figures.frontier(rows, noise),
        ),
        Picture(
            "KL against position",
            "Mean KL by position in the window; bands are intervals. The right end says most about long contexts.",
            origins,
            lambda: figures.by_position(rows, noise),
        ),
        Picture(
            "Top-1 agreement and perplexity",
            "Left: how often the most likely token is the uncompressed model's. Right: by how much perplexity on the "
            "text's own tokens rises, on an axis that is linear around 0. Bars are intervals.",
            origins,
            lambda: figures.agreement(rows),
        ),
    ]
    if not rows:
        return []


def _join(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """The rows of all formats, those of many bits first; of a format that is in several files the newest.

    Returns:
        The rows, and what was left out, in words.
    """
    chosen: dict[tuple[str, str], Row] = {}
    doubles = []
    for run in sorted(runs, key=lambda run: run.origin.date or ""):
        for row in run.rows:
            if row.kind == "noise":
                continue
            older = chosen.get((row.kind, row.format))
            if older is not None:
                doubles.append(f"{row.format} is in {older.origin.file} too; the newer figures are shown")
            chosen[row.kind, row.format] = row
    return sorted(chosen.values(), key=lambda row: (-row.bits, row.figures["kl_mean"].value)), doubles


def _table(rows: Sequence[Row], noise: Sequence[Row], several_files: bool) -> Table:
    with_source = any(row.source for row in rows)
    header = ["format", "bits", "bytes/token", "KL mean", "median", "99.9 %", "top-1", "perplexity"]
    header += ["read in"] * with_source + ["file"] * several_files
    cells = []
    for row in (*noise, *rows):
        line = [
            "noise floor" if row.kind == "noise" else row.format,
            f"{row.bits:.3f}" if row.bits else "",
            "" if row.bytes_per_token is None else f"{row.bytes_per_token:,.0f}",
            *(f"{row.figures[name].value:.3g}\n{_range(row.figures[name], '{:.3g}')}" for name in METRICS[:3]),
            f"{row.figures['top1'].value:.1%}\n{_range(row.figures['top1'], '{:.1%}')}",
            _change(row.figures["perplexity_change"].value)
            + f"\n{_range(row.figures['perplexity_change'], '{:+.2%}' if _small(row) else '{:+.1%}')}",
        ]
        cells.append(line + [row.source or ""] * with_source + [row.origin.file] * several_files)
    return Table("All figures, with 95 % intervals", header, cells, (0, *range(8, len(header))))


def _small(row: Row) -> bool:
    return abs(row.figures["perplexity_change"].value) < 0.1


def _change(value: float) -> str:
    return f"{value:+.2%}".replace("-0.00%", "+0.00%") if abs(value) < 0.1 else f"{value:+.1%}"


def _range(figure: Interval, form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{form.format(figure.low).rstrip('%')} … {form.format(figure.high)}"


def _of(figure: Interval, form: str) -> str:
    shown = _range(figure, form)
    return f" ({shown})" if shown else ""


def _notes(rows: Sequence[Row], noise: Sequence[Row], doubles: Sequence[str], setting: Setting) -> list[str]:
    notes = [f"{double}." for double in dict.fromkeys(doubles)]
    if setting.windows < 5:
        few = "one window has none" if setting.windows == 1 else f"from {setting.windows} windows they are too narrow"
        notes.append(f"Intervals need more windows: {few}.")
    if any(row.figures["kl_mean"].value == 0 for row in noise):
        notes.append("The noise floor is exactly 0: both runs of the uncompressed model are equal to the bit.")
    zero = [row.format for row in rows if row.figures["kl_mean"].value <= 0]
    if zero:
        notes.append(f"{', '.join(zero)}: the divergence is 0, which a logarithmic axis does not have.")
    exact = [row.format for row in rows if row.has_exact_tokens]
    if exact:
        notes.append(
            f"{', '.join(exact)}: exact first or last tokens are not in the bits, only in the bytes; hollow, and no "
            "part of the frontier. They flatter short windows."
        )
    if any(row.kind == "rival" for row in rows):
        notes.append("Other systems' formats are simulated, not packed: docs/fidelity.md says how.")
    notes += [f"{row.format}: {row.cache}." for row in rows if row.cache is not None and "uncompressed:" in row.cache]
    return notes
