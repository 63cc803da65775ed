"""Does vLLM with a compressed cache say what transformers says with the same one? KL and needles, both ways.

    python benchmarks/vllm_fidelity.py --text wiki.test.raw --haystack book.txt --json fidelity.json

The same windows of text and the same needles (``kvfold fidelity``, ``kvfold needle``) go through vLLM and through
transformers, in bfloat16, with each one's own cache and with the compressed one, both with ``chunk=packed``: the KL
divergence of a compressed cache is from the same engine without it. Of a distribution the ``--logprobs`` likeliest
tokens are compared, and the rest as one. Intervals (95 %) are bootstrapped over windows and over needles, and so are
those of the difference between the engines.

Needs a GPU and vLLM 0.33; the model is SmolLM2 unless ``--model`` names a directory. Each engine and cache has a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_answers import Distribution, divergence, interval
from vllm_engine import require

from kvfold.eval.fidelity import FIRST_POSITION
from kvfold.eval.needle import DIGITS

RUNS = [("vllm", False), ("vllm", True), ("transformers", False), ("transformers", True)]
"""Engine, and whether its cache is the compressed one."""
DEPTHS = (0, 25, 50, 75, 100)
LENGTHS = (512, 1024, 2048)
PIECE = 512
"""Positions whose distributions are sorted at a time."""


# --- the two engines --------------------------------------------------------------------------------------------------


def in_vllm(job: dict[str, Any]) -> list[list[Distribution]]:
    """What is said before each token but the first of every sequence: the likeliest tokens, and the one that comes."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"], skip_tokenizer_init=True, dtype="bfloat16", seed=0, enforce_eager=True,
        kv_cache_dtype=job["dtype"] if job["compressed"] else "auto", max_model_len=4096, max_num_batched_tokens=4096,
        enable_prefix_caching=False, max_logprobs=job["logprobs"],
        # so many bytes, and no measurement of what is free, so that other engines may start meanwhile
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=2 * 2**30,
        additional_config={"turboquant": {"chunk": "packed"}} if job["compressed"] else {},
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=job["logprobs"])
    given = [{"prompt_token_ids": ids} for ids in job["sequences"]]
    result = []
    for output in llm.generate(given, params, use_tqdm=False):
        said = [{str(token): value.logprob for token, value in at.items()} for at in output.prompt_logprobs[1:]]
        result.append(said)
    return result


def in_transformers(job: dict[str, Any]) -> list[list[Distribution]]:
    """The same as :func:`in_vllm` of transformers."""
    import torch

    from kvfold.commands.evaluation import forward
    from kvfold.commands.measure import load_subject
    from kvfold.integrations.transformers import KVCache

    subject = load_subject(job["model"])
    subject.model.to(device="cuda", dtype=torch.bfloat16)
    result = []
    for ids in job["sequences"]:
        tokens = torch.tensor([ids], device="cuda")
        with torch.inference_mode():
            if job["compressed"]:
                cache = KVCache.for_model(subject.model, job["format"], chunk="packed")
                logits = forward(subject, tokens, cache)
            else:
                logits = subject.model(tokens, use_cache=False).logits[0]
            said: list[Distribution] = []
            for begin in range(0, len(ids) - 1, PIECE):
                piece = torch.log_softmax(logits[begin : min(begin + PIECE, len(ids) - 1)].float(), dim=-1)
                comes = ids[begin + 1 : begin + 1 + PIECE]
                coming = piece.gather(1, torch.tensor(comes, device="cuda")[:, None])[:, 0]
                likeliest = piece.topk(job["logprobs"])
                columns = (likeliest.indices.tolist(), likeliest.values.tolist(), comes, coming.tolist())
                for best, values, token, value in zip(*columns, strict=True):
                    said.append(dict(zip(map(str, best), values, strict=True)) | {str(token): value})
        result.append(said)
    return result


def run_one(job: dict[str, Any], scratch: Path, gpu: int | None) -> list[list[Distribution]]:
    """A job in a process of its own."""
    name = f"{job['engine']}-{job['compressed']}"
    given, result = scratch / f"{name}.json", scratch / f"{name}.result.json"
    given.write_text(json.dumps(job))
    env = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    command = [sys.executable, __file__, "--text", "-", "--haystack", "-", "--job", str(given), "--result", str(result)]
    if subprocess.run(command, check=False, env=env).returncode:
        sys.exit(f"{name} failed, see above")
    print(f"{name} is done", file=sys.stderr, flush=True)
    loaded: list[list[Distribution]] = json.loads(result.read_text())
    return loaded


# --- figures ----------------------------------------------------------------------------------------------------------


def kl_of_window(exact: list[Distribution], other: list[Distribution]) -> float:
    """Mean over the positions that ``kvfold fidelity`` scores."""
    pairs = zip(exact[FIRST_POSITION:], other[FIRST_POSITION:], strict=True)
    return statistics.fmean(divergence(p, q) for p, q in pairs)


def score_needle(said: list[Distribution], ids: list[int], answer: int) -> tuple[float, float]:
    """Whether greedy decoding writes the answer, and its log-probability a digit; see :mod:`kvfold.eval.needle`."""
    tokens, last = [str(token) for token in ids[-answer:]], said[-answer:]
    found = all(at[token] >= max(at.values()) for token, at in zip(tokens, last, strict=True))
    return float(found), sum(at[token] for token, at in zip(tokens, last, strict=True)) / DIGITS


