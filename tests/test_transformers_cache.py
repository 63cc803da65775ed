"""The cache object of the transformers integration: its operations, refusals, memory and compilation."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tiny_models import CONFIGS, prompt, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from kvfold import KVCache, KVFormat, attach, detach
from kvfold.errors import CapacityError, FormatError, NotBuiltError, ShapeError, UnsupportedModelError
from kvfold.integrations.transformers import layers
from kvfold.integrations.transformers.attention import LazyPackedKV, attention_forward
from kvfold.layerformats import ModelFormat
from kvfold.planner import ModelShape, cache_bytes

STATIC = pytest.mark.parametrize("max_length", [None, 64], ids=["dynamic", "static"])


@pytest.fixture
def llama():  # type: ignore[no-untyped-def]
    model = tiny("llama")
    attach(model)
    yield model
    detach(model)


def logits(model, ids: torch.Tensor, cache) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits[:, -1]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-4)


def test_the_reference_model_is_not_trivial(llama) -> None:  # type: ignore[no-untyped-def]
    """Equal tokens mean something only if they depend on the prompt and are not all the same."""
    out = llama.generate(**prompt(), max_new_tokens=12, do_sample=False)[:, 21:]
    assert len(out.unique()) > 6
    assert not torch.equal(out[0], out[1])


@STATIC
@pytest.mark.parametrize("chunk", ["exact", "packed"])
@pytest.mark.parametrize("fmt", ["k1v1+tail64", "k1v1+sinks64", "k2v2+sinks20+tail44"])
@pytest.mark.parametrize("own", [False, True], ids=["kvfold", "sdpa"])
def test_exact_tokens_really_are_exact(llama, fmt: str, chunk: str, max_length: int | None, own: bool) -> None:  # type: ignore[no-untyped-def]
    """A one-bit cache of which every token is also a sink or in the tail loses nothing."""
    if own:
        detach(llama)
    for options in ({}, {"prefill_chunk_size": 7}):
        wanted = llama.generate(
            **prompt(), max_new_tokens=12, do_sample=False, past_key_values=DynamicCache(config=llama.config), **options
        )
        cache = KVCache(llama.config, fmt, max_length=max_length, chunk=chunk)
        got = llama.generate(**prompt(), max_new_tokens=12, do_sample=False, past_key_values=cache, **options)
        assert torch.equal(got, wanted)


@STATIC
def test_one_bit_without_exact_tokens_does_lose(llama, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    wanted = llama.generate(**prompt(), max_new_tokens=12, do_sample=False)
    got = llama.generate(
        **prompt(),
        max_new_tokens=12,
        do_sample=False,
        past_key_values=KVCache(llama.config, "k1v1", max_length=max_length),
    )
    assert not torch.equal(got, wanted)


@STATIC
@pytest.mark.parametrize("fmt", ["exact", "k4v4", "k3v2+sinks2+tail5"])
def test_crop_forgets(llama, fmt: str, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=1, tokens=30)["input_ids"]
    cropped = KVCache(llama.config, fmt, max_length=max_length, chunk="packed", page_size=16)
    logits(llama, ids[:, :20], cropped)
    logits(llama, prompt(rows=1, tokens=9)["input_ids"], cropped)
    cropped.crop(0)
    cropped.crop(-9)
    assert int(cropped.get_seq_length()) == 20
    fresh = KVCache(llama.config, fmt, max_length=max_length, chunk="packed", page_size=16)
    logits(llama, ids[:, :20], fresh)
    a, b = logits(llama, ids[:, 20:], cropped), logits(llama, ids[:, 20:], fresh)
    if "tail" in fmt:  # what slid out of the tail comes back packed: close to, not equal to, never having left
        assert (a - b).abs().mean() < 0.35 * b.std()
    else:
        assert close(a, b)


@STATIC
def test_crop_refuses_nonsense(llama, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4", max_length=max_length)
    cache.crop(-1)  # nothing is stored yet: nothing to do, as in transformers
    logits(llama, prompt(rows=1, tokens=5)["input_ids"], cache)
    with pytest.raises(ValueError, match="crop takes minus"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cannot remove 6 of 5"):
        cache.crop(-6)


@STATIC
@pytest.mark.parametrize("fmt", ["k4v4", "k4tv3t+mean", "k3v3+sinks2+tail4"])
def test_rows_move_bit_for_bit(llama, fmt: str, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=3, tokens=20)["input_ids"]
    step = torch.tensor([[5], [6], [7]])
    order = torch.tensor([2, 0, 0])
    cache = KVCache(llama.config, fmt, max_length=max_length)
    logits(llama, ids, cache)
    before = [buffer.clone() for layer in cache.compressed_layers.values() for buffer in layer.buffers()]
    cache.reorder_cache(order)
    after = [buffer for layer in cache.compressed_layers.values() for buffer in layer.buffers()]
    assert all(torch.equal(new, old[order]) for new, old in zip(after, before, strict=True))
    moved = KVCache(llama.config, fmt, max_length=max_length)
    logits(llama, ids[order], moved)
    assert close(logits(llama, step, cache), logits(llama, step, moved))


def test_repeat_and_select(llama) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=2, tokens=20)["input_ids"]
    cache = KVCache(llama.config, "k4v4+tail4")
    logits(llama, ids, cache)
    cache.batch_repeat_interleave(3)
    wanted = KVCache(llama.config, "k4v4+tail4")
    logits(llama, ids.repeat_interleave(3, 0), wanted)
    step = torch.arange(3, 9)[:, None]
    kept = copy.deepcopy(cache)
    assert close(logits(llama, step, cache), logits(llama, step, wanted))
    kept.batch_select_indices(torch.tensor([0, 5]))
    assert close(logits(llama, step[[0, 5]], kept), logits(llama, step, copy.deepcopy(wanted))[[0, 5]]) is False
    wanted.crop(-1)
    wanted.batch_select_indices(torch.tensor([0, 5]))
    assert close(logits(llama, step[[0, 5]], wanted), logits(llama, step[[0, 5]], _after(llama, ids[[0, 1]])))


def _after(model, ids: torch.Tensor) -> KVCache:  # type: ignore[no-untyped-def]
    cache = KVCache(model.config, "k4v4+tail4")
    logits(model, ids, cache)
    return cache


@STATIC
def test_reset_is_like_new(llama, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4+sinks2+tail4", max_length=max_length)
    first = llama.generate(**prompt(), max_new_tokens=8, do_sample=False, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(llama.generate(**prompt(), max_new_tokens=8, do_sample=False, past_key_values=cache), first)


@STATIC
def test_deepcopy_of_a_prefilled_cache_is_independent(llama, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=1, tokens=20)["input_ids"]
    cache = KVCache(llama.config, "k4v4+tail4", max_length=max_length)
    logits(llama, ids, cache)
    twin = copy.deepcopy(cache)
    assert twin.compressed_layers[0].config is cache.compressed_layers[0].config
    a = logits(llama, torch.tensor([[5]]), cache)
    logits(llama, torch.tensor([[9]]), cache)
    assert int(twin.get_seq_length()) == 20
    assert torch.equal(logits(llama, torch.tensor([[5]]), twin), a)


def test_packed_chunks_do_not_depend_on_where_they_are_cut(llama) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=1, tokens=40)["input_ids"]
    results = []
    for cuts in ((40,), (1, 39), (17, 16, 7), (8,) * 5):
        cache = KVCache(llama.config, "k3v3", chunk="packed", page_size=16)
        for part in ids.split(list(cuts), dim=1):
            last = logits(llama, part, cache)
        results.append(last)
    assert all(close(result, results[0]) for result in results)


@pytest.mark.parametrize("fmt", ["exact", "k4v4", "k4v4+sinks2+tail4"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_decoding_compiles_as_one_graph(model_type: str, fmt: str) -> None:
    model = tiny(model_type)
    attach(model)
    ids = prompt(rows=2, tokens=12)["input_ids"]
    eager, compiled = (KVCache(model.config, fmt, max_length=32) for _ in range(2))
    logits(model, ids, eager)
    logits(model, ids, compiled)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    for token in (5, 6, 7, 8):
        one = torch.full((2, 1), token)
        assert close(logits(step, one, compiled), logits(model, one, eager))
    assert counter.frame_count <= 2  # no recompilation per step
    detach(model)


@pytest.mark.slow
def test_decoding_compiles_with_inductor(llama) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(rows=2, tokens=12)["input_ids"]
    eager, compiled = (KVCache(llama.config, "k4v4", max_length=32) for _ in range(2))
    logits(llama, ids, eager)
    logits(llama, ids, compiled)
    torch._dynamo.reset()
    step = torch.compile(llama, fullgraph=True)
    for token in (5, 6, 7):
        one = torch.full((2, 1), token)
        assert close(logits(step, one, compiled), logits(llama, one, eager))


@pytest.mark.parametrize(
    "fmt",
    [
        "k4v4",
        "k3v2",
        "k3tv2t",
        "k4v4+mean",
        "k4tv4t+mean+sinks4+tail16",
        "kf8vf8",
        "k4v4+sinks4+tail16",
        "bf16",
        "exact",
    ],
)
@pytest.mark.parametrize("max_length", [None, 100])
def test_live_bytes_equal_the_planners(llama, fmt: str, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, fmt, max_length=max_length)
    llama.generate(**prompt(rows=2, tokens=60), max_new_tokens=10, do_sample=False, past_key_values=cache)
    memory = cache.memory()
    shape = ModelShape.uniform(layers=2, kv_heads=2, head_size=32, itemsize=4)
    assert memory.tokens == 69
    assert memory.total == memory.compressed == cache_bytes(shape, fmt, memory.capacity, sequences=2)


def test_no_dequantised_copy_while_decoding(llama, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def refuse(self: LazyPackedKV) -> torch.Tensor:
        raise AssertionError("the whole cache was de-quantised")

    monkeypatch.setattr(LazyPackedKV, "tensor", refuse)
    cache = KVCache(llama.config, "k4v4")
    llama.generate(**prompt(), max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert not any(layer.needs_tensors for layer in cache.compressed_layers.values())


def test_a_layer_remembers_that_its_model_computes_with_tensors() -> None:
    model = tiny("jetmoe")
    attach(model)
    cache = KVCache(model.config, "k4v4")
    model.generate(**prompt(), max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert all(layer.needs_tensors for layer in cache.compressed_layers.values())


def test_bfloat16_models(llama) -> None:  # type: ignore[no-untyped-def]
    model = copy.deepcopy(llama).bfloat16()
    attach(model)
    cache = KVCache(model.config, "k8v8")
    out = logits(model, prompt(rows=1, tokens=30)["input_ids"], cache)
    out = logits(model, torch.tensor([[5]]), cache)
    wanted = logits(llama, torch.tensor([[5]]), _prefilled(llama))
    assert out.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(out.float() - wanted) < 0.1 * torch.linalg.vector_norm(wanted)


def _prefilled(model) -> DynamicCache:  # type: ignore[no-untyped-def]
    cache = DynamicCache(config=model.config)
    logits(model, prompt(rows=1, tokens=30)["input_ids"], cache)
    return cache


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "k4v44"}, FormatError, "did you mean"),
        ({"format": "k3qv3q"}, NotBuiltError, "not built yet"),
        ({"format": "k4v2.5+mean"}, NotBuiltError, "not built yet"),
        ({"page_size": 48}, FormatError, "page_size 48"),
        ({"chunk": "exakt"}, FormatError, "'exact', 'packed'"),
        ({"max_length": 0}, FormatError, "positive"),
        ({"skip_layers": [7]}, FormatError, "layers 0 to 1"),
        ({"skip_layers": [0, 1]}, UnsupportedModelError, "no layer that can be compressed"),
    ],
)
def test_refused_at_creation(llama, options: dict, error: type[Exception], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        KVCache(llama.config, **options)


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config

    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        KVCache(T5Config())


def test_a_fixed_cache_keeps_its_rows(llama) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4", max_length=20)
    logits(llama, prompt(rows=2, tokens=5)["input_ids"], cache)
    with pytest.raises(UnsupportedModelError, match="leave max_length out"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedModelError, match="leave max_length out"):
        cache.batch_select_indices(torch.tensor([0]))


def test_skipped_layers_stay_uncompressed(llama) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4", skip_layers=[0])
    assert list(cache.compressed_layers) == [1]
    assert "0: DynamicLayer" in repr(cache)
    llama.generate(**prompt(), max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert cache.memory().uncompressed == 2 * 2 * 2 * 24 * 32 * 4


def test_a_full_cache_says_so(llama) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4", max_length=20)
    with pytest.raises(CapacityError, match="larger max_length"):
        logits(llama, prompt(rows=1, tokens=21)["input_ids"], cache)


@pytest.mark.parametrize("shape", [(1, 2, 3, 32), (2, 3, 3, 32), (2, 2, 3, 64)])
def test_changed_shapes_are_refused(llama, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4")
    cache.update(torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32), 0)
    with pytest.raises(ShapeError, match="fresh cache"):
        cache.update(torch.randn(shape), torch.randn(shape), 0)


def test_integer_keys_are_refused(llama) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ShapeError, match="floating"):
        KVCache(llama.config).update(torch.ones(1, 2, 5, 32).int(), torch.ones(1, 2, 5, 32).int(), 0)


def test_dropout_weights_and_biases_are_refused(llama) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(llama.config, "k4v4")
    cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    k, v = cache.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), 0)
    q, module = torch.randn(1, 4, 1, 32), torch.nn.Module()
    with pytest.raises(UnsupportedModelError, match="dropout"):
        attention_forward(module, q, k, v, None, dropout=0.1)
    with pytest.raises(UnsupportedModelError, match="attention weights"):
        attention_forward(module, q, k, v, None, output_attentions=True)
    with pytest.raises(UnsupportedModelError, match="additive biases"):
        attention_forward(module, q, k, v, torch.full((1, 1, 1, 6), -0.5))
    hidden = torch.zeros(1, 1, 1, 6)
    hidden[..., 0] = torch.finfo(torch.float32).min
    assert torch.equal(
        attention_forward(module, q, k, v, hidden)[0], attention_forward(module, q, k, v, hidden == 0)[0]
    )


def test_models_without_the_attention_interface_are_told(llama, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    model = copy.deepcopy(llama)
    detach(model)
    model.set_attn_implementation("eager")
    type_of_model = type("OldModel", (type(model),), {"_can_set_attn_implementation": classmethod(lambda cls: False)})
    model.__class__ = type_of_model
    model.model.__class__ = type(
        "OldInner", (type(model.model),), {"_can_set_attn_implementation": classmethod(lambda cls: False)}
    )
    with caplog.at_level(logging.WARNING, logger="kvfold"):
        cache = KVCache.for_model(model, "exact")
    assert "de-quantised" in caplog.text
    wanted = llama.generate(**prompt(), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**prompt(), max_new_tokens=6, do_sample=False, past_key_values=cache), wanted)


def test_a_slow_way_of_reading_is_said_once(llama, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    layers._said.clear()
    detach(llama)
    jetmoe = tiny("jetmoe")
    attach(jetmoe)
    with caplog.at_level(logging.WARNING, logger="kvfold"):
        for model in (llama, llama, jetmoe):
            cache = KVCache(model.config, "k4v4")
            model.generate(**prompt(), max_new_tokens=3, do_sample=False, past_key_values=cache)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "kvfold.attach(model)" in said[0]
    assert "computes with K and V" in said[1]


@STATIC
def test_sampling_and_an_assistant_model(llama, max_length: int | None) -> None:  # type: ignore[no-untyped-def]
    for rows, options in ((2, {"do_sample": True}), (1, {"do_sample": False, "assistant_model": copy.deepcopy(llama)})):
        results = []
        for cache in (DynamicCache(config=llama.config), KVCache(llama.config, "exact", max_length=max_length)):
            torch.manual_seed(3)
            inputs = prompt(rows=rows)
            torch.manual_seed(4)
            results.append(llama.generate(**inputs, max_new_tokens=12, past_key_values=cache, **options))
        assert torch.equal(*results)


def test_for_model_takes_every_spelling(llama) -> None:  # type: ignore[no-untyped-def]
    for spelling in ("turboquant", 4, {"k": 4, "v": 4}, KVFormat.parse("k4v4")):
        assert KVCache.for_model(llama, spelling).format == ModelFormat.parse("k4v4")
