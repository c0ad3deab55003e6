"""Tables in narrow terminals and in pipes, and colours."""

import io
import sys

import pytest

from convnext_deploy import cli
from convnext_deploy.cli import words
from convnext_deploy.cli.optimize import table
from convnext_deploy.cli.terminal import Terminal
from convnext_deploy.records.accuracy import OutputScore, ScoreResult
from convnext_deploy.records.optimize import Candidate

Captured = pytest.CaptureFixture[str]
COLUMNS = ["what", "p50, ms (95 %)", "p99, ms", "images/s", "TFLOP/s, of the bound", "time beside the first", "result"]
ROW = ["build/convnext_tiny-onnx-fp32", "31.2 (30.9–31.8)", "33.1 (32.0–34.0)", "32.05", "0.29, 82 %", "", "valid"]


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("command", [["list"], ["doctor"], ["roofline", "--variant", "atto", "--device", "a100"]])
def test_a_table_keeps_to_its_width_and_loses_no_word(
    width: int, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line[:1] in ("│", "┃", "┏", "└", " ")) <= width
    assert "…" not in printed


def test_what_does_not_fit_in_columns_is_a_paragraph_a_row(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    Terminal(json=False, quiet=False).table("batch 1", COLUMNS, [ROW])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    assert all(cell in text for cell in ROW)
    assert "p99, ms: 33.1" in text
    assert "beside" not in text


class Screen(io.StringIO):
    """A terminal's stdout."""

    def isatty(self) -> bool:
        return True


LINES = """\
build/int8: custom as native int8, 1.1 MB
verified on 16 bundled images against the fp32 source: relative error 0.032, cosine 0.9995113
  known: image_size 64x64, mean 0.286, std 0.353, interpolation bicubic
file: a/path/that/is/longer/than/any/line/of/this/terminal-and-is-copied.bin"""


@pytest.mark.parametrize("width", [30, 60])
def test_a_terminals_lines_are_broken_between_words_and_indented(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    Terminal(json=False, quiet=False).result({}, LINES)
    printed = screen.getvalue()
    assert printed.split() == LINES.split()  # whole words, in their order
    assert all(len(line) <= width or len(line.split()) == 1 for line in printed.splitlines())
    starts = [line for line in printed.splitlines() if not line.startswith(" ")]
    assert starts[:2] == [line[: len(start)] for start, line in zip(starts, LINES.splitlines(), strict=False)][:2]
    assert any(line.startswith("    ") for line in printed.splitlines())  # below a line that is indented itself


def test_a_pipes_lines_are_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Terminal(json=False, quiet=False).result({}, LINES)
    assert capsys.readouterr().out == f"{LINES}\n"


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    Terminal(json=False, quiet=False).table("batch 1", COLUMNS, [ROW])
    lines = [line for line in capsys.readouterr().out.splitlines() if "onnx" in line]
    assert len(lines) == 1
    assert all(cell in lines[0] for cell in ROW)


@pytest.mark.parametrize(("name", "colours"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_no_color_is_honoured_in_tables(name: str, colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, "1")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    row = Candidate(name="native int8", runtime="native", precision="fp32", eight_bits="int8", state="chosen", ms=1.0)
    Console(width=80, highlight=False).print(table((row,)))
    assert ("\x1b[1;32m" in stream.getvalue()) == colours


def test_the_reason_of_a_candidate_is_whole_at_the_end_and_one_line_while_it_is_redrawn() -> None:
    from rich.console import Console

    row = Candidate(
        name="native int8", runtime="native", precision="fp32", eight_bits="int8", state="dropped", reason="word " * 20
    )
    printed = []
    for live in (False, True):
        stream = io.StringIO()
        Console(width=60, file=stream).print(table((row,), live=live))
        printed.append(stream.getvalue())
        assert max(map(len, printed[-1].splitlines())) <= 60
    assert printed[0].count("word") == 20
    assert len(printed[1].splitlines()) == 2


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ((0.5, None), "1 class has no image and counts in no mean"),
        ((0.5, None, None), "2 classes have no image and count in no mean"),
    ],
)
def test_classes_without_an_image_are_counted_in_words(scores: tuple[float | None, ...], line: str) -> None:
    result = ScoreResult(
        problem="detection", artifact="a", artifact_sha256="0" * 64, data="d", data_sha256="0" * 64, images=2,
        corrupt=("b.png: it is empty",), score=0.5, exact=None, mean_absolute_error=None, root_mean_square_error=None,
        per_output=tuple(OutputScore(output=n, name=f"c{n}", positives=1, score=one) for n, one in enumerate(scores)),
        images_per_s=1.0, predictions=None,
    )  # fmt: skip
    said = words.score_lines(result)
    assert line in said
    assert "1 corrupt image left out, the first: b.png: it is empty" in said
