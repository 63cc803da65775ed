"""Formats of single layers: spelling, bytes, and what every place that takes a format makes of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold import PagedKVCache
from kvfold.errors import FormatError, NotBuiltError
from kvfold.formats import KVFormat
from kvfold.layerformats import ModelFormat, read_layers, spell_layers
from kvfold.layout import PageLayout
from kvfold.modelshape import FULL, LINEAR, SLIDING, LayerGroup, ModelShape, PlanError
from kvfold.planner import cache_bytes, compressed_bytes, plan, window_bytes
from kvfold.spelling import ALIASES, PRESETS, known_names

NAMES = ["k4v4", "k3v3", "k8v8", "k2v4+sinks4+tail128", "k3tv3t+mean", "kbf16vbf16", "kf8v4+vplain", *PRESETS]
FORMATS = st.sampled_from([KVFormat.parse(name) for name in NAMES])
OVERRIDES = st.lists(st.tuples(st.integers(0, 40), FORMATS), unique_by=lambda pair: pair[0], max_size=12)
MIXED = st.builds(lambda base, own: ModelFormat(base, tuple(own)), FORMATS, OVERRIDES)


def fmt(spec: str) -> ModelFormat:
    return ModelFormat.parse(spec)


# --- spelling ---------------------------------------------------------------------------------------------------------


@given(MIXED)
def test_text_and_json_round_trip(one: ModelFormat) -> None:
    assert ModelFormat.parse(str(one)) == one
    assert ModelFormat.parse(one.json()) == one
    assert ModelFormat.parse(json.dumps(one.json())) == one
    assert ModelFormat.parse(one) is one
    assert hash(ModelFormat.parse(str(one))) == hash(one)
    for layer in range(42):
        assert one.layer(layer) == dict(one.overrides).get(layer, one.base)


@given(FORMATS, OVERRIDES)
def test_equal_overrides_normalise_away(base: KVFormat, own: list[tuple[int, KVFormat]]) -> None:
    one = ModelFormat(base, tuple(own))
    assert one == ModelFormat(base, tuple(reversed(own)))
    assert one == ModelFormat(base, (*own, *((layer, base) for layer in range(41, 44))))
    assert [layer for layer, _ in one.overrides] == sorted(layer for layer, own_format in own if own_format != base)
    assert one.uniform is (one.formats == (base,)) is (not one.overrides)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("k3v3@0-1=k4v4@29=k8v8", "k3v3@0-1=k4v4@29=k8v8"),
        ("K3V3 @ 29 = K8V8 @ 1,0 = turboquant", "k3v3@0-1=k4v4@29=k8v8"),
        ("k3v3@5,0-1,3=k4v4", "k3v3@0-1,3,5=k4v4"),
        ("k3v3@0=k4v4@1=k4v4@2=k8v8@3=k4v4", "k3v3@0-1,3=k4v4@2=k8v8"),
        ("k3v3@0-3=k3v3", "k3v3"),
        ("3@0=4", "k3v3@0=k4v4"),
        ("kvfold_k3v3@0=bf16", "k3v3@0=kbf16vbf16"),
        ("k3v3+sinks4@0=k8v3+tail16", "k3v3+sinks4@0=k8v3+tail16"),
        ("metal:q8_0/q3_0@0=vllm:4bit_nc", "metal:q8_0/q3_0@0=vllm:4bit_nc"),
        ({"base": "k3v3", "layers": {"0-1": {"k": 4, "v": 4}, "29": 8}}, "k3v3@0-1=k4v4@29=k8v8"),
        ({"base": {"k": 3, "v": 2}}, "k3v2"),
        ('{"base": 3, "layers": {"7": 4}}', "k3v3@7=k4v4"),
        ({"k": 8, "v": 4}, "k8v4"),
        ('{"k": 8, "v": 4}', "k8v4"),
        (4, "k4v4"),
        (KVFormat.parse("k3v2"), "k3v2"),
    ],
    ids=str,
)
def test_spellings(spec: Any, text: str) -> None:
    assert str(ModelFormat.parse(spec)) == text


def test_what_one_format_takes_all_layers_take() -> None:
    for name in (*known_names(), *ALIASES, *PRESETS):
        assert "@" not in name
        assert ModelFormat.parse(name) == ModelFormat(KVFormat.parse(name))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("k3v3@", "behind @ come layers"),
        ("k3v3@0", "behind @ come layers"),
        ("k3v3@=k4v4", "neither a layer nor a range"),
        ("k3v3@a=k4v4", "'a' is neither"),
        ("k3v3@-1=k4v4", "'-1' is neither"),
        ("k3v3@3-1=k4v4", "write 1-3"),
        ("k3v3@0-99999=k4v4", "10000 at most"),
        ("k3v3@0=k4v4@0=k8v8", "layer 0 has two formats, k4v4 and k8v8"),
        ("k3v3@0=k9v9", "unknown format 'k9v9'"),
        ("k9v9@0=k3v3", "unknown format 'k9v9'"),
        ("k3v3@0=", "unknown format"),
        ("@0=k3v3", "unknown format"),
        ({"layers": {"0": "k3v3"}}, "no base beside layers"),
        ({"base": "k3v3", "layers": {"0": "k4v4"}, "sinks": 4}, r"keys \['sinks'\] do not go"),
        ({"base": "k3v3", "layers": "0"}, "not an object"),
        ({"base": "k3v3", "layers": {"x": "k4v4"}}, "'x' is neither"),
        ({"base": True}, "a format is"),
        ('{"base": "k3v3"', "begins like JSON"),
        (True, "a format is"),
    ],
    ids=str,
)
def test_what_is_no_format_is_refused(spec: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        ModelFormat.parse(spec)


@pytest.mark.parametrize("layer", [-1, True, 1.0, "0", 10_000])
def test_layers_are_whole_numbers(layer: Any) -> None:
    with pytest.raises(FormatError, match="whole number from 0 to 9999"):
        ModelFormat(KVFormat.parse("k3v3"), ((layer, KVFormat.parse("k4v4")),))


@given(st.sets(st.integers(0, 60)).filter(bool))
def test_lists_of_layers_round_trip(layers: set[int]) -> None:
    assert read_layers(spell_layers(sorted(layers)), "") == sorted(layers)


@given(st.dictionaries(st.integers(0, 40), FORMATS, min_size=1))
def test_of_layers_says_what_each_layer_stores(formats: dict[int, KVFormat]) -> None:
    one = ModelFormat.of_layers(formats)
    assert {layer: one.layer(layer) for layer in formats} == formats
    assert all(len(one.overrides) <= sum(own != other for own in formats.values()) for other in formats.values())
    with pytest.raises(FormatError, match="without layers"):
        ModelFormat.of_layers({})


def test_what_is_not_built_is_refused_wherever_it_stands() -> None:
    with pytest.raises(NotBuiltError, match="metal"):
        fmt("k3v3@7=metal:q8_0").require_built()
    assert fmt("k3v3@7=k4v4").require_built() == fmt("k3v3@7=k4v4")


def test_layers_that_the_model_does_not_have_or_compress() -> None:
    assert fmt("k3v3@0,3=k4v4").require_layers(4) == fmt("k3v3@0,3=k4v4")
    with pytest.raises(FormatError, match="layers 0 to 3, and no layer 4,29-30"):
        fmt("k3v3@2,4,29-30=k4v4").require_layers(4)
    with pytest.raises(FormatError, match=r"layers 0,2 are not compressed .* compressed are 1,3: name only these"):
        fmt("k3v3@0-3=k4v4").require_layers(4, [3, 1])


def test_it_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from kvfold.layerformats import ModelFormat; ModelFormat.parse('k3v3@0=k4v4'); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "take",
    [
        KVFormat.parse,
        lambda spec: PageLayout.of(spec, 64),
        lambda spec: PagedKVCache(spec, num_layers=2, num_kv_heads=1, head_size=64, num_pages=1),
    ],
)
@pytest.mark.parametrize("spec", ["k3v3@0=k4v4", {"base": "k3v3", "layers": {"0": "k4v4"}}, fmt("k3v3@0=k4v4")])
def test_what_takes_one_format_refuses_several(take: Any, spec: Any) -> None:
    with pytest.raises(FormatError, match="single layers"):
        take(spec)


# --- bytes ------------------------------------------------------------------------------------------------------------

QWEN3_8B = ModelShape.uniform(36, 8, 128)
FULL_A, FULL_B = LayerGroup(FULL, 3, 2, 64, 64), LayerGroup(FULL, 1, 1, 128, 64)
HYBRID = ModelShape(
    (LayerGroup(SLIDING, 2, 2, 64, 64, 100), FULL_A, LayerGroup(LINEAR, 1), FULL_B), order=(0, 1, 2, 1, 0, 3, 1)
)


def test_bytes_by_hand() -> None:
    """Of a token of a KV head of 128: k4v4 132 bytes, k3v3 100, k8v8 260."""
    one = fmt("k3v3@0-1=k4v4@29=k8v8")
    token = 8 * (33 * 100 + 2 * 132 + 260)
    assert cache_bytes(QWEN3_8B, one, 64) == 64 * token
    row = plan(QWEN3_8B, 2**30, 1000, [one])[-1]
    assert row.format == one
    assert row.bytes_per_token == token
    assert row.bits_per_element == 8 * token / (36 * 8 * 256)
    assert row.tokens == 2**30 // (64 * token) * 64
    exact = 8 * 256 * 2 * (2 * (4 + 16) + 4)
    assert cache_bytes(QWEN3_8B, "k3v3@0-1=k3v3+sinks4+tail16@7=k3v3+sinks4", 0) == exact


@given(MIXED.filter(lambda one: all(own.k.missing is None and own.v.missing is None for own in one.formats)))
def test_bytes_are_the_sum_over_the_layers(one: ModelFormat) -> None:
    shape = ModelShape.uniform(41, 2, 96, 64)
    for page_size in (16, 64):
        pages = [PageLayout.of(one.layer(layer), 96, 64, page_size).page_bytes for layer in range(41)]
        exact = [one.layer(layer).exact_bytes(96, 64) for layer in range(41)]
        assert cache_bytes(shape, one, 100, page_size) == 2 * (-(-100 // page_size) * sum(pages) + sum(exact))
        bits = one.bits_per_element(shape.compressed_layers, page_size)
        assert bits == pytest.approx(8 * sum(pages) / page_size / (41 * 160))


def test_layers_count_as_the_model_counts_them() -> None:
    assert HYBRID.compressed_layers == {1: FULL_A, 3: FULL_A, 5: FULL_B, 6: FULL_A}
    assert [group.kind for group in HYBRID.layers] == [SLIDING, FULL, LINEAR, FULL, SLIDING, FULL, FULL]
    (one,) = plan(HYBRID, 2**20, 100, ["k3v3@5=k8v8"])[2:]
    assert one.bytes_per_token == 3 * 2 * 52 + 128 + 64 + 4
    assert cache_bytes(HYBRID, "k3v3@5=k8v8", 64) == 64 * (one.bytes_per_token + 2 * 2 * 128 * 2)
    assert compressed_bytes(HYBRID, "k3v3@5=k8v8", 64) == 64 * one.bytes_per_token
    assert window_bytes(HYBRID, 1000) == 100 * 2 * 2 * 128 * 2
    for spec, says in (("k3v3@7=k4v4", "layers 0 to 6"), ("k3v3@0-6=k4v4", "0,2,4 are not compressed")):
        with pytest.raises(FormatError, match=says):
            cache_bytes(HYBRID, spec, 64)
        with pytest.raises(FormatError, match=says):
            plan(HYBRID, 2**20, 64, [spec])


def test_the_order_of_layers_is_that_of_the_config() -> None:
    config = {
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "dtype": "bfloat16",
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    assert (shape.order, list(shape.compressed_layers)) == ((0, 1, 0, 1), [1, 3])
    own = {**config, "layer_types": ["full_attention"] * 4}
    assert ModelShape.from_config(own).groups == ModelShape.uniform(4, 2, 64).groups
    assert ModelShape.from_config(own).order == ()
    with pytest.raises(PlanError, match="order has"):
        ModelShape((FULL_A,), order=(0, 0))


# --- transformers -----------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

from tiny_models import prompt, tiny  # noqa: E402  # they need transformers
from transformers import DynamicCache  # noqa: E402

from kvfold import KVCache, attach, detach  # noqa: E402
from kvfold.commands.evaluation import bits_per_element  # noqa: E402


@pytest.fixture
def llama() -> Any:
    model = tiny("llama")
    attach(model)
    yield model
    detach(model)


def answer(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(**prompt(), max_new_tokens=12, do_sample=False, past_key_values=cache, **options)
    return out


@pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize("order", ["k1v1+tail64@1=exact", "exact@1=k1v1+sinks64", "k1v1+sinks20+tail44@1=k1v1+tail64"])
def test_each_layer_has_its_own_format(llama: Any, order: str, chunk: str, max_length: int | None) -> None:
    """Where every layer loses nothing, each in its own way, the answer is the model's."""
    for options in ({}, {"prefill_chunk_size": 7}):
        wanted = answer(llama, DynamicCache(config=llama.config), **options)
        got = answer(llama, KVCache(llama.config, order, max_length=max_length, chunk=chunk), **options)
        assert torch.equal(got, wanted)
    lossy = order.replace("+tail64", "").replace("+sinks64", "").replace("+sinks20+tail44", "")
    assert not torch.equal(answer(llama, KVCache(llama.config, lossy, max_length=max_length, chunk=chunk)), wanted)


