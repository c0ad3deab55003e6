"""How far images and answers lie from the calibration's: sizes, what chance makes, and how often that is exceeded."""

import math

import numpy as np
import pytest
from scipy import stats

from convnext_deploy.accuracy.drift import CHANCE, DEALS, LEAST, Recent, Shift
from convnext_deploy.data import description, preprocess
from convnext_deploy.records.manifest import Preprocessing
from convnext_deploy.records.plan import InputStatistics


def reference(classes: int, images: int, generator: np.random.Generator) -> InputStatistics:
    means, stds = generator.normal(0.5, 0.1, (images, 3)), generator.normal(0.2, 0.05, (images, 3))
    return description.statistics(means, stds, generator.integers(0, classes, images), classes)


def shift_of(found: InputStatistics, generator: np.random.Generator, images: int, move: float = 0.0) -> Shift:
    recent, classes = Recent(found), len(found.classes)
    for _ in range(images):
        mean = generator.normal(0.5 + move, 0.1, 3)
        recent.add(mean, generator.normal(0.2, 0.05, 3), int(generator.integers(0, classes)))
    shift = recent.shift()
    assert shift is not None
    return shift


@pytest.mark.parametrize(("classes", "images"), [(2, 100), (10, 500), (1000, 300)])
def test_where_nothing_has_changed_chance_is_exceeded_as_seldom_as_it_says(classes: int, images: int) -> None:
    inputs = answers = 0
    runs = 200
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        found = shift_of(reference(classes, 512, generator), generator, images)
        inputs += max(map(abs, (*found.mean, *found.std))) > found.chance
        assert found.classes is not None
        assert found.classes_chance is not None
        answers += found.classes > found.classes_chance
    most = CHANCE + 3 * np.sqrt(CHANCE / runs)
    assert inputs / runs <= most
    assert answers / runs <= most


def test_brighter_images_are_told_in_standard_deviations() -> None:
    generator = np.random.default_rng(0)
    found = shift_of(reference(10, 2000, generator), generator, 1000, move=0.05)
    assert found.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.15)
    assert min(found.mean) > found.chance > max(map(abs, found.std))


def test_other_answers_are_told_as_the_share_that_would_have_to_change() -> None:
    found = description.statistics(np.zeros((400, 1)), np.zeros((400, 1)), np.arange(400) % 4, 4)
    recent = Recent(found)
    for place in range(400):
        recent.add(np.zeros(1), np.zeros(1), place % 2)  # two of the four, twice as often
    shift = recent.shift()
    assert shift is not None
    assert shift.classes == pytest.approx(0.5)
    assert shift.classes_chance is not None
    assert shift.classes_chance < 0.15


def test_only_the_latest_images_count() -> None:
    recent = Recent(description.statistics(np.full((9, 1), 0.5), np.full((9, 1), 0.2), None, 2), size=50)
    for value in (0.9, 0.5):
        for _ in range(50):
            recent.add(np.array([value]), np.array([0.2]), 0)
    shift = recent.shift()
    assert shift is not None
    assert (shift.images, shift.mean, shift.classes) == (50, (0.0,), None)


def test_a_few_images_tell_nothing() -> None:
    recent = Recent(description.statistics(np.zeros((9, 1)), np.zeros((9, 1)), None, 2))
    for _ in range(LEAST - 1):
        recent.add(np.zeros(1), np.zeros(1), 0)
    assert recent.shift() is None


@pytest.mark.parametrize("channels", [1, 3])
def test_an_input_is_described_as_the_pixels_that_it_was_made_of(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, channels, 9, 7), np.uint8)
    wide = pixels.astype(np.float64).reshape(4, channels, -1) / 255
    preprocessing = Preprocessing(mean=(0.3, 0.4, 0.5)[:channels], std=(0.2, 0.3, 0.4)[:channels])
    for mean, std in (
        description.described(pixels),
        *(
            description.described_input(preprocess.as_input(pixels, preprocessing, kind), preprocessing, kind)
            for kind in ("uint8", "float32")
        ),
    ):
        np.testing.assert_allclose(mean, wide.mean(2), atol=1e-6)
        np.testing.assert_allclose(std, wide.std(2), atol=1e-6)


def test_an_answer_is_the_likeliest_class_or_of_one_logit_its_side() -> None:
    assert description.answered(np.array([[1, 3, 2], [5, 0, 5]], np.float32)).tolist() == [1, 0]
    assert description.answered(np.array([[0.1], [-2]], np.float32)).tolist() == [1, 0]


# What mutants of the rules showed to be untested ----------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_chance_is_that_of_the_largest_of_as_many_normal_differences_as_there_are(channels: int) -> None:
    generator = np.random.default_rng(0)
    means = generator.normal(0.5, 0.1, (512, channels))
    recent = Recent(description.statistics(means, means, None, 2))
    for mean in means[:100]:
        recent.add(mean, mean, 0)
    found = recent.shift()
    assert found is not None
    # Bonferroni's: the mean and the deviation of each channel, on both sides; one time in a hundred in all.
    assert found.chance == pytest.approx(stats.norm.isf(0.01 / (2 * channels) / 2) * math.sqrt(1 / 100 + 1 / 512))


def test_thirty_images_are_enough_and_a_thousand_are_remembered() -> None:
    recent, told = Recent(description.statistics(np.zeros((9, 1)), np.zeros((9, 1)), None, 2)), []
    for number in range(1, 1030):
        recent.add(np.zeros(1), np.zeros(1), 0)
        shift = recent.shift()
        told.append((number, None if shift is None else shift.images))
    assert told[28:30] == [(29, None), (30, 30)]
    assert told[1022:] == [(1023, 1023), *((number, 1024) for number in range(1024, 1030))]


def test_images_that_were_all_alike_are_compared_in_codes_of_8_bits() -> None:
    recent = Recent(description.statistics(np.full((99, 1), 0.5), np.full((99, 1), 0.2), None, 2))
    for _ in range(30):
        recent.add(np.array([0.5 + 3 / 255]), np.array([0.2 - 7 / 255]), 0)
    shift = recent.shift()
    assert shift is not None
    assert (*shift.mean, *shift.std) == pytest.approx((3, -7))


def test_two_in_as_many_deals_and_the_one_seen_are_the_chance_that_is_said() -> None:
    assert 2 / (DEALS + 1) == CHANCE == 0.01


def test_the_distance_of_classes_is_exceeded_as_seldom_as_enumeration_says() -> None:
    """Of two classes there is one number to deal out, whose distribution scipy has."""
    exceeded = []
    for images in range(300, 360):  # each another deal, whose chance varies; their mean does not
        answers = np.arange(images) % 2
        recent = Recent(description.statistics(np.zeros((801, 1)), np.zeros((801, 1)), np.arange(801) % 2, 2))
        for answer in answers.tolist():
            recent.add(np.zeros(1), np.zeros(1), answer)
        shift = recent.shift()
        assert shift is not None
        assert shift.classes == pytest.approx(abs(answers.mean() - 400 / 801))
        assert shift.classes_chance is not None
        ones = int(answers.sum()) + 400
        dealt = np.arange(images + 1)
        distances = np.abs(dealt / images - (ones - dealt) / 801)
        beyond = distances > shift.classes_chance + 1e-12
        exceeded.append(float(stats.hypergeom(801 + images, ones, images).pmf(dealt)[beyond].sum()))
    # A deal's second largest of 199 is exceeded in 0.0100 of the cases, the largest in 0.0050, the third in 0.0150.
    assert np.mean(exceeded) == pytest.approx(CHANCE, abs=0.002)
