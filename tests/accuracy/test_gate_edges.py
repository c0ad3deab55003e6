"""The gate exactly at its limits and at its smallest inputs, beside exact fractions and enumerated cases."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import combinations_with_replacement, product

import msgspec
import numpy as np
import pytest
from gate_sides import CLASSES, answering, flipped, side
from numpy.typing import NDArray
from scipy import stats

from convnext_deploy.accuracy import binomial, gate, statistics
from convnext_deploy.accuracy.gate import Side
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.records.accuracy import Limits
from convnext_deploy.records.timing import Timing

BEYOND = {frozenset({False}): "PASS", frozenset({True}): "FAIL", frozenset({False, True}): "INCONCLUSIVE"}


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", list(combinations_with_replacement((0.1, 0.2, 0.3), 2)))
def test_a_value_passes_where_no_point_between_its_bounds_is_above_the_limit(bounds: tuple[float, float]) -> None:
    lower, upper = bounds
    points = [point for point in (0.1, 0.2, 0.3) if lower <= point <= upper]
    expected = BEYOND[frozenset(point > 0.2 for point in points)]
    assert gate.check_of("top1_drop", 0.2, points[0], lower, upper).decision == expected


@pytest.mark.parametrize(("value", "decision"), [(0.2, "PASS"), (math.nextafter(0.2, 1), "FAIL"), (0.1, "PASS")])
def test_a_value_without_bounds_is_never_undecided(value: float, decision: str) -> None:
    assert gate.check_of("size_ratio", 0.2, value).decision == decision


@pytest.mark.parametrize("agreeing", [0, 60, 99, 100])
def test_an_agreement_whose_bound_is_the_limit_keeps_it(agreeing: int) -> None:
    bounds = binomial.share_bounds(agreeing, 100, 0.05)  # `test_binomial` holds these beside scipy's
    for bound, direction in product(bounds, (-1.0, 0.0, 1.0)):
        limit = math.nextafter(bound, direction) if direction else bound
        expected = BEYOND[frozenset(bound < limit for bound in bounds)]
        assert gate._agreement(agreeing, 100, limit, 0.05).decision == expected


@pytest.mark.parametrize(("factor", "beyond"), [(1, True), (1 - 1e-12, False)])
def test_a_class_whose_p_value_is_alpha_is_beyond_chance(factor: float, beyond: bool) -> None:
    """Ten of ten flips lost have a chance of 2^-10, and Holm's method takes that of the best of all classes."""
    labels = np.arange(600) % CLASSES
    after = labels.copy()
    after[np.flatnonzero(labels == 4)[:10]] = 5
    limits = Limits(max_drop=5, max_class_drop=10, alpha=CLASSES / 2**10 * factor)
    verdict = gate.judge(answering(labels, labels), answering(after, labels), limits)
    assert [row.label for row in verdict.per_class if row.beyond_chance] == [4] * beyond
    assert verdict.checks[1].value == pytest.approx(0.2 if beyond else 0.0)
    assert verdict.checks[1].decision == ("FAIL" if beyond else "PASS")


def timing() -> Timing:
    return Timing(artifact="model", batch=1, threads=1, samples_ms=(1.0,) * 40, median_ms=1.0, images_per_s=1)


def test_what_is_measured_and_has_no_limit_is_not_checked() -> None:
    before, after = (replace(one, bytes=100, timing=timing()) for one in flipped(2000, 0, 0))
    assert [check.name for check in gate.judge(before, after, Limits(max_drop=1)).checks] == ["top1_drop"]


@pytest.mark.parametrize("measured", [0, 1])
@pytest.mark.parametrize("name", ["max_size_ratio", "max_latency_ratio"])
def test_a_limit_on_what_one_side_alone_has_is_refused(name: str, measured: int) -> None:
    sides = list(flipped(2000, 0, 0))
    sides[measured] = replace(sides[measured], bytes=100, timing=timing())
    with pytest.raises(UsageError, match=f"{name} 1.0 compares artifacts"):
        gate.judge(sides[0], sides[1], gate.limits_from({"max_drop": 1, name: 1}))


def test_a_setting_that_is_no_limit_is_refused_in_python_too() -> None:
    with pytest.raises(UsageError, match=r"limits: .*max_drp"):
        gate.limits_from({"max_drop": 1, "max_drp": 2})


