"""The figures of ``kvfold fidelity``: the bits-KL frontier, KL against position, agreement and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvfold.report.drawing import (
    HUES,
    INK,
    SOFT,
    WIDTH,
    Name,
    Point,
    hue,
    log_axis,
    log_limits,
    name_ends,
    name_points,
    new_figure,
    place_axes,
    room_for,
)

if TYPE_CHECKING:
    from kvfold.eval.bootstrap import Interval
    from kvfold.report.fidelity import Row

MARKS = {
    "kvfold": (HUES[0], "o"),
    "kvfold, trellis-coded": (HUES[1], "*"),
    "kvfold, fp8": (HUES[7], "P"),
    "vllm": (HUES[4], "s"),
    "paper": (HUES[2], "^"),
    "ggml": (HUES[3], "D"),
    "metal": (HUES[5], "v"),
    "lmdeploy": (HUES[6], "p"),
}
"""Colour and marker of a system's formats."""
OTHERS = ((HUES[8], "X"), (HUES[9], "h"), (HUES[1], "d"))
DASHES = ("-", "-.", ":")
SIZES = {"*": 10, "P": 7, "^": 6.5, "v": 6.5, "p": 7, "X": 7}


def marks_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every system among the rows, kvfold first."""
    systems = list(dict.fromkeys(row.system for row in rows))
    unknown = [system for system in systems if system not in MARKS]
    known = [system for system in MARKS if system in systems]
    return {name: MARKS[name] for name in known} | {
        name: OTHERS[place % len(OTHERS)] for place, name in enumerate(unknown)
    }


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in bits and mean KL, those of few bits first; exact tokens do not take part."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bits, row.figures["kl_mean"].value)):
        lowest = best[-1].figures["kl_mean"].value if best else float("inf")
        if not row.has_exact_tokens and row.figures["kl_mean"].value < lowest:
            best.append(row)
    return best


def frontier(rows: Sequence[Row], noise: Sequence[Row]) -> Any:
    """Mean KL against bits, both of which must be above 0."""
    shown = [row for row in rows if row.figures["kl_mean"].value > 0]
    floors = [row.figures["kl_mean"] for row in noise if row.figures["kl_mean"].value > 0]
    figure = new_figure(6.0)
    figure.subplots_adjust(left=0.085, right=0.82, top=0.97, bottom=0.09)
    axes = figure.subplots()
    axes.set_xlabel("bits per element, all-in")
    axes.set_ylabel("mean KL, nats per token")
    if noise and not floors:
        axes.text(1, 0.005, "noise floor: 0", transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=SOFT)
    if not shown:
        axes.text(0.5, 0.5, "no divergence above 0", transform=axes.transAxes, ha="center")
        return figure
    bits = [row.bits for row in shown]
    limits = [limit for row in shown for limit in row.figures["kl_mean"] if limit is not None and limit > 0]
    log_axis(axes.yaxis)
    axes.set_ylim(log_limits([*limits, *(floor.value for floor in floors)], 1.8))
    if max(bits) > 9.5:  # with 16 bits among them the others would have no room
        log_axis(axes.xaxis, base=2, subs=(1, 1.25, 1.5, 1.75))
        axes.set_xlim(log_limits(bits, 1.2))
    else:
        axes.set_xlim(min(bits) - 0.5, max(bits) + 0.5)
    for floor in floors:
        _floor(axes, floor)
    lines = [_stairs(axes, best)] if (best := pareto(shown)) else []
    names = []
    for order, (system, (color, marker)) in enumerate(marks_of(shown).items()):
        for row in shown:
            if row.system == system:
                lines.append(_point(axes, row, color, marker, 4 - order / 100))  # kvfold's over the others
                names.append(Name(row.bits, row.figures["kl_mean"].value, row.format, color))
        axes.plot([], [], marker, color=color, markersize=SIZES.get(marker, 5.5), label=system)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    name_points(axes, names, lines)
    return figure


def _floor(axes: Any, floor: Interval) -> None:
    if floor.low is not None and floor.high is not None and floor.low > 0:
        axes.axhspan(floor.low, floor.high, color=SOFT, alpha=0.2, linewidth=0)
    axes.axhline(floor.value, color=SOFT, linestyle="--", linewidth=1)
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
    axes.annotate("noise floor", (1, floor.value), (-2, 3), fontsize=7.5, color=SOFT, **place)


def _stairs(axes: Any, best: Sequence[Row]) -> list[Point]:
    """Draw the Pareto frontier: between two of its formats one has what that of fewer bits gives."""
    corners, height = [], axes.get_ylim()[1]
    for row in best:
        corners += [(row.bits, height), (row.bits, row.figures["kl_mean"].value)]
        height = row.figures["kl_mean"].value
    corners.append((axes.get_xlim()[1], height))
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=1, alpha=0.55, zorder=1.5, label="Pareto frontier")
    return corners


def _point(axes: Any, row: Row, color: str, marker: str, above: float) -> list[Point]:
    """Draw a format, and return the line of its interval."""
    kl, face = row.figures["kl_mean"], "none" if row.has_exact_tokens else color
    style = {"markersize": SIZES.get(marker, 5.5), "zorder": above}
    axes.plot([row.bits], [kl.value], marker, color=color, markerfacecolor=face, **style)
    if kl.low is None or kl.high is None:
        return []
    errors = [[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]]
    line = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 2.5}
    axes.errorbar([row.bits], [kl.value], errors, zorder=above, **line)
    return [(row.bits, max(kl.low, axes.get_ylim()[0])), (row.bits, kl.high)]


def by_position(rows: Sequence[Row], noise: Sequence[Row]) -> Any:
    """Mean KL by position, a panel for each system that has more than one format here."""
    panels = _panels(rows)
    across = min(2, len(panels))
    height = 4.0 if len(panels) == 1 else 2.3
    down = -(-len(panels) // across)
    names = [row.format.removeprefix(f"{system}:") for system, mine in panels.items() for row in mine]
    room = 0.25 + room_for([*names, "noise floor"] if noise else names)
    width = (WIDTH - 0.1) / across - 0.7 - room
    figure = new_figure(down * (height + 0.5) + 0.3)
    values = [b.kl.value for row in (*rows, *noise) for b in row.positions if b.kl.value > 0]
    for place, (system, mine) in enumerate(panels.items()):
        line, column = divmod(place, across)
        axes = place_axes(figure, 0.7 + column * (width + 0.7 + room), 0.25 + line * (height + 0.5), width, height)
        if values:
            log_axis(axes.yaxis)
            axes.set_ylim(log_limits(values))
        axes.set_title(system, loc="left")
        if place + across >= len(panels):
            axes.set_xlabel("position in the window")
        if column == 0:
            axes.set_ylabel("mean KL, nats per token")
        _lines(axes, system, [*mine, *noise])
    return figure


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by system, all families of kvfold's in one; those of systems with one format together at the end."""
    panels: dict[str, list[Row]] = {name.partition(",")[0]: [] for name in marks_of(rows)}
    for row in rows:
        panels[row.system.partition(",")[0]].append(row)
    alone = [system for system, mine in panels.items() if len(mine) == 1 and system != "kvfold"]
    if len(alone) > 1:
        panels["others"] = [row for system in alone for row in panels.pop(system)]
    return panels


