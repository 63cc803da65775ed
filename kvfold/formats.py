"""What keys and values are stored as: one frozen value from which every byte count is derived.

A format has a side for K and a side for V. Its text form is the grammar

    k<side>v<side>[+option ...]
    side   = 1 | 2 | ... | 8 | 2.5 | 3.5, optionally followed by t (trellis), q (MSE + QJL) or a (affine per 32)
             | f8 (e4m3 with a scale per token) | f8cast (e4m3 without) | bf16 | f16 | f32
    option = [k|v] (unbiased | plain | nc | mse)      which scale is stored, default unbiased
             | [k|v] pre<odd number>                  candidates of the prescale search, default 3 (1 with plain)
             | mean | sinks<n> | tail<n>              key reference per page; exact first and last tokens

so ``k4v4``, ``k8v3+sinks4+tail128`` and ``kf8v4+vplain`` are formats; :mod:`kvfold.spelling` reads and writes them.
Other people's spellings are aliases of the same values. A width that is well spelled but whose family is not built yet
parses, and is refused with :class:`~kvfold.errors.NotBuiltError` when somebody wants to store with it.

Pure Python, no torch: planners, engines and the command line import this module alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvfold.errors import FormatError, NotBuiltError

TILE = 16
"""Tokens in a tile, the smallest unit of layout: a page is one, two or four tiles, and every count of bytes per token
is exact because a tile holds nothing but its sixteen tokens."""

PAGE_SIZES = (16, 32, 64)
SCALE_RULES = ("unbiased", "plain", "nc", "mse")
MAX_PRESCALES = 13
MAX_HEAD_SIZE = 1024
MIN_ROTATED_HEAD = 8
"""Fewer coordinates than this have no law worth a codebook."""
SCALE_BYTES = 2  # bfloat16: any float32 K or V has a scale in range, and codes adapt to the rounded scale

# A code of b bits is cut into planes of 4, 2 and 1 bits (8 stays whole), lowest bits first, so that a plane's codes
# never straddle a byte and one byte of codes belongs to one token.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
# Of a trellis code the highest bit, the path's, has the last plane for itself.
_TRELLIS_PLANES = {2: (1, 1), 3: (2, 1), 4: (2, 1, 1)}
EXACT_BITS = {"bf16": 16, "f16": 16, "f32": 32}
_FAMILY_SUFFIX = {"lloyd": "", "trellis": "t", "qjl": "q", "affine": "a", "outlier": ""}
_FAMILIES = (*_FAMILY_SUFFIX, "fp8", "fp8cast", "exact")
_NOT_BUILT = {
    "qjl": "the MSE + QJL estimator",
    "affine": "affine quantisation",
    "outlier": "quantisation at fractional widths",
}


@dataclass(frozen=True)
class Side:
    """What one of K and V is stored as.

    Attributes:
        family: ``lloyd``, ``trellis``, ``fp8``, ``fp8cast``, ``exact``; or, not built yet, ``qjl``, ``affine``,
            ``outlier``.
        bits: Bits of a code.
        dtype: For ``exact``: ``bf16``, ``f16`` or ``f32``.
        scale: Which scale is stored for a Lloyd–Max or trellis vector; ``none`` where the family stores none or its
            own.
        prescales: Candidates of the prescale search at encode time.
        group: Coordinates that share a scale; 0 is the whole head.
    """

    family: str
    bits: float
    dtype: str = ""
    scale: str = "none"
    prescales: int = 1
    group: int = 0

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise FormatError(f"family {self.family!r} is not one of {', '.join(_FAMILIES)}")
        if self.family == "lloyd" and self.bits not in range(1, 9):
            raise FormatError(f"Lloyd–Max codes have 1 to 8 bits, not {self.bits!r}")
        if self.family == "trellis" and self.bits not in _TRELLIS_PLANES:
            raise FormatError(f"trellis codes have 2, 3 or 4 bits, not {self.bits!r}")
        if self.family == "exact" and EXACT_BITS.get(self.dtype) != self.bits:
            raise FormatError(f"exact sides are {', '.join(EXACT_BITS)}, not {self.dtype!r} of {self.bits!r} bits")
        if self.family in ("lloyd", "trellis") and self.scale not in SCALE_RULES:
            rules = ", ".join(SCALE_RULES)
            raise FormatError(f"a {self.family} side stores a scale by one of {rules}, not {self.scale!r}")
        if self.prescales % 2 == 0 or not 1 <= self.prescales <= MAX_PRESCALES:
            raise FormatError(
                f"pre{self.prescales}: the prescale search takes an odd number of candidates from 1 to {MAX_PRESCALES}"
            )

    @property
    def rotated(self) -> bool:
        """Whether vectors are rotated before they are quantised."""
        return self.family in ("lloyd", "trellis", "qjl", "outlier")

    @property
    def scaled(self) -> bool:
        """Whether a scale is stored beside the codes of a vector."""
        return self.family in ("lloyd", "trellis", "fp8")

    @property
    def lossless(self) -> bool:
        return self.family == "exact"

    @property
    def missing(self) -> str | None:
        """Why nothing can be stored this way yet, or None."""
        if self.family in _NOT_BUILT:
            return f"{_NOT_BUILT[self.family]} (side {self.name!r}) is not built yet"
        if self.group:
            return f"scales per group of {self.group} coordinates are not built yet"
        return None

    @property
    def name(self) -> str:
        """The side's spelling inside a format."""
        if self.family == "exact":
            return self.dtype
        if self.family in ("fp8", "fp8cast"):
            return "f8" + self.family[3:]
        return f"{self.bits:g}{_FAMILY_SUFFIX.get(self.family, '')}"

    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes that a code is cut into, lowest bits first."""
        if self.missing:
            raise NotBuiltError(f"{self.missing}; built are widths 1 to 8, 2t, 3t, 4t, f8, f8cast, bf16, f16 and f32")
        if self.family == "trellis":
            return _TRELLIS_PLANES[int(self.bits)]
        return (int(self.bits),) if self.bits > 8 else _PLANES[int(self.bits)]

    def plane_bytes(self, head_size: int) -> tuple[int, ...]:
        """Bytes of one token's row in each plane: whole 32-bit words."""
        return tuple(4 * -(-head_size * width // 32) for width in self.planes())

    def bytes_per_token(self, head_size: int) -> int:
        """Bytes of one vector of ``head_size`` coordinates: codes, padding to words and scale."""
        return sum(self.plane_bytes(head_size)) + (SCALE_BYTES if self.scaled else 0)


@dataclass(frozen=True)
class KVFormat:
    """What K and V are stored as: frozen, hashable, and round-trips through :func:`str` and :func:`KVFormat.parse`.

    Attributes:
        k: The side of the keys.
        v: The side of the values.
        mean: A key reference vector per page and KV head is subtracted before quantising.
        sinks: First tokens of a sequence that are also kept exact.
        tail: Last tokens of a sequence that are also kept exact.
    """

    k: Side
    v: Side
    mean: bool = False
    sinks: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        if self.mean and not self.k.rotated:
            raise FormatError(
                f"mean: a reference is subtracted from keys that are rotated, and {self.k.name} is not; leave +mean "
                "out, or give K 1 to 8 bits or a trellis"
            )
        for name, count in (("sinks", self.sinks), ("tail", self.tail)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise FormatError(f"{name} is a number of tokens from 0, not {count!r}")

    @staticmethod
    def parse(spec: FormatSpec) -> KVFormat:
        """Understand a format however it is written: a name, a number of bits, a JSON object or a format.

        Raises:
            FormatError: The spelling is unknown; the message proposes the nearest known ones.
        """
        from kvfold.spelling import parse  # it builds formats, so it imports this module

        return parse(spec)

    def __str__(self) -> str:
        from kvfold.spelling import spell

        return spell(self)

    def require_built(self) -> KVFormat:
        """Return self, or raise :class:`NotBuiltError` if something in the format is not built yet."""
        reasons = [side.missing for side in (self.k, self.v) if side.missing]
        if reasons:
            raise NotBuiltError(
                f"format {str(self)!r}: {'; '.join(dict.fromkeys(reasons))}. Built today: {built_help()}"
            )
        return self

    @property
    def lossless(self) -> bool:
        return self.k.lossless and self.v.lossless

    def bytes_per_token(self, head_size: int, head_size_v: int | None = None) -> int:
        """Bytes of one token of one KV head: its codes, padding and scales. What a page holds beside its tokens is
        :meth:`reference_bytes`, and exact sinks and tail are :meth:`exact_bytes`."""
        self.require_built()
        size_v = check_head_size(head_size if head_size_v is None else head_size_v)
        return self.k.bytes_per_token(check_head_size(head_size)) + self.v.bytes_per_token(size_v)

    def reference_bytes(self, head_size: int) -> int:
        """Bytes of a page of one KV head for its key reference: 8-bit codes and a scale, to a multiple of 16."""
        return -(-(check_head_size(head_size) + SCALE_BYTES) // 16) * 16 if self.mean else 0

    def page_bytes(self, page_size: int, head_size: int, head_size_v: int | None = None) -> int:
        """Bytes of a page of one KV head, everything included but the exact sinks and tail."""
        tokens = check_page_size(page_size) * self.bytes_per_token(head_size, head_size_v)
        return tokens + self.reference_bytes(head_size)

    def bits_per_element(self, head_size: int, head_size_v: int | None = None, page_size: int = 64) -> float:
        """All-in bits per element of K and V in full pages."""
        elements = page_size * (head_size + (head_size_v or head_size))
        return 8 * self.page_bytes(page_size, head_size, head_size_v) / elements

    def exact_bytes(self, head_size: int, head_size_v: int | None = None, itemsize: int = 2) -> int:
        """Bytes per sequence and KV head of the exact sinks and tail, kept beside the pages in the model's dtype."""
        return (self.sinks + self.tail) * (head_size + (head_size_v or head_size)) * itemsize


FormatSpec = str | float | Mapping[str, object] | KVFormat
"""A format in any spelling that :meth:`KVFormat.parse` understands."""


def check_page_size(page_size: int) -> int:
    """Return ``page_size``, or raise :class:`FormatError` naming the sizes that exist."""
    if not isinstance(page_size, int) or page_size not in PAGE_SIZES:
        raise FormatError(f"page_size {page_size!r} is not one of {', '.join(map(str, PAGE_SIZES))} tokens")
    return page_size


def check_head_size(head_size: int) -> int:
    """Return ``head_size``, or raise :class:`FormatError` naming the range."""
    if not isinstance(head_size, int) or not 1 <= head_size <= MAX_HEAD_SIZE:
        raise FormatError(f"head size {head_size!r} is not an integer from 1 to {MAX_HEAD_SIZE}")
    return head_size


def check_heads(fmt: KVFormat, head_size: int, head_size_v: int) -> None:
    """Refuse what cannot be stored.

    Raises:
        NotBuiltError: Something in the format is not built yet.
        FormatError: A head size is out of range, or too small for a side that rotates.
    """
    fmt.require_built()
    for side, size in ((fmt.k, head_size), (fmt.v, head_size_v)):
        if side.rotated and check_head_size(size) < MIN_ROTATED_HEAD:
            raise FormatError(
                f"head size {size} is too small for {fmt}: rotated codes need {MIN_ROTATED_HEAD} or more coordinates; "
                "use bf16, f16, f32 or f8 for such a model"
            )


def built_help() -> str:
    """One line that names what can be stored today, for error messages and help texts."""
    return (
        "k<b>v<b> with b from 1 to 8, 2t, 3t, 4t, f8, f8cast, bf16, f16 or f32 (k4v4, k3tv3t, kf8v3), "
        "+mean, +sinks<n>, +tail<n>"
    )
