"""The options of every command: their panels, their widths, their names, and what is said of one that is not there."""

import inspect
import re
import shlex

import pytest

from convnext_deploy import cli
from convnext_deploy.cli import app, groups, names
from convnext_deploy.cli.help import broken

Captured = pytest.CaptureFixture[str]


def options(command: str) -> set[str]:
    return {name for parameter in app._parameters(command) for name in parameter.opts if name.startswith("--")}


def help_of(command: str, width: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.run([command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", app.COMMANDS)
@pytest.mark.parametrize("width", [60, 80])
def test_help_fits_its_width_and_its_example_can_be_copied(
    command: str, width: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, width, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    example = text.partition("\nExample:\n")[2].replace("\\\n", " ")
    assert shlex.split(example) == ["convnext-deploy", *shlex.split(app.EXAMPLES[command])]


def test_a_command_breaks_between_options_and_never_inside_one() -> None:
    line = "convnext-deploy gate --baseline build/fp32 --candidate build/best --max-drop 0.5 --quiet"
    words = shlex.split(line)
    assert broken(words, 40) == [
        "convnext-deploy gate \\",
        "    --baseline build/fp32 \\",
        "    --candidate build/best \\",
        "    --max-drop 0.5 --quiet",
    ]
    assert broken(words, 200) == [line]


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        (
            "export",
            ["Checkpoint", "Preprocessing", "Output", "Splice", "Data and labels", "Runtime", "Kernels", "TensorRT"],
        ),
        ("quantize", ["Required", "Checkpoint", "Preprocessing", "Plan", "Calibration", "Runtime", "Output"]),
        ("half", ["Required", "Checkpoint", "Preprocessing", "Plan", "Output"]),
        ("optimize", ["Required", "Checkpoint", "Preprocessing", "Goal", "Data and labels", "Runtime", "Output"]),
        ("eval", ["Arguments", "Required", "Data and labels", "Output", "Runtime"]),
        ("gate", ["Required", "Limits", "Data and labels", "Output", "Runtime"]),
        ("predict", ["Arguments", "Data and labels", "Output", "Runtime"]),
        ("bench", ["Arguments", "Models that are built", "Load", "Runtime", "Output", "Comparison"]),
    ],
)
def test_options_stand_in_panels(
    command: str, panels: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, 80, capsys, monkeypatch)
    assert re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE) == [*panels, "Options", "Example"]


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        (groups.Checkpoint, ["export", "quantize", "half", "optimize"]),
        (groups.Outputs, ["export", "quantize", "half"]),
        (groups.Labelled, ["export", "optimize", "eval", "gate"]),
        (groups.Meaning, ["export", "eval", "gate", "predict"]),
    ],
)
def test_commands_that_share_options_share_the_whole_group(group: type, commands: list[str]) -> None:
    fields = {f"--{name.replace('_', '-')}" for name in inspect.signature(group).parameters}
    for command in commands:
        assert fields <= options(command)


def test_the_options_of_a_group_that_were_given_are_the_words_that_give_them() -> None:
    given = groups.Checkpoint(weights="a b.pth", mean="0.5", exif_orientation=True)
    assert given.words() == ["--weights", "a b.pth", "--mean", "0.5", "--exif-orientation"]
    assert groups.Checkpoint().words() == groups.Outputs().words() == []


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["export", "--weigths", "a"], "export has no option --weigths\nhint: did you mean --weights?"),
        (["export", "--image_size", "64"], "export has no option --image_size\nhint: did you mean --image-size?"),
        (["export", "--imgsz", "64"], "export has no option --imgsz\nhint: did you mean --image-size?"),
        (["export", "--half"], "export has no option --half\nhint: did you mean --precision fp16?"),
        (["eval", "x", "-o", "y"], "eval has no option -o\nhint: did you mean --out?"),
        (["predict", "a", "b", "--top-k", "3"], "predict has no option --top-k\nhint: did you mean --top?"),
        (["quantize", "--format", "onnx"], "quantize has no option --format\nhint: did you mean --target?"),
        (
            ["optimize", "--task", "detect"],
            "optimize has no option --task\nhint: give it to export, quantize, half, bench, roofline",
        ),
        (["list", "--zzz"], "list has no option --zzz\nhint: run convnext-deploy list --help for its options"),
    ],
)
def test_an_option_that_is_not_there_names_the_one_that_is_meant(
    arguments: list[str], line: str, capsys: Captured
) -> None:
    assert cli.run(arguments) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_every_option_that_a_synonym_leads_to_is_there() -> None:
    known = {name for command in app.COMMANDS for name in options(command)}
    for meant in names.OPTION_SYNONYMS.values():
        assert {option.split()[0] for option in meant} <= known


@pytest.mark.parametrize("name", names.RENAMED["export"])
def test_an_option_is_taken_by_the_name_that_it_had(name: str, capsys: Captured) -> None:
    new = names.RENAMED["export"][name]
    assert app._renamed(["export", name, "a"]) == ["export", new, "a"]
    assert app._renamed(["export", f"{name}=a", "--quiet"]) == ["export", f"{new}=a", "--quiet"]
    assert app._renamed(["quantize", name, "a"]) == ["quantize", name, "a"]
    assert capsys.readouterr().err == f"{name} is called {new} now; the old name goes with 0.3\n"
    assert new in options("export")
    assert name not in options("export")


@pytest.mark.parametrize(
    ("line", "wrong", "hint"),
    [
        ("x; expected y; did you mean y?", "x; expected y", "did you mean y?"),
        ("torch is not installed; run: pip install torch", "torch is not installed", "run: pip install torch"),
        ("--batch 0; expected 1 or more", "--batch 0; expected 1 or more", None),
        ("a.json is damaged", "a.json is damaged", None),
    ],
)
def test_what_to_do_is_told_apart_from_what_was_wrong(line: str, wrong: str, hint: str | None) -> None:
    assert app.split_hint(line) == (wrong, hint)


def test_completion_knows_the_options_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("_CONVNEXT_DEPLOY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "convnext-deploy export --trt-s")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        cli.run([])
    assert capsys.readouterr().out.split() == ["--trt-sides"]
