"""How far a compressed cache moves a model's predictions: KL divergence, top-1 agreement and perplexity on a text.

Teacher-forced: windows of the text go through the model once without compression and once for each format, with every
query reading page bytes, its own token's included. Other systems' formats stand in the same table: their K and V are
quantised and de-quantised as those systems do it (:mod:`kvfold.eval.rivals`). The noise floor is the uncompressed model
against itself with each window twice in a batch. Intervals: 95 % bootstrap over the windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.commands import UsageError, table
from kvfold.commands.evaluation import (
    bits_per_element,
    check_context,
    check_outputs,
    environment_of,
    first_tokens,
    forward,
    pick_device,
    progress,
    read_text,
)
from kvfold.commands.measure import (
    ORDINARY,
    Subject,
    load_subject,
    quiet_transformers,
    say,
)
from kvfold.commands.plan import whole
from kvfold.errors import CapacityError, FormatError, KVFoldError
from kvfold.formats import PAGE_SIZES
from kvfold.layerformats import ModelFormat
from kvfold.models import MODELS_HELP, SMOLLM2

if TYPE_CHECKING:
    import torch

    from kvfold.eval.fidelity import Bin, Floats, Interval, Reference, Tokens
    from kvfold.eval.rivals import Rival

EPILOG = """\
JSON (--json FILE): command, date, environment, settings, measured_windows, scored_tokens, baseline {perplexity}, rows
[{kind (noise, format, rival), format, source, bits_per_element, bytes_per_token, cache, kl_mean, kl_median, kl_p999,
top1, perplexity, perplexity_change, positions [{first, last, kl}]}]. Every measured figure is {value, low, high}; low
and high are null with a single window. KL in nats per token; top1 and perplexity_change are fractions. The noise floor
has no bits and no bytes; only a rival, another system's format, has a source.

