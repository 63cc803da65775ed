"""Serve Qwen3-8B's shapes in vLLM with several caches, in one run: tokens that fit, decode and prefill rates.

    python benchmarks/vllm_engine.py --dtypes auto fp8 turboquant --json vllm.json

Weights are dummies (speed does not depend on them), prompts random token ids, and each cache has a process of its own;
on a machine of several equal GPUs ``--gpus`` measures as many caches at a time. Needs a GPU and vLLM 0.33. A case is
batch x prompt tokens; ``full`` is as many requests of 32 000 tokens as the cache holds. Two prompts of
each case are served before it is timed, so that nothing compiles in it.

The decode rate counts the tokens after the moment at which every request has its first one; the prefill time is what
lies before, as a client would see it. Cases of short prompts are served five times, of which the medians count, as what
the host does weighs in them; others are of one run. What CUDA graphs take is what vLLM's log says.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

LONG = 32_000
CASES = ("8x10", "8x8192", "32x8192", "8x32000")
GRAPHS = re.compile(r"Graph capturing finished in \S+ secs, took ([\d.]+) GiB")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "hidden_act": "silu", "attention_bias": False, "bos_token_id": 151643,
    "eos_token_id": 151645, "use_cache": True,
}  # fmt: skip


def case(text: str) -> str:
    """A case as it stands on the command line."""
    batch, _, length = text.partition("x")
    if text != "full" and not (batch.isdigit() and length.isdigit() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither batch x prompt tokens, like 8x8192, nor 'full'")
    return text


def is_ours(dtype: str) -> bool:
    """Whether a cache dtype is kvfold's."""
    return dtype == "turboquant" or dtype.startswith("kvfold_")


def require(json_file: Path | None, dtypes: list[str]) -> None:
    """End the program, before minutes of measuring, if it cannot measure or write what it measured."""
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed: pip install 'kvfold[vllm]'")
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device, and this measures vLLM on one")
    plugins = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    if any(map(is_ours, dtypes)) and "kvfold" not in plugins:
        sys.exit("vLLM does not find kvfold's plugin, as kvfold is not installed: pip install -e '.[vllm]'")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        sys.exit(f"{json_file}: there is no folder {json_file.absolute().parent}")


class Timing(NamedTuple):
    """Of one case: seconds until every request has its first token, and of the rest; tokens in that rest."""

    prefill: float
    decode: float
    decoded: int


