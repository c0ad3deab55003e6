"""Which modules a program imports, told by a process of its own."""

import subprocess
import sys


def run_and_name(code: str, modules: set[str]) -> "subprocess.CompletedProcess[str]":
    """Run code, which names on standard error those of the modules that it has imported by its end."""
    ending = f"\nimport sys\nprint(sorted({modules!r} & set(sys.modules)), file=sys.stderr)\n"
    return subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
