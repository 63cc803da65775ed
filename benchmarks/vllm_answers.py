"""Does it matter how vLLM serves a request? Greedy answers of real weights, served in every way, are compared.

    python benchmarks/vllm_answers.py --text book.txt --json answers.json
    python benchmarks/vllm_answers.py --text book.txt --default --json default.json

With ``chunk=packed`` and ``VLLM_BATCH_INVARIANT=1`` a token's attention is a function of its position and of the bytes
before it (docs/vllm.md), and vLLM's own layers do not depend on the batch: the answers have to be equal. With
``torch.compile`` vLLM's layers round otherwise than without it, so its answers are compared among themselves, with and
without CUDA graphs. Two GPUs sum in another order than one, so there it is only said how many answers are equal.

With ``--default`` neither is set, and what is compared is how far the cache moves the next-token distributions: the KL
divergence from the same model with vLLM's own cache, over the tokens that all answers to a prompt begin with and the
first that differs in one, of the ``--logprobs`` likeliest tokens and the rest as one. Intervals (95 %) are bootstrapped
over prompts; those of the modes' differences from the first one hold for all modes at once (Bonferroni). Beside a
difference's mean, which one prompt may decide, stand its median and in how many prompts a mode is further.

``preempted`` serves one prompt at a time, in a crowd of others that come first. Together they fill the cache, and one
of the others then needs one more block, for which vLLM throws out who came last: each prompt is computed anew when its
answer has one token or two. (Left to chance, with all prompts in a small cache, it is a few of 90: who is let in seldom
leaves so few blocks that they are gone before somebody ends.) ``skipped layers`` leaves two layers uncompressed, which
is another function: only its KL is told, and how many layers are compressed.

Prompts are pieces of the text of 100 tokens to ``--longest``. Needs a GPU and vLLM 0.33; the model is SmolLM2 unless
``--model`` names a directory. Each way of serving has a process of its own; with ``--jobs`` several run at a time,
spread over the GPUs that there are.

SmolLM2's 3 KV heads do not divide by two, so for the modes of 2 GPUs all modes serve it with a fourth one of zeros,
whose query heads nobody listens to: the same function.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from vllm_engine import require
from whole_heads import with_whole_heads

from kvfold.models import smollm2_folder

GPUS = 2
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FULL_GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, "enforce_eager": False}
MODES: dict[str, dict[str, Any]] = {
    "batched": {},
    "alone": {"max_num_seqs": 1},
    "in chunks": {"max_num_batched_tokens": 512},
    # one of the blocks is vLLM's own; 135 hold a request of LONGEST tokens, and a step computes what they hold
    "preempted": {"num_gpu_blocks_override": 136, "max_num_batched_tokens": 16384},
    "prefix hits": {"enable_prefix_caching": True},
    "n-grams": {"speculative_config": NGRAMS},
    "graphs": FULL_GRAPHS,
    # vLLM fills up drafts, so that all requests have as many, which is what graphs are made for
    "n-grams, graphs": {"speculative_config": NGRAMS} | FULL_GRAPHS,
    "compiled": {"compilation_config": {"cudagraph_mode": "NONE"}, "enforce_eager": False},
    "compiled, with graphs": {"enforce_eager": False},
    "2 GPUs": {"tensor_parallel_size": GPUS},
    "2 GPUs, graphs": {
        "tensor_parallel_size": GPUS, "enforce_eager": False,
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},  # see WITHOUT_MULTICAST
    },
    "skipped layers": {"kv_cache_dtype_skip_layers": ["0", "1"]},
}  # fmt: skip
ON_TWO = [mode for mode, options in MODES.items() if "tensor_parallel_size" in options]
WITH_GRAPHS = ["graphs", "n-grams, graphs", "compiled, with graphs", "2 GPUs, graphs"]
SKIPPED = "skipped layers"
FIRST = "batched"
"""What the others are compared with, but for:"""
COMPARED_WITH = {
    "compiled, with graphs": "compiled",
    "compiled": "compiled",
    "2 GPUs, graphs": "compiled, with graphs",  # which differs in the order of sums alone
}
NOT_INVARIANT = ["n-grams, graphs", SKIPPED]
"""Left out where answers have to be equal, unless asked for: graphs are for single tokens there, and skipped layers
are another function."""
WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}  # fmt: skip
"""Without NVLink multicast, which can take the GPUs of a host that others share out of service."""
ENVIRONMENT = {
    # the scheduler in this process: it begins when all requests are there, and not with the first of them
    "preempted": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    **dict.fromkeys(ON_TWO, WITHOUT_MULTICAST),
}
LONGEST = 8192
CACHE_BYTES = 4 * 2**30
CROWD_TOKENS = 6
"""That the others of a crowd generate."""
CROWD_BLOCKS = 16
"""Of one of them at most, as long contexts take long where each token reads its own alone."""
METRICS = ("vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens", "vllm:prefix_cache_hits")
MET = dict(zip(METRICS, ("preemptions", "drafted tokens accepted", "tokens found in the prefix cache"), strict=True))
LAYERS = re.compile(r"kvfold compresses (\d+) of (\d+) layers")
STEPS = re.compile(r"\|(?: *\d+ *\|){3} *(FULL|PIECEWISE|NONE) *\| *(\d+) *\|")
"""A row of vLLM's table of CUDA graphs: tokens, tokens with padding, padding, kind of graph, steps."""
WARNING = re.compile(r"\b(WARNING|ERROR)\b")

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


