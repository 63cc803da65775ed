"""The bytes that a cache really holds after so many tokens, beside the planner's figure and beside bf16.

Layers are allocated and filled as a model fills them, and what they then hold is read off their memory: pages, exact
first and last tokens, block tables, windows that are not compressed, anything else. If that and what `kvfold plan` says
of the same room differ by a byte, the exit code is 1. The model is given as to `kvfold plan`; no weights are needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvfold.commands import table
from kvfold.commands.evaluation import check_outputs, environment_of, pick_device, progress
from kvfold.commands.measure import ORDINARY, say
from kvfold.commands.plan import add_shape_arguments, layers_json, read_shape, whole
from kvfold.errors import CapacityError, KVFoldError, UnsupportedModelError
from kvfold.formats import PAGE_SIZES, KVFormat
from kvfold.layerformats import ModelFormat, elements_of
from kvfold.modelshape import FULL, SLIDING, LayerGroup, ModelShape
from kvfold.planner import compressed_bytes, window_bytes

if TYPE_CHECKING:
    import torch

    from kvfold.eval.storage import Live

EPILOG = """\
JSON (--json FILE): command, date, environment, settings, layers [{kind, layers, live_layers, num_kv_heads, head_size,
head_size_v, window, at}], kept_bytes, rows [{format, tokens, capacity, pages, exact, tables, windows, other, total,
planned_bytes, planned_equal, planned_for_tokens, bytes_per_token, ratio}]. at: which layers of the model, from 0. Bytes
are those of all layers: what the live ones hold, times their number. The rows of format none are the ordinary cache in
bf16, with its keys and values as pages. planned_bytes is the planner's figure for capacity, and for pages, exact and
windows together; planned_for_tokens is that for the tokens alone. ratio is the ordinary cache's total over this one.
kept_bytes: scratch that kernels keep on the GPU between calls, once for all layers; null on a CPU, where all scratch is
given back after a call.

example: kvfold storage --model ./Qwen3-8B --context 4096 32768 --format k4v4 k3v3+sinks4+tail128 --plot storage.png
"""

FORMATS = ("fp8", "k8v8", "k4v4", "k3v3", "k2v2")
CONTEXTS = (1024, 4096, 16384)
LIVE_ELEMENTS = 1 << 26
"""Numbers of keys and values that are stored at the longest context unless --live-layers says how many layers: some
seconds on a CPU, and 128 MiB of the ordinary cache."""
DTYPES = {2: "bfloat16", 4: "float32", 8: "float64"}
PARTS = ("pages", "exact", "windows", "tables", "other")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    parser.add_argument(
        "--context",
        nargs="+",
        action="extend",
        type=whole,
        metavar="N",
        help=f"tokens of a sequence ({' '.join(map(str, CONTEXTS))})",
    )
    parser.add_argument(
        "--format", nargs="+", action="extend", metavar="F", help=f"one format or several ({' '.join(FORMATS)})"
    )
    parser.add_argument(
        "--live-layers", type=whole, metavar="N", help="layers of each kind to allocate (as many as take some seconds)"
    )
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if torch has it), cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes against context (PNG, SVG or PDF)")


def run(args: argparse.Namespace) -> int:
    shape = read_shape(args)
    formats = list(dict.fromkeys(ModelFormat.parse(spec).require_built() for spec in args.format or FORMATS))
    contexts = sorted(set(args.context or CONTEXTS))
    _check_shape(shape, formats)
    check_outputs(args.json, args.plot)
    device = pick_device(args.device)
    layers = live_layers(shape, contexts[-1], args.live_layers)
    result = _measure(args, shape, layers, formats, contexts, device)
    if args.json is not None:
        head = {
            "command": shlex.join(["kvfold", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment_of(device),
            "settings": {
                "model": shape.name,
                "itemsize": shape.itemsize,
                "device": str(device),
                "page_size": args.page_size,
                "contexts": contexts,
                "formats": [str(fmt) for fmt in formats],
            },
        }
        args.json.write_text(json.dumps({**head, **result.json(shape)}, indent=1) + "\n", encoding="utf-8")
    print(_text(args, shape, result))
    sys.stdout.flush()
    if args.plot is not None:
        _plot(result, args.plot, _title(shape))
    wrong = dict.fromkeys(row.format for row in result.rows if not row.planned_equal)
    if wrong:
        say(f"kvfold: error: {', '.join(wrong)}: live bytes and planned bytes differ, which is a bug: please report it")
    return 1 if wrong else 0


def _check_shape(shape: ModelShape, formats: Sequence[ModelFormat]) -> None:
    """Refuse what cannot be stored, before anything is allocated."""
    if not shape.compressed:
        raise UnsupportedModelError(
            f"{shape.name or 'this model'} has no layer of full attention, so a compressed cache stores nothing: "
            "kvfold plan says what its other layers take"
        )
    for fmt in formats:
        compressed_bytes(shape, fmt, 0)


def live_layers(shape: ModelShape, tokens: int, asked: int | None) -> dict[LayerGroup, int]:
    """How many layers of each kind to allocate: what was asked for, or as many as :data:`LIVE_ELEMENTS` allows."""
    storing = [group for group in shape.groups if group.kind in (FULL, SLIDING)]
    each = sum(group.num_kv_heads * (group.head_size + group.head_size_v) for group in storing)
    most = asked or max(1, LIVE_ELEMENTS // (tokens * each))
    return {group: min(group.layers, most) for group in storing}


# --- measuring --------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Layers that hold the same: alike, and stored in the same format; None where they are not compressed."""

    group: LayerGroup
    format: KVFormat | None
    layers: int


