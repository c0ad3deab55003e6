"""Processes that end with the one that started them, however that ends: a pipe's other end closes with it."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

# The command in a process group of its own, beside a shell that waits for the end of the pipe on its standard input and
# then kills the group: a compiler's driver starts programs of its own, which would outlive the driver.
GUARD = """
exec 3<&0
{ read _ <&3; kill -KILL 0; } &
"$@" </dev/null 3<&-
code=$?
kill -KILL $!
exit $code
"""


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs `code` with this interpreter, and imports nothing from the working folder by itself.

    Python puts that folder first for `-c` and `-m`, and it may be somebody else's: a checkout, an unpacked artifact.
    `import_path` says where a child finds what this process has.
    """
    return [sys.executable, "-c", f"import sys; sys.path = [path for path in sys.path if path]\n{code}", *arguments]


def import_path() -> dict[str, str]:
    """The environment of a child that imports from where this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


class Group:
    """Commands that are killed, with all they have started, when this process ends or leaves the `with` block."""

    def __init__(self) -> None:
        self._theirs, self._ours = os.pipe()  # not inherited: no other process keeps our end open

    def start(self, command: Sequence[str], **pipes: Any) -> "subprocess.Popen[str]":
        """`subprocess.Popen` of text; its standard input is empty."""
        return subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "sh", *command], stdin=self._theirs, text=True, start_new_session=True, **pipes
        )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._theirs)
        os.close(self._ours)


def end_with(pipe: int) -> None:
    """In a child that leads its session: kill it and all it has started when the parent's end of `pipe` closes."""

    def watch() -> None:
        _wait_for_the_end(pipe)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _wait_for_the_end(pipe: int) -> None:
    """Return when the other end of `pipe` is closed; what comes through it is left to its reader."""
    if sys.platform == "darwin":
        # poll on macOS never reports the end to one who asks for nothing, and returns early to one who asks for the
        # end: https://github.com/lionheart/openradar-mirror/issues/19355 and 19356.
        queue = select.kqueue()
        # Told of each change once: data that nobody has read yet do not wake it again.
        end = select.kevent(pipe, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_CLEAR)
        events = queue.control([end], 1)
        while not any(event.flags & (select.KQ_EV_EOF | select.KQ_EV_ERROR) for event in events):
            events = queue.control(None, 1)
        queue.close()
        return
    poll = select.poll()
    poll.register(pipe, 0)  # reports the end only, and takes no request from the reader
    poll.poll()
