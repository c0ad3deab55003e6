"""Ctrl-C at any import of the program, and where somebody has asked that it be ignored."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import cli, formats

INTERRUPTING = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass  # the handler runs between two of these
sys.meta_path.insert(0, Interrupting())
{before}
from convnext_deploy.cli import main
sys.argv = ["convnext-deploy", *{arguments!r}]
main()
"""
EXPORT = ["export", "--variant", "atto", "--weights", "random", "--format", "eager"]


def program(arguments: list[str], module: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    text = INTERRUPTING.format(module=module, arguments=arguments, before=before)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("convnext_deploy.cli.app", ["--version"]),  # the first that the program imports
        ("typer", ["--version"]),
        ("convnext_deploy.cli.roofline", ["--version"]),
        ("convnext_deploy.formats.base", ["list"]),  # a command's own
        ("msgspec", ["list"]),
        ("numpy", ["list"]),
        pytest.param("numpy.linalg", EXPORT, marks=pytest.mark.slow),
        pytest.param("torch.nn", EXPORT, marks=pytest.mark.slow),  # in the middle of a long one
    ],
)
@pytest.mark.parametrize("json", [False, True])
def test_ctrl_c_during_an_import_is_one_line(module: str, arguments: list[str], json: bool, tmp_path: Path) -> None:
    if arguments is EXPORT:
        arguments = [*arguments, "--out", str(tmp_path / "artifact")]
    done = program([*arguments, "--json"] if json else arguments, module)
    said = done.stderr.removeprefix("loading the checkpoint\n")  # the step that imports PyTorch
    assert (done.returncode, said) == (130, "error: interrupted\n")
    assert done.stdout == ('{"error":"interrupted","exit_code":130}\n' if json else "")


FAILING = """
import importlib.machinery
class Loader:
    def create_module(self, spec): pass
    def exec_module(self, module):
        try:
            raise KeyboardInterrupt  # what pybind11 makes of it, with the same words
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
class Failing:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "openvino" else None
sys.meta_path.insert(0, Failing())
"""


@pytest.mark.parametrize(
    "before",
    [
        "import openvino",  # as a format does, in the middle of an export
        "from convnext_deploy import env; env.import_failure('openvino')",  # as `doctor` does
    ],
)
def test_ctrl_c_inside_of_an_extension_modules_import_is_one_line(before: str) -> None:
    """It was an ImportError, and the line said to install versions that fit each other, with exit code 2."""
    command = f"from convnext_deploy.cli import app\ndef command(**_):\n    {before}\napp.app = command\n"
    done = program(["list"], "nothing", before=f"{FAILING}{command}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_program_that_was_told_to_ignore_ctrl_c_goes_on() -> None:
    done = program(["--version"], "typer", before="signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("convnext-deploy ")


def test_ctrl_c_after_the_last_word_has_no_traceback() -> None:
    ending = "import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = program(["--version"], "nothing", before=ending)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")  # as a shell says: 130


def test_an_export_whose_converter_loses_ctrl_c_ends_before_its_next_step(
    replaced_format: Callable[..., None], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TorchScript's tracing went on, and the export ended with an artifact and exit code 0."""
    build = formats.get("eager").build

    def losing(graph: Any, folder: Path) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        build(graph, folder)

    replaced_format("eager", build=losing)
    arguments = ["export", "--weights", str(checkpoint), "--format", "eager", "--image-size", "64"]
    assert cli.run([*arguments, "--out", str(tmp_path / "a")]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("building eager\nerror: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