def kinds_of(shape: ModelShape, fmt: ModelFormat | None) -> list[Kind]:
    """The layers that store something, in a cache of this format, or in the ordinary one for None."""
    alike = [group for group in shape.groups if group.kind in (FULL, SLIDING)]
    if fmt is None:
        return [Kind(group, None, group.layers) for group in alike]
    packed = [Kind(group, own, count) for (own, group), count in fmt.kinds(shape.compressed_layers).items()]
    return packed + [Kind(group, None, group.layers) for group in alike if group.kind == SLIDING]


@dataclass(frozen=True)
class Row:
    """What a format holds at one length, over all layers; see :data:`EPILOG`."""

    format: str
    tokens: int
    capacity: int
    pages: int
    exact: int
    windows: int
    tables: int
    other: int
    planned_bytes: int
    planned_for_tokens: int
    ordinary: int

    @property
    def total(self) -> int:
        return self.pages + self.exact + self.windows + self.tables + self.other

    @property
    def planned_equal(self) -> bool:
        """Whether what the planner counts is what is there: tables are not in its figure, and there is nothing else."""
        return self.pages + self.exact + self.windows == self.planned_bytes

    @property
    def ratio(self) -> float:
        return self.ordinary / self.total

    def json(self) -> dict[str, object]:
        computed = {"total": self.total, "planned_equal": self.planned_equal, "ratio": self.ratio}
        about = {name: value for name, value in vars(self).items() if name != "ordinary"}
        return {**about, **computed, "bytes_per_token": self.total / self.tokens}


@dataclass(frozen=True)
class Result:
    """All figures of a run; ``layers`` says how many layers of each kind were alive."""

    layers: dict[LayerGroup, int]
    kept: int | None
    rows: list[Row]

    def json(self, shape: ModelShape) -> dict[str, object]:
        about = zip(shape.groups, layers_json(shape), strict=True)
        layers = [{**layer, "live_layers": self.layers[group]} for group, layer in about if group in self.layers]
        return {"layers": layers, "kept_bytes": self.kept, "rows": [row.json() for row in self.rows]}


def _measure(
    args: argparse.Namespace,
    shape: ModelShape,
    layers: dict[LayerGroup, int],
    formats: Sequence[ModelFormat],
    contexts: Sequence[int],
    device: torch.device,
) -> Result:
    import torch

    try:
        from kvfold.eval.storage import fill, requested_bytes
    except ImportError as error:
        raise KVFoldError(f"a live cache needs transformers ({error}): pip install 'kvfold[transformers]'") from None

    before, rows = requested_bytes(device), []
    ordinary: dict[int, int] = {}
    kinds = [(fmt, kinds_of(shape, fmt)) for fmt in (None, *formats)]
    with torch.inference_mode(), progress(sum(map(len, dict(kinds).values()))) as step:
        for fmt, parts in kinds:
            held: dict[Kind, list[Live]] = {}
            for part in parts:
                live = min(part.layers, layers[part.group])
                what = f"{fmt or ORDINARY}: {replace(part.group, layers=live)}"
                if fmt is not None and not fmt.uniform and part.format is not None:
                    what += f" in {part.format}"
                step(f"{what}, up to {contexts[-1]:,} tokens")
                dtype = torch.bfloat16 if fmt is None else getattr(torch, DTYPES[shape.itemsize])
                options = {"layers": live, "page_size": args.page_size, "dtype": dtype, "device": device}
                try:
                    held[part] = list(fill(part.group, part.format, contexts, **options))
                except torch.OutOfMemoryError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise CapacityError(
                        f"{reason}; give --live-layers 1, a smaller --context, or --device cpu"
                    ) from None
            for place, tokens in enumerate(contexts):
                at = {part: found[place] for part, found in held.items()}
                row = _row(shape, fmt, tokens, at, args.page_size, ordinary.get(tokens, 0))
                if fmt is None:
                    ordinary[tokens] = row.total
                    row = replace(row, ordinary=row.total)
                rows.append(row)
    gc.collect()
    after = requested_bytes(device)
    kept = None if before is None or after is None else after - before
    return Result(layers, kept, sorted(rows, key=lambda row: row.tokens))


