"""The engine's C++ sources: formatted as .clang-format says, and without what clang-tidy finds, on every path.

Both tools come as wheels with the dev extra. Where one is not there it is named, and left out.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convnext_deploy.native import library


def tool(name: str) -> str | None:
    """Beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        print(f"{name} is not installed, so what it checks is left out; pip install '.[dev]'", file=sys.stderr)
    return found


def main() -> int:
    """0, or 1 where something was found."""
    commands = []
    sources = sorted(path for path in library.SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    format = tool("clang-format")
    if format is not None:
        commands.append([format, "--dry-run", "--Werror", *map(str, sources)])
    tidy = tool("clang-tidy")
    if tidy is not None:
        for name, flags in (library.units() | {"selftest": ()}).items():
            source = str(library.SOURCES / f"{name}.cpp")
            commands.append([tidy, "--quiet", source, "--", "-std=c++20", *flags])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands))
    failed = [run for run in done if run.returncode]
    for run in failed:
        print(run.stdout + run.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
