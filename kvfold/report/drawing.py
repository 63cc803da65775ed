"""How figures look: colours that have a light and a dark shade, axes, and names beside points and lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from warnings import catch_warnings, filterwarnings

INK, SOFT, GRID = "#1b1f24", "#646d78", "#dde1e6"
HUES = (
    "#1a66d6", "#cc3d57", "#22893f", "#8440ab", "#b86a00",
    "#0b8083", "#b03a8c", "#5d6673", "#84622a", "#4356bb",
)  # fmt: skip
SHADES = {
    INK: "#e8eaed", SOFT: "#a3abb5", GRID: "#363c44",
    **dict(zip(HUES, (
        "#70aaff", "#ff8799", "#5fd182", "#cc9df2", "#f2ae4b",
        "#4bcfd0", "#f08cce", "#a9b2bd", "#d0ae78", "#9dacfa",
    ), strict=True)),
}  # fmt: skip
"""The colours of text, lines and formats on paper, and on a dark screen."""

WIDTH = 9.0
"""Inches of a figure; the page shows them all equally wide."""


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for the report, whatever the user's own are."""
    from matplotlib import style as styles

    settings = {
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
        "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": SOFT,
        "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.minor.size": 0, "ytick.minor.size": 0,
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "kvfold", "pdf.fonttype": 42,
    }  # fmt: skip
    with styles.context(["default", settings]), catch_warnings():
        filterwarnings("ignore", "Glyph .* missing")  # a browser has other fonts
        yield


def new_figure(height: float, width: float = WIDTH) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def hue(place: int) -> str:
    """The colour of the ``place``-th of things that are told apart by colour."""
    return HUES[place % len(HUES)]


def place_axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes of so many inches, ``top`` from the figure's upper edge."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


# --- axes -------------------------------------------------------------------------------------------------------------


def plain(value: float, _: object = None) -> str:
    """A number on an axis, without powers of ten as long as it is readable."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:g}"


def log_axis(axis: Any, base: float = 10, subs: Sequence[float] = (1.0,)) -> None:
    """Make an axis of an ``axes`` logarithmic, with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=99))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def log_limits(values: Sequence[float], room: float = 1.5) -> tuple[float, float]:
    """Limits of a logarithmic axis that has all values in it, and some room."""
    return min(values) / room, max(values) * room


# --- names ------------------------------------------------------------------------------------------------------------


Point = tuple[float, float]


class Name(NamedTuple):
    """A text that belongs to a point of the data."""

    x: float
    y: float
    text: str
    color: str


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0


PASSES = 4
AWAY = (6.0, 10.0, 16.0, 26.0, 40.0, 56.0)
"""Points from a point to its name."""
ANGLES = (0, 180, 25, -25, 155, -155, 60, -60, 120, -120, 90, -90)