def _row(
    shape: ModelShape, fmt: ModelFormat | None, tokens: int, at: dict[Kind, Live], page_size: int, ordinary: int
) -> Row:
    full = [kind for kind in at if kind.group.kind == FULL]
    sliding = [kind for kind in at if kind.group.kind == SLIDING]
    capacity = max(at[kind].capacity for kind in full)

    def of(kinds: Sequence[Kind], part: str) -> int:
        return sum(kind.layers * int(getattr(at[kind], part)) for kind in kinds)

    def planned(room: int) -> int:
        """The planner's figure, with that many tokens in the compressed layers; windows hold the tokens that came."""
        if fmt is not None:
            return compressed_bytes(shape, fmt, room, page_size) + window_bytes(shape, tokens)
        in_bf16 = replace(shape, itemsize=2)
        stored = room * elements_of(in_bf16.compressed_layers)
        return stored * in_bf16.itemsize + window_bytes(in_bf16, tokens)

    return Row(
        format=ORDINARY if fmt is None else str(fmt),
        tokens=tokens,
        capacity=capacity,
        pages=of(full, "pages") + of(full, "plain"),
        exact=of(full, "exact"),
        windows=of(sliding, "plain"),
        tables=of(full, "tables"),
        other=of(full, "other") + of(sliding, "other"),
        planned_bytes=planned(capacity),
        planned_for_tokens=planned(tokens),
        ordinary=ordinary,
    )


# --- what is shown ----------------------------------------------------------------------------------------------------


def _title(shape: ModelShape) -> str:
    return f"{shape.name or 'model'}: {', '.join(str(group) for group in shape.groups)}"


def _text(args: argparse.Namespace, shape: ModelShape, result: Result) -> str:
    parts = [part for part in PARTS if part == "pages" or any(getattr(row, part) for row in result.rows)]
    header = ["format", "tokens", "room", *parts, "total", "planned", "equal", "bytes/token", "smaller"]
    cells = []
    for row in result.rows:
        counts = [getattr(row, part) for part in parts]
        cells.append(
            [
                row.format,
                *(f"{value:,}" for value in (row.tokens, row.capacity - row.tokens, *counts, row.total)),
                f"{row.planned_bytes:,}",
                "yes" if row.planned_equal else "NO",
                f"{row.total / row.tokens:,.0f}",
                f"{row.ratio:.2f} x",
            ]
        )
    return "\n".join([_title(shape), _scaled(result), "", table(header, cells), "", *_notes(args, shape, result)])


def _scaled(result: Result) -> str:
    """How many layers there really were."""
    fewer = {group: live for group, live in result.layers.items() if live < group.layers}
    if not fewer:
        return "allocated: all layers"
    live = " and ".join(f"{live} of {group.layers} {group.kind}" for group, live in fewer.items())
    return f"allocated: {live} layers, whose bytes are multiplied"


def _notes(args: argparse.Namespace, shape: ModelShape, result: Result) -> list[str]:
    notes = [
        f"Bytes of the live buffers; pages of {args.page_size} tokens. room: for that many tokens more. {ORDINARY}: "
        "transformers' DynamicCache in bf16.",
        f"planned: the planner's figure for the same room, which is pages{_and(result)}; block tables are beside it.",
    ]
    if any(row.windows for row in result.rows):
        notes.append(f"windows: of layers that are not compressed, in the model's dtype ({DTYPES[shape.itemsize]}).")
    if any(row.other for row in result.rows):
        notes.append("other: small tensors that the layers hold besides, which no planner counts.")
    if result.kept is not None:
        notes.append(f"Between calls kernels keep {result.kept:,} bytes of scratch on the GPU, once for all layers.")
    return notes + [f"Note: {note}." for note in shape.notes]


def _and(result: Result) -> str:
    return "".join(f" + {part}" for part in ("exact", "windows") if any(getattr(row, part) for row in result.rows))


def _plot(result: Result, path: Path, title: str) -> None:
    """Bytes against context: dots are live, lines the planner's figure for the tokens alone."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(dict.fromkeys(row.format for row in result.rows)):
        rows = [row for row in result.rows if row.format == name]
        tokens, color = [row.tokens for row in rows], "grey" if name == ORDINARY else f"C{place - 1}"
        label = f"{'bf16' if name == ORDINARY else name}, {rows[-1].total:,} bytes"
        axes.plot(tokens, [row.planned_for_tokens for row in rows], "-", color=color, linewidth=1)
        axes.plot(tokens, [row.total for row in rows], "o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel("bytes; dots: live, lines: planned")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title=f"at {tokens[-1]:,} tokens")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
