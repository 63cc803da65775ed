"""Files of ``benchmarks/vllm_engine.py``: what vLLM serves with each cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfold.commands.measure import ORDINARY
from kvfold.report.document import Column, Origin, Picture, Section, Table, own_format
from kvfold.report.drawing import SOFT, hue, new_figure
from kvfold.report.entries import Damaged, Entry

UNCOMPRESSED = "auto"
"""vLLM's name of its own cache in the model's dtype."""


class Case(NamedTuple):
    """One load."""

    name: str
    batch: int
    prompt: int
    prefill_seconds: float
    decode_rate: float


@dataclass(frozen=True)
class Cache:
    """A cache dtype, how many tokens of it fit, and its cases."""

    dtype: str
    tokens: int
    cases: dict[str, Case]


@dataclass(frozen=True)
class Run:
    """One file; the first cache is what the others are compared with."""

    origin: Origin
    layers: int
    utilization: float
    caches: list[Cache]


def read(data: Entry, origin: Origin) -> Run:
    """Read what ``vllm_engine.py --json`` wrote; raises :class:`Damaged`."""
    caches = []
    for cache in data["caches"].list():
        cases = [
            Case(
                case["case"].text(),
                case["batch"].whole(),
                case["prompt"].whole(),
                case["prefill_seconds"].positive(),
                case["decode_tokens_per_second"].positive(),
            )
            for case in cache["cases"].list()
        ]
        tokens = cache["tokens"].count()
        caches.append(Cache(cache["dtype"].text(), tokens, {case.name: case for case in cases}))
    if not caches:
        raise Damaged("caches is empty")
    caches.sort(key=lambda cache: cache.dtype != UNCOMPRESSED)  # which keeps the order of the others
    return Run(origin, data["layers"].whole(), data["utilization"].number(), caches)


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each file."""
    return [_section(run) for run in runs]


def _section(run: Run) -> Section:
    base = run.caches[0]
    return Section(
        title=f"vLLM: {run.origin.device or 'unknown device'}",
        facts=(
            f"Qwen3-8B's shapes in {run.layers} layers, weights that are dummies, {run.utilization:g} of the GPU's "
            f"memory. Others are compared with {base.dtype}"
            f"{', which stores the dtype of the model' if base.dtype == UNCOMPRESSED else ''}."
        ),
        blocks=[
            Picture(
                "Tokens that fit, and decode rates",
                "A case is requests x prompt tokens; full is as many requests as the cache holds. Rates are those of "
                "all requests together, in one run.",
                [run.origin],
                lambda: rates(run),
            ),
            _table(run),
        ],
        columns=[
            Column("tokens that fit", {_name(c.dtype): f"{c.tokens / base.tokens:.2f}x" for c in run.caches}),
        ],
    )


def _name(dtype: str) -> str:
    """The format that a cache dtype stands for where it is kvfold's or none; else what vLLM calls it."""
    if dtype == UNCOMPRESSED:
        return ORDINARY
    fmt = own_format(dtype.removeprefix("kvfold_")) if dtype == "turboquant" or dtype.startswith("kvfold_") else None
    return f"vLLM {dtype}" if fmt is None else str(fmt)


def _table(run: Run) -> Table:
    base, others = run.caches[0], run.caches[1:]
    names = list(dict.fromkeys(name for cache in run.caches for name in cache.cases))

    def line(
        title: str, values: Sequence[float | None], form: str, more: Sequence[str] = (), what: str = ""
    ) -> list[str]:
        cells = []
        for place, value in enumerate(values):
            ratio = f"{value / values[0]:.2f}x{what}" if place and value is not None and values[0] else ""
            below = ", ".join(filter(None, [ratio, more[place] if more else ""]))
            cells.append("" if value is None else form.format(value) + (f"\n{below}" if below else ""))
        return [title, *cells]

    rows = [line("tokens that fit", [cache.tokens for cache in run.caches], "{:,}")]
    for name in names:
        cases = [cache.cases.get(name) for cache in run.caches]
        batches = [f"{case.batch} requests" if case and name == "full" else "" for case in cases]
        rows.append(line(f"decode {name}, tok/s", [case and case.decode_rate for case in cases], "{:,.0f}", batches))
        rows.append(
            line(
                f"prefill {name}, s", [case and case.prefill_seconds for case in cases], "{:,.2f}", batches, " the time"
            )
        )
    return Table("All figures, and how they compare", ["", base.dtype, *(cache.dtype for cache in others)], rows)


def rates(run: Run) -> Any:
    """Bars: tokens that fit, and decoded tokens per second, case by case."""
    figure = new_figure(4.2)
    figure.subplots_adjust(left=0.08, right=0.98, top=0.86, bottom=0.12, wspace=0.22)
    names = list(dict.fromkeys(name for cache in run.caches for name in cache.cases))
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, max(2, len(names))]})
    base, count = run.caches[0], len(run.caches)
    width = 0.8 / count
    left.set_title("tokens that fit, thousands", loc="left")
    right.set_title("decoded tokens per second", loc="left")
    for place, cache in enumerate(run.caches):
        color = hue(place - 1) if place else SOFT
        at = (place - (count - 1) / 2) * width
        fit = left.bar([at], [cache.tokens / 1000], width * 0.94, color=color, label=cache.dtype)
        left.bar_label(fit, [f"{cache.tokens / base.tokens:.2f}x" if place else ""], fontsize=7, padding=1)
        places = [index for index, name in enumerate(names) if name in cache.cases]
        cases = [cache.cases[names[index]] for index in places]
        bars = right.bar([index + at for index in places], [c.decode_rate for c in cases], width * 0.94, color=color)
        words = [
            f"{case.decode_rate / base.cases[case.name].decode_rate:.2f}x" if place and case.name in base.cases else ""
            for case in cases
        ]
        right.bar_label(bars, words, fontsize=7, padding=1)
    left.set_xticks([])
    right.set_xticks(range(len(names)), names)
    for axes in (left, right):
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=min(6, count))
    return figure
