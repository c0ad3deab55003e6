"""Resizing images as Pillow does, to the bit and several times as fast."""

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import library

Filter = Literal["bilinear", "bicubic", "lanczos"]
FILTERS: tuple[Filter, ...] = ("bilinear", "bicubic", "lanczos")  # as the library numbers them
_NO_MEMORY = 3


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a resized image, which is all that is computed of it."""

    height: int  # of the whole resized image, pixels
    width: int
    top: int
    left: int
    rows: int  # of the part
    columns: int


def resized(
    pixels: NDArray[np.uint8], window: Window, filter: Filter, *, grey: bool = False, columns_first: bool = False,
    isa: str | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """A window of a resized image. Other threads go on meanwhile.

    Args:
        pixels: (H, W), or (H, W, 3), or (H, W, 4) of which the last value is not looked at. Rows may be apart.
        filter: with antialiasing, as Pillow has it.
        grey: RGB becomes grey before it is resized, as Pillow's conversion to "L" makes it.
        columns_first: columns are resized before rows; what is between is rounded to bytes.
        isa: one of `library.isas()`; None: the best this CPU has.

    Returns:
        The channels one after another: (1, rows, columns) where it is or becomes grey, else (3, rows, columns).

    Raises:
        MissingPackageError, BuildError: the library is not there and cannot be built.
        MemoryError: there is not enough memory.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    assert pixels.dtype == np.uint8
    assert pixels.strides[1:] == (channels, 1)[-pixels.ndim + 1 :]
    asked = library.Resize(
        *pixels.shape[:2], pixels.strides[0], channels, grey, columns_first, window.height, window.width,
        window.top, window.left, window.rows, window.columns, FILTERS.index(filter),
    )  # fmt: skip
    out = np.empty((1 if grey or channels == 1 else 3, window.rows, window.columns), np.uint8)
    message = ctypes.create_string_buffer(200)
    code = _library().cnxt_image_resize(
        None if isa is None else isa.encode(), asked, pixels.ctypes.data, out.ctypes.data, message, len(message)
    )
    if code == _NO_MEMORY:
        raise MemoryError(message.value.decode())
    assert code == 0, message.value
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    """Looked for once a process."""
    return library.there() or library.load()
