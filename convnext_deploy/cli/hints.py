"""What to type next, ready to be copied."""

import shlex
from collections.abc import Mapping
from pathlib import Path


def export_command(plan: Path, format: str, options: Mapping[str, object], *flags: str) -> str:
    """The command that builds what a plan says, with every option that has to be repeated, quoted for a shell.

    Args:
        options: `export`'s, by parameter name, as they were given; None: not given.
        flags: words that follow as they are.
    """
    words = ["convnext-deploy", "export", "--plan", str(plan), "--format", format]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *flags])
