"""What the base installation does without PyTorch and all else that only an export needs, for each of three runtimes.

Every command runs in a process in which importing one of these packages raises, and so it does in the processes that
the command starts.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from light_tests import HIDDEN
from PIL import Image

from convnext_deploy.artifact.manifest import Artifact

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"native": (), "onnx": ("onnxruntime",), "openvino": ("openvino",)}
CLICK = "ignore:'click.utils.get_:DeprecationWarning"  # see pyproject.toml, of typer before it carried its own copy
SITECUSTOMIZE = """
import os, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""

# The commands one after another, each with the exit code that it has to have; then a short benchmark.
SCRIPT = """
import json, sys
from convnext_deploy import bench, cli
for code, arguments in json.loads(sys.argv[2]):
    found = cli.run([str(word) for word in arguments])
    assert found == code, (found, arguments)
from convnext_deploy.workflows.bench import Plan
(row,) = bench(sys.argv[1], Plan(seconds=0.1, warmup_limit_s=0.1, batches=(1,)))
assert row.samples_ms and row.percent_of_bound, row
"""


@pytest.fixture
def light(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command where nothing but the base installation and one runtime can be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "work").mkdir()

    def run(runtime: str, *arguments: object, code: int = 0, script: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT))),
            "HIDDEN": ",".join(name for name in HIDDEN if name not in RUNTIMES[runtime]),
        }
        program = ("-c", script) if script else ("-m", "convnext_deploy")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", CLICK, *program, *map(str, arguments)],
            capture_output=True, text=True, check=False, cwd=tmp_path / "work", env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        file = folder / f"c{number % 10}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (70, 64, 3), np.uint8)).save(file)
    return folder


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_artifacts_are_used_without_what_made_them(
    runtime: str, images: Path, artifact_of: Callable[..., Artifact], tmp_path: Path, light: Callable[..., object]
) -> None:
    path = str(artifact_of(runtime).path)
    saved = ["--baseline", "first.json", "--candidate", "second.json", "--max-drop", "50"]
    both = ["--baseline", path, "--candidate", path, "--data", str(images), "--limits", "limits.toml"]
    commands = [
        (0, ["inspect", path]),
        (0, ["predict", path, str(images), "--out", "found.npz"]),
        (0, ["eval", path, "--data", str(images), "--out", "first"]),
        (0, ["eval", path, "--data", str(images), "--out", "second", "--batch", "3"]),
        (3, ["gate", *saved, "--junit", "gate.xml"]),  # random weights are at chance, so that nothing is decided
        (3, ["gate", *both]),
        (0, ["report", "first.json", "--out", "report.md"]),
        *([] if runtime == "onnx" else [(0, ["profile", path, "--steps", "2"])]),  # it reads the graph, with onnx
    ]
    (tmp_path / "work" / "limits.toml").write_text("max_drop = 50\nmax_size_ratio = 2\n")
    light(runtime, path, json.dumps(commands), script=SCRIPT)


def test_what_is_there_is_told_without_them(light: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    listed = {entry["name"]: entry for entry in json.loads(light("native", "list", "--json").stdout)["formats"]}
    assert listed["native"]["missing"] == []
    assert listed["native"]["missing_to_export"][0] == "torch"
    assert listed["openvino"]["missing"] == ["openvino"]
    lines = light("native", "list").stdout.splitlines()
    assert "native: pip install 'convnext-deploy[export]'" in lines
    assert "openvino: pip install 'convnext-deploy[export,openvino]'" in lines
    states = json.loads(light("native", "doctor", "--json").stdout)["formats"]
    assert states["native"].endswith(", to run; to export: pip install 'convnext-deploy[export]'")
    assert states["onnx"] == "onnxruntime is not installed; run: pip install 'convnext-deploy[onnx]'"
    assert states["eager"] == "torch is not installed; run: pip install 'convnext-deploy[export]'"
    light("native", "roofline", "--variant", "atto", "--threads", 1)
    light("native", "--help")


@pytest.mark.parametrize(
    ("runtime", "arguments"),
    [
        ("native", ("export", "--weights", "random", "--variant", "atto", "--format", "native", "--out", "x")),
        ("native", ("quantize", "--weights", "w.pth", "--calibration", ".", "--target", "native", "--out", "p.json")),
        ("native", ("half", "--weights", "w.pth", "--data", ".", "--out", "h.json")),
        ("openvino", ("export", "--weights", "random", "--variant", "atto", "--format", "openvino", "--out", "x")),
    ],
)
def test_what_makes_artifacts_says_in_one_line_what_to_install(
    runtime: str, arguments: tuple[str, ...], light: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = light(runtime, *arguments, code=2)
    line = done.stderr.replace("\nhint: ", "; ")
    assert line.count("\n") == 1
    lacking = r"(torch|safetensors) is not installed; run: pip install 'convnext-deploy\[export\]'\n$"
    assert re.search(lacking, line), done.stderr


def test_one_command_installs_all_that_an_export_lacks(light: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    arguments = ("export", "--weights", "random", "--variant", "atto", "--format", "openvino", "--out", "x")
    line = "error: format openvino: torch is not installed\nhint: run: pip install 'convnext-deploy[export,openvino]'\n"
    assert light("native", *arguments, code=2).stderr == line


def test_the_base_installation_brings_no_framework_and_no_runtime() -> None:
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"numpy", "pillow", "typer", "rich", "msgspec", "tomli", "typing_extensions"}
