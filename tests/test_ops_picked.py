"""Attention to picked exact tokens: plain PyTorch and the Triton kernel, against float64.

Without a GPU the kernel runs in Triton's interpreter, which must be asked for before Triton is first imported. With one
it runs on it, under ``pytest -m gpu``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from ops_cases import Expected, State, expected, noise  # noqa: E402
from test_ops_triton import DEVICE, assert_near, on  # noqa: E402

from kvfold import ops  # noqa: E402
from kvfold.cache import PagedKVCache  # noqa: E402
from kvfold.errors import ShapeError  # noqa: E402
from kvfold.layout import PageLayout  # noqa: E402
from kvfold.ops.picked import Picked, picked_attention  # noqa: E402
from kvfold.ops.triton import exact  # noqa: E402

pytestmark = [pytest.mark.gpu] if HAS_GPU else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

LAYOUT = PageLayout.of("k4v4", 32, page_size=16)
BACKENDS = ["reference", "triton"]


def pick(batch: int, width: int, tokens: int, seed: int = 0) -> Picked:
    """Any tokens, seen from any position on up to any other; many by nobody, which may be beyond all tokens."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, tokens, (batch, width), generator=generator)
    seen_from = torch.randint(0, 40, (batch, width), generator=generator)
    seen_until = seen_from + torch.randint(-9, 30, (batch, width), generator=generator).clamp(min=0)
    return Picked(*(x.int() for x in (token, seen_from, seen_until)))


def attended(backend: str, q: torch.Tensor, *tensors: Any, before: State | None = None, **options: Any) -> State:
    before = None if before is None else (on(before[0]), on(before[1]))
    k, v, picked, start = tensors
    with ops.backend(backend):
        out, lse = picked_attention(
            on(q), on(k), on(v), Picked(*on(*picked)), on(start), LAYOUT, before=before, **options
        )  # fmt: skip
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    return out.cpu(), lse.cpu()


def check(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picked: Picked, start: torch.Tensor,
    before: bool = False, **options: Any,
) -> State:  # fmt: skip
    """Attend, and hold it against float64. ``before``: half of the tokens come as a result that is there already."""
    wanted = []
    for b in range(len(q)):
        position = start[b] + torch.arange(q.shape[1])[:, None]
        visible = (picked.seen_from[b] <= position) & (position < picked.seen_until[b])
        token = picked.token[b].long()
        wanted.append(expected(q[b].float(), k[token].double(), v[token].double(), visible, **{"scale": 0.2} | options))
    want, options = Expected.stack(wanted), {"scale": 0.2} | options
    if not before:
        got = attended(backend, q, k, v, picked, start, **options)
    else:
        half = picked.token.shape[1] // 2
        halves = [Picked(*(x[:, part].contiguous() for x in picked)) for part in (slice(half), slice(half, None))]
        first = attended("reference", q, k, v, halves[0], start, **options)
        got = attended(backend, q, k, v, halves[1], start, before=first, **options)
    assert_near(got, want, q.dtype)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("group", "num_queries"), [(1, 1), (3, 1), (4, 5), (2, 20)])
