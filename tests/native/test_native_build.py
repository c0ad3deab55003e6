"""Building the native engine: its cache, its refusals, its C example, and the sanitizers over its own driver."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from native_kernels import TYPES, check_product
from native_networks import folded, images_for, network_of, quantize_

from convnext_deploy.errors import BuildError, MissingPackageError, UsageError
from convnext_deploy.native import compiler, library, packed
from convnext_deploy.records.manifest import ModelSpec
from convnext_deploy.workflows import caches

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)
ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "convnext_deploy" / "data" / "images" / "coffee.jpg"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three small ones that use every kind of record between them: int8, bf16 and fp32."""
    folder = tmp_path_factory.mktemp("networks")
    specs: tuple[tuple[packed.ProductType, dict[str, Any]], ...] = (
        ("int8", {}),
        ("bf16", {"grn": True, "layer_scale": False, "stem": "overlap_act"}),
        ("fp32", {"task": "features", "kernel_sizes": (3, 5, 7, 9), "levels": (1, 2, 4), "level_norms": (2, 4)}),
    )
    for precision, options in specs:
        model = folded(
            ModelSpec(
                architecture="custom", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, image_size=(32, 32),
                **options,
            ),
            uint8=precision != "bf16",
        )  # fmt: skip
        if precision == "int8":
            quantize_(model, images_for(model, 2, (32, 32)))
        packed.write(network_of(model, "bf16" if precision == "bf16" else "fp32"), folder / f"{precision}.cnxt")
    return tuple(sorted(folder.glob("*.cnxt")))


def test_without_a_compiler_the_refusal_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingPackageError, match=r"install g\+\+ 11 or clang 14"):
        library.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingPackageError, match="no-such-compiler"):
        library.build(tmp_path)


def test_macos_has_no_compiler_before_its_tools_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in /usr/bin opens a window when it is run, so only xcode-select is. Made up: no Mac was at hand."""
    installed = False

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command == ["/usr/bin/xcode-select", "--print-path"]
        return subprocess.CompletedProcess(command, 0 if installed else 2)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiler.subprocess, "run", run)
    with pytest.raises(MissingPackageError, match=r"run: xcode-select --install$"):
        compiler.find_compiler()
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/opt/homebrew/bin/{name}" if name == "g++" else None)
    assert compiler.find_compiler() == "g++"
    installed = True
    monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiler.find_compiler() == "c++"


def test_a_compiler_that_fails_is_quoted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake++"
    fake.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo fake; else echo 'x.cpp:1: error: no' >&2; exit 1; fi\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildError, match=r"fake\+\+ cannot build \w+\.cpp of the native engine: x\.cpp:1: error: no$"):
        library.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_for_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library could be written, and not opened."""
    fake = tmp_path / "fake++"
    fake.write_text("#!/bin/sh\nif [ $1 = -dumpmachine ]; then echo riscv64-linux-gnu; else echo fake; fi\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildError, match=r"fake\+\+ makes programs for riscv64, and this machine is .*in \$CXX"):
        library.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be built into .*file.*set XDG_CACHE_HOME"):
        library.build()


def test_the_library_is_built_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.build()
    compiled: list[Path] = []

    def compile_library(compiler: str, work: Path, flags: tuple[str, ...]) -> Path:
        compiled.append(work)
        time.sleep(0.05)  # the others come
        return Path(shutil.copy(built, work / "library.so"))

    monkeypatch.setattr(library, "compile_library", compile_library)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: library.build(tmp_path), range(4)))
    assert len(paths) == 1
    assert library.build(tmp_path) in paths
    assert len(compiled) == 1
    assert [path.name for path in tmp_path.iterdir()] == [next(iter(paths)).name]


