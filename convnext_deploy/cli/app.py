"""One command from its arguments to its exit code. Nothing heavy is imported before it runs."""

import difflib
import itertools
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..errors import ConvNextDeployError, full_disk, plain, printable, was_interrupted
from . import INTERRUPTED
from .bench import bench
from .evaluate import evaluate
from .export import export, refit
from .gate import gate, record_error
from .half import half
from .help import Command
from .look import doctor, inspect, list_
from .names import OPTION_SYNONYMS, RENAMED, SYNONYMS
from .optimize import optimize
from .package import package
from .predict import predict
from .profile import profile
from .quantize import quantize
from .report import report
from .roofline import roofline
from .serve import serve
from .terminal import print_json

# What the parser raises for wrong arguments: click's ClickException, which newer releases of typer carry a copy of.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="convnext-deploy",
    help="Export any ConvNeXt checkpoint to verified deployment artifacts, and measure what they do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., object]] = {
    "optimize": optimize, "export": export, "quantize": quantize, "half": half, "predict": predict, "eval": evaluate,
    "gate": gate, "bench": bench, "inspect": inspect, "refit": refit, "list": list_, "doctor": doctor,
    "profile": profile, "roofline": roofline, "report": report, "serve": serve, "package": package,
}  # fmt: skip
# One a command, at the end of its --help.
EXAMPLES = {
    "optimize": "optimize --weights my.pth --data val/ --max-drop 0.5 --out build/best",
    "export": "export --weights my.pth --format openvino --out build/fp32",
    "quantize": "quantize --weights my.pth --calibration train/ --target native --out build/plan.json",
    "half": "half --weights my.pth --data train/ --out build/half.json",
    "predict": "predict build/best cat.jpg",
    "eval": "eval build/best --data val/ --out build/best-val",
    "gate": "gate --baseline build/fp32 --candidate build/best --data val/ --max-drop 0.5",
    "bench": "bench build/fp32 build/best --batch 1,8",
    "inspect": "inspect build/best",
    "refit": "refit build/engine --weights newer.pth --out build/engine-2",
    "list": "list",
    "doctor": "doctor",
    "profile": "profile build/best --batch 1",
    "roofline": "roofline --variant tiny --precision bf16",
    "report": "report results.jsonl --out report.html",
    "serve": "serve build/best --port 8000",
    "package": "package build/best --for docker --out build/docker",
}
for name, command in COMMANDS.items():
    app.command(name, cls=Command, epilog=f"convnext-deploy {EXAMPLES[name]}")(command)

# The words that what to do begins with, behind the last "; " of an error's line.
CURES = {
    "add", "call", "choose", "compare", "convert", "copy", "did", "evaluate", "export", "fine-tune", "for", "give",
    "if", "install", "judge", "keep", "leave", "load", "make", "mend", "move", "name", "open", "profile", "quote",
    "read", "remove", "rename", "replace", "reverse", "run", "save", "say", "send", "serve", "set", "take", "try",
    "use", "wait", "where", "widen", "write",
}  # fmt: skip


@app.callback()
def program(
    version: Annotated[bool, typer.Option("--version", "-V", is_eager=True, help="Print the version.")] = False,
) -> None:
    """Export any ConvNeXt checkpoint to verified deployment artifacts, and measure what they do."""


