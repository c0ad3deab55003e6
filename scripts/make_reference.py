"""Write the pages of `docs/reference/` that follow from the code, or check that the written ones are current.

python scripts/make_reference.py [--check]

`commands.md` comes from the command line's own definition, `files.md` from the records and the comments beside their
fields.
"""

import argparse
import ast
import importlib
import inspect
import io
import re
import sys
import tokenize
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import typer

from convnext_deploy.cli import app as cli
from convnext_deploy.cli.help import GENERAL
from convnext_deploy.records import accuracy, manifest, optimize, plan, prediction, timing

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
MADE = "<!-- Made by scripts/make_reference.py from {}; run `make reference`, do not edit. -->"
Record = type[msgspec.Struct]

# Files, in the order in which a user meets them: name, who writes it, the record that it contains.
FILES: list[tuple[str, str, Record]] = [
    ("manifest.json", "`export` and `refit`, in every artifact folder", manifest.Manifest),
    ("OUT.json of eval", "`eval --out OUT`", accuracy.EvalResult),
    ("OUT.json of predict", "`predict --out OUT.json`, or `--json`", prediction.PredictResult),
    ("OUT.json of eval, multi-label and regression", "`eval --problem multi-label --out OUT`", accuracy.ScoreResult),
    ("limits.toml", "you, for `gate --limits`", accuracy.Limits),
    ("verdict", "`gate --json`, on stdout, which adds the commands `next`", accuracy.Verdict),
    ("verdict, multi-label and regression", "likewise", accuracy.ScoreVerdict),
    ("PLAN.json", "`quantize` and `half`", plan.Plan),
    ("PLAN.calibration.json", "`quantize`", plan.CalibrationReport),
    ("OUT.optimize/result.json", "`optimize`", optimize.OptimizeResult),
    ("PLAN.half.json", "`half`", plan.HalfReport),
    ("rows of bench", "`bench --save FILE`, a line each", timing.BenchResult),
    ("row of profile", "`profile --out FILE`", timing.ProfileResult),
    ("row of roofline", "`roofline --out FILE`", timing.RooflineResult),
    ("build.json", "`export` of a TensorRT engine, in its artifact folder", manifest.EngineRecord),
]


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """An argument or an option, as the function that is the command declares it."""

    name: str  # of the function's parameter
    names: str  # as a user types it
    takes: str  # "" for a flag
    help: str
    default: Any  # `inspect.Parameter.empty` where it has to be given
    is_argument: bool
    panel: str  # of --help


def commands() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        MADE.format("the command line"),
        "",
        "`convnext-deploy COMMAND --help` prints the same. These exit codes are common to all commands:",
        "",
        *_table(
            ["exit code", "meaning"],
            [
                ["0", "The command did what it was asked for."],
                ["1", "A check failed: a wrong artifact, a gate's FAIL, a slower run."],
                ["2", "The request was wrong, or something that it needs is missing. One line says what to do."],
                ["3", "`gate` could not decide: INCONCLUSIVE."],
                ["130", "You pressed Ctrl-C."],
                ["141", "The reader of the output ended early, as `head` does. It says nothing of a verdict."],
            ],
        ),
        "",
    ]
    for name, command in cli.COMMANDS.items():
        parameters = _parameters(command)
        usage = " ".join(["[OPTIONS]", *(parameter.names for parameter in parameters if parameter.is_argument)])
        lines += [f"## {name}", "", *_paragraphs(command.__doc__), ""]
        lines += ["```text", f"convnext-deploy {name} {usage}", "```", ""]
        lines += [*_table(["option", "takes", "default", "what it does"], _rows(parameters)), ""]
    return "\n".join(lines)


def _parameters(command: Callable[..., object]) -> list[Parameter]:
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.annotation is typer.Context:  # which typer gives, and nobody types
            continue
        kind, info = typing.get_args(parameter.annotation)  # Python 3.10's get_type_hints would wrap it in Optional
        is_argument = isinstance(info, typer.models.ArgumentInfo)
        required = parameter.default is inspect.Parameter.empty
        word = f"{name.upper()}..." if "list[" in str(kind) else name.upper()
        panel = "Arguments" if is_argument else "Required" if required else info.rich_help_panel or GENERAL
        names = word if required else f"[{word}]"
        if not is_argument:
            declared = [info.default] if isinstance(info.default, str) else []  # the first, by typer's own naming
            names = ", ".join([*declared, *(info.param_decls or ())] or [f"--{name.replace('_', '-')}"])
        found.append(Parameter(name, names, _takes(kind), info.help or "", parameter.default, is_argument, panel))
    return found


def _rows(parameters: list[Parameter]) -> list[list[str]]:
    """In the order of the panels of --help; a panel's name stands in a row of its own."""
    panels: dict[str, list[list[str]]] = {"Arguments": [], "Required": []}
    for parameter in parameters:
        panels.setdefault(parameter.panel, []).append(_row(parameter))
    panels[GENERAL] = panels.pop(GENERAL)
    named = len([rows for rows in panels.values() if rows]) > 2
    return [
        row
        for panel, rows in panels.items()
        if rows
        for row in ([[f"**{panel}**", "", "", ""]] if named else []) + rows
    ]


def _row(parameter: Parameter) -> list[str]:
    required = parameter.default is inspect.Parameter.empty
    shown = "required" if required else "" if parameter.default in (None, False) else f"`{parameter.default}`"
    return [f"`{parameter.names}`", parameter.takes, shown, parameter.help]


