"""The import law is checked by import-linter; here each of its contracts is broken once, to see it fail."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import msgspec
import pytest

from convnext_deploy import formats

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "Artifacts, data, and what evaluates and times them need no framework BROKEN"


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


BROKEN = [
    ("accuracy/evaluation.py", "from .. import api", "Layers BROKEN"),  # upwards
    ("accuracy/gate.py", "from ..timing import measure", "Layers BROKEN"),  # sideways
    ("newcomer.py", "", "Layers BROKEN"),  # a module that nobody gave a layer
    ("formats/onnx.py", "from . import openvino", "Formats do not know each other BROKEN"),
    (
        "workflows/race.py",
        "import openvino",
        "OpenVINO is imported by its format and by what runs any graph of it BROKEN",
    ),
    (
        "formats/onnx.py",
        "import openvino",
        "OpenVINO is imported by its format and by what runs any graph of it BROKEN",
    ),
    (
        "quantization/plan.py",
        "import openvino",
        "OpenVINO is imported by its format and by what runs any graph of it BROKEN",
    ),
    ("timing/measure.py", "import tensorrt", "TensorRT is imported by runtimes.tensorrt only"),
    ("runtimes/stand_in.py", "import tensorrt_rtx", "TensorRT is imported by runtimes.tensorrt only"),
    ("timing/worker.py", "import triton", "Triton is imported by kernels only BROKEN"),
    ("records/base.py", "import torch", FRAMEWORK),
    ("records/plan.py", "from .manifest import Manifest", "No circles BROKEN"),
    ("workflows/evaluate.py", "import ray", "Ray is imported by cluster and serving.ray only BROKEN"),
    ("artifact/verify.py", "import onnx", FRAMEWORK),
    ("data/masks.py", "import torch", FRAMEWORK),
    ("accuracy/evaluation.py", "import onnxruntime", FRAMEWORK),
]


@pytest.mark.parametrize(("module", "statement", "contract"), BROKEN)
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


def test_every_contract_is_broken_once() -> None:
    contracts = re.findall(r'^name = "(.*)"\ntype = ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(contracts) > 5
    seen = {contract.removesuffix(" BROKEN") for _, _, contract in BROKEN}
    assert [name for name in contracts if not any(name.startswith(known) for known in seen)] == []


def contract(name: str) -> dict[str, Any]:
    settings = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["tool"]["importlinter"]
    return next(one for one in settings["contracts"] if one["name"] == name.removesuffix(" BROKEN"))


def test_every_format_is_among_those_that_do_not_know_each_other() -> None:
    modules = {f"convnext_deploy.formats.{name}" for name in formats.names()}
    assert set(contract("Formats do not know each other")["modules"]) == modules


def test_every_module_without_a_framework_that_runs_artifacts_is_kept_without_one() -> None:
    one = contract(FRAMEWORK)
    graph = grimp.build_graph("convnext_deploy", include_external_packages=True)
    importers = {above for name in one["forbidden_modules"] if name in graph.modules
                 for above in graph.find_downstream_modules(name)}  # fmt: skip
    layers = {"accuracy", "argument_names", "arguments", "artifact", "cluster", "data", "env", "errors", "native",
              "processes", "records", "timing"}  # fmt: skip
    free = {module for module in graph.modules - importers if module.split(".")[1:2] and module.split(".")[1] in layers}
    kept = {module for module in free if any(f"{module}.".startswith(f"{name}.") for name in one["source_modules"])}
    packages = {module for module in free if graph.find_children(module)}  # their `__init__` alone says nothing
    assert free - packages - kept == set()


def test_the_page_of_the_architecture_has_the_layers_that_are_checked() -> None:
    checked = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert checked
    layers = [set(re.findall(r"[a-z_]+", line)) for line in checked[1].splitlines()]
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([^|]*) \|", page, re.MULTILINE)
    assert [set(re.findall(r"`([a-z_]+)`", row)) for row in rows] == layers
