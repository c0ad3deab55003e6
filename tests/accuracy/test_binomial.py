"""The binomial tail beside scipy's, and beside exact fractions where both are computed."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import stats

from convnext_deploy.accuracy import binomial


@pytest.mark.parametrize(
    ("trials", "share"),
    [(1, 0.5), (2, 0.5), (15, 0.001), (16, 0.3), (17, 0.999), (40, 0.5), (333, 0.02), (600, 0.75)],
)
def test_the_tail_is_the_exact_sum(trials: int, share: float) -> None:
    exact_share = Fraction(share)
    exact = Fraction(0)
    for count in range(trials, -1, -1):
        exact += comb(trials, count) * exact_share**count * (1 - exact_share) ** (trials - count)
        if count % max(1, trials // 7) == 0:
            # An upper tail below the mean is one minus what is small, exact to the last bits of 1.
            assert binomial.tail(count, trials, share) == pytest.approx(float(exact), rel=1e-11, abs=1e-300)
    assert binomial.tail(trials + 1, trials, share) == 0.0
    assert binomial.tail(0, trials, share) == binomial.tail(-1, trials, share) == 1.0


@pytest.mark.parametrize("trials", [7, 1_000, 50_000, 10_000_000])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.001, 0.3, 0.5, 0.97, 1.0])
def test_the_tail_is_scipys(trials: int, share: float) -> None:
    spread = (trials * share * (1 - share)) ** 0.5
    for steps in (-30, -3, -0.1, 0, 0.1, 3, 10):
        count = int(np.clip(trials * share + steps * spread, 0, trials))
        for near in (count, count + 1):
            expected = stats.binom.sf(near - 1, trials, share)
            # scipy's own error grows with the trials.
            assert binomial.tail(near, trials, share) == pytest.approx(expected, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("alpha", [0.05, 0.025, 1e-4])
@pytest.mark.parametrize(
    ("count", "trials"), [(0, 1), (1, 1), (0, 10), (10, 10), (1, 3), (1993, 2000), (7, 50_000), (250_000, 1_000_000)]
)
def test_the_bounds_are_scipys_and_have_the_error_they_promise(count: int, trials: int, alpha: float) -> None:
    low, high = binomial.share_bounds(count, trials, alpha)
    expected = stats.binomtest(count, trials).proportion_ci(1 - 2 * alpha, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    if count:
        assert stats.binom.sf(count - 1, trials, low) == pytest.approx(alpha, rel=1e-6)
    if count < trials:
        assert stats.binom.cdf(count, trials, high) == pytest.approx(alpha, rel=1e-6)


def test_a_root_is_found_to_the_last_bit() -> None:
    root = binomial.rising_root(lambda x: x * x - 2, 0.0, 2.0)
    assert abs(root - 2**0.5) <= 2.3e-16
    assert binomial.rising_root(lambda x: x, -1.0, 1.0) == pytest.approx(0, abs=1e-18)
