"""The command line as a user and a script meet it: words, streams and exit codes."""

import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import light_tests
import numpy as np
import pytest
from imported_modules import run_and_name
from PIL import Image

from convnext_deploy import api, cli, env, formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli import app
from convnext_deploy.errors import UsageError
from convnext_deploy.models import registry
from convnext_deploy.native import library
from convnext_deploy.records.timing import BenchResult

Captured = pytest.CaptureFixture[str]
PROGRAM = [sys.executable, "-m", "convnext_deploy"]
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "2026-11-23-native.jsonl"
QUICK = ["--format", "eager", "--image-size", "64", "--batch", "2"]


pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("eager")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two of ten classes; one of them is damaged."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        (root / f"class{number}").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        folder = root / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    damaged = root / "class1" / "5.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    return root


@pytest.fixture
def damaged(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact, one byte of which was changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(artifact.path, copy)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return copy


NAMES = ["export", "eval", "bench", "inspect", "list", "doctor", "profile", "roofline", "report"]


def refused(capsys: Captured, *arguments: str) -> tuple[int, str]:
    """(exit code, what stands behind `error: `) of a command that has to fail, with what to do behind it."""
    known = arguments[0] in NAMES
    code = cli.run([arguments[0], "--quiet", *arguments[1:]] if known else list(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    line = captured.err.replace("\nhint: ", "; ")
    assert line.count("\n") == 1, captured.err
    assert line.startswith("error: ")
    return code, line.removeprefix("error: ").rstrip("\n")


# JSON and quiet ------------------------------------------------------------------------------------------------------


def commands(artifact: Artifact, pictures: Path, checkpoint: Path, out: Path) -> dict[str, list[str]]:
    return {
        "export": ["export", "--weights", str(checkpoint), *QUICK, "--out", str(out)],
        "eval": ["eval", str(artifact.path), "--data", str(pictures)],
        "bench": ["bench", str(artifact.path), "--batch", "1", "--seconds", "0.1"],
        "inspect": ["inspect", str(artifact.path)],
        "list": ["list"],
        "doctor": ["doctor"],
        "profile": ["profile", str(artifact.path), "--steps", "2"],
        "roofline": ["roofline", "--variant", "tiny", "--device", "a100"],
        "report": ["report", str(RESULTS), "--out", f"{out}.md"],
    }


def test_every_command_is_tested() -> None:
    assert {command.name or getattr(command.callback, "__name__", None) for command in app.app.registered_commands} == {
        *NAMES,
        "gate",  # tests/accuracy/test_gate.py
        "quantize",  # tests/workflows/test_quantize.py
        "half",  # likewise
        "optimize",  # tests/workflows/test_optimize.py
        "predict",  # tests/workflows/test_predict.py
        "serve",  # tests/serving/test_serve_process.py
        "package",  # tests/serving/test_packages.py
        "refit",  # needs a GPU to succeed: tests/runtimes/test_nvinfer.py
    }


@pytest.fixture(scope="module")
def measured() -> list[BenchResult]:
    return []


@pytest.fixture
def command_of(
    artifact: Artifact,
    pictures: Path,
    checkpoint: Path,
    measured: list[BenchResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[str]]:
    """`commands`. `bench` measures the first time, in seconds, then gives the same rows: where they go is tested."""
    real = api.bench

    def bench(*arguments: Any, **named: Any) -> Iterator[BenchResult]:
        if not measured:
            measured.extend(real(*arguments, **named))
        yield from measured

    monkeypatch.setattr(api, "bench", bench)
    return commands(artifact, pictures, checkpoint, tmp_path / "m")


@pytest.mark.parametrize("name", NAMES)
def test_json_is_one_document_on_stdout_and_nothing_else(
    name: str,
    command_of: dict[str, list[str]],
    artifact: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert cli.run([*command_of[name], "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    expected = {
        "export": lambda d: d["manifest"]["export"]["format"] == "eager" and d["path"] == str(tmp_path / "m"),
        "eval": lambda d: d["images"] == 5 and len(d["corrupt"]) == 1,
        "bench": lambda d: [row["runtime"] for row in d["results"]] == ["eager"] and d["comparisons"] == [],
        "inspect": lambda d: d == json.loads((artifact.path / "manifest.json").read_text()),
        "list": lambda d: (
            set(d["variants"]) == set(registry.VARIANTS) and [f["name"] for f in d["formats"]] == list(formats.names())
        ),
        "doctor": lambda d: d["versions"] == env.versions() and set(d["formats"]) == set(formats.names()),
        "profile": lambda d: d["record"] == "profile" and d["artifact_sha256"] == artifact.sha256,
        "roofline": lambda d: d["record"] == "roofline" and d["ceilings"]["name"].startswith("NVIDIA A100"),
        "report": lambda d: d["bytes"] == (tmp_path / "m.md").stat().st_size,
    }[name]
    assert expected(document)


@pytest.mark.parametrize("name", NAMES)
def test_quiet_prints_nothing_on_success(
    name: str, command_of: dict[str, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command_of[name], "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_without_either_results_go_to_stdout(
    name: str,
    command_of: dict[str, list[str]],
    capsys: Captured,
) -> None:
    assert cli.run(command_of[name]) == 0
    captured = capsys.readouterr()
    words = {
        "export": "relative error",
        "eval": "5 images",
        "bench": "images/s",
        "inspect": "intact",
        "list": "convnextv2_huge",
        "doctor": "onnxruntime",
        "profile": "on the clock",
        "roofline": "data sheet",
        "report": "m.md: ",
    }
    assert words[name] in captured.out
    assert "error" not in captured.err
    assert ("loading the checkpoint\n" in captured.err) == (name == "export")  # progress, which a pipe does not get


def test_an_error_with_json_is_a_document_too(damaged: Path, capsys: Captured) -> None:
    assert cli.run(["inspect", str(damaged), "--json"]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["exit_code"] == 2
    wrong = document["error"].removesuffix(f"; {document['hint']}")
    assert captured.err == f"error: {wrong}\nhint: {document['hint']}\n"
    assert document["hint"] == "export the model again"


def test_random_weights_are_announced(tmp_path: Path, capsys: Captured) -> None:
    command = ["export", "--weights", "random", "--variant", "test_convnext", *QUICK, "--out", str(tmp_path / "m")]
    assert cli.run(command) == 0
    assert "WEIGHTS ARE RANDOM" in capsys.readouterr().out
    assert cli.run(["inspect", str(tmp_path / "m")]) == 0
    assert "WEIGHTS ARE RANDOM" in capsys.readouterr().out


# Errors --------------------------------------------------------------------------------------------------------------

RANDOM = ["export", "--weights", "random", "--variant", "test_convnext"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RANDOM, "--format", "onxx"], "unknown format 'onxx'; did you mean onnx? (formats: "),
        (
            ["export", "--weights", "random", "--variant", "convnext_bse"],
            "unknown variant 'convnext_bse'; did you mean",
        ),
        (["export", "--weights", "random"], "--weights random needs --variant"),
        (["export"], "which model? give --variant"),
        (["export", "--weights", "/nowhere/model.pth"], "--weights /nowhere/model.pth: no such file or folder"),
        ([*RANDOM, "--precision", "fp64"], "--precision fp64; expected one of fp32, tf32, fp16, bf16"),
        ([*RANDOM, "--input", "int8"], "--input int8; expected one of float32, uint8"),
        ([*RANDOM, "--task", "track"], "--task track; expected one of classify, embed, features, segment, detect"),
        ([*RANDOM, "--device", "gpu"], "--device gpu; expected one of cpu, cuda"),
        ([*RANDOM, "--batch", "8:1:4"], "--batch 8:1:4; expected N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"),
        ([*RANDOM, "--batch", "0"], "--batch 0; expected N or"),
        ([*RANDOM, "--batch", "1:2"], "--batch 1:2; expected N or"),
        ([*RANDOM, "--batch", ""], "--batch ; expected N or"),
        ([*RANDOM, "--image-size", "abc"], "--image-size abc; expected pixels such as 224"),
        ([*RANDOM, "--image-size", "64x64x3"], "--image-size 64x64x3; expected pixels such as 224"),
        ([*RANDOM, "--image-size", "31"], "image size 31x31 pixels; expected at least 32x32"),
        ([*RANDOM, "--image-size", "0"], "--image-size 0; expected pixels such as 224, or HEIGHTxWIDTH"),
        ([*RANDOM, "--num-classes", "many"], "--num-classes many; expected a whole number"),
        ([*RANDOM, "--num-classes", "0"], "0 classes; expected at least 1"),
        ([*RANDOM, "--nosuch"], "export has no option --nosuch"),
        ([*RANDOM, "--out"], "Option '--out' requires an argument"),
        (["nosuch"], "no command 'nosuch' (commands: optimize, export, "),
        (["eval", "/nowhere"], "eval needs --data: folder of class folders, tar, Parquet, list, or hfds:NAME"),
        (["eval", "/nowhere", "--data", "/nowhere"], "/nowhere is not a folder; expected an artifact"),
        (["inspect"], "inspect needs ARTIFACT: artifact folder"),
        (["quantize", "--calibration", "a", "--out", "p.json", "--images=1"], "--images 1; expected at least 2"),
        (["profile", "/nowhere", "--layers", "0"], "--layers 0; expected at least 1"),
        (["optimize", "--data", "a", "--out", "o", "--max-drop", "much"], "--max-drop much; expected a number"),
        (["bench", "/nowhere", "--percentile", "101"], "--percentile 101; expected between 0 and 100"),
        (["inspect", "/nowhere"], "/nowhere is not a folder; expected an artifact"),
        (["inspect", "/", "two"], "Got unexpected extra argument"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a command that wrongly went on would write
    code, error = refused(capsys, *arguments)
    assert error.lower().startswith(message.lower())  # releases of typer differ in how they write an argument's name
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: Captured, replaced_format: Callable[..., None]
) -> None:
    from convnext_deploy.formats import eager

    def build(graph: Any, folder: Path) -> None:
        graph.module.head.classifier.bias.add_(1)
        eager.build(graph, folder)

    replaced_format("eager", build=build)
    code, error = refused(capsys, *RANDOM, *QUICK, "--out", str(tmp_path / "m"))
    assert code == 1
    assert error.startswith("on bundled: relative error ")
    assert error.endswith(f"kept aside in {tmp_path / 'm.rejected'}")


def test_a_changed_artifact_is_refused_by_inspect_and_eval(damaged: Path, pictures: Path, capsys: Captured) -> None:
    message = f"{damaged}/model.safetensors was changed after the export (its SHA-256 differs); export the model again"
    assert refused(capsys, "inspect", str(damaged)) == (2, message)
    assert refused(capsys, "eval", str(damaged), "--data", str(pictures)) == (2, message)


@pytest.mark.parametrize(
    ("name", "beside", "message"),
    [
        ("manifest.json", (), "manifest.json is one file of an artifact; give its folder, "),
        ("model.onnx", ("manifest.json",), "model.onnx is one file of an artifact; give its folder, "),
        ("eval.json", (), "eval.json is no artifact; give a folder that `export` made, or see results with "),
        ("rows.jsonl", (), "rows.jsonl is no artifact; give a folder that `export` made, or see results with "),
        ("model.engine", ("manifest.json",), "model.engine is not a TensorRT engine"),
    ],
)
def test_inspect_says_what_to_do_with_a_file_that_is_no_artifact(
    name: str, beside: tuple[str, ...], message: str, tmp_path: Path, capsys: Captured
) -> None:
    for each in (name, *beside):
        (tmp_path / each).touch()
    code, error = refused(capsys, "inspect", str(tmp_path / name))
    assert (code, error.startswith(f"{tmp_path}/{message}")) == (2, True), error


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UsageError, match="not a folder"):
        cli.run(["inspect", "/nowhere", "--debug"])
    done = subprocess.run([*PROGRAM, "inspect", "/nowhere", "--debug"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "convnext_deploy.errors.ArtifactError: /nowhere is not a folder" in done.stderr


def test_a_mistake_of_ours_is_not_dressed_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(manifest, "verified", broken)
    with pytest.raises(ZeroDivisionError):
        cli.run(["inspect", "/nowhere"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.00 GiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_memory_that_there_is_not_is_one_line(
    error: Exception, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(path: Path) -> None:
        raise error

    monkeypatch.setattr(manifest, "verified", large)
    code, line = refused(capsys, "inspect", "/nowhere")
    assert code == 2
    assert re.fullmatch(r"there is not enough memory: .*allocate.*; give a smaller batch or image size", line)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_is_one_line_and_exit_code_130(
    as_json: bool, artifact: Artifact, pictures: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "evaluate", interrupted)
    command = ["eval", str(artifact.path), "--data", str(pictures)]
    assert cli.run([*command, "--json"] if as_json else command) == 130
    captured = capsys.readouterr()
    assert captured.err.endswith("error: interrupted\n")
    assert ("nothing was kept; --out OUT would keep it\n" in captured.err) != as_json
    assert captured.out == ('{"error":"interrupted","exit_code":130}\n' if as_json else "")


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, capsys: Captured, replaced_format: Callable[..., None]
) -> None:
    def build(graph: Any, folder: Path) -> None:
        (folder / "half").write_bytes(b"a file")
        raise KeyboardInterrupt

    replaced_format("eager", build=build)
    assert cli.run([*RANDOM, *QUICK, "--out", str(tmp_path / "m")]) == 130
    assert capsys.readouterr().err.endswith("\nerror: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: Captured, replaced_format: Callable[..., None]) -> None:
    def build(graph: Any, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replaced_format("eager", build=build)
    expected = (2, f"{tmp_path} is full; make room, or choose another --out")
    assert refused(capsys, *RANDOM, *QUICK, "--out", str(tmp_path / "m")) == expected


# What is not installed -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "openvino", None)  # `import openvino` raises ModuleNotFoundError


@pytest.mark.usefixtures("no_openvino")
def test_a_missing_extra_is_one_line_with_the_command_to_run(capsys: Captured, tmp_path: Path) -> None:
    code, error = refused(capsys, *RANDOM, "--format", "openvino", "--out", str(tmp_path / "m"))
    assert code == 2
    assert error == "format openvino: openvino is not installed; run: pip install 'convnext-deploy[openvino]'"


@pytest.mark.usefixtures("no_openvino")
def test_list_and_doctor_work_without_an_extra_and_name_it(capsys: Captured) -> None:
    assert cli.run(["list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["formats"]}
    assert listed["openvino"]["missing"] == ["openvino"]
    assert listed["onnx"]["missing"] == []
    assert cli.run(["doctor", "--json"]) == 0
    states = json.loads(capsys.readouterr().out)["formats"]
    assert states["openvino"].endswith("pip install 'convnext-deploy[openvino]'")
    assert states["eager"] == "ready"


@pytest.mark.usefixtures("no_openvino")
def test_tables_keep_the_brackets_of_an_extra(capsys: Captured) -> None:
    assert cli.run(["doctor"]) == 0
    assert "pip install 'convnext-deploy[openvino]'" in capsys.readouterr().out
    assert cli.run(["list"]) == 0
    assert "pip install 'convnext-deploy[openvino]'" in capsys.readouterr().out


def test_doctor_names_a_missing_compiler(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cli.run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["formats"]["aotinductor"].startswith("no C++ compiler on PATH")
    assert document["formats"]["native"].startswith("the native engine needs a C++20 compiler and none is on PATH")


def test_doctor_measures_what_the_cpu_multiplies(
    capsys: Captured, need_format: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_format("native")
    monkeypatch.setenv("CONVNEXT_DEPLOY_ISA", "portable")
    assert cli.run(["doctor", "--peaks", "--json"]) == 0
    peaks = json.loads(capsys.readouterr().out)["peaks"]
    assert peaks["path"] == "portable"
    assert peaks["threads"][0] == 1
    assert set(peaks["gmacs_per_s"]) == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rates in peaks["gmacs_per_s"].values() for rate in rates)
    assert cli.run(["doctor", "--peaks"]) == 0
    assert "Products by portable, GMAC/s" in capsys.readouterr().out
    monkeypatch.setenv("CONVNEXT_DEPLOY_ISA", "sse9")
    assert cli.run(["doctor", "--peaks"]) == 2
    assert "this CPU has no path 'sse9'" in capsys.readouterr().err


def test_doctor_names_the_native_engines_path(capsys: Captured, need_format: Callable[[str], None]) -> None:
    need_format("native")
    library.build()
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"]["native"] == f"ready, path {library.isas()[0]}"


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_eval_counts_and_keeps_what_it_saw(
    artifact: Artifact, pictures: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = ["eval", str(artifact.path), "--data", str(pictures), "--batch", "3", "--out", str(tmp_path / "result")]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "on 5 images of" in out
    assert "1 corrupt image left out, the first: class1/5.png: " in out
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 5
    assert (tmp_path / "result.npz").is_file()
    code, error = refused(capsys, *command)
    assert (code, error) == (2, f"{tmp_path / 'result.json'} exists; choose another --out, or replace it with --force")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch 0; expected at least 1"),
        (["--batch", "5"], "batch 5; this artifact takes 1 to 4 images at once"),
        (["--limit", "0"], "limit 0; expected at least 1"),
        (["--threads", "0"], "threads 0; expected at least 1"),
        (["--split", "test"], ""),
    ],
)
def test_eval_refuses_what_it_cannot_do(
    arguments: list[str], message: str, artifact: Artifact, pictures: Path, capsys: Captured
) -> None:
    code, error = refused(capsys, "eval", str(artifact.path), "--data", str(pictures), *arguments)
    assert code == 2
    assert error.startswith(message)


# Processes -----------------------------------------------------------------------------------------------------------


def test_help_imports_no_framework() -> None:
    code = (
        "from convnext_deploy import cli\n"
        "for words in (['--help'], ['export', '--help'], ['eval', '--help']): assert cli.run(words) == 0\n"
    )
    heavy = {"torch", "timm", "onnx", "onnxruntime", "openvino", "numpy", "PIL", "safetensors"}
    done = run_and_name(code, heavy)
    assert done.stderr == "[]\n"
    assert "--dynamic-image-size" in done.stdout


def test_help_takes_less_than_a_second() -> None:
    """Of processor time, which does not depend on what else runs here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "export" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # seconds


def test_no_arguments_are_a_request_for_help(capsys: Captured) -> None:
    assert cli.run([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: convnext-deploy ")
    assert captured.err == ""


def test_a_typo_costs_no_framework() -> None:
    code = (
        "import sys\nfrom convnext_deploy import cli\n"
        "assert cli.run(['export', '--variant', 'base', '--precision', 'fp99']) == 2\n"
        "assert cli.run(['export', '--variant', 'base', '--batch', '3:2:1']) == 2\n"
        "assert cli.run(['optimize', '--weights', 'my.pth', '--data', 'val', '--out', '.']) == 2  # which exists\n"
        "print(sorted({'torch', 'timm', 'onnx', 'openvino'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr.count("error: ") == 3


def test_the_installed_program_exits_with_the_code() -> None:
    done = subprocess.run([*PROGRAM, "inspect", "/nowhere"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: /nowhere is not a folder; expected an artifact made by `convnext-deploy export`\n"


def test_an_export_in_a_process_of_its_own_prints_no_foreign_words(tmp_path: Path, checkpoint: Path) -> None:
    """No warning of a library reaches the user."""
    command = [*PROGRAM, "export", "--weights", str(checkpoint), *QUICK, "--out", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps, next_ = done.stderr.splitlines()[:-2], done.stderr.splitlines()[-2:]
    assert [line.split()[:3] for line in next_] == [
        ["next:", "convnext-deploy", "predict"],
        ["convnext-deploy", "eval", str(tmp_path / "m")],
    ]
    assert (steps[0], steps[-1]) == ("loading the checkpoint", "verifying")
    assert [
        step
        for step in steps
        if not re.fullmatch(r"[a-z][a-z0-9 ]+|compared with timm [\d.]+|(given|known|assumed): .*", step)
    ] == []
    assert len(steps) < 12
    assert done.stdout.startswith(f"{tmp_path / 'm'}: test_convnext as eager fp32, ")


# Hints for words in the wrong place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["export", "my.pth"], r"extra argument.*\(my\.pth\); did you mean --weights my\.pth\?$"),
        (["export", "my.pth", "--format", "onnx"], r"; did you mean --weights my\.pth\?$"),
        (["eval", "build/x", "pictures"], r"; did you mean --data pictures\?$"),
        (["export", "--precision", "int8"], r"^--precision int8; expected one of fp32.*quantize.*--plan"),
        (["classify", "x.png"], r"^no command 'classify'; did you mean predict\?"),
        (["server"], r"^no command 'server'; did you mean serve\?"),
        (["benchmark"], r"^no command 'benchmark'; did you mean bench\? \(commands: optimize, export, "),
        (["convert"], r"^no command 'convert'; did you mean export\?"),
        (["qantize"], r"^no command 'qantize'; did you mean quantize\?"),
        (["xyzzy"], r"^no command 'xyzzy' \(commands: optimize, export, "),
    ],
)
def test_a_word_in_the_wrong_place_names_what_does_the_job(arguments: list[str], line: str, capsys: Captured) -> None:
    code, said = refused(capsys, *arguments)
    assert code == 2
    assert re.search(line, said), said


def test_every_synonym_leads_to_something_that_is_there() -> None:
    assert set(app.SYNONYMS.values()) <= {*app.COMMANDS, "--version", "--help"}
    assert not set(app.SYNONYMS) & set(app.COMMANDS)


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_printed(option: str, capsys: Captured) -> None:
    assert cli.run([option]) == 0
    assert capsys.readouterr().out == f"convnext-deploy {env.version()}\n"


@pytest.mark.parametrize("arguments", [["-h"], *([name, "-h"] for name in app.COMMANDS)], ids=" ".join)
def test_help_has_a_short_form(arguments: list[str], capsys: Captured) -> None:
    assert cli.run(arguments) == 0
    assert "Usage: convnext-deploy" in capsys.readouterr().out


def test_one_number_for_mean_and_std_is_for_every_channel(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    arguments = ["export", "--weights", str(checkpoint), "--mean", "0.5", "--std", "0.25", "--out", str(tmp_path / "a")]
    assert cli.run([*arguments, *QUICK]) == 0
    facts = manifest.read(tmp_path / "a").manifest.preprocessing
    assert (facts.mean, facts.std) == ((0.5,) * 3, (0.25,) * 3)


# Packages that are not there ------------------------------------------------------------------------------------------

COMMANDS_OF_ALL = [
    ["export", "--weights", "nowhere.pth", "--format", "eager"],
    ["quantize", "--weights", "random", "--variant", "atto", "--calibration", "nowhere", "--out", "p.json"],
    ["half", "--weights", "random", "--variant", "atto", "--data", "nowhere", "--out", "p.json"],
    ["gate", "--baseline", "a", "--candidate", "b", "--max-drop", "1"],
    ["inspect", "nowhere"],
    ["list"],
    ["profile", "nowhere"],
    ["roofline", "--variant", "atto", "--device", "h100", "--precision", "fp16"],
    ["report", "nowhere.jsonl", "--out", "x.html"],
    ["refit", "nowhere", "--weights", "random", "--out", "x"],
]


@pytest.mark.parametrize("package", ["torch", "timm", "onnx", "pyarrow", "scipy", "matplotlib"])
def test_a_missing_package_is_one_line_in_every_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    with light_tests.without(package):
        for arguments in COMMANDS_OF_ALL:
            code = cli.run(arguments)
            said = capsys.readouterr().err
            assert "Traceback" not in said
            assert said.count("error: ") == (code != 0), said
