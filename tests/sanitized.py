"""Small cases of every CUDA kernel, each compared with the PyTorch reference: what ``make sanitize`` runs.

``python tests/sanitized.py`` runs them all on the first GPU, with words only those whose names have all of the words;
``--list`` prints their names. compute-sanitizer checks all that a GPU does, and slows it down, so vectors are made, and
the reference runs, on the CPU. No page and no column of a block table is to spare, so that memcheck sees reads beyond.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from cuda_cases import BF16, F16, F32, TOLERANCE, check_store, compare, opening_cases, poisoned, shifted, store_in_steps
from ops_cases import Cache, empty_cache, noise

from kvfold import ops
from kvfold.layout import PageLayout
from kvfold.ops import reference
from kvfold.ops.cuda import dense, expand, prefill, references, runtime, windows
from kvfold.rotation import rotate

HEADS = 2
SCALE = 128**-0.5
LSE_ERROR = 2e-3  # of decode, as in test_gpu_decode

# --- what is shared ---------------------------------------------------------------------------------------------------


def tight_cache(layout: PageLayout, lengths: Sequence[int]) -> Cache:
    """Nothing stored yet, no page and no column of the table to spare."""
    cache = empty_cache(layout, lengths, HEADS, spare=0)
    return replace(cache, table=cache.table[:, :-1].contiguous(), lengths=cache.lengths.int())


def noises(tokens: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V."""
    return noise(tokens, HEADS, 128, seed=1, dtype=dtype), noise(tokens, HEADS, 128, seed=2, dtype=dtype)


