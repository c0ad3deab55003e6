"""The artifact folder: written whole or not at all, verified whenever it is opened."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import msgspec

from ..errors import ArtifactError, UsageError, is_full_disk, plain, printable
from ..records.base import Record, content_of
from ..records.manifest import FileRecord, Manifest
from . import staging

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.json"  # in its place: a rejected folder is no artifact, and nothing loads it by mistake
MAIN_STEM = "model"  # of the file that every format's runtime opens
_NOTHING = 4096  # bytes left: whatever failed, it failed for want of room


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact: its folder and what the folder says about itself."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        facts = self.manifest
        type = facts.export.eight_bits or facts.export.precision
        what = f"{facts.model.architecture} as {facts.export.format} {type}, {self.bytes / 1e6:.1f} MB"
        return f"<artifact {str(self.path)!r}: {what}>"

    @property
    def sha256(self) -> str:
        """The hash of `manifest.json`, which itself contains the hash of every other file."""
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
        ArtifactError: not JSON, of another schema, a field missing or of the wrong type, or a file path that would
            leave the folder.
    """
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{where} is not a manifest of this version: {plain(error)}; export the model again"
        ) from None
    for file in manifest.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or "\\" in file.path or "\0" in file.path or not path.parts:
            raise ArtifactError(f"{where} lists the file {file.path!r}, which is not inside the artifact folder")
    return manifest


def unread(text: bytes, record: Manifest) -> tuple[str, ...]:
    """The fields of `manifest.json`'s bytes that this version does not know, such as `export.speed`."""
    return tuple(_unread(msgspec.json.decode(text), msgspec.to_builtins(record), ""))


def _unread(given: Any, known: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(known, dict):
        for name, value in given.items():
            path = f"{where}.{name}" if where else name
            if name not in known:
                yield path
            else:
                yield from _unread(value, known[name], path)
    elif isinstance(given, list) and isinstance(known, list | tuple):
        for one, other in zip(given, known, strict=True):
            yield from _unread(one, other, where)


def encode(record: Any) -> bytes:
    """A record, or a dictionary of numbers, as JSON that people can read and compare."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def read(path: Path) -> Artifact:
    """Read an artifact's manifest without touching its other files."""
    refuse_name(path)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; expected an artifact made by `convnext-deploy export`")
    file = path / MANIFEST_NAME
    try:
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ArtifactError(f"{file} is a symbolic link; an artifact contains its files themselves")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ArtifactError(f"{file} cannot be read: it is not a file")
        text = content_of(file)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} has no {MANIFEST_NAME}; expected an artifact made by `convnext-deploy export`"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {plain(error)}") from None
    return Artifact(path, decode(text, str(file)))


def verified(path: Path) -> Artifact:
    """Read an artifact and check every file against the manifest.

    Raises:
        ArtifactError: naming the first file that is missing, truncated or changed, that the manifest does not list,
            or that is not a file but a link.
    """
    while True:
        artifact = read(path)
        try:
            _check_files(artifact)
        except (ArtifactError, OSError) as error:
            if read(path).manifest != artifact.manifest:
                continue  # it was replaced meanwhile: the files were those of another
            if isinstance(error, OSError):
                raise ArtifactError(f"{error.filename or path} cannot be read: {plain(error)}") from None
            raise
        return artifact


def _check_files(artifact: Artifact) -> None:
    path, records = artifact.path, artifact.manifest.files
    listed = {PurePosixPath(record.path) for record in records}
    if not any(file.stem == MAIN_STEM and len(file.parts) == 1 for file in listed):
        raise ArtifactError(
            f"{path / MANIFEST_NAME} lists {len(records)} files and no {MAIN_STEM}.*, which every artifact has; "
            "export the model again"
        )
    strange = in_the_way(path, {*map(str, listed), MANIFEST_NAME})
    if strange is not None:
        raise ArtifactError(f"{strange}, so the artifact is not as it was exported; export the model again")
    for record in records:
        file = path / record.path
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; export the model again")
        size = file.stat().st_size
        if size != record.bytes:
            raise ArtifactError(f"{file} has {size} bytes where the manifest says {record.bytes}; export again")
        if sha256_of(file) != record.sha256:
            raise ArtifactError(f"{file} was changed after the export (its SHA-256 differs); export the model again")


def in_the_way(folder: Path, names: set[str]) -> str | None:
    """The first thing below a folder that is none of these files, nor a folder around one; None where all are.

    Args:
        names: relative, with "/" between their parts.
    """
    around = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for at, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = Path(at, name)
            relative, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISLNK(mode):
                return f"{path} is a symbolic link"
            expected = around if stat.S_ISDIR(mode) else names
            if relative not in expected and not (stat.S_ISDIR(mode) and relative in names):
                return f"{path} is not a file of the manifest"
    return None