def crowd(length: int, late: int, usable: int, block: int) -> list[int]:
    """Lengths of the prompts that leave to one more just the blocks that it takes, out of so many usable ones.

    The last of them needs a further block for its second token or, ``late`` by 1, for its third; the others need none
    for half a block.
    """
    left = usable - -(-length // block)
    count = -(-left // CROWD_BLOCKS)
    blocks = [left // count + (n < left % count) for n in range(count)]
    return [n * block - block // 2 for n in blocks[:-1]] + [blocks[-1] * block - late]


def preempted(llm: Any, prompts: list[list[int]], params: Any) -> tuple[list[Any], list[int | None]]:
    """The outputs for prompts that are thrown out, and how many tokens each had then; None if it was not thrown out."""
    from vllm import SamplingParams

    def preemptions() -> float:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == METRICS[0])

    cache = llm.llm_engine.vllm_config.cache_config
    few = SamplingParams(temperature=0, max_tokens=CROWD_TOKENS, ignore_eos=True, detokenize=False)
    outputs, had = [], []
    for n, prompt in enumerate(prompts):
        late = n % 2 if len(prompt) % cache.block_size else 0  # else it needs a block itself, and goes at once
        lengths = crowd(len(prompt), late, cache.num_gpu_blocks - 1, cache.block_size)
        served = [*(list(islice(cycle(prompt), length)) for length in lengths), prompt]
        before = preemptions()
        given = [{"prompt_token_ids": tokens} for tokens in served]
        outputs.append(llm.generate(given, [few] * len(lengths) + [params], use_tqdm=False)[-1])
        had.append(1 + late if preemptions() > before else None)
    return outputs, had


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the answers of one mode, and the distributions of their tokens if asked for."""
    from vllm import LLM, SamplingParams

    options = {"max_num_seqs": 64, "enable_prefix_caching": False, "enforce_eager": True} | MODES[job["mode"]]
    ours = job["dtype"] != "auto"
    llm = LLM(
        model=job["model"], skip_tokenizer_init=True, dtype=job["precision"], seed=0, kv_cache_dtype=job["dtype"],
        max_model_len=LONGEST, disable_log_stats=False, max_logprobs=max(job["logprobs"] or 0, 20),
        cudagraph_metrics=job["mode"] in WITH_GRAPHS,
        **options,
        # so many bytes, and no measurement of what is free, so that other engines may start meanwhile
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=CACHE_BYTES,
        additional_config={"turboquant": {"chunk": "packed"}} if ours and not job["default"] else {},
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=job["logprobs"]
    )
    result: dict[str, Any] = {}
    if ours and job["mode"] == FIRST:
        cache = llm.llm_engine.vllm_config.cache_config
        result["room"] = [cache.kv_cache_size_tokens, planned(job["model"], job["dtype"])]
    if job["mode"] == "preempted":
        requests, result["preempted_after"] = preempted(llm, job["prompts"], params)
    else:
        given = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        if options["enable_prefix_caching"]:
            llm.generate(given, params, use_tqdm=False)  # the second time prefixes are there
        requests = llm.generate(given, params, use_tqdm=False)
    if job["mode"] in WITH_GRAPHS:
        llm.llm_engine.do_log_stats()  # the steps since it last did
    outputs = [request.outputs[0] for request in requests]
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return result | {
        "tokens": [list(output.token_ids) for output in outputs],
        "distributions": [
            [{str(token): value.logprob for token, value in likeliest.items()} for likeliest in output.logprobs or ()]
            for output in outputs
        ],
        "metrics": {name: metrics.get(name) for name in METRICS},
    }


def planned(model: str, dtype: str) -> int:
    """Tokens that fit the cache by kvfold's planner."""
    from kvfold.integrations.vllm import DTYPES
    from kvfold.layerformats import ModelFormat
    from kvfold.modelconfig import read_shape
    from kvfold.planner import plan

    fmt = ModelFormat.parse(DTYPES[dtype])
    return next(row.tokens for row in plan(read_shape(model), CACHE_BYTES, 64, [fmt]) if row.format == fmt)


def told(log: str) -> dict[str, Any]:
    """What an engine's log says: layers that are compressed, of how many, and its steps by the kind of CUDA graph."""
    layers, steps = LAYERS.search(log), Counter[str]()
    for kind, count in STEPS.findall(log):
        steps[kind] += int(count)
    return {
        "compressed_layers": [int(number) for number in layers.groups()] if layers else None,
        "steps_by_graph": dict(steps) or None,
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


def spread(further: list[float]) -> dict[str, float]:
    """Of the prompts' differences: what one prompt cannot decide."""
    return {
        "further_median": statistics.median(further),
        "further_share": statistics.fmean(value > 0 for value in further),
        "equal_share": statistics.fmean(value == 0 for value in further),
    }


def _facts(its: dict[str, Any]) -> dict[str, Any]:
    """What goes into a mode's row beside the comparison."""
    return its["metrics"] | {
        key: its[key]
        for key in ("room", "preempted_after", "compressed_layers", "steps_by_graph")
        if its.get(key) is not None
    }


def _met(mode: str, its: dict[str, Any], positions: list[int] | None = None) -> str:
    """What a mode met, and a warning if it did not meet what it is there for, which its figures cannot show."""
    metrics, layers, steps = its["metrics"], its.get("compressed_layers"), its.get("steps_by_graph") or {}
    met = [f"{metrics[name]:.0f} {what}" for name, what in MET.items() if metrics.get(name)]
    had = its.get("preempted_after") or []
    if positions and any(had):
        behind = sum(max(count - tokens, 0) for count, tokens in zip(positions, had, strict=True) if tokens)
        met.append(f"{behind} scored positions come after them")
    if mode in WITH_GRAPHS and steps:
        met.append(f"{steps.get('FULL', 0)} of {sum(steps.values())} steps in full graphs")
    if mode == SKIPPED and layers:
        met.append(f"{layers[0]} of {layers[1]} layers compressed")
    missing = []
    if room := its.get("room"):
        met.append(f"room for {room[0]:,} tokens")
        if room[0] != room[1]:
            missing.append(f"the planner says {room[1]:,}")
    needed = {"preempted": METRICS[0], "n-grams": METRICS[1], "n-grams, graphs": METRICS[1], "prefix hits": METRICS[2]}
    if (name := needed.get(mode)) and not metrics.get(name):
        missing.append(f"{name} is {metrics.get(name)}")
    elif None in had:
        missing.append(f"{had.count(None)} prompts were not preempted")
    if mode in WITH_GRAPHS and not steps.get("FULL"):
        missing.append("no step was in a full graph" if steps else "the engine does not tell of graphs")
    if mode == SKIPPED and (not layers or layers[0] == layers[1]):
        missing.append("all layers are compressed" if layers else "the engine does not tell how many are compressed")
    return "".join(f"; {fact}" for fact in met) + "".join(f"  BUT {reason}" for reason in missing)


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
        row |= {"same_tokens": same, "has_to_be_equal": mode not in ON_TWO}
        rows.append(row | _facts(its))
        print(
            f"{mode:>21}: {row['equal']} of {len(same)} answers are those of {other!r}, equal for "
            f"{statistics.fmean(same):.1f} tokens{_met(mode, its)}"
            f"{'; they need not be, as sums run in another order' if mode in ON_TWO else ''}"
        )
    return rows


def compare_divergences(exact: dict[str, Any], answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of every mode: how far from the exact cache, and how much further than the first."""
    rows = []
    new = len(exact["tokens"][0])
    same = {mode: agreement(exact["tokens"], its["tokens"]) for mode, its in answers.items()}
    compared = [mode for mode in answers if mode != SKIPPED]  # the other function has no say in what is scored
    shared = [min(*counts, new - 1) + 1 for counts in zip(*(same[mode] for mode in compared), strict=True)]
    first = divergences(exact, answers[FIRST], shared)
    print(
        f"{sum(shared)} positions of {len(shared)} prompts are scored: {min(shared)} to {max(shared)} of a prompt, "
        f"median {statistics.median(shared):g}"
    )
    for mode, its in answers.items():
        positions = shared if mode in compared else [min(a, b + 1) for a, b in zip(shared, same[mode], strict=True)]
        values = divergences(exact, its, positions)
        kl, between = statistics.fmean(values), interval(values)
        row = {"mode": mode, "kl": kl, "kl_interval": between, "scored": sum(positions)}
        text = f"KL {kl:.5f} [{between[0]:.5f}, {between[1]:.5f}] at {sum(positions)} positions"
        if mode in compared:
            further = [x - y for x, y in zip(values, first, strict=True)]
            more, (low, high) = statistics.fmean(further), interval(further, max(len(compared) - 1, 1))
            row |= {"further": more, "further_interval": (low, high)} | spread(further)
            if mode != FIRST:
                text += (
                    f", further than {FIRST} by {more:+.5f} [{low:+.5f}, {high:+.5f}], median "
                    f"{row['further_median']:+.5f}, in {row['further_share']:.0%} of prompts (equal in "
                    f"{row['equal_share']:.0%}){'  FURTHER' if low > 0 else '  NEARER' if high < 0 else ''}"
                )
        rows.append(row | {"kl_of_prompts": values, "positions": positions} | _facts(its))
        print(f"{mode:>21}: {text}{_met(mode, its, positions)}")
    return rows


# --- the program ------------------------------------------------------------------------------------------------------


def serve(job: dict[str, Any], scratch: Path, number: int, gpus: int) -> dict[str, Any] | None:
    """Run a job; None if it failed."""
    name = f"{job['dtype']} {job['mode']}".replace(" ", "-")
    given, result = scratch / f"{name}.json", scratch / f"{name}.answers.json"
    given.write_text(json.dumps(job))
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | ENVIRONMENT.get(job["mode"], {})
    if not job["default"]:
        env["VLLM_BATCH_INVARIANT"] = "1"
    if gpus > 1 and job["mode"] not in ON_TWO:
        env["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    command = [sys.executable, __file__, "--text", "-", "--job", str(given), "--result", str(result)]
    log = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if WARNING.search(line):
                print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
    if process.returncode:
        print(f"{name} failed:\n{''.join(log[-100:])}", file=sys.stderr, flush=True)
        return None
    print(f"{name} is done", file=sys.stderr, flush=True)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded | told("".join(log))


def chosen(asked: list[str] | None, default: bool, gpus: int) -> list[str]:
    """The modes to serve, with those that they are compared with; ends the program if one cannot be served."""
    if asked is None:
        asked = [mode for mode in MODES if mode not in ON_TWO and (default or mode not in NOT_INVARIANT)]
    if SKIPPED in asked and not default:
        sys.exit(f"mode {SKIPPED!r} is another function, whose answers equal no other's: add --default")
    if gpus < GPUS and (many := [mode for mode in asked if mode in ON_TWO]):
        sys.exit(f"mode {many[0]!r} needs {GPUS} GPUs, and torch finds {gpus}; leave it out with --modes")
    modes = list(dict.fromkeys([FIRST, *asked]))
    if not default:  # where all are compared with the first
        for mode in modes:  # and those that are appended meanwhile
            if (other := COMPARED_WITH.get(mode, FIRST)) not in modes:
                modes.append(other)
    return modes


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
        "--modes",
        nargs="+",
        choices=list(MODES),
        metavar="MODE",
        help=f"of {', '.join(map(shlex.quote, MODES))} (all on one GPU)",
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
    import torch

    gpus = torch.cuda.device_count()
    modes = chosen(args.modes, args.default, gpus)
    folder = Path(args.model) if args.model else smollm2_folder(lambda text: print(text, file=sys.stderr))
    prompts = prompts_of(args.text.read_text(encoding="utf-8"), folder, args.prompts, args.longest)
    job = {
        "prompts": prompts, "new": args.new, "default": args.default,
        "logprobs": args.logprobs if args.default else None, "precision": args.precision,
    }  # fmt: skip
    wanted = [("auto", FIRST)] * args.default + [(args.dtype, mode) for mode in modes]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        served = with_whole_heads(folder, Path(scratch, "model"), GPUS) if not {*ON_TWO}.isdisjoint(modes) else folder
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
