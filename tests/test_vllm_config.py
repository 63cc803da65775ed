"""Against the real vLLM: names, which backend serves what, specs, and what is refused."""

# ruff: noqa: I001 (the stand-in comes before vLLM)
from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import distributions
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_stand_in as stand_in  # skips where vLLM is not installed
from vllm.config import KVTransferConfig
from vllm.config.cache import KV_CACHE_DTYPES, CacheConfig, get_kv_cache_dtype_handler
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec, get_kv_quant_mode

from kvfold.errors import FormatError, NotBuiltError, UnsupportedModelError
from kvfold.formats import KVFormat
from kvfold.integrations.vllm import DTYPES, mla, register
from kvfold.integrations.vllm.backend import (
    ByLayer,
    CompressedBackend,
    Slot,
    class_of,
    class_of_model,
    original,
    why_not_served,
)
from kvfold.integrations.vllm.impl import as_pages
from kvfold.integrations.vllm.metadata import describe
from kvfold.integrations.vllm.settings import EngineConfigError, Settings
from kvfold.layerformats import ModelFormat
from kvfold.layout import PageLayout
from kvfold.modelshape import FULL, LayerGroup, ModelShape
from kvfold.planner import cache_bytes, plan
from vllm_stand_in import Engine, choose, config, current

UPSTREAM = "turboquant_4bit_nc"


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_registered_once_however_often_it_is_asked() -> None:
    register()
    before = list(KV_CACHE_DTYPES), dict(STR_DTYPE_TO_TORCH_DTYPE), AttentionBackendEnum.TURBOQUANT.get_path()
    handlers = [get_kv_cache_dtype_handler(name) for name in DTYPES]
    register()
    assert before == (
        list(KV_CACHE_DTYPES), dict(STR_DTYPE_TO_TORCH_DTYPE), AttentionBackendEnum.TURBOQUANT.get_path(),
    )  # fmt: skip
    assert handlers == [get_kv_cache_dtype_handler(name) for name in DTYPES]
    assert len(KV_CACHE_DTYPES) == len(set(KV_CACHE_DTYPES))


@pytest.mark.parametrize("name", DTYPES)
def test_a_name_is_a_cache_dtype_of_bytes(name: str) -> None:
    assert CacheConfig(cache_dtype=name).cache_dtype == name
    assert STR_DTYPE_TO_TORCH_DTYPE[name] == torch.uint8
    assert get_kv_quant_mode(name) == KVQuantMode.CUSTOM
    assert not name.startswith("turboquant_")  # which is upstream's, and treated otherwise in many places
    assert KVFormat.parse(DTYPES[name]).require_built()


def test_the_default_is_kvfolds_default() -> None:
    assert KVFormat.parse(DTYPES["turboquant"]) == KVFormat.parse("turboquant") == KVFormat.parse("k4v4")


def test_registering_imports_neither_the_backend_nor_cuda() -> None:
    code = (
        "import sys, torch; from kvfold.integrations.vllm import register; assert 'vllm' not in sys.modules; "
        "register(); register(); assert not torch.cuda.is_initialized(); "
        "print(sorted(name for name in sys.modules if name.startswith('kvfold.') and 'vllm' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['kvfold.integrations']"


def test_vllm_finds_the_entry_point() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    # a folder left from an older build may stand before the installed one
    found = [entry for kvfold in distributions(name="kvfold") for entry in kvfold.entry_points]
    (entry,) = {entry for entry in found if entry.group == DEFAULT_PLUGINS_GROUP}
    assert entry.load() is register


def test_an_old_vllm_starts_without_kvfold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr("vllm.config.cache.register_kv_cache_dtype")
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    warned: list[str] = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args: warned.append(text % args))
    register()
    assert len(warned) == 1
    assert "vllm>=0.33" in warned[0]


# --- which backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spelling"), DTYPES.items())
def test_the_dtype_alone_selects_the_backend(name: str, spelling: str) -> None:
    backend = choose(config(name))
    assert issubclass(backend, CompressedBackend)
    assert backend.format == KVFormat.parse(spelling)
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.TURBOQUANT  # as the layer looks it up


