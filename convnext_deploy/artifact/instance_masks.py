"""Masks of a detector's places, as masks of an image's pixels. Needs no framework."""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
INSIDE = 0.5  # a pixel of an object is more likely than this to be part of it


def pasted(masks: NDArray[np.floating], boxes: NDArray[np.floating], sides: tuple[int, int]) -> Values:
    """How likely each pixel of an image is part of each object, as torchvision's `paste_masks_in_image` has it.

    Args:
        masks: (D, M, M), of the places of each box.
        boxes: (D, 4), left, top, right, bottom in the image's pixels.
        sides: (height, width) of the image.

    Returns:
        (D, height, width)
    """
    whole = np.zeros((len(masks), *sides), np.float32)
    for index, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        (top, bottom, left, right), values = _placed(mask, box, sides)
        whole[index, top:bottom, left:right] = values
    return whole


def run_lengths(inside: NDArray[np.bool_]) -> list[int]:
    """A mask as COCO's uncompressed run lengths: column after column, pixels outside and inside in turn."""
    flat = inside.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    lengths: list[int] = np.diff(edges).tolist()
    return [0, *lengths] if len(flat) and flat[0] else lengths


def _placed(
    mask: NDArray[np.floating], box: NDArray[np.floating], sides: tuple[int, int]
) -> tuple[tuple[int, int, int, int], Values]:
    """Where one mask is in the image, and its values there: bilinear, with a margin of zeros around the box."""
    places = mask.shape[0]
    framed = np.pad(mask.astype(np.float32), 1)
    scale = np.float32((places + 2) / places)
    x0, y0, x1, y1 = box.astype(np.float32)
    half = np.float32(0.5)
    middle, reach = ((x0 + x1) * half, (y0 + y1) * half), ((x1 - x0) * half * scale, (y1 - y0) * half * scale)
    left, top, right, bottom = (
        int(value) for value in (middle[0] - reach[0], middle[1] - reach[1], middle[0] + reach[0], middle[1] + reach[1])
    )
    width, height = max(right - left + 1, 1), max(bottom - top + 1, 1)
    first_x, last_x = max(left, 0), min(right + 1, sides[1])
    first_y, last_y = max(top, 0), min(bottom + 1, sides[0])
    columns = np.arange(first_x, max(last_x, first_x)) - left
    rows = np.arange(first_y, max(last_y, first_y)) - top
    across, down = _weights(columns, width, places + 2), _weights(rows, height, places + 2)
    values = down @ framed @ across.T
    return (first_y, first_y + len(rows), first_x, first_x + len(columns)), values


def _weights(pixels: NDArray[np.int64], side: int, places: int) -> Values:
    """(P, places): how much of each place a pixel takes, where places are resized to a side bilinearly."""
    at = np.clip((pixels.astype(np.float32) + 0.5) * np.float32(places / side) - np.float32(0.5), 0, None)
    low = np.minimum(at.astype(np.int64), places - 1)
    high = np.minimum(low + 1, places - 1)
    part = (at - low).astype(np.float32)
    weights = np.zeros((len(pixels), places), np.float32)
    rows = np.arange(len(pixels))
    np.add.at(weights, (rows, low), 1 - part)
    np.add.at(weights, (rows, high), part)
    return weights