@pytest.mark.parametrize("spec", ["k4v4@1=k2v3", "k4v4+sinks4@0=k8v8+mean+tail16", "k3tv2t@0=kf8vf8"])
def test_planned_bytes_are_live_bytes(llama: Any, spec: str) -> None:
    cache = KVCache.for_model(llama, spec)
    answer(llama, cache)
    memory = cache.memory()
    shape = replace(ModelShape.from_config(llama.config.to_dict()), itemsize=4)
    assert memory.compressed == cache_bytes(shape, spec, memory.capacity, sequences=memory.rows)
    assert bits_per_element(cache) == cache.format.bits_per_element(shape.compressed_layers, 64)
    assert [str(layer.format) for layer in cache.compressed_layers.values()] == [
        str(fmt(spec).layer(index)) for index in (0, 1)
    ]
    assert spec in repr(cache)


def test_a_cache_of_several_formats_is_copied_cropped_and_reordered(llama: Any) -> None:
    cache = KVCache(llama.config, "k4v4@1=k3v2+sinks2", chunk="packed", page_size=16)
    ids = prompt()["input_ids"]
    with torch.no_grad():
        llama(ids[:, :10], past_key_values=cache)
        fork = copy.deepcopy(cache)
        llama(ids[:, 10:20], past_key_values=fork)
        fork.crop(-10)
        fork.reorder_cache(torch.tensor([1, 0]))
        fork.batch_repeat_interleave(2)
        one = llama(ids[:, 10:11], past_key_values=cache).logits[[1, 1, 0, 0]]
        other = llama(ids[[1, 1, 0, 0], 10:11], past_key_values=fork).logits
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_a_cache_of_several_formats_compiles(llama: Any) -> None:
    cache = KVCache(llama.config, "k4v4@1=k3v2+sinks2", max_length=64)
    ids = prompt()["input_ids"]
    step = torch.compile(llama, backend="eager", fullgraph=True)
    with torch.no_grad():
        llama(ids[:, :20], past_key_values=cache)
        eager = copy.deepcopy(cache)
        got = step(ids[:, 20:21], past_key_values=cache).logits
        wanted = llama(ids[:, 20:21], past_key_values=eager).logits
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def test_layers_that_are_not_compressed_have_no_format(llama: Any) -> None:
    with pytest.raises(FormatError, match="layers 0 to 1"):
        KVCache(llama.config, "k4v4@2=k8v8")
    with pytest.raises(FormatError, match=r"layers 0 are not compressed .* compressed are 1"):
        KVCache(llama.config, "k4v4@0=k8v8", skip_layers=[0])
    gemma = tiny("gemma3_text").config
    with pytest.raises(FormatError, match=r"layers 0-1 are not compressed .* compressed are 2"):
        KVCache(gemma, "k4v4@0-2=k8v8")
    assert str(KVCache(gemma, "k4v4@2=k8v8").compressed_layers[2].format) == "k8v8"
    small = copy.deepcopy(llama.config)
    small.head_dim = 4
    with pytest.raises(FormatError, match="too small"):
        KVCache(small, "bf16@1=k4v4")


