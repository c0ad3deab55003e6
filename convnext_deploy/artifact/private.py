"""Folders that belong to this user alone, for what is run or believed when it is found there again."""

import os
import stat
import tempfile
from pathlib import Path

from ..errors import UsageError

_NAME = "convnext-deploy"


def cache_root() -> Path:
    """Where this user's caches of this package are: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return _below("XDG_CACHE_HOME", ".cache")


def state_root() -> Path:
    """Where this package keeps what it has to remember of this user: `$XDG_STATE_HOME`, or `~/.local/state`."""
    return _below("XDG_STATE_HOME", ".local/state")


def _below(variable: str, usual: str) -> Path:
    named = os.environ.get(variable)
    if named and os.path.isabs(named):
        return Path(named) / _NAME
    try:
        return Path.home() / usual / _NAME
    except RuntimeError:  # no $HOME, and no entry of this user in the password database
        return Path(tempfile.gettempdir()) / f"{_NAME}-{os.getuid()}" / Path(usual).name


def checked(folder: Path) -> Path:
    """A folder that exists, if nobody but this user can have put anything there.

    Raises:
        UsageError: it is a link, belongs to another user, or others may write there.
    """
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{folder} is not a folder; remove it: what is run from there has to be this user's own")
    if status.st_uid != os.getuid():
        raise UsageError(
            f"{folder} belongs to user {status.st_uid}, not to you (user {os.getuid()}); what is there would be run "
            "as you: set XDG_CACHE_HOME and XDG_STATE_HOME to folders of your own"
        )
    if status.st_mode & 0o022:
        raise UsageError(
            f"others may write to {folder} (mode {status.st_mode & 0o777:03o}), and what is there would be run as "
            "you; remove the folder, it is made again"
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)  # made by an earlier version
    return folder


def made(folder: Path) -> Path:
    """The folder, made where it is not there, with `checked`'s guarantees.

    Raises:
        UsageError: as `checked`.
        OSError: it cannot be made.
    """
    if not folder.parent.is_dir():
        missing = [folder.parent]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    temporary = Path(tempfile.gettempdir()) / f"{_NAME}-{os.getuid()}"
    if temporary in folder.parents:
        checked(temporary)  # anybody can make a name there
    return checked(folder)
