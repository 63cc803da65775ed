"""`kvfold generate` and `kvfold compare` on a tiny random llama, and on the real SmolLM2 where slow tests run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import cli, planner
from kvfold.commands import compare, measure
from kvfold.planner import ModelShape

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LAYERS, KV_HEADS, HEAD = 2, 2, 32
TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a llama of random weights and a tokenizer of bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<user>", "<model>", *alphabet])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(["<user>", "<model>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=HEAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Result:
    def __init__(self, code: int, captured: pytest.CaptureResult[str]) -> None:
        self.code, self.out, self.err = code, captured.out, captured.err

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *argv: Result(cli.main([str(word) for word in argv]), capsys.readouterr())


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_tells_the_figures(kvfold: Any, model: Path) -> None:
    options = ("--model", model, "--prompt", "hello", "--max-new-tokens", 5)
    result = kvfold("generate", *options)
    assert result.code == 0, result.err
    text = kvfold("generate", *options, "--json").json()["text"]
    assert result.out.rstrip("\n") == text.rstrip("\n")
    lines = result.err.splitlines()
    assert lines[0] == f"loading {model}"
    assert lines[1] == "prefill of 7 tokens, cache k4v4"
    assert lines[2].startswith("5 tokens, prefill of 7 in ")
    assert "tokens/s; cache: 144 bytes per token, 9,216 in all with room for 64" in lines[2]


def test_generate_streams_as_tokens_come(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    put = measure.Clock.put

    def spy(self: measure.Clock, tokens: Any) -> None:
        put(self, tokens)
        seen.append((len(self.seconds), out.getvalue()))

    monkeypatch.setattr(measure.Clock, "put", spy)
    options = ["--max-new-tokens", "200", "--temperature", "2", "--seed", "1"]
    assert cli.main(["generate", "--model", str(model), "--prompt", "a", *options]) == 0
    counts, texts = zip(*seen, strict=True)
    assert counts == tuple(range(201))
    assert len(set(texts)) > 1  # words come as they are complete and not all at the end


def test_generate_json(kvfold: Any, model: Path) -> None:
    result = kvfold("generate", "--model", model, "--prompt", "hello", "--max-new-tokens", 5, "--json").json()
    assert list(result) == [
        "model", "dtype", "format", "chunk", "page_size", "new_tokens", "text", "prompt_tokens", "prefill_seconds",
        "tokens_per_second", "bytes_per_token", "bytes", "capacity", "cache",
    ]  # fmt: skip
    assert (result["format"], result["chunk"], result["page_size"]) == ("k4v4", "exact", 64)
    assert (result["dtype"], result["new_tokens"], result["prompt_tokens"]) == ("float32", 5, 7)
    assert result["prefill_seconds"] > 0
    assert result["tokens_per_second"] > 0
    shape = ModelShape.uniform(LAYERS, KV_HEADS, HEAD, itemsize=4)
    assert result["bytes"] == planner.cache_bytes(shape, "k4v4", result["capacity"])
    assert result["bytes_per_token"] == result["bytes"] / result["capacity"]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_under_the_name_that_the_model_gives_it(kvfold: Any, model: Path) -> None:
    """transformers 5.24 renames the argument, and warns of the old name on every run."""
    result = kvfold("generate", "--model", model, "--max-new-tokens", 1, "--prompt", "hello")
    assert (result.code, "FutureWarning" in result.err) == (0, False), result.err

    class Old:
        def forward(self, ids: torch.Tensor, past_key_values: Any) -> None: ...

    class New:
        def forward(self, ids: torch.Tensor, cache: Any) -> None: ...

    assert [measure.cache_argument(each()) for each in (Old, New)] == ["past_key_values", "cache"]


def test_generate_without_compression_without_template(kvfold: Any, model: Path) -> None:
    options = ("--format", "none", "--no-chat-template", "--max-new-tokens", 2, "--json")
    result = kvfold("generate", "--model", model, "--prompt", "hello", *options).json()
    assert (result["format"], result["cache"]) == ("none", "DynamicCache")
    assert (result["prompt_tokens"], result["capacity"]) == (5, 6)  # the last new token is not stored
    assert result["bytes_per_token"] == LAYERS * KV_HEADS * HEAD * 2 * 4
    assert result["tokens_per_second"] is None  # only one step of decoding, and the first does not count


def test_generate_repeats_with_a_seed(kvfold: Any, model: Path) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 2, "--seed", seed, "--max-new-tokens", 24, "--json")
        return str(kvfold("generate", "--model", model, "--prompt", "hello", *options).json()["text"])

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_generate_reads_a_file_and_stdin(kvfold: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "prompt.txt").write_text("hello", encoding="utf-8")
    options = ("--model", model, "--max-new-tokens", 3, "--json", "--page-size", 16, "--chunk", "packed")
    from_file = kvfold("generate", *options, "--prompt-file", tmp_path / "prompt.txt").json()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    from_stdin = kvfold("generate", *options).json()
    assert (from_file["text"], from_file["chunk"]) == (from_stdin["text"], "packed")
    assert from_file["capacity"] == 16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--prompt x --format k9v9", "did you mean"),
        ("--prompt x --format k4qv4q", "not built yet"),
        ("--prompt x --model /nowhere/at/all", "cannot load model '/nowhere/at/all'"),
        ("--prompt x --chunk none", "choose from"),
        ("--prompt x --temperature -1", "--temperature: '-1' is not a number from 0"),
        ("--prompt x --max-new-tokens 0", "--max-new-tokens: '0' is not a whole number"),
        ("--prompt x --prompt-file y", "not allowed with"),
        ("--prompt-file /nowhere/at/all", "cannot use /nowhere/at/all: No such file"),
        ("--prompt-file {binary}", "is not UTF-8 text"),
        ("", "the prompt is empty"),
    ],
)
def test_generate_wrong_usage(kvfold: Any, tmp_path: Path, monkeypatch: Any, argv: str, words: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    result = kvfold("generate", *argv.format(binary=tmp_path / "binary").split())
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert result.err.splitlines()[-1].startswith("kvfold: error: ")


def test_generate_on_a_terminal_wants_a_prompt(kvfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    result = kvfold("generate")
    assert result.code == 2
    assert "no prompt: give --prompt TEXT" in result.err


@pytest.mark.parametrize("command", ["generate --prompt x", "compare"])
def test_without_transformers(kvfold: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    result = kvfold(*command.split())
    assert result.code == 2
    assert "pip install 'kvfold[demo]'" in result.err


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("It was a dark and stormy night. " * 8, encoding="utf-8")
    return path


def test_compare_prints_texts_and_a_table(kvfold: Any, model: Path, prompt: Path) -> None:
    options = ("--prompt-file", prompt, "--max-new-tokens", 6, "--format", "k4v4", "k8v8+sinks4+tail16")
    result = kvfold("compare", "--model", model, *options)
    assert result.code == 0, result.err
    for title in ("DynamicCache, float32", "KVCache, k4v4", "KVCache, k8v8+sinks4+tail16"):
        assert f"--- {title}" in result.out
    rows = [line for line in result.out.splitlines() if line.startswith("KVCache")]
    assert [" yes " in row for row in rows] == [True, True]
    assert "  6 of 6 tokens" in result.err
    assert "warming up" in result.err


def test_compare_json(kvfold: Any, model: Path, prompt: Path) -> None:
    options = ("--prompt-file", prompt, "--max-new-tokens", 6, "--format", "k4v4", "bf16", "fp32", "--json")
    result = kvfold("compare", "--model", model, *options).json()
    assert list(result) == [
        "model", "dtype", "environment", "chunk", "page_size", "prompt_tokens", "max_new_tokens", "rows",
    ]  # fmt: skip
    ordinary, *packed = result["rows"]
    assert list(ordinary) == [
        "format", "new_tokens", "text", "prefill_seconds", "tokens_per_second", "bytes_per_token", "bytes",
        "compressed_bytes", "capacity", "cache", "planned_bytes", "planned_equal", "ratio",
        "ratio_16bit", "same_tokens",
    ]  # fmt: skip
    tokens = result["prompt_tokens"] + 5
    assert ordinary["bytes"] == tokens * LAYERS * KV_HEADS * HEAD * 2 * 4
    assert (ordinary["ratio"], ordinary["ratio_16bit"], ordinary["planned_equal"]) == (1, 0.5, None)
    for row in packed:
        shape = ModelShape.uniform(LAYERS, KV_HEADS, HEAD, itemsize=4)
        assert row["planned_equal"] is True
        assert row["bytes"] == planner.cache_bytes(shape, row["format"], row["capacity"])
        assert row["ratio"] == ordinary["bytes"] / row["bytes"]
    assert packed[2]["same_tokens"] == 6  # float32 loses nothing
    assert packed[2]["text"] == ordinary["text"]


def test_compare_counts_layers_that_stay_as_they_are(kvfold: Any, model: Path, prompt: Path, tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=32, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    for file in model.glob("*token*"):
        (tmp_path / "gemma" / file.name).write_bytes(file.read_bytes())
    options = ("--model", tmp_path / "gemma", "--prompt-file", prompt, "--max-new-tokens", 3)
    row = kvfold("compare", *options, "--json").json()["rows"][1]
    assert row["planned_equal"] is True
    assert 0 < row["compressed_bytes"] < row["bytes"]
    assert "SlidingWindow" in row["cache"]
    text = kvfold("compare", *options).out
    assert f"k4v4: {row['bytes'] - row['compressed_bytes']:,} of the bytes are not compressed: KVCache(" in text


def test_compare_fails_where_the_plan_is_wrong(kvfold: Any, model: Path, prompt: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compare, "compressed_bytes", lambda *args: 1)
    result = kvfold("compare", "--model", model, "--prompt-file", prompt, "--max-new-tokens", 2)
    assert result.code == 1
    assert "NO" in result.out
    assert "k4v4: live bytes and planned bytes differ" in result.err


def test_compare_wrong_usage(kvfold: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "did you mean" in kvfold("compare", "--format", "k4w4").err
    monkeypatch.setattr(compare, "TEXT", tmp_path / "none.txt")
    result = kvfold("compare")
    assert result.code == 2
    assert "give --prompt-file FILE" in result.err


def test_same_tokens() -> None:
    assert compare.same_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert compare.same_tokens([1, 2], [1, 2, 4]) == 2
    assert compare.same_tokens([], [1]) == 0


def test_the_clock_leaves_out_the_prefill_and_the_first_step() -> None:
    clock = measure.Clock(seconds=[100.0, 50.0, 0.5, 0.25, 0.25])
    assert clock.tokens_per_second == 4.0
    assert replace(clock, seconds=[100.0, 50.0]).tokens_per_second is None


@pytest.mark.slow
def test_compare_on_smollm2(kvfold: Any) -> None:
    result = kvfold("compare", "--max-new-tokens", 8, "--json").json()
    assert result["prompt_tokens"] >= 1500
    ordinary, packed = result["rows"]
    assert packed["planned_equal"] is True
    assert packed["bytes_per_token"] == 30 * 3 * (2 * (64 // 2 + 2))
    assert ordinary["bytes_per_token"] == 30 * 3 * 2 * 64 * 4
