"""How far a model's next-token distributions move: KL divergence, agreement, perplexity, and bootstrap intervals.

Logits go in, one window of text at a time and in blocks of positions, so that no more than the logits of two passes and
one block are alive; float64 arrays with a number per token come out. :func:`summarise` turns those of all windows into
figures with intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvfold.errors import ShapeError
from kvfold.eval.bootstrap import Floats, Interval, interval, of_mean

FIRST_POSITION = 64
"""Positions before this one are not scored: with so little context a prefix has hardly been compressed, and what the
model says is as good as random."""
MAX_BINS = 16
METRICS = ("kl_mean", "kl_median", "kl_p999", "top1", "perplexity", "perplexity_change")
"""What :func:`summarise` returns: KL in nats per token, top1 and the relative perplexity_change as fractions."""
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits of a block: on a CPU 1 MiB of float32, which stays in a core's cache; on a GPU 64 MiB, for few launches."""


# --- one window -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the uncompressed model says in one window.

    Attributes:
        log_probs: ``[n, vocabulary]``, float32 (float64 if the logits were).
        top: ``[n]``, its most likely token.
        targets: ``[n]``, the token that follows in the text.
        nll: ``[n]`` float64 on the host: minus the log-probability of the targets, nats.
    """

    log_probs: torch.Tensor
    top: torch.Tensor
    targets: torch.Tensor
    nll: Floats


@dataclass(frozen=True)
class Tokens:
    """One window under a compressed cache, against its :class:`Reference`; float64 ``[n]`` on the host.

    Attributes:
        kl: KL(reference || compressed), nats.
        same_top: 1 where both have the same most likely token, else 0.
        nll: Minus the log-probability of the text's next token, nats.
    """

    kl: Floats
    same_top: Floats
    nll: Floats


def reference(logits: torch.Tensor, targets: torch.Tensor) -> Reference:
    """Normalise a window's logits, in their own memory where they are float32 or float64.

    Args:
        logits: ``[n, vocabulary]`` of the uncompressed model. Overwritten.
        targets: int64 ``[n]``, the next tokens.

    Raises:
        ShapeError: The shapes do not belong together.
    """
    _check(logits, targets)
    out = logits if logits.dtype in (torch.float32, torch.float64) else torch.empty_like(logits, dtype=torch.float32)
    for block in _blocks(logits):
        out[block] = torch.log_softmax(logits[block].to(out.dtype), dim=-1)
    return Reference(out, _top(out), targets, _nll(out, targets))


def compare(reference: Reference, logits: torch.Tensor) -> Tokens:
    """Compare a window's logits ``[n, vocabulary]`` with the reference.

    The divergence is summed as ``p (d + e^-d - 1)`` with ``d = log p - log q``, which is the sum of ``p d`` for
    distributions that sum to one. No term is negative and errors of first order in d cancel, so that divergences far
    below the precision of float32 logits come out right.

    Raises:
        ShapeError: The logits do not fit the reference.
    """
    if logits.shape != reference.log_probs.shape:
        raise ShapeError(f"logits are {list(logits.shape)}, and the reference is {list(reference.log_probs.shape)}")
    kl, same, nll = [], [], []
    for block in _blocks(logits):
        log_p = reference.log_probs[block]
        log_q = torch.log_softmax(logits[block].to(log_p.dtype), dim=-1)
        kl.append(_divergence(log_p, log_q))
        same.append(log_q.argmax(dim=-1) == reference.top[block])
        nll.append(_at(log_q, reference.targets[block]).neg())
    return Tokens(_host(torch.cat(kl)), _host(torch.cat(same)), _host(torch.cat(nll)))


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    # where p is 0, by underflow or by a logit of minus infinity, only q counts
    d = torch.where(p > 0, log_p - log_q, -2.0)
    near = d + torch.expm1(-d)
    if bool((d < -1).any()):  # rare: there e^-d may overflow, and p e^-d is q
        far = torch.where(p > 0, p * d, 0.0) - p + log_q.exp()
        terms = torch.where(d < -1, far, p * near)
    else:
        terms = p * near
    return terms.sum(dim=-1).clamp_min(0.0)


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ShapeError(
            f"logits are [n, vocabulary] and targets [n] with n from 1, not {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )


def _blocks(logits: torch.Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS[logits.device.type] // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _top(log_probs: torch.Tensor) -> torch.Tensor:
    return torch.cat([log_probs[block].argmax(dim=-1) for block in _blocks(log_probs)])


def _at(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(1, targets[:, None])[:, 0]


def _nll(log_probs: torch.Tensor, targets: torch.Tensor) -> Floats:
    return _host(_at(log_probs, targets).neg())


def _host(values: torch.Tensor) -> Floats:
    array: Floats = values.double().cpu().numpy()
    return array


# --- all windows ------------------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """Mean KL of the positions ``first`` to ``last``, both included."""

    first: int
    last: int
    kl: Interval


def summarise(
    tokens: Sequence[Tokens], reference_nll: Sequence[Floats], draws: NDArray[np.int64]
) -> dict[str, Interval]:
    """The :data:`METRICS` of a format over all windows, with 95 % percentile intervals over resampled windows.

    Args:
        tokens: What :func:`compare` gave, a window each, all of equal length.
        reference_nll: The references' ``nll``, in the same order.
        draws: From :func:`kvfold.eval.bootstrap.draw`.
    """
    kl = np.stack([window.kl for window in tokens])
    nll, nll_reference = _means([window.nll for window in tokens]), _means(reference_nll)
    return {
        "kl_mean": of_mean(draws, kl.mean(axis=1)),
        "kl_median": _quantile(draws, kl, 0.5),
        "kl_p999": _quantile(draws, kl, 0.999),
        "top1": of_mean(draws, _means([window.same_top for window in tokens])),
        "perplexity": of_mean(draws, nll, np.exp),
        "perplexity_change": of_mean(draws, nll - nll_reference, np.expm1),
    }


def perplexity(nll: Sequence[Floats], draws: NDArray[np.int64]) -> Interval:
    """Perplexity over windows of equal length, from the nats ``[n]`` of each."""
    return of_mean(draws, _means(nll), np.exp)


def by_position(tokens: Sequence[Tokens], draws: NDArray[np.int64], first: int = FIRST_POSITION) -> list[Bin]:
    """Mean KL in at most 16 bins of positions, whose width is a power of two; ``first`` is the first one scored."""
    kl = np.stack([window.kl for window in tokens])
    end = first + kl.shape[1]
    width = 16
    while -(-end // width) - first // width > MAX_BINS:
        width *= 2
    edges = [first, *range((first // width + 1) * width, end, width), end]
    return [
        Bin(low, high - 1, of_mean(draws, kl[:, low - first : high - first].mean(axis=1)))
        for low, high in pairwise(edges)
    ]


def _means(arrays: Sequence[Floats]) -> Floats:
    means: Floats = np.stack(arrays).mean(axis=1)
    return means


def _quantile(draws: NDArray[np.int64], values: Floats, q: float) -> Interval:
    """A quantile over all tokens ``[windows, n]``, interpolated as numpy does. Sorted once: a resample only counts."""
    windows, n = values.shape
    order = np.argsort(values, axis=None, kind="stable")
    ordered, window = values.reshape(-1)[order], order // n
    place = q * (windows * n - 1)
    below, share = int(place), place - int(place)
    found = np.empty(len(draws))
    for index, counts in enumerate(draws):
        ends = np.cumsum(counts[window])
        low, high = ordered[np.searchsorted(ends, [below, min(below + 1, windows * n - 1)], side="right")]
        found[index] = low + share * (high - low)
    return interval(float(np.quantile(values, q)), found, windows)