def test_the_largest_class_drop_is_of_what_was_lost_less_what_was_gained() -> None:
    """100 images of each class; of class 0 40 are lost and 15 gained, of class 1 30 lost, of class 2 20 lost."""
    labels = np.arange(100 * CLASSES) % CLASSES
    before, after = labels.copy(), labels.copy()
    for label, lost, gained in ((0, 40, 15), (1, 30, 0), (2, 20, 0)):
        places = np.flatnonzero(labels == label)
        after[places[:lost]] = 7
        before[places[lost : lost + gained]] = 7
    verdict = gate.judge(answering(before, labels), answering(after, labels), Limits(max_drop=50, max_class_drop=10))
    assert [row.label for row in verdict.per_class if row.beyond_chance] == [0, 1, 2]
    assert verdict.checks[1].value == pytest.approx(0.3)


# Chance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "images", "one_in", "above"),
    [(19, 55, 6, True), (12, 32, 7, True), (17, 47, 6, False), (10, 24, 7, False)],  # the closest to one in a thousand
)
def test_above_chance_is_what_chance_does_once_in_a_thousand_times_at_most(
    count: int, images: int, one_in: int, above: bool
) -> None:
    share = Fraction(1, one_in)
    exact = sum(math.comb(images, n) * share**n * (1 - share) ** (images - n) for n in range(count, images + 1))
    assert (exact <= Fraction(1, 1000)) == above
    assert Fraction(99, 100_000) <= exact <= Fraction(101, 100_000)
    assert statistics.is_above_chance(count, images, 1 / one_in) == above


def wrong_on(images: int, first: int, second: int) -> tuple[Side, Side]:
    """Two models that are right on 600 images; on more, one answers so many classes beyond the label, and the other."""
    labels = np.arange(600 + images) % CLASSES
    sides = []
    for shift in (first, second):
        answers = labels.copy()
        answers[600:] = (labels[600:] + shift) % CLASSES
        sides.append(answering(answers, labels))
    return sides[0], sides[1]


@pytest.mark.parametrize(("images", "doubts"), [(29, 0), (30, 1)])
def test_images_that_both_get_wrong_cast_doubt_where_there_are_thirty(images: int, doubts: int) -> None:
    verdict = gate.judge(*wrong_on(images, 1, 2), Limits(max_drop=50))
    assert len(verdict.doubts) == doubts
    assert verdict.decision == ("INCONCLUSIVE" if doubts else "PASS")


def test_two_models_that_give_all_images_the_same_wrong_class_are_not_doubted_for_it() -> None:
    labels = np.r_[np.arange(600) % CLASSES, np.full(40, 3)]
    answers = np.r_[np.arange(600) % CLASSES, np.full(40, 7)]  # all the same, so that chance would agree as often
    assert gate.judge(answering(answers, labels), answering(answers, labels), Limits(max_drop=50)).doubts == ()


@pytest.mark.parametrize("guessing", ["baseline", "candidate"])
def test_a_side_that_guesses_is_named(guessing: str) -> None:
    labels = np.arange(600) % CLASSES
    guesses = np.random.default_rng(0).integers(0, CLASSES, 600)
    sides = [answering(guesses if name == guessing else labels, labels) for name in ("baseline", "candidate")]
    verdict = gate.judge(sides[0], sides[1], Limits(max_drop=100))
    assert verdict.doubts[0].startswith(f"the {guessing}'s top-1 ")
    assert verdict.decision == "INCONCLUSIVE"


# What is counted -----------------------------------------------------------------------------------------------------


def logits(images: int, classes: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    return labels, 3 * np.eye(classes)[labels] + generator.normal(size=(images, classes))


def test_the_divergence_of_a_verdict_is_the_mean_of_scipys_and_two_classes_are_enough() -> None:
    labels, first = logits(400, 2, 0)
    second = first + np.random.default_rng(1).normal(scale=0.3, size=first.shape)
    verdict = gate.judge(side(first, labels), side(second, labels), Limits(max_drop=50))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first, second))
    assert verdict.kl_at_least == pytest.approx(stats.entropy(p, q, axis=1).mean(), rel=1e-3)
    assert verdict.confident == int((np.abs(first[:, 0] - first[:, 1]) >= math.log(2)).sum())


