"""A segmenter's logits as the classes of an image's pixels. Needs no framework."""

import numpy as np
from numpy.typing import NDArray

Sides = tuple[int, int]  # (height, width) in pixels


def classes_of(output: NDArray[np.generic], sides: Sides) -> NDArray[np.int32]:
    """What an artifact puts out for one image, as the class of each pixel of an image of these sides, (H, W).

    Logits are resized as PyTorch resizes (bilinear, between the centres of pixels), and the first of equal ones counts.
    Of classes, each pixel takes the nearest.

    Args:
        output: logits (K, h, w), or classes (h, w).
    """
    if output.ndim == 2:
        rows, columns = (_nearest(size, side) for size, side in zip(output.shape, sides, strict=True))
        return output[rows][:, columns].astype(np.int32)
    return resized(output.astype(np.float32), sides).argmax(0).astype(np.int32)


def resized(logits: NDArray[np.float32], sides: Sides) -> NDArray[np.float32]:
    """Bilinear, (..., h, w) -> (..., H, W)."""
    height, width = (_weights(size, side) for size, side in zip(logits.shape[-2:], sides, strict=True))
    scores: NDArray[np.float32] = np.matmul(height, np.matmul(logits, width.T))
    return scores


def _weights(size: int, side: int) -> NDArray[np.float32]:
    """(side, size): how much of each value is in each resized one."""
    place = np.maximum((np.arange(side) + 0.5) * (size / side) - 0.5, 0)
    first = np.minimum(place.astype(np.int64), size - 1)
    second, part = np.minimum(first + 1, size - 1), (place - first).astype(np.float32)
    weights = np.zeros((side, size), np.float32)
    np.add.at(weights, (np.arange(side), first), 1 - part)
    np.add.at(weights, (np.arange(side), second), part)
    return weights


def _nearest(size: int, side: int) -> NDArray[np.int64]:
    """Which value is at the centre of each resized one."""
    return np.minimum(((np.arange(side) + 0.5) * (size / side)).astype(np.int64), size - 1)