def _lines(axes: Any, system: str, rows: Sequence[Row]) -> None:
    names = []
    for number, row in enumerate(rows):
        bins = [b for b in row.positions if b.kl.value > 0]
        if not bins:
            continue
        color, dashes = hue(number), DASHES[number // len(HUES) % len(DASHES)]
        if row.kind == "noise":
            color, dashes = SOFT, "--"
        middles = [(b.first + b.last) / 2 for b in bins]
        axes.plot(middles, [b.kl.value for b in bins], color=color, linewidth=1.3, linestyle=dashes)
        lows = [b.kl.value if b.kl.low is None or b.kl.low <= 0 else b.kl.low for b in bins]
        highs = [b.kl.value if b.kl.high is None else b.kl.high for b in bins]
        axes.fill_between(middles, lows, highs, color=color, alpha=0.13, linewidth=0)
        name = "noise floor" if row.kind == "noise" else row.format.removeprefix(f"{system}:")
        names.append(Name(middles[-1], bins[-1].kl.value, name, color))
    name_ends(axes, names)


def agreement(rows: Sequence[Row]) -> Any:
    """Top-1 agreement and the change of perplexity, a line for each format."""
    height = 0.9 + 0.2 * len(rows)
    figure = new_figure(height, WIDTH)
    figure.subplots_adjust(left=0.24, right=0.985, wspace=0.08, top=1 - 0.35 / height, bottom=0.45 / height)
    left, right = figure.subplots(1, 2, sharey=True)
    marks = marks_of(rows)
    for place, row in enumerate(rows):
        color, marker = marks[row.system]
        face, size = "none" if row.has_exact_tokens else color, SIZES.get(marker, 5.5) * 0.9
        for axes, metric in ((left, "top1"), (right, "perplexity_change")):
            value, low, high = (None if limit is None else 100 * limit for limit in row.figures[metric])
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=color, linewidth=1.2, solid_capstyle="butt")
            axes.plot([value], [place], marker, color=color, markerfacecolor=face, markersize=size)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_yticks(range(len(rows)), [f"{row.format}, {row.bits:.2f} bits" for row in rows])
    left.set_title("same most likely token, %", loc="left")
    right.set_title("perplexity, change in %", loc="left")
    right.axvline(0, color=SOFT, linewidth=1)
    right.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    limits = [100 * limit for row in rows for limit in row.figures["perplexity_change"] if limit is not None]
    low, high = min([0.0, *limits]), max([0.0, *limits])
    ticks = [-(10.0**power) for power in range(6, -2, -1)] + [0.0] + [10.0**power for power in range(-1, 7)]
    kept = [tick for tick in ticks if low * 1.3 <= tick <= high * 1.3 or abs(tick) == 0.1]
    right.set_xticks(kept, [f"{tick:+,g}" if tick else "0" for tick in kept])
    right.set_xlim(min(low * 1.3, -0.1), max(high * 1.5, 0.15))
    for axes in (left, right):
        axes.grid(axis="y", linewidth=0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure
