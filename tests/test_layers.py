"""The import law is checked by import-linter; here each of its contracts is broken once, to see it fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [tool, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "convnext_deploy", tmp_path / "convnext_deploy")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("evaluate.py", "from . import api", "Layers BROKEN"),  # upwards
        ("verify.py", "from . import measure", "Layers BROKEN"),  # sideways
        ("newcomer.py", "", "Layers BROKEN"),  # a module that nobody gave a layer
        ("formats/onnx.py", "from . import openvino", "Formats do not know each other BROKEN"),
        ("verify.py", "import openvino", "OpenVINO is imported by its format only BROKEN"),
        ("types.py", "import torch", "Records, errors and sessions need no framework BROKEN"),
    ],
)
def test_breaking_the_import_law_is_found(copy: Path, module: str, statement: str, contract: str) -> None:
    with (copy / "convnext_deploy" / module).open("a") as file:
        file.write(f"\n{statement}\n")
    found = lint(copy)
    assert found.returncode == 1
    assert contract in found.stdout or (contract == "Layers BROKEN" and "newcomer" in found.stdout + found.stderr)


def test_the_package_as_it_is_keeps_the_import_law(copy: Path) -> None:
    found = lint(copy)
    assert found.returncode == 0, found.stdout
