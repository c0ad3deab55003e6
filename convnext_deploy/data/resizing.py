"""Resizing as the installed Pillow does it: by the native engine's library where it is there, else by Pillow itself.

The library computes the same bits several times as fast. Which direction Pillow resizes first has changed with its
version 13 and may change again. So the two are compared once a process, and where they differ Pillow is used.
"""

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import BuildError, UsageError
from ..native import library, resize

FILTERS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip

# Whether an image of (height, width) pixels is resized to another such size along its columns first.
Rule = Callable[[tuple[int, int], tuple[int, int]], bool]
Sides = tuple[int, int]


def cropped(
    pixels: NDArray[np.uint8], sides: Sides, crop: Sides, filter: resize.Filter, fill: tuple[int, ...],
    columns_first: Rule,
) -> NDArray[np.uint8]:  # fmt: skip
    """The centre of an image that is resized, of which nothing else is computed.

    Args:
        pixels: (H, W) or (H, W, 3).
        sides: (height, width) of the whole resized image, pixels.
        crop: likewise of the centre; what the image lacks is filled on both sides, the odd pixel at the end.
        fill: a value for grey, three for RGB, which the image is converted to.
        columns_first: of `rule`.

    Returns:
        (1 or 3, *crop).
    """
    channels = len(fill)
    (top, rows), (left, columns) = (
        (round(max(side - size, 0) / 2), min(side, size)) for side, size in zip(sides, crop, strict=True)
    )
    made = resize.resized(
        pixels,
        resize.Window(*sides, top, left, rows, columns),
        filter,
        grey=channels == 1 and pixels.ndim == 3,
        columns_first=columns_first(pixels.shape[:2], sides),
    )
    if (rows, columns) == crop:
        return made if len(made) == channels else np.repeat(made, channels, axis=0)
    whole = np.empty((channels, *crop), np.uint8)
    whole[:] = np.array(fill, np.uint8)[:, None, None]
    y, x = (crop[0] - rows) // 2, (crop[1] - columns) // 2
    whole[:, y : y + rows, x : x + columns] = made
    return whole


@functools.cache
def rule() -> Rule | None:
    """Which direction the installed Pillow resizes first.

    None: the library is not there, cannot be opened, or is not Pillow's like. Nobody has asked for it, so it is neither
    built here, nor does a damaged one stop what Pillow can do.
    """
    try:
        if library.there() is None:
            return None
    except (OSError, BuildError, UsageError):
        return None
    return next((one for one in (_since_13, _before_13) if all(_alike(*probe, one) for probe in _PROBES)), None)


def _since_13(sides: Sides, resized: Sides) -> bool:
    lost = sides[0] - resized[0]
    return lost > 0 and lost > 2 * (sides[1] - resized[1])


def _before_13(sides: Sides, resized: Sides) -> bool:
    return False


# Sizes and filters, some of them on either side of the rule.
_PROBES: tuple[tuple[Sides, Sides, resize.Filter], ...] = (
    ((40, 20), (4, 16), "bicubic"),
    ((20, 24), (12, 20), "bilinear"),
    ((20, 24), (11, 20), "lanczos"),
    ((9, 30), (21, 11), "bicubic"),
    ((30, 9), (12, 25), "bilinear"),
    ((23, 31), (14, 17), "lanczos"),
)


def _alike(sides: Sides, resized: Sides, filter: resize.Filter, columns_first: Rule) -> bool:
    pixels = (np.arange(sides[0] * sides[1]) ** 2 % 251).astype(np.uint8).reshape(sides)
    theirs = Image.fromarray(pixels).resize(resized[::-1], FILTERS[filter])
    window = resize.Window(*resized, 0, 0, *resized)
    ours = resize.resized(pixels, window, filter, columns_first=columns_first(sides, resized))
    return bool(np.array_equal(ours[0], np.asarray(theirs)))
