"""`doctor` and `list` where packages are missing, which is what they are for; and what else does without them."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import light_tests
import msgspec
import pytest
from imported_modules import run_and_name

from convnext_deploy import cli, env, formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli import terminal
from convnext_deploy.cli.terminal import summary

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
NAMES = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Missing())
"""
COMMAND = "from convnext_deploy import cli; sys.exit(cli.run(sys.argv[1:]))"
ALL = "torch,torchvision,timm,onnx,onnxscript,onnx_ir,onnxruntime,pyarrow,openvino,scipy,transformers,safetensors"


def run_without(packages: str, *arguments: str, code: str = COMMAND) -> subprocess.CompletedProcess[str]:
    """Run in a Python where these packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, packages, *arguments], capture_output=True, text=True, check=False
    )


def states(output: str) -> dict[str, str]:
    lines: dict[str, str] = json.loads(output)["formats"]
    assert lines.keys() == set(formats.names())
    return lines


@pytest.mark.parametrize("packages", ["torch", ALL])
def test_doctor_works_without_what_it_is_to_name(packages: str) -> None:
    done = run_without(packages, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    lines = states(done.stdout).values()
    for package in {*packages.split(",")} & {"torch", "onnxruntime", "openvino"}:  # which a format needs first
        assert any(env.pip_line(package) in line for line in lines), (package, lines)


@pytest.mark.parametrize("package", ["pyarrow", "onnx", "onnxruntime", "timm", "safetensors", "openvino"])
def test_doctor_works_without_any_one_package(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with light_tests.without(package):
        assert cli.run(["doctor", "--json"]) == 0
    lines = states(capsys.readouterr().out).values()
    assert package == "pyarrow" or any(env.pip_line(package) in line for line in lines), lines  # no format needs it


@pytest.mark.parametrize("packages", ["torch", ALL])
def test_list_works_without_them(packages: str) -> None:
    found = run_without(packages, "list")
    assert found.returncode == 0, found.stderr
    assert "eager: pip install 'convnext-deploy[export]'\n" in found.stdout


def test_a_command_without_a_package_that_it_needs_ends_in_one_line(
    artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    found = run_without("torch,pyarrow", "eval", str(artifact_of("eager").path), "--data", str(tmp_path), "--quiet")
    assert (found.returncode, found.stdout) == (2, "")
    line = found.stderr.replace("\nhint: ", "; ")
    assert line.count("\n") == 1
    refused = r"error: .*is not installed; run: pip install 'convnext-deploy\[export\]'\n|error: .* contains no .*\n"
    assert re.fullmatch(refused, line)


@pytest.mark.parametrize("format", ["onnx", "native"])
def test_an_artifact_runs_without_what_only_its_export_needs(format: str, artifact_of: Callable[..., Artifact]) -> None:
    code = (
        "import numpy; from convnext_deploy import api\n"
        "print(api.load(sys.argv[1]).run(numpy.zeros((1, 3, 64, 64), numpy.float32))[0].shape)"
    )
    needless = "torch,torchvision,timm,onnx,onnxscript,onnx_ir,pyarrow,safetensors,openvino"
    found = run_without(needless, str(artifact_of(format).path), code=code)
    assert (found.stdout, found.stderr) == ("(1, 10)\n", "")


def test_the_extra_that_is_named_installs_the_package() -> None:
    """Against pyproject.toml, by the names of the distributions."""
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    distributions = {"tensorrt_rtx": "tensorrt-rtx-cu13", "torch_tensorrt": "torch-tensorrt", "pynvml": "nvidia-ml-py",
                     "PIL": "pillow", "onnx_ir": "onnx-ir", "python_multipart": "python-multipart",
                     "google": "tritonclient", "grpc": "tritonclient"}  # fmt: skip
    installed = {name: " ".join(lines) for name, lines in project["optional-dependencies"].items()}
    for module, extra in env.EXTRAS.items():
        assert re.search(rf"\b{distributions.get(module, module)}\b", installed[extra]), module
    base = " ".join(project["dependencies"])
    for extra in env.BROUGHT_BY_EXPORT:
        assert re.search(rf"convnext-deploy\[[a-z,]*\b{extra}\b", installed["export"])
    for module in env.PACKAGES - env.EXTRAS.keys() - {"triton", "transformers", "scipy"}:
        assert re.search(rf"(^| ){distributions.get(module, module)}\b", base), module
    for name in formats.names():
        for module in formats.get(name).requires + formats.get(name).build_requires:
            assert module in env.PACKAGES, (name, module)


def test_list_fits_80_columns_and_cuts_nothing_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = env.missing
    monkeypatch.setattr(env, "missing", lambda names: ("openvino",) if "openvino" in names else missing(names))
    monkeypatch.setattr(terminal, "WIDE", 80)  # as rich takes a terminal of 80 columns
    assert cli.run(["list"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "openvino: pip install 'convnext-deploy[openvino]'" in out.splitlines()


def test_a_package_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch without its CUDA libraries raises OSError, timm beside another build's torchvision RuntimeError."""

    working = importlib.import_module
    failures = {
        "torch": OSError("libcudart.so.13: cannot open shared object file"),
        "timm": RuntimeError("operator torchvision::nms does not exist"),
    }

    def broken(name: str, package: str | None = None) -> object:
        if name in failures:
            raise failures[name]
        return None if name in env.PACKAGES else working(name, package)  # everybody's function is replaced

    monkeypatch.setattr(formats, "missing", lambda names: ())
    monkeypatch.setattr(env.importlib, "import_module", broken)
    assert cli.run(["doctor", "--json"]) == 0
    found = states(capsys.readouterr().out)
    mend = "install versions that fit each other"
    assert found["eager"] == f"torch is installed and cannot be imported: {failures['torch']}; {mend}"
    del failures["torch"]
    assert cli.run(["doctor", "--json"]) == 0
    found = states(capsys.readouterr().out)
    reason = "to export: timm is installed and cannot be imported: operator torchvision::nms does not exist"
    assert found["eager"] == f"ready, to run; {reason}; {mend}"