@pytest.mark.parametrize("sizes", [(32, 32), (64, 128), (128, 40), (80, 256)], ids=str)
def test_shapes(sizes: tuple[int, int], group: int, num_queries: int, before: bool, backend: str) -> None:
    q, k, v = noise(3, num_queries, 2 * group, sizes[0]), noise(50, 2, sizes[0]), noise(50, 2, sizes[1])
    check(backend, q, k, v, pick(3, 70, 50), torch.tensor([0, 17, 35]), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dtypes_softcap_and_strides(
    softcap: float | None, dtype: torch.dtype, stored: torch.dtype, backend: str
) -> None:
    q = noise(4, 2, 8, 2, dtype=dtype).repeat(1, 1, 1, 32).permute(2, 0, 1, 3)[:3]  # strides of no order
    k, v = noise(2, 60, 64, dtype=stored).transpose(0, 1), noise(60, 2, 128, dtype=stored)[..., ::2]
    check(backend, q, k, v, pick(3, 40, 60, seed=1), torch.tensor([9, 20, 30]).int(), softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_sees_nothing(backend: str) -> None:
    q, k, v = noise(2, 3, 4, 32), torch.full((5, 2, 32), torch.nan), torch.full((5, 2, 32), torch.nan)
    nobody = Picked(*(torch.zeros(2, 33, dtype=torch.int32) for _ in range(3)))
    out, lse = attended(backend, q, k, v, nobody, torch.tensor([0, 4]), scale=0.2)
    assert not out.any()
    assert (lse == -torch.inf).all()
    before = noise(2, 3, 4, 32, seed=1), noise(2, 4, 3, seed=2)
    before[1][0, 1, 2] = -torch.inf
    before[0][0, 2, 1] = 0.0
    out, lse = attended(backend, q, k, v, nobody, torch.tensor([0, 4]), scale=0.2, before=before)
    torch.testing.assert_close(out, before[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, before[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["k", "v"])
def test_only_queries_that_see_a_bad_token_suffer(bad: str, backend: str) -> None:
    q, k, v = noise(1, 6, 2, 32), noise(10, 1, 32), noise(10, 1, 32, seed=1)
    (k if bad == "k" else v)[7] = torch.nan
    places = torch.arange(10).int()[None]
    out, _ = attended(backend, q, k, v, Picked(places, places, places + 3), torch.tensor([4]), scale=0.2)
    assert out[0, 3:].isnan().all()  # positions 7 to 9
    assert not out[0, :3].isnan().any()


def test_the_kernel_is_what_the_triton_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = exact.picked_attention
    monkeypatch.setattr(exact, "picked_attention", lambda *args: calls.append(1) or kernel(*args))
    for backend, number in (("reference", 0), ("triton", 1)):
        check(backend, noise(1, 1, 2, 32), noise(9, 1, 32), noise(9, 1, 32), pick(1, 5, 9), torch.tensor([20]))
        assert len(calls) == number


@pytest.mark.parametrize("format", ["k4v4+sinks7+tail9", "k3tv2+mean+tail20"])
def test_the_paged_cache_on_triton(format: str) -> None:
    """Decoding, chunks and prefills of both kinds: what plain PyTorch gives on the same stored bytes."""
    sizes: Any = {"num_layers": 1, "num_kv_heads": 2, "head_size": 32, "num_pages": 12, "page_size": 16}
    cache = PagedKVCache(format, dtype=torch.float32, device=DEVICE, **sizes)
    seqs = [cache.new_sequence() for _ in range(3)]
    for step, counts in enumerate([[5, 20, 1], [1, 1, 1], [3, 3, 3], [2, 1, 7]]):
        total, bounds = sum(counts), [0, counts[0], counts[0] + counts[1], sum(counts)]
        q, k, v = on(*(noise(total, heads, 32, seed=heads * step) for heads in (6, 2, 2)))
        slots = cache.extend(dict(zip(seqs, counts, strict=True)))
        cache.store(0, k, v, slots)
        results = []
        for backend in BACKENDS:
            with ops.backend(backend):
                if len(set(counts)) == 1:
                    results.append(cache.decode(0, q.unflatten(0, (3, -1)), seqs, scale=0.2))
                else:
                    results.append(cache.prefill(0, q, seqs, bounds, scale=0.2))
                    results[-1] += cache.prefill(0, q, seqs, bounds, scale=0.2, k=k, v=v, softcap=3.0)
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


def test_wrong_tensors() -> None:
    q, k, v, start = noise(2, 1, 4, 32), noise(9, 2, 32), noise(9, 2, 32), torch.tensor([0, 0])
    good = pick(2, 5, 9)
    for name, arguments in {
        "q": (q[0], k, v, good, start),
        "k is": (q, k[..., :8], v, good, start),
        "v is": (q, k, v[:5], good, start),
        "one dtype": (q, k, v.double(), good, start),
        "multiple": (q[:, :, :3], k, v, good, start),
        "token is int32": (q, k, v, good._replace(token=good.token.long()), start),
        "seen_until is": (q, k, v, good._replace(seen_until=good.seen_until[:, :4]), start),
        "query_start": (q, k, v, good, start[:1]),
    }.items():
        with pytest.raises(ShapeError, match=name):
            picked_attention(*arguments, LAYOUT, scale=1.0)
    with pytest.raises(ShapeError, match="softcap"):
        picked_attention(q, k, v, good, start, LAYOUT, scale=1.0, softcap=0.0)
    assert picked_attention(q[:, :0], k, v, good, start, LAYOUT, scale=1.0)[0].shape == (2, 0, 4, 32)
