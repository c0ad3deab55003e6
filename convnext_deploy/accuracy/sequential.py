"""A test of a share that may be looked at after every observation: how often two models disagree, on live traffic.

A test for a fixed number of images is wrong far more often than it says when somebody looks at it again and again and
stops at the first result. Here a gambler bets against "the share is at least the limit", and another one against "at
most". Each begins with 1, spread over some shares on the other side, and each bet pays the ratio of the two
likelihoods. If the hypothesis is true, no strategy multiplies the capital by 1 / alpha at any time with a probability
above alpha (Ville 1939; Ramdas et al. 2023, Game-theoretic statistics and safe anytime-valid inference,
arXiv:2210.01948). So reaching it once refutes the hypothesis, whenever that is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.base import Decision
from .binomial import rising_root
from .statistics import MOST_IMAGES

ALPHA = 0.05  # of each wrong decision, over all of time

# Odds of the shares that are bet on, in those of the limit. A share closer to it than the last is not told from it.
_STEPS = (1.1, 1.2, 1.4, 2.0, 4.0, 16.0, 256.0)
_NEVER = 0.25  # of the capital, on the share 0: two models that never disagree are what is hoped for


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of a share after so many observations."""

    decision: Decision  # PASS: it is below the limit; FAIL: above it
    images: int
    hits: int
    share: float  # hits / images; 0 of no image
    lower: float  # the share is above it, and below `upper`: each is wrong at any time with probability `alpha`
    upper: float
    limit: float
    alpha: float
    more_images: int | None  # about how many more decide if they are like those before; 0: decided; None: too many


def standing(hits: int, images: int, limit: float, alpha: float = ALPHA) -> Standing:
    """What is known after `images` observations, of which `hits` were such.

    It says what these counts say, and looks at no earlier ones: whoever stops at the first decision keeps it.

    Args:
        limit: of the share, 0 < limit < 1.
        alpha: probability of PASS, at any time, where the share is at least the limit; likewise of FAIL.
    """
    goal = -math.log(alpha)
    below, above = capital_below(hits, images, limit), capital_above(hits, images, limit)
    decision: Decision = "PASS" if below >= goal else "FAIL" if above >= goal else "INCONCLUSIVE"
    lower, upper = bounds(hits, images, alpha)
    return Standing(
        decision=decision,
        images=images,
        hits=hits,
        share=hits / images if images else 0.0,
        lower=lower,
        upper=upper,
        limit=limit,
        alpha=alpha,
        more_images=0 if decision != "INCONCLUSIVE" else _more(hits, images, limit, goal),
    )


def capital_below(hits: float, images: float, limit: float) -> float:
    """Logarithm of what betting on shares below the limit has made of 1: large where the share is below it."""
    shares = _shares(limit, [1 / step for step in _STEPS])
    capital = _logarithm_of_mean(hits, images, limit, shares) + math.log(1 - _NEVER)
    if hits:
        return capital
    return float(np.logaddexp(capital, math.log(_NEVER) - images * math.log1p(-limit)))


def capital_above(hits: float, images: float, limit: float) -> float:
    """The capital of the gambler who bets on shares above the limit."""
    return _logarithm_of_mean(hits, images, limit, _shares(limit, _STEPS))


def _shares(limit: float, steps: Sequence[float]) -> NDArray[np.float64]:
    odds = np.array(steps) * limit / (1 - limit)
    shares: NDArray[np.float64] = odds / (1 + odds)
    return shares


def _logarithm_of_mean(hits: float, images: float, limit: float, shares: NDArray[np.float64]) -> float:
    gains = hits * np.log(shares / limit) + (images - hits) * (np.log1p(-shares) - math.log1p(-limit))
    largest = float(gains.max())
    return largest + math.log(float(np.exp(gains - largest).mean()))


def bounds(hits: int, images: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Lower and upper bound of the share: the limits that the capital does not refute. Both hold at all times at once.

    Each is wrong, at any time, with probability alpha at most.
    """
    if not images:
        return 0.0, 1.0
    goal, tiny = -math.log(alpha), 1e-12
    observed = min(max(hits / images, tiny), 1 - tiny)
    low, high = 0.0, 1.0
    if hits:  # where no limit is refuted, halving ends at `tiny`
        low = rising_root(lambda share: goal - capital_above(hits, images, share), tiny, observed)
    if hits < images:
        high = rising_root(lambda share: capital_below(hits, images, share) - goal, observed, 1 - tiny)
    return low, high


def _more(hits: int, images: int, limit: float, goal: float) -> int | None:
    """How many more reach the goal, on one side or the other, if their share is the one seen so far."""
    share = hits / images if images else 0.0
    capital = capital_below if share < limit else capital_above

    def reached(more: int) -> bool:
        return capital(hits + more * share, images + more, limit) >= goal

    if not reached(MOST_IMAGES):
        return None
    low, high = 0, MOST_IMAGES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
