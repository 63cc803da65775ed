"""How many tokens and requests fit into a memory, format by format, beside bf16 and fp8.

The model is a Hugging Face config (--model) or a shape given by hand (--layers, --kv-heads, --head-size). The memory
is what weights and activations leave for the KV cache. Layers that are not compressed (sliding windows) are counted.
"""

from __future__ import annotations

import argparse
import json

from kvfold.commands import UsageError, table
from kvfold.errors import FormatError
from kvfold.formats import PAGE_SIZES, check_head_size
from kvfold.layerformats import spell_layers
from kvfold.modelshape import LayerGroup
from kvfold.planner import ModelShape, PlanError, PlanRow, parse_memory, plan

EPILOG = """\
JSON (--json): model, max_positions, itemsize, memory_bytes, context, page_size, notes [text], layers [{kind, layers,
num_kv_heads, head_size, head_size_v, window, at}], rows [{format, bytes_per_token, bits_per_element, tokens, requests,
ratio, compressed_layers, uncompressed_layers, uncompressed [text]}]. at: which layers of the model, from 0. tokens is
null where the cache stops growing before memory is full.

example: kvfold plan --model ./Qwen3-8B --memory 40GiB --context 32768 --format k4v4 k8v4+sinks4
"""


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model; :func:`read_shape` reads them."""
    parser.add_argument("--model", metavar="PATH", help="a config.json, or a directory with one")
    parser.add_argument("--layers", type=whole, metavar="N", help="layers, if there is no --model")
    parser.add_argument("--kv-heads", type=whole, metavar="N", help="KV heads of a layer")
    parser.add_argument("--head-size", type=head_size, metavar="D", help="coordinates of a key")
    parser.add_argument("--head-size-v", type=head_size, metavar="D", help="coordinates of a value, if they differ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    parser.add_argument("--memory", type=memory, required=True, metavar="SIZE", help="80GB, 40GiB, 512MiB or bytes")
    parser.add_argument("--context", type=whole, default=32768, metavar="N", help="tokens of a request (%(default)s)")
    parser.add_argument("--format", nargs="+", action="extend", metavar="F", help="formats beside bf16 and fp8")
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens in a page (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def whole(text: str) -> int:
    """A positive whole number, for argparse."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def head_size(text: str) -> int:
    """A head size that exists, for argparse."""
    try:
        return check_head_size(whole(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory(text: str) -> int:
    """A size of memory in bytes, for argparse."""
    try:
        return parse_memory(text)
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    shape = read_shape(args)
    rows = plan(shape, args.memory, args.context, args.format, args.page_size)
    notes = list(shape.notes)
    if shape.max_positions is not None and args.context > shape.max_positions:
        notes.append(f"the context of {args.context} tokens is longer than the model's {shape.max_positions}")
    print(_json(args, shape, rows, notes) if args.json else _text(args, shape, rows, notes))
    return 0


def read_shape(args: argparse.Namespace) -> ModelShape:
    """The model that the options of :func:`add_shape_arguments` name.

    Raises:
        UsageError: No model, half a shape, or both.
        PlanError, UnsupportedModelError, OSError: As :meth:`ModelShape.from_config`.
    """
    by_hand = {"--layers": args.layers, "--kv-heads": args.kv_heads, "--head-size": args.head_size}
    given = [name for name, value in {**by_hand, "--head-size-v": args.head_size_v}.items() if value is not None]
    if args.model is not None:
        if given:
            raise UsageError(f"--model and {given[0]} exclude each other: the config has the shape")
        return ModelShape.from_config(args.model)
    if not given:
        raise UsageError(f"no model: give --model, or {', '.join(by_hand)}")
    missing = [name for name, value in by_hand.items() if value is None]
    if missing:
        raise UsageError(f"a shape by hand also needs {', '.join(missing)}")
    return ModelShape.uniform(args.layers, args.kv_heads, args.head_size, args.head_size_v)


def layers_json(shape: ModelShape) -> list[dict[str, object]]:
    """The groups of layers for JSON; ``at`` says which layers of the model they are, from 0: ``0-4,6-10``."""
    at: dict[LayerGroup, list[int]] = {}
    for index, group in enumerate(shape.layers):
        at.setdefault(group, []).append(index)
    return [{**vars(group), "at": spell_layers(at[group])} for group in shape.groups]


def _text(args: argparse.Namespace, shape: ModelShape, rows: list[PlanRow], notes: list[str]) -> str:
    header = ["format", "bytes/token", "bits/element", "tokens", "x bf16", f"requests of {args.context:,}"]
    cells = [
        [
            str(row.format),
            f"{row.bytes_per_token:,}",
            "-" if row.bits_per_element is None else f"{row.bits_per_element:.3f}",
            "no limit" if row.tokens is None else f"{row.tokens:,}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.requests:,}",
        ]
        for row in rows
    ]
    lines = [
        f"{shape.name or 'model'}: {', '.join(str(group) for group in shape.groups)}",
        f"{args.memory:,} bytes for the KV cache, pages of {args.page_size} tokens",
        "",
        table(header, cells),
        "",
    ]
    if rows[0].uncompressed:
        what = "; ".join(rows[0].uncompressed)
        lines.append(f"Not compressed, and counted: {rows[0].uncompressed_layers} layers: {what}.")
    lines += [f"Note: {note}." for note in notes]
    return "\n".join(lines).rstrip()


def _json(args: argparse.Namespace, shape: ModelShape, rows: list[PlanRow], notes: list[str]) -> str:
    result = {
        "model": shape.name,
        "max_positions": shape.max_positions,
        "itemsize": shape.itemsize,
        "memory_bytes": args.memory,
        "context": args.context,
        "page_size": args.page_size,
        "notes": notes,
        "layers": layers_json(shape),
        "rows": [{**vars(row), "format": str(row.format)} for row in rows],
    }
    return json.dumps(result, indent=2)
