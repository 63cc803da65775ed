"""How much memory a model's KV cache takes in a format, and how much context fits into a given memory.

Every figure comes from :mod:`kvfold.layerformats`, which adds up what :meth:`KVFormat.page_bytes
<kvfold.formats.KVFormat.page_bytes>` and :meth:`KVFormat.exact_bytes <kvfold.formats.KVFormat.exact_bytes>` say of each
layer. From these pages are allocated too, so that a plan and an allocation agree to the byte. Pure Python, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from kvfold.errors import UnsupportedModelError
from kvfold.formats import FormatSpec, check_page_size
from kvfold.layerformats import ModelFormat, ModelFormatSpec
from kvfold.modelshape import FULL, KINDS, LINEAR, SHARED, SLIDING, LayerGroup, ModelShape, PlanError, positive

__all__ = [
    "BASELINES", "DEFAULT_FORMATS", "FULL", "KINDS", "LINEAR", "SHARED", "SLIDING",
    "FormatSpec", "LayerGroup", "ModelShape", "PlanError", "PlanRow",
    "cache_bytes", "compressed_bytes", "parse_memory", "plan", "window_bytes",
]  # fmt: skip

BASELINES = ("bf16", "fp8")
DEFAULT_FORMATS = ("k8v4", "k4v4", "k4v2", "k3v3", "k2v2")


@dataclass(frozen=True)
class PlanRow:
    """What one format gives.

    Attributes:
        format: The format.
        bytes_per_token: Bytes of a token in full pages, over all compressed layers and their heads. The unused rest of
            a last page, exact sinks and tail, and uncompressed layers are in ``tokens`` and ``requests``.
        bits_per_element: All-in bits of an element of K and V in the pages, None if no layer is compressed.
        tokens: Tokens of one sequence that fit, in whole pages; None if the cache stops growing before memory is full.
        requests: Sequences of the planned context that fit, each with its own pages, sinks and tail.
        ratio: ``tokens`` against that of bf16, None if one of them is unlimited or bf16 holds nothing.
        compressed_layers: Layers stored in the format.
        uncompressed_layers: Layers that are not, counted in ``tokens`` and ``requests`` all the same.
        uncompressed: Those layers, in words.
    """

    format: ModelFormat
    bytes_per_token: float
    bits_per_element: float | None
    tokens: int | None
    requests: int
    ratio: float | None
    compressed_layers: int
    uncompressed_layers: int
    uncompressed: tuple[str, ...]


def cache_bytes(
    shape: ModelShape, format: ModelFormatSpec, tokens: int, page_size: int = 64, sequences: int = 1
) -> int:
    """Bytes of the whole KV cache: :func:`compressed_bytes` and :func:`window_bytes` of some sequences.

    Layers that use another layer's cache hold nothing; nor do linear ones: their recurrent states are constant in size
    and not counted.

    Args:
        shape: The model.
        format: What layers of full attention store.
        tokens: Tokens of each sequence.
        page_size: Tokens in a page: 16, 32 or 64.
        sequences: Sequences of that length.

    Raises:
        NotBuiltError: The format needs something that is not built yet.
        FormatError: The format or page size does not exist, the heads are too small for the format, or it names layers
            that the model does not have or does not compress.
        PlanError: ``tokens`` or ``sequences`` is not a whole number from 0.
    """
    whole = compressed_bytes(shape, format, tokens, page_size) + window_bytes(shape, tokens)
    return _count(sequences, "sequences") * whole


def compressed_bytes(shape: ModelShape, format: ModelFormatSpec, tokens: int, page_size: int = 64) -> int:
    """Bytes of the compressed layers, one sequence: tokens in whole pages, and beside them the exact sinks and tail.

    Arguments and errors as :func:`cache_bytes`.
    """
    pages = -(-_count(tokens, "tokens") // check_page_size(page_size))
    fmt, layers = _format(shape, format), shape.compressed_layers
    return pages * fmt.page_bytes(layers, page_size) + fmt.exact_bytes(layers, shape.itemsize)


def window_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the sliding layers, one sequence. They are not compressed: the last ``window`` tokens in the model's
    dtype."""
    sliding = [group for group in shape.groups if group.kind == SLIDING]
    return shape.itemsize * sum(
        group.layers * group.num_kv_heads * min(tokens, group.window) * (group.head_size + group.head_size_v)
        for group in sliding
    )


