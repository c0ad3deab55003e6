"""What to type next, ready to be copied."""

import shlex
from pathlib import Path


def export_command(plan: Path, format: str, *words: str) -> str:
    """The command that builds what a plan says, quoted for a shell.

    Args:
        words: the options that have to be repeated.
    """
    return shlex.join(["convnext-deploy", "export", "--plan", str(plan), "--format", format, *words])