def figure(values: list[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {"value": statistics.fmean(values), "low": low, "high": high}


def compare(
    said: dict[tuple[str, bool], list[list[Distribution]]], windows: int, needles: list[tuple[list[int], int]]
) -> dict[str, Any]:
    """Figures of both engines, and vLLM's less those of transformers; prints them."""
    kl, recall, log_prob = {}, {}, {}
    for engine in ("vllm", "transformers"):
        pairs = zip(said[engine, False][:windows], said[engine, True][:windows], strict=True)
        kl[engine] = [kl_of_window(exact, packed) for exact, packed in pairs]
        for compressed in (False, True):
            answers = zip(said[engine, compressed][windows:], needles, strict=True)
            scores = [score_needle(at, ids, answer) for at, (ids, answer) in answers]
            recall[engine, compressed] = [found for found, _ in scores]
            log_prob[engine, compressed] = [log for _, log in scores]
    result: dict[str, Any] = {"engines": {}}
    for engine in kl:
        result["engines"][engine] = row = {
            "kl": figure(kl[engine]), "kl_of_windows": kl[engine],
            **{
                f"{name}{'' if compressed else '_uncompressed'}": figure(values[engine, compressed])
                for name, values in (("recall", recall), ("log_prob", log_prob)) for compressed in (False, True)
            },
        }  # fmt: skip
        print(
            f"{engine:>13}: KL {row['kl']['value']:.5f} [{row['kl']['low']:.5f}, {row['kl']['high']:.5f}], needles "
            f"{row['recall']['value']:.1%} of {len(needles)} (uncompressed {row['recall_uncompressed']['value']:.1%}), "
            f"log-probability of a digit {row['log_prob']['value']:.4f} "
            f"(uncompressed {row['log_prob_uncompressed']['value']:.4f})"
        )
    ours, theirs = kl["vllm"], kl["transformers"]
    result["difference"] = {
        "kl": figure([x - y for x, y in zip(ours, theirs, strict=True)]),
        "kl_ratio": statistics.fmean(ours) / statistics.fmean(theirs),
        "recall": figure([x - y for x, y in zip(*(recall[engine, True] for engine in kl), strict=True)]),
        "log_prob": figure([x - y for x, y in zip(*(log_prob[engine, True] for engine in kl), strict=True)]),
    }
    print(f"KL in vLLM / in transformers: {result['difference']['kl_ratio']:.4f}")
    return result


# --- the program ------------------------------------------------------------------------------------------------------


def sequences_of(args: argparse.Namespace, folder: Path) -> tuple[list[list[int]], list[tuple[list[int], int]]]:
    """Windows of the text, and needles with the number of tokens of their answers."""
    from kvfold.commands.fidelity import cut_windows
    from kvfold.commands.measure import load_subject
    from kvfold.commands.needle import make_tasks

    subject = load_subject(str(folder))
    text, haystack = (path.read_text(encoding="utf-8") for path in (args.text, args.haystack))
    windows = cut_windows(subject, text, args.text, args.windows, 2048).ids.tolist()
    wanted = argparse.Namespace(
        length=list(LENGTHS), depth=list(DEPTHS), trials=args.trials, seed=0, no_chat_template=False
    )
    tasks = make_tasks(wanted, subject, args.haystack, haystack)
    return windows, [(task.prompt.ids, task.prompt.answer) for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what windows are cut from")
    parser.add_argument("--haystack", type=Path, required=True, help="what needles are hidden in")
    parser.add_argument("--model", help="a directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="turboquant", help="of the cache in vLLM (%(default)s)")
    parser.add_argument("--windows", type=int, default=10, help="of 2,048 tokens (%(default)s)")
    parser.add_argument("--trials", type=int, default=4, help="needles of each length and depth (%(default)s)")
    parser.add_argument("--logprobs", type=int, default=64, help="likeliest tokens (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, spread over the GPUs that there are")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job.read_text())
        run = in_vllm if job["engine"] == "vllm" else in_transformers
        args.result.write_text(json.dumps(run(job)))
        return
    require(args.json, [args.dtype])
    for path, option in ((args.text, "--text"), (args.haystack, "--haystack")):
        if not path.is_file():
            sys.exit(f"{path}: there is no such file; {option} names a text")
    import torch

    from kvfold.commands.bench import environment_of_gpu
    from kvfold.formats import KVFormat
    from kvfold.models import smollm2_folder

    folder = Path(args.model) if args.model else smollm2_folder(lambda text: print(text, file=sys.stderr))
    windows, needles = sequences_of(args, folder)
    fmt = str(KVFormat.parse(args.dtype))
    common = {
        "model": str(folder), "dtype": args.dtype, "format": fmt, "logprobs": args.logprobs,
        "sequences": [*windows, *(ids for ids, _ in needles)],
    }  # fmt: skip
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        started = {
            (engine, compressed): pool.submit(
                run_one, common | {"engine": engine, "compressed": compressed}, Path(scratch),
                number % gpus if gpus > 1 else None,
            )
            for number, (engine, compressed) in enumerate(RUNS)
        }  # fmt: skip
        said = {key: future.result() for key, future in started.items()}
    result = {
        "command": shlex.join(sys.argv), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment_of_gpu(None),
        "settings": {
            "dtype": args.dtype, "format": fmt, "chunk": "packed", "windows": len(windows), "window_tokens": 2048,
            "needles": len(needles), "lengths": LENGTHS, "depths": DEPTHS, "logprobs": args.logprobs,
        },
        **compare(said, len(windows), needles),
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
