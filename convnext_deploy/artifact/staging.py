"""Temporary names beside a target, and how what was made there takes the target's place in one step.

A process that works on a temporary name has a lock on it. The system drops the lock when the process dies, however
it dies, so what has such a name without a lock is left over and the next writer of the same target removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FOR = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}\.(?P<kind>part|old)", re.DOTALL)  # as `tempfile` makes names
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_RENAME_SWAP = 2  # of macOS' renamex_np
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}  # the kernel or the file system has none


@contextlib.contextmanager
def folder_for(target: Path) -> Iterator[Path]:
    """A private temporary folder beside the target, locked, and gone at the end unless it was moved away."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        lock = _lock(folder)
        if lock is not None:
            break  # else another process took it for a leftover before it was locked
    try:
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def file_for(target: Path) -> Iterator[tuple[int, Path]]:
    """A temporary file beside the target, open for writing and locked; gone at the end unless it was moved away."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        if _locked(descriptor, Path(name)):
            break
        os.close(descriptor)
    try:
        yield descriptor, Path(name)
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for every other process and thread that is in here for this folder; where nothing can be locked, do not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor with the lock; None where another process has it, or the path is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    if _locked(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _locked(descriptor: int, path: Path) -> bool:
    """Lock what is open, and tell whether the path still names it.

    Where the file system has no locks, every name counts as locked: then nothing is ever taken for a leftover.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def leftovers(target: Path) -> list[Path]:
    """What dead processes have left beside the target: this user's, of a temporary name, and not locked."""
    paths = []
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            match = _FOR.fullmatch(entry.name)
            if match is None or match["target"] != target.name:
                continue
            if entry.stat(follow_symlinks=False).st_uid == os.getuid() and not entry.is_symlink():
                paths.append(Path(entry.path))
    return [path for path in sorted(paths) if _is_left(path)]


def _is_left(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _can_lock(descriptor)
    finally:
        os.close(descriptor)


def clear(target: Path) -> list[Path]:
    """Remove what dead processes have left beside the target.

    Where the system cannot exchange two names, a process that dies between two renames leaves the old target under a
    temporary name and nothing at the target: that is put back first.

    Returns:
        What was removed.
    """
    removed = []
    for path in leftovers(target):
        lock = _lock(path)
        if lock is None:
            continue
        try:
            kept = path / target.name
            if path.suffix == ".old" and kept.exists() and not target.exists():
                kept.rename(target)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(lock)
        removed.append(path)
    return removed


def put(folder: Path, target: Path) -> None:
    """Move a finished folder to its place. What was there ends up where the folder was, for the caller to remove.

    Where the system can exchange two names, a reader finds the old target or the new one at every moment. Where it
    cannot, there are two renames, and the old target survives until the new one is there.
    """
    if not os.path.lexists(target):
        folder.rename(target)
        return
    if exchange(folder, target):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    lock = _lock(aside)
    try:
        target.rename(aside / target.name)
        try:
            folder.rename(target)
        except BaseException:
            (aside / target.name).rename(target)
            raise
    finally:
        if lock is not None:
            os.close(lock)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system cannot.

    Raises:
        OSError: it can, and refused these two.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            code = library.renamex_np(os.fsencode(one), os.fsencode(other), ctypes.c_uint(_RENAME_SWAP))
        else:
            code = library.renameat2(
                _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
            )
    except (OSError, AttributeError):  # a C library without the function
        return False
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
