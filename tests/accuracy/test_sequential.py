"""The test of a share that may be looked at at any time: what it says, and how often it is wrong, by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from convnext_deploy.accuracy import binomial, sequential
from convnext_deploy.accuracy.sequential import ALPHA, capital_above, capital_below, standing

LIMIT = 0.02


def decisions(share: float, runs: int, images: int, seed: int = 0) -> tuple[float, float, float]:
    """Shares of PASS and FAIL among runs that are looked at after every image, and the mean of images until then."""
    generator, goal = np.random.default_rng(seed), -math.log(ALPHA)
    passed = failed = taken = 0
    for _ in range(runs):
        hits = np.flatnonzero(generator.random(images) < share).tolist()
        # Capital on shares below grows from hit to hit, that on shares above shrinks: the extremes stand at hits.
        for before, place in enumerate([*hits, images]):
            if capital_below(before, place, LIMIT) >= goal:
                passed += 1
                break
            if place < images and capital_above(before + 1, place + 1, LIMIT) >= goal:
                failed += 1
                break
        taken += place
    return passed / runs, failed / runs, taken / runs


def test_at_the_limit_it_decides_wrongly_no_more_often_than_it_says_however_often_it_is_looked_at() -> None:
    passed, failed, _ = decisions(LIMIT, runs=300, images=4_000)
    error = 3 * math.sqrt(ALPHA * (1 - ALPHA) / 300)  # of a simulated share
    assert passed <= ALPHA + error
    assert failed <= ALPHA + error
    assert passed + failed > 0.01  # it is not merely silent


def test_a_fixed_test_that_is_looked_at_as_often_is_wrong_far_more_often() -> None:
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(200):
        hits = np.cumsum(generator.random(2000) < LIMIT)
        # The exact test for n images passes where so few hits, or fewer, have a chance of alpha at most.
        wrong += any(1 - binomial.tail(int(hits[n - 1]) + 1, n, LIMIT) <= ALPHA for n in range(200, 2001, 50))
    assert wrong / 200 > 2 * ALPHA


@pytest.mark.parametrize(("share", "right"), [(0.0, 0), (LIMIT / 4, 0), (LIMIT / 2, 0), (2 * LIMIT, 1), (0.2, 1)])
def test_a_share_that_is_clearly_off_the_limit_is_decided(share: float, right: int) -> None:
    *found, taken = decisions(share, runs=100, images=10_000)
    assert found[right] >= 0.95
    assert found[1 - right] <= ALPHA
    assert taken < 10_000 or share == 0  # where nothing is hit the loop above looks once, at the end


def test_no_disagreement_passes_after_as_many_images_as_it_says() -> None:
    needed = standing(0, 0, LIMIT).more_images
    assert needed is not None
    assert standing(0, needed - 1, LIMIT).decision == "INCONCLUSIVE"
    assert standing(0, needed, LIMIT).decision == "PASS"
    # Of the images that an exact test of a fixed number would need, one and a half times as many.
    assert needed < 1.5 * math.log(ALPHA) / math.log1p(-LIMIT)


@pytest.mark.parametrize(("hits", "images"), [(0, 50), (1, 100), (1, 300), (12, 300), (3, 10), (60, 2000)])
def test_how_many_more_is_how_many_more_if_the_rest_is_like_what_was_seen(hits: int, images: int) -> None:
    found = standing(hits, images, LIMIT)
    assert found.more_images is not None
    assert (found.more_images == 0) == (found.decision != "INCONCLUSIVE")
    capital = capital_below if hits / images < LIMIT else capital_above
    goal, more = -math.log(ALPHA), found.more_images
    assert capital(hits * (1 + more / images), images + more, LIMIT) >= goal
    if more:
        assert capital(hits * (1 + (more - 1) / images), images + more - 1, LIMIT) < goal


def test_a_share_at_the_limit_is_said_not_to_be_decided_by_any_number() -> None:
    assert standing(40, 2000, LIMIT).more_images is None


@pytest.mark.parametrize("images", [1, 7, 100, 1000])
def test_bounds_hold_the_share_and_agree_with_the_decision(images: int) -> None:
    for hits in sorted({0, 1, images // 50, images // 2, images}):
        lower, upper = sequential.bounds(hits, images)
        assert 0 <= lower <= hits / images <= upper <= 1
        for limit in (0.01, 0.1, 0.4):
            decided = standing(hits, images, limit).decision
            if abs(lower - limit) > 1e-9 and abs(upper - limit) > 1e-9:
                assert decided == ("PASS" if upper < limit else "FAIL" if lower > limit else "INCONCLUSIVE")


def test_bounds_miss_the_share_no_more_often_than_they_say_over_all_of_time() -> None:
    generator, missed, share = np.random.default_rng(2), 0, 0.1
    for _ in range(100):
        hits = np.cumsum(generator.random(400) < share)
        # Looked at where the logarithm of time is: a bound that is wrong is so for a while.
        bounds = [sequential.bounds(int(hits[n - 1]), n) for n in (2, 8, 32, 128, 400)]
        missed += any(not lower <= share <= upper for lower, upper in bounds)
    assert missed / 100 <= 2 * ALPHA


def test_nothing_is_known_of_nothing() -> None:
    found = standing(0, 0, LIMIT)
    assert (found.decision, found.lower, found.upper, found.share) == ("INCONCLUSIVE", 0.0, 1.0, 0.0)


# What mutants of the rules showed to be untested ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.001, 0.02, 0.5])
@pytest.mark.parametrize(("hits", "images"), [(0, 0), (0, 40), (1, 40), (7, 40), (40, 40), (3, 900)])
def test_the_capital_is_the_mean_of_what_scipys_likelihoods_pay(hits: int, images: int, limit: float) -> None:
    steps = np.array([1.1, 1.2, 1.4, 2, 4, 16, 256])
    paid = []
    for odds in (limit / (1 - limit) / steps, limit / (1 - limit) * steps):
        likelihoods = stats.binom.pmf(hits, images, odds / (1 + odds))
        paid.append(float(likelihoods.mean() / stats.binom.pmf(hits, images, limit)))
    never = (1 - limit) ** -images if hits == 0 else 0.0  # a quarter is bet on the share 0
    assert math.exp(capital_below(hits, images, limit)) == pytest.approx(0.75 * paid[0] + 0.25 * never)
    assert math.exp(capital_above(hits, images, limit)) == pytest.approx(paid[1])


@pytest.mark.parametrize("alpha", [0.05, 0.01])
@pytest.mark.parametrize(("hits", "images"), [(0, 1), (1, 1), (0, 300), (300, 300), (1, 300), (299, 300), (6, 300)])
def test_a_bound_is_the_limit_at_which_the_capital_reaches_its_goal(hits: int, images: int, alpha: float) -> None:
    lower, upper = sequential.bounds(hits, images, alpha)
    goal = math.log(1 / alpha)
    if hits == 0:
        assert lower == 0
    elif lower > 1e-11:
        assert capital_above(hits, images, lower) == pytest.approx(goal, abs=1e-5)
        assert capital_above(hits, images, lower * 1.001) < goal
    else:  # so few hits refute no limit
        assert max(capital_above(hits, images, limit) for limit in np.geomspace(1e-11, hits / images)[:-1]) < goal
    if hits == images:
        assert upper == 1
    elif 1 - upper > 1e-11:
        assert capital_below(hits, images, upper) == pytest.approx(goal, abs=1e-5)
        assert capital_below(hits, images, 1 - (1 - upper) * 1.001) < goal
    else:
        misses = np.geomspace(1e-11, 1 - hits / images)[:-1]
        assert max(capital_below(hits, images, 1 - share) for share in misses) < goal


def test_one_more_image_is_one_more() -> None:
    assert capital_below(0, 180, LIMIT) < math.log(20) < capital_below(0, 181, LIMIT)
    assert [standing(0, images, LIMIT).more_images for images in (179, 180, 181)] == [2, 1, 0]


def test_a_decision_falls_with_the_image_that_makes_the_capital_twenty() -> None:
    assert ALPHA == 0.05
    for hits, images, decision, capital in ((0, 185, "PASS", capital_below), (4, 20, "FAIL", capital_above)):
        found = standing(hits, images, LIMIT)
        assert (found.decision, found.more_images, found.hits, found.images) == (decision, 0, hits, images)
        assert (found.share, found.limit, found.alpha) == (hits / images, LIMIT, 0.05)
        reached = math.exp(-capital(hits, images, LIMIT))
        assert standing(hits, images, LIMIT, reached * (1 + 1e-9)).decision == decision
        assert standing(hits, images, LIMIT, reached * (1 - 1e-9)).decision == "INCONCLUSIVE"


@pytest.mark.parametrize(("limit", "decidable"), [(4e-7, True), (3.3e-7, False)])
def test_a_share_that_ten_million_images_do_not_decide_is_said_to_be_undecided(limit: float, decidable: bool) -> None:
    needed = standing(0, 0, limit).more_images
    assert (needed is not None) is decidable
    assert needed is None or 9_000_000 < needed <= 10_000_000
