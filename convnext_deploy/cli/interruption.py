"""Ctrl-C in the middle of work that a library may go on with."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """`say` for steps that hand the work to converters, of which one may lose a KeyboardInterrupt and go on.

    TorchScript's tracing has done so: the export went on to its end. So Ctrl-C is noted, and no other step begins.
    """
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def begin(step: str) -> None:
        if asked:
            raise KeyboardInterrupt
        say(step)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody ignores it, as `nohup` does
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield begin
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
