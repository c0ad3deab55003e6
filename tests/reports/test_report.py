"""Pages from recorded results: what is shown, what is escaped, and that a browser opens it."""

import base64
import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_records import (
    MACHINE,
    bench_row,
    evaluation,
    optimize_result,
    profile,
    score_result,
    score_verdict,
    verdict,
)

from convnext_deploy import api, cli
from convnext_deploy.errors import DataError
from convnext_deploy.models import registry
from convnext_deploy.reports import html, markdown, optimized, plots, published, results, tables
from convnext_deploy.reports.results import Measurement
from convnext_deploy.timing import roofline

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script>$\\frac{1}{2}$ | & \"q\" </svg>"


def measurement(**fields: Any) -> dict[str, Any]:
    """A line as `bench` writes it, with fields that no page shows."""
    median = fields.pop("median_ms", 10.0)
    samples = fields.pop("samples_ms", np.random.default_rng(0).normal(median or 0, 0.01, 80).tolist())
    batch = fields.get("batch", 1)
    return {
        "schema_version": 1, "created": "2026-11-22T00:00:00+00:00", "run": "r", "subject": "s", "turns": [80],
        "model": "convnext_tiny", "runtime": "onnx", "precision": "fp32", "task": "classify", "batch": batch,
        "image_size": [224, 224], "device": "cpu", "threads": 2, "scenario": "single-stream", "scope": "compute",
        "status": "valid", "reason": None, "samples_ms": samples, "median_ms": median, "random_weights": True,
        "images_per_s": batch / (median or 1) * 1e3, "machine": MACHINE, "versions": {"torch": "2.15.0"}, **fields,
    }  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with every kind of record, hostile names among them."""
    lines = [
        measurement(runtime=runtime, precision=precision, batch=batch, model=model, median_ms=batch * ms)
        for model, factor in (("convnext_tiny", 1.0), ("swin_tiny_patch4_window7_224", 1.4))
        for runtime, precision, ms in (("onnx", "fp32", 20.0), ("openvino", "bf16", 11.0))
        for batch in (1, 8)
        for ms in (ms * factor,)
    ]
    lines += [
        measurement(runtime=HOSTILE, model=HOSTILE),
        measurement(runtime="eager", status="invalid", reason=f"throttled {HOSTILE}", median_ms=1.0),
        measurement(runtime="pt2", status="failed", reason="crashed", median_ms=None, samples_ms=[], images_per_s=None),
        {"benchmark": "parity", "variant": "convnext_tiny"},
    ]
    profiles = [profile(), profile(format="openvino", model=HOSTILE, note=HOSTILE)]
    bound = api.roofline("tiny", device="a100", precision="bf16", batch=8)
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    encoded = [json.dumps(line).encode() for line in lines] + [msgspec.json.encode(r) for r in (*profiles, bound)]
    path.write_bytes(b"\n".join(encoded) + b"\n\n")
    return path


@pytest.fixture(scope="module")
def page(recorded: Path) -> str:
    return html.page(results.read([recorded]), HOSTILE)


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


# Reading -------------------------------------------------------------------------------------------------------------


def test_every_kind_of_record_is_read_and_the_rest_counted(recorded: Path) -> None:
    found = results.read([recorded])
    assert [len(found.measurements), len(found.profiles), len(found.rooflines)] == [11, 2, 1]
    assert found.left_out == {"parity": 1}


def test_the_committed_results_are_read() -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("2026-11-23-native.jsonl")
    rows = results.read([path]).measurements
    assert len(rows) == len(path.read_text().splitlines())
    fastest = min(m.median_ms or math.inf for m in rows if m.model == "convnext_tiny" and m.batch == 1)
    assert round(fastest, 1) == 12.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no result that a report shows"),
        ('{"benchmark": "parity"}\n{"benchmark": "parity"}', "found: 2 parity"),
        ('{"record": "profile"}\n{', "line 2 is not JSON"),
        ("[1]", "contains list; expected a JSON object"),
        ('{"record": "profile", "batch": 1}', "not a result of this version"),
        (json.dumps(measurement(threads="two")), "not a result of this version"),
    ],
)
def test_a_file_that_cannot_be_shown_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        results.read([path])


def test_a_folder_is_refused_with_a_file_of_results_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        results.read([tmp_path])
    assert str(refused.value) == f"{tmp_path} is a folder; give files of results"
    (tmp_path / "result.json").touch()
    with pytest.raises(DataError, match=r"is a folder; give files of results, such as .*result\.json"):
        results.read([tmp_path])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        results.read([tmp_path / "none.jsonl"])


def test_of_equal_settings_the_last_is_shown() -> None:
    rows = [measurement(median_ms=ms, batch=batch) for ms, batch in ((5.0, 1), (6.0, 2), (7.0, 1))]
    shown = results.latest([msgspec.convert(row, Measurement) for row in rows])
    assert [(m.batch, m.median_ms) for m in shown] == [(1, 7.0), (2, 6.0)]


@pytest.mark.parametrize("count", [6, 7, 20, 59, 1000])
def test_the_medians_interval_is_the_binomial_one(count: int) -> None:
    m = msgspec.convert(measurement(samples_ms=list(range(count, 0, -1))), Measurement)
    low, high = m.interval_ms() or (0, 0)
    rank = int(scipy.stats.binom.ppf(0.025, count, 0.5))
    rank += scipy.stats.binom.cdf(rank, count, 0.5) <= 0.025
    assert (low, high) == (rank, count + 1 - rank)


def test_five_samples_carry_no_interval() -> None:
    assert msgspec.convert(measurement(samples_ms=[1.0] * 5), Measurement).interval_ms() is None


def test_speeds_are_rated_by_the_ceilings_of_the_same_machine() -> None:
    bound = api.roofline("tiny", device="a100")  # numbers that are known, as if measured on this machine
    here = msgspec.structs.replace(bound, machine=MACHINE)
    lines = [
        measurement(median_ms=2 * bound.ms),
        measurement(median_ms=2 * bound.ms, machine=MACHINE | {"cpu": "Other CPU"}),
        measurement(model="swin_tiny_patch4_window7_224"),
        measurement(runtime="eager", tflops=1.0, percent_of_bound=2.0),
        measurement(runtime="pt2", precision="fp16", median_ms=5.0),
        measurement(runtime="trt", device="cuda"),
    ]
    found = tuple(msgspec.convert(line, Measurement) for line in lines)
    rows = results.rated(results.Results(files=("f",), measurements=found, rooflines=(here,)))
    assert rows[0].percent_of_bound == pytest.approx(50)
    assert rows[0].tflops == pytest.approx(bound.gflop / (2 * bound.ms))
    assert (rows[1].tflops, rows[1].percent_of_bound) == (rows[0].tflops, None)
    assert (rows[2].tflops, rows[2].percent_of_bound) == (None, None)
    assert (rows[3].tflops, rows[3].percent_of_bound) == (1.0, 2.0)
    fp16_ms = sum(row.ms for row in roofline.bound(registry.spec("convnext_tiny"), "fp16", 1, here.ceilings))
    assert rows[4].percent_of_bound == pytest.approx(100 * fp16_ms / 5.0)
    assert rows[5].percent_of_bound is None


# Figures -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    unbeaten = {p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)}
    assert plots.pareto_front(points) == sorted(unbeaten)


def test_a_records_own_accuracy_goes_before_the_published() -> None:
    own = msgspec.convert(measurement(top1=0.5, random_weights=True), Measurement)
    other = msgspec.convert(measurement(random_weights=True), Measurement)
    assert [(p.top1, p.origin) for p in plots.pareto_points([own])] == [(0.5, "measured")]
    assert [(p.top1, p.origin) for p in plots.pareto_points([other])] == [(0.821, "in1k"), (0.829, "in22k")]


@pytest.mark.parametrize("weights", [False, None])  # a user's own, and of a record that does not say
def test_published_accuracy_is_never_given_to_a_users_weights(weights: bool | None) -> None:
    own = measurement(random_weights=weights, artifact_sha256="a" * 64)
    found = [msgspec.convert(own, Measurement)]
    assert plots.pareto_points(found) == []
    assert plots.pareto(found) is None
    assert plots.pareto_points(found, [evaluation(artifact_sha256="b" * 64)]) == []
    in_8_bits = msgspec.convert(measurement(eight_bits="int8"), Measurement)
    assert plots.pareto_points([in_8_bits]) == []


def test_an_artifacts_evaluation_is_its_accuracy() -> None:
    own = msgspec.convert(measurement(random_weights=False, artifact_sha256="a" * 64), Measurement)
    older, other = evaluation(top1=0.5), evaluation(data="test", data_sha256="e" * 64, top1=0.8)
    points = plots.pareto_points([own], [older, evaluation(), other])
    assert [(p.top1, p.data) for p in points] == [(0.9, "val.parquet"), (0.8, "test")]
    exact = scipy.stats.binomtest(180, 200).proportion_ci(0.95, method="exact")
    assert points[0].interval == pytest.approx((exact.low, exact.high))
    (row,) = tables.measured([own], [evaluation()]).rows
    assert row[4].text == "90.00"


def test_the_type_shown_is_the_one_that_was_delivered() -> None:
    fp32 = measurement(runtime="native", subject="convnext_tiny native fp32")
    old = measurement(runtime="native", subject="convnext_tiny native int8")
    new = measurement(runtime="native", eight_bits="fp8", subject="convnext_tiny native fp8")
    shown = results.latest([msgspec.convert(row, Measurement) for row in (fp32, old, new)])
    assert [m.series for m in shown] == ["native fp32", "native int8", "native fp8"]
    assert [row[2].text for row in tables.measured(shown).rows] == ["fp32", "int8", "fp8"]
    assert tables.kinds([profile(eight_bits="int8")]).rows[0][0].text == "a: convnext_tiny onnx int8"
    assert "`onnx` int8" in markdown.kinds([profile(eight_bits="int8")])


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(("build/v1", "build/v2"), ["v1", "v2"]), (("one/fast", "two/fast"), ["fast aaaaaaaa", "fast bbbbbbbb"])],
)
def test_two_artifacts_of_one_architecture_and_format_are_not_merged(
    folders: tuple[str, str], labels: list[str]
) -> None:
    rows = [
        measurement(artifact=folder, artifact_sha256=letter * 64, random_weights=False, median_ms=ms)
        for folder, letter, ms in (*zip(folders, "ab", (5.0, 6.0), strict=True), (folders[0], "a", 7.0))
    ]
    shown = results.latest([msgspec.convert(row, Measurement) for row in rows])
    assert [(m.median_ms, m.label) for m in shown] == [(7.0, labels[0]), (6.0, labels[1])]
    assert [row[1].text for row in tables.measured(shown).rows] == [f"onnx {label}" for label in labels]


def test_what_bench_built_anew_with_random_weights_is_the_same_contender() -> None:
    rows = [measurement(artifact="build/bench/x", artifact_sha256=letter * 64, median_ms=5.0) for letter in "ab"]
    (shown,) = results.latest([msgspec.convert(row, Measurement) for row in rows])
    assert (shown.artifact_sha256, shown.label) == ("b" * 64, "")


def test_a_swin_shares_the_panel_of_its_convnext() -> None:
    names = ("convnext_tiny", "swin_tiny_patch4_window7_224", "convnext_small")
    rows = [msgspec.convert(measurement(model=name), Measurement) for name in names]
    svg = plots.throughput(rows) or ""
    words = ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert [word for word in words if word.startswith("convnext")] == ["convnext_tiny, 224", "convnext_small, 224"]
    assert "Swin, onnx fp32" in words


def test_the_papers_throughputs_give_the_papers_own_ratios() -> None:
    """Table 12 prints ConvNeXt's gain over Swin on an A100 in percent."""
    gains = [round(100 * (pair.a100[0] / pair.a100[1] - 1)) for pair in published.PAIRS]
    assert gains == [47, 49, 46, 39, 40, 34]


