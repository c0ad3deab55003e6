"""Which candidates get the final images, in which order, and how often a bad one is chosen: counted, not argued."""

import gc

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from convnext_deploy.accuracy import finalists, statistics

ALPHA, LIMIT, IMAGES = 0.05, 0.01, 1000
RUNS = 4000


def simulated(drops: list[float], flips: float, seed: int) -> np.ndarray:
    """(RUNS, candidates, 2): lost and gained of candidates with these true drops, independent of one another."""
    generator = np.random.default_rng(seed)
    shares = [[(flips + drop) / 2, (flips - drop) / 2, 1 - flips] for drop in drops]
    return np.stack([generator.multinomial(IMAGES, share, RUNS)[:, :2] for share in shares], axis=1)


def passing(runs: np.ndarray) -> np.ndarray:
    """(RUNS, candidates): the gate's decision at alpha, which is Tango's statistic below its quantile."""
    return statistics.score(runs[..., 0], runs[..., 1], IMAGES, LIMIT) <= norm.ppf(ALPHA)


def test_the_simulations_decision_is_the_gates() -> None:
    for lost, gained in ((5, 20), (12, 12), (18, 14), (25, 15)):
        bound = statistics.drop_bounds(lost, gained, IMAGES, ALPHA)[1]
        assert bool(passing(np.array([lost, gained]))) == (bound <= LIMIT)


@pytest.mark.parametrize(
    "drops",
    [
        [LIMIT * 1.0001] * 3,  # all at the limit: the first decides
        [0.0, LIMIT * 1.0001, LIMIT * 1.0001],  # a good one opens the way to the bad ones
        [0.0, 0.0, LIMIT * 1.0001],
    ],
)
def test_a_bad_candidate_is_chosen_no_more_often_than_alpha(drops: list[float]) -> None:
    bad = naive = 0
    for passes in passing(simulated(drops, 0.04, seed=1)):
        passed = finalists.walk(range(len(drops)), passes.__getitem__)
        bad += any(drops[index] > LIMIT for index in passed)
        first = next((index for index in reversed(range(len(drops))) if passes[index]), None)  # fastest first
        naive += first is not None and drops[first] > LIMIT
    noise = 3 * np.sqrt(ALPHA * (1 - ALPHA) / RUNS)
    assert bad / RUNS <= ALPHA + noise
    if drops[1] > LIMIT:  # what the search did before: the fastest of several that passes
        assert naive / RUNS > ALPHA + noise


def test_where_holms_procedure_passes_the_fastest_the_walk_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holm's by statsmodels; and where one alone is good enough, only the walk passes it."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # at every call, a quarter of a second each
    runs = simulated([0.0, 0.0, 0.0], 0.01, seed=2)[:25]
    walked = holm = 0
    for p_values in norm.cdf(statistics.score(runs[..., 0], runs[..., 1], IMAGES, LIMIT)):
        by_holm = bool(multipletests(p_values, ALPHA, "holm")[0].all())
        by_walk = len(finalists.walk(p_values, lambda p: p <= ALPHA)) == 3
        assert by_walk or not by_holm
        walked, holm = walked + by_walk, holm + by_holm
    assert walked >= holm > 0
    assert not multipletests([0.04, 0.9, 0.9], ALPHA, "holm")[0].any()  # Holm lets the first pay for the others
    assert finalists.walk([0.04, 0.9, 0.9], lambda p: p <= ALPHA) == [0.04]


def test_a_walk_ends_at_the_first_that_does_not_pass_and_asks_no_further() -> None:
    asked: list[str] = []

    def passes(name: str) -> bool:
        asked.append(name)
        return name != "b"

    assert finalists.walk(["a", "b", "c"], passes) == ["a"]
    assert asked == ["a", "b"]


def test_the_front_runs_from_the_one_that_agrees_most_to_the_fastest() -> None:
    times = {"int8": 1.0, "linears": 1.01, "bf16": 2.0, "onnx-int8": 1.5, "slow": 3.0}
    agreements = {"int8": 0.97, "linears": 0.98, "bf16": 0.999, "onnx-int8": 0.97, "slow": 0.99}
    # `linears` takes the place of `int8`, which is 1 % faster; what agrees no more than a faster one is out.
    assert finalists.front(times, agreements, 3) == ("bf16", "linears")
    assert finalists.front(times, agreements, 1) == ("linears",)
    assert finalists.front({}, {}, 3) == ()


@pytest.mark.parametrize(
    ("lost", "gained", "found"),
    [
        (0, 0, "fair"),
        (1, 1, "fair"),
        (3, 3, "doubtful"),  # 2.4 % flips: the interval is wider than half a point
        (20, 20, "none"),
        (2, 0, "doubtful"),  # drops more than the limit already
    ],
)
def test_a_prospect_follows_from_how_many_images_flip(lost: int, gained: int, found: str) -> None:
    assert finalists.prospect(lost, gained, 250, 1500, 0.005, 0.05) == found


def test_what_has_no_prospect_passes_almost_never() -> None:
    """With the flips at which it is dropped, and no drop at all, the gate passes few."""
    share = next(n for n in range(40) if finalists.prospect(n, n, 250, 1500, 0.005, 0.05) == "none") * 2 / 250
    counts = np.random.default_rng(3).multinomial(1500, [share / 2, share / 2, 1 - share], 4000)
    passes = statistics.score(counts[:, 0], counts[:, 1], 1500, 0.005) <= norm.ppf(0.05)
    assert passes.mean() < 0.3
