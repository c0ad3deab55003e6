"""Whether the images that a model sees are like those it was calibrated on, and whether its answers are.

An image is described by the mean and the standard deviation of each of its channels (`data.description`). The reference
is how these spread over the calibration's images, and how often each class was the answer there. What differs is told
as a size, with the size that chance alone makes beside it: with enough images every difference is one that chance does
not make.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..data.description import Values
from ..records.plan import InputStatistics

CHANCE = 0.01  # of a difference above `chance` where nothing has changed
LEAST = 30  # images, below which means are not yet normal and nothing is told
DEALS = 199  # random ones, from which the chance of a distance is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How far the latest images are from the reference."""

    images: int
    mean: tuple[float, ...]  # of each channel, in standard deviations between the reference's images
    std: tuple[float, ...]  # likewise, of the channel's standard deviation
    chance: float  # magnitude that none of these has with probability 1 - `CHANCE` where nothing has changed
    classes: float | None  # total variation distance: the share of the answers that would have to be others
    classes_chance: float | None  # that it has at most with probability 1 - `CHANCE` where nothing has changed


class Recent:
    """The latest images of a stream, beside the reference.

    Args:
        size: images that are remembered.
    """

    def __init__(self, reference: InputStatistics, size: int = 1024) -> None:
        channels = len(reference.mean)
        self.reference = reference
        self._values = np.empty((size, 2, channels))
        self._classes = np.zeros(size, np.int64)
        self._seen = 0

    def add(self, mean: Values, std: Values, answer: int) -> None:
        """One image: (C,) of `description.described`, and its class."""
        place = self._seen % len(self._values)
        self._values[place], self._classes[place] = (mean, std), answer
        self._seen += 1

    def shift(self) -> Shift | None:
        """None for fewer than `LEAST` images."""
        images = min(self._seen, len(self._values))
        if images < LEAST:
            return None
        latest, reference = self._values[:images].mean(0), self.reference  # (2, C)
        expected = np.array([reference.mean, reference.std])
        # Images that are all alike in something, such as white backgrounds, have no spread: a code of 8 bits is one.
        spread = np.maximum([reference.mean_spread, reference.std_spread], 1 / 255)
        apart = (latest - expected) / spread
        fewer = 1 / images + 1 / reference.images
        each = NormalDist().inv_cdf(1 - CHANCE / 2 / apart.size)
        distance, chance = None, None
        if reference.classes:
            distance, chance = _distance(self._classes[:images], np.array(reference.classes))
        return Shift(
            images=images,
            mean=tuple(apart[0].tolist()),
            std=tuple(apart[1].tolist()),
            chance=each * math.sqrt(fewer),
            classes=distance,
            classes_chance=chance,
        )


def _distance(answers: NDArray[np.int64], reference: NDArray[np.int64]) -> tuple[float, float]:
    """Total variation distance of two samples of classes, and the one that chance stays below.

    Where nothing has changed, every way to deal all the answers out to the two samples is as likely as the one seen. So
    among the distances of random deals and the one seen, each is the second largest or larger with the same chance:
    2 in `DEALS` + 1. That is exact, for rare classes too.
    """
    counts = np.bincount(answers, minlength=len(reference))
    images, others, both = int(counts.sum()), int(reference.sum()), counts + reference
    dealt = np.random.default_rng(0).multivariate_hypergeometric(both, images, DEALS, method="count")
    apart = np.abs(dealt / images - (both - dealt) / others).sum(1) / 2
    return float(np.abs(counts / images - reference / others).sum() / 2), float(np.sort(apart)[-2])
