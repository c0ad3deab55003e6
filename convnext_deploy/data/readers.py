"""What reads the encoded images of a source by index, as data: it can be sent to a process that sees the same files.

`part_of` returns a reader of some of the images, which contains no more than these need.
"""

import functools
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, plain
from . import remote
from .decoding import UnreadableImage

Reader = Callable[[int], bytes]

MAX_FILE_BYTES = 2**28  # of one encoded image; a photograph of 100 megapixels takes half of that
ROW_GROUPS_KEPT = 2  # of a Parquet file in memory at once; neighbouring images may straddle two

# What Arrow raises for damaged files; its own exceptions are OSError, ValueError, TypeError, KeyError and so on too.
PARQUET_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError, OverflowError,
    MemoryError,
)  # fmt: skip


def refuse_large(size: int) -> None:
    """Refuse to read an encoded image of so many bytes.

    Raises:
        UnreadableImage: it has more than `MAX_FILE_BYTES`.
    """
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f"the file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")


def file_content(path: Path) -> bytes:
    """An encoded image or mask from a path that may stand in anybody's list: a pipe would wait for ever, and a device
    has no end.

    Raises:
        UnreadableImage: it is no file or no name of one, or has more than `MAX_FILE_BYTES`.
        OSError: it cannot be opened or read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("it is a pipe, a device or a folder; expected a file")
            refuse_large(status.st_size)
            return file.read(MAX_FILE_BYTES)
    except ValueError:  # a null byte, or half of a surrogate pair
        raise UnreadableImage("no file can have such a name") from None


@dataclass(frozen=True)
class Files:
    """Each image is a file.

    Args:
        folder: absolute; where the paths begin.
    """

    folder: str
    paths: tuple[str, ...]

    def __call__(self, index: int) -> bytes:
        return file_content(Path(self.folder, self.paths[index]))

    def only(self, indices: Sequence[int]) -> "Files":
        return Files(self.folder, tuple(self.paths[index] for index in indices))


@dataclass(frozen=True)
class Spans:
    """Each image is a piece of a file, as in a tar: (absolute path or address, offset, bytes)."""

    places: tuple[tuple[str, int, int], ...]

    def __call__(self, index: int) -> bytes:
        # Without `tarfile`, whose open files can serve one thread at a time.
        path, offset, size = self.places[index]
        refuse_large(size)
        content = remote.span(path, offset, size)
        if len(content) != size:
            raise DataError(f"{path} was truncated while it was read; run again with the whole file")
        return content

    def only(self, indices: Sequence[int]) -> "Spans":
        return Spans(tuple(self.places[index] for index in indices))


def row_group(file: Any, number: int, columns: Sequence[str]) -> Any:
    """A row group of a `pyarrow.parquet.ParquetFile`, without pyarrow's threads.

    One of them that lets go of a store's file after Python has ended aborts the process.
    """
    return file.read_row_group(number, columns=list(columns), use_threads=False)


class Rows:
    """Each image is a row of a Parquet file, in a column {bytes, path}. A row group is read as a whole.

    Args:
        groups: (absolute path or address, number of the row group in it).
        places: of each image: which of the groups, and which row of it, (N, 2).
        column: its name.
    """

    def __init__(self, groups: Sequence[tuple[str, int]], places: NDArray[np.int64], column: str = "image") -> None:
        self._groups, self._places, self._column = tuple(groups), places, column
        self._lock = threading.Lock()
        self._images = functools.lru_cache(ROW_GROUPS_KEPT)(self._read)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self._groups, self._places, self._column)

    def __call__(self, index: int) -> bytes:
        group, row = self._places[index].tolist()
        try:
            with self._lock:  # threads wait for one another's row group instead of each reading it
                image = self._images(group)[row].as_py() or {}
            content: bytes = image.get("bytes") or b""
        except PARQUET_ERRORS as error:
            raise DataError(f"{self._groups[group][0]} cannot be read: {plain(error)}; run it again") from None
        place = image.get("path")
        if not content and place and not remote.is_address(self._groups[group][0]):
            # `datasets` writes nothing but the path of an image that it had as a file.
            return file_content(Path(self._groups[group][0]).parent / place)
        refuse_large(len(content))
        return content

    def _read(self, group: int) -> Any:
        import pyarrow.parquet as pq

        path, number = self._groups[group]
        fields = [f"{self._column}.{field}" for field in ("bytes", "path")]
        with remote.opened(path) as stream, pq.ParquetFile(stream) as file:
            return row_group(file, number, fields)[self._column]

    def only(self, indices: Sequence[int]) -> "Rows":
        places = self._places[np.asarray(indices, np.int64)]
        needed, first = np.unique(places[:, 0], return_inverse=True)
        selection = np.stack([first.reshape(-1), places[:, 1]], axis=1)
        return Rows([self._groups[group] for group in needed], selection, self._column)


@dataclass(frozen=True)
class Contents:
    """Each image is in memory. None is one that could not be read, whose error is in its place."""

    images: tuple[bytes | None, ...]
    errors: tuple[str, ...]  # of the same length

    def __call__(self, index: int) -> bytes:
        content = self.images[index]
        if content is None:
            raise UnreadableImage(self.errors[index])
        return content

    def only(self, indices: Sequence[int]) -> "Contents":
        return Contents(tuple(self.images[index] for index in indices), tuple(self.errors[index] for index in indices))


@dataclass(frozen=True)
class _Chosen:
    """Some images of a reader that is a function of a program."""

    read: Reader
    indices: tuple[int, ...]

    def __call__(self, index: int) -> bytes:
        return self.read(self.indices[index])


def part_of(read: Reader, indices: Sequence[int]) -> Reader:
    """What reads those images, in that order."""
    if isinstance(read, Files | Spans | Rows | Contents):
        return read.only(indices)
    return _Chosen(read, tuple(indices))


def is_data(read: Reader) -> bool:
    """Whether a reader can be sent to another process, where it reads the files of the same paths."""
    return isinstance(read, Files | Spans | Rows | Contents)


def absolute(path: Path) -> str:
    return os.path.abspath(path)
