"""`kvfold report`: files are recognised, figures stay with their like, what is written is whole and self-contained."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvfold.bench.report import Report as Bench
from kvfold.bench.report import Row as BenchRow
from kvfold.commands import fidelity, needle_report, storage
from kvfold.eval.fidelity import FIRST_POSITION, Tokens
from kvfold.eval.needle import Needle, Prompt, Score
from kvfold.formats import KVFormat
from kvfold.modelshape import FULL, LayerGroup, ModelShape
from kvfold.report import drawing, fidelity_figures, html, sources
from kvfold.report import memory as memory_report
from kvfold.report.document import Report, Section
from kvfold.report.entries import Damaged

pytest.importorskip("matplotlib")

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WINDOWS, LENGTH = 4, 200
GROUP = LayerGroup(FULL, 4, 2, 64, 64)
ENVIRONMENT = {"kvfold": "0.1.0", "commit": "abc1234", "torch": "2.13.0", "machine": "x86_64", "threads": 2}
HOSTILE = '<script>alert("x")</script>&$a_{b$'

Data = dict[str, Any]


def head(command: str, **more: Any) -> Data:
    return {"command": command, "date": "2026-11-28T04:51:46+00:00", "environment": dict(ENVIRONMENT), **more}


# --- files, made by what makes the real ones --------------------------------------------------------------------------


def fidelity_file(formats: dict[str, float], rivals: dict[str, float] | None = None, **settings: Any) -> Data:
    """Formats with about these mean divergences; those of ``rivals`` are other systems'."""
    rng = np.random.default_rng(0)
    n = LENGTH - FIRST_POSITION - 1
    nll = [rng.gamma(2.0, 1.5, n) for _ in range(settings.get("windows", WINDOWS))]
    kinds = [("noise", fidelity.NOISE, 0.0)]
    kinds += [("format", name, kl) for name, kl in formats.items()]
    kinds += [("rival", name, kl) for name, kl in (rivals or {}).items()]
    columns = []
    for kind, name, kl in kinds:
        fmt: Any = None if kind == "noise" else KVFormat.parse(name if kind == "format" else "k4v4")
        bits = None if fmt is None else fmt.bits_per_element(64)
        tokens = [
            Tokens(kl * rng.uniform(0.5, 1.5, n), (rng.uniform(size=n) > kl).astype(float), own + kl / 3) for own in nll
        ]
        columns.append(fidelity.Column(kind, name, fmt, bits, bits and 96 * bits, None, tokens))
    result = fidelity.Measured(columns, nll).result().json()
    for row, (_, name, _) in zip(result["rows"][1:], kinds[1:], strict=True):  # type: ignore[index]
        row["format"] = name
    about = {
        "model": "tiny", "dtype": "float32", "device": "cpu",
        "text": {"file": "/somewhere/else/book.txt", "sha256": "0" * 64, "tokens": 9999},
        "windows": WINDOWS, "window_tokens": LENGTH, "begins_with_bos": False, "first_position": FIRST_POSITION,
        "chunk": "packed", "chunk_tokens": LENGTH, "page_size": 64,
    }  # fmt: skip
    return head("kvfold fidelity --text book.txt", settings={**about, **settings}, **result)


def needle_file(formats: tuple[str, ...] = ("k4v4", "k2v2"), lengths: tuple[int, ...] = (256, 512)) -> Data:
    tasks = [
        needle_report.Task(length, depth, trial, Prompt(Needle("Oslo", "3141592"), [0] * length, 3, 7))
        for length in lengths
        for depth in (0.0, 50.0, 100.0)
        for trial in range(2)
    ]
    columns = []
    for place, name in enumerate(("none", *formats)):
        scores = [Score((index * 7 + 3) % (place + 5) > place, -0.1 - place) for index in range(len(tasks))]
        fmt = KVFormat.parse(name) if place else None
        columns.append(needle_report.Column(name, fmt, fmt.bits_per_element(64) if fmt else None, None, scores))
    settings = {
        "model": "tiny", "dtype": "float32", "text": {"file": "book.txt", "sha256": "0"},
        "log_prob_of_a_guess": -2.3026,
    }  # fmt: skip
    return head("kvfold needle", settings=settings, **needle_report.Result.of(tasks, columns).json())