def _takes(kind: Any) -> str:
    if kind is bool:
        return ""
    text = str(kind)
    return "path" if "Path" in text else "number" if kind in (int, float) or re.search("int|float", text) else "text"


def _paragraphs(text: str | None) -> list[str]:
    parts = [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]
    return [line for part in parts for line in (part, "")][:-1]


# Files ----------------------------------------------------------------------------------------------------------------


def files() -> str:
    """Every file that the tool writes or reads, with the fields of its record."""
    lines = [
        "# Files",
        "",
        MADE.format("`convnext_deploy/records/`"),
        "",
        "Every file is JSON, or TOML where people write it. A field without a default is always there.",
        "Fields that are not listed are refused. Data contains fractions: 0.931 is 93.1 %.",
        "For `manifest.json` there is a [JSON schema](../manifest.schema.json) too.",
        "",
    ]
    told: set[Record] = set()
    for name, writer, record in FILES:
        lines += [f"## {name}", "", f"Written by {writer}.", ""]
        for number, part in enumerate(_with_parts(record)):
            if part in told:
                continue
            told.add(part)
            if number:
                lines += [f"### {part.__name__}", ""]
            if words := _own_words(part):
                lines += [*_paragraphs(words), ""]
            lines += [*_fields(part), ""]
    return "\n".join(lines)


def _own_words(record: Record) -> str:
    return record.__doc__ if record.__doc__ and not record.__doc__.startswith(f"{record.__name__}(") else ""


def _with_parts(record: Record) -> Iterator[Record]:
    """A record and those that its fields hold, each once, in the order of the fields."""
    seen: list[Record] = []

    def visit(kind: Any) -> None:
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in seen:
            seen.append(kind.cls)
            for field in kind.fields:
                visit(field.type)
        for part in _parts(kind):
            visit(part)

    visit(msgspec.inspect.type_info(record))
    yield from seen


def _parts(kind: Any) -> list[Any]:
    parts = [getattr(kind, name, None) for name in ("item_type", "key_type", "value_type", "type")]
    several = [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
    return [part for part in [*parts, *several] if isinstance(part, msgspec.inspect.Type)]


def _fields(record: Record) -> list[str]:
    notes = _notes(importlib.import_module(record.__module__))[record.__name__]
    rows = []
    for field in msgspec.inspect.type_info(record).fields:  # type: ignore[attr-defined]  # of a struct
        default = "" if field.required else f"`{_json(field.default)}`"
        rows.append([f"`{field.encode_name}`", _type(field.type), default, notes.get(field.name, "")])
    return _table(["field", "type", "default", "meaning"], rows)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value is not msgspec.NODEFAULT else "its own defaults"


def _type(kind: Any) -> str:
    """A field's type in words, as a reader of the JSON meets it."""
    i = msgspec.inspect
    words: dict[type, Callable[[Any], str]] = {
        i.StructType: lambda k: f"[{k.cls.__name__}](#{_anchor(k.cls)})",
        i.UnionType: lambda k: " or ".join(_type(part) for part in k.types),
        i.LiteralType: lambda k: "one of " * (len(k.values) > 1) + ", ".join(f"`{_json(value)}`" for value in k.values),
        i.VarTupleType: lambda k: f"list of {_type(k.item_type)}",
        i.TupleType: lambda k: _tuple([_type(part) for part in k.item_types]),
        i.DictType: lambda k: f"object of {_type(k.value_type)}",
        i.StrType: lambda k: "SHA-256" if k.pattern and "64" in k.pattern else "text",
        i.IntType: lambda k: f"integer{_range(k)}",
        i.FloatType: lambda k: f"number{_range(k)}",
        i.BoolType: lambda _: "true or false",
        i.NoneType: lambda _: "null",
        i.Metadata: lambda k: _type(k.type),
    }
    return words[type(kind)](kind)


def _anchor(record: Record) -> str:
    """Of the heading that the record's fields stand under: a file's, or its own."""
    heading = next((name for name, _, whole in FILES if whole is record), record.__name__)
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _tuple(parts: list[str]) -> str:
    return f"{len(parts)} of {parts[0]}" if len(set(parts)) == 1 else f"list: {', '.join(parts)}"


def _range(kind: Any) -> str:
    bounds = [("from", kind.ge), ("above", kind.gt), ("to", kind.le), ("below", kind.lt)]
    return "".join(f" {word} {bound:g}" for word, bound in bounds if bound is not None)


def _notes(module: ModuleType) -> dict[str, dict[str, str]]:
    """Class, field: the comment on the field's lines, or on the lines before it."""
    source = inspect.getsource(module)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found.setdefault(node.name, {})
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
                own = [comments[line][0] for line in lines if line in comments]
                before: list[str] = []
                line = field.lineno - 1
                while line in comments and comments[line][1]:
                    before.insert(0, comments[line][0])
                    line -= 1
                fields[field.target.id] = re.sub(r"\bNone\b", "null", " ".join([*before, *own]))
    return found


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


PAGES: dict[str, Callable[[], str]] = {"commands.md": commands, "files.md": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    args = parser.parse_args()
    for name, make in PAGES.items():
        page, text = FOLDER / name, make().rstrip("\n") + "\n"
        if not args.check:
            page.write_text(text)
        elif not page.is_file() or page.read_text() != text:
            sys.exit(f"{page} is stale; run: make reference")


if __name__ == "__main__":
    main()