def test_a_built_library_outlives_its_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compile_library", lambda _, work, __: shutil.copy(PHOTO, work / "library.so"))
    path = library.build(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert library.build(tmp_path) == path
    with pytest.raises(MissingPackageError):
        library.build(tmp_path, ("-g",))


def counterfeit(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A compiler that is quick; the folders that it was called in."""
    called: list[Path] = []

    def compile_library(_: str, work: Path, __: tuple[str, ...]) -> Path:
        called.append(work)
        return Path(shutil.copy(PHOTO, work / "library.so"))

    monkeypatch.setattr(library, "compile_library", compile_library)
    return called


@pytest.mark.parametrize("bytes_left", [0, 1000])
def test_a_damaged_library_is_never_opened_but_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_left: int
) -> None:
    """Opening a truncated one ends the process with SIGBUS."""
    called = counterfeit(monkeypatch)
    path = library.build(tmp_path / "cache")
    with path.open("r+b") as file:
        file.truncate(bytes_left)
    assert library.build(tmp_path / "cache") == path
    assert path.read_bytes() == PHOTO.read_bytes()
    assert len(called) == 2


@pytest.mark.parametrize("suffix", ["", "-" + "0" * 64])
def test_a_library_of_the_predictable_name_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "opened", lambda path: pytest.fail(f"opened {path}"))
    called = counterfeit(monkeypatch)
    good = library.build()
    planted = good.with_name(good.stem.rpartition("-")[0] + suffix + ".so")
    good.unlink()
    planted.write_bytes(b"evil")
    assert "builds it at first use" in library.state()  # and doctor says so
    assert library.build() == good
    assert len(called) == 2


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counterfeit(monkeypatch)
    folder = library.build(tmp_path / "cache").parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UsageError, match=r"others may write to .*cache.*would be run as you; remove the folder"):
        library.build(folder)
    folder.chmod(0o755)  # as earlier versions made it
    library.build(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counterfeit(monkeypatch)
    folder = library.build(tmp_path / "cache").parent
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UsageError, match=r"belongs to user .*would be run as you"):
        library.build(folder)


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counterfeit(monkeypatch)
    path = library.build(tmp_path / "cache")
    path.unlink()
    (path.parent / ".build.abcd1234.part").mkdir()
    library.build(path.parent)
    assert os.listdir(path.parent) == [path.name]


def test_the_cache_is_emptied_of_what_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    counterfeit(monkeypatch)
    path = library.build()
    (path.parent / "notes.txt").write_text("mine")
    (path.parent.parent / "tensorrt-10.9-H100.timing").write_bytes(b"times")
    assert [(c.entries, c.bytes) for c in caches.found()] == [(1, PHOTO.stat().st_size), (1, 5), (0, 0)]
    assert [c.entries for c in caches.clean()] == [1, 1, 0]
    assert os.listdir(path.parent) == ["notes.txt"]
    assert os.listdir(path.parent.parent) == ["native"]


@pytest.mark.slow
def test_clang_builds_it_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As g++ does the wheel, in test_wheel.py."""
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    monkeypatch.setenv("CXX", "clang++")
    built = library.opened(library.build(tmp_path, ("-Werror", "-O1")))
    monkeypatch.setattr(library, "load", lambda isa=None: built)
    for isa in library.isas():
        for type in TYPES:
            check_product(isa, type, rows=15, k=96, n=48)


@pytest.mark.slow
@pytest.mark.skipif("kernels_avx2" not in compiler.units(), reason="not an x86 machine")
def test_products_and_sums_are_contracted_alike_for_every_cpu_that_is_tuned_for(tmp_path: Path) -> None:
    """g++ 16 tunes for any CPU as older ones do for Zen 3: a single chain of sums has its products rounded first."""
    flags = [*library.FLAGS, *compiler.units()["kernels_avx2"], "-S", str(library.SOURCES / "kernels_avx2.cpp")]
    contracted = []
    for cpu in ("haswell", "znver3"):
        output = tmp_path / f"{cpu}.s"
        command = [*shlex.split(library.find_compiler()), *flags, f"-mtune={cpu}", "-o", str(output)]
        subprocess.run(command, check=True)
        contracted.append(output.read_text().count("vfm"))
    assert contracted[0] == contracted[1] > 1000


def test_other_flags_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "compile_library", lambda _, work, __: shutil.copy(PHOTO, work / "library.so"))
    assert library.build(tmp_path) != library.build(tmp_path, ("-g",))


def test_the_header_is_c99(tmp_path: Path) -> None:
    (tmp_path / "use.c").write_text('#include "convnext_deploy.h"\nint main(void) { return CNXT_OK; }\n')
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I", str(library.SOURCES)]
    subprocess.run(["cc", *flags, str(tmp_path / "use.c")], check=True)


def test_the_c_example_classifies_a_jpeg_as_python_does(networks: tuple[Path, ...], tmp_path: Path) -> None:
    if shutil.which("cc") is None or not Path("/usr/include/jpeglib.h").is_file():
        pytest.skip("no C compiler, or no jpeglib.h (Debian: libjpeg-dev)")
    built, program, packed_file = library.build(), tmp_path / "classify", networks[2]
    assert packed_file.stem == "int8"
    subprocess.run(
        ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", str(ROOT / "examples" / "classify.c"), "-I",
         str(library.SOURCES), str(built), "-ljpeg", "-o", str(program)],
        check=True,
    )  # fmt: skip
    found = subprocess.run([program, packed_file, "64", PHOTO], check=True, capture_output=True, text=True).stdout
    match = re.fullmatch(r"class (\d+), logit (\S+)\n", found)
    assert match is not None
    # The same pixels: the mean over each cell of the centred square, rounded.
    photo = np.asarray(PIL.Image.open(PHOTO).convert("RGB")).astype(np.int64)
    side = min(photo.shape[:2])
    top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
    edges = np.arange(65) * side // 64
    cells = np.add.reduceat(np.add.reduceat(photo[top : top + side, left : left + side], edges[:-1], 0), edges[:-1], 1)
    areas = np.multiply.outer(np.diff(edges), np.diff(edges))[..., None]
    pixels = ((cells + areas // 2) // areas).astype(np.uint8)
    from convnext_deploy.native.engine import Engine

    engine = Engine(packed_file, 1, 64, 64, 2)
    engine.bind(pixels[None])
    engine.run()
    logits = engine.outputs[0][0]
    # Two JPEG decoders may differ by one in a few pixels.
    assert abs(logits[int(match[1])] - logits.max()) < 0.05
    assert abs(float(match[2]) - logits.max()) < 0.05
    refused = subprocess.run([program, networks[1], "64", PHOTO], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, "expected a uint8 classifier\n")


# Sanitizers ----------------------------------------------------------------------------------------------------------


def driver(folder: Path, *sanitizers: str) -> Path:
    """`selftest` and the whole library in one program, instrumented."""
    program = folder / "selftest"
    # Without optimization all accesses are checked, and half the time compiles it. Reports tell lines, and no more.
    flags = [*library.FLAGS, "-O0", "-g1", *sanitizers]
    compiler = shlex.split(library.find_compiler())
    jobs = []
    for name, own in (library.units() | {"selftest": ()}).items():
        jobs.append([*compiler, *flags, *own, "-c", str(library.SOURCES / f"{name}.cpp"), "-o", f"{folder / name}.o"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs))
    for job in done:
        assert job.returncode == 0, job.stderr
    linked = [*compiler, *flags, *map(str, folder.glob("*.o")), "-o", str(program)]
    outcome = subprocess.run(linked, capture_output=True, text=True)
    if outcome.returncode:
        pytest.skip(f"this compiler has no such sanitizer: {outcome.stderr.splitlines()[0]}")
    return program


def passes(*command: str | Path) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def plain_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`selftest` beside the library as it is."""
    program = tmp_path_factory.mktemp("driver") / "selftest"
    source = str(library.SOURCES / "selftest.cpp")
    compiler = shlex.split(library.find_compiler())
    subprocess.run([*compiler, *library.FLAGS, source, str(library.build()), "-o", str(program)], check=True)
    return program


def test_a_hundred_thousand_damaged_files_are_opened_or_refused(networks: tuple[Path, ...], plain_driver: Path) -> None:
    for path in networks:
        found = passes(plain_driver, "fuzz", path, "120000", "7")
        counts = [re.search(rf"(\d+) {word}", found) for word in ("inputs", "refused", "opened")]
        inputs, refused, opened = (int(count[1]) for count in counts if count)
        assert inputs == refused + opened >= 100_000
        assert min(refused, opened) > 1000  # both sides of the check are reached


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(
    networks: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = driver(
        tmp_path_factory.mktemp("asan"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )  # fmt: skip
    for path in networks:
        for height, width in (("64", "96"), ("45", "67")):  # strides leave nothing over, and rows and columns
            assert "portable" in passes(program, "run", path, "3", height, width, "3")
        passes(program, "fuzz", path, "20000", "1")


@pytest.mark.slow
def test_the_thread_sanitizer_finds_nothing(
    networks: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = driver(tmp_path_factory.mktemp("tsan"), "-fsanitize=thread")
    for path in networks:
        for height, width in (("64", "96"), ("45", "67")):  # strides leave nothing over, and rows and columns
            assert "portable" in passes(program, "run", path, "3", height, width, "3")
        assert "0 wrong" in passes(program, "threads", path, "32", "64", "8", "6")


def test_importing_the_engine_takes_no_framework() -> None:
    code = "import sys, convnext_deploy.native.engine; print(*{'torch', 'timm', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_check_arm_ends_where_an_emulated_cpu_cannot_say_its_paths(tmp_path: Path) -> None:
    """Else every other command could succeed, and a CPU on which the engine does not even load would pass."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "check_arm", tmp_path / "scripts")
    for there in ("root/usr/bin/python3", "site/complete"):  # nothing is fetched
        file = tmp_path / "build" / "arm" / there
        file.parent.mkdir(parents=True)
        file.touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("qemu-aarch64", "aarch64-linux-gnu-g++"):
        (tools / name).write_text('#!/bin/sh\ncase "$*" in *isas*) exit 3;; esac\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(["bash", script, "max"], env=environment, capture_output=True).returncode == 3