def storage_file(wrong: int = 0, **settings: Any) -> Data:
    rows = []
    for tokens in (1024, 4096):
        plain = tokens * 4 * 2 * 128 * 2
        for name in ("none", "k4v4", "k3v3+sinks4+tail128"):
            part = plain if name == "none" else plain // 4
            rows.append(
                storage.Row(name, tokens, tokens, part, 0, 0, 16 * (name != "none"), 0, part + wrong, part, plain)
            )
    about = {"model": "", "itemsize": 2, "device": "cpu", "page_size": 64, **settings}
    return head("kvfold storage", settings=about, **storage.Result({GROUP: 1}, None, rows).json(ModelShape((GROUP,))))


def bench_file() -> Data:
    report = Bench({"decode": "fa3-bf16", "prefill": "fa3-bf16", "store": "torch-scatter-bf16"}, 3e12)
    for case in ("8x32768", "1x1024"):
        kernels = (("fa3-bf16", 100.0), ("fa3-fp8", 60.0), ("kvfold-cuda k4v4", 40.0), ("kvfold-triton k4v4", 90.0))
        report.add([bench_row("decode", case, kernel, us) for kernel, us in kernels])
    report.add([bench_row("store", "store-8", "kvfold-cuda k4v4+pre1", 3.0)])  # without a baseline
    return head("kvfold bench", **report.json()) | {"environment": {**ENVIRONMENT, "gpu": "NVIDIA H100"}}


def bench_row(kind: str, case: str, kernel: str, us: float) -> BenchRow:
    return BenchRow(kind, case, kernel, kernel.startswith("kvfold"), us, (us, us), 0.01, 1000, 0, 30, 1)


