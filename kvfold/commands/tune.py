"""Propose a format for a model under a budget of bits: widths for K and V, layer by layer if that pays.

KL divergences are those of `kvfold fidelity`, every query reading page bytes. First uniform formats within the budget
are measured on windows of the text; then each layer's K and V alone, all else uncompressed, in the sides of the best of
these and in every narrower one; from that follows what each would lose in wider sides, and which allocation of the
budget loses least. That one and the best uniform format are measured on other windows of the text, and formats of
single layers are proposed only if they are better there beyond doubt: if the 95 % bootstrap interval of the difference
lies below zero. The format goes to stdout, so that other commands can take it; what was found goes to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfold.commands import UsageError, table
from kvfold.commands.evaluation import (
    check_outputs,
    environment_of,
    first_tokens,
    forward,
    pick_device,
    progress,
    read_text,
    stored_layers,
)
from kvfold.commands.fidelity import MIN_WINDOW, PROBE, baseline, cut_windows, require_finite
from kvfold.commands.formats import expected_distortion
from kvfold.commands.measure import ORDINARY, Subject, load_subject, quiet_transformers, say
from kvfold.commands.plan import whole
from kvfold.errors import CapacityError
from kvfold.formats import PAGE_SIZES, KVFormat, Side
from kvfold.layerformats import ModelFormat, elements_of
from kvfold.models import MODELS_HELP, SMOLLM2
from kvfold.modelshape import LayerGroup

if TYPE_CHECKING:
    import torch

    from kvfold.eval.bootstrap import Floats, Interval
    from kvfold.eval.tune import Allocation, Option

EPILOG = """\
JSON (--json FILE): command, date, environment, settings, uniform [{format, bits, kl}], layers [{layer, k, v}], frontier
[{bits, predicted_kl}], allocation {format, bits, predicted_kl, kl}, held_out {uniform, allocation, difference, pieces},
chosen {format, object, bits, by_layer, reason}. bits are all-in, per element, over the compressed layers; kl and
predicted_kl are means in nats per token on the windows for tuning. layers: k and v are {side: kl}, KL where only that
layer's K, or V, is compressed, in the side of the best uniform format and in every narrower one. Figures of held_out
are {value, low, high}, on the other windows. What was not measured is empty or null: layers with --uniform, held_out
where there is nothing to compare.

example: kvfold plan --layers 30 --kv-heads 3 --head-size 64 --memory 1GiB --format $(kvfold tune --bits 3.5)
"""

SIDES = ("2", "3", "4", "5", "8")
_EXACT = Side("exact", 32, dtype="f32")  # loses nothing of any model's dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits", type=bits, required=True, metavar="B", help="all-in bits per element, mean over compressed layers"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        action="extend",
        metavar="S",
        help=f"what K and V may be stored as: 1 to 8, 2t, 3t, 4t, f8 ({' '.join(SIDES)})",
    )
    parser.add_argument(
        "--option", nargs="+", action="extend", metavar="O", help="options of all formats: mean, sinks4, vplain ..."
    )
    parser.add_argument("--uniform", action="store_true", help="the same format for all layers")
    parser.add_argument("--model", default=SMOLLM2, help=MODELS_HELP)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (the beginning of Moby Dick, 6.8 kB)")
    parser.add_argument("--windows", type=whole, default=1, metavar="N", help="pieces of text to tune on (%(default)s)")
    parser.add_argument("--held-out", type=whole, default=2, metavar="N", help="others to check on (%(default)s)")
    parser.add_argument("--window-tokens", type=whole, default=512, metavar="N", help="length of each (%(default)s)")
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if torch has it), cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bits and layers (PNG, SVG or PDF)")


def bits(text: str) -> Fraction:
    """A positive number of bits, for argparse: exact, so that a budget of 3.25 is enough for a format of 3.25."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits above 0, 32 at most")
    return value


