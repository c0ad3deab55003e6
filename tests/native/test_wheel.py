"""The wheel with the CPU engine inside: built, installed where no compiler is, used from Python and from C."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import BuildError
from convnext_deploy.native import compiler, library, shipped

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "convnext_deploy" / "data" / "images" / "coffee.jpg"
SETUP = [sys.executable, "setup.py", "--quiet"]
needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, compiler.COMPILERS)),
    reason="the wheel's engine is built on Linux with a C++ compiler",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as an sdist unpacks it."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    caches = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "convnext_deploy", checkout / "convnext_deploy", ignore=caches)
    subprocess.run([*SETUP, "sdist", "--dist-dir", str(folder)], cwd=checkout, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def built(source: Path, folder: Path, **environment: str) -> Path:
    """The wheel of an sdist."""
    command = [*SETUP, "bdist_wheel", "--dist-dir", str(folder), "--bdist-dir", str(folder / "work")]
    done = subprocess.run(
        command, cwd=source, check=False, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    strict = f"{compiler.find_compiler()} -Werror"
    return built(source, tmp_path_factory.mktemp("wheel"), CONVNEXT_DEPLOY_WHEEL="with-engine", CXX=strict)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and for what it needs with the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text(f"{Path(np.__file__).parent.parent}\n")
    return python


def run(python: Path, home: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command of the installed package, with no program on the path and an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    environment |= {"PATH": str(home), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(
        [python, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "convnext_deploy", *map(str, arguments)],
        env=environment, cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
@needs_compiler
def test_the_wheel_serves_every_python_and_holds_all_that_c_needs(wheel: Path) -> None:
    assert re.fullmatch(r"convnext_deploy-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("convnext_deploy/native/") for name in names}
    assert {"lib/libconvnext_deploy.so", "lib/built.json", "lib/include/convnext_deploy.h"} <= inside
    assert {"lib/convnext_deploy-config.cmake", "example/CMakeLists.txt", "example/classify.c"} <= inside
    assert "csrc/session.cpp" in inside  # what compiles it for a machine of another kind
    assert not [name for name in names if not name.startswith(("convnext_deploy/", "convnext_deploy-"))]


@pytest.mark.slow
@needs_compiler
def test_an_installed_wheel_classifies_without_a_compiler_and_says_where_its_library_is(
    installed: Path, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("native", input="uint8")
    found = json.loads(run(installed, tmp_path, "predict", artifact.path, PHOTO, "--json").stdout)
    expected = api.predict(artifact.path, PHOTO).predictions[0].classes
    assert [one["number"] for one in found["predictions"][0]["classes"]] == [one.number for one in expected]
    assert not list((tmp_path / "cache").rglob("*.so"))
    told = json.loads(run(installed, tmp_path, "doctor", "--json").stdout)
    assert told["formats"]["native"].startswith("ready, path ")
    places = {what: Path(path) for what, path in told["c_interface"].items()}
    assert places.keys() == {"library", "header", "CMake", "example"}
    assert all(path.exists() and installed.parent.parent in path.parents for path in places.values())


@pytest.mark.slow
@needs_compiler
def test_a_damaged_library_is_refused_in_one_line_and_not_opened(
    installed: Path, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    copy = tmp_path / "environment"
    shutil.copytree(installed.parent.parent, copy, symlinks=True)
    (path,) = copy.glob("lib/python*/site-packages/convnext_deploy/native/lib/libconvnext_deploy.so")
    with path.open("r+b") as file:
        file.truncate(100_000)  # opening it would end the process with SIGBUS
    done = run(copy / "bin" / "python", tmp_path, "predict", artifact_of("native").path, PHOTO, code=1)
    assert done.stderr.startswith(f"error: {path} is not what was installed")
    assert done.stderr.replace("\nhint: ", "; ").count("\n") == 1
    told = json.loads(run(copy / "bin" / "python", tmp_path, "doctor", "--json").stdout)
    assert "is not what was installed" in told["formats"]["native"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("with_cmake", [True, False])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_c_example_classifies_as_python_does(
    compiler: str, with_cmake: bool, installed: Path, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    for tool in (compiler, *["cmake"] * with_cmake):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    places = json.loads(run(installed, tmp_path, "doctor", "--json").stdout)["c_interface"]
    program = tmp_path / "build" / "classify"
    if with_cmake:
        folder = ["-S", places["example"], "-B", str(tmp_path / "build"), f"-Dconvnext_deploy_DIR={places['CMake']}"]
        flags = [f"-DCMAKE_C_COMPILER={compiler}", "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"]
        subprocess.run(["cmake", *folder, *flags], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    else:
        program.parent.mkdir()
        code, lib = str(Path(places["example"]) / "classify.c"), Path(places["library"])
        found = ["-I", str(Path(places["header"]).parent), str(lib), f"-Wl,-rpath,{lib.parent}", "-o", str(program)]
        subprocess.run([compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", code, *found], check=True)
    image = Image.open(PHOTO).convert("RGB").resize((64, 64))
    image.save(tmp_path / "photo.ppm")
    artifact = artifact_of("native", input="uint8")
    command = [program, artifact.path / "model.cnxt", tmp_path / "photo.ppm"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (logits,) = api.load(artifact.path).run(np.asarray(image)[None])
    assert answer == f"class {logits[0].argmax()}, logit {logits[0].max():.5f}\n"
    for wrong in ([], ["nowhere.cnxt", tmp_path / "photo.ppm"], [command[1], PHOTO]):
        done = subprocess.run([program, *wrong], check=False, capture_output=True, text=True)
        assert done.returncode > 0
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no g++-aarch64-linux-gnu")
def test_a_compiler_for_another_machine_makes_a_wheel_for_that_machine(source: Path, tmp_path: Path) -> None:
    made = built(source, tmp_path, CONVNEXT_DEPLOY_WHEEL="with-engine", CXX="aarch64-linux-gnu-g++ -Werror")
    assert made.name.endswith("-py3-none-linux_aarch64.whl")
    with zipfile.ZipFile(made) as wheel:
        content = wheel.read("convnext_deploy/native/lib/libconvnext_deploy.so")
        record = json.loads(wheel.read("convnext_deploy/native/lib/built.json"))
    assert int.from_bytes(content[18:20], "little") == 183  # ELF's number of AArch64
    assert b"neon_dotprod" in content
    assert record["sources"] == compiler.source_key((), "aarch64")  # what the package asks for there


def test_without_an_engine_the_wheel_is_pure_and_with_one_it_needs_a_compiler(source: Path, tmp_path: Path) -> None:
    left = source / "build" / "lib" / "convnext_deploy" / "native" / "lib" / "libconvnext_deploy.so"  # by another wheel
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    made = built(source, tmp_path, CONVNEXT_DEPLOY_WHEEL="without-engine")
    assert made.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    command = [*SETUP, "bdist_wheel", "--dist-dir", str(tmp_path / "other"), "--bdist-dir", str(tmp_path / "work")]
    for wish, message in (("with-engine", "needs a C++ compiler"), ("both", "expected with-engine, without-engine")):
        done = subprocess.run(
            command, cwd=source, check=False, capture_output=True, text=True,
            env=os.environ | {"CONVNEXT_DEPLOY_WHEEL": wish, "CXX": "no-such-compiler"},
        )  # fmt: skip
        assert done.returncode
        assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "other").exists()
    silent = built(source, tmp_path / "third", CXX="no-such-compiler", CONVNEXT_DEPLOY_WHEEL="")
    assert silent.name.endswith("-py3-none-any.whl")


def test_what_builds_the_wheel_needs_python_alone() -> None:
    """pip builds it in an environment of its own, which has setuptools and nothing else."""
    code = "import convnext_deploy.native.shipped"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": ""})


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's folder with a counterfeit library."""
    folder = tmp_path / "lib"
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr(compiler, "find_compiler", lambda: "c++")
    monkeypatch.setattr(compiler, "compile_library", lambda *_: PHOTO)
    monkeypatch.setattr(compiler, "other_machine", lambda _: "")
    shipped.ship(folder)
    return folder


def test_the_wheels_library_is_taken_whatever_compiler_is_here(brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compile_library", lambda *_: pytest.fail("compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library.build() == brought / "libconvnext_deploy.so"
    assert library.c_interface()["CMake"] == brought


def test_sources_of_another_version_do_not_take_it(brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "source_key", lambda _: "0" * 16)
    assert shipped.library() is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("libconvnext_deploy.so", b"short", "is not what was installed"),
        ("libconvnext_deploy.so", None, "is missing"),
        ("built.json", None, "is missing"),
        ("built.json", b"{", "cannot be read"),
        ("built.json", b"[]", "cannot be read"),
        ("built.json", b"{}", "cannot be read"),
    ],
)
def test_a_damaged_installation_is_named_with_its_remedy(
    brought: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (brought / name).unlink()
    else:
        (brought / name).write_bytes(content)
    with pytest.raises(BuildError, match=f"{message}.*; run pip install --force-reinstall") as caught:
        shipped.library()
    assert "\n" not in str(caught.value)
