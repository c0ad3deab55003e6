"""The gate of mAP, R2 and mIoU exactly at its limits, beside scipy's normal distribution and enumerated cases."""

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from scipy import stats

from convnext_deploy.accuracy import gate_scores, outputs, statistics
from convnext_deploy.accuracy.gate_scores import ScoredSide
from convnext_deploy.accuracy.outputs import Drop, Outputs, Scored, Segments
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.records.accuracy import Limits, ScoreResult

IMAGES = 400


def answers(seed: int, noise: float, images: int = IMAGES) -> Outputs:
    """Of a regression: the same images and values in each call, and errors of that size."""
    values = np.random.default_rng(0).normal(size=(images, 1)).astype(np.float32)
    errors = noise * np.random.default_rng(seed).normal(size=values.shape).astype(np.float32)
    return Outputs(tuple(map(str, range(images))), values, values + errors)


def side(name: str, found: Outputs, bytes: int | None = None) -> ScoredSide:
    score = outputs.scored(found, "regression").score
    result = ScoreResult(
        problem="regression", artifact=name, artifact_sha256=name[0] * 64, data=f"data of {name}", data_sha256="1" * 64,
        images=len(found.names), corrupt=(), score=score, per_output=(), exact=None, mean_absolute_error=0.1,
        root_mean_square_error=0.1, images_per_s=1.0, predictions="a.parquet",
    )  # fmt: skip
    return ScoredSide(result=result, outputs=found, bytes=bytes)


# What a drop may be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_a_drops_bounds_are_normal_ones_and_what_none_of_the_images_shows(alpha: float) -> None:
    generator = np.random.default_rng(1)
    shares = generator.dirichlet(np.full(50, 0.3))
    before, after = (
        Scored(score, (score,), generator.normal(size=50) / 50, shares if score == 0.8 else shares[::-1])
        for score in (0.8, 0.7)
    )
    found = outputs.drop_between(before, after, alpha)
    moves = before.moves - after.moves
    error = math.sqrt(50 * np.var(moves))
    effective = 1 / np.square(shares).sum()  # Kish's number
    unseen = 1 - alpha ** (1 / effective)
    reach = math.sqrt((stats.norm.isf(alpha) * error) ** 2 + unseen**2)
    assert (found.value, found.standard_error) == pytest.approx((0.1, error))
    assert (found.lower, found.upper) == pytest.approx((0.1 - reach, 0.1 + reach))


def test_as_many_images_are_needed_as_bring_the_bound_and_the_power_to_the_limit() -> None:
    drop = Drop(value=0.02, lower=-0.01, upper=0.05, standard_error=0.012)
    expected = IMAGES * ((0.03 + stats.norm.ppf(0.8) * 0.012) / 0.01) ** 2
    for limit in (0.01, 0.03):  # on either side
        assert outputs.images_needed(drop, IMAGES, limit) == math.ceil(expected)
    assert outputs.images_needed(drop, IMAGES, 0.02) is None
    # What decides at ten million images is said, and what needs more is not.
    gap = math.sqrt(expected / statistics.MOST_IMAGES) * 0.01
    assert outputs.images_needed(drop, IMAGES, 0.02 + gap * (1 + 1e-6)) == pytest.approx(10_000_000, rel=1e-5)
    assert outputs.images_needed(drop, IMAGES, 0.02 + gap * (1 - 1e-6)) is None


# Chance ---------------------------------------------------------------------------------------------------------------


def test_chance_is_the_mean_share_of_the_labels_that_an_image_has() -> None:
    targets = np.zeros((20, 3), np.float32)
    targets[:4, 0], targets[:10, 1] = 1, 1  # and the third has no image
    found = Outputs(tuple(map(str, range(20))), targets, targets)
    assert outputs._chance(found, "multi-label") == pytest.approx((0.2 + 0.5) / 2)
    assert outputs._chance(found, "regression") == 0


def test_chance_of_a_segmenter_is_what_as_many_pixels_at_any_place_score() -> None:
    """By drawing the places of 60 and 40 pixels of two classes beside 25 and 75, of a third class that none has."""
    truth, predicted = np.array([[60, 40, 0]]), np.array([[25, 75, 0]])
    found = Segments(("a",), np.zeros_like(truth), truth, predicted)
    mask = np.repeat([0, 1], truth[0, :2])
    said = np.repeat([0, 1], predicted[0, :2])
    generator, shared = np.random.default_rng(0), []
    for _ in range(4000):
        generator.shuffle(said)
        shared.append([((mask == k) & (said == k)).sum() for k in (0, 1)])
    expected = [hits / (truth[0, k] + predicted[0, k] - hits) for k, hits in enumerate(np.mean(shared, axis=0))]
    assert outputs._chance(found, "segmentation") == pytest.approx(np.mean(expected), abs=0.003)
    nothing = Segments(("a",), truth * 0, truth * 0, truth * 0)
    assert outputs._chance(nothing, "segmentation") == 0


@pytest.mark.parametrize(("factor", "above"), [(1 + 1e-9, True), (1 - 1e-9, False)])
def test_a_score_is_above_chance_where_chance_makes_it_once_in_a_thousand_times(factor: float, above: bool) -> None:
    moves = np.random.default_rng(0).normal(size=IMAGES) / IMAGES + 7  # a mean that says nothing
    error = math.sqrt(IMAGES * np.var(moves))
    score = float(stats.norm.isf(0.001) * error * factor)
    scored = Scored(score, (score,), moves, np.full(IMAGES, 1 / IMAGES))
    assert outputs.is_above_chance(answers(1, 0.1), scored, "regression") == above


# The verdict ----------------------------------------------------------------------------------------------------------


