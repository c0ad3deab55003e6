"""Compiling the native CPU engine. `setup.py` does it for a wheel, where this package's dependencies are missing."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from ..errors import BuildError, MissingPackageError
from ..processes import Group

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
# Contracting a product and a sum into one rounding is what the kernels are written for; nothing else of fast-math is.
# g++ 16 does not where one sum waits for the last, and does where there are several: a row would depend on how many are
# computed together. The parameter is g++'s own.
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0", "-Wno-unused-command-line-argument", "-fno-math-errno", "-fno-trapping-math",
    "-Wall", "-Wextra", "-Wno-unknown-warning-option", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip
COMMON = (
    "api", "cpu", "model", "operations", "peak", "pool", "resample", "session", "testing", "kernels_portable",
)  # fmt: skip
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
X86: dict[str, tuple[str, ...]] = {
    "kernels_avx2": ("-mavx2", "-mfma"),
    "kernels_avx_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "kernels_avx512": _AVX512,
    "kernels_avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "kernels_avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "kernels_amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
ARM: dict[str, tuple[str, ...]] = {
    "kernels_neon": (),  # every 64-bit Arm CPU has it
    "kernels_neon_dotprod": ("-march=armv8.2-a+dotprod",),
    "kernels_neon_bf16": ("-march=armv8.2-a+dotprod+i8mm+bf16",),
}
PATHS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}  # by what systems call the machine


def find_compiler() -> str:
    """The C++ compiler to build with: `$CXX`, or the first of `COMPILERS` on PATH.

    Raises:
        MissingPackageError: there is none.
    """
    named = os.environ.get("CXX")
    if named:
        if shutil.which(shlex.split(named)[0]) is None:
            raise MissingPackageError(
                f"$CXX is {named!r}, which is not on PATH; the native engine needs a C++ compiler"
            )
        return named
    for name in COMPILERS:
        path = shutil.which(name)
        if path and not _is_stub(path):
            return name
    if platform.system() == "Darwin":
        raise MissingPackageError(
            "the native engine needs a C++20 compiler and none is on PATH; run: xcode-select --install"
        )
    raise MissingPackageError(
        "the native engine needs a C++20 compiler and none is on PATH; install g++ 11 or clang 14 or newer, "
        "or name one in $CXX"
    )


def _is_stub(path: str) -> bool:
    """Whether this is what macOS has in a compiler's place before one is installed: to run it opens a window."""
    if platform.system() != "Darwin" or Path(path).parent != Path("/usr/bin"):
        return False
    asked = ["/usr/bin/xcode-select", "--print-path"]  # fails where neither Xcode nor its command-line tools are
    return subprocess.run(asked, capture_output=True, check=False).returncode != 0


def units(machine: str = "") -> dict[str, tuple[str, ...]]:
    """Every source file to compile, and its own flags: the instruction set that it is written for.

    Args:
        machine: as `platform.machine()` names them; "": this one.
    """
    return dict.fromkeys(COMMON, ()) | PATHS.get((machine or platform.machine()).lower(), {})


def other_machine(compiler: str) -> str:
    """The machine that a compiler makes programs for, as `units` takes it; "": this kind, or it does not say."""
    said = subprocess.run([*shlex.split(compiler), "-dumpmachine"], capture_output=True, text=True).stdout
    machine = said.strip().partition("-")[0]
    return "" if units(machine).keys() == units().keys() else machine


def compile_library(
    compiler: str, work: Path, extra_flags: tuple[str, ...], link_flags: tuple[str, ...] = (), machine: str = ""
) -> Path:
    """Compile every unit at once, in `work`, and link them.

    Args:
        machine: that the compiler makes programs for, as `units` takes it.

    Raises:
        BuildError: the compiler refuses a file.
    """
    command = [*shlex.split(compiler), *FLAGS, *extra_flags]
    running = {}
    with Group() as group:  # killed with this process
        for name, flags in units(machine).items():
            target = work / f"{name}.o"
            running[target] = group.start(
                [*command, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(target)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        refusals = {target: child.communicate()[1] for target, child in running.items()}
    for target, child in running.items():
        if child.returncode:
            raise BuildError(_refusal(compiler, f"{target.stem}.cpp", refusals[target]))
    library = work / "libconvnext_deploy.so"
    linked = subprocess.run(
        [*command, "-shared", *map(str, running), *link_flags, "-o", str(library)], capture_output=True, text=True
    )
    if linked.returncode:
        raise BuildError(_refusal(compiler, "the library", linked.stderr))
    return library


def _refusal(compiler: str, what: str, output: str) -> str:
    lines = output.strip().splitlines() or ["no message"]
    first = next((line for line in lines if "error" in line), lines[0])
    return f"{compiler} cannot build {what} of the native engine: {first.strip()}"


def source_key(extra_flags: tuple[str, ...], machine: str = "") -> str:
    """What the library is made of: sources, flags, and the instruction sets of a kind of machine, as `units` has it."""
    digest = hashlib.sha256(repr((FLAGS, extra_flags, sorted(units(machine).items()))).encode())
    for source in sorted(SOURCES.glob("*")):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def compiler_key(compiler: str) -> str:
    """Which version of which compiler makes it."""
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256(version.encode()).hexdigest()[:8]