def test_list_imports_no_framework() -> None:
    """It took 2.6 s of the 0.5 that it needs: formats that PyTorch runs were written with it."""
    code = (
        "from convnext_deploy import cli, formats\n"
        "assert cli.run(['list']) == 0\n"
        "assert all(formats.get(name).summary for name in formats.names())\n"
    )
    heavy = {"torch", "timm", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "scipy"}
    done = run_and_name(code, heavy)
    assert done.stderr == "[]\n"
    assert "aotinductor" in done.stdout


def test_doctor_lists_the_caches_and_empties_them(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    artifact_of: Callable[..., Artifact],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    kept, other = tmp_path / "build" / "bench" / "kept", tmp_path / "build" / "bench" / "mine"
    with manifest.staged(kept) as folder:
        source = artifact_of("eager").path
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    assert cli.run(["doctor", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["caches"][-1]
    assert (models["entries"], models["path"]) == (1, "build/bench")
    assert models["bytes"] == sum(file.stat().st_size for file in kept.iterdir())
    assert cli.run(["doctor", "--clean", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cache["entries"] for cache in document["removed"]] == [0, 0, 1]
    assert [cache["entries"] for cache in document["caches"]] == [0, 0, 0]
    assert other.is_dir()
    assert not kept.exists()


# Damaged manifests ---------------------------------------------------------------------------------------------------


def test_inspect_prints_what_could_not_be_compared(artifact_of: Callable[..., Artifact]) -> None:
    artifact = artifact_of("eager")
    parity = msgspec.structs.replace(artifact.manifest.parity[0], relative_error=None, cosine=None)
    assumed = msgspec.structs.replace(artifact.manifest.preprocessing, assumed=("mean", "no_such_field"))
    found = msgspec.structs.replace(artifact.manifest, parity=(parity,), preprocessing=assumed)
    text = summary(artifact.path, found, 1)
    assert "relative error unknown, cosine unknown" in text
    assert "no_such_field" in text
