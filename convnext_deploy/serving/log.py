"""Where the server's lines go: a terminal that may be closed, a log whose disk may be full."""

import contextlib
import os
import sys
from collections.abc import Callable

Say = Callable[[str], None]


def unhindered(say: Say) -> Say:
    """Tell what happened; a log that cannot be written, as on a full disk, ends no request and no server."""

    def told(line: str) -> None:
        with contextlib.suppress(OSError):
            say(line)

    return told


class Terminal:
    """The one that stderr is of when the server begins, if it is of one.

    The shell sends SIGHUP when its window is closed. That is no wish for a reload, and nobody could end the server
    with Ctrl-C any more. With `nohup`, or stderr in a file, there is no terminal to lose.
    """

    def __init__(self) -> None:
        # None where stderr is closed or somebody's own object.
        self._file = sys.__stderr__.fileno() if sys.__stderr__ is not None and sys.stderr is sys.__stderr__ else None
        if self._file is not None and not os.isatty(self._file):
            self._file = None

    def is_gone(self) -> bool:
        """Whether there was one, and it has been closed."""
        return self._file is not None and not os.isatty(self._file)
