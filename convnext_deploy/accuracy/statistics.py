"""What a difference between two models that saw the same images can be, and what chance alone would make.

Of `images`, `lost` are right in the baseline only and `gained` in the candidate only; the other images carry no
information on the difference. The drop is (lost - gained) / images. Every bound is one-sided: the truth is beyond
it with probability alpha at most.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .binomial import rising_root, share_bounds, tail

POWER = 0.8  # chance that the images asked for decide, if the models are what they seem to be
MOST_IMAGES = 10_000_000  # where more would be needed, no set of images decides

CHANCE_ALPHA = 0.001  # of a share by chance being called above chance

_RESAMPLES = 1000
_SEED = 0


def score(lost: Any, gained: Any, images: Any, drop: float) -> NDArray[np.float64]:
    """Tango's statistic: how many standard errors the observed drop is above `drop`, if that is the true one.

    The standard error is that of the likeliest proportions among those with this drop, and not of the observed ones
    as in Wald's statistic: few lost images by luck do not make it small (Tango 1998, Statistics in Medicine 17:891).

    Args:
        lost: counts or proportions, numbers or arrays of one shape; at least one differs from 0, or `drop` does.
        gained: likewise.
        images: likewise; 1 for proportions.
        drop: fraction, -1 < drop < 1.
    """
    lost, gained = np.asarray(lost, np.float64), np.asarray(gained, np.float64)
    variance = 2 * _gained_share(lost, gained, images, drop) + drop * (1 - drop)
    return cast(NDArray[np.float64], (lost - gained - images * drop) / np.sqrt(images * variance))


def _gained_share(lost: NDArray[np.float64], gained: NDArray[np.float64], images: Any, drop: float) -> Any:
    """Likeliest share of gained images where that of lost ones is larger by `drop`.

    The root of 2 n q^2 + s q - gained drop (1 - drop) = 0, written so that nothing cancels for either sign of s.
    """
    slope = (2 * images - lost + gained) * drop - lost - gained
    product = gained * drop * (1 - drop)
    root = np.sqrt(slope**2 + 8 * images * product)
    with np.errstate(invalid="ignore", divide="ignore"):  # by 0 in the branch that is not taken
        return np.where(slope > 0, 2 * product / (root + slope), (root - slope) / (4 * images))


def drop_bounds(lost: int, gained: int, images: int, alpha: float) -> tuple[float, float]:
    """Lower and upper bound of the drop: Tango's score interval, made exact where all flips go one way.

    Tango's interval is asymptotic. Where nothing was gained (or nothing lost) its error can exceed alpha by a third
    at about 1,000 images; there the drop is one binomial share and the exact (Clopper-Pearson) bounds are known, and
    the wider of the two is taken.
    """
    lower, upper = -_tango_upper(gained, lost, images, alpha), _tango_upper(lost, gained, images, alpha)
    if gained == 0:
        low, high = share_bounds(lost, images, alpha)
        lower, upper = min(lower, low), max(upper, high)
    if lost == 0:
        low, high = share_bounds(gained, images, alpha)
        lower, upper = min(lower, -high), max(upper, -low)
    return lower, upper


def _tango_upper(lost: int, gained: int, images: int, alpha: float) -> float:
    """The drop, in [-1, 1], that the observed one is z standard errors below."""
    z = NormalDist().inv_cdf(1 - alpha)
    return rising_root(lambda drop: -z - float(score(lost, gained, images, drop)), (lost - gained) / images, 1.0)


def expected_agreement(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Share of equal entries that two lists of classes would have in any order: Cohen's kappa's correction for chance.

    Args:
        one: classes, (N,), N > 0.
        other: likewise.
    """
    size = int(max(one.max(), other.max())) + 1
    shares = np.bincount(one, minlength=size) / len(one) * (np.bincount(other, minlength=size) / len(other))
    return float(shares.sum())


def is_above_chance(count: int, images: int, chance: float) -> bool:
    """Whether so many hits, or more, have a binomial probability of `CHANCE_ALPHA` at most."""
    return tail(count, images, chance) <= CHANCE_ALPHA


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test: flips are lost or gained with equal chance."""
    return min(1.0, 2 * tail(max(lost, gained), lost + gained, 0.5))


def mcnemar_loss(lost: int, gained: int) -> float:
    """Exact one-sided p-value: so many lost, or more, if flips were lost or gained with equal chance."""
    return tail(lost, lost + gained, 0.5)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjustment: with each compared with alpha, the chance of even one false alarm among all is alpha."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1.0)
    return tuple(adjusted.tolist())


def images_needed(discordance: float, drop: float, limit: float, alpha: float) -> int | None:
    """How many images decide, with chance `POWER`, on which side of the limit a drop is.

    Args:
        discordance: share of the images that are lost or gained; at least |drop|.
        drop: what the true drop is taken to be, a fraction.
        limit: fraction.
        alpha: chance of the wrong decision at the limit.

    Returns:
        None where the drop is so close to the limit that more than `MOST_IMAGES` would be needed.
    """
    if discordance == 0:  # the exact bound of a share of which nothing was seen
        return math.ceil(math.log(alpha) / math.log1p(-limit)) if limit else None
    normal = NormalDist()
    lost, gained = np.float64((discordance + drop) / 2), np.float64(max(discordance - drop, 0.0) / 2)
    at_limit = 2 * float(_gained_share(lost, gained, 1, limit)) + limit * (1 - limit)  # the test's own variance
    as_seen = discordance - drop**2
    spread = normal.inv_cdf(1 - alpha) * math.sqrt(at_limit) + normal.inv_cdf(POWER) * math.sqrt(as_seen)
    gap = abs(limit - drop)
    if spread >= gap * math.sqrt(MOST_IMAGES):
        return None
    return max(1, math.ceil((spread / gap) ** 2))


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], alpha: float
) -> tuple[float, float, float]:
    """Ratio of two medians, with its lower and upper bound by a block bootstrap.

    Samples of latency that follow one another resemble each other, so blocks of them are drawn, each about the square
    root of all long; single samples would make the interval too narrow. The draws are the same in every call.
    """
    generator = np.random.default_rng(_SEED)
    ratios = _resampled_medians(numerator, generator) / _resampled_medians(denominator, generator)
    lower, upper = np.quantile(ratios, [alpha, 1 - alpha])
    return float(np.median(numerator) / np.median(denominator)), float(lower), float(upper)


def _resampled_medians(samples: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    """(resamples,): medians of blocks that start anywhere and go on at the beginning where they reach the end."""
    values = np.asarray(samples)
    length = math.ceil(math.sqrt(len(values)))
    medians = np.empty(_RESAMPLES)
    at_once = max(1, 1_000_000 // len(values))  # resamples, for memory
    for first in range(0, _RESAMPLES, at_once):
        part = medians[first : first + at_once]
        starts = generator.integers(len(values), size=(len(part), math.ceil(len(values) / length), 1))
        places = (starts + np.arange(length)).reshape(len(part), -1) % len(values)
        part[:] = np.median(values[places], axis=1)
    return medians
