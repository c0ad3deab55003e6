"""The command line: `main` for the program, `run` for one command. Nothing else is imported before they are called."""

import gc
import io
import os
import signal
import sys

INTERRUPTED = 130  # a shell's exit code for a program which Ctrl-C ended

CLOSED = 141  # likewise, which wrote to a pipe that nobody read any more


def main() -> None:
    """Entry point: every expected error, and Ctrl-C from here on, is one line on stderr and an exit code."""
    _open_what_is_closed()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else somebody ignores it, as `nohup` and a shell's `&` do
        signal.signal(signal.SIGINT, _ended)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding does not have
    from .app import run

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)  # a command has things to put away
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = CLOSED
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = CLOSED  # typer's own answer to it is 1, which says that a check failed
    except KeyboardInterrupt:  # a second one, while the first was being reported
        code = INTERRUPTED
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to say, and Python's own end has tracebacks
    if "triton" not in sys.modules:  # which is built with nanobind, and that reports whatever is not freed
        gc.freeze()  # Python's end looks through all objects several times, with PyTorch a second of a core
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; its exit code, as `app.run` says."""
    from . import app

    return app.run(arguments)


def _open_what_is_closed() -> None:
    """Streams that the caller closed, as `>&-` does, and that Python has as None: nothing is in them.

    Each takes the lowest free number, its own, which the next file would otherwise get, and with it what libraries
    print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - for as long as the program runs
            os.set_inheritable(stream.fileno(), True)  # children would have none again, and so the same fault
            setattr(sys, name, stream)


def _ended(*_: object) -> None:
    """Ctrl-C while the commands are being imported: there is nothing to put away yet."""
    print("error: interrupted", file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        print('{"error":"interrupted","exit_code":130}', flush=True)
    os._exit(INTERRUPTED)