def _raise(error: OSError) -> None:
    raise error


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Every file below a folder but the manifest, in name order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_NAME)
    return tuple(
        FileRecord(path=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in files
    )


def refuse_name(path: Path) -> None:
    """Refuse a name that is not UTF-8: no record could hold it, and most runtimes cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = printable(str(path))
        if name.encode() == os.fsencode(path):  # it is one, and Python does not know that it may be
            raise UsageError(
                f"Python takes this system for one of {sys.getfilesystemencoding()} and cannot name {name}; set "
                "PYTHONUTF8=1 in the environment"
            ) from None
        raise UsageError(f"{os.fsencode(path)!r} is not a name in UTF-8; rename it, or choose another") from None


def check_target(target: Path, force: bool, marker: str = MANIFEST_NAME) -> None:
    """Refuse, before any work, a target that cannot or must not be written."""
    refuse_name(target)
    if os.path.lexists(target):
        if not force:
            raise UsageError(f"{target} exists; choose another --out or give --force to replace it")
        reason = not_ours(target, marker)
        if reason is not None:
            raise UsageError(f"{reason}; --force replaces artifacts only, with nothing else inside")
    parent = next(folder for folder in [target.parent, *target.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} is not writable; choose another --out")


def not_ours(folder: Path, marker: str = MANIFEST_NAME) -> str | None:
    """Why a folder must not be removed: it is not provably an artifact (or empty) and nothing more.

    Args:
        marker: the manifest's name in it.

    Returns:
        What is in the way, in a few words; None where it is an artifact.
    """
    if folder.is_symlink():
        return f"{folder} is a symbolic link"
    if not folder.is_dir():
        return f"{folder} is a file; --out names a folder"
    try:
        if not any(folder.iterdir()):
            return None
        if not (folder / marker).is_file():
            return f"{folder} contains files that are not an artifact: it has no {marker}"
        manifest = decode(content_of(folder / marker), str(folder / marker))
        return in_the_way(folder, {*(str(PurePosixPath(file.path)) for file in manifest.files), marker})
    except ArtifactError as error:
        return f"{folder} is no artifact of this version ({str(error).removesuffix('; export the model again')})"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {plain(error)}"


@contextlib.contextmanager
def staged(target: Path, say: Callable[[str], None] = lambda _: None, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """A temporary folder beside the target, which becomes the target when the body ends without an error.

    A crash or Ctrl-C leaves the old target, or none; and after a process that was killed, a temporary folder, which
    is removed here.

    Args:
        say: told what was removed.
        marker: the manifest's name, in what may be replaced.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    removed = staging.clear(target)
    if removed:
        say(f"removed what an interrupted export had left: {', '.join(path.name for path in removed)}")
    with staging.folder_for(target) as folder:
        try:
            yield folder
            folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            replace(folder, target, marker)
        except Exception as error:
            if is_full_disk(error) or shutil.disk_usage(target.parent).free < _NOTHING:
                raise UsageError(f"{target.parent} is full; make room, or choose another --out") from error
            raise


def replace(folder: Path, target: Path, marker: str = MANIFEST_NAME) -> None:
    """Move a finished folder to its place; the old artifact there ends up where the folder was.

    Raises:
        UsageError: what is at the target is not an artifact.
    """
    reason = not_ours(target, marker) if os.path.lexists(target) else None
    if reason is not None:
        raise UsageError(f"{reason}, so it was not replaced; choose another --out")
    staging.put(folder, target)


def remove(folder: Path, marker: str = MANIFEST_NAME) -> None:
    """Remove an artifact.

    Raises:
        UsageError: it is none, or contains more.
    """
    reason = not_ours(folder, marker)
    if reason is not None:
        raise UsageError(f"{reason}, so it was not removed")
    shutil.rmtree(folder)


def check_file(path: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        UsageError: it is a folder, or its folder is absent or takes no file.
    """
    _check_folder_of(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected the name of a file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {folder}: {plain(error)}; write elsewhere") from None


def write_file(path: Path, content: bytes) -> None:
    """Write one file atomically.

    Raises:
        UsageError: as `writing`.
    """
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that is open for writing, and has its name once everything was written.

    Raises:
        UsageError: its folder does not exist or cannot be written; the temporary file's name would tell nobody that.
    """
    _check_folder_of(path)
    staging.clear(path)
    try:
        with staging.file_for(path) as (descriptor, name):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                yield file
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
            os.replace(name, path)
    except OSError as error:
        if is_full_disk(error):  # the system names no file, and nobody would know which disk
            number = error.errno or errno.ENOSPC  # NumPy's has none
            raise OSError(number, os.strerror(number), os.fspath(path.absolute().parent)) from error
        raise UsageError(f"{path} cannot be written: {plain(error)}; write elsewhere") from error


def append_line(path: Path, record: Record) -> None:
    """Add one record to a file of JSON Lines, in one write.

    Raises:
        UsageError: its folder does not exist.
    """
    _check_folder_of(path)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def _check_folder_of(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it, or write elsewhere")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
