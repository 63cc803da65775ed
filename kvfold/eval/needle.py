"""A fact hidden in a long text, and whether a model still finds it: needles, haystacks, prompts, scores.

The fact is a number that nobody can guess, the question stands at the end, and the beginning of the answer is given, so
that even a small model answers with the number. The answer is teacher-forced: all its tokens are the most likely ones
exactly if greedy decoding would write it, and its log-probability tells formats apart where all find it or none does.

Knows nothing of caches or of transformers: a model's tokenizer comes as the functions of :class:`Encoding`, its logits
as a tensor.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvfold.errors import KVFoldError, ShapeError
from kvfold.eval.bootstrap import Floats, Interval, of_mean

DIGITS = 7
"""Digits of the number: one guess in ten million is right."""
GUESS = -math.log(10)
"""Log-probability of a digit to somebody who knows nothing, in nats."""
PLACES = ("Bergen", "Cairo", "Dakar", "Geneva", "Havana", "Lisbon", "Nairobi", "Oslo", "Quito", "Riga", "Tunis")
MIN_WORDS = 32
"""Words of the shortest haystack."""
_NEAR = 0.04
"""The needle goes to the end of a sentence if one is that share of the words away at most, else between two words."""
_CLOSING = "\"'”’»)]"


@dataclass(frozen=True)
class Needle:
    """One fact: a place, and the number that belongs to it."""

    place: str
    secret: str

    @property
    def sentence(self) -> str:
        """What is hidden."""
        return f"The secret pass number of {self.place} is {self.secret}."

    @property
    def question(self) -> str:
        """What is asked at the end."""
        return f"What is the secret pass number of {self.place}? It is written in the text above."

    @property
    def lead(self) -> str:
        """How the answer begins; a space and the number follow."""
        return f"The secret pass number of {self.place} is"


def draw_needle(*seed: object) -> Needle:
    """The needle that belongs to a seed, the same on every machine."""
    source = random.Random("/".join(map(str, seed)))
    return Needle(source.choice(PLACES), "".join(source.choice("0123456789") for _ in range(DIGITS)))


# --- the prompt -------------------------------------------------------------------------------------------------------


def split_words(text: str) -> list[str]:
    """The words of a text, each with the space after it."""
    return re.findall(r"\S+\s*", text)


def hide(words: Sequence[str], depth: float, sentence: str) -> str:
    """A text with a sentence in it.

    Args:
        words: From :func:`split_words`.
        depth: Share of the words that come before the sentence, from 0 to 1. It goes to the end of a sentence of the
            text that is near, so that it does not stand out.
    """
    target, reach = round(depth * len(words)), int(_NEAR * len(words))
    near = range(max(1, target - reach), min(len(words) - 1, target + reach) + 1)
    ends = [place for place in near if words[place - 1].rstrip().rstrip(_CLOSING).endswith((".", "!", "?"))]
    place = min(ends, key=lambda end: abs(end - target)) if ends and 0 < target < len(words) else target
    before, after = "".join(words[:place]), "".join(words[place:])
    space = " " if before and not before[-1].isspace() else ""
    return f"{before}{space}{sentence} {after}".strip()


class Encoding(NamedTuple):
    """How a model reads.

    Attributes:
        render: Makes the user's message a prompt that ends where the answer begins.
        encode: Tokens of a prompt, with all that the model expects around it.
    """

    render: Callable[[str], str]
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """A haystack with its needle and question, as tokens.

    Attributes:
        needle: What is hidden.
        ids: The prompt, and the answer after it.
        answer: How many of the last tokens are the answer.
        at: How many tokens come before the needle.
    """

    needle: Needle
    ids: list[int]
    answer: int
    at: int


def make_prompt(encoding: Encoding, words: Sequence[str], depth: float, needle: Needle, length: int) -> Prompt:
    """The longest haystack that fits: prompt and answer have ``length`` tokens at most.

    Args:
        words: The text; its beginning becomes the haystack.
        depth: From 0 to 1, see :func:`hide`.
        length: Tokens of everything.

    Raises:
        KVFoldError: The length leaves no room for a haystack, or the chat template changes the text.
    """

    def lead(count: int) -> str:
        message = f"{hide(words[:count], depth, needle.sentence)}\n\n{needle.question}"
        return encoding.render(message) + needle.lead

    def whole(count: int) -> list[int]:
        return encoding.encode(f"{lead(count)} {needle.secret}")

    # a word takes a token or more, so there are never more words than tokens
    count = bisect_right(range(min(length, len(words)) + 1), length, key=lambda count: len(whole(count))) - 1
    if count < MIN_WORDS:
        needed = len(whole(min(MIN_WORDS, len(words))))
        raise KVFoldError(
            f"a length of {length} tokens leaves no room for a haystack: question, answer and {MIN_WORDS} words take "
            f"{needed}; give that or more"
        )
    before, found, _ = lead(count).partition(needle.sentence)
    if not found:
        raise KVFoldError("the model's chat template changes the text that it is given: add --no-chat-template")
    ids = whole(count)
    answer = len(ids) - _common(ids, encoding.encode(lead(count)))
    # tokenizers that have a token for a space of its own put it first: it tells nothing
    spaces = _common(ids, encoding.encode(f"{lead(count)} ")) - (len(ids) - answer)
    return Prompt(needle, ids, answer - max(0, spaces), len(encoding.encode(before)))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists share before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


# --- the score --------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How one needle was answered.

    Attributes:
        found: Whether greedy decoding writes the number.
        log_prob: Log-probability of the number over its digits, in nats: :data:`GUESS` is the level of chance,
            whatever tokens the tokenizer makes of digits.
    """

    found: bool
    log_prob: float


def score(logits: torch.Tensor, answer: torch.Tensor) -> Score:
    """Score an answer, each token given those before it.

    Args:
        logits: ``[n, vocabulary]``: what is said before each token of the answer.
        answer: int64 ``[n]``, n from 1.

    Raises:
        ShapeError: The shapes do not belong together.
    """
    if logits.dim() != 2 or answer.shape != logits.shape[:1] or not len(answer):
        raise ShapeError(
            f"logits are [n, vocabulary] and the answer [n] with n from 1, not {list(logits.shape)} and "
            f"{list(answer.shape)}"
        )
    log_probs = torch.log_softmax(logits.double(), dim=-1).gather(1, answer[:, None])
    return Score(bool((logits.argmax(dim=-1) == answer).all()), float(log_probs.sum()) / DIGITS)


FIGURES = ("recall", "recall_change", "log_prob", "log_prob_change")
"""What :func:`summarise` returns: recall as a fraction of the needles, log_prob in nats per digit, and both less those
of the uncompressed model."""


def summarise(scores: Sequence[Score], base: Sequence[Score], draws: NDArray[np.int64]) -> dict[str, Interval]:
    """The :data:`FIGURES` over all needles, with 95 % intervals over resampled needles.

    Args:
        scores: Of a format, a needle each.
        base: Of the uncompressed model, in the same order: differences are taken needle by needle.
        draws: From :func:`kvfold.eval.bootstrap.draw`.
    """
    found, log_prob = _columns(scores)
    base_found, base_log_prob = _columns(base)
    return {
        "recall": of_mean(draws, found),
        "recall_change": of_mean(draws, found - base_found),
        "log_prob": of_mean(draws, log_prob),
        "log_prob_change": of_mean(draws, log_prob - base_log_prob),
    }


def _columns(scores: Sequence[Score]) -> tuple[Floats, Floats]:
    found, log_prob = np.array(scores, dtype=np.float64).T
    return found, log_prob
