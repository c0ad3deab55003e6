"""Which artifacts this user built: their hashes, in a file that only this user can write.

Some formats hold code, which opening them runs. What is recorded here is opened without being asked.
"""

import os
import re
from pathlib import Path

from ..errors import UsageError, plain
from . import private

_RECORD = "built"  # one hex SHA-256 of a manifest a line; a manifest contains the hash of every file of its artifact
_SHA256 = re.compile(rb"[0-9a-f]{64}")


def record_file() -> Path:
    return private.state_root() / _RECORD


def remember(sha256: str) -> str | None:
    """Record that this user built an artifact.

    Returns:
        Why it could not be recorded, in a few words; None where it was.
    """
    path = record_file()
    try:
        private.made(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, f"{sha256}\n".encode())  # one write: several processes may append at once
        finally:
            os.close(descriptor)
    except (OSError, UsageError) as error:
        return f"{path} cannot be written: {plain(error)}"
    return None


def built_here(sha256: str) -> bool:
    """Whether this user built the artifact whose manifest has that hash.

    Raises:
        UsageError: others could have written the record.
    """
    path = record_file()
    try:
        private.checked(path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UsageError(f"{path} can be written by others, so what it says is not believed; remove it")
        return sha256.encode() in _SHA256.findall(file.read())
