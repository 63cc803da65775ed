"""Let a model answer a prompt on a compressed cache: the text to stdout as it comes, the figures to stderr.

The prompt is --prompt, --prompt-file or stdin. --format none runs transformers' own DynamicCache, for comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvfold.commands import UsageError
from kvfold.commands.measure import (
    ORDINARY,
    Answer,
    Clock,
    add_model_arguments,
    answer,
    load_subject,
    quiet_transformers,
    read_prompt,
    say,
)
from kvfold.layerformats import ModelFormat

EPILOG = """\
JSON (--json): model, dtype, format, chunk, page_size, cache, text, prompt_tokens, new_tokens, prefill_seconds,
tokens_per_second (from the median step of decoding without the first; null if there is no other), bytes_per_token,
bytes (of the live buffers), capacity (tokens that fit into them).

example: echo "Why is the sky blue?" | kvfold generate --format k4v4 --max-new-tokens 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (else --prompt-file, else stdin)")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with the prompt")
    parser.add_argument("--format", default="k4v4", metavar="F", help="what the cache stores, or none (%(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add_model_arguments(parser, max_new_tokens=128)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def run(args: argparse.Namespace) -> int:
    fmt = None if args.format == ORDINARY else ModelFormat.parse(args.format).require_built()
    prompt = _prompt(args)
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    with quiet_transformers():
        given = _generate(args, fmt, prompt)
    if args.json:
        print(json.dumps(given, indent=2))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file is not None:
        return read_prompt(args.prompt_file)
    if sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
    return sys.stdin.read()


def _generate(args: argparse.Namespace, fmt: ModelFormat | None, prompt: str) -> dict[str, Any]:
    subject = load_subject(args.model)
    import torch
    from transformers import TextStreamer

    inputs = subject.encode(prompt, chat=not args.no_chat_template)
    cache = subject.new_cache(fmt, args.page_size, args.chunk)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    say(f"prefill of {inputs['input_ids'].shape[1]:,} tokens, cache {args.format if fmt is None else fmt}")
    show = None if args.json else TextStreamer(subject.tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = answer(subject, inputs, cache, Clock(show), args.max_new_tokens, args.temperature)
    say(_figures(given))
    about = {
        "model": args.model,
        "dtype": subject.dtype,
        "format": ORDINARY if fmt is None else str(fmt),
        "chunk": args.chunk,
        "page_size": args.page_size,
        "new_tokens": len(given.tokens),
    }
    kept = {name: value for name, value in asdict(given).items() if name not in ("tokens", "compressed_bytes")}
    return {**about, **kept}


def _figures(given: Answer) -> str:
    speed = "" if given.tokens_per_second is None else f", {given.tokens_per_second:.1f} tokens/s"
    return (
        f"{len(given.tokens)} tokens, prefill of {given.prompt_tokens:,} in {given.prefill_seconds:.2f} s{speed}; "
        f"cache: {given.bytes_per_token:,.0f} bytes per token, {given.bytes:,} in all with room for {given.capacity:,}"
    )
