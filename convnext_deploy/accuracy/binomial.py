"""The exact tail of a binomial distribution, and the bounds of a share that follow from it.

Written here, and compared with scipy in the tests, because scipy would be half of what the package installs.
"""

import math
from collections.abc import Callable

import numpy as np

_AT_ONCE = 4096  # terms of the sum; from the mean on, ten million trials need three times as many


def tail(count: int, trials: int, share: float) -> float:
    """Probability of `count` hits or more in that many trials, to twelve digits.

    Args:
        share: probability of a hit.
    """
    if count <= 0:
        return 1.0
    if count > trials or share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    if count > trials * share:
        return _beyond_mean(count, trials, share)
    return 1.0 - _beyond_mean(trials - count + 1, trials, 1 - share)


def share_bounds(count: int, trials: int, alpha: float) -> tuple[float, float]:
    """Clopper and Pearson's exact lower and upper bound of a share, each one-sided."""
    observed = count / trials
    low = rising_root(lambda share: tail(count, trials, share) - alpha, 0.0, observed) if count else 0.0
    high = (
        rising_root(lambda share: tail(count + 1, trials, share) - (1 - alpha), observed, 1.0)
        if count < trials
        else 1.0
    )
    return low, high


def rising_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function changes its sign between two shares, to their last bit or 1e-18, by halving."""
    while high - low > 1e-18 and low < (middle := low + (high - low) / 2) < high:
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return high


def _beyond_mean(count: int, trials: int, share: float) -> float:
    """The tail from a count at or above the mean on, where the probabilities fall: each from the one before it."""
    term = _probability(count, trials, share)
    total, odds = term, share / (1 - share)
    for first in range(count, trials, _AT_ONCE):
        hits = np.arange(first, min(first + _AT_ONCE, trials))
        terms = term * np.cumprod((trials - hits) / (hits + 1) * odds)
        total += float(terms.sum())
        term = float(terms[-1])
        if term <= total * 1e-18:
            break
    return min(total, 1.0)


def _probability(count: int, trials: int, share: float) -> float:
    """The probability of exactly `count` hits, 0 < count.

    By the saddle-point expansion (Loader 2000, Fast and accurate computation of binomial probabilities), in which the
    large terms of the factorials have been cancelled on paper.
    """
    missed = trials - count
    if not missed:
        return share**trials
    exponent = _stirling_error(trials) - _stirling_error(count) - _stirling_error(missed)
    exponent -= _deviance(count, trials * share) + _deviance(missed, trials * (1 - share))
    return math.exp(exponent) * math.sqrt(trials / (2 * math.pi * count * missed))


def _deviance(seen: int, expected: float) -> float:
    excess = seen - expected
    return seen * math.log1p(excess / expected) - excess


def _stirling_error(n: int) -> float:
    """By how much the logarithm of n! exceeds Stirling's approximation."""
    if n < 16:
        return math.lgamma(n + 1) - ((n + 0.5) * math.log(n) - n + 0.5 * math.log(2 * math.pi))
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / n**2) / n**2) / n**2) / n
