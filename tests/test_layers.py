"""The import law is checked by import-linter; here each of its contracts is broken once, to see it fail."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "Records, errors, artifacts and what times them need no framework BROKEN"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [tool, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "convnext_deploy", folder / "convnext_deploy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def copy(tree: Path) -> Iterator[Path]:
    """The tree, put back as it was afterwards."""
    before = {path: path.read_bytes() for path in tree.rglob("*.py")}
    yield tree
    for path in set(tree.rglob("*.py")) - set(before):
        path.unlink()
    for path, content in before.items():
        if path.read_bytes() != content:
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("accuracy/evaluation.py", "from .. import api", "Layers BROKEN"),  # upwards
        ("accuracy/gate.py", "from ..timing import measure", "Layers BROKEN"),  # sideways
        ("newcomer.py", "", "Layers BROKEN"),  # a module that nobody gave a layer
        ("formats/onnx.py", "from . import openvino", "Formats do not know each other BROKEN"),
        ("workflows/race.py", "import openvino", "OpenVINO is imported by its format only BROKEN"),
        ("formats/onnx.py", "import openvino", "OpenVINO is imported by its format only BROKEN"),
        ("quantization/plan.py", "import openvino", "OpenVINO is imported by its format only BROKEN"),
        ("timing/measure.py", "import tensorrt", "TensorRT is imported by runtimes.tensorrt only"),
        ("runtimes/stand_in.py", "import tensorrt_rtx", "TensorRT is imported by runtimes.tensorrt only"),
        ("timing/worker.py", "import triton", "Triton is imported by kernels only BROKEN"),
        ("records/base.py", "import torch", FRAMEWORK),
        ("records/plan.py", "from .manifest import Manifest", "No circles BROKEN"),
        ("artifact/verify.py", "import onnx", FRAMEWORK),
    ],
)
def test_breaking_the_import_law_is_found(copy: Path, module: str, statement: str, contract: str) -> None:
    with (copy / "convnext_deploy" / module).open("a") as file:
        file.write(f"\n{statement}\n")
    result = lint(copy)
    assert result.returncode == 1
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).split())  # release 2.6 colours a file, too
    assert contract in shown or (contract == "Layers BROKEN" and "newcomer" in result.stdout + result.stderr)


def test_the_package_as_it_is_keeps_the_import_law(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout
