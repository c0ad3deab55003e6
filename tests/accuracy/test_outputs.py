"""mAP and R2 against definitions in float64, their derivatives, and how often the gate is wrong at its limit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from convnext_deploy.accuracy import gate_scores, outputs
from convnext_deploy.accuracy.outputs import Outputs
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.records.accuracy import Limits, OutputScore, ScoreResult
from convnext_deploy.records.base import Problem

Floats = NDArray[np.float64]


def of(targets: NDArray[np.floating], found: NDArray[np.floating]) -> Outputs:
    names = tuple(map(str, range(len(targets))))
    return Outputs(names, targets.astype(np.float32), found.astype(np.float32))


def average_precision(labels: Floats, scores: Floats, weights: Floats) -> float:
    """The sum of the steps of recall times the precision there, over the thresholds that there are."""
    total, before, area = float((weights * labels).sum()), 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = float((weights * labels)[chosen].sum()) / total
        area += (recall - before) * float((weights * labels)[chosen].sum()) / float(weights[chosen].sum())
        before = recall
    return area


def r_squared(wanted: Floats, given: Floats, weights: Floats) -> float:
    mean = (weights * wanted).sum() / weights.sum()
    return float(1 - (weights * (wanted - given) ** 2).sum() / (weights * (wanted - mean) ** 2).sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 2.0, 1e9]), st.integers(2, 40))
def test_average_precision_and_its_derivative_are_those_of_the_definition(seed: int, grain: float, images: int) -> None:
    generator = np.random.default_rng(seed)
    labels = (generator.random((images, 3)) < 0.3).astype(np.float64)
    labels[0] = 1
    scores = np.round(generator.normal(size=labels.shape) * grain) / grain  # coarse ones are equal often
    found = outputs.scored(of(labels, scores), "multi-label")
    scores, one, step = scores.astype(np.float32).astype(np.float64), np.ones(images), 1e-6

    def mean(weights: Floats) -> float:
        return float(np.mean([average_precision(labels[:, k], scores[:, k], weights) for k in range(3)]))

    assert found.score == pytest.approx(mean(one), abs=1e-12)
    assert found.shares.sum() == pytest.approx(1)
    for image in range(0, images, 7):
        moved = one.copy()
        moved[image] += step
        assert found.moves[image] == pytest.approx((mean(moved) - mean(one)) / step, abs=1e-4)


def test_r_squared_and_its_derivative_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.normal(size=(30, 2)).astype(np.float32).astype(np.float64)
    given = (wanted + generator.normal(size=wanted.shape)).astype(np.float32).astype(np.float64)
    found, one = outputs.scored(of(wanted, given), "regression"), np.ones(30)
    mean = lambda weights: np.mean([r_squared(wanted[:, k], given[:, k], weights) for k in range(2)])  # noqa: E731
    assert found.score == pytest.approx(mean(one), abs=1e-12)
    moved = one.copy()
    moved[3] += 1e-6
    assert found.moves[3] == pytest.approx((mean(moved) - mean(one)) / 1e-6, abs=1e-5)


def test_labels_of_no_image_and_values_that_are_all_the_same_have_no_score() -> None:
    labels = np.array([[1, 0], [0, 0]])
    assert outputs.scored(of(labels, labels), "multi-label").per_output == (1.0, None)
    with pytest.raises(DataError, match="not one image has a label"):
        outputs.scored(of(labels * 0, labels), "multi-label")
    with pytest.raises(DataError, match="all images have the same value"):
        outputs.scored(of(labels[:, :1] * 0 + 3, labels[:, :1]), "regression")


def two_models(labels: str, change: str, images: int, generator: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Labels, a baseline's logits and a candidate's, of a whole population."""
    shares = {"frequent": (0.05, 0.1, 0.2, 0.3), "rare": (0.01, 0.02, 0.03)}[labels]
    wanted = (generator.random((images, len(shares))) < shares).astype(np.float64)
    before = generator.normal(size=wanted.shape) + 2 * wanted
    after = before.copy()
    if change == "noise on all":
        after += 0.25 * generator.normal(size=wanted.shape)
    else:  # one image in a hundred is wrong altogether
        broken = generator.random(images) < 0.01
        after[broken] = -after[broken]
    return wanted, before, after