def plan(
    shape: ModelShape,
    memory_bytes: int,
    context: int,
    formats: Iterable[ModelFormatSpec] | None = None,
    page_size: int = 64,
) -> list[PlanRow]:
    """What fits into a memory, format by format, always beside bf16 and fp8.

    Args:
        shape: The model.
        memory_bytes: Memory for the KV cache: what weights and activations leave.
        context: Tokens of a request.
        formats: Formats to compare, :data:`DEFAULT_FORMATS` if None; doubles are dropped.
        page_size: Tokens in a page: 16, 32 or 64.

    Raises:
        NotBuiltError: A format needs something that is not built yet.
        FormatError: A format or page size does not exist, the heads are too small for a format, or it names layers that
            the model does not have or does not compress.
        PlanError: The memory or the context is not a positive whole number.
        UnsupportedModelError: No layer of the model keeps keys and values per token.
    """
    positive(memory_bytes, "bytes of memory")
    positive(context, "tokens of context")
    if not any(group.kind in (FULL, SLIDING) for group in shape.groups):
        raise UnsupportedModelError(f"{shape.name or 'this model'} has no layer with keys and values: nothing to plan")
    check_page_size(page_size)
    specs = (*BASELINES, *(DEFAULT_FORMATS if formats is None else formats))
    rows: list[PlanRow] = []
    for fmt in dict.fromkeys(_format(shape, spec) for spec in specs):
        tokens = _tokens_that_fit(shape, fmt, memory_bytes, page_size)
        bf16_tokens = rows[0].tokens if rows else tokens
        page_bytes = fmt.page_bytes(shape.compressed_layers, page_size)
        row = PlanRow(
            format=fmt,
            bytes_per_token=page_bytes / page_size if page_bytes % page_size else page_bytes // page_size,
            bits_per_element=fmt.bits_per_element(shape.compressed_layers, page_size),
            tokens=tokens,
            requests=memory_bytes // cache_bytes(shape, fmt, context, page_size),
            ratio=tokens / bf16_tokens if tokens is not None and bf16_tokens else None,
            compressed_layers=sum(group.layers for group in shape.compressed),
            uncompressed_layers=sum(group.layers for group in shape.uncompressed),
            uncompressed=tuple(str(group) for group in shape.uncompressed),
        )
        rows.append(row)
    return rows


def _format(shape: ModelShape, spec: ModelFormatSpec) -> ModelFormat:
    """The format, if the layers that it names are compressed layers of the model."""
    return ModelFormat.parse(spec).require_built().require_layers(len(shape.layers), shape.compressed_layers)


def _tokens_that_fit(shape: ModelShape, fmt: ModelFormat, memory: int, page_size: int) -> int | None:
    """The most tokens of one sequence, in whole pages; None if memory never gets full."""
    if shape.compressed:
        too_many = memory // fmt.page_bytes(shape.compressed_layers, page_size) + 1
    else:
        too_many = max(group.window for group in shape.groups) // page_size + 1  # from here on nothing grows
        if cache_bytes(shape, fmt, too_many * page_size, page_size) <= memory:
            return None
    fits = 0  # also when not even the sinks and the tail do
    while too_many - fits > 1:
        pages = (fits + too_many) // 2
        if cache_bytes(shape, fmt, pages * page_size, page_size) <= memory:
            fits = pages
        else:
            too_many = pages
    return fits * page_size


def _count(value: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{what}: {value!r} is not a whole number from 0")
    return value


# --- sizes of memory --------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_memory(text: str | int) -> int:
    """Bytes of a size like ``80GB`` (80 * 10^9), ``40GiB`` (40 * 2^30), ``1.5 TiB`` or a number of bytes.

    Raises:
        PlanError: It is no size, the unit is unknown or could be meant either way, or it is less than a byte.
    """
    if isinstance(text, int):
        return positive(text, "bytes of memory")
    match = _MEMORY.fullmatch(text.strip().lower())
    if not match:
        raise PlanError(f"memory {text!r} is not a size; write 80GB, 40GiB, 512MiB or a number of bytes")
    number, unit = match.groups()
    if unit in ("k", "m", "g", "t", "ki", "mi", "gi", "ti"):
        either = f"{number}{unit[0].upper()}B (powers of 1000) or {number}{unit[0].upper()}iB (powers of 1024)"
        raise PlanError(f"memory {text!r} has half a unit; write {either}")
    if unit not in _UNITS:
        raise PlanError(f"memory {text!r} has an unknown unit; write B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return positive(int(Fraction(number) * _UNITS[unit]), f"memory {text!r} in bytes")
