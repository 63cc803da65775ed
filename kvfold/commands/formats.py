"""What keys and values can be stored as: all-in bits, bytes of a token of one KV head, expected error, use.

Formats are named k<side>v<side>[+option...]: k4v4, k8v3+sinks4, kf8v4. Without names the usual ones are shown, and what
is understood but not built yet.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from kvfold.commands import table
from kvfold.commands.plan import head_size
from kvfold.errors import NotBuiltError
from kvfold.formats import KVFormat, Side, check_heads
from kvfold.spelling import ALIASES, PRESETS

EPILOG = """\
JSON (--json): head_size, head_size_v, formats [{format, aliases, bits_per_element, bytes_per_token, ratio,
exact_bytes_per_sequence, k_distortion, v_distortion, use}], not_built [{reason, formats}]. Bytes are those of one KV
head, the exact ones (sinks and tail) in a 16-bit dtype; ratio is bf16's bytes over the format's.

example: kvfold formats k4v4 k4v3+sinks4 --head-size 64
"""

USUAL = (
    "bf16", "fp8", "k8v8", "k8v4", "k6v6", "k5v5", "k4tv4t+mean", "k4tv4t", "k4v4", "k4v3", "k3tv3t+mean", "k3tv3t",
    "k3v3", "k4v2", "k3v2", "k2tv2t+mean", "k2tv2t", "k2v2",
)  # fmt: skip
# Every family that parses, a spelling each; what is built drops out of the list of what is not.
SPELLINGS = ("k4tv4t", "k4qv4q", "k4av4a", "k3.5v3.5", "k2.5v2.5", "k4v4+mean", *PRESETS)

_USE = {
    "kf32vf32": "lossless for every dtype",
    "kf16vf16": "not compressed, for float16 models",
    "kbf16vbf16": "not compressed: the yardstick",
    "kf8vf8": "half of bf16, small error",
    "k8v8": "size of fp8, smaller error",
    "k8v4": "where 4-bit keys are too coarse",
    "k4v4": "default: a quarter of bf16",
    "k3v3": "visible loss",
    "k3v2": "large loss: for experiments",
    "k4tv4t": "size of k4v4, smaller error",
    "k3tv3t": "size of k3v3, smaller error",
    "k2tv2t": "size of k2v2, smaller error",
}
PAGE = 64
_FOOTNOTE = """\
bytes: of one token of one KV head, in full pages of 64. error: expected |x - x'|^2 / |x|^2 of a random vector with the
stored scale, before the prescale search, which lowers it a little; 0 where a model of that dtype loses nothing. What it
does to a model's output depends on the model."""


@dataclass(frozen=True)
class FormatRow:
    """What is shown of a format; see :data:`EPILOG`."""

    format: str
    aliases: list[str]
    bits_per_element: float
    bytes_per_token: float
    ratio: float
    exact_bytes_per_sequence: int
    k_distortion: float
    v_distortion: float
    use: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="formats to show instead of the usual ones")
    parser.add_argument("--head-size", type=head_size, default=128, metavar="D", help="coordinates of a key (128)")
    parser.add_argument("--head-size-v", type=head_size, metavar="D", help="coordinates of a value, if they differ")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    size_v = args.head_size_v or args.head_size
    formats = dict.fromkeys(KVFormat.parse(spec) for spec in args.formats or USUAL)
    rows = [describe(fmt, args.head_size, size_v) for fmt in formats]
    missing = {} if args.formats else not_built(SPELLINGS)
    if args.json:
        result = {
            "head_size": args.head_size,
            "head_size_v": size_v,
            "formats": [asdict(row) for row in rows],
            "not_built": [{"reason": reason, "formats": names} for reason, names in missing.items()],
        }
        print(json.dumps(result, indent=2))
        return 0
    print(_text(rows))
    if missing:
        print("\nUnderstood, but nothing can be stored in them yet:")
        for reason, names in missing.items():
            print(textwrap.fill(f"{reason}: {', '.join(names)}", 118, initial_indent="  ", subsequent_indent="    "))
    return 0