example: kvfold fidelity --text wiki.test.raw --format k4v4 vllm:4bit_nc paper:mse4 --json fidelity.json
"""

FORMATS = ("fp8", "k8v8", "k4v4", "k3v3", "k2v2")
CHUNKS = ("packed", "exact")
EXACT_CHUNK = 256
"""Tokens of a chunk with --chunk exact: a window in one piece would see nothing but its own exact tokens."""
MIN_WINDOW = 128
"""Tokens of the shortest window, of which half are scored."""
PROBE = 80
"""Tokens of the pass that shows, before minutes of measuring, whether a format runs; it compiles the kernels too."""
NOISE = "noise floor"
MARKERS = {"noise": ".", "format": "o", "rival": "s"}
LINES = ("-", "--", ":")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        nargs="+",
        action="extend",
        metavar="F",
        help=f"formats, or other systems' such as vllm:4bit_nc, paper:mse4, ggml:q4_0 ({' '.join(FORMATS)})",
    )
    parser.add_argument("--model", default=SMOLLM2, help=MODELS_HELP)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (the beginning of Moby Dick, 6.8 kB)")
    parser.add_argument("--windows", type=whole, default=10, metavar="N", help="pieces of the text (%(default)s)")
    parser.add_argument("--window-tokens", type=whole, default=2048, metavar="N", help="length of each (%(default)s)")
    parser.add_argument(
        "--chunk",
        choices=CHUNKS,
        default="packed",
        help=f"what queries see of their own chunk; exact cuts windows into chunks of {EXACT_CHUNK} (%(default)s)",
    )
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if torch has it), cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bits and position (PNG, SVG or PDF)")


def run(args: argparse.Namespace) -> int:
    formats = list(dict.fromkeys(map(parse_format, args.format or FORMATS)))
    check_outputs(args.json, args.plot)
    path, text = read_text(args.text)
    _check_length(args.window_tokens)
    device = pick_device(args.device)
    import torch

    with quiet_transformers():
        subject = load_subject(args.model)
        subject.model.to(device)
        cut = cut_windows(subject, text, path, args.windows, args.window_tokens)
        columns = [Column("noise", NOISE), *(_probe(subject, fmt, cut.ids, args) for fmt in formats)]
        head = {
            "command": shlex.join(["kvfold", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment_of(device),
            "settings": _settings(args, subject, formats, path, text, cut),
        }
        measured = Measured(columns)
        try:
            _measure(args, subject, cut.ids, measured)
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
            raise CapacityError(f"{reason}; give a smaller --window-tokens, or --device cpu") from None
        finally:  # what was measured before an interruption is kept
            result = measured.result() if measured.windows else None
            if args.json is not None and result is not None:
                args.json.write_text(json.dumps({**head, **result.json()}, indent=1) + "\n", encoding="utf-8")
    assert result is not None
    print(_table(args, path, result))
    sys.stdout.flush()
    if args.plot is not None:
        _plot(result, args.plot, _title(args, path, result))
    return 0


def parse_format(text: str) -> ModelFormat | Rival:
    """A format of kvfold's or of another system's; the latter by the names of :mod:`kvfold.eval.rivals`.

    Raises:
        FormatError: Neither has this name; the message proposes the nearest.
        NotBuiltError: It is kvfold's, and not built yet.
    """
    from kvfold.eval import rivals

    rival = rivals.find(text)
    if rival is not None:
        return rival
    try:
        return ModelFormat.parse(text).require_built()
    except FormatError as error:
        hint = rivals.near(text)
        raise FormatError(f"{error}; or of other systems: {hint}") from None if hint else error


# --- what to measure on -----------------------------------------------------------------------------------------------


def _check_length(window_tokens: int) -> None:
    from kvfold.eval.fidelity import FIRST_POSITION

    if window_tokens < MIN_WINDOW:
        raise UsageError(
            f"argument --window-tokens: {window_tokens} is too short, because only positions from {FIRST_POSITION} on "
            f"are scored: give {MIN_WINDOW} or more"
        )


@dataclass(frozen=True)
class Windows:
    """Consecutive pieces of a text, none of which overlap.

    Attributes:
        ids: int64 ``[windows, tokens]`` on the model's device.
        bos: Whether each begins with the model's first token, as its tokenizer begins a text.
        available: Tokens of the whole text.
    """

    ids: torch.Tensor
    bos: bool
    available: int


def cut_windows(subject: Subject, text: str, path: Path, windows: int, window_tokens: int) -> Windows:
    """The first ``windows`` pieces of a text, ``window_tokens`` long each.

    Raises:
        UsageError: The text is too short, or a window is longer than the model's context.
    """
    import torch

    check_context(subject, window_tokens, "windows")
    bos = first_tokens(subject)
    tokens = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    piece = window_tokens - len(bos)
    if len(tokens) < windows * piece:
        fit, whole_text = len(tokens) // piece, len(tokens) + len(bos)
        way_out = "give a longer text with --text FILE"
        if fit:
            way_out += f", or --windows {fit}"
        elif whole_text >= MIN_WINDOW:
            way_out += f", or --windows 1 --window-tokens {whole_text}"
        raise UsageError(
            f"{path} has {len(tokens):,} tokens, and {windows} windows of {window_tokens:,} that do not overlap take "
            f"{windows * piece:,}: {way_out}"
        )
    pieces = torch.tensor(tokens[: windows * piece], device=subject.model.device).view(windows, piece)
    if bos:
        pieces = torch.cat([pieces.new_full((windows, 1), bos[0]), pieces], dim=1)
    return Windows(pieces, bool(bos), len(tokens))


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Column:
    """One format, or the noise floor, and what has been measured of it: an entry of ``tokens`` for each window.

    Attributes:
        kind: ``noise``, ``format`` or ``rival``.
        bits: The format's own all-in bits per element, over the compressed layers; a rival's also over those that it
            leaves alone.
        bytes_per_token: Live bytes after a window, over all layers, exact sinks and tail included. A rival packs
            nothing: its bytes follow from its bits.
        cache: The cache, in words: which layers are not compressed.
    """

    kind: str
    name: str
    format: ModelFormat | Rival | None = None
    bits: float | None = None
    bytes_per_token: float | None = None
    cache: str | None = None
    tokens: list[Tokens] = field(default_factory=list)


def _new_cache(subject: Subject, fmt: ModelFormat | Rival, args: argparse.Namespace) -> Any:
    """A fresh cache, and the model with the attention that belongs to it."""
    if isinstance(fmt, ModelFormat):
        return subject.new_cache(fmt, args.page_size, args.chunk)
    from kvfold.eval.rivals.cache import RivalCache

    subject.new_cache(None, args.page_size, args.chunk)  # gives the model its own attention back
    return RivalCache(subject.model.config, fmt, args.chunk)


def _probe(subject: Subject, fmt: ModelFormat | Rival, ids: torch.Tensor, args: argparse.Namespace) -> Column:
    """Run a format on a few tokens, so that what cannot run is refused now."""
    import torch

    say(f"trying {fmt}")
    cache = _new_cache(subject, fmt, args)
    with torch.inference_mode():
        forward(subject, ids[:1, :PROBE], cache)
        if args.chunk == "exact":  # kernels for a chunk on a stored prefix
            forward(subject, ids[:1, PROBE : PROBE + 16], cache)
    if not isinstance(fmt, ModelFormat):
        return Column("rival", str(fmt), fmt, cache.bits_per_element(), cache=repr(cache))
    return Column("format", str(fmt), fmt, bits_per_element(cache), cache=repr(cache))


@dataclass
class Measured:
    """What has been measured so far; windows count when every column has them."""

    columns: list[Column]
    nll: list[Floats] = field(default_factory=list)

    @property
    def windows(self) -> int:
        return min(len(self.nll), *(len(column.tokens) for column in self.columns))

    def result(self) -> Result:
        """Figures and intervals over the windows that are complete; at least one must be."""
        from kvfold.eval.bootstrap import draw
        from kvfold.eval.fidelity import by_position, perplexity, summarise

        count = self.windows
        draws = draw(count)
        rows = [
            Row(
                column,
                summarise(column.tokens[:count], self.nll[:count], draws),
                by_position(column.tokens[:count], draws),
            )
            for column in self.columns
        ]
        return Result(count, count * len(self.nll[0]), perplexity(self.nll[:count], draws), rows)


def _measure(args: argparse.Namespace, subject: Subject, ids: torch.Tensor, measured: Measured) -> None:
    import torch

    with torch.inference_mode(), progress(len(ids) * (1 + len(measured.columns))) as step:
        for index in range(len(ids)):
            window, title = ids[index : index + 1], f"window {index + 1} of {len(ids)}"
            step(f"{title}: {ORDINARY}")
            subject.new_cache(None, args.page_size, args.chunk)  # gives the model its own attention back
            base = baseline(subject, window)
            require_finite(base.nll, "the uncompressed model", index)
            measured.nll.append(base.nll)
            for column in measured.columns:  # the noise floor comes first, before a format sets kvfold's attention
                step(f"{title}: {column.name}")
                if column.format is None:
                    tokens = _noise(subject, window, base)
                else:
                    tokens = _compressed(args, subject, column, window, base)
                require_finite(tokens.kl, column.name, index)
                column.tokens.append(tokens)


def baseline(subject: Subject, window: torch.Tensor) -> Reference:
    """What the model says of a window ``[1, tokens]`` without compression."""
    from kvfold.eval.fidelity import FIRST_POSITION, reference

    logits = subject.model(window, use_cache=False).logits[0]
    return reference(logits[FIRST_POSITION:-1], window[0, FIRST_POSITION + 1 :])  # nothing follows the last position


def _noise(subject: Subject, window: torch.Tensor, base: Reference) -> Tokens:
    """The same in another batch shape."""
    from kvfold.eval.fidelity import FIRST_POSITION, compare

    return compare(base, subject.model(window.expand(2, -1), use_cache=False).logits[0, FIRST_POSITION:-1])


def _compressed(
    args: argparse.Namespace, subject: Subject, column: Column, window: torch.Tensor, base: Reference
) -> Tokens:
    """The same under a compressed cache."""
    import torch

    from kvfold.eval.fidelity import FIRST_POSITION, compare

    assert column.format is not None
    cache = _new_cache(subject, column.format, args)
    length = window.shape[1] if args.chunk == "packed" else EXACT_CHUNK
    pieces = [forward(subject, piece, cache) for piece in window.split(length, dim=1)]
    logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if isinstance(column.format, ModelFormat):
        memory = cache.memory()
        column.bytes_per_token = memory.compressed / memory.capacity + memory.uncompressed / memory.tokens
    else:
        column.bytes_per_token = cache.bytes_per_token()
    return compare(base, logits[FIRST_POSITION:-1])


def require_finite(values: Floats, name: str, window: int) -> None:
    import numpy as np

    if not np.isfinite(values).all():
        raise KVFoldError(
            f"{name}: window {window + 1} gave values that are not finite, as an overflow does: "
            "leave it out, or load the model in a wider dtype"
        )


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A format's figures; see :data:`EPILOG`."""

    column: Column
    figures: dict[str, Interval]
    positions: list[Bin]

    def json(self) -> dict[str, object]:
        column = self.column
        return {
            "kind": column.kind,
            "format": column.name if column.format is not None else ORDINARY,
            "source": getattr(column.format, "source", None),
            "bits_per_element": column.bits,
            "bytes_per_token": column.bytes_per_token,
            "cache": column.cache,
            **{name: figure._asdict() for name, figure in self.figures.items()},
            "positions": [{"first": b.first, "last": b.last, "kl": b.kl._asdict()} for b in self.positions],
        }


