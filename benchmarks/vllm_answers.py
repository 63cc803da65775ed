"""Does it matter how vLLM serves a request? Greedy answers of real weights, served in every way, are compared.

    python benchmarks/vllm_answers.py --text book.txt --json answers.json

With ``chunk=packed`` and ``VLLM_BATCH_INVARIANT=1`` a token's attention is a function of its position and of the bytes
before it (docs/vllm.md), and vLLM's own layers do not depend on the batch: the answers have to be equal. With
``--default`` neither is set, and the figures say how soon answers part.

Prompts are pieces of the text of 100 tokens to ``--longest``. Needs a GPU and vLLM 0.33; the model is SmolLM2 unless
``--model`` names a directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_engine import require

from kvfold.models import smollm2_folder

MODES: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batched": {"max_num_seqs": 64},
    "in chunks": {"max_num_seqs": 64, "max_num_batched_tokens": 512},
    "preempted": {"max_num_seqs": 64, "num_gpu_blocks_override": 256},
    "prefix hits": {"max_num_seqs": 64, "enable_prefix_caching": True},
    "n-grams": {
        "max_num_seqs": 64,
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        },
    },
    "without graphs": {"max_num_seqs": 64, "enforce_eager": True},
}  # fmt: skip
"""The first is what the others are compared with."""
LONGEST = 8192


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
    """In a process of its own: the answers of one mode."""
    from vllm import LLM, SamplingParams

    options = {"enable_prefix_caching": False, "gpu_memory_utilization": 0.5} | MODES[job["mode"]]
    additional = {} if job["default"] else {"turboquant": {"chunk": "packed"}}
    llm = LLM(
        model=job["model"], skip_tokenizer_init=True, dtype="bfloat16", seed=0, kv_cache_dtype=job["dtype"],
        max_model_len=LONGEST, disable_log_stats=False, **options,
        additional_config=additional if job["dtype"] != "auto" else {},
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if options["enable_prefix_caching"]:
        llm.generate(given, params, use_tqdm=False)  # the second time prefixes are there
    outputs = llm.generate(given, params, use_tqdm=False)
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    names = ("vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens", "vllm:prefix_cache_hits")
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "metrics": {name: metrics.get(name) for name in names},
    }


def agreement(one: list[list[int]], other: list[list[int]]) -> list[int]:
    """How many tokens of each answer are the same before the first that is not."""
    return [
        next((n for n, (x, y) in enumerate(zip(mine, its, strict=True)) if x != y), len(mine))
        for mine, its in zip(one, other, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what prompts are cut from")
    parser.add_argument("--model", help="a directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="turboquant")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--longest", type=int, default=6000, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--default", action="store_true", help="neither chunk=packed nor VLLM_BATCH_INVARIANT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(answer(json.loads(args.job.read_text()))))
        return
    answers, rows = {}, []
    require(args.json, [args.dtype])
    if not args.text.is_file():
        sys.exit(f"{args.text}: there is no such file; --text names the text that prompts are cut from")
    if args.model and not Path(args.model, "config.json").is_file():
        sys.exit(
            f"{args.model} has no config.json; --model names the directory of a model, or leave it out for SmolLM2"
        )
    folder = Path(args.model) if args.model else smollm2_folder(lambda text: print(text, file=sys.stderr))
    prompts = prompts_of(args.text.read_text(encoding="utf-8"), folder, args.prompts, args.longest)
    with tempfile.TemporaryDirectory() as scratch:
        for mode in dict.fromkeys([next(iter(MODES)), *args.modes]):
            job = Path(scratch, "job.json")
            job.write_text(json.dumps({
                "mode": mode, "model": str(folder), "dtype": args.dtype, "prompts": prompts, "new": args.new,
                "default": args.default,
            }))  # fmt: skip
            env = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
            env |= {} if args.default else {"VLLM_BATCH_INVARIANT": "1"}
            command = [sys.executable, __file__, "--text", str(args.text), "--job", str(job)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
            if done.returncode:
                sys.exit(f"{mode!r} failed, see above")
            answers[mode] = json.loads(done.stdout.splitlines()[-1])
            same = agreement(answers[next(iter(MODES))]["tokens"], answers[mode]["tokens"])
            equal = sum(n == args.new for n in same)
            row = {"mode": mode, "equal": equal, "of": len(same), "same_tokens": same}
            rows.append(row | answers[mode]["metrics"])
            mean = sum(same) / len(same)
            print(f"{mode:>16}: {equal} of {len(same)} answers are equal, for {mean:.1f} tokens", flush=True)
    if args.json:
        from kvfold.commands.bench import environment_of_gpu

        head = {"command": " ".join(sys.argv), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        settings = {"dtype": args.dtype, "new": args.new, "prompts": [len(p) for p in prompts], "default": args.default}
        result = head | {"environment": environment_of_gpu(None), "settings": settings, "modes": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
