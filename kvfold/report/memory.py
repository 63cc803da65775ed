"""Files of ``kvfold storage`` and ``kvfold plan``: bytes against context as they were counted, and how many tokens fit
into a memory, which the planner computes for the shapes that those files name."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kvfold.commands.measure import ORDINARY
from kvfold.errors import KVFoldError
from kvfold.formats import PAGE_SIZES
from kvfold.layerformats import ModelFormat, read_layers
from kvfold.modelshape import FULL, KINDS, LINEAR, SLIDING, LayerGroup, ModelShape
from kvfold.planner import cache_bytes, plan
from kvfold.report.document import Column, Origin, Picture, Section, Table
from kvfold.report.drawing import SOFT, WIDTH, Name, hue, log_axis, log_limits, name_ends, new_figure, room_for
from kvfold.report.entries import LINE, Damaged, Entry

GIB = 1 << 30
MEMORY = 80 * GIB
"""Where capacity curves end unless a plan names more."""
POINTS = 40


class Bytes(NamedTuple):
    """What a format holds after so many tokens, as a storage file says."""

    format: str
    tokens: int
    total: int
    planned_equal: bool
    planned_for_tokens: int
    ratio: float


class Fit(NamedTuple):
    """How many tokens fit, as a plan says; None where it never gets full."""

    format: str
    tokens: int | None


@dataclass(frozen=True)
class Storage:
    """A file of ``kvfold storage``."""

    origin: Origin
    shape: ModelShape
    page_size: int
    live: str
    rows: list[Bytes]

    @property
    def formats(self) -> list[str]:
        return [name for name in dict.fromkeys(row.format for row in self.rows) if name != ORDINARY]


@dataclass(frozen=True)
class Plan:
    """A file of ``kvfold plan``."""

    origin: Origin
    shape: ModelShape
    page_size: int
    memory: int
    rows: list[Fit]

    @property
    def formats(self) -> list[str]:
        return [row.format for row in self.rows]


def read_storage(data: Entry, origin: Origin) -> Storage:
    """Read what ``kvfold storage --json`` wrote; raises :class:`Damaged`."""
    settings = data["settings"]
    layers = data["layers"].list()
    fewer = [layer for layer in layers if layer["live_layers"].whole() < layer["layers"].whole()]
    live = " and ".join(
        f"{layer['live_layers'].whole()} of {layer['layers'].whole()} {layer['kind'].text()}" for layer in fewer
    )
    return Storage(
        origin,
        _shape(data, settings["model"].text(), settings["itemsize"]),
        _page_size(settings),
        live,
        [
            Bytes(
                row["format"].text(),
                row["tokens"].count(),
                row["total"].count(),
                row["planned_equal"].flag(),
                row["planned_for_tokens"].whole(),
                row["ratio"].positive(),
            )
            for row in data["rows"].list()
        ],
    )


def read_plan(data: Entry, origin: Origin) -> Plan:
    """Read what ``kvfold plan --json`` printed; raises :class:`Damaged`."""
    rows = [
        Fit(row["format"].text(), None if (tokens := row.maybe("tokens")) is None else tokens.whole())
        for row in data["rows"].list()
    ]
    shape = _shape(data, data["model"].text(), data["itemsize"])
    return Plan(origin, shape, _page_size(data), data["memory_bytes"].count(), rows)


def _page_size(settings: Entry) -> int:
    size = settings["page_size"].whole()
    if size not in PAGE_SIZES:
        raise Damaged(f"{settings['page_size'].place} is none of {', '.join(map(str, PAGE_SIZES))}: {size}")
    return size


def _shape(data: Entry, name: str, itemsize: Entry) -> ModelShape:
    groups: list[LayerGroup] = []
    at: dict[int, int] = {}
    for layer in data["layers"].list():
        sizes = (layer[key].whole() for key in ("layers", "num_kv_heads", "head_size", "head_size_v", "window"))
        kind = layer["kind"].text()
        if kind not in KINDS:
            raise Damaged(f"{layer.place}.kind is none of {', '.join(KINDS)}: {kind}")
        try:
            groups.append(LayerGroup(kind, *sizes))
        except KVFoldError as error:
            raise Damaged(f"{layer.place}: {error}") from None
        at |= dict.fromkeys(_places(layer, at), len(groups) - 1)
    if not any(group.kind in (FULL, SLIDING) for group in groups):
        raise Damaged("layers: none of them keeps keys and values")
    order = [at.get(index, len(groups)) for index in range(max(at, default=-1) + 1)]
    if missing := order.count(len(groups)):  # the file leaves out layers that store nothing
        groups.append(LayerGroup(LINEAR, missing))
    return ModelShape(tuple(groups), itemsize.count(), name, order=tuple(order))


def _places(layer: Entry, taken: Container[int]) -> list[int]:
    """Which layers of the model a group's are; none where the file, an older one, does not tell."""
    at = layer.maybe("at")
    if at is None:
        return []
    try:
        places = read_layers(at.text(LINE), at.place)
    except KVFoldError as error:
        raise Damaged(f"{at.place}: {error}") from None
    if len(set(places)) != layer["layers"].whole() or any(place in taken for place in places):
        raise Damaged(f"{at.place} is not {layer['layers'].whole()} layers of its own: {at.text()}")
    return places


