"""What is right: what a model's outputs mean, and the labels or values of a source as these outputs would have them."""

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Artifact
from ..data import numbering, sources
from ..data.image_source import refuse_unlabelled, with_one_label
from ..errors import DataError, UsageError, counted
from ..records.base import Goal
from ..records.manifest import ModelSpec
from .predictions import Predictions

ONE_CLASS = (
    "the segmenter has one output, which is the largest on every pixel whatever it computes; "
    "export it without --argmax, and decide on its logits in your own code"
)


def problem_of(model: ModelSpec, asked: Goal | None) -> Goal:
    """What a model is judged as: a classifier as the artifact says, or the user; several outputs are classes otherwise.

    Raises:
        UsageError: no classifier and no segmenter, one output that nobody has explained, or a contradiction.
    """
    if model.task == "segment":
        if asked not in (None, "segmentation"):
            raise UsageError(
                f"--problem {asked} is for a classifier's outputs, and the model is a segmenter; leave it out"
            )
        if model.num_classes == 1:
            raise UsageError(ONE_CLASS)
        return "segmentation"
    if model.task == "detect":
        if asked not in (None, "detection"):
            raise UsageError(
                f"--problem {asked} is for a classifier's outputs, and the model is a detector; leave it out"
            )
        return "detection"
    if model.task != "classify" or model.num_classes < 1:
        raise UsageError(
            f"the model is exported for the task {model.task}; only classify, segment and detect have an accuracy"
        )
    if asked in ("segmentation", "detection"):
        raise UsageError(f"{asked} is not for a classifier, which the model is; leave it out")
    if asked is not None and model.problem not in (None, asked):
        raise UsageError(f"--problem {asked}: the artifact was exported as {model.problem}; leave the option out")
    problem = asked or model.problem
    if model.num_classes > 1:
        if problem == "binary":
            raise UsageError(f"--problem binary is for one output, and the model has {model.num_classes}; leave it out")
        return problem or "single-label"
    if problem in (None, "single-label", "multi-label"):
        raise UsageError(
            "the model has one output, which is the first of all on every image, so that its top-1 would be 100 % "
            "whatever it computes; say what it is with --problem: binary (the logit of the second of two classes) or "
            "regression"
        )
    return problem


def labelled(
    source: sources.ImageSource,
    artifact: Artifact,
    classes: dict[str, int] | None = None,
    problem: Goal = "single-label",
) -> sources.ImageSource:
    """The source with labels that are the numbers of the model's outputs; of a regression, as it is.

    Raises:
        UsageError: not a classifier.
        DataError: no labels, or labels that are not the model's.
    """
    model, labels = artifact.manifest.model, artifact.manifest.labels
    if problem == "segmentation":
        if source.masks is None:
            raise DataError(f"{source.name} has no masks; give --annotations FOLDER with a mask for each image")
        return source
    if problem == "detection":
        if source.boxes is None:
            raise DataError(f"{source.name} has no boxes; give --annotations FILE, a COCO file of instances")
        return source
    if model.task != "classify" or model.num_classes < 1:
        raise UsageError(
            f"{artifact.path} is exported for the task {model.task}; only classify, segment and detect have an accuracy"
        )
    if problem == "regression":
        if source.class_names is not None and source.labels_from == "names" and source.values is None:
            raise DataError(
                f"{source.name} has names such as {source.class_names[0]!r} in the place of values; expected a list "
                "with a number for each image, written with a point"
            )
        other = next((index for index, own in enumerate(source.label_sets or ()) if len(own) != 1), None)
        if other is not None and source.label_sets is not None:
            raise DataError(
                f"{source.name} has {counted(len(source.label_sets[other]), 'value')} for {source.names[other]}; "
                "expected one"
            )
        if source.values is None and source.labels is None:
            raise DataError(f"{source.name} has no values; expected a list with a number for each image")
        return source
    if source.values is not None:
        raise DataError(
            f"{source.name} has values such as {_not_whole(source.values):g} in the place of classes, which are whole "
            "numbers or names; a regression is evaluated with --problem regression"
        )
    refuse_unlabelled(source)
    if problem != "multi-label":
        source = with_one_label(source)
    if problem == "binary":
        return numbering.numbered(source, 2, labels if len(labels or ()) == 2 else None, classes)
    return numbering.numbered(source, model.num_classes, labels, classes)


def _not_whole(values: NDArray[np.float64]) -> float:
    """The first value that is no whole number, or the first of all."""
    broken = values[values % 1 != 0]
    return float((broken if len(broken) else values.ravel())[0])


def targets_of(source: sources.ImageSource, outputs: int, problem: Goal) -> NDArray[np.float32]:
    """What the outputs of a multi-label model or a regression are to be, (N, outputs): 0 or 1, or the values.

    Raises:
        DataError: a regression has other than one value for each output.
    """
    if problem == "regression":
        values = source.values if source.values is not None else source.labels
        assert values is not None
        values = values.reshape(len(source), -1).astype(np.float64)
        if values.shape[1] != outputs:
            raise DataError(
                f"{source.name} has {counted(values.shape[1], 'value')} an image and the model "
                f"{counted(outputs, 'output')}; expected as many"
            )
        return values.astype(np.float32)
    sets = source.label_sets
    if sets is None:
        assert source.labels is not None
        sets = tuple((label,) for label in source.labels.tolist())
    targets = np.zeros((len(source), outputs), np.float32)
    for row, labels in zip(targets, sets, strict=True):
        row[list(labels)] = 1
    return targets


def refuse_lost_classes(source: sources.ImageSource, predictions: Predictions, corrupt: tuple[str, ...]) -> None:
    """Refuse a class of which not one image can be read: the accuracy would be that of the other classes.

    Args:
        source: with labels.
        predictions: the predictions on the images that were read.
        corrupt: a line for each image that was not: its name, a colon, the reason.

    Raises:
        DataError: such a class.
    """
    assert source.labels is not None
    lost = sorted(set(source.labels.tolist()) - set(predictions.labels.tolist()))
    if not lost:
        return
    index = source.labels.tolist().index(lost[0])
    name = source.class_names[lost[0]] if source.class_names else str(lost[0])
    reason = next((line for line in corrupt if line.startswith(f"{source.names[index]}: ")), "")
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise DataError(
        f"not one image of the class {name!r}{more} of {source.name} can be read ({reason}); mend them, or remove the "
        "class: without it the accuracy would be that of the others"
    )
