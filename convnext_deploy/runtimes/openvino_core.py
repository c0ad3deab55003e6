"""The one OpenVINO `Core` that compiles in this process."""

from functools import cache
from typing import Any

from ..env import needs


@cache
def core() -> Any:
    """A `Core` that lives as long as the process.

    The first model that a core compiles loads its CPU plugin, which gives the thread a stack for signals of its own.
    With the core that stack goes, and the one that was there before comes back. Of two cores that end in the order
    of their making, the second brings back the first one's, whose memory is gone by then: the next signal that Python
    handles, such as Ctrl-C, is a segmentation fault (OpenVINO 2026.4).
    """
    with needs("openvino"):
        import openvino
    return openvino.Core()
