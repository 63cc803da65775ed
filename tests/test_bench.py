"""`kvfold bench` without a GPU: the shapes and their bytes, what is prepared and checked, the clock's plan, the report.

The clock itself and the rivals run on a CUDA device alone; here a fake clock takes their place.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import cli, ops
from kvfold.bench import ours, report, rivals, runner
from kvfold.bench.cases import CASES, QUICK, Case, DecodeCase, PrefillCase, StoreCase, ragged_lengths, select
from kvfold.bench.kernel import MAX_COPIES, Contender, Kernel, Setting, Unavailable, block_tables
from kvfold.bench.timing import Timing
from kvfold.commands import UsageError
from kvfold.commands import bench as bench_command
from kvfold.formats import KVFormat
from kvfold.layout import PageLayout

CPU = Setting(torch.device("cpu"), l2_bytes=1000, page_size=16, memory_bytes=2**20)
K4V4 = KVFormat.parse("k4v4")
DECODE = DecodeCase("2x40", (40, 40), num_heads=4, num_kv_heads=2, head_size=32)
RAGGED = DecodeCase("ragged", (5, 33, 16), num_heads=4, num_kv_heads=2, head_size=32, query_tokens=3)
PREFILL = PrefillCase("prefill", chunk=70, prefix=45, num_heads=4, num_kv_heads=2, head_size=32)
STORE = StoreCase("store", 9, num_kv_heads=2, head_size=32)


class Result:
    def __init__(self, code: int, captured: pytest.CaptureResult[str]) -> None:
        self.code, self.out, self.err = code, captured.out, captured.err


@pytest.fixture
def kvfold(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *argv: Result(cli.main([str(word) for word in argv]), capsys.readouterr())


# --- shapes and bytes -------------------------------------------------------------------------------------------------


def test_the_shapes() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(QUICK) < set(names)
    by_name = {case.name: case for case in CASES if isinstance(case, DecodeCase)}
    assert by_name["8x32768"].lengths == (32768,) * 8
    assert (by_name["gqa8-8x32768"].num_heads, by_name["gqa8-8x32768"].num_kv_heads) == (64, 8)
    assert (by_name["mha-8x32768"].num_heads, by_name["mha-8x32768"].num_kv_heads) == (32, 32)
    assert by_name["q4-8x32768"].query_tokens == 4
    assert not by_name["ragged-64"].uniform


def test_ragged_lengths_are_the_same_in_every_run() -> None:
    lengths = ragged_lengths(64, 1024, 65536)
    assert lengths == ragged_lengths(64, 1024, 65536)
    assert len(lengths) == 64
    assert min(lengths) >= 1024
    assert max(lengths) <= 65536
    assert len(set(lengths)) > 50


@pytest.mark.parametrize("spec", ["k4v4", "k3v3", "k2v2", "k4v3", "bf16", "fp8"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_bytes_are_those_of_the_layout(spec: str, page_size: int) -> None:
    fmt = KVFormat.parse(spec)
    for case in CASES:
        layout = PageLayout.of(fmt, case.head_size, None, page_size)
        tokens = {"decode": "tokens", "store": "tokens", "prefill": "prefix"}[case.kind]
        pages = getattr(case, tokens) / page_size
        assert case.cache_bytes(fmt) == pages * case.num_kv_heads * layout.page_bytes


def test_the_known_bytes_and_operations() -> None:
    large = next(case for case in CASES if case.name == "8x32768")
    assert large.cache_bytes(K4V4) == 8 * 32768 * 8 * 132
    assert large.cache_bytes(KVFormat.parse("bf16")) == 8 * 32768 * 8 * 512
    assert isinstance(large, DecodeCase)
    assert large.flops == 2 * 2 * 32 * 128 * 8 * 32768
    assert PrefillCase("x", chunk=3, prefix=10, num_heads=1, head_size=1).flops == 4 * (11 + 12 + 13)
    assert STORE.input_bytes == 9 * 2 * 2 * 32 * 2


def test_a_reduced_batch_keeps_the_longest() -> None:
    assert RAGGED.reduced().lengths == (5, 33)
    assert DecodeCase("x", (7,)).reduced().lengths == (7,)


def test_shapes_are_selected_by_pattern() -> None:
    assert select() == list(CASES)
    assert [case.name for case in select(quick=True)] == list(QUICK)
    assert [case.name for case in select(["store-*", "8x32768"])] == ["8x32768", "store-8192", "store-8"]
    assert [case.name for case in select(["1x1024"], quick=True)] == ["1x1024"]
    with pytest.raises(ValueError, match="no shape is called '9x9'; there are 8x32768"):
        select(["9x9"])


# --- what a kernel is prepared from -----------------------------------------------------------------------------------


def test_copies_exceed_the_l2_or_are_many() -> None:
    assert CPU.copies(4000) == 1
    assert CPU.copies(3999) == 2
    assert CPU.copies(100) == 40
    assert CPU.copies(1) == CPU.copies(0) == MAX_COPIES


def test_all_kernels_of_a_decode_have_as_many_calls() -> None:
    """DECODE is 160 vectors of 64 values: 20 bytes each in k2v2, and 128 in bf16."""
    assert DECODE.cache_bytes(KVFormat.parse("k2v2")) == 3200
    assert DECODE.cache_bytes(KVFormat.parse("bf16")) == 20480
    room = 8 * 20480
    assert replace(CPU, memory_bytes=8 * room).decodes(DECODE) == 8
    assert replace(CPU, memory_bytes=8 * room - 1).decodes(DECODE) == 7
    assert replace(CPU, memory_bytes=0).decodes(DECODE) == 2  # which the L2 asks for
    assert replace(CPU, l2_bytes=16000).decodes(DECODE) == 20


def test_page_tables_are_disjoint_and_complete() -> None:
    tables, total = block_tables(RAGGED, copies=3, page_size=16, device=CPU.device)
    assert tables.shape == (3, 3, 3)
    assert total == 3 * (1 + 3 + 1)
    used = torch.cat([tables[:, 0, :1], tables[:, 1, :3], tables[:, 2, :1]], dim=1).flatten()
    assert sorted(used.tolist()) == list(range(total))
    assert (tables[:, 0, 1:] == 0).all()
    assert tables.dtype == torch.int32
    assert used.tolist() != sorted(used.tolist())


@pytest.mark.parametrize("spec", ["k4v4", "k3v3", "k2v2", "k4v3", "k8v1", "k4v4+mean", "k4tv2t"])
def test_random_pages_hold_finite_vectors_of_size_one(spec: str) -> None:
    layout = PageLayout.of(spec, 64, None, 32)
    pages = ours.random_pages(layout, 5, 2, CPU.device)
    k, v = ops.load_kv(pages, torch.arange(5).int()[None], layout, 160)
    for x in (k, v):
        assert torch.isfinite(x).all()
        assert 0.5 < float(x.square().mean().sqrt()) < 3


@pytest.mark.parametrize("case", [DECODE, RAGGED, PREFILL, STORE], ids=lambda case: case.name)
@pytest.mark.parametrize("spec", ["k4v4", "k2v3", "k4v3+mean", "k3tv4"])
def test_our_kernels_run_and_are_right(case: Case, spec: str) -> None:
    fmt = KVFormat.parse(spec)
    (kernel,) = ours.contender(fmt, "cpu").prepare(case, CPU)
    wanted = case.cache_bytes(fmt) + (case.input_bytes if isinstance(case, StoreCase) else 0)
    assert kernel.bytes == wanted
    # a prefill is called once in a replay, as its rivals are
    calls = {PrefillCase: 1, StoreCase: CPU.copies(wanted)}.get(type(case)) or CPU.decodes(case)
    assert len(kernel.calls) == calls
    for call in kernel.calls[:2]:
        call()
    check = ours.check(case, CPU, fmt, "cpu")
    assert check.ok, check


def test_a_wrong_output_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.decode_attention

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)
        out[0, 0, 0] += 1
        return out, lse

    monkeypatch.setattr(ops, "decode_attention", wrong)
    check = ours.check(DECODE, CPU, K4V4, "cpu")
    assert not check.ok
    assert not replace(check, value=float("nan")).ok


def test_dense_attention_is_causal() -> None:
    q, k, v = torch.randn(2, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    out = ours.dense(q, k, v, query_start=4)
    assert torch.allclose(out[0], ours.dense(q[:1], k[:5], v[:5], query_start=4)[0])
    weights = torch.softmax((k[:, 1] @ q[1, 3] * 8**-0.5).double(), dim=0)
    assert torch.allclose(out[1, 3], weights @ v[:, 1].double(), atol=1e-6)


def test_store_formats_have_one_and_three_candidates() -> None:
    assert [str(fmt) for fmt in ours.store_formats(K4V4)] == ["k4v4+pre1", "k4v4"]
    assert [str(fmt) for fmt in ours.store_formats(KVFormat.parse("k4tv3"))] == ["k4tv3+pre1", "k4tv3"]


# --- rivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", rivals.rivals(), ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", [DECODE, PREFILL, STORE], ids=lambda case: case.kind)
def test_a_rival_that_is_not_installed_says_so(
    contender: Contender, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    needs_nothing = {"decode": "sdpa", "store": "torch", "prefill": "none"}[case.kind]
    if contender.name.startswith(needs_nothing):
        assert contender.prepare(case, CPU)
        return
    with pytest.raises(Unavailable) as error:
        contender.prepare(case, CPU)
    assert str(error.value)
    if isinstance(case, DecodeCase) and contender.name.startswith(("fa3", "vllm")):
        assert "cannot be imported" in str(error.value)
        assert "install" in str(error.value) or "build" in str(error.value)


def test_what_a_rival_cannot_do_is_said() -> None:
    for prepare, case, reason in (
        (rivals.sdpa_flash, RAGGED, "different lengths"),
        (rivals.sdpa_cudnn, replace(DECODE, query_tokens=4), "causal mask"),
        (rivals.flash_attention_3_fp8, PREFILL, "decoding only"),
        (rivals.torch_scatter, DECODE, "storing only"),
    ):
        with pytest.raises(Unavailable, match=reason):
            prepare(case, CPU)
    with pytest.raises(Unavailable, match="one query token"):
        rivals.vllm_turboquant(RAGGED, CPU, "turboquant_4bit_nc")


def test_sdpa_and_scatter_are_called_right() -> None:
    (flash,) = rivals.sdpa_flash(DECODE, CPU)
    assert flash.bytes == DECODE.cache_bytes(KVFormat.parse("bf16"))
    assert len(flash.calls) == CPU.decodes(DECODE)
    (scatter,) = rivals.torch_scatter(STORE, CPU)
    assert scatter.bytes == 2 * STORE.input_bytes
    scatter.calls[0]()


class FakeFlashAttention:
    """Records how it is called, and attends densely, so that the arguments are known to make sense."""

    FA3_AVAILABLE = True

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.schedules: list[dict[str, Any]] = []

    def get_scheduler_metadata(self, **kwargs: Any) -> str:
        self.schedules.append(kwargs)
        return "schedule"

    def flash_attn_varlen_func(self, **kwargs: Any) -> torch.Tensor:
        self.calls.append(kwargs)
        k, v = (kwargs[name][kwargs["block_table"].long()].flatten(1, 2).float() for name in ("k", "v"))
        starts, out = kwargs["cu_seqlens_q"].tolist(), []
        for b, length in enumerate(kwargs["seqused_k"].tolist()):
            q = kwargs["q"][starts[b] : starts[b + 1]].float()
            out.append(ours.dense(q, k[b, :length], v[b, :length], length - len(q)))
        return kwargs["out"].copy_(torch.cat(out))


@pytest.mark.parametrize("case", [DECODE, RAGGED, PREFILL], ids=lambda case: case.name)
@pytest.mark.parametrize("fp8", [False, True])
def test_flash_attention_3_is_called_as_vllm_calls_it(case: Case, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeFlashAttention()
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn.flash_attn_interface", fake)  # type: ignore[arg-type]
    for name in ("vllm", "vllm.vllm_flash_attn"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    if fp8 and isinstance(case, PrefillCase):
        return
    kernels = (rivals.flash_attention_3_fp8 if fp8 else rivals.flash_attention_3_bf16)(case, CPU)
    assert len(kernels) == (4 if isinstance(case, PrefillCase) else 2)
    for kernel in kernels:
        assert torch.isfinite(kernel.calls[0]().float()).all()  # type: ignore[attr-defined]
        assert kernel.bytes == case.cache_bytes(KVFormat.parse("kf8castvf8cast" if fp8 else "bf16"))
        assert len(kernel.calls) == (CPU.decodes(case) if isinstance(case, DecodeCase) else 1)
    assert [call["num_splits"] for call in fake.calls[:2]] == [32, 0]
    call, schedule = fake.calls[0], fake.schedules[0]
    assert call["fa_version"] == 3
    assert call["causal"]
    assert call["scheduler_metadata"] == "schedule"
    assert schedule["num_splits"] == 32
    assert schedule["page_size"] == 16
    assert schedule["qkv_dtype"] == call["k"].dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
    assert call["k"].stride(-1) == 1
    if fp8:
        assert call["q_descale"].shape == (len(call["seqused_k"]), 2)
        assert call["out"].dtype == torch.bfloat16


# --- a run with a fake clock ------------------------------------------------------------------------------------------


class FakeTimer:
    """Runs the calls once; every replay takes as many microseconds as there are calls, times ten."""

    def __init__(self, *_: object) -> None:
        pass

    def capture(self, calls: Sequence[Callable[[], object]], graph: bool) -> Any:
        calls[0]()
        return list(calls)

    def time(self, graph: Any, replays: int = 30) -> float:
        return 10.0 * len(graph)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Timer", FakeTimer)
    monkeypatch.setattr(runner, "copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(runner, "_still_alive", lambda error: None)
    for name in ("vllm", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)


def measured(cases: Sequence[Case], backends: Sequence[str] = ("cpu",), rivals_too: bool = False) -> report.Report:
    result = report.Report(dict(rivals.BASELINES))
    said: list[str] = []
    runner.measure(
        cases, [K4V4], backends, CPU, result, replays=30, with_rivals=rivals_too, say=said.append
    )  # fmt: skip
    assert len(said) == 1 + len(cases)
    return result


@pytest.mark.usefixtures("fake_device")
def test_a_run() -> None:
    result = measured([DECODE, STORE, PREFILL], ("cpu", "cuda"))
    assert [(row.kind, row.kernel) for row in result.rows] == [
        ("decode", "kvfold-cpu k4v4"),
        ("store", "kvfold-cpu k4v4+pre1"),
        ("store", "kvfold-cpu k4v4"),
        ("prefill", "kvfold-cpu k4v4"),
    ]
    assert {row.us for row in result.rows} == {10.0}
    assert len(result.checks) == 4
    assert result.ok
    assert {entry.kernel for entry in result.missing} == {"kvfold-cuda k4v4", "kvfold-cuda k4v4+pre1"}
    assert all("cuda" in entry.reason for entry in result.missing)


@pytest.mark.usefixtures("fake_device")
def test_a_baseline_and_a_rival_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, setting: Setting) -> Sequence[Kernel]:
        raise RuntimeError("no kernel image\nand more")

    slow = Kernel([lambda: None] * 2, 1000, "slow")
    fast = Kernel([lambda: None], 1000, "fast")
    contenders = [Contender(rivals.FA3_BF16, lambda case, setting: [slow, fast]), Contender("broken", broken)]
    monkeypatch.setattr(runner, "rivals", lambda: contenders)
    result = measured([DECODE], rivals_too=True)
    assert [(row.kernel, row.ratio) for row in result.rows] == [("fa3-bf16", 1.0), ("kvfold-cpu k4v4", 1.0)]
    assert [(entry.kernel, entry.reason) for entry in result.missing] == [("broken", "RuntimeError: no kernel image")]
    assert result.ok


@pytest.mark.usefixtures("fake_device")
def test_a_failure_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("compilation failed")

    monkeypatch.setattr(ops, "decode_attention", fail)
    result = measured([DECODE, STORE])
    assert not result.ok
    assert result.failures[0] == "2x40: kvfold-cpu k4v4: RuntimeError: compilation failed"
    assert [row.kind for row in result.rows] == ["store", "store"]


@pytest.mark.usefixtures("fake_device")
def test_a_lost_device_ends_the_run_and_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: object, graph: Any, replays: int = 30) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = report.Report(dict(rivals.BASELINES))
    arguments: dict[str, Any] = {"replays": 30, "with_rivals": False, "say": lambda text: None}
    runner.measure([STORE], [K4V4], ["cpu"], CPU, result, **arguments)
    monkeypatch.setattr(FakeTimer, "time", lost)
    runner.measure([DECODE, PREFILL], [K4V4], ["cpu"], CPU, result, **arguments)
    assert [row.kind for row in result.rows] == ["store", "store"]
    assert len(result.failures) == 1
    assert "2x40: kvfold-cpu k4v4: RuntimeError: CUDA error" in result.failures[0]
    assert "nothing after it" in result.failures[0]


# --- the report -------------------------------------------------------------------------------------------------------


def a_row(kernel: str, us: float, case: str = "8x32768", kind: str = "decode", **more: Any) -> report.Row:
    return report.Row(
        kind, case, kernel, kernel.startswith("kvfold"), us, (us, us), 0.0, 276_824_064, 4_294_967_296, 30, 1, **more
    )


def a_report() -> report.Report:
    result = report.Report(dict(rivals.BASELINES), copy_bytes_per_second=4.3e12)
    result.add([a_row("fa3-bf16", 265.0), a_row("kvfold-cuda k4v4", 80.0)])
    result.add([a_row("kvfold-cuda k4v4", 20.0, "store-8192", "store")])
    result.add(
        [a_row("fa3-bf16", 2000.0, "prefill", "prefill"), a_row("kvfold-cuda k4v4", 1900.0, "prefill", "prefill")]
    )
    result.checks.append(report.Check("8x32768", "kvfold-cuda k4v4", "relative error", 0.0018, 4e-3))
    result.missing += [report.Missing(case, "fa3-fp8", "not installed") for case in ("a", "b", "c", "d")]
    return result


def test_timing() -> None:
    timing = Timing(99.0, 101.0, 30, 4)
    assert timing.us == 100.0
    assert timing.spread == pytest.approx(0.02)


def test_the_table() -> None:
    text = report.text(a_report())
    lines = text.splitlines()
    assert lines[0] == "Decode attention"
    assert lines[1].split() == ["shape", "kernel", "us", "x", "fa3-bf16", "TB/s", "of", "copy", "spread"]
    assert lines[2].split() == ["8x32768", "fa3-bf16", "265.0", "1.00", "1.04", "24%", "0.0%"]
    assert lines[3].split() == ["kvfold-cuda", "k4v4", "80.0", "3.31", "3.46", "80%", "0.0%"]
    assert "x torch-scatter-bf16" in text
    assert "TFLOP/s" in text
    assert "fa3-fp8 (a, b and 2 more): not installed" in text
    assert "relative error, the largest 0.0018 (kvfold-cuda k4v4, 8x32768), allowed 0.004" in text
    assert "WRONG" not in text
    assert "FAILED" not in text
    assert max(map(len, lines)) <= 120


def test_a_wrong_result_is_shown() -> None:
    result = a_report()
    result.checks.append(report.Check("1x1024", "kvfold-triton k3v3", "relative error", float("nan"), 4e-3))
    result.failures.append("1x1024: kvfold-cuda k2v2: RuntimeError: no")
    text = report.text(result)
    assert not result.ok
    assert "WRONG: 1x1024, kvfold-triton k3v3: relative error nan" in text
    assert "FAILED:\n  1x1024: kvfold-cuda k2v2: RuntimeError: no" in text


def test_an_empty_report_is_a_text() -> None:
    assert "us: of one call" in report.text(report.Report(dict(rivals.BASELINES)))


def test_json() -> None:
    result = a_report()
    result.checks.append(report.Check("1x1024", "kvfold-triton k3v3", "relative error", float("nan"), 4e-3))
    data = json.loads(json.dumps(result.json(), allow_nan=False))
    assert list(data) == ["copy_tb_per_second", "baselines", "rows", "checks", "missing", "failures"]
    row = data["rows"][1]
    assert list(row) == [
        "kind", "case", "kernel", "ours", "us", "us_rounds", "spread", "ratio", "bytes", "tb_per_second",
        "share_of_copy", "tflops", "replays", "calls_per_replay", "note",
    ]  # fmt: skip
    assert row["ratio"] == 265 / 80
    assert row["tb_per_second"] == pytest.approx(276_824_064 / 80e-6 / 1e12)
    assert data["rows"][2]["ratio"] is None
    assert data["checks"][1]["value"] is None
    assert data["checks"][1]["ok"] is False


def test_json_is_read_back() -> None:
    result = a_report()
    result.failures.append("x")
    again = report.Report.of_json(json.loads(json.dumps(result.json())))
    assert again == result
    assert report.text(again) == report.text(result)


def test_figures_of_an_earlier_run_are_shown(kvfold: Any, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    head = {"environment": {"gpu": "H200", "kvfold": "0.1", "commit": None}}
    path.write_text(json.dumps({**head, **a_report().json()}))
    result = kvfold("bench", "--show", path)
    assert (result.code, result.err) == (0, "")
    assert result.out == report.text(a_report()) + "\n"
    assert "leave one of them out" in kvfold("bench", "--show", path, "--json", tmp_path / "y.json").err
    for text in ("{}", "[]", "3", "no json"):
        path.write_text(text)
        result = kvfold("bench", "--show", path)
        assert result.code == 2
        assert "is not what `kvfold bench --json` writes" in result.err


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'kvfold\[plot\]'"):
        report.plot(a_report(), tmp_path / "x.png", "title")


def test_a_plot_needs_a_baseline(tmp_path: Path) -> None:
    result = report.Report(dict(rivals.BASELINES))
    result.add([a_row("kvfold-cuda k4v4", 80.0)])
    with pytest.raises(UsageError, match="nothing to plot"):
        report.plot(result, tmp_path / "x.png", "title")


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(a_report(), tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").stat().st_size > 1000


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "`kvfold compare`"),
        ("--shapes 9x9", "argument --shapes: no shape is called '9x9'; there are 8x32768"),
        ("--format k4v4+sinks4", "leave them out"),
        ("--format fp8", "random codes"),
        ("--format k9v9", "unknown format"),
        ("--backend cpu", "choose from"),
        ("--replays 0", "--replays"),
        ("--page-size 48", "--page-size"),
        ("--json nowhere/x.json", "there is no folder"),
    ],
)
def test_refusals(kvfold: Any, monkeypatch: pytest.MonkeyPatch, argv: str, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = kvfold("bench", *argv.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvfold: error: ")
    assert words in result.err


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.usefixtures("fake_device")
def test_the_command(kvfold: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: bool) -> None:
    class Properties:
        name, multi_processor_count, major, minor, total_memory, L2_cache_size = "Fake H200", 132, 9, 0, 2**37, 1000

    real = torch.device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch, "device", lambda *args: real("cpu"))
    monkeypatch.setattr(bench_command, "select", lambda *_: [DECODE])
    monkeypatch.setattr(bench_command, "_driver", lambda: "580.1")
    if wrong:
        monkeypatch.setattr(runner.ours, "ERROR_LIMIT", 0.0)
    parser_backends = ("cpu", *bench_command.BACKENDS)
    monkeypatch.setattr(bench_command, "BACKENDS", parser_backends)
    path = tmp_path / "bench.json"
    result = kvfold("bench", "--format", "k4v4", "--backend", "cpu", "--page-size", "16", "--json", path, "--no-rivals")
    assert result.code == wrong
    assert "2x40: 1 kernels, kvfold-cpu k4v4 10.0 us" in result.err
    assert result.out.startswith("Decode attention\n")
    assert ("WRONG" in result.out) == wrong
    data = json.loads(path.read_text())
    assert list(data)[:4] == ["command", "date", "environment", "settings"]
    assert data["environment"]["gpu"] == "Fake H200"
    assert data["environment"]["driver"] == "580.1"
    assert {"kvfold", "commit", "torch", "triton", "vllm", "cuda"} <= set(data["environment"])
    assert data["settings"] == {
        "formats": ["k4v4"], "backends": ["cpu"], "page_size": 16, "replays": 30, "l2_bytes": 1000,
    }  # fmt: skip
    assert data["rows"][0]["case"] == "2x40"