def serve(engine: Any, prompts: list[list[int]], new: int) -> Timing:
    """Serve prompts together, each to so many new tokens, on a ``vllm.LLMEngine``."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": prompt}, params)
    have: dict[str, int] = {}
    begun = time.perf_counter()
    all_have_one, before = begun, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            have[output.request_id] = len(output.outputs[0].token_ids)
        if not before and len(have) == len(prompts) and all(have.values()):
            all_have_one, before = time.perf_counter(), sum(have.values())
    ended = time.perf_counter()
    return Timing(all_have_one - begun, ended - all_have_one, sum(have.values()) - before)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One cache: what fits, and the cases."""
    from vllm import LLM

    from kvfold.commands.bench import environment_of_gpu

    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG | {"num_hidden_layers": args.layers}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            kv_cache_dtype=args.one, gpu_memory_utilization=args.utilization, max_model_len=40960,
            enable_prefix_caching=False, additional_config=json.loads(args.additional),
        )  # fmt: skip
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size
        result: dict[str, Any] = {"dtype": args.one, "tokens": tokens, "block_size": cache.block_size, "cases": []}
        draw = random.Random(0)
        for name in args.cases:
            batch, length = (tokens // (LONG + args.new), LONG) if name == "full" else map(int, name.split("x"))
            prompts = [[draw.randrange(100, 100_000) for _ in range(length)] for _ in range(batch)]
            serve(llm.llm_engine, prompts if length < 1000 else prompts[:2], 8)
            timings = [serve(llm.llm_engine, prompts, 1 + args.new) for _ in range(5 if length < 1000 else 1)]
            row = {
                "case": name, "batch": batch, "prompt": length,
                "prefill_seconds": median(timing.prefill for timing in timings),
                "decode_tokens_per_second": median(timing.decoded / timing.decode for timing in timings),
            }  # fmt: skip
            print(f"{args.one}: {json.dumps(row)}", file=sys.stderr, flush=True)
            result["cases"].append(row)
    return {"environment": environment_of_gpu(None)} | result  # last: it makes a CUDA context in this process


def run_one(dtype: str, args: argparse.Namespace, gpus: queue.SimpleQueue[str]) -> dict[str, Any] | None:
    """:func:`measure` in a process of its own on a GPU that is free; None, and the end of its log, if it failed."""
    additional = args.additional if is_ours(dtype) else "{}"
    command = [
        sys.executable, __file__, "--one", dtype, "--cases", *args.cases, "--new", str(args.new), "--layers",
        str(args.layers), "--utilization", str(args.utilization), "--additional", additional,
    ]  # fmt: skip
    gpu = gpus.get()
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    log: deque[str] = deque(maxlen=100)
    graphs = None
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        with subprocess.Popen(
            [*command, "--result", str(result)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                log.append(line)
                if line.startswith(f"{dtype}: {{"):
                    print(line, end="", file=sys.stderr, flush=True)
                if found := GRAPHS.search(line):
                    graphs = float(found[1])
        gpus.put(gpu)
        if process.returncode:
            print(f"{dtype} failed:\n{''.join(log)}", file=sys.stderr, flush=True)
            return None
        return {**json.loads(result.read_text()), "graphs_gib": graphs}


def compare(results: list[dict[str, Any]]) -> str:
    """A table of all caches, and how they compare with the first."""
    lines = []
    for result in results:
        times = result["tokens"] / results[0]["tokens"]
        lines.append(f"{result['dtype']}: {result['tokens']:,} tokens, {times:.2f}x; graphs {result['graphs_gib']} GiB")
        for row, base in zip(result["cases"], results[0]["cases"], strict=False):
            rate, prefill = row["decode_tokens_per_second"], row["prefill_seconds"]
            lines.append(
                f"  {row['case']:>8}  batch {row['batch']:>4}  decode {rate:8.1f} tok/s"
                f" {rate / base['decode_tokens_per_second']:5.2f}x   prefill {prefill:7.2f} s"
                f" {prefill / base['prefill_seconds']:5.2f}x"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["auto", "fp8", "turboquant"], help="the first is the baseline")
    parser.add_argument(
        "--cases", nargs="+", type=case, default=list(CASES), help="batch x tokens, or full (%(default)s)"
    )
    parser.add_argument("--new", type=int, default=128, help="tokens to decode after the first")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--utilization", type=float, default=0.5, help="gpu_memory_utilization")
    parser.add_argument("--gpus", type=int, default=1, help="equal GPUs, each for a cache at a time (%(default)s)")
    parser.add_argument("--additional", default="{}", help="--additional-config of kvfold's dtypes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.result.write_text(json.dumps(measure(args)))  # a file, as vLLM may log to stdout
        return
    require(args.json, args.dtypes)
    head: dict[str, Any] = {
        "command": shlex.join(sys.argv), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "layers": args.layers, "utilization": args.utilization, "caches_at_a_time": args.gpus,
    }  # fmt: skip
    gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in range(args.gpus):
        gpus.put(str(gpu) if args.gpus > 1 else "")
    measured: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(args.gpus) as pool:
        started = {pool.submit(run_one, dtype, args, gpus): dtype for dtype in args.dtypes}
        for future in as_completed(started):
            if (result := future.result()) is None:
                continue
            head["environment"] = result.pop("environment")
            measured[started[future]] = result
            if args.json:  # what there is, should the next one not end
                done = [measured[dtype] for dtype in args.dtypes if dtype in measured]
                args.json.write_text(json.dumps(head | {"caches": done}, indent=1) + "\n")
    results = [measured[dtype] for dtype in args.dtypes if dtype in measured]
    if results:
        print(compare(results))
    if failed := [dtype for dtype in args.dtypes if dtype not in measured]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