def vllm_file() -> Data:
    def cache(dtype: str, tokens: int, rate: float) -> Data:
        cases = [
            {"case": name, "batch": batch, "prompt": 10, "prefill_seconds": 1.0, "decode_tokens_per_second": rate}
            for name, batch in (("8x10", 8), ("full", tokens // 1000))
        ]
        return {"dtype": dtype, "tokens": tokens, "block_size": 16, "cases": cases}

    caches = [cache("turboquant", 4000, 200.0), cache("auto", 1000, 100.0), cache("fp8", 2000, 150.0)]
    return head("benchmarks/vllm_engine.py", layers=36, utilization=0.5, caches=caches)


def plan_file(kvfold: Any) -> Data:
    by_hand = ("--layers", "4", "--kv-heads", "2", "--head-size", "64")
    return json.loads(kvfold("plan", *by_hand, "--memory", "1GiB", "--format", "k4v4", "--json").out)


# --- running and reading ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Well-formedness, and what a page is made of."""

    EMPTY = ("meta", "link", "img", "br", "hr", "input", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name != "src"
            self.ids += [value or ""] if name == "id" else []
            self.references += [value or ""] if name == "href" else re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())


def check_page(text: str) -> Page:
    """The promises of a page: whole, no script, nothing from outside, references that lead somewhere."""
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert not re.search(r"https?:|//[a-z]|@import|xmlns", text)
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
    assert used <= defined
    return page


def write(folder: Path, **files: Data) -> None:
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


def sections_of(*files: Data) -> list[Section]:
    return sources.sections([sources.recognise(data, f"{place}.json") for place, data in enumerate(files)])


@pytest.fixture
def everything(tmp_path: Path, kvfold: Any) -> Path:
    """A folder with a file of every kind."""
    folder = tmp_path / "figures"
    folder.mkdir()
    write(
        folder,
        fidelity=fidelity_file({"k8v8": 2e-4, "k4v4": 0.05, "k2v2": 0.9}, {"vllm:4bit_nc": 0.06, "nvfp4": 0.2}),
        needle=needle_file(),
        storage=storage_file(),
        plan=plan_file(kvfold),
        bench=bench_file(),
        vllm=vllm_file(),
    )
    return folder


# --- a whole report ---------------------------------------------------------------------------------------------------


def test_a_page_of_everything(kvfold: Any, everything: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = kvfold("report", everything, "--output", output)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{output}: 5 sections and 8 figures of 6 files\n"
    page = check_page(output.read_text("utf-8"))
    assert page.tags.count("svg") == page.tags.count("figure") == 8
    texts = "\n".join(page.texts)
    for words in (
        "1. Fidelity: tiny on book.txt", "4 windows of 200 tokens", "vllm:4bit_nc", "Pareto frontier", "noise floor: 0",
        "2. Needles: tiny in book.txt", "depth of the needle",
        "3. Memory: model", "4 full (2 KV heads of 64)", "memory for the KV cache, GiB", "Live bytes",
        "4. Kernels: NVIDIA H100", "Decode attention, fa3-bf16 = 1", "2.50x",
        "5. vLLM: x86_64 CPU, 2 threads", "tokens that fit, thousands", "4.00x",
    ):  # fmt: skip
        assert words in texts, words


def test_every_figure_says_where_it_comes_from(kvfold: Any, everything: Path, tmp_path: Path) -> None:
    kvfold("report", everything, "--output", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    captions = re.findall("<figcaption>.*?</figcaption>", text, re.DOTALL)
    for caption in captions:
        assert '<p class="origin">From ' in caption
        assert "<code>" in caption
        assert "commit abc1234, 2026-11-28 04:51 UTC" in caption
    assert sum("kvfold 0.1.0, torch 2.13.0" in caption for caption in captions) == 8
    assert "From plan.json.</p>" in text  # which has neither command nor date
    assert "/somewhere/else" not in text


def test_the_summary(kvfold: Any, everything: Path) -> None:
    files, _ = sources.gather([everything])
    table = Report(sources.sections(files), "").summary()
    assert table.header == [
        "format", "bits", "KL", "top-1", "perplexity", "found", "smaller at 4,096", "decode, x fa3-bf16",
        "tokens that fit",
    ]  # fmt: skip
    assert [span for _, _, span in table.groups] == [4, 1, 1, 1, 1]
    rows = {row[0]: row[1:] for row in table.rows}
    names = ["none", "k8v8", "k4v4", "k3v3+sinks4+tail128", "k2v2", "nvfp4", "vLLM fp8", "vllm:4bit_nc"]
    assert list(rows)[:5] == names[:5]  # kvfold's own, those of many bits first
    assert sorted(rows) == sorted(names)
    assert rows["k4v4"][0] == "4.250"
    assert rows["k4v4"][5:] == ["4.00x", "2.50x", "4.00x"]  # turboquant is k4v4; the faster backend counts
    assert rows["none"][4:] == ["9/12", "1.00x", "", "1.00x"]
    assert rows["vllm:4bit_nc"][4:] == [""] * 4


def test_the_committed_figures(kvfold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RESULTS.parents[1])  # the folder that is read if none is named
    output = tmp_path / "report.html"
    result = kvfold("report", "--output", output)
    assert result.code == 0
    left_out = [line for line in result.err.splitlines() if "left out" in line]
    scripts = ("decode_limits", "decode_timeline", "prefill_limits", "vllm_answers", "vllm_fidelity")
    unseen = ("kvfold compare", "kvfold tune", *(f"benchmarks/{name}.py" for name in scripts))
    files = sorted(RESULTS.glob("*.json"))
    expected = [f"{file.name}:" for file in files if json.loads(file.read_text())["command"].startswith(unseen)]
    assert [line.split()[2] for line in left_out] == expected
    assert all("of which the report shows nothing" in line for line in left_out)  # and so it knows what they are
    last = result.out.splitlines()[-1]
    shown = (RESULTS.parents[1] / "docs" / "report.md").read_text("utf-8")
    assert "\n".join([*left_out, last.replace(str(output), "report.html")]) in shown
    text = output.read_text("utf-8")
    page = check_page(text)
    for words in ("Fidelity: smollm2 on wiki.test.raw", "Kernels: NVIDIA H200", "3.91x", "43/45"):
        assert words in text
    assert "NVIDIA H100 80GB HBM3 (h100_bench_triton.json)" in text  # of two with the same title
    assert "(command: the folders of its files are left out; written by hand, nothing else)" in text
    assert "cpu_compare_smollm2.json: it is of `kvfold compare`, of which the report shows nothing" in page.texts


def test_numbers_are_those_of_the_file() -> None:
    data = json.loads((RESULTS / "cpu_fidelity_smollm2.json").read_text())
    (section,) = sections_of(data)
    columns = {column.title: column.values for column in section.columns}
    for row in data["rows"][1:]:
        assert columns["KL"][row["format"]] == f"{row['kl_mean']['value']:.3g}"
        assert columns["top-1"][row["format"]] == f"{row['top1']['value']:.1%}"
        cells = next(cells for cells in section.blocks[-1].rows if cells[0] == row["format"])  # type: ignore[union-attr]
        low, high = row["kl_mean"]["low"], row["kl_mean"]["high"]
        assert cells[3] == f"{row['kl_mean']['value']:.3g}\n{low:.3g} … {high:.3g}"


def test_the_same_figures_as_pdf(kvfold: Any, everything: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.PDF"
    result = kvfold("report", everything, "--pdf", "--output", output)
    assert (result.code, result.err) == (0, "")
    written = output.read_bytes()
    assert written.startswith(b"%PDF-")
    assert written.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type /Page\b", written)) == 1 + 8


def test_names_of_the_output(kvfold: Any, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(everything)  # the folder that is read if there is no benchmarks/results
    assert kvfold("report").out.startswith("report.html: 5 sections")
    assert kvfold("report", "needle.json", "--pdf").out == "report.pdf: 1 section and 1 figure of 1 file\n"
    assert (everything / "report.pdf").read_bytes().startswith(b"%PDF-")
    check_page((everything / "report.html").read_text("utf-8"))


# --- what stands beside what ------------------------------------------------------------------------------------------


def test_files_of_the_same_setting_share_a_frontier() -> None:
    ours = fidelity_file({"k4v4": 0.05, "k2v2": 0.9})
    rivals = fidelity_file({"k4v4": 0.07}, {"paper:mse4": 0.04})
    rivals["date"] = "2026-11-29T04:51:46+00:00"
    (section,) = sections_of(ours, rivals)
    table = section.blocks[-1]
    assert table.header[-1] == "file"  # type: ignore[union-attr]
    assert {row[0]: row[-1] for row in table.rows[2:]} == {  # type: ignore[union-attr]
        "k4v4": "1.json", "paper:mse4": "1.json", "k2v2": "0.json",
    }  # fmt: skip
    assert "k4v4 is in 0.json too; the newer figures are shown." in section.notes
    assert [origin.file for origin in section.pictures[0].origins] == ["0.json", "1.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "other"), ("dtype", "bfloat16"), ("text", {"file": "book.txt", "sha256": "1" * 64}),
        ("window_tokens", 256), ("chunk", "exact"), ("begins_with_bos", True), ("page_size", 16),
    ],
)  # fmt: skip
def test_other_settings_have_sections_of_their_own(key: str, value: Any) -> None:
    sections = sections_of(fidelity_file({"k4v4": 0.05}), fidelity_file({"k2v2": 0.9}, **{key: value}))
    assert [list(section.bits) for section in sections] == [["k4v4"], ["k2v2"]]
    assert len({section.title for section in sections}) == 2


def test_fewer_windows_and_other_weights_have_sections_of_their_own() -> None:
    few = fidelity_file({"k2v2": 0.9})
    few["measured_windows"] = 3  # it was interrupted
    other = fidelity_file({"k2v2": 0.9})
    other["baseline"]["perplexity"]["value"] *= 1.1  # another model of this name
    assert len(sections_of(fidelity_file({"k4v4": 0.05}), few, other)) == 3


def test_the_pareto_frontier() -> None:
    formats = {"k8v8": 2e-4, "k4v4": 0.05, "k4v4+plain": 0.08, "k3v3": 0.2, "k5v5": 0.06, "k4v4+sinks4+tail128": 0.01}
    run = sources.recognise(fidelity_file(formats, {"vllm:k8v4": 0.3}), "f.json").content
    best = fidelity_figures.pareto([row for row in run.rows if row.kind != "noise"])
    assert [row.format for row in best] == ["k3v3", "k4v4", "k8v8"]  # neither dominated ones nor exact tokens


def test_systems_differ_in_marker_or_colour() -> None:
    rivals = dict.fromkeys(
        ("vllm:4bit_nc", "paper:mse4", "ggml:q4_0", "metal:q8_0/q3_0", "lmdeploy:4", "nvfp4", "mxfp4"), 0.1
    )
    run = sources.recognise(fidelity_file({"k4v4": 0.1, "kf8vf8": 0.1}, rivals), "f.json").content
    marks = fidelity_figures.marks_of([row for row in run.rows if row.kind != "noise"])
    assert list(marks)[:3] == ["kvfold", "kvfold, fp8", "vllm"]
    assert len(set(marks.values())) == len(marks) == 9


def test_names_beside_points_do_not_cover_each_other() -> None:
    with drawing.style():
        figure = drawing.new_figure(5)
        axes = drawing.place_axes(figure, 1, 1, 7, 3)
        axes.set(xlim=(0, 10), ylim=(0, 10))
        spots = [(5 + 0.2 * (place % 3), 5 + 0.1 * (place // 3)) for place in range(9)]
        drawing.name_points(axes, [drawing.Name(*spot, f"format{place}", "k") for place, spot in enumerate(spots)])
        drawing.name_ends(axes, [drawing.Name(10, 5, f"line{place}", "k") for place in range(6)])
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.text import Text

        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for texts in (axes.texts[:9], axes.texts[9:]):
            boxes = [Text.get_window_extent(text, renderer).shrunk(0.9, 0.7) for text in texts]
            assert len(boxes) in (9, 6)
            assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_exact_tokens_one_window_and_zeros_are_noted() -> None:
    one = fidelity_file({"k4v4+sinks4+tail128": 0.01, "kf32vf32": 0.0}, {"nvfp4": 0.1}, windows=1)
    (section,) = sections_of(one)
    notes = " ".join(section.notes)
    for words in ("Intervals need more windows", "The noise floor is exactly 0", "kf32vf32: the divergence is 0",
                  "k4v4+sinks4+tail128: exact first or last tokens", "simulated, not packed"):  # fmt: skip
        assert words in notes
    check_page(html.page(Report([section], "")))


def test_many_needles_make_several_figures() -> None:
    (section,) = sections_of(needle_file(("k8v8", "k6v6", "k5v5", "k4v4", "k3v3", "k2v2"), tuple(range(100, 900, 100))))
    assert [picture.title[-8:] for picture in section.pictures] == ["(1 of 2)", "(2 of 2)"]
    page = check_page(html.page(Report([section], "")))
    assert page.texts.count("none") >= 2  # the uncompressed model stands in both


def test_capacity_is_the_planners(kvfold: Any) -> None:
    plan = plan_file(kvfold)
    (section,) = sections_of(plan, storage_file())
    assert [picture.title for picture in section.pictures] == ["Tokens against memory", "Bytes against context"]
    text = html.page(Report([section], ""))
    for row in plan["rows"]:
        assert f": {row['tokens']:,}</text>" in text
    shape = sources.recognise(plan, "p.json").content.shape
    with drawing.style():
        axes = memory_report.capacity(shape, 64, ["k4v4"], 1 << 30, []).axes[0]
    ends = sorted(line.get_ydata()[-1] for line in axes.lines)
    assert ends == sorted(row["tokens"] for row in plan["rows"] if row["format"] in ("kbf16vbf16", "kf8vf8", "k4v4"))


def test_what_the_planner_cannot_do_is_noted() -> None:
    data = storage_file()
    data["rows"][1]["format"] = data["rows"][4]["format"] = "k4qv4q"
    (section,) = sections_of(data)
    assert any("k4qv4q has no capacity curve" in note for note in section.notes)


def test_bytes_that_were_not_planned_are_noted() -> None:
    (section,) = sections_of(storage_file(wrong=1))
    assert any("live bytes and planned bytes differ: none at 1,024 tokens" in note for note in section.notes)


def test_kernels_that_are_wrong_or_failed_are_noted() -> None:
    data = bench_file()
    data["checks"] = [
        {"kernel": "kvfold-cuda k4v4", "case": "1x1024", "what": "", "value": None, "limit": 1, "ok": False}
    ]
    data["failures"] = ["kvfold-cuda k2v2: lost"]
    (section,) = sections_of(data)
    assert section.notes == ["WRONG outputs: kvfold-cuda k4v4, 1x1024.", "FAILED: kvfold-cuda k2v2: lost."]


# --- wrong and hostile input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it has not the keys of a JSON file of fidelity, needle,"),
        (b'{"name": "a package"}', "it has not the keys"),
        (b'{"modes": [], "settings": {}}', "it is of `benchmarks/vllm_answers.py`"),
        (b'{"engines": {}, "difference": {}}', "it is of `benchmarks/vllm_fidelity.py`"),
        (b'{"frontier": [], "held_out": null, "chosen": null}', "it is of `kvfold tune`"),
        (b'{"measured_windows": 1, "baseline": {}, "rows": []}', "settings is missing"),
        (b'{"utilization": 1, "layers": 1, "caches": []}', "caches is empty"),
        (b'{"utilization": 1, "layers": 1, "caches": [[]]}', "caches[0] is not an object: []"),
    ],
)
def test_a_file_of_somebody_else(kvfold: Any, tmp_path: Path, content: bytes, words: str) -> None:
    file, output = tmp_path / "it.json", tmp_path / "report.html"
    file.write_bytes(content)
    result = kvfold("report", file, "--output", output)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"kvfold: error: {file}: ")
    assert words in result.err
    assert result.err.count("\n") == 1
    result = kvfold("report", tmp_path, "--output", output)  # of a folder with nothing else
    assert result.code == 2
    assert f"no figures in {tmp_path} (it.json: " in result.err
    assert words in result.err
    write(tmp_path, needle=needle_file())  # and of one with figures
    result = kvfold("report", tmp_path, "--output", output)
    assert result.code == 0
    assert result.err.startswith("left out it.json: ")
    assert words in result.err
    assert "it.json" in output.read_text("utf-8")


def test_a_damaged_value_is_named_with_its_place() -> None:
    def refusal(change: Callable[[Data], None]) -> str:
        data = fidelity_file({"k4v4": 0.05})
        change(data)
        with pytest.raises(Damaged) as caught:
            sources.recognise(data, "f.json")
        return str(caught.value)

    assert refusal(lambda d: d["rows"][1].pop("kl_mean")) == "rows[1].kl_mean is missing"
    assert refusal(lambda d: d["rows"][1]["top1"].update(value="x")).startswith("rows[1].top1.value is not a number")
    assert refusal(lambda d: d["rows"][1]["top1"].update(value=float("nan"))).startswith("rows[1].top1.value is not")
    assert refusal(lambda d: d["rows"][1].update(bits_per_element=0)) == "rows[1].bits_per_element is not above 0: 0"
    assert refusal(lambda d: d["settings"].update(windows_tokens=1, window_tokens=1.5)).startswith(
        "settings.window_tok"
    )
    assert refusal(lambda d: d.update(rows={})) == "rows is not a list: {}"
    assert refusal(lambda d: d.update(environment=[1])) == "environment is not an object: [1]"


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON object."""
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        yield (*at, key)
        yield from places(value, (*at, key))


@pytest.mark.parametrize("name", ["fidelity", "needle", "storage", "plan", "bench", "vllm"])
def test_any_damage_is_refused_or_read(everything: Path, name: str) -> None:
    data = json.loads((everything / f"{name}.json").read_text())
    draw, all_places = random.Random(0), list(places(data))
    damages = (None, -1, 0, 1.5, 10**400, True, "", "x\x00\ud800", [], {}, [None], {"value": None})
    for place in draw.sample(all_places, min(300, len(all_places))):
        changed = copy.deepcopy(data)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = draw.choice(damages)
        with contextlib.suppress(Damaged):
            sources.sections([sources.recognise(changed, f"{name}.json")])


def test_names_are_escaped_and_no_formulas(kvfold: Any, tmp_path: Path) -> None:
    fidelity_data = fidelity_file({"k4v4": 0.05}, {HOSTILE: 0.1}, model=HOSTILE)
    fidelity_data["command"] = HOSTILE
    fidelity_data["remarks"] = [HOSTILE + "\x00\ud800\x1b[31m"]
    needle_data, bench_data, vllm_data = needle_file(), bench_file(), vllm_file()
    needle_data["rows"][1]["format"] = bench_data["rows"][2]["case"] = vllm_data["caches"][0]["dtype"] = HOSTILE
    bench_data["rows"][2]["kernel"] = f"kvfold-cuda {HOSTILE}"
    write(tmp_path, a=fidelity_data, b=needle_data, c=bench_data, d=vllm_data, e=storage_file(model=HOSTILE))
    (tmp_path / "<b>.json").write_text("{}")
    output = tmp_path / "report.html"
    assert kvfold("report", tmp_path, "--output", output).code == 0
    text = output.read_text("utf-8")
    page = check_page(text)
    assert "<script" not in text
    assert "<b>" not in text
    assert sum(HOSTILE in shown for shown in page.texts) > 10
    assert kvfold("report", tmp_path, "--output", tmp_path / "report.pdf").code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("nowhere.json", "cannot use nowhere.json: No such file"),
        ("--output nowhere/report.html", "there is no folder"),
        ("--output .", "ends in none of .html and .pdf"),
        ("--output report.png", "ends in none of .html and .pdf"),
        ("--output report.html --pdf", "--pdf and --output report.html contradict"),
        ("--output folder.html", "folder.html is a folder"),
        ("", "no figures in . (there is no JSON file)"),
        ("folder.html folder.html", "no figures in folder.html and folder.html"),
    ],
)
def test_wrong_usage(kvfold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    result = kvfold("report", *argv.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvfold: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err
    assert not list(tmp_path.glob("report*"))


def test_a_file_that_is_named_and_in_a_folder_counts_once(kvfold: Any, everything: Path, tmp_path: Path) -> None:
    os.mkfifo(everything / "pipe.json")
    (everything / "folder.json").mkdir()
    output = tmp_path / "report.html"
    result = kvfold("report", everything, everything / "bench.json", everything, "--output", output)
    assert result.out.endswith("of 6 files\n")
    assert "left out folder.json: it is not a file" in result.err
    assert "left out pipe.json: it is not a file" in result.err
    (everything / "bench.json").write_text("{}")
    assert kvfold("report", everything, everything / "bench.json", "--output", output).code == 2


def test_without_matplotlib(kvfold: Any, everything: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = kvfold("report", everything, "--output", tmp_path / "report.html")
    assert result.code == 2
    assert result.err == (
        "kvfold: error: report draws with matplotlib, which is not installed: pip install 'kvfold[plot]'\n"
    )


def test_settings_of_the_user_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    sections = sections_of(needle_file(), vllm_file())
    expected = html.page(Report(sections, ""))
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert html.page(Report(sections, "")) == expected
        assert matplotlib.rcParams["text.usetex"]
