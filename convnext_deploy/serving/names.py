"""The names under which artifacts are served."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked(name: str) -> str:
    """A name, if it can stand in an address.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot stand in an address; expected letters, digits and . _ -, at most 100")
    return name


def named(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Artifact folders by the names they are served under: NAME=FOLDER, or the folder's own name.

    Raises:
        UsageError: none, a name that cannot stand in an address, or the same name twice.
    """
    folders: dict[str, Path] = {}
    for given in map(str, paths):
        name, equals, folder = given.partition("=")
        if not (equals and _NAME.fullmatch(name)):
            name, folder = Path(given).resolve().name, given
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot stand in an address; serve it as NAME={given}")
        if name in folders:
            raise UsageError(f"two artifacts are called {name}; serve one of them as NAME={given}")
        folders[name] = Path(folder)
    if not folders:
        raise UsageError("no artifact; expected at least one folder made by `convnext-deploy export`")
    return folders
