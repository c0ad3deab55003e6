"""What outputs mean, and what they are to be: the rules of each problem, without a model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convnext_deploy.accuracy.targets import labelled, problem_of, refuse_lost_classes, targets_of
from convnext_deploy.data.image_source import ImageSource
from convnext_deploy.errors import DataError, UsageError


def model(classes: int = 3, problem: Any = None, task: str = "classify") -> Any:
    return SimpleNamespace(task=task, num_classes=classes, problem=problem)


def artifact(of: Any, labels: tuple[str, ...] | None = None) -> Any:
    return SimpleNamespace(path="artifact", manifest=SimpleNamespace(model=of, labels=labels))


def source(**fields: Any) -> ImageSource:
    names = ("a.png", "b.png", "c.png", "d.png")
    given = {"name": "images", "names": names, "labels": None, "class_names": None, "read_bytes": lambda _: b""}
    return ImageSource(**(given | fields))


LABELS = np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("classes", "recorded", "asked", "expected"),
    [
        (3, None, None, "single-label"),
        (2, None, None, "single-label"),
        (3, "multi-label", None, "multi-label"),
        (3, "multi-label", "multi-label", "multi-label"),
        (3, None, "regression", "regression"),
        (1, None, "binary", "binary"),
        (1, "binary", None, "binary"),
        (1, None, "regression", "regression"),
        (3, "multi-label", "single-label", "the artifact was exported as multi-label"),
        (2, None, "binary", "for one output, and the model has 2"),
        (1, None, None, "the model has one output"),
        (1, None, "single-label", "the model has one output"),
        (1, None, "multi-label", "the model has one output"),
        (0, None, None, "only classify, segment and detect have an accuracy"),
    ],
)
def test_what_outputs_mean_is_recorded_asked_or_refused(classes: int, recorded: Any, asked: Any, expected: str) -> None:
    if " " in expected:
        with pytest.raises(UsageError, match=expected):
            problem_of(model(classes, recorded), asked)
    else:
        assert problem_of(model(classes, recorded), asked) == expected


def test_what_is_no_classifier_has_no_labels() -> None:
    for other in (model(task="features"), model(classes=0)):
        with pytest.raises(UsageError, match="only classify, segment and detect have an accuracy"):
            problem_of(other, None)
        with pytest.raises(UsageError, match="only classify, segment and detect have an accuracy"):
            labelled(source(labels=LABELS), artifact(other))


def test_a_regression_takes_values_or_labels_as_they_are_and_the_others_take_no_values() -> None:
    values = source(values=np.array([[0.5], [1.0], [2.0], [3.0]]))
    assert labelled(values, artifact(model(1)), None, "regression") is values
    by_label = source(labels=LABELS)
    assert labelled(by_label, artifact(model(1)), None, "regression") is by_label
    with pytest.raises(DataError, match="has no values; expected a list"):
        labelled(source(), artifact(model(1)), None, "regression")
    names = source(labels=LABELS, class_names=("1,5", "2,5", "3,5"), labels_from="names")
    with pytest.raises(DataError, match="has names such as '1,5' in the place of values; expected a list"):
        labelled(names, artifact(model(1)), None, "regression")
    missing = source(label_sets=((1,), (), (2,), (3,)))
    with pytest.raises(DataError, match=r"images has 0 values for b\.png; expected one"):
        labelled(missing, artifact(model(1)), None, "regression")
    with pytest.raises(DataError, match=r"has values such as 0\.5 in the place of classes"):
        labelled(values, artifact(model()))
    with pytest.raises(DataError, match="has no labels; expected class folders"):
        labelled(source(), artifact(model()))


def test_a_segmenter_of_one_output_has_no_classes_to_be_judged_by() -> None:
    with pytest.raises(UsageError, match="the segmenter has one output, which is the largest on every pixel"):
        problem_of(model(1, task="segment"), None)


def test_a_binary_model_has_two_classes_though_one_output() -> None:
    two = source(labels=np.array([0, 1, 1, 0]))
    found = labelled(two, artifact(model(1), ("no", "yes")), None, "binary")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 1, 0]
    with pytest.raises(DataError):
        labelled(source(labels=LABELS), artifact(model(1)), None, "binary")


def test_targets_are_ones_where_an_image_has_the_label_and_the_values_of_a_regression() -> None:
    sets = source(label_sets=((0, 2), (), (1,), (0, 1, 2)))
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    found = targets_of(sets, 3, "multi-label")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(targets_of(source(labels=LABELS), 3, "multi-label"), np.eye(3)[LABELS])
    np.testing.assert_array_equal(targets_of(source(labels=LABELS), 1, "regression"), LABELS[:, None])
    pairs = source(values=np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(targets_of(pairs, 2, "regression"), pairs.values)
    with pytest.raises(DataError, match="has 2 values an image and the model 3 outputs; expected as many"):
        targets_of(pairs, 3, "regression")


def test_a_class_without_a_readable_image_is_named_with_the_reason() -> None:
    given = source(labels=LABELS, class_names=("cat", "dog", "owl"))
    refuse_lost_classes(given, SimpleNamespace(labels=np.array([0, 1, 2])), ("d.png: broken",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"of the class 'owl' of images can be read \(c\.png: broken\)"):
        refuse_lost_classes(given, SimpleNamespace(labels=np.array([0, 1])), ("c.png: broken",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"of the class '1' and 1 more of images can be read \(b\.png: no image\)"):
        refuse_lost_classes(
            source(labels=LABELS),
            SimpleNamespace(labels=np.array([0])),  # type: ignore[arg-type]
            ("b.png: no image", "c.png: x", "d.png: y"),
        )