def test_the_divergence_is_that_of_the_classes_known_of_both_and_the_rest_as_one() -> None:
    labels, first = logits(60, 9, 2)
    second = first + np.random.default_rng(3).normal(scale=2, size=first.shape)
    labels[::3] = (labels[::3] + 4) % 9  # of which many are in the five of one model or of none
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first, second))
    expected = []
    for a, b, label in zip(p, q, labels.tolist(), strict=True):
        known = sorted({label} | set(np.argsort(-a)[:5].tolist()) & set(np.argsort(-b)[:5].tolist()))
        merged = [np.append(shares[known], 1 - shares[known].sum()) for shares in (a, b)]
        expected.append(stats.entropy(*merged))
    sides = side(first, labels), side(second, labels)
    assert gate._divergence(sides[0].predictions, sides[1].predictions) == pytest.approx(expected, abs=1e-5)


def test_a_result_that_says_otherwise_of_images_or_classes_than_its_predictions_is_refused() -> None:
    before, after = flipped(240, 4, 1)
    result = before.result
    fewer = msgspec.structs.replace(result.per_class[0], images=result.per_class[0].images - 1)
    for other in (
        msgspec.structs.replace(result, images=241),
        msgspec.structs.replace(result, top1=result.top1 - 0.01),
        msgspec.structs.replace(result, per_class=(fewer, *result.per_class[1:])),
        msgspec.structs.replace(result, per_class=(*result.per_class, result.per_class[0])),
    ):
        with pytest.raises(DataError, match="are not its own"):
            gate.judge(replace(before, result=other), after, Limits(max_drop=1))


def test_predictions_of_no_image_are_refused() -> None:
    before, after = flipped(1, 0, 0)
    nothing = replace(
        before.predictions, names=(), labels=before.predictions.labels[:0],
        top_classes=before.predictions.top_classes[:0], top_log_probs=before.predictions.top_log_probs[:0],
        label_log_prob=before.predictions.label_log_prob[:0],
    )  # fmt: skip
    empty = msgspec.structs.replace(before.result, images=0, per_class=())
    with pytest.raises(DataError, match="are not its own"):
        gate.judge(replace(before, result=empty, predictions=nothing), after, Limits(max_drop=1))


# Latency -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0, 16.0)])
def test_medians_are_drawn_as_enumeration_of_the_blocks_says(samples: tuple[float, ...]) -> None:
    """Of four samples two blocks of two, of five two of three: each begins anywhere and goes on at the beginning."""
    count = len(samples)
    length = 2 if count == 4 else 3
    exact = dict.fromkeys(np.unique(np.add.outer(samples, samples) / 2).tolist(), 0.0)
    for starts in product(range(count), repeat=2):
        drawn = [samples[(start + step) % count] for start in starts for step in range(length)]
        exact[float(np.median(drawn))] += 1 / count**2
    medians = statistics._resampled_medians(samples, np.random.default_rng(5)).tolist()
    assert len(medians) == 1000
    for median, share in exact.items():
        assert medians.count(median) / 1000 == pytest.approx(share, abs=3.5 * math.sqrt(share * (1 - share) / 1000))


@pytest.mark.parametrize("count", [1, 999, 3000, 7001])  # of which 3000 and 7001 are drawn in several parts
def test_every_one_of_the_medians_is_drawn(count: int) -> None:
    samples = np.full(count, 5.0)
    assert (statistics._resampled_medians(samples.tolist(), np.random.default_rng(0)) == 5).all()


def test_a_ratio_is_that_of_the_medians_and_its_bounds_are_quantiles() -> None:
    many, few = np.random.default_rng(0).gamma(2, size=(2, 300))
    ratio, lower, upper = statistics.ratio_of_medians(many.tolist(), few.tolist(), 0.1)
    assert ratio == np.median(many) / np.median(few)
    generator = np.random.default_rng(1)  # other draws, of the same blocks of 18
    drawn = []
    for samples in (many, few):
        starts = generator.integers(300, size=(20_000, 17, 1))
        drawn.append(np.median(samples[(starts + np.arange(18)) % 300].reshape(20_000, -1), axis=1))
    expected = np.quantile(drawn[0] / drawn[1], [0.1, 0.9])
    assert (lower, upper) == pytest.approx(expected, rel=0.02)
    again = statistics.ratio_of_medians(many.tolist(), few.tolist(), 0.1)
    assert again == (ratio, lower, upper)
    assert statistics.ratio_of_medians((3.0,) * 9, (2.0,) * 4, 0.05) == (1.5, 1.5, 1.5)
