"""Whether a model still finds a fact in a long text on a compressed cache: depth by length, the model itself beside it.

A sentence with a random number is hidden in the text and asked for at the end. Found means that greedy decoding writes
the number; its log-probability tells more where all find it or none does. Every query reads page bytes, its own token's
included. What the uncompressed model does not find is not the cache's fault: differences are taken needle by needle,
with 95 % bootstrap intervals over the needles.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.commands import UsageError
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
from kvfold.commands.measure import ORDINARY, Subject, load_subject, quiet_transformers, say
from kvfold.commands.needle_report import Column, Result, Task, draw_plot, text_of
from kvfold.commands.plan import whole
from kvfold.errors import CapacityError, KVFoldError
from kvfold.formats import PAGE_SIZES
from kvfold.layerformats import ModelFormat
from kvfold.models import MODELS_HELP, SMOLLM2

if TYPE_CHECKING:
    from kvfold.eval.needle import Encoding, Prompt, Score

EPILOG = """\
JSON (--json FILE): command, date, environment, settings, needles [{length, depth, trial, secret, tokens, at}], rows
[{format, bits_per_element, cache, recall, recall_change, log_prob, log_prob_change, lost, gained, cells [{length,
depth, found, lost, log_prob}], found, log_probs}]. The first row is the uncompressed model, format none, whose changes
are null. A figure is {value, low, high}, low and high null with a single needle; recall is a fraction of the needles,
log_prob in nats per digit. lost: needles that the uncompressed model finds and the format does not, gained the other
way round. at: tokens before the needle. found and log_probs are those of each needle, in the order of needles; depths
are percentages.

example: kvfold needle --text wiki.test.raw --length 1024 2048 4096 --format k4v4 k3v3 --plot needle.png
"""

FORMATS = ("fp8", "k8v8", "k4v4", "k3v3", "k2v2")
LENGTHS = (256, 512, 1024)
DEPTHS = (0, 25, 50, 75, 100)
PIECE = 4096
"""Tokens that go through the model at once, for the memory of activations. With packed chunks of formats that code each
vector alone the answer does not depend on it."""
PROBE = 80
"""Tokens of the pass that shows, before minutes of measuring, whether a format runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", nargs="+", action="extend", metavar="F", help=f"one format or several ({' '.join(FORMATS)})"
    )
    parser.add_argument("--model", default=SMOLLM2, help=MODELS_HELP)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 haystack (the beginning of Moby Dick, 6.8 kB)")
    parser.add_argument(
        "--length",
        nargs="+",
        action="extend",
        type=whole,
        metavar="N",
        help=f"tokens of prompt and answer ({' '.join(map(str, LENGTHS))})",
    )
    parser.add_argument(
        "--depth",
        nargs="+",
        action="extend",
        type=percentage,
        metavar="P",
        help=f"percentage of the text before the needle ({' '.join(map(str, DEPTHS))})",
    )
    parser.add_argument(
        "--trials", type=whole, default=4, metavar="N", help="needles of each length and depth (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other needles (%(default)s)")
    parser.add_argument("--no-chat-template", action="store_true", help="give the model the prompt as it is")
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if torch has it), cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw depth against length (PNG, SVG or PDF)")