def test_a_verdict_says_which_two_it_held_beside_each_other() -> None:
    before, after = side("before", answers(1, 0.1)), side("candidate", answers(2, 0.2))
    found = gate_scores.judge_scores(before, after, Limits(max_drop=10.0))
    scores = [outputs.scored(one.outputs, "regression") for one in (before, after)]
    drop = outputs.drop_between(scores[0], scores[1], 0.05)
    assert (found.decision, found.problem, found.images, found.doubts) == ("PASS", "regression", IMAGES, ())
    assert (found.baseline, found.baseline_sha256) == ("before", "b" * 64)
    assert (found.candidate, found.candidate_sha256) == ("candidate", "c" * 64)
    assert (found.data, found.data_sha256) == ("data of candidate", "1" * 64)
    assert (found.baseline_score, found.candidate_score) == (before.result.score, after.result.score)
    assert (found.baseline_mask_score, found.candidate_mask_score) == (None, None)
    (check,) = found.checks
    assert (check.name, check.limit, check.value) == ("r2_drop", 0.1, drop.value)
    assert (check.lower, check.upper, found.standard_error) == (drop.lower, drop.upper, drop.standard_error)
    assert found.images_needed is None  # it is decided


@pytest.mark.parametrize(("limit", "decision"), [(0.5, "PASS"), (math.nextafter(0.5, 0), "FAIL")])
def test_a_size_ratio_passes_at_its_limit(limit: float, decision: str) -> None:
    found = answers(1, 0.1)
    before, after = side("before", found, bytes=1000), side("candidate", found, bytes=500)
    verdict = gate_scores.judge_scores(before, after, Limits(max_drop=10.0, max_size_ratio=limit))
    assert [(check.name, check.value) for check in verdict.checks] == [("r2_drop", 0.0), ("size_ratio", 0.5)]
    assert verdict.checks[1].decision == verdict.decision == decision
    without = gate_scores.judge_scores(before, after, Limits(max_drop=10.0))
    assert [check.name for check in without.checks] == ["r2_drop"]  # what has no limit is not checked


@pytest.mark.parametrize("sizes", [(None, 500), (1000, None)])
def test_a_limit_on_sizes_that_one_side_alone_has_is_refused(sizes: tuple[int | None, int | None]) -> None:
    found = answers(1, 0.1)
    with pytest.raises(UsageError, match=r"max_size_ratio 1\.0 compares artifacts"):
        gate_scores.judge_scores(
            side("before", found, bytes=sizes[0]), side("after", found, bytes=sizes[1]),
            Limits(max_drop=1.0, max_size_ratio=1.0),
        )  # fmt: skip


@pytest.mark.parametrize("guessing", ["baseline", "candidate"])
def test_a_side_that_guesses_is_named_and_no_pass(guessing: str) -> None:
    good = answers(1, 0.1)
    guess = replace(good, outputs=np.random.default_rng(3).normal(size=good.targets.shape).astype(np.float32))
    sides = [side(name, guess if name == guessing else good) for name in ("baseline", "candidate")]
    verdict = gate_scores.judge_scores(sides[0], sides[1], Limits(max_drop=100.0))
    assert len(verdict.doubts) == 1
    assert verdict.doubts[0].startswith(f"the {guessing}'s R2 ")
    # A candidate that guesses is worse for certain; one that is better than a guess would pass without the doubt.
    assert verdict.decision == ("FAIL" if guessing == "candidate" else "INCONCLUSIVE")
    assert verdict.images_needed is None


def test_what_cannot_be_decided_says_how_many_images_would() -> None:
    before, after = side("before", answers(1, 0.3)), side("candidate", answers(2, 0.3))
    verdict = gate_scores.judge_scores(before, after, Limits(max_drop=1.0))
    scores = [outputs.scored(one.outputs, "regression") for one in (before, after)]
    drop = outputs.drop_between(scores[0], scores[1], 0.05)
    assert (verdict.decision, verdict.doubts) == ("INCONCLUSIVE", ())
    assert verdict.images_needed == outputs.images_needed(drop, IMAGES, 0.01)


@pytest.mark.parametrize(("off", "refused"), [(9e-7, False), (-9e-7, False), (1.1e-6, True), (-1.1e-6, True)])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_score_that_is_not_that_of_its_outputs_is_refused(off: float, refused: bool, wrong: int) -> None:
    sides = [side(name, answers(1, 0.1)) for name in ("before", "candidate")]
    result = sides[wrong].result
    sides[wrong] = replace(sides[wrong], result=msgspec.structs.replace(result, score=result.score + off))
    if not refused:
        assert gate_scores.judge_scores(sides[0], sides[1], Limits(max_drop=10.0)).decision == "PASS"
        return
    with pytest.raises(DataError, match=f"beside the result of {result.artifact} are not its own"):
        gate_scores.judge_scores(sides[0], sides[1], Limits(max_drop=10.0))


@pytest.mark.parametrize("other", ["the data's hash", "the names", "the values"])
def test_each_difference_of_the_images_is_enough_to_refuse(other: str) -> None:
    before, after = side("before", answers(1, 0.1)), side("candidate", answers(2, 0.1))
    if other == "the data's hash":
        after = replace(after, result=msgspec.structs.replace(after.result, data_sha256="2" * 64))
    elif other == "the names":
        after = replace(after, outputs=replace(after.outputs, names=after.outputs.names[::-1]))
    else:
        own = answers(2, 0.1)
        after = side("candidate", replace(own, targets=own.targets + np.float32(1e-3)))
    with pytest.raises(DataError, match="on data of before and the candidate on data of candidate, which"):
        gate_scores.judge_scores(before, after, Limits(max_drop=1.0))
