"""What `kvfold formats` and `kvfold plan` print: tables, JSON, and the figures in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.commands import formats as formats_command
from kvfold.formats import KVFormat

CONFIG = {
    "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
BY_HAND = ["plan", "--layers", "36", "--kv-heads", "8", "--head-size", "128", "--memory", "40GiB"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


# --- formats ----------------------------------------------------------------------------------------------------------


def test_formats_table(kvfold: Any) -> None:
    result = kvfold("formats")
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert lines["k4v4"].split()[1:6] == ["turboquant", "4.125", "132", "3.88", "0.0094"]
    assert lines["kbf16vbf16"].split()[1:7] == ["bf16", "16.000", "512", "1.00", "0", "0"]
    assert "fp8" in lines["kf8vf8"]
    assert "vllm:4bit_nc" in result.out
    assert max(map(len, result.out.splitlines())) <= 120


def test_formats_json(kvfold: Any) -> None:
    result = kvfold("formats", "--json", "--head-size", "256", "--head-size-v", "64").json()
    assert list(result) == ["head_size", "head_size_v", "formats", "not_built"]
    rows = {row["format"]: row for row in result["formats"]}
    assert list(rows["k4v4"]) == [
        "format", "aliases", "bits_per_element", "bytes_per_token", "ratio", "exact_bytes_per_sequence", "k_distortion",
        "v_distortion", "use",
    ]  # fmt: skip
    assert rows["k4v2"]["bytes_per_token"] == 128 + 16 + 4
    assert rows["k4v4"]["ratio"] == 640 / 164
    for group in result["not_built"]:
        assert group["reason"]
        for name in group["formats"]:
            assert KVFormat.parse(name)


def test_formats_asked_for(kvfold: Any) -> None:
    result = kvfold("formats", "k4v3+sinks4", "turboquant", "4", "--json").json()
    assert [row["format"] for row in result["formats"]] == ["k4v3+sinks4", "k4v4"]
    assert result["formats"][0]["exact_bytes_per_sequence"] == 4 * 256 * 2
    assert result["not_built"] == []
    (mean,) = kvfold("formats", "k4tv4t+mean", "--json").json()["formats"]
    assert (mean["bytes_per_token"], mean["bits_per_element"], mean["ratio"]) == (134.25, 4.1953125, 512 / 134.25)
    text = kvfold("formats", "k4v3+sinks4").out
    assert "2,048 bytes of exact tokens" in text
    assert "not built" not in text


def test_every_usual_format_has_a_use() -> None:
    uses = [formats_command.use(KVFormat.parse(name)) for name in formats_command.USUAL]
    assert all(uses)
    assert formats_command.use(KVFormat.parse("k2v4")) == "values wider than keys: seldom the better way"
    assert formats_command.use(KVFormat.parse("k4v4+tail128")).endswith("first or last tokens exact")
    assert formats_command.use(KVFormat.parse("k4tv4t+mean")).endswith("smaller error; for keys with an offset")
    assert formats_command.use(KVFormat.parse("k4v4t")) == "a trellis on one side only"
    assert formats_command.use(KVFormat.parse("k8vf8")) == "larger than the default, smaller error"


@pytest.mark.parametrize("rule", ["unbiased", "plain", "nc", "mse"])
@pytest.mark.parametrize("name", ["1", "2", "3", "4", "2t", "3t", "4t"])
def test_expected_distortion_is_what_the_codec_does(rule: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    from kvfold import codecs
    from kvfold.rotation import rotate

    side = KVFormat.parse(f"k{name}v{name}+{rule}+pre1").k
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(int(side.bits)))
    stored = codecs.decode(*codecs.encode(x, side), side)
    squares = (stored - rotate(x)).square().sum(dim=-1) / x.square().sum(dim=-1)
    expected = formats_command.expected_distortion(side, 128)
    assert squares.mean().item() < (1.01 if side.family == "trellis" else 1.005) * expected
    # The formula has one cosine for all vectors; a scale fitted to each gains what theirs differ by.
    assert squares.mean().item() == pytest.approx(expected, rel=0.01 if rule == "plain" else 0.03)


@pytest.mark.parametrize("name", ["f8", "f8cast", "bf16", "f16", "f32"])
def test_expected_distortion_of_what_is_not_rotated(name: str) -> None:
    torch = pytest.importorskip("torch")
    from kvfold import codecs

    side = KVFormat.parse(f"k{name}v{name}").k
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    if side.lossless:  # for a model of that dtype
        x = x.to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[name]).float()
    squares = (codecs.decode(*codecs.encode(x, side), side) - x).square().sum() / x.square().sum()
    assert squares.item() == pytest.approx(formats_command.expected_distortion(side, 128), rel=0.07)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_table(kvfold: Any, model: Path) -> None:
    result = kvfold("plan", "--model", model, "--memory", "40GiB")
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line}
    assert lines["kbf16vbf16"] == ["147,456", "16.000", "291,264", "1.00", "8"]
    assert lines["k4v4"] == ["38,016", "4.125", "1,129,728", "3.88", "34"]
    assert result.out.startswith("Qwen3-8B: 36 full (8 KV heads of 128)\n42,949,672,960 bytes")


def test_plan_json(kvfold: Any, model: Path) -> None:
    formats = ["--format", "k4v4", "--format", "k8v4"]
    result = kvfold("plan", "--model", model / "config.json", "--memory", "40GiB", *formats, "--json").json()
    assert list(result) == [
        "model", "max_positions", "itemsize", "memory_bytes", "context", "page_size", "notes", "layers", "rows",
    ]  # fmt: skip
    assert (result["model"], result["max_positions"], result["context"]) == ("Qwen3-8B", 40960, 32768)
    assert [row["format"] for row in result["rows"]] == ["kbf16vbf16", "kf8vf8", "k4v4", "k8v4"]
    assert result["rows"][2] == {
        "format": "k4v4", "bytes_per_token": 38016, "bits_per_element": 4.125, "tokens": 1129728, "requests": 34,
        "ratio": 1129728 / 291264, "compressed_layers": 36, "uncompressed_layers": 0, "uncompressed": [],
    }  # fmt: skip
    assert result["layers"][0]["num_kv_heads"] == 8


def test_plan_by_hand_equals_plan_by_config(kvfold: Any, model: Path) -> None:
    by_config = kvfold("plan", "--model", model, "--memory", "40GiB", "--json").json()
    assert kvfold(*BY_HAND, "--json").json()["rows"] == by_config["rows"]
    mla = kvfold(*BY_HAND[:-2], "--head-size-v", "64", "--memory", "1GB", "--page-size", "16", "--json").json()
    assert (mla["page_size"], mla["rows"][0]["bytes_per_token"]) == (16, 36 * 8 * 192 * 2)


def test_plan_names_what_stays_uncompressed(kvfold: Any, model: Path) -> None:
    config = {**CONFIG, "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 30}
    (model / "config.json").write_text(json.dumps(config))
    text = kvfold("plan", "--model", model, "--memory", "1GiB", "--context", "50000").out
    assert "Not compressed, and counted: 6 layers: 6 sliding (8 KV heads of 128, window 1024)." in text
    assert "Note: the context of 50000 tokens is longer than the model's 40960." in text


def test_plan_of_a_cache_without_limit(kvfold: Any, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral", "sliding_window": 64}))
    assert "no limit" in kvfold("plan", "--model", model, "--memory", "1GiB").out
    rows = kvfold("plan", "--model", model, "--memory", "1GiB", "--json").json()["rows"]
    assert (rows[0]["tokens"], rows[0]["ratio"], rows[0]["bits_per_element"]) == (None, None, None)


def test_help_lists_the_keys_of_the_json(kvfold: Any) -> None:
    for argv in (["formats", "--json"], [*BY_HAND, "--json"]):
        text = kvfold(argv[0], "--help").out
        result = kvfold(*argv).json()
        for key in [*result, *result.get("rows", result.get("formats"))[0]]:
            assert key in text, key
