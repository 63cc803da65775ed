"""Key references (``+mean``) of the CUDA C++ kernels: run with ``pytest -m gpu`` on an H100 or H200."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cuda_cases import bad_keys, compare_references, first_keys, opening_cases, shifted, store_in_steps
from ops_cases import empty_cache, noise

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import references

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
SPECS = ("k4v4+mean", "k3v2+mean", "k2v3+mean", "k4tv4t+mean", "k3tv2+mean", "k2tv3+mean")


@pytest.mark.parametrize("few", [0, 2**31])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("spec", SPECS)
def test_pages_are_opened_as_the_reference_opens_them(spec: str, page_size: int, dtype: torch.dtype, few: int) -> None:
    cache, calls = opening_cases(PageLayout.of(spec, 128, page_size=page_size))
    vectors = [shifted(cache, b, dtype) for b in range(len(cache.table))]
    with mock.patch.object(references, "_FEW", few):
        store_in_steps(cache, calls, vectors, DEVICE)


def test_bad_keys_do_not_count() -> None:
    store_in_steps(*bad_keys(), DEVICE)


@pytest.mark.parametrize("spec", ["k4v4+mean", "k4v4+mean+sinks4"])
def test_first_keys_that_stand_apart_or_are_sinks(spec: str) -> None:
    store_in_steps(*first_keys(spec), DEVICE)


@pytest.mark.parametrize("tokens", [8, 4096])
def test_a_captured_graph_opens_what_comes_next(tokens: int) -> None:
    """Both kernels, each of which may begin before the one ahead of it has ended."""
    layout = PageLayout.of("k4v4+mean", 128, page_size=16)
    k, v = (noise(tokens, 2, 128, seed=seed, dtype=torch.bfloat16).to(DEVICE) for seed in (1, 2))
    pages = torch.zeros(layout.page_shape(tokens // 16 + 1, 2), dtype=torch.uint8, device=DEVICE)
    slots, previous = torch.arange(tokens, device=DEVICE), torch.full((tokens,), -1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with ops.backend("cuda"):
        ops.store_kv(k, v, pages, slots, layout, previous=previous)
        with torch.cuda.graph(graph):
            ops.store_kv(k, v, pages, slots, layout, previous=previous)
        for begin in (0, 5, 16):
            k.copy_(noise(tokens, 2, 128, seed=begin + 3) + 3 * noise(2, 128, seed=begin))
            slots.copy_((torch.arange(tokens) + begin) % (16 * len(pages)))
            previous.copy_((slots // 16 - 1) % len(pages))
            want = pages.clone()
            ops.store_kv(k, v, want, slots, layout, previous=previous)
            graph.replay()
            assert torch.equal(pages, want)


def test_tokens_one_by_one_and_what_decode_makes_of_them() -> None:
    """As a sequence grows, across pages: what is read is what was written, with its reference."""
    layout = PageLayout.of("k4v4+mean", 128, page_size=16)
    cache = empty_cache(layout, [70], heads=2)
    k, v = (x.to(DEVICE) for x in shifted(cache, 0, torch.bfloat16))
    v = v.to(torch.bfloat16)
    slots, previous = cache.slots(0), cache.previous(0)
    assert previous is not None
    pages, table = cache.pages.to(DEVICE), cache.table.to(DEVICE)
    q = noise(1, 1, 8, 128, dtype=torch.bfloat16).to(DEVICE) / 8
    for t in range(70):
        one = slice(t, t + 1)
        end, page = torch.tensor([t + 1], device=DEVICE), cache.table[0, t // 16 : t // 16 + 1].long()
        want = pages.cpu()
        reference.store_kv(k[one].cpu(), v[one].cpu(), want, slots[one], layout, previous[one])
        with ops.backend("cuda"):
            made = ops.schedule_decode(end, layout, 8, 2)
            torch.cuda.synchronize()
            ops.store_kv(k[one], v[one], pages, slots[one].to(DEVICE), layout, previous=previous[one].to(DEVICE))
            out, _ = ops.decode_attention(q, pages, table, end, layout, scale=0.1, inputs_ready=True, schedule=made)
        compare_references(pages.cpu()[page], want[page], layout)
        exact, _ = reference_attention(q, pages, table, end, layout)
        assert (out - exact).float().norm() <= 8e-3 * exact.float().norm(), t


def reference_attention(
    q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, end: torch.Tensor, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    with ops.backend("reference"):
        return ops.decode_attention(q, pages, table, end, layout, scale=0.1)