# --- sections ---------------------------------------------------------------------------------------------------------


def sections(files: Sequence[Storage | Plan]) -> list[Section]:
    """A section for each model: its files have the same layers, dtype, pages and name."""
    groups: dict[tuple[object, ...], list[Storage | Plan]] = {}
    for file in files:
        groups.setdefault((file.shape, file.page_size), []).append(file)
    return [_section(group) for group in groups.values()]


def _section(files: Sequence[Storage | Plan]) -> Section:
    shape, page_size = files[0].shape, files[0].page_size
    storages = [file for file in files if isinstance(file, Storage)]
    plans = [file for file in files if isinstance(file, Plan)]
    formats, notes = _that_can_be_planned(shape, page_size, files)
    memory = max([MEMORY * (not plans), *(file.memory for file in plans)])
    blocks: list[Table | Picture] = [
        Picture(
            "Tokens against memory",
            "How many tokens of one sequence fit into a memory for the KV cache, in whole pages: computed by the "
            "planner for the shape in the file, not measured. Dots: what the file of a plan says.",
            [file.origin for file in files],
            lambda: capacity(shape, page_size, formats, memory, plans),
        )
    ]
    for file in storages:
        blocks += [
            Picture(
                "Bytes against context",
                "Dots: bytes of the live buffers, over all layers. Lines: the planner's figure for the tokens alone, "
                "without the room that a growing cache keeps."
                + (f" Allocated were {file.live} layers, whose bytes are multiplied." if file.live else ""),
                [file.origin],
                partial(growth, file),
            ),
            _table(file),
        ]
        wrong = [f"{row.format} at {row.tokens:,} tokens" for row in file.rows if not row.planned_equal]
        if wrong:
            notes.append(f"{file.origin.file}: live bytes and planned bytes differ: {', '.join(wrong)}.")
    longest = {row.format: row for file in storages for row in sorted(file.rows, key=lambda row: row.tokens)}
    most = max((row.tokens for row in longest.values()), default=0)
    return Section(
        title=f"Memory: {shape.name or 'model'}",
        facts=f"{', '.join(str(group) for group in shape.groups)}; pages of {page_size} tokens.",
        blocks=blocks,
        notes=notes,
        columns=[
            Column(
                f"smaller at {most:,}",
                {name: f"{row.ratio:.2f}x" for name, row in longest.items() if row.tokens == most},
            )
        ]
        if longest
        else [],
    )


def _that_can_be_planned(
    shape: ModelShape, page_size: int, files: Sequence[Storage | Plan]
) -> tuple[list[str], list[str]]:
    """Formats of the files, bf16 and fp8 first, and why others are left out."""
    formats, notes = {"kbf16vbf16": None, "kf8vf8": None}, []
    for name in dict.fromkeys(name for file in files for name in file.formats):
        try:
            cache_bytes(shape, name, 1, page_size)
        except KVFoldError as error:
            notes.append(f"{name} has no capacity curve: {error}.")
        else:
            formats[str(ModelFormat.parse(name))] = None
    return list(formats), notes