def run(args: argparse.Namespace) -> int:
    if args.uniform:
        args.held_out = 0  # there is nothing to compare
    candidates = make_candidates(args.sides or SIDES, args.option or ())
    check_outputs(args.json, args.plot)
    path, text = read_text(args.text)
    if args.window_tokens < MIN_WINDOW:
        raise UsageError(f"argument --window-tokens: {args.window_tokens} is too short: give {MIN_WINDOW} or more")
    device = pick_device(args.device)
    import torch

    with quiet_transformers():
        subject = load_subject(args.model)
        subject.model.to(device)
        check_length(args, subject, path, text)
        cut = cut_windows(subject, text, path, args.windows + args.held_out, args.window_tokens)
        layers = _probe(subject, candidates[0], cut.ids, args)
        task = Task.of(candidates, layers, args.bits, args.page_size)
        head = {
            "command": shlex.join(["kvfold", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment_of(device),
            "settings": _settings(args, subject, path, text, cut.available),
        }
        found = Findings(task)
        try:
            with torch.inference_mode():
                _tune(args, subject, cut.ids, found)
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
            raise CapacityError(f"{reason}; give a smaller --window-tokens, or --device cpu") from None
        finally:  # what was measured before an interruption is kept
            if args.json is not None and found.uniform:
                args.json.write_text(json.dumps({**head, **found.json()}, indent=1) + "\n", encoding="utf-8")
    say(_text(args, path, found))
    print(found.chosen)
    sys.stdout.flush()
    if args.plot is not None:
        _plot(found, args.plot, _title(args, path))
    return 0


def make_candidates(sides: Sequence[str], options: Sequence[str]) -> list[KVFormat]:
    """Uniform formats of all pairs of sides.

    Raises:
        FormatError, NotBuiltError: A side or an option does not exist, or cannot be stored yet.
        UsageError: A side loses nothing.
    """
    if bad := next((text for text in (*sides, *options) if "@" in text), None):
        raise UsageError(f"arguments --sides, --option: {bad!r} names layers, which tune chooses: leave @ out")
    ending = "".join(f"+{option.lstrip('+')}" for option in options)
    formats = [KVFormat.parse(f"k{k}v{v}{ending}").require_built() for k in sides for v in sides]
    if any(fmt.k.lossless or fmt.v.lossless for fmt in formats):
        raise UsageError("argument --sides: bf16, f16 and f32 lose nothing that could be weighed: give 1 to 8 bits")
    return list(dict.fromkeys(formats))


def check_length(args: argparse.Namespace, subject: Subject, path: Path, text: str) -> None:
    """Refuse with :class:`UsageError` a text that is too short for all windows, with what would fit."""
    windows = args.windows + args.held_out
    available = len(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
    first = len(first_tokens(subject))
    if available < windows * (args.window_tokens - first):
        fits = available // windows + first
        shorter = f", or --window-tokens {fits}" if fits >= MIN_WINDOW else ""
        raise UsageError(
            f"{path} has {available:,} tokens, and --windows {args.windows} to tune on and --held-out {args.held_out} "
            f"to check on take {windows} x {args.window_tokens:,}: give a longer text with --text FILE{shorter}"
        )


# --- what is to be decided --------------------------------------------------------------------------------------------


Alone = dict[tuple[int, str], dict[Side, float]]
"""KL where only a layer's ``k``, or ``v``, is compressed: for each of the sides in which it was measured."""


class Job(NamedTuple):
    """Something to measure: a format, and the layers that stay uncompressed."""

    name: str
    format: ModelFormat
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """The choice: formats, layers and the budget.

    Attributes:
        candidates: Uniform formats within the budget that are worth measuring.
        k_sides: What K may be stored as, v_sides: V; narrowest first, each next one of more bytes and less error.
        base: A candidate, for the options that all share.
        layers: The compressed layers.
        page_size: Tokens in a page.
        budget: Bytes of a page of all layers.
    """

    candidates: list[KVFormat]
    k_sides: list[Side]
    v_sides: list[Side]
    base: KVFormat
    layers: dict[int, LayerGroup]
    page_size: int
    budget: int

    @property
    def elements(self) -> int:
        """Elements of K and V of a page of all layers."""
        return elements_of(self.layers) * self.page_size

    @staticmethod
    def of(formats: Sequence[KVFormat], layers: dict[int, LayerGroup], budget: Fraction, page_size: int) -> Task:
        """Find the candidates.

        Raises:
            UsageError: No format is as small as the budget.
        """
        from kvfold.eval.tune import unbeaten, widest

        size = next(iter(layers.values()))
        most = int(budget * elements_of(layers) * page_size / 8)
        sizes = [
            (
                ModelFormat(fmt).page_bytes(layers, page_size),
                (expected_distortion(fmt.k, size.head_size), expected_distortion(fmt.v, size.head_size_v)),
            )
            for fmt in formats
        ]
        places = widest(sizes, most)
        if not places:
            least = min(range(len(formats)), key=lambda place: sizes[place][0])
            in_bits = Fraction(8 * sizes[least][0], elements_of(layers) * page_size)
            enough = f"{math.ceil(in_bits * 10_000) / 10_000:g}"
            raise UsageError(
                f"argument --bits: {float(budget):g} is below the {enough} of {formats[least]}, the smallest format of "
                f"these sides, scales and padding included: give --bits {enough} or more, or narrower --sides"
            )

        # the same bytes and errors as those of the candidates, so that no candidate has a side that is left out here
        ks = [place for place, fmt in enumerate(formats) if fmt.v == formats[0].v]
        vs = [place for place, fmt in enumerate(formats) if fmt.k == formats[0].k]
        k_sides = [formats[ks[own]].k for own in unbeaten([(sizes[place][0], sizes[place][1][0]) for place in ks])]
        v_sides = [formats[vs[own]].v for own in unbeaten([(sizes[place][0], sizes[place][1][1]) for place in vs])]
        return Task([formats[place] for place in places], k_sides, v_sides, formats[0], layers, page_size, most)

    def format(self, k: Side, v: Side) -> KVFormat:
        """A format of two sides with the options that all share."""
        return replace(self.base, k=k, v=v)

    def bits(self, fmt: ModelFormat) -> float:
        """All-in bits per element over the compressed layers."""
        value = fmt.bits_per_element(self.layers, self.page_size)
        assert value is not None
        return value

    def measured(self, which: str, best: KVFormat) -> list[Side]:
        """The sides in which each layer's ``k`` or ``v`` is measured alone: narrower ones than ``best``'s, and that.

        An allocation can use all of them, as each is smaller than that of a format within the budget.
        """
        sides, own = (self.k_sides, best.k) if which == "k" else (self.v_sides, best.v)
        return sides[: sides.index(own) + 1]

    def parts(self, best: KVFormat) -> list[tuple[int, str, Side]]:
        """All that is measured alone: layer, ``k`` or ``v``, and the side."""
        return [(layer, which, side) for layer in self.layers for which in "kv" for side in self.measured(which, best)]

    def alone(self, layer: int, which: str, side: Side) -> Job:
        """One layer's K or V in a side, and nothing else compressed."""
        own = self.format(side, _EXACT) if which == "k" else replace(self.base, k=_EXACT, v=side, mean=False)
        others = tuple(other for other in self.layers if other != layer)
        return Job(f"layer {layer}, {which.upper()} in {side.name}", ModelFormat(own), others)

    def items(self, best: KVFormat, alone: Alone) -> list[list[Option]]:
        """For each layer what its K and its V may be stored as: bytes of a page, and the KL that follows.

        What was measured is taken as it is, even where noise puts a narrower side below a wider one: it shows no
        difference between the two then, and the narrower one leaves more bytes to others. For sides wider than
        ``best``'s the KL is that one's times the ratio of the two sides' expected errors: where nothing else is
        compressed, a KL grows with the square of a small error. Large errors do more, which is why no narrower side is
        predicted.
        """
        from kvfold.eval.tune import Option

        items = []
        for layer, group in self.layers.items():
            narrow_k, narrow_v = self.k_sides[0], self.v_sides[0]
            k_bytes = [self._bytes(layer, side, narrow_v) for side in self.k_sides]  # which pay for the narrowest V
            v_bytes = [self._bytes(layer, narrow_k, side) - k_bytes[0] for side in self.v_sides]
            k_losses = _losses(alone[layer, "k"], best.k, self.k_sides, group.head_size)
            v_losses = _losses(alone[layer, "v"], best.v, self.v_sides, group.head_size_v)
            items.append([Option(*pair) for pair in zip(k_bytes, k_losses, strict=True)])
            items.append([Option(*pair) for pair in zip(v_bytes, v_losses, strict=True)])
        return items

    def _bytes(self, layer: int, k: Side, v: Side) -> int:
        return ModelFormat(self.format(k, v)).page_bytes({layer: self.layers[layer]}, self.page_size)

    def chosen(self, choices: Sequence[int]) -> ModelFormat:
        """The format of an allocation of :meth:`items`."""
        pairs = zip(choices[::2], choices[1::2], strict=True)
        formats = [self.format(self.k_sides[k], self.v_sides[v]) for k, v in pairs]
        return ModelFormat.of_layers(dict(zip(self.layers, formats, strict=True)))


def _losses(measured: dict[Side, float], own: Side, sides: Sequence[Side], head_size: int) -> list[float]:
    """What was measured, and for the other sides what follows from the one of the best uniform format, ``own``."""
    per_error = measured[own] / expected_distortion(own, head_size)
    return [measured[side] if side in measured else per_error * expected_distortion(side, head_size) for side in sides]


# --- measuring --------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """KL on the windows that were held out, with intervals over pieces of text."""

    uniform: Interval
    allocation: Interval
    difference: Interval
    pieces: int


@dataclass
class Findings:
    """What has been found so far.

    Attributes:
        uniform: KL of each candidate.
        alone: KL of each layer's ``k`` and ``v`` alone, in the best uniform format's sides and narrower ones.
        frontier: The allocations that no other one beats, with predicted losses.
        allocation: The format of the last of them.
        allocation_kl: What was measured of it on the windows for tuning.
        held_out: The comparison, if there is something to compare.
        chosen: The format that is proposed. reason: Why this one.
    """

    task: Task
    uniform: dict[KVFormat, float] = field(default_factory=dict)
    alone: Alone = field(default_factory=dict)
    frontier: list[Allocation] = field(default_factory=list)
    allocation: ModelFormat | None = None
    allocation_kl: float | None = None
    held_out: Checked | None = None
    chosen: ModelFormat | None = None
    reason: str = ""

    @property
    def best(self) -> KVFormat:
        """The best uniform format; of equals the first."""
        return min(self.uniform, key=lambda fmt: self.uniform[fmt])

    def choose(self, fmt: ModelFormat, reason: str) -> None:
        self.chosen, self.reason = fmt, reason

    def json(self) -> dict[str, object]:
        task, chosen = self.task, self.chosen
        uniform = [
            {"format": str(fmt), "bits": task.bits(ModelFormat(fmt)), "kl": kl} for fmt, kl in self.uniform.items()
        ]
        layers = [
            {"layer": layer}
            | {which: {side.name: kl for side, kl in self.alone[layer, which].items()} for which in "kv"}
            for layer in sorted({layer for layer, _ in self.alone})
        ]
        frontier = [{"bits": 8 * point.cost / task.elements, "predicted_kl": point.loss} for point in self.frontier]
        allocation = None
        if self.allocation is not None:
            about = {"format": str(self.allocation), "bits": task.bits(self.allocation)}
            allocation = {**about, "predicted_kl": self.frontier[-1].loss, "kl": self.allocation_kl}
        held_out = None
        if self.held_out is not None:
            figures = {name: getattr(self.held_out, name)._asdict() for name in ("uniform", "allocation", "difference")}
            held_out = {**figures, "pieces": self.held_out.pieces}
        proposal = None
        if chosen is not None:
            about = {"format": str(chosen), "object": chosen.json(), "bits": task.bits(chosen)}
            proposal = {**about, "by_layer": not chosen.uniform, "reason": self.reason}
        return {
            "uniform": uniform,
            "layers": layers,
            "frontier": frontier,
            "allocation": allocation,
            "held_out": held_out,
            "chosen": proposal,
        }


def _probe(subject: Subject, fmt: KVFormat, ids: torch.Tensor, args: argparse.Namespace) -> dict[int, LayerGroup]:
    """The model's compressed layers, from a pass of a few tokens: what cannot run is refused now."""
    import torch

    say(f"trying {fmt}")
    cache = subject.new_cache(ModelFormat(fmt), args.page_size, "packed")
    with torch.inference_mode():
        forward(subject, ids[:1, :PROBE], cache)
    return stored_layers(cache)


def _tune(args: argparse.Namespace, subject: Subject, ids: torch.Tensor, found: Findings) -> None:
    from kvfold.eval.tune import frontier

    task = found.task
    tuning, others = ids[: args.windows], ids[args.windows :]
    per_layer = not args.uniform and len(task.layers) > 1
    with progress((1 + len(task.candidates)) * len(tuning)) as step:
        measure = Measure(subject, args.page_size, step)
        uniform = measure.all([Job(str(fmt), ModelFormat(fmt)) for fmt in task.candidates], tuning)
    found.uniform.update(zip(task.candidates, map(_mean, uniform), strict=True))
    best = ModelFormat(found.best)
    if not per_layer:
        found.choose(best, "the best of the uniform formats within the budget")
        return
    if found.best.k == task.k_sides[-1] and found.best.v == task.v_sides[-1]:
        found.choose(best, "the widest sides are within the budget, so there is nothing to choose")
        return
    parts = task.parts(found.best)  # how many there are depends on the best uniform format: hence a bar of their own
    with progress((3 + len(parts)) * len(tuning) + 3 * len(others)) as step:
        measure = Measure(subject, args.page_size, step)
        alone = measure.all([task.alone(*part) for part in parts], tuning)
        for (layer, which, side), kl in zip(parts, map(_mean, alone), strict=True):
            found.alone.setdefault((layer, which), {})[side] = kl
        found.frontier = frontier(task.items(found.best, found.alone), task.budget)
        found.allocation = allocation = task.chosen(found.frontier[-1].choices)
        assert allocation.page_bytes(task.layers, task.page_size) == found.frontier[-1].cost
        if allocation == best:
            found.choose(best, "no allocation to single layers promises more than the best uniform format")
            return
        by_layer = Job("by layer", allocation)
        found.allocation_kl = _mean(measure.all([by_layer], tuning)[0])
        found.held_out = checked = _check(*measure.all([Job(str(best), best), by_layer], others))
    if checked.difference.high is not None and checked.difference.high < 0:
        found.choose(allocation, "better than the best uniform format on text that was held out, beyond its interval")
    else:
        found.choose(best, "formats of single layers are not better beyond doubt on text that was held out")


@dataclass
class Measure:
    """Runs windows through the model in several formats, and tells ``step`` what begins."""

    subject: Subject
    page_size: int
    step: Callable[[str], None]

    def all(self, jobs: Sequence[Job], windows: torch.Tensor) -> list[list[Floats]]:
        """KL ``[n]`` of each job in each window."""
        from kvfold.eval.fidelity import FIRST_POSITION, compare
        from kvfold.integrations.transformers import KVCache

        found: list[list[Floats]] = [[] for _ in jobs]
        for index in range(len(windows)):
            window, title = windows[index : index + 1], f"window {index + 1} of {len(windows)}"
            self.step(f"{title}: {ORDINARY}")
            self.subject.new_cache(None, self.page_size, "packed")  # gives the model its own attention back
            base = baseline(self.subject, window)
            require_finite(base.nll, "the uncompressed model", index)
            for place, job in enumerate(jobs):
                self.step(f"{title}: {job.name}")
                options: dict[str, Any] = {"page_size": self.page_size, "chunk": "packed", "skip_layers": job.skipped}
                cache = KVCache.for_model(self.subject.model, job.format, **options)
                kl = compare(base, forward(self.subject, window, cache)[FIRST_POSITION:-1]).kl
                require_finite(kl, job.name, index)
                found[place].append(kl)
        return found


def _mean(windows: Sequence[Floats]) -> float:
    import numpy as np

    return float(np.mean([window.mean() for window in windows]))


def _check(uniform: Sequence[Floats], allocation: Sequence[Floats]) -> Checked:
    from kvfold.eval.bootstrap import draw, of_mean
    from kvfold.eval.tune import pieces

    one, other = pieces(uniform), pieces(allocation)
    draws = draw(len(one))
    return Checked(of_mean(draws, one), of_mean(draws, other), of_mean(draws, other - one), len(one))


# --- what is shown ----------------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace, subject: Subject, path: Path, text: str, available: int) -> dict[str, object]:
    from kvfold.eval.bootstrap import CONFIDENCE, RESAMPLES, SEED
    from kvfold.eval.fidelity import FIRST_POSITION
    from kvfold.eval.tune import BLOCK

    return {
        "model": args.model,
        "dtype": subject.dtype,
        "device": str(subject.model.device),
        "text": {"file": str(path), "sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": available},
        "bits": float(args.bits),
        "sides": list(args.sides or SIDES),
        "options": list(args.option or ()),
        "uniform": args.uniform,
        "windows": args.windows,
        "held_out": args.held_out,
        "window_tokens": args.window_tokens,
        "first_position": FIRST_POSITION,
        "piece_tokens": BLOCK,
        "chunk": "packed",
        "page_size": args.page_size,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "seed": SEED,
    }


def _title(args: argparse.Namespace, path: Path) -> str:
    windows = f"{args.windows} window{'s' * (args.windows > 1)} of {args.window_tokens:,} tokens of {path.name}"
    return f"{args.model}: at most {float(args.bits):g} bits per element, tuned on {windows}"


def _text(args: argparse.Namespace, path: Path, found: Findings) -> str:
    """What was found, for stderr."""
    task = found.task
    cells = [
        [str(fmt), f"{task.bits(ModelFormat(fmt)):.3f}", f"{kl:.3g}", ""]
        for fmt, kl in sorted(found.uniform.items(), key=lambda pair: pair[1])
    ]
    if found.allocation is not None and found.allocation_kl is not None:
        predicted = f"{found.frontier[-1].loss:.3g}"
        cells.append(["by layer", f"{task.bits(found.allocation):.3f}", f"{found.allocation_kl:.3g}", predicted])
    lines = [_title(args, path), "", table(["format", "bits", "KL", "predicted"], cells), ""]
    if found.alone:
        lines += _sensitive(found)
    if found.held_out is not None:
        checked = found.held_out
        windows = f"{args.held_out} window{'s' * (args.held_out > 1)}"
        lines += [
            f"On {windows} held out, {checked.pieces} pieces of text: {found.best} "
            f"{_figure(checked.uniform)}, by layer {_figure(checked.allocation)}, difference "
            f"{_figure(checked.difference)}.",
        ]
    assert found.chosen is not None
    return "\n".join([*lines, f"Proposed, at {task.bits(found.chosen):.3f} bits: {found.reason}."])


def _sensitive(found: Findings) -> list[str]:
    """The layers whose K or V alone loses most: a line for each side, the best uniform format's first."""
    lines = []
    for which in "kv":
        for side in reversed(found.task.measured(which, found.best)):
            losses = {layer: found.alone[layer, which][side] for layer in found.task.layers}
            most = sorted(losses, key=lambda layer: -losses[layer])[:5]
            shown = ", ".join(f"{layer} ({losses[layer]:.2g})" for layer in most)
            total = f"{sum(losses.values()):.3g}"
            lines.append(f"{which.upper()} alone in {side.name}: {total} in all; most in layers {shown}.")
    return lines


def _figure(figure: Interval) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3g}"
    return f"{figure.value:.3g} ({figure.low:.3g}..{figure.high:.3g})"


def _plot(found: Findings, path: Path, title: str) -> None:
    """KL against bits: uniform formats, the predicted frontier and what was chosen; and each layer's K and V alone.

    Of these the best uniform format's sides are solid lines, narrower ones thin and dashed.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    task = found.task
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (fmt, kl) in enumerate(found.uniform.items()):
        left.plot([task.bits(ModelFormat(fmt))], [kl], "o", color=f"C{place % 10}", label=str(fmt))
    if found.frontier:
        points = found.json()["frontier"]
        assert isinstance(points, list)
        shown = [point for point in points if point["predicted_kl"] > 0]
        values = [point["bits"] for point in shown], [point["predicted_kl"] for point in shown]
        left.plot(*values, color="grey", linewidth=1, label="by layer, predicted")
    if found.allocation is not None and found.allocation_kl is not None:
        at = [task.bits(found.allocation)], [found.allocation_kl]
        left.plot(*at, "*", color="black", markersize=11, label="by layer, measured")
    for which, marker, colour in (("k", "o", "C0"), ("v", "s", "C1")) if found.alone else ():
        for place, side in enumerate(reversed(task.measured(which, found.best))):
            dash, width, size = ("-", 0.9, 6) if place == 0 else (("--", "-.", ":")[(place - 1) % 3], 0.5, 3)
            look = {"linestyle": dash, "linewidth": width, "marker": marker, "markersize": size, "color": colour}
            losses = [found.alone[layer, which][side] for layer in task.layers]
            right.plot(list(task.layers), losses, label=f"{which.upper()} alone in {side.name}", **look)
    left.set_xlabel("bits per element, all-in")
    right.set_xlabel("layer")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("mean KL, nats per token")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