def stored(cache: Cache, vectors: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The device's pages after the CUDA kernels stored K and V of all sequences; nothing waits for them."""
    k, v = (x.to(device) for x in vectors)
    rows = range(len(cache.table))
    pages, slots = cache.pages.to(device), torch.cat([cache.slots(b) for b in rows]).to(device)
    before = [x for b in rows if (x := cache.previous(b)) is not None]
    previous = torch.cat(before).to(device) if before else None
    with ops.backend("cuda"):
        ops.store_kv(k, v, pages, slots, cache.layout, previous=previous)
    return pages


# --- a case of each kind ----------------------------------------------------------------------------------------------


def run_store(
    device: torch.device, layout: PageLayout, tokens: int, begin: int | None = None, dtype: torch.dtype = BF16
) -> None:
    """The kernels for few and for many tokens: consecutive ones, or scattered and some left out."""
    num_pages = -(-(tokens + (begin or 0)) // layout.page_size)
    slots = torch.randperm(num_pages * layout.page_size)[:tokens]
    slots[::7] = -1
    if begin is not None:
        slots = torch.arange(begin, begin + tokens)
    check_store(*noises(tokens, dtype), poisoned(layout, num_pages, HEADS), slots, layout, device)


def run_references(device: torch.device, layout: PageLayout, few: bool = True) -> None:
    """Pages opened with keys of their own and with the page's before, in blocks of one token or of several."""
    cache, calls = opening_cases(layout)
    with mock.patch.object(references, "_FEW", references._FEW if few else 0):
        store_in_steps(cache, calls, [shifted(cache, b, BF16) for b in range(len(cache.table))], device)


def run_decode(
    device: torch.device, layout: PageLayout, lengths: Sequence[int], queries: int = 1, group: int = 4, times: int = 1,
    masked: bool = False, dtype: torch.dtype = BF16, **options: Any,
) -> None:  # fmt: skip
    """Right behind the store, of which it waits for the pages only; ``times`` repeats the sequences in the batch."""
    cache = tight_cache(layout, lengths)
    q = noise(len(lengths), queries, group * HEADS, 128, seed=7, dtype=dtype)
    if masked:
        options["mask"] = noise(len(lengths), queries, max(lengths), seed=8) > -0.5
    many_q, table, ends = (torch.cat([x] * times).to(device) for x in (q, cache.table, cache.lengths))
    given: dict[str, Any] = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with ops.backend("cuda"):
        made = ops.schedule_decode(
            ends, layout, group * HEADS, HEADS, query_tokens=queries,
            **{name: value for name, value in given.items() if name in ("first", "query_start", "lag", "window")},
        )  # fmt: skip
    pages = stored(cache, noises(sum(lengths)), device)
    with ops.backend("cuda"):
        out, lse = ops.decode_attention(
            many_q, pages, table, ends, layout, scale=SCALE, inputs_ready=True, schedule=made, **given
        )
    with ops.backend("reference"):
        want, top = ops.decode_attention(
            q.float(), pages.cpu(), cache.table, cache.lengths, layout, scale=SCALE, **options
        )
    assert want.isfinite().all(), "the pages have nothing stored in them"
    want, top = (torch.cat([x.double()] * times) for x in (want, top))
    compare((out.cpu(), lse.cpu()), (want, top, torch.full_like(top, LSE_ERROR)))


def run_prefill(
    device: torch.device, layout: PageLayout, contexts: Sequence[int], chunks: Sequence[int], packed: bool = False,
    window: int | None = None, dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """Chunks behind contexts; ``window`` tokens or so are expanded at a time on each of two streams, by default all on
    one.

    The library is cuDNN everywhere, whose kernels ``make sanitize`` leaves out.
    """
    cache = tight_cache(layout, [context + chunk for context, chunk in zip(contexts, chunks, strict=True)])
    k, v = noises(int(cache.lengths.sum()), dtype)
    q = noise(sum(chunks), 4 * HEADS, 128, seed=7, dtype=dtype)
    ends = cache.lengths.cumsum(0).tolist()
    own = torch.cat([torch.arange(end - chunk, end) for end, chunk in zip(ends, chunks, strict=True)])
    exact: dict[str, Any] = {} if packed else {"k": k[own], "v": v[own]}
    lens = cache.lengths if packed else torch.tensor(contexts, dtype=torch.int32)
    bounds = torch.tensor([0, *chunks]).cumsum(0).int()
    pages = stored(cache, (k, v), device)
    vectors = 4 * max(chunks) * (windows.SLOTS + 1)  # queries, and results that cuDNN allocates
    room = 2 * HEADS * ((window or 0) * windows.TOKEN_BYTES + vectors * windows.VECTOR_BYTES)
    sizes = {} if window is None else {"SCRATCH_BYTES": room, "_LONG": 0.0}
    with (
        ops.backend("cuda"), dense.engine("cudnn"), mock.patch.multiple(prefill, _FEW_ROWS=64),
        mock.patch.multiple(windows, **{"plan": windows.plan.__wrapped__, "split": windows.split.__wrapped__, **sizes}),
    ):  # fmt: skip
        out, lse = ops.prefill_attention(
            q.to(device), pages, cache.table.to(device), lens.to(device), bounds.to(device), layout, scale=SCALE,
            **{name: x.to(device) for name, x in exact.items()},
        )  # fmt: skip
    with ops.backend("reference"):
        want, top = ops.prefill_attention(
            q.float(), pages.cpu(), cache.table, lens, bounds, layout, scale=SCALE,
            **{name: x.float() for name, x in exact.items()},
        )  # fmt: skip
    for b, (begin, end) in enumerate(pairwise(bounds.tolist())):
        error = (out.cpu()[begin:end].float() - want[begin:end]).norm() / want[begin:end].norm()
        assert error <= TOLERANCE[dtype], f"chunk {b}: out is {error:.3g} of its norm from the reference"
    assert (lse.cpu() - top).abs().max() <= 5e-3, "log-sum-exp"  # the library's weights are 16-bit


def run_expand(
    device: torch.device, layout: PageLayout, lengths: Sequence[int], starts: Sequence[int], tokens: int,
    dtype: torch.dtype = F16,
) -> None:  # fmt: skip
    """A window of each sequence, which may reach past its end."""
    cache = tight_cache(layout, lengths)
    begin = torch.tensor(starts, dtype=torch.int32)
    outs = [torch.full((len(lengths), HEADS, tokens, 128), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    pages, table = stored(cache, noises(sum(lengths)), device), cache.table.to(device)
    expand.expand_window(
        pages, table, layout, begin.to(device), cache.lengths.to(device), outs[0], outs[1], tokens=tokens
    )
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        wanted = reference.load_range(pages.cpu(), cache.table[b], layout, 0, length)
        for got, want in zip((x[b].cpu().float() for x in outs), wanted, strict=True):
            want = want[:, start : start + tokens]
            assert not got[:, want.shape[1] :].any(), f"sequence {b}: past its end"
            assert (got[:, : want.shape[1]] - want).norm() <= TOLERANCE[dtype] * want.norm(), f"sequence {b}"


def run_rotate(device: torch.device, layout: PageLayout, context: int, chunk: int, dtype: torch.dtype = BF16) -> None:
    """A chunk into the window behind its context, as FlashAttention-3 wants it where that is at hand."""
    cache = tight_cache(layout, [context])
    pages, table = stored(cache, noises(context), device), cache.table.to(device)
    q = noise(chunk, 4 * HEADS, 128, seed=7, dtype=dtype)
    k, v = noises(chunk, dtype)
    given = [x.to(device) for x in (q, k, v)]
    outs = [torch.full((x.shape[1], context + chunk, 128), torch.nan, dtype=F16, device=device) for x in given]
    outs = [x.transpose(0, 1) for x in outs]  # as windows are
    peaks = expand.find_peaks(pages, table, layout, tokens=context, chunk=(given[1], given[2]))
    sides = (prefill.QUERIES, prefill.KEYS, prefill.VALUES)
    jobs = [(x, out[context:], side) for x, out, side in zip(given, outs, sides, strict=True)]
    prefill.rotate(jobs, peaks)
    largest = torch.stack([8 * x.float().abs().max() for x in (k, v)])  # more than any scale in the pages
    assert torch.equal(peaks.cpu(), largest), "peaks"
    power_k, power_v = largest.log2().floor().exp2()
    for x, out, factor in zip((q, k, v), outs, (power_k / 64, 1024 / power_k, 1024 / power_v), strict=True):
        got, want = out.cpu().float(), rotate(x.float()) * factor
        assert got[:context].isnan().all(), "before the chunk"
        assert (got[context:] - want).norm() <= TOLERANCE[F16] * want.norm()


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    run: Callable[..., None]
    spec: str
    page_size: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.run.__name__.removeprefix("run_")

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}".replace(" ", "") for name, value in self.options.items())
        return f"{self.kind} {self.spec} page={self.page_size} {options}".replace("torch.", "").strip()


MANY = {"lengths": (300, 1000), "times": 200}
"""Steps for every warp of an H100 or H200 to use each place of its ring several times."""

CASES = (
    Case(run_store, "k4v4", 64, {"tokens": 100}),
    Case(run_store, "k3v2", 16, {"tokens": 130, "begin": 3, "dtype": F32}),
    Case(run_store, "k2v3+nc+pre5", 32, {"tokens": 9, "dtype": F16}),
    Case(run_store, "k4v4+mean", 64, {"tokens": 150, "begin": 0}),
    Case(run_store, "k2tv4t", 16, {"tokens": 70, "begin": 1}),
    Case(run_store, "k3tv4+pre1", 64, {"tokens": 40, "dtype": F32}),
    Case(run_store, "k4tv3t+mean+pre5", 32, {"tokens": 100}),
    Case(run_references, "k4v4+mean", 64),
    Case(run_references, "k2v3+mean", 16, {"few": False}),
    Case(run_references, "k3tv2+mean", 32, {"few": False}),
    Case(run_decode, "k4v4", 64, {"lengths": (300, 1, 77)}),
    Case(run_decode, "k4v4", 64, MANY),
    Case(run_decode, "k4v4", 64, {**MANY, "group": 8}),
    Case(run_decode, "k4v4", 16, {"lengths": (700, 65), "queries": 2}),
    Case(run_decode, "k3v3", 64, {"lengths": (90, 1500, 0), "batch_invariant": True}),
    Case(run_decode, "k2v2", 16, {"lengths": (40, 500)}),
    Case(run_decode, "k2v2", 32, MANY),
    Case(run_decode, "k2v4", 32, {"lengths": (33, 400), "group": 5, "queries": 3, "dtype": F16, "window": 50}),
    Case(run_decode, "k4v4", 64, {"lengths": (130, 31), "group": 2, "softcap": 5.0}),
    Case(run_decode, "k3v4", 64, {"lengths": (130, 31), "group": 1, "queries": 4, "masked": True}),
    Case(run_decode, "k4v4", 32, {"lengths": (200, 64), "dtype": F32, "lag": 20}),
    Case(run_decode, "k4v4+mean", 16, {"lengths": (300, 16, 1)}),
    Case(run_decode, "k2v3+mean", 64, {"lengths": (1, 3000), "group": 8, "batch_invariant": True}),
    Case(run_decode, "k2tv2t", 64, {"lengths": (64, 33, 7, 2000)}),
    Case(run_decode, "k3tv3t+mean", 64, {"lengths": (130, 260)}),
    Case(run_decode, "k3tv3t+mean", 16, MANY),
    Case(run_decode, "k4tv4t", 32, {"lengths": (200,), "group": 8}),
    Case(run_prefill, "k4v4", 64, {"contexts": (0, 100, 130), "chunks": (20, 3, 70)}),
    Case(run_prefill, "k3tv4t", 16, {"contexts": (0, 100, 130), "chunks": (20, 3, 70), "packed": True}),
    Case(run_prefill, "k2v3+mean", 32, {"contexts": (300,), "chunks": (33,), "window": 96, "dtype": F16}),
    Case(run_expand, "k3v2", 16, {"lengths": (300, 37, 64), "starts": (16, 0, 48), "tokens": 100, "dtype": BF16}),
    Case(run_expand, "k4tv2t+mean", 64, {"lengths": (100, 64), "starts": (0, 32), "tokens": 67}),
    Case(run_rotate, "k4v4", 64, {"context": 70, "chunk": 37}),
)


def check(cases: Sequence[Case], device: torch.device) -> int:
    """How many cases went wrong; a line for each case."""
    failed = 0
    for case in cases:
        torch.manual_seed(0)
        try:
            case.run(device, PageLayout.of(case.spec, 128, page_size=case.page_size), **case.options)
        except Exception:
            failed += 1
            print(f"FAILED {case}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok     {case}", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Small cases of every CUDA kernel, compared with the reference.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="run only the cases whose names have all of these")
    parser.add_argument("--list", action="store_true", help="print the cases; needs no GPU")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if all(word in str(case) for word in args.words)]
    if not cases:
        parser.error(f"no case has {' and '.join(args.words)} in its name")
    if args.list:
        print(*cases, sep="\n")
        return 0
    device = torch.device("cuda", 0)
    reason = runtime.available(device) if torch.cuda.is_available() else "there is no CUDA device"
    if reason:
        print(f"sanitized.py cannot run: {reason}", file=sys.stderr)
        return 1
    failed = check(cases, device)
    print(f"{len(cases) - failed} of {len(cases)} cases are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