def _table(file: Storage) -> Table:
    tokens = sorted({row.tokens for row in file.rows})
    cells = []
    for name in dict.fromkeys(row.format for row in file.rows):
        of = {row.tokens: row for row in file.rows if row.format == name}
        smaller = {count: "" if name == ORDINARY else f"\n{row.ratio:.2f}x smaller" for count, row in of.items()}
        shown = (f"{of[count].total:,}{smaller[count]}" if count in of else "" for count in tokens)
        cells.append([f"{name} (bf16)" if name == ORDINARY else name, *shown])
    return Table("Live bytes", ["format", *(f"{count:,} tokens" for count in tokens)], cells)


# --- figures ----------------------------------------------------------------------------------------------------------


def capacity(shape: ModelShape, page_size: int, formats: Sequence[str], memory: int, plans: Sequence[Plan]) -> Any:
    """Tokens against memory, a line for each format; formats of the same capacity share one."""
    steps = [max(1, memory * step // POINTS) for step in range(1, POINTS + 1)]
    rows = [plan(shape, step, 1, formats, page_size) for step in steps]
    lines: dict[tuple[int | None, ...], list[str]] = {}
    for place, last in enumerate(rows[-1]):
        lines.setdefault(tuple(row[place].tokens for row in rows), []).append(str(last.format))
    figure = new_figure(4.8)
    figure.subplots_adjust(left=0.095, top=0.97, bottom=0.11)
    axes = figure.subplots()
    axes.set_xlabel("memory for the KV cache, GiB")
    axes.set_ylabel("tokens")
    axes.set_xlim(0, memory / GIB)
    names = []
    most = max((tokens for line in lines for tokens in line if tokens is not None), default=0)
    axes.set_ylim(0, 1.04 * most or 1)
    axes.yaxis.set_major_formatter(_count)
    known: dict[str, str] = {}
    for number, (tokens, same) in enumerate(lines.items()):
        color = SOFT if "kbf16vbf16" in same else hue(number - 1)
        known |= dict.fromkeys(same, color)
        text = ", ".join("bf16" if name == "kbf16vbf16" else name for name in same)
        kept = [(0.0, 0), *((step / GIB, n) for step, n in zip(steps, tokens, strict=True) if n is not None)]
        axes.plot(*zip(*kept, strict=True), color=color, linewidth=1.5)
        end = "no limit" if tokens[-1] is None else f"{tokens[-1]:,}"
        names.append(Name(*kept[-1], f"{text}: {end}", color))
    for file in plans:
        for row in file.rows:
            if row.tokens is not None and row.format in known:
                axes.plot([file.memory / GIB], [row.tokens], "o", color=known[row.format], markersize=5, clip_on=False)
    figure.subplots_adjust(right=1 - (0.3 + room_for(name.text for name in names)) / WIDTH)
    name_ends(axes, names)
    return figure


def _count(value: float, _: object = None) -> str:
    """A number of tokens on an axis."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def growth(file: Storage) -> Any:
    """Bytes against tokens, both logarithmic."""
    figure = new_figure(4.4)
    figure.subplots_adjust(left=0.095, top=0.97, bottom=0.11)
    axes = figure.subplots()
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("MiB")
    log_axis(axes.xaxis, base=2)
    log_axis(axes.yaxis, base=10, subs=(1, 2, 5))
    tokens = sorted({row.tokens for row in file.rows})
    axes.set_xlim(log_limits(tokens, 1.15))
    axes.set_ylim(log_limits([size / (1 << 20) for row in file.rows for size in _sizes(row)], 1.3))
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    names = []
    for place, name in enumerate(dict.fromkeys(row.format for row in file.rows)):
        mine = sorted((row for row in file.rows if row.format == name), key=lambda row: row.tokens)
        color = SOFT if name == ORDINARY else hue(place - 1)
        xs = [row.tokens for row in mine]
        axes.plot(xs, [_sizes(row)[-1] / (1 << 20) for row in mine], color=color, linewidth=1.2)
        axes.plot(xs, [row.total / (1 << 20) for row in mine], "o", color=color, markersize=4.5)
        shown = "none (bf16)" if name == ORDINARY else f"{name}: {mine[-1].ratio:.2f}x smaller"
        names.append(Name(xs[-1], mine[-1].total / (1 << 20), shown, color))
    figure.subplots_adjust(right=1 - (0.3 + room_for(name.text for name in names)) / WIDTH)
    name_ends(axes, names)
    return figure


def _sizes(row: Bytes) -> tuple[int, int]:
    return row.total, row.planned_for_tokens or row.total
