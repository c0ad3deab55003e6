"""Labelled images to read by index, whatever holds them."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from . import decoding

# Where the numbers of the labels come from: positions of class folders in the order of their names, a column of
# numbers, or a map from class names to the model's outputs.
LabelsFrom = Literal["folders", "column", "map"]

MAX_FILE_BYTES = 2**28  # of one encoded image; a photograph of 100 megapixels takes half of that


@dataclass(frozen=True)
class ImageSource:
    """Images to read by index, in an order that is the same on every machine. Reading is safe from many threads."""

    name: str  # as given to `open_source`, the split behind it
    names: tuple[str, ...]  # unique; relative paths where the source has them
    labels: NDArray[np.int64] | None  # (N,); None: the source has no labels
    class_names: tuple[str, ...] | None  # by label
    read_bytes: Callable[[int], bytes]  # the encoded image of an index
    labels_from: LabelsFrom = "column"
    notes: tuple[str, ...] = ()  # what was left out or assumed when the source was opened, a line each

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read and decode one image; 8 bits a channel.

        Raises:
            OSError: the image is missing, empty, truncated, too large, or nothing that is decoded here. One line, and
                the same line whenever the same image is read.
            DataError: the source itself cannot be read any more.
        """
        try:
            content = self.read_bytes(index)
        except decoding.UnreadableImage:
            raise
        except OSError as error:
            if decoding.is_of_the_file(error):
                raise decoding.UnreadableImage(f"the file cannot be opened: {error.strerror}") from error
            # A disk or network that fails says nothing about the image.
            raise DataError(f"{self.names[index]} of {self.name} cannot be read: {error}; run again to go on") from None
        return decoding.decoded(content)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the names and labels; the pixels are not part of it."""
        digest = hashlib.sha256(msgspec.json.encode(self.names))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def refuse_large(size: int) -> None:
    """Refuse to read an encoded image of so many bytes.

    Raises:
        UnreadableImage: it has more than `MAX_FILE_BYTES`.
    """
    if size > MAX_FILE_BYTES:
        raise decoding.UnreadableImage(f"the file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")


def subset(source: ImageSource, limit: int) -> ImageSource:
    """At most `limit` images, evenly spaced over the source: the first ones of a class folder are all of one class."""
    if limit >= len(source):
        return source
    return _chosen(source, [position * len(source) // limit for position in range(limit)])


def parts(source: ImageSource, sizes: Sequence[int], seed: int = 0) -> list[ImageSource]:
    """Disjoint random parts of a source, each in the source's order; the last size may be -1 for all that is left.

    Raises:
        DataError: there are fewer images than that.
    """
    wanted = sum(size for size in sizes if size > 0)
    if wanted + (sizes[-1] == -1) > len(source):
        raise DataError(f"{source.name} has {len(source)} images; {wanted} and more are needed, give more")
    order = np.random.default_rng(seed).permutation(len(source))
    found, start = [], 0
    for size in sizes:
        stop = len(source) if size == -1 else start + size
        found.append(_chosen(source, sorted(order[start:stop].tolist())))
        start = stop
    return found


def _chosen(source: ImageSource, indices: list[int]) -> ImageSource:
    return replace(
        source,
        names=tuple(source.names[index] for index in indices),
        labels=None if source.labels is None else source.labels[indices],
        read_bytes=lambda position: source.read_bytes(indices[position]),
    )


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names that can be written as UTF-8; the second and later of the same name get #2, #3 ... behind them."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        printable = name.encode("utf-8", "backslashreplace").decode()
        seen[printable] += 1
        result.append(printable if seen[printable] == 1 else f"{printable}#{seen[printable]}")
    return tuple(result)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