def test_published_models_are_timms() -> None:
    timm = pytest.importorskip("timm")
    names = {a.model for a in published.ACCURACIES} | {p.swin for p in published.PAIRS}
    assert all(timm.is_model(name) for name in names)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0012345, "0.00123"), (1.0, "1.00"), (12.345, "12.3"), (99.96, "100"), (1234.5, "1234")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert tables.three_digits(value) == text


# The page ------------------------------------------------------------------------------------------------------------


def test_names_from_files_are_text(page: str) -> None:
    elements = Elements(page)
    assert Counter(tag for tag, _ in elements.found)["script"] == 1
    assert HOSTILE in elements.texts
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)


def test_the_page_needs_no_network(page: str) -> None:
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_only_the_pages_own_script_may_run(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_ids_are_unique(page: str) -> None:
    ids = Counter(attributes["id"] for _, attributes in Elements(page).found if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []


def test_plots_are_well_formed_and_take_the_pages_colour(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 5
    for svg in drawn:
        ET.fromstring(svg)
        assert "currentColor" in svg
        assert plots.INK not in svg
        assert "mathdefault" not in svg


def test_a_formula_in_a_name_is_not_set_as_one(page: str) -> None:
    svg = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0]
    assert f"{HOSTILE}, 224" in ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


def test_an_invalid_result_is_named_and_not_drawn(page: str) -> None:
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "onnx fp32" in svgs
    assert "eager fp32" not in svgs
    assert any(text.startswith("[1] invalid: throttled") for text in Elements(page).texts)
    assert "invalid [1]" in Elements(page).texts
    assert "failed: crashed" in page


def test_the_same_results_give_the_same_page(recorded: Path, page: str) -> None:
    assert html.page(results.read([recorded]), HOSTILE) == page


def test_speeds_of_two_machines_are_drawn_apart() -> None:
    rows = [measurement(), measurement(machine=MACHINE | {"cpu": "Other CPU"})]
    found = [msgspec.convert(row, Measurement) for row in rows]
    titles = [title for title, _, _ in plots.all_of(results.Results(files=("f",)), found)]
    assert sum("Test CPU" in title for title in titles) == sum("Other CPU" in title for title in titles) == 3


def test_kinds_sum_their_layers() -> None:
    rows = tables.kinds([profile()]).rows
    assert [(row[2].text, row[3].value, row[4].text) for row in rows] == [
        ("GEMM", 7.0, "77.8%"), ("depthwise", 2.0, "22.2%"),
    ]  # fmt: skip


# A browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where it is installed."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not both on PATH (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,2400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield chrome
    chrome.quit()


@pytest.mark.slow  # starts a browser
def test_a_browser_opens_and_sorts_the_page(browser: Any, page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.get(path.as_uri())
    assert browser.title == " ".join(HOSTILE.split())

    table = next(t for t in browser.find_elements("css selector", "table") if "median ms" in t.text)
    buttons = table.find_elements("css selector", "th button")
    column = [b.text for b in buttons].index("median ms")

    def cells() -> list[str]:
        return [row.text for row in table.find_elements("css selector", f"tbody td:nth-child({column + 1})")]

    before = cells()
    numbers = sorted(float(text) for text in before if text)
    buttons[column].click()
    assert [float(text) for text in cells() if text] == numbers != [float(text) for text in before if text]
    assert cells()[-2:] == ["", ""]  # what has no number comes last
    buttons[column].click()
    assert [float(text) for text in cells() if text] == numbers[::-1]
    assert table.find_elements("css selector", "th")[column].get_attribute("aria-sort") == "descending"
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1280, 1920])
def test_no_row_is_taller_than_three_lines_and_every_reason_is_in_sight(
    browser: Any, width: int, tmp_path: Path
) -> None:
    reason = "the hypervisor took 0.02 of 2 cores; others took 0.31 cores; " * 4
    rows = [measurement(batch=batch, status="invalid", reason=reason) for batch in (1, 8)] + [measurement(batch=2)]
    found = results.Results(files=("f",), measurements=tuple(msgspec.convert(row, Measurement) for row in rows))
    path = tmp_path / "report.html"
    path.write_text(html.page(found, "t"))
    browser.set_window_size(width, 1200)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(path.as_uri())
    heights = "return [...document.querySelectorAll('tbody tr')].map(r => r.getBoundingClientRect().height)"
    assert max(browser.execute_script(heights)) < 90
    right = "return [...document.querySelectorAll('ol.notes li')].map(r => r.getBoundingClientRect().right)"
    (edge,) = browser.execute_script(right)  # one reason of two rows
    assert 0 < edge <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_has_ink_on_the_schemes_paper(browser: Any, page: str, scheme: str, tmp_path: Path) -> None:
    from io import BytesIO

    path = tmp_path / "report.html"
    path.write_text(page)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(path.as_uri())
    grey = np.asarray(Image.open(BytesIO(browser.get_screenshot_as_png())).convert("L")).astype(int)
    paper = int(np.median(grey))
    assert paper > 240 if scheme == "light" else paper < 40
    assert (abs(grey - paper) > 100).mean() > 0.01  # text and lines
    for figure in browser.find_elements("css selector", "figure svg"):
        drawn = np.asarray(Image.open(BytesIO(figure.screenshot_as_png)).convert("L")).astype(int)
        assert (abs(drawn - paper) > 60).mean() > 0.01


@pytest.mark.slow
def test_a_printed_page_is_dark_on_white(browser: Any, page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    browser.get(path.as_uri())
    colours = "const s = getComputedStyle(document.querySelector('figure svg')); return [s.color, " \
              "getComputedStyle(document.body).backgroundColor]"  # fmt: skip
    assert browser.execute_script(colours) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


# Markdown, and what is made of it ------------------------------------------------------------------------------------


def test_markdown_cells_cannot_break_their_table(recorded: Path) -> None:
    text = markdown.page(results.read([recorded]), HOSTILE)
    assert "<script" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_tables_are_those_of_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_tables.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def test_a_stale_table_is_refused_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tables = script("scripts/make_tables.py")
    path = tmp_path / "README.md"
    path.write_text("before `<!-- table: in passing -->`\n<!-- table: exports -->\n| old |\n<!-- end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "--check", str(path)])
    with pytest.raises(SystemExit, match="its tables are stale; run: make tables"):
        make_tables.main()
    monkeypatch.setattr(sys, "argv", ["make_tables.py", str(path)])
    make_tables.main()
    text = path.read_text()
    kept = "before `<!-- table: in passing -->`\n<!-- table: exports -->\n"
    assert text.startswith(f"{kept}| format | seconds | peak memory |")
    assert text.endswith("|\n<!-- end -->\nafter\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: speeds -->\n<!-- end -->", "no table is called 'speeds'"),
        ("<!-- table: exports -->\n", "has no <!-- end --> after it"),
    ],
)
def test_a_marker_that_names_no_table_is_refused(text: str, message: str) -> None:
    make_tables = script("scripts/make_tables.py")
    with pytest.raises(SystemExit, match=message):
        make_tables.filled(text, make_tables.TABLES)


def test_ratios_stand_beside_the_papers() -> None:
    paper_table = script("benchmarks/paper_table.py")
    facts = {"runtime": "onnx", "image_size": (224, 224), "batch": 1, "task": "classify"}
    turns = [[10.0 + number / 100] * 2 for number in range(8)]
    lines = [
        bench_row(turns, model="convnext_tiny.fb_in1k", **facts),
        bench_row(
            [[(1.01 + 0.02 * (i % 2)) * ms for ms in turn] for i, turn in enumerate(turns)],
            model="swin_tiny_patch4_window7_224",
            **facts,
        ),
        bench_row(turns, model="convnext_base", **facts),  # without its Swin
        bench_row(turns, model="swin_base_patch4_window7_224", **facts | {"batch": 8}),  # another batch
        bench_row(turns, model="swin_base_patch4_window7_224", run="another", **facts),
    ]
    rows = paper_table.rows_of(lines)
    assert len(rows) == 6
    assert rows[0] == [
        "tiny.fb_in1k", "224", "onnx fp32", "1", "10.0", "10.2", "1.02 (1.01 to 1.03)", "1.02, agrees",
        "1.47, differs by -30%",
    ]  # fmt: skip
    assert [line[2] for line in rows[1:]] == ["not measured"] * 5


def test_what_was_disturbed_is_marked_beside_the_papers() -> None:
    paper_table = script("benchmarks/paper_table.py")
    facts = {"runtime": "onnx", "image_size": (224, 224)}
    lines = [
        bench_row([[10.0]] * 6, model="convnext_tiny", status="invalid", reason="shared", **facts),
        bench_row([[12.0]] * 6, model="swin_tiny_patch4_window7_224", **facts),
    ]
    assert paper_table.rows_of(lines)[0][4:7] == ["10.0 (invalid)", "12.0", "1.20 (1.20 to 1.20)"]


# The commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_evaluations_verdicts_and_runs_of_optimize_alone_make_a_page(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for record, words in (
        (evaluation(), ["Accuracy", "val.parquet", "200", "90.00", "84.98 to 93.78", "99.00"]),
        (verdict(), ["Gate: FAIL, int8 against fp32", "1.000", "0.300"]),
        (score_result(), ["Scores", "ade20k", "scenes", "mIoU", "43.21"]),
        (score_verdict(), ["Gate: PASS, int8 against fp32", "0.400", "mIoU 43.21% before, 43.11% after"]),
        (optimize_result(), ["Candidates: convnext_tiny", "native-int8", "chosen", "90.0", "limit 0.5"]),
    ):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        text = api.report([path], out=tmp_path / f"r{suffix}").read_text()
        for word in words:
            assert word in text
        assert "Machines and versions" not in text  # nothing says them


