"""What a newcomer met on a first walk, each as a sentence of what happens now."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from convnext_deploy import api, cli
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli import app
from convnext_deploy.cli.predict import _likely
from convnext_deploy.errors import UsageError
from convnext_deploy.records.manifest import Manifest
from convnext_deploy.records.prediction import ClassProbability

Captured = pytest.CaptureFixture[str]
PROGRAM = [sys.executable, "-m", "convnext_deploy"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python then takes the system for ASCII


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Path:
    return artifact_of("eager").path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "bilder ä"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("größe.png", "x.png"):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    return folder


# What was given, and what the checkpoint says ------------------------------------------------------------------------


@pytest.fixture
def told(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose header says its size, mean and std."""
    path = tmp_path / "told.safetensors"
    said = {"image_size": "64", "mean": "[0.5]", "std": "[0.25]"}
    safetensors.torch.save_file(safetensors.torch.load_file(checkpoint), path, said)
    return path


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("ImportError('libtorch.so: undefined symbol')", "libtorch.so: undefined symbol"),
    ],
)
def test_a_package_that_does_not_fit_its_pytorch_is_one_line(
    raised: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision from one index and torch from another: what an installation in two steps may end in."""
    for name, text in (("timm", "import torchvision"), ("torchvision", f"raise {raised}")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app, "app", lambda **_: importlib.import_module("timm"))
    assert cli.run(["list"]) == 2
    error = (
        f"error: torchvision is installed and cannot be imported: {words}\nhint: install versions that fit each other\n"
    )
    assert capsys.readouterr().err == error
    monkeypatch.setattr(app, "app", lambda **_: len(3))  # type: ignore[arg-type]  # a mistake of ours stays one
    with pytest.raises(TypeError):
        cli.run(["list"])


def test_builds_of_two_package_indexes_are_named_with_the_command_that_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's CPU wheel beside a torchvision from elsewhere: their numbers fit, so pip says nothing."""
    installed = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    for name, version in installed.items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(app, "app", lambda **_: importlib.import_module("torchvision"))
    assert cli.run(["list"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.endswith("cannot be imported: operator torchvision::nms does not exist")
    assert hint.startswith(
        "hint: install torch and torchvision from one package index, for torch 2.13.0+cpu and torchvision 0.28.0 "
        "are builds of two: pip install --force-reinstall torch torchvision"
    )


def test_what_was_given_against_the_checkpoint_is_said_in_one_line_and_kept(
    told: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = ["export", "--weights", str(told), "--format", "eager", "--batch", "2", "--out", str(tmp_path / "m")]
    assert cli.run([*command, "--image-size", "96", "--mean", "0.4", "--std", "0.25"]) == 0
    end = "(the file's header): what was given is taken"
    expected = [
        f"--image-size gives image_size 96x96, and the checkpoint says 64,64 {end}",
        f"--mean gives mean 0.4,0.4,0.4, and the checkpoint says 0.5,0.5,0.5 {end}",
    ]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "what was given is taken" in line] == expected
    found = msgspec.json.decode((tmp_path / "m" / "manifest.json").read_bytes(), type=Manifest).provenance
    assert found["mean"].contradicts == "0.5,0.5,0.5 (the file's header)"
    assert found["std"].how == "given"
    assert found["std"].contradicts is None
    assert cli.run(["inspect", str(tmp_path / "m")]) == 0
    assert expected[1] in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["quantize", "half"])
def test_plans_say_it_too(verb: str, told: Path, tmp_path: Path, capsys: Captured) -> None:
    images = ["--calibration", "random"] if verb == "quantize" else ["--data", str(tmp_path / "p")]
    (tmp_path / "p").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "p" / "a.png")
    command = [
        verb,
        "--weights",
        str(told),
        *images,
        "--images",
        "2",
        "--mean",
        "0.4",
        "--out",
        str(tmp_path / "p.json"),
    ]
    cli.run(command)
    assert "--mean gives mean 0.4,0.4,0.4, and the checkpoint says 0.5,0.5,0.5" in capsys.readouterr().err


# predict -------------------------------------------------------------------------------------------------------------


def test_predict_shows_as_many_classes_of_each_image_as_top_says(
    artifact: Path, pictures: Path, capsys: Captured
) -> None:
    assert cli.run(["predict", str(artifact), str(pictures), "--top", "3"]) == 0
    assert capsys.readouterr().out.count("%") == 2 * 3
    assert cli.run(["predict", str(artifact), str(pictures)]) == 0
    assert capsys.readouterr().out.count("%") == 2
    assert cli.run(["predict", str(artifact), str(pictures), "--multi-label", "--top", "3"]) == 0
    assert capsys.readouterr().out.count("%") == 2 * 3


def test_of_several_images_every_class_that_is_likelier_than_not_is_shown() -> None:
    def classes(*probabilities: float) -> tuple[ClassProbability, ...]:
        return tuple(ClassProbability(number=n, name=None, probability=p) for n, p in enumerate(probabilities))

    assert _likely(classes(0.9, 0.6, 0.4)) == classes(0.9, 0.6)
    assert _likely(classes(0.3, 0.2)) == classes(0.3)
    assert _likely(()) == ()


@pytest.mark.parametrize(
    "command",
    [["predict", "a", "b", "--out", "x.csv/"], ["report", "r.jsonl", "--out", "x.html/"],
     ["quantize", "--calibration", "random", "--out", "x.json/"], ["half", "--data", "d", "--out", "x.json/"],
     ["bench", "--save", "x.jsonl/"], ["gate", "--baseline", "a", "--candidate", "b", "--junit", "x.xml/"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_file_that_is_named_as_a_folder_is_refused(
    command: list[str], capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(command) == 2
    assert "names a folder; expected a file's name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_named_as_a_folder_is_refused_in_python() -> None:
    with pytest.raises(UsageError, match=r"out 'x\.csv/' names a folder"):
        api.predict("a", "b", out="x.csv/")


# gate ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"max_drop": -1}, "limit max_drop -1; expected percentage points from 0 to 100"),
        ({"max_drop": "much"}, "limit max_drop 'much'; expected percentage points from 0 to 100"),
        ({"max_drop": 1, "alpha": 0.7}, "limit alpha 0.7; expected a chance above 0 and below 0.5"),
        ({"max_drop": 1, "min_agreement": 100}, "limit min_agreement 100; expected a percentage above 0 and below 100"),
        ({"max_drop": 1, "max_size_ratio": 0}, "limit max_size_ratio 0; expected a ratio of candidate to baseline"),
    ],
)
def test_a_limit_out_of_its_range_is_refused_in_its_own_words(limits: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        api.gate("a", "b", limits=limits)
    assert str(caught.value).startswith(line)


def test_an_artifact_held_against_itself_is_said_to_be(artifact: Path, tmp_path: Path, capsys: Captured) -> None:
    generator = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / "p" / f"class{number}").mkdir(parents=True)
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "p" / f"class{number}" / "a.png")
    command = ["gate", "--baseline", str(artifact), "--candidate", str(artifact), "--data", str(tmp_path / "p")]
    cli.run([*command, "--max-drop", "1", "--markdown", str(tmp_path / "v.md")])
    assert "both sides are the same artifact, which loses nothing to itself" in capsys.readouterr().out
    assert "both sides are the same artifact" in (tmp_path / "v.md").read_text()


# Names and streams ---------------------------------------------------------------------------------------------------


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([*PROGRAM, *words], capture_output=True, check=False, env=os.environ | environment)


def test_names_beyond_ascii_are_kept_where_python_takes_the_system_for_ascii(
    artifact: Path, pictures: Path, tmp_path: Path
) -> None:
    done = run("predict", str(artifact), str(pictures), "--json", "--out", str(tmp_path / "ö.csv"), **ASCII)
    assert done.returncode == 0, done.stderr
    assert [one["image"] for one in json.loads(done.stdout)["predictions"]] == ["größe.png", "x.png"]
    assert done.stdout.isascii()
    assert "größe.png" in (tmp_path / "ö.csv").read_text("utf-8")


def test_evaluations_and_artifacts_with_names_beyond_ascii_work_there_too(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "modell ä"
    shutil.copytree(artifact, copy)
    for number in range(10):
        (tmp_path / "bilder ä" / f"classé{number}").mkdir(parents=True)
        Image.new("RGB", (64, 64), (number * 20,) * 3).save(tmp_path / "bilder ä" / f"classé{number}" / "ü.png")
    command = ["eval", str(copy), "--data", str(tmp_path / "bilder ä"), "--out", str(tmp_path / "é"), "--json"]
    done = run(*command, **ASCII)
    assert done.returncode == 2
    assert b"hint: set PYTHONUTF8=1 in the environment" in done.stderr
    done = run(*command, LC_ALL="C")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["artifact"], Path(found["data"]).name) == ("modell ä", "bilder ä")
    assert json.loads((tmp_path / "é.json").read_text("utf-8"))["per_class"][0]["name"] == "classé0"


def test_json_is_json_on_a_stream_that_holds_ascii_only(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path / "ä"), "--json", PYTHONIOENCODING="ascii")
    assert done.stdout.isascii()
    assert str(tmp_path / "ä") in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_whose_streams_are_closed(closed: str, artifact: Path) -> None:
    command = ["sh", "-c", f'"$@" {closed}', "sh", *PROGRAM, "inspect", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout == "") == (" >&-" in f" {closed}")


def test_nothing_is_read_where_stdin_is_closed() -> None:
    text = "import sys; from convnext_deploy import cli; cli._open_what_is_closed(); print(sys.stdin.buffer.read())"
    done = subprocess.run(["sh", "-c", f"{sys.executable} -c '{text}' <&-"], capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"b''\n", b"")


def test_children_have_the_streams_that_the_caller_closed() -> None:
    """Their first file would take the number of one otherwise, and what libraries print would be written into it."""
    child = "import sys; sys.exit(sys.stdout is None)"
    text = f"import subprocess, sys; from convnext_deploy import cli; cli._open_what_is_closed(); " \
           f"sys.exit(subprocess.run([sys.executable, '-c', '{child}']).returncode)"  # fmt: skip
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", text], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_has_enough_ends_a_command_without_a_word(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.closing(os.fdopen(writing, "wb")) as closed:
        done = subprocess.run([*PROGRAM, "list"], stdout=closed, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 141  # typer's own answer is 1, which says that a check failed
    assert done.stderr == b""
