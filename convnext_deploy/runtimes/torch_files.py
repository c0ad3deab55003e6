"""Writing PyTorch's zip files: its writer in C++ ends the whole process where a write fails."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import torch


class _Patient(RawIOBase):
    """Lets no error of the file reach the writer, whose destructor would throw; keeps the first one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: "bytes | memoryview") -> int:  # type: ignore[override]  # whatever has a buffer
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0 if self.error else self.file.seek(offset, whence)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file for PyTorch to write to.

    Raises:
        OSError: when the writer is done, what went wrong first: a full disk, a limit on the size of files.
    """
    with path.open("wb") as file:
        patient = _Patient(file)
        yield patient  # type: ignore[misc]  # PyTorch calls its `write` alone
        if patient.error is not None:
            raise patient.error


def reserve(path: Path, size: int) -> None:
    """Make sure that a file of so many bytes can be written there, before a writer that would abort for want of room.

    For `torch.jit.save` to a name: given a file object, it has the file twice in memory (PyTorch 2.15), and a pipe it
    cannot write. What another process writes in the meantime is not seen.

    Raises:
        OSError: the disk has no such room, or a quota or a limit on the size of files forbids it.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(path.parent).free < size:  # macOS
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def copy_changed(source: Path, path: Path, changed: Callable[[str, bytes], bytes | None]) -> None:
    """Copy one of PyTorch's zip files, record by record: each as `changed` returns it, without those where it is None.

    Raises:
        OSError: the copy cannot be written.
    """
    reader = torch._C.PyTorchFileReader(str(source))
    names = reader.get_all_records()
    version = ".data/version" if ".data/version" in names else "version"  # before version 6
    with written(path) as file:
        writer = torch._C.PyTorchFileWriter(file)
        writer.set_min_version(int(reader.get_record(version)))
        for name in names:
            record = None if name in OWN_RECORDS else changed(name, reader.get_record(name))
            if record is not None:
                writer.write_record(name, record, len(record))
        writer.write_end_of_file()


def without_folders(content: bytes, folders: Collection[Path]) -> bytes:
    """With every name of these folders, and of files in them, made of slashes up to the folder's end.

    A name keeps its length, so what is compiled may be changed: `__FILE__` in an assertion, debugging information, the
    commands in a source's comments.
    """
    # The longest first: a folder may be in another one. One of less than five letters might be there by chance.
    names = sorted({str(folder).encode() for folder in folders}, key=len, reverse=True)
    for name in names:
        if len(name) >= 5 and name in content:
            content = re.sub(re.escape(name) + rb"(?=[/\s\0\"':])", b"/" * len(name), content)
    return content


OWN_RECORDS = {"version", "byteorder", ".data/version", ".data/serialization_id"}  # which the writer adds itself
