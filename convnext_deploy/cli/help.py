"""How a command's --help is laid out: its options in panels, and an example that can be copied."""

import shlex
from typing import Any

from typer.core import TyperCommand

GENERAL = "Options"  # of every command; its panel is the last one


class Command(TyperCommand):
    """A command whose options stand under the names of their panels, as plain text of any width."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Required": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            panel = getattr(parameter, "rich_help_panel", None) or GENERAL
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            elif parameter.required:
                panel, record = "Required", (record[0], record[1].replace("[required]", "").strip())
            panels.setdefault(panel, []).append(record)
        panels[GENERAL] = panels.pop(GENERAL)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: in the list of commands it is broken over lines, not cut off."""
        return " ".join((self.help or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                for line in broken(shlex.split(self.epilog), formatter.width - 2):
                    formatter.write(f"  {line}\n")


def broken(words: list[str], width: int) -> list[str]:
    """A command in lines of at most `width` columns where that can be, each but the last with a shell's backslash."""
    parts: list[str] = []  # an option and its value are not torn apart
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return lines
