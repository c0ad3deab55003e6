"""The command line: parse, call `api`, print, exit code. Nothing heavy is imported before a command runs."""

import sys
from collections.abc import Callable

import typer

from ..errors import ConvNextDeployError
from .bench import bench
from .evaluate import evaluate
from .export import export, refit
from .gate import gate, record_error
from .half import half
from .look import doctor, inspect, list_
from .profile import profile
from .quantize import quantize
from .report import report
from .roofline import roofline

# What the parser raises for wrong arguments: click's ClickException, which newer releases of typer carry a copy of.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="convnext-deploy",
    help="Export any ConvNeXt checkpoint to verified deployment artifacts, and measure what they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: dict[str, Callable[..., object]] = {
    "export": export, "quantize": quantize, "half": half, "eval": evaluate, "gate": gate, "bench": bench,
    "inspect": inspect, "refit": refit, "list": list_, "doctor": doctor, "profile": profile, "roofline": roofline,
    "report": report,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. 2: the request was wrong; 1: a check failed; 3: undecided; 130: interrupted."""
    debug = "--debug" in arguments
    try:
        returned = app(args=arguments or ["--help"], prog_name="convnext-deploy", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except typer.Exit as error:
        code = error.exit_code
    except CommandLineError as error:
        return _failed(error.format_message(), 2, arguments)  # type: ignore[attr-defined]
    except ConvNextDeployError as error:
        if debug:
            raise
        return _failed(str(error), error.exit_code, arguments)
    except ModuleNotFoundError as error:
        from ..env import PACKAGES, missing_line

        package = (error.name or "").partition(".")[0]
        if debug or package not in PACKAGES:
            raise
        return _failed(missing_line(package), 2, arguments)
    except OSError as error:  # the file system's own refusals: a name too long, a folder that cannot be read
        if debug:
            raise
        return _failed(str(error), 2, arguments)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # newer releases of typer turn Ctrl-C into this code and say nothing
        return _failed("interrupted", 130, arguments)
    return code


def _failed(message: str, code: int, arguments: list[str]) -> int:
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()  # a name that is not UTF-8
    print(f"error: {line}", file=sys.stderr)
    if arguments[:1] == ["gate"]:
        record_error(arguments, line)
    if "--json" in arguments:
        import msgspec

        print(msgspec.json.encode({"error": line, "exit_code": code}).decode())
    return code
