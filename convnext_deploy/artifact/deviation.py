"""How far outputs are from those of a reference, a number a sample: the one definition that every comparison uses.

A sample's error is divided by its own output or, where that is smaller, by the root mean square of all the samples'
outputs. With many outputs the two are alike. With one output a sample may be anywhere near zero, where its own size
says nothing about what one rounding moves it by; the spread over the samples does.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.float64]  # (N,)


def sizes(expected: NDArray[np.floating]) -> Distances:
    """What each sample's error is divided by: the larger of its own norm and the root mean square of all norms."""
    norms = np.linalg.norm(_rows(expected), axis=1)
    return np.maximum(norms, np.sqrt((norms**2).mean()))


def relative_errors(outputs: NDArray[np.floating], expected: NDArray[np.floating]) -> Distances:
    """||found - expected|| of each sample, over `sizes`.

    Where every expected output is zero, the error is 0 for samples that are zero too, and infinite for the others.
    """
    return _shares(np.linalg.norm(_rows(outputs) - _rows(expected), axis=1), sizes(expected))


def cosines(outputs: NDArray[np.floating], expected: NDArray[np.floating]) -> Distances:
    """1 - (||a|| ||b|| - a.b) / size^2 of each sample: the cosine, where both norms are as large as is usual."""
    a, b = _rows(outputs), _rows(expected)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    size = sizes(expected)
    products = np.maximum(norms[0], size) * np.maximum(norms[1], size)
    return 1 - _shares(norms[0] * norms[1] - (a * b).sum(1), products)


def worst(outputs: Sequence[NDArray[np.floating]], expected: Sequence[NDArray[np.floating]]) -> Distances:
    """The largest relative error of each sample's outputs."""
    errors: Distances = np.max([relative_errors(a, b) for a, b in zip(outputs, expected, strict=True)], axis=0)
    return errors


def _shares(parts: Distances, wholes: Distances) -> Distances:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(parts == 0, 0.0, parts / wholes)


def _rows(x: NDArray[np.floating]) -> NDArray[np.float64]:
    return x.reshape(len(x), -1).astype(np.float64)
