"""What `generate` and `compare` share: options, loading, one timed generation, and the bytes of the cache it leaves."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kvfold.commands import UsageError
from kvfold.commands.plan import whole
from kvfold.formats import PAGE_SIZES
from kvfold.layerformats import ModelFormat
from kvfold.models import MODELS_HELP, SMOLLM2, load

ORDINARY = "none"
"""The name of the cache that compresses nothing: transformers' DynamicCache under its own attention."""


def say(text: str) -> None:
    """A line of progress. Results go to stdout, so that they can be piped; this goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_model_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options that both commands have."""
    parser.add_argument("--model", default=SMOLLM2, help=MODELS_HELP)
    parser.add_argument("--no-chat-template", action="store_true", help="give the model the prompt as it is")
    parser.add_argument(
        "--max-new-tokens", type=whole, default=max_new_tokens, metavar="N", help="tokens at most (%(default)s)"
    )
    parser.add_argument(
        "--chunk", choices=("exact", "packed"), default="exact", help="what a prompt's tokens see of each other (exact)"
    )
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_prompt(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: It is not UTF-8 text.
        OSError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


# --- the model --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, object]:
    """What figures depend on: versions, processor, threads, and the commit if this is a checkout of kvfold."""
    import os
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str | None] = {}
    for name in ("torch", "transformers", "numba"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "commit": commit,
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def encode(self, prompt: str, chat: bool) -> Mapping[str, Any]:
        """A prompt as the model's inputs, wrapped in its chat template if ``chat`` and if it has one.

        Raises:
            UsageError: The prompt is empty.
        """
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        if chat and self.tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = self.tokenizer.apply_chat_template(message, **options)
        else:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if not inputs["input_ids"].shape[1]:
            raise UsageError("the prompt has no tokens")
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def new_cache(self, fmt: ModelFormat | None, page_size: int, chunk: str) -> Any:
        """A compressed cache, or for None the ordinary one, with which the model runs transformers' own attention."""
        from transformers import DynamicCache

        from kvfold.integrations.transformers import KVCache, detach

        if fmt is not None:
            return KVCache.for_model(self.model, fmt, page_size=page_size, chunk=chunk)
        detach(self.model)
        return DynamicCache(config=self.model.config)


def load_subject(name: str) -> Subject:
    """Load a model, with progress on stderr.

    Raises:
        KVFoldError: It cannot be loaded, or transformers is not installed.
    """
    return Subject(*load(name, say))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the screen: they are for developers, not for a reader."""
    try:
        from transformers.utils import logging
    except ImportError:  # loading will say what is missing
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- one generation ---------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A streamer for ``generate`` that notes when tokens come. What it takes to show a token is not counted.

    Attributes:
        show: A streamer that shows the text, or None.
        tick: Told the number of tokens so far, after each.
        seconds: The prefill, then every step of decoding.
    """

    show: Any = None
    tick: Callable[[int], None] = lambda count: None
    seconds: list[float] = field(default_factory=list)
    _since: float | None = None

    def put(self, tokens: Any) -> None:
        """Take the prompt, in the first call, or the next token."""
        if self._since is not None:
            self.seconds.append(time.perf_counter() - self._since)
        if self.show is not None:
            self.show.put(tokens)
        if self.seconds:
            self.tick(len(self.seconds))
        self._since = time.perf_counter()

    def end(self) -> None:
        if self.show is not None:
            self.show.end()

    @property
    def tokens_per_second(self) -> float | None:
        """From the median step of decoding, without the first; None if there was no other."""
        steps = self.seconds[2:]
        return 1 / median(steps) if steps else None


@dataclass(frozen=True)
class Answer:
    """What one generation gave, and what it took.

    Attributes:
        tokens: The new tokens.
        bytes_per_token: Bytes that a stored token takes in the buffers, over all layers; room not used yet is left out.
        bytes: Bytes of the live buffers, with the room that is not used yet.
        compressed_bytes: Those of the compressed layers; 0 in the ordinary cache.
        capacity: Tokens that fit into the buffers.
        cache: The cache, in words.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    tokens_per_second: float | None
    bytes_per_token: float
    bytes: int
    compressed_bytes: int
    capacity: int
    cache: str


def cache_argument(model: Any) -> str:
    """What a model calls the cache that it is given: transformers 5.24 renames ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def answer(
    subject: Subject, inputs: Mapping[str, Any], cache: Any, clock: Clock, max_new_tokens: int, temperature: float = 0.0
) -> Answer:
    """Generate after a prompt with a fresh cache, greedily at temperature 0."""
    tokenizer = subject.tokenizer
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if tokenizer.pad_token_id is None:  # one sequence needs no padding, but generate warns without a token for it
        sampling["pad_token_id"] = tokenizer.eos_token_id
    given = {cache_argument(subject.model): cache}
    output = subject.model.generate(**inputs, **given, max_new_tokens=max_new_tokens, streamer=clock, **sampling)
    prompt_tokens = inputs["input_ids"].shape[1]
    tokens = output[0, prompt_tokens:].tolist()
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        prefill_seconds=clock.seconds[0],
        tokens_per_second=clock.tokens_per_second,
        **_bytes(cache),
    )


def _bytes(cache: Any) -> dict[str, Any]:
    """The byte counts of an :class:`Answer`, read off the cache's tensors."""
    from kvfold.integrations.transformers import KVCache

    if isinstance(cache, KVCache):
        memory = cache.memory()
        return {
            "bytes_per_token": memory.compressed / memory.capacity + memory.uncompressed / memory.tokens,
            "bytes": memory.total,
            "compressed_bytes": memory.compressed,
            "capacity": memory.capacity,
            "cache": repr(cache),
        }
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    total = sum(tensor.nbytes for pair in pairs for tensor in pair if tensor is not None)
    tokens = cache.get_seq_length()
    name = type(cache).__name__
    return {"bytes_per_token": total / tokens, "bytes": total, "compressed_bytes": 0, "capacity": tokens, "cache": name}