@pytest.mark.parametrize("backend", ["turboquant", "TURBOQUANT"])
def test_the_backends_name_alone_compresses(backend: str) -> None:
    chosen = choose(config("auto", backend))
    assert issubclass(chosen, CompressedBackend)
    assert chosen.format == KVFormat.parse("turboquant")
    engine = Engine(config("auto", backend))
    (spec,) = engine.specs.values()
    assert (spec.dtype, spec.kv_quant_mode) == (torch.uint8, KVQuantMode.CUSTOM)
    assert spec.state_content_bytes == PageLayout.of("k4v4", 64).token_bytes


def test_name_and_dtype_together_are_the_dtype() -> None:
    assert choose(config("kvfold_k3v3", "turboquant")) is class_of(KVFormat.parse("k3v3"))


@pytest.mark.parametrize("explicit", [None, "turboquant"])
def test_upstreams_dtypes_get_upstreams_class_untouched(explicit: str | None) -> None:
    backend = choose(config(UPSTREAM, explicit))
    assert backend is original()
    assert backend.__module__ == "vllm.v1.attention.backends.turboquant_attn"
    assert backend.get_impl_cls().__module__ == backend.get_builder_cls().__module__ == backend.__module__


def test_the_slot_itself_stands_for_upstreams_class() -> None:
    slot, upstream = AttentionBackendEnum.TURBOQUANT.get_class(), original()
    assert slot is Slot
    for question in ("get_name", "get_impl_cls", "get_builder_cls", "supported_kv_cache_layouts",
                     "get_supported_kernel_block_sizes", "full_cls_name"):  # fmt: skip
        assert getattr(slot, question)() == getattr(upstream, question)()
    assert slot.supports_kv_cache_dtype(UPSTREAM)
    assert not slot.supports_kv_cache_dtype("turboquant")
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=128, dtype=torch.uint8, kv_quant_mode=get_kv_quant_mode(UPSTREAM)
    )
    assert slot.customize_spec(spec) == upstream.customize_spec(spec) != spec


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_other_caches_are_left_alone(dtype: str) -> None:
    assert not issubclass(choose(config(dtype)), (CompressedBackend, Slot))


def test_skipped_layers_get_another_backend() -> None:
    cfg = config("turboquant", kv_cache_dtype_skip_layers=["0"])
    assert not issubclass(choose(cfg, "auto"), CompressedBackend)
    assert issubclass(choose(cfg), CompressedBackend)


