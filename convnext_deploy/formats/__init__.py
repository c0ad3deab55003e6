"""One file a deployable format; the file's name is the format's name, and nothing here changes when one is added."""

import difflib
import importlib
from functools import cache
from pathlib import Path

from ..arguments import shown
from ..env import missing, missing_line
from ..errors import MissingPackageError, UsageError
from ..types import Device
from .base import Format

_NOT_FORMATS = {"__init__", "base"}


@cache
def names() -> tuple[str, ...]:
    """All format names, found by looking into this folder; nothing is imported."""
    return tuple(sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in _NOT_FORMATS))


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: unknown, with the list and the nearest match.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown format {shown(name)}{hint} (formats: {', '.join(names())})")
    found = importlib.import_module(f"{__name__}.{name}").FORMAT
    assert isinstance(found, Format)
    assert found.name == name
    return found


def require(fmt: Format) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        MissingPackageError: the `pip install` to run.
    """
    line = _missing(fmt)
    if line is not None:
        raise MissingPackageError(f"format {fmt.name}: {line}")


def state(fmt: Format) -> str:
    """Whether it can be built here, in a few words.

    Raises:
        MissingPackageError: what to install.
    """
    line = _missing(fmt)
    if line is not None:
        raise MissingPackageError(line)
    return fmt.ready()


def _missing(fmt: Format) -> str | None:
    """The first of its packages that is not installed, and the `pip install` to run."""
    absent = missing(fmt.requires)
    return missing_line(absent[0], fmt.extra or "dev") if absent else None


def refuse_device(fmt: Format, device: Device) -> None:
    """Refuse a device that the format does not run on."""
    if device not in fmt.devices:
        raise UsageError(f"format {fmt.name} runs on {', '.join(sorted(fmt.devices))}, not on {device}")
