"""What the scripts in benchmarks/ compute apart from a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # one script has what another needs


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_agree_up_to_the_first_token_that_differs() -> None:
    agreement = script("vllm_answers").agreement
    assert agreement([[1, 2, 3], [1, 2, 3], [9]], [[1, 2, 3], [1, 7, 3], [8]]) == [3, 1, 0]


def test_divergences_end_with_the_first_token_that_differs() -> None:
    answers = script("vllm_answers")
    p, q = {"1": math.log(0.5), "2": math.log(0.3)}, {"1": math.log(0.25), "3": math.log(0.6)}
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # token 1, and all others
    assert answers.divergence(p, q) == pytest.approx(want)
    assert answers.divergence(p, p) == 0
    exact = {"tokens": [[1, 2, 3], [4, 5, 6]], "distributions": [[p, p, p], [p, p, p]]}
    other = {"tokens": [[1, 9, 9], [4, 5, 6]], "distributions": [[p, q, q], [q, q, q]]}
    assert answers.divergences(exact, other, [2, 3]) == pytest.approx([want / 2, want])
    low, high = answers.interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65
    third = {"tokens": [[1, 2, 3], [4, 9, 9]], "distributions": [[q, q, q], [p, p, q]], "metrics": {"x": 1}}
    served = {
        mode: its | {"metrics": {"vllm:prefix_cache_hits": 1, "vllm:num_preemptions": 1}}
        for mode, its in (("batched", exact), ("alone", other), ("in chunks", third))
    }
    rows = answers.compare_divergences(exact, served)
    assert rows[0]["positions"] == [2, 2], "up to the first difference in any answer"
    assert [row["kl"] for row in rows] == pytest.approx([0, 0.75 * want, 0.5 * want])
    assert rows[1]["further"] == pytest.approx(0.75 * want)
    wide, narrow = answers.interval([0.0, 1.0] * 50, comparisons=8), answers.interval([0.0, 1.0] * 50)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_difference_has_more_than_a_mean() -> None:
    assert script("vllm_answers").spread([0.0, -1.0, 2.0, 90.0, 0.0]) == {
        "further_median": 0, "further_share": 0.4, "equal_share": 0.4,
    }  # fmt: skip


def test_what_is_scored_and_what_modes_met_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    answers = script("vllm_answers")
    p, q = {"1": math.log(0.5), "2": math.log(0.3)}, {"1": math.log(0.25), "2": math.log(0.6)}
    exact: dict[str, Any] = {"tokens": [[1, 2, 3, 4], [5, 6, 7, 8]], "distributions": [[p] * 4, [p] * 4]}
    batched = exact | {"metrics": {}, "distributions": [[p] * 4, [q] * 4]}
    preempted = batched | {
        "distributions": [[q] * 4, [q] * 4], "preempted_after": [1, 2], "metrics": {"vllm:num_preemptions": 2},
        "tokens": [[1, 2, 3, 4], [5, 6, 9, 8]],
    }  # fmt: skip
    skipped = batched | {"tokens": [[9, 2, 3, 4], [5, 6, 7, 8]], "compressed_layers": [28, 30]}
    made = {"batched": batched, "preempted": preempted, "skipped layers": skipped}
    rows = answers.compare_divergences(exact, made)
    assert [row["positions"] for row in rows] == [[4, 3], [4, 3], [1, 3]], "skipped layers shorten their own alone"
    assert [row["scored"] for row in rows] == [7, 7, 4]
    assert rows[1]["further"] == pytest.approx(rows[1]["further_median"])
    assert (rows[1]["further_share"], rows[1]["equal_share"]) == (0.5, 0.5)
    assert rows[1]["preempted_after"] == [1, 2]
    assert "further" not in rows[2]
    assert rows[2]["compressed_layers"] == [28, 30]
    text = capsys.readouterr().out
    assert "7 positions of 2 prompts are scored: 3 to 4 of a prompt, median 3.5" in text
    assert "in 50% of prompts (equal in 50%); 2 preemptions; 4 scored positions come after them\n" in text
    last = text.splitlines()[-1]
    assert last.endswith("at 4 positions; 28 of 30 layers compressed")
    assert "BUT" not in text
    answers.compare_divergences(exact, made | {"skipped layers": skipped | {"compressed_layers": [30, 30]}})
    assert "BUT all layers are compressed" in capsys.readouterr().out
    answers.compare_divergences(exact, made | {"skipped layers": skipped | {"compressed_layers": None}})
    assert "BUT the engine does not tell how many are compressed" in capsys.readouterr().out


def test_a_mode_that_did_not_meet_its_case_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answers, tiny_config = script("vllm_answers"), tmp_path / "config.json"
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    tiny_config.write_text(json.dumps({"model_type": "llama", "hidden_size": 256, **shape}))
    its = {"tokens": [[1, 2], [3, 4]], "metrics": {"vllm:num_preemptions": 1, "vllm:prefix_cache_hits": 0}}
    made = {
        "batched": its | {"room": [640, 704]},
        "preempted": its | {"preempted_after": [1, None]},
        "prefix hits": its,
        "n-grams": its,
        "graphs": its | {"steps_by_graph": {"NONE": 3}},
        "n-grams, graphs": its | {"steps_by_graph": {"NONE": 3, "FULL": 5}},
        "compiled, with graphs": its,
        "compiled": its,
        "2 GPUs": its | {"tokens": [[1, 2], [3, 9]]},
    }
    rows = answers.compare_answers(made, 2)
    assert [row["mode"] for row in rows if not row["has_to_be_equal"]] == ["2 GPUs"]
    said = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert said["batched"].endswith("2.0 tokens; 1 preemptions; room for 640 tokens  BUT the planner says 704")
    assert answers.planned(str(tiny_config), "turboquant") == 4 * 2**30 // (64 * 2 * 3 * (64 // 2 + 64 // 2 + 4)) * 64
    assert said["preempted"].endswith("; 1 preemptions  BUT 1 prompts were not preempted")
    assert said["prefix hits"].endswith("  BUT vllm:prefix_cache_hits is 0")
    assert said["n-grams"].endswith("  BUT vllm:spec_decode_num_accepted_tokens is None")
    assert said["graphs"].endswith("; 0 of 3 steps in full graphs  BUT no step was in a full graph")
    assert "; 5 of 8 steps in full graphs  BUT vllm:spec_decode" in said["n-grams, graphs"]
    assert said["compiled, with graphs"].endswith("  BUT the engine does not tell of graphs")
    assert "1 of 2 answers are those of 'batched'" in said["2 GPUs"]
    assert said["2 GPUs"].endswith("they need not be, as sums run in another order")


def test_an_engines_log_tells_of_layers_and_graphs() -> None:
    told = script("vllm_answers").told
    assert told("nothing of the kind") == {"compressed_layers": None, "steps_by_graph": None}
    row = "(EngineCore pid=9) INFO 11-29 16:05:36 [loggers.py:271] | {} | {} | 0            | {}         | {} |\n"
    log = "INFO kvfold compresses 28 of 30 layers to k4v4; 2 stay as they are\n"
    log += row.format("Unpadded Tokens", "Padded Tokens", "Runtime Mode", "Count")
    log += row.format("4              ", 8, "FULL", 7) + row.format(16, 16, "FULL", 2) + row.format(900, 900, "NONE", 1)
    assert told(log) == {"compressed_layers": [28, 30], "steps_by_graph": {"FULL": 9, "NONE": 1}}


class Engine:
    """vLLM's scheduler, as far as blocks go: first come, first served, and who came last is thrown out."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.preemptions, self.most = blocks, 0, 0
        self.had: list[tuple[int, int]] = []  # who was thrown out, and after how many tokens
        cache = SimpleNamespace(block_size=64, num_gpu_blocks=blocks)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def get_metrics(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="vllm:num_preemptions", value=self.preemptions), SimpleNamespace(name="other")]

    def generate(self, given: list[dict[str, list[int]]], params: list[int], use_tqdm: bool) -> list[str]:
        prompts = [len(request["prompt_token_ids"]) for request in given]
        free, has, new = self.blocks - 1, [0] * len(given), [0] * len(given)
        waiting, running = list(range(len(given))), list[int]()
        while waiting or running:
            thrown_out = False
            for n in list(running):
                while n in running and -((prompts[n] + new[n]) // -64) > has[n]:
                    if free:
                        has[n], free = has[n] + 1, free - 1
                        continue
                    last = running.pop()
                    free, has[last], thrown_out = free + has[last], 0, True
                    waiting.insert(0, last)
                    self.preemptions += 1
                    self.had.append((last, new[last]))
            while not thrown_out and waiting and (need := -((prompts[waiting[0]] + new[waiting[0]]) // -64)) <= free:
                running.append(waiting.pop(0))
                has[running[-1]], free = need, free - need
            self.most = max(self.most, len(running))
            for n in list(running):
                new[n] += 1
                if new[n] == params[n]:
                    running.remove(n)
                    free, has[n] = free + has[n], 0
        return [f"output {n}" for n in range(len(given))]


def test_each_prompt_is_thrown_out_after_a_token_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = script("vllm_answers")
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda *, max_tokens, **others: max_tokens  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    engine = Engine(answers.MODES["preempted"]["num_gpu_blocks_override"])
    lengths = [1, 63, 64, 65, 100, 128, 167, 1920, 1921, 6000, answers.LONGEST - 64]
    outputs, had = answers.preempted(engine, [[7] * length for length in lengths], 32)
    assert had == [1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]  # a prompt of whole blocks goes at once
    crowds = [len(answers.crowd(length, 0, 135, 64)) for length in lengths]
    assert engine.had == list(zip(crowds, had, strict=True))  # the prompts, which come last, and nobody else
    assert outputs == [f"output {count}" for count in crowds]
    assert engine.most == max(crowds) + 1 <= 64
    largest = max(sum(answers.crowd(length, 0, 135, 64)) + length for length in lengths)
    assert largest <= answers.MODES["preempted"]["max_num_batched_tokens"]  # all are computed in one step
    none = Engine(1000)
    none.llm_engine.vllm_config.cache_config.num_gpu_blocks = 136  # it has more than it says
    assert answers.preempted(none, [[7] * 100], 32)[1] == [None]


def test_modes_that_cannot_be_served_are_refused() -> None:
    answers = script("vllm_answers")
    strict, default = answers.chosen(None, False, 1), answers.chosen(None, True, 1)
    assert default == [mode for mode in answers.MODES if "GPUs" not in mode]
    assert [mode for mode in default if mode not in strict] == ["n-grams, graphs", "skipped layers"]
    more = ["batched", "2 GPUs, graphs", "compiled, with graphs", "compiled"]
    assert answers.chosen(["2 GPUs, graphs"], False, 2) == more
    assert answers.chosen(["2 GPUs, graphs"], True, 2) == more[:2]
    with pytest.raises(SystemExit, match=r"'skipped layers' is another function.*: add --default"):
        answers.chosen(["graphs", "skipped layers"], False, 2)
    with pytest.raises(SystemExit, match=r"'2 GPUs, graphs' needs 2 GPUs, and torch finds 1"):
        answers.chosen(["2 GPUs, graphs"], True, 1)


ENGINE = """
import json, os, sys
job, result = (sys.argv[sys.argv.index(name) + 1] for name in ("--job", "--result"))
print("INFO kvfold compresses 3 of 6 layers to k4v4")
print("WARNING of something")
if json.load(open(job))["mode"] == "graphs":
    sys.exit("it broke")
json.dump({"environment": dict(os.environ)}, open(result, "w"))
"""


def test_an_engines_environment_warnings_and_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = script("vllm_answers")
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.setattr(answers, "__file__", str(tmp_path / "engine.py"))
    for name in ("VLLM_BATCH_INVARIANT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def served(mode: str, default: bool) -> Any:
        return answers.serve({"mode": mode, "dtype": "turboquant", "default": default}, tmp_path, 3, 2)

    strict, many = served("preempted", False), served("2 GPUs, graphs", True)
    assert strict["compressed_layers"] == [3, 6]
    env = strict["environment"]
    assert (env["VLLM_BATCH_INVARIANT"], env["VLLM_ENABLE_V1_MULTIPROCESSING"]) == ("1", "0")
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert answers.WITHOUT_MULTICAST.items() <= many["environment"].items()
    assert not {"VLLM_BATCH_INVARIANT", "CUDA_VISIBLE_DEVICES"} & many["environment"].keys()
    said = capsys.readouterr().err
    assert "turboquant-preempted: WARNING of something\n" in said
    assert "INFO" not in said
    assert served("graphs", True) is None
    said = capsys.readouterr().err
    assert "turboquant-graphs failed:\nINFO" in said
    assert "it broke" in said


def test_compiled_answers_are_compared_among_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    answers = script("vllm_answers")
    plain, other = ({"tokens": [[1, 2], [3, last]], "metrics": {}} for last in (4, 9))
    made = {"batched": plain, "compiled": other, "compiled, with graphs": plain}
    rows = answers.compare_answers(made, 2)
    assert [(row["compared_with"], row["equal"]) for row in rows] == [("batched", 2), ("compiled", 2), ("compiled", 1)]
    del made["compiled"]
    assert len(answers.compare_answers(made, 2)) == 1
    assert "cannot be compared, as 'compiled' was not run" in capsys.readouterr().out


def test_prompts_are_pieces_of_the_text_that_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Words:
        def __init__(self, text: str) -> None:
            self.input_ids = [int(word) for word in text.split()]

    answers = script("vllm_answers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Words)
    text = " ".join(map(str, range(700)))
    prompts = answers.prompts_of(text, FOLDER, 3, 300)
    assert [len(prompt) for prompt in prompts] == [100, 200, 300]
    assert [token for prompt in prompts for token in prompt] == list(range(600))
    with pytest.raises(SystemExit, match="the text has 700 tokens, and 3 prompts of up to 400 take 750"):
        answers.prompts_of(text, FOLDER, 3, 400)


def test_caches_are_compared_with_the_first() -> None:
    def cache(dtype: str, tokens: int, rate: float, seconds: float) -> dict[str, object]:
        row = {"case": "8x10", "batch": 8, "prefill_seconds": seconds, "decode_tokens_per_second": rate}
        return {"dtype": dtype, "tokens": tokens, "graphs_gib": 0.2, "cases": [row]}

    text = script("vllm_engine").compare([cache("auto", 100, 50.0, 2.0), cache("turboquant", 388, 100.0, 1.0)])
    assert "turboquant: 388 tokens, 3.88x; graphs 0.2 GiB" in text
    assert " ".join(text.splitlines()[3].split()) == "8x10 batch 8 decode 100.0 tok/s 2.00x prefill 1.00 s 0.50x"


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("vllm_engine", ["--cases", "8by10"], "'8by10' is neither batch x prompt tokens, like 8x8192, nor 'full'"),
        ("vllm_engine", ["--cases", "0x10"], "'0x10' is neither"),
        ("decode_limits", ["--shapes", "8x5"], "no shape is called '8x5'"),
        ("decode_limits", ["--shapes", "store-8"], "store-8: no decode shape; there are 8x32768"),
        ("decode_limits", ["--format", "k9v9"], "unknown format 'k9v9'"),
        ("decode_limits", ["--format", "k8v8"], "k8v8: the CUDA kernels are built for"),
        ("decode_limits", ["--replays", "0"], "'0' is no number above 0"),
        ("decode_limits", ["--json", "nowhere/x.json"], "there is no folder"),
        ("decode_timeline", ["--shapes", "8x5"], "no shape is called '8x5'"),
        ("decode_timeline", ["--shapes", "store-8"], "store-8: no decode shape; there are"),
        ("decode_timeline", ["--format", "k9v9"], "unknown format 'k9v9'"),
        ("decode_timeline", ["--format", "k8v8"], "k8v8: the CUDA kernels are built for"),
        ("decode_timeline", ["--replays", "0"], "'0' is no number above 0"),
        ("decode_timeline", ["--json", "nowhere/x.json"], "there is no folder"),
        ("prefill_limits", ["--shapes", "8x32768"], "8x32768: no prefill shape; there are prefill-2048+30720"),
        ("prefill_limits", ["--format", "k9v9"], "unknown format 'k9v9'"),
        ("prefill_limits", ["--format", "k8v8"], "k8v8: the CUDA kernels are built for"),
        ("prefill_limits", ["--json", "nowhere/x.json"], "there is no folder"),
        ("random_heads", ["--kv-heads", "3", "x"], "3: 8 query heads do not divide by it; it is 1, 2, 4 or 8"),
        ("random_heads", ["--kv-heads", "0", "x"], "--kv-heads 0: 8 query heads do not divide by it"),
        ("random_heads", ["--kv-heads", "two", "x"], "invalid int value: 'two'"),
        ("vllm_answers", ["--text", "a", "--modes", "2 CPUs"], "invalid choice: '2 CPUs'"),
        ("vllm_engine", [], "vLLM is not installed: pip install"),
        ("vllm_answers", ["--text", "nothing.txt"], "vLLM is not installed: pip install"),
        ("vllm_fidelity", ["--text", "a", "--haystack", "b"], "vLLM is not installed: pip install"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(name: str, arguments: list[str], says: str) -> None:
    if importlib.util.find_spec("vllm") is not None and "installed" in says:
        pytest.skip("vLLM is installed")
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", *arguments], capture_output=True, text=True)
    assert done.returncode
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_device_folder_text_and_model_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = script("vllm_engine")
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        engine.require(None, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"there is no folder .*missing"):
        engine.require(tmp_path / "missing" / "x.json", ["auto"])
    engine.require(tmp_path / "x.json", ["auto", "fp8", "turboquant_4bit_nc"])
    monkeypatch.setattr(engine, "entry_points", lambda group: [])
    with pytest.raises(SystemExit, match="does not find kvfold's plugin"):
        engine.require(None, ["auto", "turboquant"])
    answers = script("vllm_answers")
    monkeypatch.setattr(answers, "require", lambda file, dtypes: None)
    monkeypatch.setattr(sys, "argv", ["vllm_answers.py", "--text", str(tmp_path / "nothing.txt")])
    with pytest.raises(SystemExit, match=r"nothing\.txt: there is no such file; --text"):
        answers.main()
    (tmp_path / "text").write_text("Call me Ishmael.")
    monkeypatch.setattr(sys, "argv", ["vllm_answers.py", "--text", str(tmp_path / "text"), "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no config\.json; --model"):
        answers.main()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--modes", "skipped layers"])
    with pytest.raises(SystemExit, match=r"'skipped layers' is another function"):
        answers.main()


def test_what_two_engines_say_is_compared() -> None:
    fidelity = script("vllm_fidelity")
    sure, torn = {"1": math.log(0.9), "2": math.log(0.05)}, {"1": math.log(0.4), "2": math.log(0.5)}
    assert fidelity.score_needle([torn, sure, sure], [9, 1, 1, 1], 2) == pytest.approx((1, 2 * math.log(0.9) / 7))
    assert fidelity.score_needle([torn, torn], [9, 1, 1], 2) == pytest.approx((0, 2 * math.log(0.4) / 7))
    window = [sure] * 100
    assert fidelity.kl_of_window(window, window) == 0
    moved = fidelity.kl_of_window(window, [torn] * 100)
    assert moved == pytest.approx(fidelity.divergence(sure, torn))
    assert fidelity.kl_of_window([torn] * 64 + window, window + [sure] * 64) == 0  # the first positions do not count
    needles = [([9, 1, 1], 2)] * 3
    exact, packed = [window, window, *[[sure, sure]] * 3], [window, [torn] * 100, *[[torn, torn]] * 3]
    said = {
        ("vllm", False): exact,
        ("vllm", True): packed,
        ("transformers", False): exact,
        ("transformers", True): exact,
    }
    result = fidelity.compare(said | {("transformers", True): [window, [torn] * 100, *exact[2:]]}, 2, needles)
    assert result["difference"]["kl_ratio"] == pytest.approx(1)
    assert result["difference"]["recall"]["value"] == -1
    assert result["engines"]["vllm"]["kl"]["value"] == pytest.approx(moved / 2)
    assert result["engines"]["vllm"]["recall_uncompressed"]["value"] == 1


def test_heads_of_zeros_change_nothing(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=3, head_dim=8, attention_bias=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "small")
    made = script("whole_heads").with_whole_heads(tmp_path / "small", tmp_path / "whole", 2)
    assert made == tmp_path / "whole"
    more = LlamaForCausalLM.from_pretrained(made).eval()
    assert (more.config.num_attention_heads, more.config.num_key_value_heads) == (8, 4)
    ids = torch.arange(20)[None]
    assert torch.allclose(more(ids).logits, model(ids).logits, atol=1e-6)
    assert script("whole_heads").with_whole_heads(made, tmp_path / "other", 2) == made
    assert not (tmp_path / "other").exists()


def test_parts_of_the_decode_kernel_can_be_left_out() -> None:
    limits = script("decode_limits")
    source = (FOLDER.parent / "kvfold" / "ops" / "cuda" / "decode.cu").read_text(encoding="utf-8")
    texts = {name: limits.changed(source, variant) for name, variant in limits.VARIANTS.items()}
    assert len(set(texts.values())) == 4
    assert texts["kernel"] == f"#define LAST_COPY copies\n{source}"
    assert "step<" not in texts["reading"]
    assert texts["reading"].count("barrier_wait(") == source.count("barrier_wait(")
    assert texts["arithmetic"].count("step<") == source.count("step<")
    assert "barrier_wait(" not in texts["frame"]
    with pytest.raises(ValueError, match=r"decode\.cu has .* 0 times and not 2"):
        limits.changed("", limits.VARIANTS["reading"])


def test_what_a_prefill_hides_follows_from_its_parts() -> None:
    limits = script("prefill_limits")
    times = {"fa3_bf16": 1425.0, "attention": 1450.0, "windows": 50.0, "in order": 1540.0, "kernel": 1530.0}
    times |= dict.fromkeys(("around", "bfloat16"), 1.0)
    row = limits.row_of("a", "k4v4", times, packed_bytes=10**9, window_bytes=3 * 10**9, copy=4e12)
    assert row["wanted"] == pytest.approx(1500)
    assert row["hidden"] == pytest.approx(10)
    assert row["bytes at copy"] == pytest.approx(1000)
    assert limits.line(row).split()[:3] == ["a", "k4v4", "1,000.0"]


def test_timeline_stamps_every_point_in_the_order_of_the_source() -> None:
    timeline = script("decode_timeline")
    source = (FOLDER.parent / "kvfold" / "ops" / "cuda" / "decode.cu").read_text(encoding="utf-8")
    text = timeline.stamped(source)
    numbers = [int(number) for number in re.findall(r"(?:STAMP|MET)\((\d+)\)", text)]
    assert list(dict.fromkeys(numbers)) == list(range(len(timeline.NAMES)))
    twice = [name for k, name in enumerate(timeline.NAMES) if numbers.count(k) != 1]
    assert twice == ["met"]  # in two branches, of which a launch takes one
    assert sorted(numbers) == sorted([*range(len(timeline.NAMES)), *map(timeline.NAMES.index, twice)])
    times = [int(number) for number in re.findall(r"TIME\((\d+)\)", text)]
    assert times == list(range(len(timeline.NAMES), timeline.COLUMNS))
    assert timeline.TIMED == ["entry", "steps", "end"]
    behind_barriers = [timeline.NAMES[int(number)] for number in re.findall(r"MET\((\d+)\)", text)]
    assert behind_barriers == ["q there", "rotated", "met", "met", "counted"]
    assert len(re.findall(r"__syncthreads\(\);\n *MET", text)) == 3  # met twice, counted


def test_timeline_refuses_a_source_without_a_point() -> None:
    timeline = script("decode_timeline")
    source = (FOLDER.parent / "kvfold" / "ops" / "cuda" / "decode.cu").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"decode\.cu has the point 'entry', .* 0 times and not 1"):
        timeline.stamped("")
    for point in timeline.POINTS:
        if point.name != "waited":  # whose line is that of the point before
            others = source
            for own in re.finditer(point.pattern, source):
                others = others.replace(own.group(), "")
            with pytest.raises(ValueError, match=f"the point '{point.name}', .* 0 times and not {point.found}"):
                timeline.stamped(others)


def test_timeline_gives_the_kernel_its_buffer_meanwhile() -> None:
    from kvfold.ops.cuda import runtime, schedule

    timeline, buffer = script("decode_timeline"), torch.zeros(4)
    before, folder, params = runtime.sources("decode.cu"), runtime.FOLDER, schedule.Params
    with timeline.stamped_kernel(buffer):
        made = schedule.Params(batch=3)
        assert isinstance(made, params)
        assert (made.batch, made.mask) == (3, buffer.data_ptr())
        assert runtime.sources("decode.cu") == before | {"decode.cu": timeline.stamped(before["decode.cu"])}
    assert (runtime.FOLDER, schedule.Params) == (folder, params)
    assert schedule.Params().mask is None


def test_timeline_of_stamps() -> None:
    timeline = script("decode_timeline")
    steps, end = timeline.NAMES.index("steps"), len(timeline.NAMES) - 1
    stamps = torch.zeros(3, 2, timeline.WARPS, timeline.COLUMNS, dtype=torch.int64)
    for cta in range(2):
        for warp in range(2):
            its = stamps[:, cta, warp]
            its[:, : end + 1] = 10**6 * (cta + 1) + 1500 * (warp + 1) * torch.arange(end + 1)
            entered = 5000 + 100 * cta
            its[:, end + 1 :] = entered + 1000 * (warp + 1) * torch.tensor([0, steps, end])
    stamps[..., timeline.NAMES.index("merged")] = 0
    stamps[:, 0, 2, 0], stamps[:, 0, 2, end + 1] = 10**6, 4900  # enters first, and has no steps
    result = timeline.evaluate(stamps)
    assert result["mhz"] == pytest.approx(1500)
    assert result["warps"] == 4
    assert list(result["points"]) == timeline.NAMES
    assert result["points"]["entry"] == {"median": 0, "p98": 0}
    assert result["points"]["merged"] is None
    assert result["points"]["steps"] == pytest.approx({"median": steps, "p98": 2 * steps})
    ends = {"last_entry": 0.2, "min": steps + 0.1, "mean": 1.5 * steps + 0.15, "max": 2 * steps + 0.2}
    assert result["loop_ends"] == pytest.approx(ends | {"between_ctas": 0.1, "within_cta": steps})
    lines = timeline.table({"case": "8x10", "format": "k4v4", "calls": 2, "us": 9.0, "us_stamped": 9.5} | result)
    assert "8x10 k4v4, replays of 2 calls: 9.00 us a call, 9.50 stamped; 4 warps have steps; 1500 MHz" in lines
    assert [line.split()[-2:] for line in lines.splitlines() if "merged" in line] == [["-", "-"]]


def test_a_model_with_random_heads_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "model.safetensors").write_text("not of that model")
    write = script("random_heads").write
    for name, options in (("one", {}), ("two", {}), ("mqa", {"kv_heads": 1}), ("mha", {"kv_heads": 8})):
        write(tmp_path / name, tokenizer, layers=1, vocabulary=512, **options)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) > 2 * 512 * 512
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "mqa", "mha")]
    assert [config["head_dim"] for config in configs] == [128] * 3
    assert [config["num_key_value_heads"] for config in configs] == [2, 1, 8]
    assert (tmp_path / "one" / "tokenizer.json").read_text() == "{}"
