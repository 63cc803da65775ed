"""What the scripts in benchmarks/ compute apart from a GPU."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
    assert answers.divergences(exact, other) == pytest.approx([want / 2, want])
    low, high = answers.interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65
    rows = answers.compare_divergences(exact, {"batched": exact | {"metrics": {}}, "alone": other | {"metrics": {}}})
    assert [row["kl"] for row in rows] == pytest.approx([0, 0.75 * want])
    assert rows[1]["further"] == pytest.approx(0.75 * want)


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
        return {"dtype": dtype, "tokens": tokens, "cases": [row]}

    text = script("vllm_engine").compare([cache("auto", 100, 50.0, 2.0), cache("turboquant", 388, 100.0, 1.0)])
    assert "turboquant: 388 tokens, 3.88x" in text
    assert " ".join(text.splitlines()[3].split()) == "8x10 batch 8 decode 100.0 tok/s 2.00x prefill 1.00 s 0.50x"


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("vllm_engine", ["--cases", "8by10"], "'8by10' is neither batch x prompt tokens, like 8x8192, nor 'full'"),
        ("vllm_engine", ["--cases", "0x10"], "'0x10' is neither"),
        ("vllm_engine", [], "vLLM is not installed: pip install"),
        ("vllm_answers", ["--text", "nothing.txt"], "vLLM is not installed: pip install"),
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
