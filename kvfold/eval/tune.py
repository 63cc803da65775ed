"""How many bits each layer's keys and values should get: an allocation of least loss under a budget.

Numbers in, choices out: an *item* is one thing that gets bits (the keys of a layer, say), its options are what it may
be stored as, each with a cost in bytes and a loss in nats, and losses of items add up. :func:`frontier` is exact: it
finds every allocation that no other one beats in cost and in loss. Nothing here knows of models, caches or formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvfold.errors import KVFoldError
from kvfold.eval.bootstrap import Floats

BLOCK = 64
"""Tokens of a piece of text, which bootstrap intervals draw: the divergences of neighbours depend on each other."""


class BudgetError(KVFoldError, ValueError):
    """No allocation is as cheap as the budget."""


class Option(NamedTuple):
    """What an item may be stored as: bytes, and nats per token that it adds. The loss may be negative: noise is."""

    cost: int
    loss: float


class Allocation(NamedTuple):
    """A choice for every item, and what all of them cost and lose together."""

    cost: int
    loss: float
    choices: tuple[int, ...]


class _State(NamedTuple):
    """The best way to spend ``cost`` on the first items: the last one's choice, and the state before it."""

    cost: int
    loss: float
    choice: int
    before: _State | None


def frontier(items: Sequence[Sequence[Option]], budget: int) -> list[Allocation]:
    """All allocations within the budget that no other one beats, from the cheapest to the best.

    Every next one costs more and loses less. Exact for losses that add up; of equals the first options win, so that the
    result is the same everywhere. The work grows with the number of different costs that sums of options can have.

    Args:
        items: For each item its options, one at least.
        budget: Bytes for all of them.

    Raises:
        BudgetError: Not even the cheapest options fit.
    """
    least = [min(option.cost for option in options) for options in items]
    if sum(least) > budget:
        raise BudgetError(f"the cheapest allocation costs {sum(least)} bytes, and the budget is {budget}: allow more")
    states, rest = [_State(0, 0.0, -1, None)], sum(least)
    for options, cheapest in zip(items, least, strict=True):
        rest -= cheapest
        reached = [
            _State(state.cost + option.cost, state.loss + option.loss, choice, state)
            for state in states
            for choice, option in enumerate(options)
            if state.cost + option.cost + rest <= budget
        ]
        reached.sort(key=lambda state: state[:2])  # a stable sort: of equals the first options stay first
        states = []
        for state in reached:
            if not states or state.loss < states[-1].loss:
                states.append(state)
    return [Allocation(state.cost, state.loss, _choices(state)) for state in states]


def _choices(state: _State) -> tuple[int, ...]:
    chosen = []
    while state.before is not None:
        chosen.append(state.choice)
        state = state.before
    return tuple(reversed(chosen))


def widest(sizes: Sequence[tuple[int, Sequence[float]]], budget: int) -> list[int]:
    """Of candidates the ones worth measuring: within the budget, and not clearly worse than another one that is.

    Args:
        sizes: For each candidate its bytes and the errors of its sides, K and V; less is better.
        budget: Bytes.

    Returns:
        Their places, in order. A candidate is left out if another one within the budget has no larger error on either
        side, and costs less or errs less.
    """
    within = [place for place, (cost, _) in enumerate(sizes) if cost <= budget]

    def beaten(place: int) -> bool:
        cost, errors = sizes[place]
        for other in within:
            other_cost, other_errors = sizes[other]
            no_worse = all(a <= b for a, b in zip(other_errors, errors, strict=True))
            if no_worse and (list(other_errors) != list(errors) or (other_cost, other) < (cost, place)):
                return True
        return False

    return [place for place in within if not beaten(place)]


def unbeaten(sizes: Sequence[tuple[int, float]]) -> list[int]:
    """Of what one item may be stored as the places that an allocation can use, from the cheapest to the best.

    Args:
        sizes: For each its bytes and its expected error; less is better.

    Returns:
        Every next one costs more and errs less. The others cost and err no less than one of these.
    """
    kept: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: sizes[place]):  # a stable sort: of equals the first stays
        if not kept or sizes[place][1] < sizes[kept[-1]][1]:
            kept.append(place)
    return kept


def pieces(values: Sequence[Floats], block: int = BLOCK) -> Floats:
    """Means over pieces of text, for bootstrap intervals: ``[pieces]`` from values ``[n]`` of each window.

    A window is cut into pieces that are as good as equal, of ``block`` tokens or some more; a shorter window is one.
    """
    parts = [part for window in values for part in np.array_split(window, max(1, len(window) // block))]
    return np.array([part.mean() for part in parts], dtype=np.float64)