def name_points(axes: Any, names: Sequence[Name], lines: Sequence[Sequence[Point]] = (), size: float = 7.5) -> None:
    """Write names beside points, where they cover each other, the points and ``lines`` of upright and level pieces
    least; far ones get a thin line.

    The axes must have their scales and all of their data.
    """
    scale = axes.figure.dpi / 72
    points = _on_screen(axes, [(name.x, name.y) for name in names])
    taken = [_Box(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points]
    for line in lines:
        for (x, y), (next_x, next_y) in pairwise(_on_screen(axes, line)):
            low, high = (min(x, next_x), min(y, next_y)), (max(x, next_x), max(y, next_y))
            taken.append(_Box(low[0] - scale, low[1] - scale, high[0] + scale, high[1] + scale))
    boxes: dict[int, _Box] = {}
    for _ in range(PASSES):  # the first places each with those before it in view, the others with all
        for place in sorted(range(len(names)), key=lambda place: points[place]):
            boxes.pop(place, None)
            extent = _extent(axes, names[place].text, size)
            boxes[place] = _best_box(points[place], extent, [*taken, *boxes.values()], _Box(*axes.bbox.extents), scale)
    for place, box in boxes.items():
        (x, y), name = points[place], names[place]
        middle = (box.bottom + box.top) / 2
        near = min(max(x, box.left), box.right)  # of the text the place where a line to the point begins
        to_point = _to_point(name.color, (near - box.left) / (box.right - box.left))
        axes.annotate(
            name.text,
            (name.x, name.y),
            ((box.left - x) / scale, (middle - y) / scale),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=name.color,
            arrowprops=to_point if math.dist((x, y), (near, middle)) > 12 * scale else None,
        )


def _best_box(point: Point, extent: Point, taken: Sequence[_Box], frame: _Box, scale: float) -> _Box:
    """Where a text of an extent covers least of what is taken or outside the frame, and is near its point."""
    (x, y), (width, height) = point, extent
    best: tuple[float, _Box] | None = None
    for away in AWAY:
        for angle in ANGLES:
            dx, dy = away * scale * math.cos(math.radians(angle)), away * scale * math.sin(math.radians(angle))
            left = x + dx - (width if abs(angle) > 90 else width / 2 if abs(angle) == 90 else 0)
            box = _Box(left, y + dy - height / 2, left + width, y + dy + height / 2)
            outside = width * height - box.overlap(frame)
            cost = sum(box.overlap(other) for other in taken) + 3 * outside + 1.5 * away * scale
            if best is None or cost < best[0]:
                best = cost, box
    assert best is not None
    return best[1]


def name_ends(axes: Any, names: Sequence[Name], size: float = 7.5) -> None:
    """Write the names of lines to the right of the axes, at the height of their last points, none over another.

    The axes must have their scales and all of their data.
    """
    scale = axes.figure.dpi / 72
    left = axes.bbox.x1 + 13 * scale
    points = _on_screen(axes, [(name.x, name.y) for name in names])
    order = sorted(range(len(names)), key=lambda place: points[place][1])
    heights = _apart([points[place][1] for place in order], size * 1.25 * scale, axes.bbox.y0, axes.bbox.y1)
    for place, height in zip(order, heights, strict=True):
        (x, y), name = points[place], names[place]
        axes.annotate(
            name.text,
            (name.x, name.y),
            ((left - x) / scale, (height - y) / scale),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=name.color,
            arrowprops=_to_point(name.color, 0) | {"shrinkB": 3},
            annotation_clip=False,
        )


def _on_screen(axes: Any, points: Iterable[Point]) -> list[Point]:
    """Places of the data in pixels of the figure."""
    axes.get_xlim(), axes.get_ylim()  # which brings limits that follow the data up to date
    return [tuple(axes.transData.transform(point)) for point in points]


def _to_point(color: str, begin: float) -> dict[str, Any]:
    """The thin line from a name to its point; ``begin`` is where, from 0 at its left end to 1."""
    return {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (begin, 0.5)}


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising places near the wanted ones, ``gap`` apart, between two limits if there is room."""
    blocks: list[list[float]] = []  # mean of the first places that are wanted, how many
    for index, place in enumerate(wanted):
        blocks.append([place - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            last, count = blocks.pop()
            first, before = blocks[-1]
            blocks[-1] = [(first * before + last * count) / (before + count), before + count]
    starts = [start for start, count in blocks for _ in range(int(count))]
    places = [start + index * gap for index, start in enumerate(starts)]
    shift = max(0.0, low - places[0]) if places else 0.0
    places = [place + shift for place in places]
    over = max(0.0, places[-1] - high) if places else 0.0
    return (
        [min(place, high - (len(places) - 1 - index) * gap) for index, place in enumerate(places)] if over else places
    )


def _extent(axes: Any, text: str, size: float) -> tuple[float, float]:
    """Width and height of a text, in pixels of the figure."""
    dpi = axes.figure.dpi
    return text_width(text, size) * dpi + dpi / 36, size * 1.15 * dpi / 72


def room_for(texts: Iterable[str], size: float = 7.5) -> float:
    """Inches that the longest of the texts takes, but no more than a figure can give."""
    return min(2.5, max((text_width(text, size) for text in texts), default=0.0))


def text_width(text: str, size: float) -> float:
    """Inches that a text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text:
        return 0.0
    return float(TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans")).get_extents().width) / 72
