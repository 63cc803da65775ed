"""`kvfold storage`: live bytes against formulas, against the planner, and against a model's own cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfold import KVCache
from kvfold.commands import storage as command
from kvfold.commands.evaluation import forward
from kvfold.commands.measure import Subject
from kvfold.errors import KVFoldError
from kvfold.formats import KVFormat
from kvfold.modelshape import FULL, SLIDING, LayerGroup, ModelShape

pytest.importorskip("transformers")

from tiny_models import tiny

from kvfold.eval import storage
from kvfold.integrations.transformers import detach
from kvfold.integrations.transformers.layers import PackedLayer

BY_HAND = ("--layers", 3, "--kv-heads", 2, "--head-size", 32)
GEMMA = {
    "model_type": "gemma3_text", "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 1,
    "head_dim": 16, "sliding_window": 100, "torch_dtype": "float32",
}  # fmt: skip
FORMATS = ["kbf16vbf16", "kf8vf8", "k8v8", "k4v4", "k3v2", "k4v4+sinks4+tail128"]


@pytest.fixture
def kvfold(kvfold_on_cpu: Any) -> Any:
    return kvfold_on_cpu


@pytest.fixture
def figures(kvfold: Any, tmp_path: Path) -> Any:
    """The JSON of one run."""

    def run(*argv: object) -> Any:
        path = tmp_path / "storage.json"
        result = kvfold("storage", *argv, "--json", path)
        assert result.code == 0, result.err
        return json.loads(path.read_text())

    return run


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    folder = tmp_path / "gemma"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GEMMA))
    return folder


# --- what a layer holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("piece", [64, 100, 4096])
def test_live_bytes_are_those_of_the_format(monkeypatch: pytest.MonkeyPatch, spec: str, piece: int) -> None:
    monkeypatch.setattr(storage, "PIECE", piece)
    fmt, lengths = KVFormat.parse(spec), (1, 2, 63, 64, 65, 128, 129, 300, 512)
    group = LayerGroup(FULL, 9, 2, 32, 16)
    for length, live in zip(lengths, storage.fill(group, fmt, lengths, layers=2), strict=True):
        assert live.tokens == length
        assert live.capacity in (-(-length // 64) * 64, -(-length // 128) * 128)
        assert live.pages == 2 * live.capacity * fmt.bytes_per_token(32, 16)
        assert live.exact == 2 * (fmt.sinks + fmt.tail) * (32 + 16) * 2
        assert live.tables == 4 * live.capacity // 64
        assert (live.plain, live.other) == (0, 0)
        assert live.total == live.pages + live.exact + live.tables


def test_the_ordinary_cache_and_windows() -> None:
    full, sliding = LayerGroup(FULL, 9, 2, 32, 16), LayerGroup(SLIDING, 9, 2, 32, 16, window=100)
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        for live in storage.fill(full, None, (1, 130), dtype=dtype):
            assert live == storage.Live(live.tokens, live.tokens, plain=live.tokens * 2 * 48 * size)
        for live in storage.fill(sliding, KVFormat.parse("k4v4"), (50, 99, 100, 101, 300), dtype=dtype):
            assert live.plain == min(100, live.tokens) * 2 * 48 * size
            assert live.other == 8  # transformers keeps the window's length in a tensor


def test_everything_that_a_layer_refers_to_is_counted_once() -> None:
    buffer = torch.zeros(100, dtype=torch.uint8)
    pages = torch.zeros(3, 10, dtype=torch.uint8)
    sinks, table = (torch.zeros(5), torch.zeros(5)), torch.zeros(7, dtype=torch.int32)
    scratch = {"a": [buffer, buffer[:3]], "b": (buffer.view(10, 10),)}
    buffers = {"pages": pages[:1], "sinks": sinks, "ring": None, "block_table": table, "scratch": scratch}
    layer = SimpleNamespace(**buffers, capacity=64, length=3, name="k4v4")
    assert storage.live_bytes(layer, 3) == storage.Live(3, 64, pages=30, exact=40, tables=28, other=100)
    layer.again = pages  # the same memory under another name
    assert storage.live_bytes(layer, 3).total == 198


def test_layers_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update, calls = PackedLayer.update, []

    def odd(self: Any, *args: Any) -> Any:
        calls.append(self)
        self.leak = torch.zeros(len(calls))
        return update(self, *args)

    monkeypatch.setattr(PackedLayer, "update", odd)
    with pytest.raises(KVFoldError, match="layers that are alike hold different bytes"):
        list(storage.fill(LayerGroup(FULL, 9, 2, 32, 32), KVFormat.parse("k4v4"), (5,), layers=2))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["k4v4", "k3v3+sinks4+tail32"])
def test_bytes_are_those_of_a_models_own_cache(figures: Any, tmp_path: Path, spec: str) -> None:
    model, tokens = tiny("llama"), 150
    model.save_pretrained(tmp_path)
    cache = KVCache.for_model(model, spec)
    ids = torch.randint(3, 97, (1, tokens))
    with torch.no_grad():
        for piece in (ids[:, :-1], ids[:, -1:]):
            forward(Subject(model, None), piece, cache)
    detach(model)
    memory = cache.memory()
    row = figures("--model", tmp_path, "--context", tokens, "--format", spec)["rows"][1]
    assert (row["pages"] + row["exact"], row["capacity"]) == (memory.compressed, memory.capacity)
    tables = [layer.block_table.nbytes for layer in cache.compressed_layers.values()]
    assert row["tables"] == sum(tables)


def test_json(figures: Any, kvfold: Any) -> None:
    found = figures(*BY_HAND, "--context", 300, 64, "--format", "k4v4", "turboquant", "k4v4+tail128")
    assert found["settings"]["contexts"] == [64, 300]
    assert found["layers"][0]["live_layers"] == found["layers"][0]["layers"] == 3
    assert found["kept_bytes"] is None
    rows = {(row["tokens"], row["format"]): row for row in found["rows"]}
    assert list(rows) == [(n, name) for n in (64, 300) for name in ("none", "k4v4", "k4v4+tail128")]
    vector = KVFormat.parse("k4v4").bytes_per_token(32)
    row = rows[300, "k4v4+tail128"]
    pages, exact, tables = 3 * 2 * 384 * vector, 3 * 2 * 128 * 64 * 2, 3 * 4 * 6
    total = pages + exact + tables
    assert row == {
        "format": "k4v4+tail128", "tokens": 300, "capacity": 384, "pages": pages, "exact": exact, "windows": 0,
        "tables": tables, "other": 0, "total": total, "bytes_per_token": total / 300,
        "planned_bytes": pages + exact, "planned_for_tokens": 3 * 2 * 320 * vector + exact, "planned_equal": True,
        "ratio": 300 * 3 * 2 * 64 * 2 / total,
    }  # fmt: skip
    plain = rows[300, "none"]
    assert (plain["pages"], plain["total"], plain["ratio"], plain["planned_equal"]) == (230400, 230400, 1, True)
    usage = kvfold("storage", "--help").out
    for key in [*found, *found["layers"][0], *row]:
        assert key in usage, key


@pytest.mark.parametrize("tokens", [1, 64, 99, 100, 101, 129, 640])
def test_windows_agree_with_the_planner_to_the_byte(figures: Any, gemma: Path, tokens: int) -> None:
    found = figures("--model", gemma, "--context", tokens, "--format", *FORMATS)
    shape = ModelShape.from_config(gemma)
    assert {group.kind: group.layers for group in shape.groups} == {SLIDING: 10, FULL: 2}
    for row in found["rows"]:
        size = 2 if row["format"] == "none" else 4
        assert row["windows"] == 10 * min(100, tokens) * 32 * size
        assert row["pages"] + row["exact"] + row["windows"] == row["planned_bytes"]
        assert row["planned_equal"] is True
        assert 0 <= row["capacity"] - tokens < 128
        assert row["other"] == 10 * 8


def test_few_layers_stand_for_all(figures: Any, kvfold: Any, gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--model", gemma, "--context", 130, "--format", "k4v4+sinks4")
    full = figures(*argv)
    assert [layer["live_layers"] for layer in full["layers"]] == [10, 2]
    for few in (1, 3):
        scaled = figures(*argv, "--live-layers", few)
        assert [layer["live_layers"] for layer in scaled["layers"]] == [few, min(few, 2)]
        assert scaled["rows"] == full["rows"]
    text = kvfold("storage", *argv, "--live-layers", 1).out
    assert "allocated: 1 of 10 sliding and 1 of 2 full layers, whose bytes are multiplied" in text
    assert "allocated: all layers" in kvfold("storage", *argv).out
    monkeypatch.setattr(command, "LIVE_ELEMENTS", 2 * 130 * 32 * 4)  # room for four layers of two groups
    assert [layer["live_layers"] for layer in figures(*argv)["layers"]] == [4, 2]
    monkeypatch.setattr(command, "LIVE_ELEMENTS", 1)
    assert [layer["live_layers"] for layer in figures(*argv)["layers"]] == [1, 1]


def test_table(kvfold: Any, gemma: Path) -> None:
    result = kvfold("storage", *BY_HAND, "--context", 128, "--format", "k4v4", "--format", "k8v4")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "model: 3 full (2 KV heads of 32)"
    lines = [line.split() for line in result.out.splitlines() if "yes" in line]
    assert [line[0] for line in lines] == ["none", "k4v4", "k8v4"]
    assert lines[1] == ["k4v4", "128", "0", "27,648", "24", "27,672", "27,648", "yes", "216", "3.55", "x"]
    steps = [f"{name}: 3 full (2 KV heads of 32), up to 128 tokens" for name in ("none", "k4v4", "k8v4")]
    assert result.err.splitlines() == steps
    assert "exact" not in result.out
    text = kvfold("storage", "--model", gemma, "--context", 128, "--format", "k4v4+tail128").out
    assert "which is pages + exact + windows; block tables are beside it" in text
    assert "in the model's dtype (float32)" in text


def test_bytes_that_are_not_planned_are_an_error(kvfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = PackedLayer._allocate

    def generous(self: Any, tokens: int) -> None:
        allocate(self, tokens)
        self.pages = torch.cat([self.pages, self.pages.new_zeros(self.pages[:, :1].shape)], dim=1)[:, :-1]

    argv = ("storage", *BY_HAND, "--context", 64, "--format", "k4v4", "kf32vf32")
    monkeypatch.setattr(PackedLayer, "_allocate", generous)  # memory that nobody sees: a view keeps a page too many
    result = kvfold(*argv)
    assert result.code == 1
    assert "kvfold: error: k4v4, kf32vf32: live bytes and planned bytes differ" in result.err
    assert [line.split()[0] for line in result.out.splitlines() if " NO " in line] == ["k4v4", "kf32vf32"]
    monkeypatch.setattr(PackedLayer, "_allocate", allocate)
    assert kvfold(*argv).code == 0


def test_plot(kvfold: Any, gemma: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, begin in (("s.png", b"\x89PNG"), ("s.svg", b"<?xml")):
        path = tmp_path / name
        result = kvfold("storage", "--model", gemma, "--context", 64, 300, "--format", "k4v4", "--plot", path)
        assert result.code == 0, result.err
        assert path.read_bytes().startswith(begin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(figures: Any) -> None:
    argv = ("--layers", 3, "--kv-heads", 2, "--head-size", 128, "--context", 64, 300, "--format", "k4v4", "k3v3+tail32")
    on_gpu, on_cpu = figures(*argv, "--device", "cuda"), figures(*argv)
    assert on_gpu["rows"] == on_cpu["rows"]
    assert on_gpu["kept_bytes"] >= 0


# --- refused before anything is allocated -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "no model: give --model, or --layers"),
        ("--layers 3", "also needs --kv-heads, --head-size"),
        ("--model x --layers 3", "--model and --layers exclude each other"),
        ("--model Qwen/Qwen3-8B", "nothing is downloaded"),
        ("{} --format k9v9", "unknown format 'k9v9'"),
        ("{} --format k4qv4q", "not built yet"),
        ("{} --context 0", "--context: '0'"),
        ("{} --context 32k", "--context: '32k'"),
        ("{} --live-layers 0", "--live-layers: '0'"),
        ("{} --page-size 48", "choose from 16, 32, 64"),
        ("{} --device gpu", "'gpu' is not one of auto, cpu, cuda"),
        ("{} --json /nowhere/f.json", "there is no folder /nowhere"),
        ("{} --plot /tmp", "/tmp is a folder"),
        ("--layers 3 --kv-heads 2 --head-size 4 --format bf16 k4v4", "head size 4 is too small for k4v4"),
    ],
)
def test_wrong_usage(kvfold: Any, argv: str, words: str) -> None:
    result = kvfold("storage", *argv.format(" ".join(map(str, BY_HAND))).split())
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("kvfold: error: ")
    assert words in result.err


def test_a_model_without_full_attention(kvfold: Any, gemma: Path) -> None:
    (gemma / "config.json").write_text(json.dumps({**GEMMA, "layer_types": ["sliding_attention"] * 12}))
    result = kvfold("storage", "--model", gemma, "--context", 64)
    assert result.code == 2
    assert "has no layer of full attention, so a compressed cache stores nothing: kvfold plan says" in result.err


def test_without_transformers(kvfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvfold.eval.storage", None)
    result = kvfold("storage", *BY_HAND, "--context", 64)
    assert result.code == 2
    assert "pip install 'kvfold[transformers]'" in result.err


def test_running_out_of_memory_is_an_error_with_a_way_out(kvfold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(storage, "fill", full)
    result = kvfold("storage", *BY_HAND, "--context", 64)
    assert result.code == 1
    assert "Tried to allocate 2 GiB.; give --live-layers 1, a smaller --context, or --device cpu" in result.err