def describe(fmt: KVFormat, head_size: int, head_size_v: int) -> FormatRow:
    """A format's figures for one KV head.

    Raises:
        NotBuiltError: Something in the format is not built yet.
        FormatError: The head is too small for the format.
    """
    check_heads(fmt, head_size, head_size_v)
    page = fmt.page_bytes(PAGE, head_size, head_size_v)
    size = page / PAGE if page % PAGE else page // PAGE
    return FormatRow(
        format=str(fmt),
        aliases=[name for name, spec in ALIASES.items() if KVFormat.parse(spec) == fmt],
        bits_per_element=fmt.bits_per_element(head_size, head_size_v),
        bytes_per_token=size,
        ratio=KVFormat.parse("bf16").bytes_per_token(head_size, head_size_v) / size,
        exact_bytes_per_sequence=fmt.exact_bytes(head_size, head_size_v),
        k_distortion=expected_distortion(fmt.k, head_size),
        v_distortion=expected_distortion(fmt.v, head_size_v),
        use=use(fmt),
    )


def expected_distortion(side: Side, head_size: int) -> float:
    """Expected ``|x - x'|^2 / |x|^2`` of a random vector, without the prescale search; good to 3 % (fp8: 7 %).

    Of a trellis that holds for heads of a multiple of 32; others lose up to 10 % more. What ``+mean`` gains depends on
    the keys, and random ones have no mean.

    A codebook of distortion D leaves a cosine of ``sqrt(1 - D)`` between a vector and its levels. The least error of
    that direction is D, and ``plain`` and ``mse`` store the scale for it; ``nc`` restores the norm, ``unbiased`` the
    inner product with the vector itself, which lengthens it by ``1 / (1 - D)``: at 1 bit that is .56 and not .36.
    """
    from kvfold.codebooks import fp8_distortion, lloyd_max, trellis_levels  # here, because they import numpy

    if side.lossless:
        return 0.0
    if side.family in ("fp8", "fp8cast"):
        return fp8_distortion()
    bits = int(side.bits)
    least = trellis_levels(bits).distortion if side.family == "trellis" else lloyd_max(bits, head_size).distortion
    if side.scale == "unbiased":
        return least / (1 - least)
    return 2 - 2 * (1 - least) ** 0.5 if side.scale == "nc" else least


def use(fmt: KVFormat) -> str:
    """A phrase on what the format is for."""
    text = _USE.get(str(fmt).split("+")[0])
    if text is None and fmt.k.bits != fmt.v.bits:
        wider = fmt.k.bits > fmt.v.bits
        text = "keys wider than values: keys matter more" if wider else "values wider than keys: seldom the better way"
    if text is None and "trellis" in (fmt.k.family, fmt.v.family):
        text = "a trellis on one side only"
    if text is None:
        text = "larger than the default, smaller error" if fmt.k.bits > 4 else "large loss: for experiments"
    text += "; for keys with an offset" if fmt.mean else ""
    return text + ("; first or last tokens exact" if fmt.sinks or fmt.tail else "")


def not_built(spellings: Iterable[str]) -> dict[str, list[str]]:
    """The formats among ``spellings`` that nothing can be stored in yet, by reason."""
    missing: dict[str, list[str]] = {}
    for spelling in spellings:
        fmt = KVFormat.parse(spelling)
        try:
            fmt.require_built()
        except NotBuiltError as error:
            sides = [side.missing for side in (fmt.k, fmt.v) if side.missing]
            reason = sides[0] if sides else str(error).split(". ")[0].split(": ")[-1]
            missing.setdefault(re.sub(r" \(side .*\)", "", reason), []).append(spelling)
    return missing


def _text(rows: list[FormatRow]) -> str:
    header = ["format", "also", "bits", "bytes", "x bf16", "K error", "V error", "use"]
    cells = [
        [
            row.format,
            ", ".join(row.aliases),
            f"{row.bits_per_element:.3f}",
            str(row.bytes_per_token),
            f"{row.ratio:.2f}",
            f"{row.k_distortion:.2g}",
            f"{row.v_distortion:.2g}",
            row.use,
        ]
        for row in rows
    ]
    beside = [
        f"{row.format}: and {row.exact_bytes_per_sequence:,} bytes of exact tokens per sequence and KV head."
        for row in rows
        if row.exact_bytes_per_sequence
    ]
    return "\n".join([table(header, cells, (0, 1, 7)), "", _FOOTNOTE, *beside])
