"""The engine's C++ sources: formatted as .clang-format says, and without what clang-tidy finds, on every path.

Both tools come as wheels with the dev extra. Where one is not there it is named, and left out.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convnext_deploy.native import compiler, library

# What clang is told to check the other machine's paths with, and the headers that it needs for that (Debian:
# g++-aarch64-linux-gnu, g++-x86-64-linux-gnu).
TARGETS = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def tool(name: str) -> str | None:
    """Beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        print(f"{name} is not installed, so what it checks is left out; pip install '.[dev]'", file=sys.stderr)
    return found


def source_of(unit: str) -> str:
    return str(library.SOURCES / f"{unit}.cpp")


def main() -> int:
    """0, or 1 where something was found."""
    commands = []
    sources = sorted(path for path in library.SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    format = tool("clang-format")
    if format is not None:
        commands.append([format, "--dry-run", "--Werror", *map(str, sources)])
    tidy = tool("clang-tidy")
    if tidy is not None:
        here = library.units() | {"selftest": ()}
        commands += [[tidy, "--quiet", source_of(name), "--", "-std=c++20", *own] for name, own in here.items()]
        for machine, target in TARGETS.items():
            others = {name: own for name, own in compiler.units(machine).items() if name not in here}
            if others and not Path(f"/usr/{target}/include").is_dir():
                print(f"no /usr/{target}/include, so the paths of {machine} are not checked here", file=sys.stderr)
                continue
            flags = ["-std=c++20", f"--target={target}"]
            commands += [[tidy, "--quiet", source_of(name), "--", *flags, *own] for name, own in others.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands))
    failed = [run for run in done if run.returncode]
    for run in failed:
        print(run.stdout + run.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
