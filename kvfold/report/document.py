"""What a report is made of: sections with tables and figures, where each comes from, and the summary of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvfold.commands.measure import ORDINARY
from kvfold.errors import KVFoldError
from kvfold.layerformats import ModelFormat

SUMMARY_NOTE = (
    "bits: all-in, per element. KL: mean, nats per token. top-1: same most likely token. perplexity: its change, and "
    "for none, the model without compression, itself. found: needles. smaller: times fewer bytes than bf16, at so many "
    "tokens. decode: from the slowest to the fastest shape, with the faster of kvfold's backends. Different sections "
    "are of different models, texts or machines."
)


@dataclass(frozen=True)
class Origin:
    """Where the figures of a file come from; None and empty where it does not say."""

    file: str
    command: str | None = None
    date: str | None = None
    commit: str | None = None
    device: str | None = None
    versions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def facts(self) -> str:
        """All but the command and the remarks, in a line."""
        commit = None if self.commit is None else f"commit {self.commit}"
        return ", ".join(fact for fact in (commit, self.date, self.device, *self.versions) if fact)


@dataclass(frozen=True)
class Table:
    """Cells of text; below a line break in a cell stands what is said more softly, an interval say.

    Attributes:
        text_columns: Columns whose cells are no numbers.
        groups: Titles over so many columns, and the number of the section that each is of; empty without.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)
    groups: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True)
class Picture:
    """A figure. ``draw`` makes it of matplotlib's, under :func:`kvfold.report.drawing.style`."""

    title: str
    caption: str
    origins: Sequence[Origin]
    draw: Callable[[], Any]


class Column(NamedTuple):
    """What a section says in the summary, by format."""

    title: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """Figures that may stand beside each other, because they were measured on the same thing.

    Attributes:
        facts: What they were measured on.
        bits: All-in bits per element, by format; they order the summary.
    """

    title: str
    facts: str
    blocks: Sequence[Table | Picture]
    notes: Sequence[str] = ()
    columns: Sequence[Column] = ()
    bits: Mapping[str, float] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        return [block for block in self.blocks if isinstance(block, Picture)]

    def with_files(self) -> Section:
        """The same, with the names of its files in the title."""
        files = dict.fromkeys(origin.file for picture in self.pictures for origin in picture.origins)
        return replace(self, title=f"{self.title} ({', '.join(files)})") if files else self


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        made: By which kvfold, and when.
        left_out: Files that were not used, and why.
    """

    sections: Sequence[Section]
    made: str
    left_out: Sequence[tuple[str, str]] = ()

    @property
    def pictures(self) -> int:
        return sum(len(section.pictures) for section in self.sections)

    def summary(self) -> Table:
        """Format by format what every section says of it. kvfold's own come first, those of many bits before others."""
        bits: dict[str, float] = {}
        for section in self.sections:
            bits = {**section.bits, **bits}
        names = dict.fromkeys(name for section in self.sections for col in section.columns for name in col.values)
        ordered = sorted(names, key=lambda name: _place(name, bits.get(name)))
        shown = [(number, section) for number, section in enumerate(self.sections, 1) if section.columns]
        columns = [column for _, section in shown for column in section.columns]
        return Table(
            "Summary",
            ["format", *(column.title for column in columns)],
            [[name, *(column.values.get(name, "") for column in columns)] for name in ordered],
            groups=[(section.title, number, len(section.columns)) for number, section in shown],
        )


def own_format(name: str) -> ModelFormat | None:
    """The format of kvfold's that has this name; None if none has, or if the name is another system's."""
    if ":" in name:
        return None
    try:
        return ModelFormat.parse(name)
    except KVFoldError:
        return None


def _place(name: str, bits: float | None) -> tuple[int, float, str]:
    if name == ORDINARY:
        return 0, 0.0, name
    fmt = own_format(name)
    if fmt is not None and bits is None:
        bits = fmt.base.bits_per_element(128)  # of its other layers nobody knows how many there are
    return 1 if fmt is not None else 2, -(bits or 0.0), name