@dataclass(frozen=True)
class Result:
    """All figures of a run."""

    windows: int
    tokens: int
    perplexity: Interval
    rows: list[Row]

    def json(self) -> dict[str, object]:
        return {
            "measured_windows": self.windows,
            "scored_tokens": self.tokens,
            "baseline": {"perplexity": self.perplexity._asdict()},
            "rows": [row.json() for row in self.rows],
        }


def _settings(
    args: argparse.Namespace,
    subject: Subject,
    formats: Sequence[ModelFormat | Rival],
    path: Path,
    text: str,
    cut: Windows,
) -> dict[str, object]:
    from kvfold.eval.bootstrap import CONFIDENCE, RESAMPLES, SEED
    from kvfold.eval.fidelity import FIRST_POSITION

    return {
        "model": args.model,
        "dtype": subject.dtype,
        "device": str(subject.model.device),
        "text": {
            "file": str(path),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": cut.available,
        },
        "windows": args.windows,
        "window_tokens": args.window_tokens,
        "begins_with_bos": cut.bos,
        "first_position": FIRST_POSITION,
        "formats": [str(fmt) for fmt in formats],
        "chunk": args.chunk,
        "chunk_tokens": args.window_tokens if args.chunk == "packed" else EXACT_CHUNK,
        "page_size": args.page_size,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "seed": SEED,
    }


