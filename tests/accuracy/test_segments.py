"""mIoU against definitions of others, its derivative, and how often the gate is wrong at its limit."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from segmenters import intersections_over_unions

from convnext_deploy.accuracy import gate_scores, outputs, prediction_files, predictions, segments
from convnext_deploy.accuracy.outputs import Segments
from convnext_deploy.data import masks
from convnext_deploy.errors import CheckFailed, DataError
from convnext_deploy.records.accuracy import Limits, OutputScore, ScoreResult

CLASSES = 4


def counts(images: int, generator: np.random.Generator, noise: float = 0.3) -> Segments:
    """Of images with a class or two each, of sizes that differ, and errors that differ from image to image."""
    area = generator.integers(200, 2000, images)[:, None]
    truth = (area * generator.dirichlet(np.full(CLASSES, 0.4), images)).astype(np.int64)
    share = generator.beta(2, 2 / noise, (images, CLASSES))
    lost = (truth * share).astype(np.int64)
    predicted = truth - lost + np.roll(lost, 1, axis=1)
    return Segments(tuple(map(str, range(images))), truth - lost, truth, predicted)


def chosen(found: Segments, rows: NDArray[np.integer[Any]]) -> Segments:
    return Segments(tuple(map(str, range(len(rows)))), found.hits[rows], found.truth[rows], found.predicted[rows])


def worse(found: Segments, generator: np.random.Generator, change: str) -> Segments:
    """A candidate of the same images: some pixels more are lost everywhere, or one image in a hundred is lost."""
    if change == "noise on all":
        lost = (found.hits * generator.beta(1, 20, found.hits.shape)).astype(np.int64)
    else:
        lost = found.hits * (generator.random(len(found.hits)) < 0.01)[:, None]
    return Segments(found.names, found.hits - lost, found.truth, found.predicted - lost + np.roll(lost, 1, axis=1))


def test_the_score_is_that_of_the_sets_of_pixels(tmp_path: Path) -> None:
    """On masks of several sizes, with pixels that count nowhere, a class of answers only and one of none."""
    generator, paths, truths, answers = np.random.default_rng(0), [], [], []
    for number in range(6):
        height, width = 20 + number, 31 - 2 * number
        mask = generator.integers(0, 3, (height, width)).astype(np.uint8)
        mask[:2] = 255
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
        predicted = generator.choice([0, 1, 3], (height, width))
        truths.append(mask[mask != 255].ravel())
        answers.append((predicted, predicted[mask != 255].ravel()))
    files = masks.of_files(paths, ignored=255, reduce_labels=False)
    parts = [
        segments.counted((str(number),), [number], predicted[None], files, 5)
        for number, (predicted, _) in enumerate(answers)
    ]
    found = predictions.joined([predictions.Chunk(n, n + 1, part, ()) for n, part in enumerate(parts)]).predictions
    assert isinstance(found, Segments)
    truth, got = np.concatenate(truths), np.concatenate([kept for _, kept in answers])
    scored = outputs.scored(found, "segmentation")
    expected = intersections_over_unions(truth, got, range(4))
    assert scored.score == pytest.approx(np.mean(expected))
    assert scored.per_output == (*(pytest.approx(one) for one in expected), None)
    assert found.hits.sum() / found.truth.sum() == pytest.approx((truth == got).mean())
    for number, ((_, predicted), truth) in enumerate(zip(answers, truths, strict=True)):
        own = sorted({*truth.tolist(), *predicted.tolist()})
        assert found.per_image[number] == pytest.approx(np.mean(intersections_over_unions(truth, predicted, own)))
    path = tmp_path / "kept.npz"
    path.write_bytes(prediction_files.encode(predictions.Chunk(0, 6, found, ("7: damaged",))))
    again = prediction_files.read_outputs(path)
    assert isinstance(again, Segments)
    assert all(np.array_equal(getattr(again, name), getattr(found, name)) for name in ("hits", "truth", "predicted"))


def test_the_derivative_by_an_images_weight_is_that_of_the_definition() -> None:
    found = counts(30, np.random.default_rng(1))
    scored = outputs.scored(found, "segmentation")

    def mean(weights: NDArray[np.float64]) -> float:
        return float(np.mean((weights @ found.hits) / (weights @ found.unions)))

    one = np.ones(30)
    assert scored.score == pytest.approx(mean(one))
    assert scored.shares.sum() == pytest.approx(1)
    for image in range(0, 30, 7):
        moved = one.copy()
        moved[image] += 1e-6
        assert scored.moves[image] == pytest.approx((mean(moved) - mean(one)) / 1e-6, abs=1e-5)


@pytest.mark.parametrize("change", ["noise on all", "few broken"])
@pytest.mark.parametrize("images", [100, 500])
def test_a_drop_of_miou_at_the_limit_passes_and_fails_no_oftener_than_alpha(change: str, images: int) -> None:
    generator, alpha, repeats = np.random.default_rng(2), 0.05, 400
    before = counts(20_000, generator)
    after = worse(before, generator, change)
    limit = outputs.scored(before, "segmentation").score - outputs.scored(after, "segmentation").score
    passed = failed = 0
    for _ in range(repeats):
        rows = generator.integers(20_000, size=images)
        one, other = (outputs.scored(chosen(found, rows), "segmentation") for found in (before, after))
        drop = outputs.drop_between(one, other, alpha)
        passed += drop.upper <= limit
        failed += drop.lower > limit
    most = alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert passed / repeats <= most
    assert failed / repeats <= most


def judged(before: Segments, after: Segments, limits: Limits) -> Any:
    def side(found: Segments) -> gate_scores.ScoredSide:
        scored = outputs.scored(found, "segmentation")
        per = tuple(
            OutputScore(output=n, name=str(n), positives=1, score=one) for n, one in enumerate(scored.per_output)
        )
        result = ScoreResult(
            problem="segmentation", artifact="a", artifact_sha256="0" * 64, data="d", data_sha256="1" * 64,
            images=len(found.names), corrupt=(), score=scored.score, per_output=per, exact=None,
            mean_absolute_error=None, root_mean_square_error=None, images_per_s=1.0, predictions="a.npz",
        )  # fmt: skip
        return gate_scores.ScoredSide(result=result, outputs=found)

    return gate_scores.judge_scores(side(before), side(after), limits)


def test_verdicts_are_given_where_the_images_are_enough_and_kept_open_where_not() -> None:
    generator = np.random.default_rng(3)
    before = counts(2000, generator)
    rows = np.arange(30)
    assert judged(before, before, Limits(max_drop=1.0)).decision == "PASS"
    assert judged(before, worse(before, generator, "noise on all"), Limits(max_drop=0.5)).decision == "FAIL"
    few = judged(chosen(before, rows), chosen(before, rows), Limits(max_drop=1.0))
    assert (few.decision, few.checks[0].name) == ("INCONCLUSIVE", "miou_drop")
    assert few.images_needed > 30
    other = Segments(before.names, before.truth[::-1] * 0, before.truth, before.truth[::-1])
    assert judged(other, other, Limits(max_drop=1.0)).doubts


def test_answers_that_are_not_finite_and_masks_without_a_pixel_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "a.png")
    files = masks.of_files([tmp_path / "a.png"], ignored=255, reduce_labels=False)
    with pytest.raises(CheckFailed, match=r"outputs for a\.jpg have NaN"):
        segments.counted(("a.jpg",), [0], np.full((1, 2, 4, 4), np.nan, np.float32), files, 2)
    none = segments.counted(("a.jpg",), [0], np.zeros((1, 2, 4, 4), np.float32), files, 2)
    with pytest.raises(DataError, match="not one pixel of the masks counts"):
        outputs.scored(none, "segmentation")
