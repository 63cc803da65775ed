"""Does it matter how vLLM serves a request? Greedy answers of real weights, served in every way, are compared.

    python benchmarks/vllm_answers.py --text book.txt --json answers.json
    python benchmarks/vllm_answers.py --text book.txt --default --json default.json

With ``chunk=packed`` and ``VLLM_BATCH_INVARIANT=1`` a token's attention is a function of its position and of the bytes
before it (docs/vllm.md), and vLLM's own layers do not depend on the batch: the answers have to be equal. With
``torch.compile`` vLLM's layers round otherwise than without it, so its answers are compared among themselves, with and
without CUDA graphs.

With ``--default`` neither is set, and what is compared is how far the cache moves the next-token distributions: the KL
divergence from the same model with vLLM's own cache, over the tokens that all answers to a prompt begin with and the
first that differs in one, of the ``--logprobs`` likeliest tokens and the rest as one. Intervals (95 %) are bootstrapped
over prompts; those of the modes' differences from the first one hold for all modes at once (Bonferroni).

Prompts are pieces of the text of 100 tokens to ``--longest``. Needs a GPU and vLLM 0.33; the model is SmolLM2 unless
``--model`` names a directory. Each way of serving has a process of its own; with ``--jobs`` several run at a time,
spread over the GPUs that there are.

SmolLM2's 3 KV heads do not divide by two, so for the mode ``2 GPUs`` all modes serve it with a fourth one of zeros,
whose query heads nobody listens to: the same function.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_engine import require
from whole_heads import with_whole_heads

from kvfold.models import smollm2_folder

GPUS = 2
MODES: dict[str, dict[str, Any]] = {
    "batched": {},
    "alone": {"max_num_seqs": 1},
    "in chunks": {"max_num_batched_tokens": 512},
    "preempted": {"num_gpu_blocks_override": 136},
    "prefix hits": {"enable_prefix_caching": True},
    "n-grams": {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        },
    },
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, "enforce_eager": False},
    "compiled": {"compilation_config": {"cudagraph_mode": "NONE"}, "enforce_eager": False},
    "compiled, with graphs": {"enforce_eager": False},
    "2 GPUs": {"tensor_parallel_size": GPUS},
}  # fmt: skip
FIRST = "batched"
"""What the others are compared with, but for:"""
COMPARED_WITH = {"compiled, with graphs": "compiled", "compiled": "compiled"}
LONGEST = 8192
METRICS = ("vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens", "vllm:prefix_cache_hits")

Distribution = dict[str, float]
"""Log-probabilities of the likeliest tokens."""


def prompts_of(text: str, folder: Path, count: int, longest: int) -> list[list[int]]:
    """Pieces of a text, one after the other, from short to long."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text).input_ids
    lengths = [100 + (longest - 100) * n // max(count - 1, 1) for n in range(count)]
    if sum(lengths) > len(tokens):
        sys.exit(f"the text has {len(tokens)} tokens, and {count} prompts of up to {longest} take {sum(lengths)}")
    starts = [sum(lengths[:n]) for n in range(count)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the answers of one mode, and the distributions of their tokens if asked for."""
    from vllm import LLM, SamplingParams

    options = {"max_num_seqs": 64, "enable_prefix_caching": False, "enforce_eager": True} | MODES[job["mode"]]
    ours = job["dtype"] != "auto"
    llm = LLM(
        model=job["model"], skip_tokenizer_init=True, dtype=job["precision"], seed=0, kv_cache_dtype=job["dtype"],
        max_model_len=LONGEST, disable_log_stats=False, max_logprobs=max(job["logprobs"] or 0, 20),
        **options,
        # so many bytes, and no measurement of what is free, so that other engines may start meanwhile
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=4 * 2**30,
        additional_config={"turboquant": {"chunk": "packed"}} if ours and not job["default"] else {},
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=job["logprobs"]
    )
    given = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if options["enable_prefix_caching"]:
        llm.generate(given, params, use_tqdm=False)  # the second time prefixes are there
    outputs = [output.outputs[0] for output in llm.generate(given, params, use_tqdm=False)]
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "distributions": [
            [{str(token): value.logprob for token, value in likeliest.items()} for likeliest in output.logprobs or ()]
            for output in outputs
        ],
        "metrics": {name: metrics.get(name) for name in METRICS},
    }


# --- comparing --------------------------------------------------------------------------------------------------------


def agreement(one: list[list[int]], other: list[list[int]]) -> list[int]:
    """How many tokens of each answer are the same before the first that is not."""
    return [
        next((n for n, (x, y) in enumerate(zip(mine, its, strict=True)) if x != y), len(mine))
        for mine, its in zip(one, other, strict=True)
    ]


def divergence(p: Distribution, q: Distribution) -> float:
    """KL(p, q) in nats, of the tokens that are among the likeliest of both, and of all others as one event."""
    shared = p.keys() & q.keys()
    rest_p, rest_q = (max(1 - sum(math.exp(x[token]) for token in shared), 1e-6) for x in (p, q))
    return sum(math.exp(p[t]) * (p[t] - q[t]) for t in shared) + rest_p * math.log(rest_p / rest_q)


def divergences(exact: dict[str, Any], other: dict[str, Any], positions: list[int]) -> list[float]:
    """The mean of each prompt's, over so many first positions."""
    result = []
    for n, count in enumerate(positions):
        pairs = zip(exact["distributions"][n][:count], other["distributions"][n][:count], strict=True)
        result.append(statistics.fmean(divergence(p, q) for p, q in pairs))
    return result


def interval(values: list[float], comparisons: int = 1, draws: int = 10_000) -> tuple[float, float]:
    """Of the mean, 95 % for so many intervals at once, bootstrapped."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    outside = round(draws * 0.025 / comparisons)
    return means[outside], means[-1 - outside]


def _unmet(mode: str, its: dict[str, Any]) -> str:
    """A warning if a mode did not meet what it is there for, which its figures cannot show."""
    needed = {"preempted": METRICS[0], "n-grams": METRICS[1], "prefix hits": METRICS[2]}.get(mode)
    return f"  BUT {needed} is {its['metrics'][needed]}" if needed and not its["metrics"].get(needed) else ""


def compare_answers(answers: dict[str, dict[str, Any]], new: int) -> list[dict[str, Any]]:
    """A row of every mode: how many answers are those of the mode that it is compared with."""
    rows = []
    for mode, its in answers.items():
        other = COMPARED_WITH.get(mode, FIRST)
        if other not in answers:
            print(f"{mode:>21}: cannot be compared, as {other!r} was not run, or failed")
            continue
        same = agreement(answers[other]["tokens"], its["tokens"])
        row = {"mode": mode, "compared_with": other, "equal": sum(n == new for n in same), "of": len(same)}
        row["same_tokens"] = same
        rows.append(row | its["metrics"])
        print(
            f"{mode:>21}: {row['equal']} of {len(same)} answers are those of {other!r}, equal for "
            f"{statistics.fmean(same):.1f} tokens{_unmet(mode, its)}"
        )
    return rows


def compare_divergences(exact: dict[str, Any], answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of every mode: how far from the exact cache, and how much further than the first."""
    rows = []
    new = len(exact["tokens"][0])
    agree = zip(*(agreement(exact["tokens"], its["tokens"]) for its in answers.values()), strict=True)
    positions = [min(*counts, new - 1) + 1 for counts in agree]
    first = divergences(exact, answers[FIRST], positions)
    print(f"{sum(positions)} positions of {len(positions)} prompts")
    for mode, its in answers.items():
        values = divergences(exact, its, positions)
        further = [x - y for x, y in zip(values, first, strict=True)]
        kl, between = statistics.fmean(values), interval(values)
        more, (low, high) = statistics.fmean(further), interval(further, max(len(answers) - 1, 1))
        row = {"mode": mode, "kl": kl, "kl_interval": between, "further": more, "further_interval": (low, high)}
        rows.append(row | {"kl_of_prompts": values, "positions": positions} | its["metrics"])
        print(
            f"{mode:>21}: KL {kl:.5f} [{between[0]:.5f}, {between[1]:.5f}], further than {FIRST} by {more:+.5f} "
            f"[{low:+.5f}, {high:+.5f}]{'' if low <= 0 <= high else '  DIFFERS'}{_unmet(mode, its)}"
        )
    return rows


# --- the program ------------------------------------------------------------------------------------------------------


def serve(job: dict[str, Any], scratch: Path, number: int, gpus: int) -> dict[str, Any] | None:
    """Run a job; None if it failed."""
    name = f"{job['dtype']} {job['mode']}".replace(" ", "-")
    given, result = scratch / f"{name}.json", scratch / f"{name}.answers.json"
    given.write_text(json.dumps(job))
    env = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ | ({} if job["default"] else {"VLLM_BATCH_INVARIANT": "1"})
    if gpus > 1 and "tensor_parallel_size" not in MODES[job["mode"]]:
        env["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    command = [sys.executable, __file__, "--text", "-", "--job", str(given), "--result", str(result)]
    if subprocess.run(command, check=False, env=env).returncode:
        print(f"{name} failed, see above", file=sys.stderr, flush=True)
        return None
    print(f"{name} is done", file=sys.stderr, flush=True)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what prompts are cut from")
    parser.add_argument("--model", help="a directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="turboquant")
    parser.add_argument("--precision", choices=("bfloat16", "float16"), default="bfloat16", help="of the model")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--longest", type=int, default=6000, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=[m for m in MODES if m != "2 GPUs"], help="(all on one GPU)"
    )
    parser.add_argument("--default", action="store_true", help="neither chunk=packed nor VLLM_BATCH_INVARIANT: KL")
    parser.add_argument("--logprobs", type=int, default=64, help="likeliest tokens, with --default")
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        args.result.write_text(json.dumps(answer(json.loads(args.job.read_text()))))
        return
    require(args.json, [args.dtype])
    if not args.text.is_file():
        sys.exit(f"{args.text}: there is no such file; --text names the text that prompts are cut from")
    if args.model and not Path(args.model, "config.json").is_file():
        sys.exit(
            f"{args.model} has no config.json; --model names the directory of a model, or leave it out for SmolLM2"
        )
    folder = Path(args.model) if args.model else smollm2_folder(lambda text: print(text, file=sys.stderr))
    prompts = prompts_of(args.text.read_text(encoding="utf-8"), folder, args.prompts, args.longest)
    job = {
        "prompts": prompts, "new": args.new, "default": args.default,
        "logprobs": args.logprobs if args.default else None, "precision": args.precision,
    }  # fmt: skip
    modes = list(dict.fromkeys([FIRST, *args.modes]))
    modes += [other for mode, other in COMPARED_WITH.items() if mode in modes and other not in modes]
    wanted = [("auto", FIRST)] * args.default + [(args.dtype, mode) for mode in modes]
    import torch

    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        served = with_whole_heads(folder, Path(scratch, "model"), GPUS) if "2 GPUs" in modes else folder
        job["model"] = str(served)
        started = {
            pool.submit(serve, job | {"dtype": dtype, "mode": mode}, Path(scratch), number, gpus): (dtype, mode)
            for number, (dtype, mode) in enumerate(wanted)
        }
        done = {started[future]: future.result() for future in as_completed(started)}
    failed = [f"{dtype} {mode}" for dtype, mode in wanted if done[dtype, mode] is None]
    answers = {mode: its for mode in modes if (its := done[args.dtype, mode]) is not None}
    exact = done.get(("auto", FIRST))
    if FIRST not in answers or (args.default and exact is None):
        sys.exit(f"failed: {', '.join(failed)}; without them there is nothing to compare with")
    rows = compare_answers(answers, args.new) if exact is None else compare_divergences(exact, answers)
    if args.json:
        from kvfold.commands.bench import environment_of_gpu

        head = {"command": shlex.join(sys.argv), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        settings = {
            "dtype": args.dtype,
            "prompts": [len(p) for p in prompts],
            "heads_of_zeros": served != folder,
        } | {key: job[key] for key in ("precision", "new", "default", "logprobs")}
        result = head | {"environment": environment_of_gpu(None), "settings": settings, "modes": rows, "failed": failed}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