def test_the_front_names_what_was_timed_and_marks_what_was_chosen() -> None:
    svg = plots.front(optimize_result()) or ""
    words = ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]
    assert "native-int8, chosen" in words
    assert "native-fp32" in words
    assert not any("fp16" in word for word in words)
    assert plots.front(optimize_result(candidates=())) is None


def test_the_front_has_no_tick_above_all_images() -> None:
    drawn = plots.front(optimize_result())
    assert drawn is not None
    ticks = [float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", drawn)]
    assert ticks
    assert max(ticks) == 100.0


def test_a_page_without_matplotlib_says_what_would_draw_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimized.env, "missing", lambda modules: modules)
    page = optimized.page(optimize_result(), lambda name: Image.new("L", (1, 1)))
    assert "<svg" not in page
    assert "matplotlib is not installed; run: pip install &#x27;convnext-deploy[report]&#x27;" in page


def test_the_page_of_optimize_escapes_what_comes_from_files_and_allows_no_connection() -> None:
    page = optimized.page(optimize_result(why="a <script>"), lambda name: Image.new("L", (28, 28)), ("next one",))
    assert "a &lt;script&gt;" in page
    assert "no &lt;b&gt;fp16" in page
    assert "default-src 'none'; img-src data:" in page
    assert "assumed: nothing says it" in page
    assert page.count("<img") == 1
    assert "before: <b class=" in page
    assert page.index("a &lt;script&gt;") < page.index("<table")  # the verdict comes first
    none = optimized.page(optimize_result(chosen=None, why="nothing keeps 2 ms"), lambda name: Image.new("L", (1, 1)))
    assert "Nothing was chosen" in none


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_page_of_optimize_fits_and_can_be_read_in_both_schemes(
    browser: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    from io import BytesIO

    path = tmp_path / "optimize.html"
    path.write_text(optimized.page(optimize_result(), lambda name: Image.effect_noise((28, 28), 90), ("next",)))
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    loaded = "return [...document.images].map(image => image.naturalWidth)"
    assert set(browser.execute_script(loaded)) == {28}
    grey = np.asarray(Image.open(BytesIO(browser.get_screenshot_as_png())).convert("L")).astype(int)
    assert np.median(grey) > 240 if scheme == "light" else np.median(grey) < 40
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_document_of_bench_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": [measurement(), measurement(batch=2)], "comparisons": []}))
    assert [m.batch for m in results.read([path]).measurements] == [1, 2]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("r", "--out {0}/r; expected a name that ends in .html, or in .md for Markdown tables"),
        ("r.pdf", "--out {0}/r.pdf; expected a name that ends in .html"),
        ("no/r.html", "{0}/no/r.html cannot be written: there is no folder {0}/no; make it, or write elsewhere"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_by_its_own_name(
    out: str, message: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(recorded), "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.replace("\nhint: ", "; ").startswith("error: " + message.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "start"), [("report.html", "<!DOCTYPE html>"), ("report.md", "# Title")])
def test_the_command_writes_the_page(
    name: str, start: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert cli.run(["report", str(recorded), "--out", str(out), "--title", "Title"]) == 0
    assert out.read_text().startswith(start)
    assert str(out) in capsys.readouterr().out


def test_the_roofline_command_prints_the_bound(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    arguments = ["roofline", "--variant", "tiny", "--device", "h200", "--precision", "bf16", "--batch", "256"]
    assert cli.run([*arguments, "--out", str(kept)]) == 0
    words = capsys.readouterr().out
    assert "data sheet" in words
    (bound,) = results.read([kept]).rooflines
    assert f"at least {bound.ms:.3f} ms a batch" in words
    assert math.isclose(bound.images_per_s, 256 / bound.ms * 1e3)


def test_a_report_needs_its_extra(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "matplotlib":
                raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert cli.run(["report", str(recorded), "--out", str(tmp_path / "r.html")]) == 2
    assert "pip install 'convnext-deploy[report]'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_names_of_any_script_are_text_in_plots_and_no_warning_is_shown(tmp_path: Path) -> None:
    """matplotlib said of each letter, in two lines, that its own font has none."""
    row = msgspec.json.decode(msgspec.json.encode(bench_row([[5.0] * 3] * 2)))
    rows = [row | {"subject": f"模型 {batch}", "model": "模型", "batch": batch} for batch in (1, 8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = html.page(results.read([tmp_path / "rows.jsonl"]), "t")
    assert any("模型" in svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