# --- additional config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("additional", "fmt", "chunk"),
    [
        ({}, "k4v4", "exact"),
        ({"turboquant": True}, "k4v4", "exact"),
        ({"turboquant": "k3v3"}, "k3v3", "exact"),
        ({"turboquant": True, "k_quant": 4, "v_quant": "3"}, "k4v3", "exact"),
        ({"turboquant": {"k_quant": 8, "v_quant": 4, "chunk": "packed"}}, "k8v4", "packed"),
        ({"turboquant": {"format": "k3v2+vplain"}}, "k3v2+vplain", "exact"),
        ({"turboquant": {"chunk": "packed"}}, "k4v4", "packed"),
        ({"turboquant": {"bit_width": 3, "seed": 42}}, "k3v3", "exact"),
        ({"turboquant": "k3v3@0-1,5=k4v4"}, "k3v3@0-1,5=k4v4", "exact"),
        ({"turboquant": {"format": "k3v3@7=k8v8", "chunk": "packed"}}, "k3v3@7=k8v8", "packed"),
        ({"turboquant": {"format": {"base": "k3v3", "layers": {"0-1": "k4v4"}}}}, "k3v3@0-1=k4v4", "exact"),
        ({"something": {"else": 1}}, "k4v4", "exact"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", [{"dtype": "turboquant"}, {"dtype": "auto", "backend": "turboquant"}], ids=str)
def test_additional_config_says_format_and_chunk_rule(
    additional: dict[str, Any], fmt: str, chunk: str, where: dict[str, str]
) -> None:
    cfg = config(additional=additional, **where)
    settings = Settings.of(cfg)
    assert settings is not None
    assert (settings.format, settings.chunk) == (ModelFormat.parse(fmt), chunk)
    assert choose(cfg).formats == ModelFormat.parse(fmt)


@pytest.mark.parametrize(
    ("additional", "where", "error", "says"),
    [
        ({"turboquant": True}, {"dtype": "auto"}, EngineConfigError, "--kv-cache-dtype turboquant"),
        ({"turboquant": True}, {"dtype": "fp8"}, EngineConfigError, "--kv-cache-dtype turboquant"),
        ({"turboquant": False}, {}, EngineConfigError, "drop one"),
        ({"turboquant": "k3v3"}, {"dtype": "kvfold_k4v4"}, EngineConfigError, "k3v3"),
        ({"turboquant": {"chunk": "hot"}}, {}, EngineConfigError, "exact, packed"),
        ({"turboquant": {"chunks": "packed"}}, {}, EngineConfigError, "did you mean 'chunk'"),
        ({"turboquant": 4}, {}, EngineConfigError, "format like"),
        ({"turboquant": {"k_quant": 4}}, {}, EngineConfigError, "both numbers"),
        ({"turboquant": {"k_quant": 4, "v_quant": "q3_0"}}, {}, EngineConfigError, "both numbers"),
        ({"turboquant": True, "k_quant": "q8_0", "v_quant": "q3_0"}, {}, NotBuiltError, "numbers of bits"),
        ({"turboquant": "k4v5v"}, {}, FormatError, "unknown format"),
        ({"turboquant": "kf8vf8"}, {}, FormatError, "fp8 caches of its own"),
        ({"turboquant": "k4v4+sinks4"}, {}, NotBuiltError, "leave them out"),
        ({"turboquant": "k3qv3q"}, {}, NotBuiltError, "not built"),
        ({"turboquant": "k3v3+mean"}, {}, NotBuiltError, r"leave \+mean out"),
        ({"turboquant": "k3tv3t"}, {}, FormatError, "1 to 8 bits, and K is 3t"),
        ({"turboquant": "k3v3@4=kf8vf8"}, {}, FormatError, "fp8 caches of its own"),
        ({"turboquant": "k3v3@4=k4v4+sinks4"}, {}, NotBuiltError, "leave them out"),
        ({"turboquant": "k3v3@4"}, {}, FormatError, "behind @ come layers"),
        ({"turboquant": "k3v3@4=k4v4"}, {"dtype": "kvfold_k3v3"}, EngineConfigError, "k3v3@4=k4v4"),
    ],
    ids=str,
)
def test_what_contradicts_or_is_not_there_is_refused_at_start(
    additional: dict[str, Any], where: dict[str, str], error: type[Exception], says: str
) -> None:
    cfg = config(additional=additional, **where)
    with pytest.raises(error, match=says):
        choose(cfg)


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_the_backends_name_beside_another_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="add --kv-cache-dtype turboquant, or leave the backend out"):
        choose(config(dtype, "turboquant"))


def test_skipping_needs_a_dtype() -> None:
    cfg = config("auto", "turboquant", kv_cache_dtype_skip_layers=["0"])
    with pytest.raises(EngineConfigError, match="--kv-cache-dtype turboquant instead"):
        choose(cfg)


def test_a_second_engine_of_a_process_is_not_given_the_first_ones_format() -> None:
    choose(config(), head_size=64)
    second = stand_in.VllmConfig(cache_config=CacheConfig(cache_dtype="turboquant"),
                                 additional_config={"turboquant": "k3v3"})  # fmt: skip
    with pytest.raises(EngineConfigError, match="a process of its own"):
        Engine(second)


# --- what cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({"has_sliding_window": True}, "--kv-cache-dtype-skip-layers sliding_window"),
        ({"has_sink": True}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
        ({"head_size": 4}, "too small"),
        ({"head_size": 320}, "up to 256 coordinates"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head"),
        ({"use_sparse": True}, "sparse"),
    ],
    ids=str,
)
@pytest.mark.parametrize("explicit", [None, "turboquant"])
def test_a_layer_that_cannot_be_compressed_is_refused(
    question: dict[str, Any], says: str, explicit: str | None
) -> None:
    cfg = config("turboquant", explicit)
    with pytest.raises(ValueError, match="kvfold: ") as caught:
        choose(cfg, **question)
    reasons = str(caught.value).split("kvfold: ")[1]
    assert says in reasons
    assert "--" in reasons or "head" in says or "coordinates" in says or "small" in says, "a way out"


@pytest.mark.parametrize("explicit", [None, "turboquant"])
@pytest.mark.parametrize(
    ("part", "options", "says"),
    [
        ("parallel_config", {"prefill_context_parallel_size": 2}, "context parallelism is not supported; leave "
         "--prefill-context-parallel-size out"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallelism is not supported; leave "
         "--decode-context-parallel-size out"),
        ("kv_transfer_config", {"kv_connector": "NixlConnector", "kv_role": "kv_both"}, "KV transfer is not supported; "
         "leave --kv-transfer-config out"),
        ("speculative_config", {"enable_adaptive_verification": True}, "adaptive verification is not supported; leave "
         "enable_adaptive_verification out of --speculative-config"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_run_asks_of_every_layer_is_refused(
    part: str, options: dict[str, Any], says: str, explicit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whose import wants the compiled part; vLLM looks there whether a layer is of the model or of a draft model
    monkeypatch.setitem(sys.modules, "vllm.compilation.backends", SimpleNamespace(model_tag="backbone"))
    cfg = config("turboquant", explicit)
    if part == "parallel_config":
        for name, value in options.items():
            setattr(cfg.parallel_config, name, value)
    elif part == "kv_transfer_config":
        cfg.kv_transfer_config = KVTransferConfig(**options)
    else:
        cfg.speculative_config = SimpleNamespace(kv_cache_dtype=None, **options)
    with pytest.raises(ValueError, match="kvfold: ") as caught:
        choose(cfg)
    assert f"kvfold: {says}" in str(caught.value)


def test_fast_prefill_of_shared_caches_is_refused() -> None:
    shares = {"kv_sharing_target_layer_name": "model.layers.0.attn"}
    with pytest.raises(EngineConfigError, match=r"--kv-sharing-fast-prefill cuts batches on the device.*leave it out"):
        Engine(config(kv_sharing_fast_prefill=True), layers=({}, shares))
    assert len(Engine(config(kv_sharing_fast_prefill=True), layers=({}, {})).layers) == 2  # changes nothing there


def test_attention_in_chunks_is_refused() -> None:
    """Llama 4: vLLM asks for a backend as for any layer, and says only with the cache what it is."""
    with pytest.raises(UnsupportedModelError, match=r"is ChunkedLocalAttentionSpec;.* leave --kv-cache-dtype out"):
        Engine(config(), layers=({}, {"attention_chunk_size": 128}))


def test_attention_in_chunks_cannot_be_skipped() -> None:
    """vLLM gives a skipped layer of this kind the backend of the run's dtype all the same."""
    with pytest.raises(UnsupportedModelError, match="leave --kv-cache-dtype out"):
        Engine(config(kv_cache_dtype_skip_layers=["1"]), layers=({}, {"attention_chunk_size": 128}))


def test_ways_out_of_a_backend_that_was_named_do_not_speak_of_a_dtype() -> None:
    with pytest.raises(ValueError, match=r"kvfold: .*; leave --attention-backend out"):
        choose(config("auto", "turboquant"), attn_type="encoder_only")
    with pytest.raises(ValueError, match="use --kv-cache-dtype turboquant instead and leave such layers"):
        choose(config("auto", "turboquant"), has_sliding_window=True)


@pytest.mark.parametrize("question", [{"use_mla": True}, {"head_size": 320}], ids=str)
def test_other_ways_out_of_a_backend_that_was_named(question: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="eave --attention-backend out for this model"):
        choose(config("auto", "turboquant"), **question)


def test_blocks_are_not_handed_to_others() -> None:
    """NIXL may cut a block by heads, and one of several pages is not in the order of heads."""
    assert not class_of(KVFormat.parse("k4v4")).supports_kv_connector()


def test_a_draft_models_own_cache_is_its_own() -> None:
    cfg = config("auto", additional={"turboquant": "k3v3"})
    object.__setattr__(cfg, "speculative_config", SimpleNamespace(kv_cache_dtype="auto"))
    assert Settings.of(cfg) is None
    object.__setattr__(cfg, "speculative_config", SimpleNamespace(kv_cache_dtype=None))
    with pytest.raises(EngineConfigError, match="add --kv-cache-dtype turboquant"):
        Settings.of(cfg)


def test_mla_is_refused() -> None:
    """By the dtype alone, which vLLM would refuse without a word about what to do, and with the backend."""
    question = {"use_mla": True, "head_size": 576}
    assert choose(config("auto"), **question).is_mla()
    assert choose(config("turboquant"), "auto", **question).is_mla()  # a layer that is skipped
    says = "latent cache of MLA is not compressed; leave --kv-cache-dtype out for this model"
    for cfg in (config("turboquant"), config("kvfold_k3v3"), config("turboquant", "turboquant")):
        with pytest.raises(UnsupportedModelError, match=f"^kvfold: {cfg.cache_config.cache_dtype}: the {says}$"):
            choose(cfg, **question)
    with pytest.raises(ValueError, match="No valid attention backend"):  # upstream's are vLLM's to answer
        choose(config(UPSTREAM), **question)


def test_the_function_that_refuses_mla_is_replaced_once_and_only_where_there_is_one() -> None:
    answer = selector._cached_get_attn_backend
    register()
    assert selector._cached_get_attn_backend is answer
    assert answer.cache_info().maxsize is None  # vLLM's own, which its tests clear
    other = types.ModuleType("selector")
    mla.refuse_in(other)
    assert not hasattr(other, "_cached_get_attn_backend")


def test_small_blocks_and_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="leave --block-size out"):
        choose(config("turboquant", block_size=16))
    assert issubclass(choose(config("turboquant", block_size=128)), CompressedBackend)
    cfg = config("turboquant")
    with current(cfg), pytest.raises(ValueError, match="--dtype bfloat16"):
        stand_in.selector.get_attn_backend(128, torch.float32, "turboquant")


@pytest.mark.parametrize("head_size", [4, 7])
def test_the_way_out_of_a_small_head_is_vllms(head_size: int) -> None:
    with pytest.raises(ValueError, match=f"kvfold: head size {head_size} is too small") as caught:
        choose(config(), head_size=head_size)
    reason = str(caught.value).split("kvfold: ")[1]
    assert "eave --kv-cache-dtype out" in reason
    assert "f8" not in reason


@pytest.mark.parametrize("head_size", [8, 64, 80, 96, 112, 128, 192, 256])
def test_head_sizes_of_models_are_served(head_size: int) -> None:
    """Upstream #41413: 80, 96 and 112 are no powers of two."""
    for fmt in DTYPES.values():
        assert why_not_served(KVFormat.parse(fmt), head_size) is None
    assert issubclass(choose(config(), head_size=head_size), CompressedBackend)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, "ALiBi"),
        ({"mystery": 7}, "mystery"),
    ],
)
def test_what_only_the_layer_knows_is_refused_too(layer: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        Engine(config(), layers=(layer,))


def test_layers_that_do_not_see_every_token_are_refused() -> None:
    spec = SlidingWindowSpec(
        block_size=64, num_kv_heads=2, head_size=64, dtype=torch.uint8, kv_quant_mode=KVQuantMode.CUSTOM,
        sliding_window=128,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="SlidingWindowSpec"):
        class_of(KVFormat.parse("k4v4")).customize_spec(spec)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", sorted(set(DTYPES.values())))
@pytest.mark.parametrize("head_size", [80, 128])
@pytest.mark.parametrize("block_size", [1, 64, 256])
def test_a_block_has_the_bytes_of_its_pages(spelling: str, head_size: int, block_size: int) -> None:
    backend = class_of(KVFormat.parse(spelling))
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=8, head_size=head_size, dtype=torch.uint8, kv_quant_mode=KVQuantMode.CUSTOM
    )
    packed = backend.customize_spec(spec)
    layout = PageLayout.of(spelling, head_size)
    assert packed.page_size_bytes * 64 == 8 * layout.page_bytes * block_size
    assert backend.customize_spec(packed) == packed


def test_bytes_per_token_of_the_default() -> None:
    spec = FullAttentionSpec(
        block_size=64, num_kv_heads=8, head_size=128, dtype=torch.uint8, kv_quant_mode=KVQuantMode.CUSTOM
    )
    packed = class_of(KVFormat.parse("k4v4")).customize_spec(spec)
    assert packed.state_content_bytes == 132
    bf16 = FullAttentionSpec(block_size=64, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    assert bf16.page_size_bytes / packed.page_size_bytes >= 3.8


@pytest.mark.parametrize("name", ["turboquant", "kvfold_k3v3", "kvfold_k8v4"])
@pytest.mark.parametrize("memory", [10 * 2**30, 10 * 2**30 + 12345, 3 * 2**20])
def test_the_capacity_is_the_planners_to_the_page(name: str, memory: int) -> None:
    """vLLM's own arithmetic, with Qwen3-8B's shapes."""
    engine = Engine(config(name), heads=32, kv_heads=8, head_size=128, num_blocks=1, layers=({},) * 36)
    assert len(engine.kv_groups) == 1
    cache = stand_in.get_kv_cache_config_from_groups(engine.config, engine.kv_groups, memory)
    shape = ModelShape((LayerGroup(FULL, 36, 8, 128, 128),))
    fmt = DTYPES[name]
    row = next(row for row in plan(shape, memory, 64, [fmt]) if row.format == ModelFormat.parse(fmt))
    assert cache.num_blocks * 64 == row.tokens
    assert sum(tensor.size for tensor in cache.kv_cache_tensors[:1]) == cache_bytes(shape, fmt, row.tokens)


@pytest.mark.parametrize("skipped", [["0"], ["0", "1", "34", "35"]])
def test_skipped_layers_stay_bf16_and_the_engine_starts(skipped: list[str]) -> None:
    """Upstream #50709: pages of two sizes that do not divide each other."""
    cfg = config(kv_cache_dtype_skip_layers=skipped)
    engine = Engine(cfg, heads=32, kv_heads=8, head_size=128, num_blocks=1, layers=({},) * 36)
    for index, spec in enumerate(engine.specs.values()):
        skip = str(index) in skipped
        assert spec.dtype == (torch.bfloat16 if skip else torch.uint8)
        assert spec.state_content_size_bytes == (512 if skip else 132)
    assert describe(cfg).startswith(f"kvfold compresses {36 - len(skipped)} of 36 layers to k4v4; {len(skipped)} stay")
    memory = 2**30
    cache = stand_in.get_kv_cache_config_from_groups(cfg, engine.kv_groups, memory)
    per_token = 8 * (132 * (36 - len(skipped)) + 512 * len(skipped))
    assert cache.num_blocks == memory // (64 * per_token)  # nothing is padded


def test_block_size_is_chosen_for_pages() -> None:
    assert Engine(config(), block_size=None, num_blocks=2).block_size == 64


def test_layers_with_a_window_may_be_skipped() -> None:
    """vLLM makes blocks of two kinds equal in bytes; ours are not the ones that are padded."""
    cfg = config(kv_cache_dtype_skip_layers=["sliding_window"])
    window = {"per_layer_sliding_window": 128}
    engine = Engine(
        cfg, heads=32, kv_heads=8, head_size=128, block_size=None, num_blocks=8, layers=({}, window, window)
    )
    full, *windows = engine.layers
    assert issubclass(full.get_attn_backend(), CompressedBackend)
    assert not any(issubclass(layer.get_attn_backend(), CompressedBackend) for layer in windows)
    assert as_pages(full.kv_cache, 8, PageLayout.of("k4v4", 128)).shape[2] == 64 * 132


def test_blocks_that_vllm_pads_are_refused() -> None:
    """Where the first layer has a window, vLLM counts bytes by that layer's backend, and pads ours."""
    cfg = config(kv_cache_dtype_skip_layers=["sliding_window"])
    window = {"per_layer_sliding_window": 128}
    with pytest.raises(UnsupportedModelError, match=r"vLLM pads the blocks of .* leave --kv-cache-dtype out"):
        Engine(cfg, heads=32, kv_heads=8, head_size=128, block_size=None, num_blocks=8, layers=(window, {}))


# --- formats of single layers -----------------------------------------------------------------------------------------

BY_LAYER = "k3v3@0-1,30=k4v4@7=k8v8"


def by_layer(spec: str = BY_LAYER, dtype: str = "turboquant", backend: str | None = None, **cache: Any) -> Any:
    return config(dtype, backend, {"turboquant": {"format": spec}}, **cache)


@pytest.mark.parametrize("where", [{}, {"dtype": "auto", "backend": "turboquant"}], ids=str)
def test_each_layer_has_the_backend_of_its_format(where: dict[str, str]) -> None:
    cfg = by_layer(**where)
    assert issubclass(choose(cfg), ByLayer)
    engine = Engine(cfg, heads=32, kv_heads=8, head_size=128, num_blocks=1, layers=({},) * 36)
    fmt = ModelFormat.parse(BY_LAYER)
    for index, (layer, spec) in enumerate(zip(engine.layers, engine.specs.values(), strict=True)):
        own, backend = fmt.layer(index), layer.get_attn_backend()
        assert backend is class_of(own, bool(where))
        assert layer.impl.format == backend.format == own
        assert spec.state_content_bytes == PageLayout.of(own, 128).token_bytes
        assert as_pages(layer.kv_cache, 8, PageLayout.of(own, 128)).shape[0] == 1
    assert describe(cfg) == "kvfold compresses 36 of 36 layers to k3v3, k4v4, k8v8; 0 stay as they are"


@pytest.mark.parametrize("memory", [10 * 2**30, 10 * 2**30 + 12345, 3 * 2**20])
@pytest.mark.parametrize("spec", [BY_LAYER, "k4v4@0=k2v2", "k4v2@0-17=k3v3"])
def test_the_capacity_of_several_formats_is_the_planners_to_the_page(spec: str, memory: int) -> None:
    """Different bytes in one group of one block table; the last has equal bytes everywhere."""
    engine = Engine(by_layer(spec), heads=32, kv_heads=8, head_size=128, num_blocks=1, layers=({},) * 36)
    (group,) = engine.kv_groups
    assert len(group.layer_names) == 36
    cache = stand_in.get_kv_cache_config_from_groups(engine.config, engine.kv_groups, memory)
    shape = ModelShape.uniform(36, 8, 128)
    row = plan(shape, memory, 64, [spec])[-1]
    assert row.format == ModelFormat.parse(spec)
    assert cache.num_blocks * 64 == row.tokens
    assert cache.kv_cache_tensors[0].size == cache_bytes(shape, spec, row.tokens)
    assert sorted(name for tensor in cache.kv_cache_tensors for name in tensor.layers) == sorted(group.layer_names)


def test_layers_of_several_formats_beside_skipped_ones() -> None:
    cfg = by_layer("k3v3@1=k8v8", kv_cache_dtype_skip_layers=["0", "35"])
    engine = Engine(cfg, heads=32, kv_heads=8, head_size=128, num_blocks=1, layers=({},) * 36)
    sizes = [spec.state_content_size_bytes for spec in engine.specs.values()]
    assert sizes == [512, 260, *[100] * 33, 512]
    cache = stand_in.get_kv_cache_config_from_groups(cfg, engine.kv_groups, 2**30)
    assert cache.num_blocks == 2**30 // (64 * 8 * sum(sizes))


def test_layers_that_share_a_cache_are_refused() -> None:
    """vLLM looks for a spec of theirs among those of the group, where there is none."""
    shares = {"kv_sharing_target_layer_name": "model.layers.0.attn"}
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2\.attn shares .* use one format for all layers"):
        Engine(by_layer("k3v3@0=k4v4@1=k8v8"), layers=({}, {}, shares))
    assert len(Engine(by_layer("k3v3"), layers=({}, {}, shares)).layers) == 3


def test_layers_that_are_not_there_or_not_compressed_are_refused() -> None:
    cfg = by_layer("k3v3@36=k4v4")
    object.__setattr__(cfg, "model_config", SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=36)))
    with pytest.raises(FormatError, match="layers 0 to 35, and no layer 36"):
        Settings.of(cfg)
    cfg = by_layer(kv_cache_dtype_skip_layers=["1", "2"])
    with pytest.raises(EngineConfigError, match="formats for layers 1, and --kv-cache-dtype-skip-layers"):
        choose(cfg)
    cfg = by_layer(kv_cache_dtype_skip_layers=["sliding_window"])
    with pytest.raises(EngineConfigError, match="use one format for all layers"):
        choose(cfg)
    with pytest.raises(ValueError, match="up to 256 coordinates"):
        choose(by_layer(), head_size=320)


def test_layers_that_were_never_told_apart_are_refused() -> None:
    backend = class_of_model(ModelFormat.parse(BY_LAYER))
    spec = FullAttentionSpec(
        block_size=64, num_kv_heads=8, head_size=128, dtype=torch.uint8, kv_quant_mode=KVQuantMode.CUSTOM
    )
    with pytest.raises(EngineConfigError, match="use one format for all layers"):
        backend.customize_spec(spec)
    skipped = FullAttentionSpec(block_size=64, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    assert backend.customize_spec(skipped) == skipped


def test_a_class_for_each_way_to_store_a_model() -> None:
    one, other = (class_of_model(ModelFormat.parse(spec)) for spec in ("k3v3@0-2=k4v4", "k3v3@0,2=k4v4"))
    assert one is not other
    assert one is class_of_model(ModelFormat.parse("k3v3@0,1,2=k4v4"))
    assert class_of_model(ModelFormat.parse("k3v3")) is class_of(KVFormat.parse("k3v3"))
    assert one.full_cls_name() == (ByLayer.__module__, one.__name__)