def _title(args: argparse.Namespace, path: Path, result: Result) -> str:
    windows = f"{result.windows} window{'s' if result.windows > 1 else ''}"
    return f"{args.model}: {windows} of {args.window_tokens:,} tokens of {path.name}"


def _table(args: argparse.Namespace, path: Path, result: Result) -> str:
    from kvfold.eval.bootstrap import CONFIDENCE
    from kvfold.eval.fidelity import FIRST_POSITION, METRICS

    header = ["format", "bits", "bytes/token", "KL mean", "median", "99.9 %", "top-1", "perplexity", "change"]
    value, interval = _cells("perplexity", result.perplexity)
    cells = [[ORDINARY, "", "", "", "", "", "", value, ""]]
    spreads = [["", "", "", "", "", "", "", interval, ""]]
    for row in result.rows:
        bits, stored = row.column.bits, row.column.bytes_per_token
        pairs = [_cells(name, row.figures[name]) for name in METRICS]
        known = ["" if bits is None else f"{bits:.3f}", "" if stored is None else f"{stored:,.0f}"]
        cells.append([row.column.name, *known, *(pair[0] for pair in pairs)])
        spreads.append(["", "", "", *(pair[1] for pair in pairs)])
    lines = [line for pair in zip(cells, spreads, strict=True) for line in pair if any(line)]
    notes = [
        f"KL: nats per token against the model without compression ({ORDINARY}). Below a figure: its "
        f"{CONFIDENCE:.0%} bootstrap interval.",
        f"{NOISE}: the uncompressed model against itself, each window twice in a batch. bits: the format's, all-in.",
        "bytes/token: of the live buffers over all layers, exact sinks and tail and uncompressed layers included.",
    ]
    if any(row.column.kind == "rival" for row in result.rows):
        notes.append(
            "Other systems' formats are simulated, not packed: their bits and bytes follow from what they store, "
            "with 16 bits in the layers that +skip leaves alone."
        )
    if args.chunk == "exact":
        notes.append(f"chunk=exact: the queries of a chunk of {EXACT_CHUNK} tokens see its K and V uncompressed.")
    if result.windows < 5:
        few = "one window has none" if result.windows == 1 else f"from {result.windows} windows they are too narrow"
        notes.append(f"Intervals need more windows: {few}.")
    notes += [
        f"{row.column.name}: {row.column.cache}"
        for row in result.rows
        if row.column.cache is not None and "uncompressed:" in row.column.cache
    ]
    scored = f"{result.tokens:,} tokens are scored, from position {FIRST_POSITION} of each window on"
    title = f"{_title(args, path, result)}; {scored}"
    return "\n".join([title, "", table(header, lines), "", *notes])


