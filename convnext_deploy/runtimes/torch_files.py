"""Writing PyTorch's zip files: its writer in C++ ends the whole process where a write fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO


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