# --- the command line -------------------------------------------------------------------------------------------------

BY_HAND = ("--layers", 3, "--kv-heads", 2, "--head-size", 32)


def test_plan_and_storage(kvfold: Any, kvfold_on_cpu: Any, tmp_path: Path) -> None:
    one = "k3v3@0=k4v4+sinks4@2=kf8vf8+tail8"
    planned = kvfold("plan", *BY_HAND, "--memory", "1MiB", "--format", one, "--json")
    row = planned.json()["rows"][-1]
    assert (row["format"], row["bytes_per_token"]) == (one, 2 * (2 * 12 + 4 + 2 * 16 + 4 + 2 * 32 + 4))
    file = tmp_path / "storage.json"
    result = kvfold_on_cpu("storage", *BY_HAND, "--context", 100, "--format", one, "--json", file)
    assert result.code == 0, result.err
    assert f"{one}: 1 full (2 KV heads of 32) in k4v4+sinks4, up to 100 tokens" in result.err
    live = json.loads(file.read_text())["rows"][-1]
    assert live["pages"] == live["capacity"] * row["bytes_per_token"]
    assert live["exact"] == 2 * 64 * 2 * (4 + 8)
    assert live["planned_equal"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("plan", *BY_HAND, "--memory", "1MiB", "--format", "k3v3@3=k4v4"), "layers 0 to 2, and no layer 3"),
        (("storage", *BY_HAND, "--format", "k3v3@3=k4v4"), "layers 0 to 2, and no layer 3"),
        (("formats", "k3v3@0=k4v4"), "single layers go where the cache of a whole model"),
        (("bench", "--format", "k3v3@0=k4v4"), "single layers go where the cache of a whole model"),
        (("generate", "--prompt", "x", "--format", "k3v3@0"), "behind @ come layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_command_line_refuses(kvfold: Any, argv: tuple[Any, ...], says: str) -> None:
    result = kvfold(*argv)
    assert result.code == 2
    assert says in result.err


def test_a_report_plans_for_the_layers_that_the_files_name(kvfold_on_cpu: Any, kvfold: Any, tmp_path: Path) -> None:
    """Two layers of six are compressed, and the file says which."""
    config = {
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128,
        "sliding_window": 16, "dtype": "bfloat16",
        "layer_types": [*["sliding_attention", "linear_attention", "full_attention"] * 2],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, stored, planned = "k3v3@5=k4v4", tmp_path / "storage.json", tmp_path / "plan.json"
    argv = ("--model", tmp_path, "--format", one)
    result = kvfold_on_cpu("storage", *argv, "--context", 100, "--json", stored)
    assert result.code == 0, result.err
    layers = json.loads(stored.read_text())["layers"]
    assert [(layer["kind"], layer["at"]) for layer in layers] == [("sliding", "0,3"), ("full", "2,5")]
    planned.write_text(kvfold("plan", *argv, "--memory", "1MiB", "--json").out)
    page = tmp_path / "report.html"
    result = kvfold("report", stored, planned, "--output", page)
    assert result.code == 0, result.err
    assert one in page.read_text()
    assert "no capacity curve" not in page.read_text()
    broken = json.loads(stored.read_text())
    broken["layers"][0]["at"] = "0,2"
    stored.write_text(json.dumps(broken))
    result = kvfold("report", stored, planned, "--output", page)
    assert "at is not 2 layers of its own" in result.err + page.read_text()
