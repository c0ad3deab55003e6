"""The artifact folder: written whole or not at all, verified whenever it is opened."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from .errors import ArtifactError, UsageError
from .types import FileRecord, Manifest, Record

MANIFEST_NAME = "manifest.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_WORDS = (os.strerror(errno.ENOSPC), "problem writing element", " requested and ")  # the last two: NumPy's
_NOTHING = 4096  # bytes left: whatever failed, it failed for want of room


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact: its folder and what the folder says about itself."""

    path: Path
    manifest: Manifest

    @property
    def sha256(self) -> str:
        """Of `manifest.json`, which itself holds the hash of every other file."""
        return sha256_of(self.path / MANIFEST_NAME)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def decode(text: bytes, where: str) -> Manifest:
    """Parse `manifest.json`'s bytes.

    Raises:
        ArtifactError: not JSON, of another schema, a field missing, unknown or of the wrong type, or a file path
            that would leave the folder.
    """
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where} is not a manifest of this version: {error}; export the model again") from None
    for file in manifest.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or "\\" in file.path or "\0" in file.path or not path.parts:
            raise ArtifactError(f"{where} lists the file {file.path!r}, which is not inside the artifact folder")
    return manifest


def encode(record: Any) -> bytes:
    """A record, or a dictionary of numbers, as JSON that people can read and compare."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def read(path: Path) -> Artifact:
    """Read an artifact's manifest without touching its other files."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; expected an artifact made by `convnext-deploy export`")
    try:
        text = (path / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} has no {MANIFEST_NAME}; expected an artifact made by `convnext-deploy export`"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path / MANIFEST_NAME} cannot be read: {error.strerror}") from None
    return Artifact(path, decode(text, str(path / MANIFEST_NAME)))


def verified(path: Path) -> Artifact:
    """Read an artifact and check every file against the manifest.

    Raises:
        ArtifactError: naming the first file that is missing, truncated or changed.
    """
    artifact = read(path)
    for record in artifact.manifest.files:
        file = path / record.path
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; export the model again")
        size = file.stat().st_size
        if size != record.bytes:
            raise ArtifactError(f"{file} has {size} bytes where the manifest says {record.bytes}; export again")
        if sha256_of(file) != record.sha256:
            raise ArtifactError(f"{file} was changed after the export (its SHA-256 differs); export the model again")
    return artifact


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Every file below a folder but the manifest, in name order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_NAME)
    return tuple(
        FileRecord(path=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in files
    )


def check_target(target: Path, force: bool) -> None:
    """Refuse, before any work, a target that cannot or must not be written."""
    if target.exists():
        if not force:
            raise UsageError(f"{target} exists; choose another --out or give --force to replace it")
        if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
            raise UsageError(f"{target} holds files that are not an artifact; --force replaces artifacts only")
        if not target.is_dir():
            raise UsageError(f"{target} is a file; --out names a folder")
    parent = next(folder for folder in [target.parent, *target.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} is not writable; choose another --out")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, which becomes the target when the body ends without an error.

    A crash or Ctrl-C leaves the old target, or none.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        replace(folder, target)
    except Exception as error:
        if _says_full(error) or shutil.disk_usage(folder).free < _NOTHING:
            raise UsageError(f"{target.parent} is full; make room, or choose another --out") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, tells of a full disk: libraries have types of their own for it."""
    while error is not None:
        said = str(error)
        if getattr(error, "errno", None) in _FULL or any(words in said for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def replace(folder: Path, target: Path) -> None:
    """Move a finished folder to its place. The old target survives until the new one is there."""
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old / target.name)
        try:
            folder.rename(target)
        except BaseException:
            (old / target.name).rename(target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write one file atomically."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def append_line(path: Path, record: Record) -> None:
    """Add one record to a file of JSON Lines, in one write."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