@pytest.mark.parametrize(
    ("labels", "change", "images"),
    [
        ("frequent", "noise on all", 300),
        ("frequent", "noise on all", 1000),
        ("frequent", "few broken", 1000),  # the candidate's faults are on ten images
        pytest.param("frequent", "few broken", 3000, marks=pytest.mark.slow),
        pytest.param("rare", "noise on all", 3000, marks=pytest.mark.slow),
        ("rare", "few broken", 1000),  # most samples hold none of the images that make the drop
    ],
)
def test_a_drop_of_map_at_the_limit_passes_no_oftener_than_alpha(labels: str, change: str, images: int) -> None:
    generator, alpha, repeats = np.random.default_rng(1), 0.05, 400
    wanted, before, after = two_models(labels, change, 60_000, generator)
    whole = [outputs.scored(of(wanted, found), "multi-label") for found in (before, after)]
    limit = whole[0].score - whole[1].score
    passed = failed = 0
    for _ in range(repeats):
        chosen = generator.integers(len(wanted), size=images)
        one, other = (outputs.scored(of(wanted[chosen], found[chosen]), "multi-label") for found in (before, after))
        drop = outputs.drop_between(one, other, alpha)
        passed += drop.upper <= limit
        failed += drop.lower > limit
    most = alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert passed / repeats <= most
    assert failed / repeats <= most


def test_a_drop_of_r2_at_the_limit_passes_no_oftener_than_alpha() -> None:
    generator, alpha, repeats = np.random.default_rng(2), 0.05, 400
    wanted = generator.standard_t(6, size=(60_000, 1))
    before = wanted + 0.3 * generator.normal(size=wanted.shape)
    after = before + 0.2 * generator.normal(size=wanted.shape) * (generator.random(wanted.shape) < 0.3)
    whole = [outputs.scored(of(wanted, found), "regression") for found in (before, after)]
    limit, passed = whole[0].score - whole[1].score, 0
    for _ in range(repeats):
        chosen = generator.integers(len(wanted), size=500)
        one, other = (outputs.scored(of(wanted[chosen], found[chosen]), "regression") for found in (before, after))
        passed += outputs.drop_between(one, other, alpha).upper <= limit
    assert passed / repeats <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_a_small_drop_passes_and_a_large_one_fails_on_enough_images() -> None:
    generator = np.random.default_rng(3)
    wanted, before, _ = two_models("frequent", "noise on all", 4000, generator)
    near, far = before + 0.01 * generator.normal(size=before.shape), before + 2 * generator.normal(size=before.shape)
    limits = Limits(max_drop=1.0)
    assert judged(wanted, before, near, limits).decision == "PASS"
    assert judged(wanted, before, far, limits).decision == "FAIL"
    few = judged(wanted[:200], before[:200], before[:200], limits)
    assert few.decision == "INCONCLUSIVE"
    assert few.images_needed is not None
    assert few.images_needed > 200
    noise = generator.normal(size=before.shape)
    same = judged(wanted, noise, noise, limits)
    assert same.decision == "INCONCLUSIVE"
    assert "the baseline's mAP" in same.doubts[0]
    assert "not clearly above what answers without the images would give" in same.doubts[0]


def side(found: Outputs, problem: Problem = "multi-label") -> gate_scores.ScoredSide:
    quality = outputs.scored(found, problem)
    result = ScoreResult(
        problem=problem, artifact="a", artifact_sha256="0" * 64, data="d", data_sha256="1" * 64,
        images=len(found.names), corrupt=(), score=quality.score, exact=None, mean_absolute_error=None,
        root_mean_square_error=None, images_per_s=1.0, predictions="a.parquet",
        per_output=(OutputScore(output=0, name="0", positives=1, score=quality.per_output[0]),),
    )  # fmt: skip
    return gate_scores.ScoredSide(result=result, outputs=found)


def judged(wanted: Floats, before: Floats, after: Floats, limits: Limits) -> gate_scores.ScoreVerdict:
    return gate_scores.judge_scores(side(of(wanted, before)), side(of(wanted, after)), limits)


def test_other_images_another_problem_and_a_classifiers_limits_are_refused() -> None:
    generator = np.random.default_rng(4)
    wanted, before, after = two_models("frequent", "noise on all", 100, generator)
    one, limits = side(of(wanted, before)), Limits(max_drop=1.0)
    with pytest.raises(DataError, match="contain other images or labels"):
        gate_scores.judge_scores(one, side(of(1 - wanted, after)), limits)
    with pytest.raises(DataError, match="is a multi-label model and the candidate a regression one"):
        gate_scores.judge_scores(one, side(of(wanted, after), "regression"), limits)
    wrong = gate_scores.ScoredSide(result=one.result, outputs=of(wanted, after))
    with pytest.raises(DataError, match="are not its own; evaluate again"):
        gate_scores.judge_scores(one, wrong, limits)
    for name in ("max_class_drop", "min_agreement", "max_latency_ratio"):
        with pytest.raises(UsageError, match=f"{name} 1.0 is no limit for a multi-label model"):
            gate_scores.judge_scores(one, one, Limits(max_drop=1.0, **{name: 1.0}))
    with pytest.raises(UsageError, match="compares artifacts"):
        gate_scores.judge_scores(one, one, Limits(max_drop=1.0, max_size_ratio=1.0))