def percentage(text: str) -> float:
    """A number from 0 to 100, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage from 0 to 100")
    return value


def run(args: argparse.Namespace) -> int:
    formats = list(dict.fromkeys(ModelFormat.parse(spec).require_built() for spec in args.format or FORMATS))
    check_outputs(args.json, args.plot)
    path, text = read_text(args.text)
    device = pick_device(args.device)
    import torch

    with quiet_transformers():
        subject = load_subject(args.model)
        subject.model.to(device)
        tasks = make_tasks(args, subject, path, text)
        columns = [Column(ORDINARY), *(_probe(subject, fmt, tasks[0].prompt, args.page_size) for fmt in formats)]
        head = {
            "command": shlex.join(["kvfold", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment_of(device),
            "settings": _settings(args, subject, formats, path, text),
        }
        result = None
        try:
            _measure(args, subject, tasks, columns)
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
            raise CapacityError(f"{reason}; give a smaller --length, or --device cpu") from None
        finally:  # what was measured before an interruption is kept
            complete = min(len(column.scores) for column in columns)
            if complete:
                result = Result.of(tasks[:complete], columns)
            if args.json is not None and result is not None:
                args.json.write_text(json.dumps({**head, **result.json()}, indent=1) + "\n", encoding="utf-8")
    assert result is not None
    title = f"{args.model}: {result.title} in {path.name}"
    print(f"{title}\n\n{text_of(result)}")
    sys.stdout.flush()
    if args.plot is not None:
        draw_plot(result, args.plot, title)
    return 0


# --- what to look for -------------------------------------------------------------------------------------------------


def make_tasks(args: argparse.Namespace, subject: Subject, path: Path, text: str) -> list[Task]:
    """All needles, trial by trial, so that what is measured first covers all cells.

    A trial's haystacks begin at the same place of the text, trials at places evenly apart; after the end of the text
    comes its beginning.

    Raises:
        UsageError: The text is too short, or a prompt is longer than the model's context.
        KVFoldError: A length leaves no room for a haystack.
    """
    from kvfold.eval.needle import MIN_WORDS, draw_needle, make_prompt, split_words

    lengths, depths = sorted(set(args.length or LENGTHS)), sorted(set(map(float, args.depth or DEPTHS)))
    check_context(subject, lengths[-1], "prompts")
    available = len(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
    if available < lengths[-1]:
        raise UsageError(
            f"{path} has {available:,} tokens, and a prompt of {lengths[-1]:,} takes a longer one: give --text FILE, "
            "or a smaller --length"
        )
    encoding, words = encoding_of(subject, not args.no_chat_template), split_words(text)
    if len(words) < MIN_WORDS:
        raise UsageError(f"{path} has {len(words)} words, and a haystack takes {MIN_WORDS}: give --text FILE")
    tasks = []
    for trial in range(args.trials):
        begin = trial * len(words) // args.trials
        turned = words[begin:] + words[:begin]
        for length in lengths:
            for depth in depths:
                needle = draw_needle(args.seed, trial, length, depth)
                tasks.append(Task(length, depth, trial, make_prompt(encoding, turned, depth / 100, needle, length)))
    return tasks


def encoding_of(subject: Subject, chat: bool) -> Encoding:
    """How the model reads a user's message: in its chat template if ``chat`` and if it has one."""
    from kvfold.eval.needle import Encoding

    tokenizer = subject.tokenizer
    if not (chat and tokenizer.chat_template):
        first = first_tokens(subject)
        return Encoding(
            lambda message: f"{message}\n\n",
            lambda prompt: first + tokenizer(prompt, add_special_tokens=False)["input_ids"],
        )

    def render(message: str) -> str:
        messages = [{"role": "user", "content": message}]
        rendered: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return rendered

    return Encoding(render, lambda prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"])


# --- measuring --------------------------------------------------------------------------------------------------------


def _probe(subject: Subject, fmt: ModelFormat, prompt: Prompt, page_size: int) -> Column:
    """Run a format on a few tokens, so that what cannot run is refused now."""
    import torch

    say(f"trying {fmt}")
    cache = subject.new_cache(fmt, page_size, "packed")
    ids = torch.tensor([prompt.ids[:PROBE]], device=subject.model.device)
    with torch.inference_mode():
        for piece in (ids[:, :-1], ids[:, -1:]):
            forward(subject, piece, cache, keep=1)
    return Column(str(fmt), fmt, bits_per_element(cache), repr(cache))


def _measure(args: argparse.Namespace, subject: Subject, tasks: Sequence[Task], columns: Sequence[Column]) -> None:
    import torch

    with torch.inference_mode(), progress(len(tasks) * len(columns)) as step:
        for task in tasks:
            title = f"trial {task.trial + 1} of {args.trials}, {task.length:,} tokens, depth {task.depth:g} %"
            for column in columns:
                step(f"{title}: {column.name}")
                cache = subject.new_cache(column.format, args.page_size, "packed")
                column.scores.append(answer(subject, task.prompt, cache, f"{column.name}: {title}"))


def answer(subject: Subject, prompt: Prompt, cache: Any, title: str) -> Score:
    """How a model with a fresh cache answers.

    Raises:
        KVFoldError: The logits are not finite; ``title`` says where.
    """
    import torch

    from kvfold.eval.needle import score

    ids = torch.tensor([prompt.ids], device=subject.model.device)
    before, last = ids[:, : -prompt.answer - 1], ids[:, -prompt.answer - 1 : -1]
    for piece in before.split(PIECE, dim=1):
        forward(subject, piece, cache, keep=1)
    given = score(forward(subject, last, cache), ids[0, -prompt.answer :])
    if not math.isfinite(given.log_prob):
        raise KVFoldError(
            f"{title}: gave values that are not finite, as an overflow does: leave it out, or load the model in a "
            "wider dtype"
        )
    return given


def _settings(
    args: argparse.Namespace, subject: Subject, formats: Sequence[ModelFormat], path: Path, text: str
) -> dict[str, object]:
    from kvfold.eval.bootstrap import CONFIDENCE, RESAMPLES, SEED
    from kvfold.eval.needle import DIGITS, GUESS

    return {
        "model": args.model,
        "dtype": subject.dtype,
        "device": str(subject.model.device),
        "text": {"file": str(path), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "lengths": sorted(set(args.length or LENGTHS)),
        "depths": sorted(set(map(float, args.depth or DEPTHS))),
        "trials": args.trials,
        "seed": args.seed,
        "digits": DIGITS,
        "log_prob_of_a_guess": GUESS,
        "chat_template": bool(subject.tokenizer.chat_template) and not args.no_chat_template,
        "formats": [str(fmt) for fmt in formats],
        "chunk": "packed",
        "page_size": args.page_size,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "bootstrap_seed": SEED,
    }