def _no_command(word: str) -> str:
    """The refusal of a word that is no command, with the one that does the job."""
    near = [SYNONYMS[word.lower()]] if word.lower() in SYNONYMS else difflib.get_close_matches(word, COMMANDS, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no command {word!r}{hint} (commands: {', '.join(COMMANDS)})"


def _no_option(option: str, arguments: list[str]) -> str:
    """The refusal of an option that a command does not have, with the one that does the job."""
    known = [name for parameter in _parameters(arguments[0]) for name in parameter.opts if name.startswith("--")]
    word = option.lower().lstrip("-").replace("_", "-")
    near = [f"--{word}"] if f"--{word}" in known else []
    near = near or [name for name in OPTION_SYNONYMS.get(word, ()) if name.split()[0] in known]
    others = [name for name in COMMANDS if any(f"--{word}" in parameter.opts for parameter in _parameters(name))]
    if others and not near:
        return f"{arguments[0]} has no option {option}; give it to {', '.join(others)}"
    near = near or difflib.get_close_matches(f"--{word}", known, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else f"; run convnext-deploy {arguments[0]} --help for its options"
    return f"{arguments[0]} has no option {option}{hint}"


def _parameters(name: str) -> list[Any]:
    return typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]


# What parsers say of a value, of several releases, as what is expected.
_EXPECTED = (
    (r"greater than or equal to (\S+)|x>=(\S+?)\.?$", "at least {}"),
    (r"less than or equal to (\S+)|x<=(\S+?)\.?$", "at most {}"),
    (r"valid integer", "a whole number"),
    (r"valid (?:number|float)", "a number"),
)


def _refused_value(error: Exception, arguments: list[str]) -> str | None:
    """The refusal of an option's value, or of what is missing, in the words of the other refusals."""
    parameter = getattr(error, "param", None)
    if parameter is None or arguments[0] not in COMMANDS:
        return None
    option = next((name for name in parameter.opts if name.startswith("--")), parameter.name.upper())
    if hasattr(error, "param_type"):  # of a MissingParameter alone
        said = " ".join((getattr(parameter, "help", None) or "").split()).rstrip(".")
        return f"{arguments[0]} needs {option}: {said[:1].lower()}{said[1:]}"
    value = next((v for name, v in itertools.pairwise(arguments) if name in parameter.opts), None)
    value = value or next((word.partition("=")[2] for word in arguments if word.startswith(f"{option}=")), None)
    message: str = error.message  # type: ignore[attr-defined]
    for pattern, words in _EXPECTED:
        match = re.search(pattern, message)
        if match is not None and value is not None:
            return f"{option} {value}; expected {words.format(next(filter(None, match.groups()), ''))}"
    return f"{option}: {message}"


def _hinted(error: Exception, arguments: list[str]) -> str:
    """A parser's message, with the option that a word without one was meant for."""
    message: str = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    refused = _refused_value(error, arguments)
    if refused is not None:
        message = refused
    unknown = getattr(error, "option_name", None)
    if unknown is not None and message.startswith("No such option") and arguments[0] in COMMANDS:
        return _no_option(unknown, arguments)
    given = [word for word in arguments[1:] if not word.startswith("-")]
    if arguments[0] == "eval" and "needs --data" in message and len(given) == 2:
        return f"{message.rstrip('.')}; did you mean --data {given[1]}?"
    if "unexpected extra argument" not in message:
        return message
    words = [word for word in arguments[1:] if word in re.split(r"[ ()]+", message)]
    option = {
        "export": "--weights",
        "optimize": "--weights",
        "quantize": "--weights",
        "half": "--weights",
        "eval": "--data",
    }.get(arguments[0])
    return f"{message}; did you mean {option} {words[0]}?" if option and words else message


def _renamed(arguments: list[str]) -> list[str]:
    """The arguments with the names that options have now; a line on stderr says each that was another in 0.1."""
    names = RENAMED.get(arguments[0], {}) if arguments else {}
    renamed = []
    for word in arguments:
        option, equals, value = word.partition("=")
        if option in names:
            if "--quiet" not in arguments and "-q" not in arguments and "--json" not in arguments:
                print(f"{option} is called {names[option]} now; the old name goes with 0.3", file=sys.stderr)
            word = f"{names[option]}{equals}{value}"
        renamed.append(word)
    return renamed


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. 2: the request was wrong; 1: a check failed; 3: undecided; 130: interrupted."""
    debug = "--debug" in arguments
    arguments = _renamed(arguments)
    if arguments and arguments[0] in ("--version", "-V"):
        from ..env import version

        print(f"convnext-deploy {version()}")
        return 0
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        return _failed(_no_command(arguments[0]), 2, arguments)
    try:
        code = _called(arguments)
    except typer.Exit as error:
        code = error.exit_code
    except CommandLineError as error:
        return _failed(_hinted(error, arguments), 2, arguments)
    except ConvNextDeployError as error:
        if debug:
            raise
        return _failed(str(error), error.exit_code, arguments)
    except ModuleNotFoundError as error:  # of what every installation has; formats say themselves what they lack
        package = (error.name or "").partition(".")[0]
        if debug or package in ("", "convnext_deploy"):
            raise
        from ..env import import_line

        return _failed(import_line(error), 2, arguments)
    except OSError as error:  # the file system's own refusals: a name too long, a folder that cannot be read
        if debug or isinstance(error, BrokenPipeError):
            raise
        named = f"{error.filename}: " if error.filename is not None else ""
        return _failed(full_disk(error) or f"{named}{plain(error)}", 2, arguments)
    except (ImportError, MemoryError, RuntimeError) as error:
        from ..env import broken_line, broken_package

        broken = broken_package(error)
        if broken is not None and not debug:
            return _failed(broken_line(broken, plain(error)), 2, arguments)
        if debug or not _lacks_memory(error):
            raise
        reason = plain(RuntimeError(str(error)))  # NumPy and PyTorch say how much
        return _failed(f"there is not enough memory: {reason}; give a smaller batch or image size", 2, arguments)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # newer releases of typer turn Ctrl-C into this code and say nothing
        return _failed("interrupted", INTERRUPTED, arguments)
    return code


def _lacks_memory(error: Exception) -> bool:
    """Whether memory ran out: NumPy raises MemoryError, PyTorch a RuntimeError that says so."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _called(arguments: list[str]) -> int:
    try:
        returned = app(
            args=arguments or ["--help"],
            prog_name="convnext-deploy",
            standalone_mode=False,
            obj=tuple(arguments),  # for commands that show how they are typed again
        )
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        raise
    return returned if isinstance(returned, int) else 0


def split_hint(line: str) -> tuple[str, str | None]:
    """An error's line as what was wrong, and what to do, where its end says that."""
    wrong, marker, hint = line.rpartition("; ")
    return (wrong, hint) if marker and re.split(r"[ ,:]", hint)[0].lower() in CURES else (line, None)


def _failed(message: str, code: int, arguments: list[str]) -> int:
    """One line on stderr, a second one with what to do, and with --json a document that has both."""
    line = printable(" ".join(message.split()))
    wrong, hint = split_hint(line)
    print(f"error: {wrong}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
    if arguments[:1] == ["gate"]:
        record_error(arguments, line)
    if "--json" in arguments:
        print_json({"error": line, "exit_code": code} | ({"hint": hint} if hint else {}))
    return code