def _cells(name: str, figure: Interval) -> tuple[str, str]:
    """A figure and its interval, as the table shows them."""
    value = _number(name, figure.value)
    if figure.low is None or figure.high is None:
        return value, ""
    return value, f"{_number(name, figure.low).rstrip('%')}..{_number(name, figure.high)}"


def _number(name: str, value: float) -> str:
    if name == "perplexity_change":
        return f"{value:+.2%}".replace("-0.00%", "+0.00%") if abs(value) < 0.1 else f"{value:+.1%}"
    return {"top1": f"{value:.1%}", "perplexity": f"{value:.2f}"}.get(name, f"{value:.3g}")


def _plot(result: Result, path: Path, title: str) -> None:
    """Mean KL against bits, with intervals and the noise floor, and against the position in the window.

    With many rows colours repeat, with another line; then the names stand beside the points, the legend has a column of
    its own, and intervals are left out against the position.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    many = len(result.rows) > 11
    figure = Figure(figsize=(18, 10) if many else (12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(result.rows, start=-1):  # the noise floor comes first
        name, kl = row.column.name, row.figures["kl_mean"]
        color = "grey" if row.column.bits is None else f"C{place % 10}"
        line, marker = LINES[max(place, 0) // 10 % len(LINES)], MARKERS[row.column.kind]
        low, high = kl.value if kl.low is None else kl.low, kl.value if kl.high is None else kl.high
        if row.column.bits is None:
            if kl.value == 0:  # which a logarithmic axis does not have
                (right if many else left).plot([], [], color=color, linestyle="--", label=f"{name}: 0")
                continue
            left.axhspan(low, high, color=color, alpha=0.3)
            left.axhline(kl.value, color=color, linestyle="--", label=name)
        else:
            errors = [[max(0.0, kl.value - low)], [max(0.0, high - kl.value)]]
            left.errorbar([row.column.bits], [kl.value], errors, fmt=marker, capsize=4, color=color, label=name)
            if many:
                at = (row.column.bits, kl.value)
                left.annotate(name, at, (5, 3), textcoords="offset points", fontsize=7, color=color)
        middles = [(b.first + b.last) / 2 for b in row.positions]
        values = [b.kl.value for b in row.positions]
        right.plot(middles, values, linestyle=line, marker=marker, markersize=4, color=color, label=name)
        lows = [b.kl.value if b.kl.low is None else b.kl.low for b in row.positions]
        highs = [b.kl.value if b.kl.high is None else b.kl.high for b in row.positions]
        if not many:
            right.fill_between(middles, lows, highs, color=color, alpha=0.2, linewidth=0)
    left.set_xlabel("bits per element, all-in")
    right.set_xlabel("position in the window")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("mean KL, nats per token")
        axes.grid(alpha=0.3)
    if many:
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    else:
        left.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=100 if many else 150)
