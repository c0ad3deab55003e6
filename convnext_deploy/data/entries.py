"""What a list, an annotation or a program says of images: an entry each, with labels as they are written there."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import DataError, counted
from .image_source import ClassOrder, ImageSource, ordered, unique

PATHS = (
    "path", "image", "image_path", "file", "filename", "file_name", "filepath", "file_path", "img", "img_path",
    "image_id", "imageid", "image_name", "image_index", "id", "id_code", "name",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "classes", "class_name", "label_name", "category", "categories", "target", "targets",
    "tags", "finding_labels", "predictionstring", "value", "score", "gt_label", "choice",
)  # fmt: skip
NUMBERS = (
    "class_id", "label_id", "category_id", "class_idx", "label_idx", "class_index", "label_index", "class_number",
    "label_number",
)  # fmt: skip  # of a column that numbers the classes beside their names
MASKS = (
    "annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask",
    "semantic_segmentation", "semantic_mask", "label_map", "ground_truth", "gt", "seg",
)  # fmt: skip  # of a column of images that are masks
_OF_FILES = re.compile(r"_(path|name|(file_?)(path|name)?)$")  # behind such a name, where a column contains paths
SPLITS = ("split", "subset", "partition", "fold", "set", "usage", "is_valid")  # columns that say what an entry is for
_MISSING = {"none", "null", "na", "n/a", "<na>", "#n/a", "-", "?"}  # beside numbers
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")  # a number of a class as text


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What a file says of images, an entry each. At most one of `sets` and `values` is there."""

    images: list[str]  # paths, or names without a suffix
    sets: list[tuple[int, ...]] | None = None
    values: list[tuple[float, ...]] | None = None
    class_names: tuple[str, ...] | None = None
    ordered_by: str | None = None  # what numbered the class names, where the file itself does not
    notes: tuple[str, ...] = ()
    columns: dict[str, list[str]] = field(default_factory=dict)  # paths of other images of each, "" where it has none


def word(cell: str) -> str:
    """A column's name in one way of writing it."""
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def is_of_masks(column: str) -> bool:
    """Whether a column of images is called as those of masks are, such as `mask` and `label_path`."""
    return _OF_FILES.sub("", word(column)) in MASKS


def by_labels(
    images: list[str],
    labels: Sequence[Sequence[str | int | float]],
    order: ClassOrder,
    where: Path | str,
    known: Sequence[Sequence[str | int | float]] = (),
) -> Annotations:
    """Entries with labels as they are written: whole numbers count as numbers, others as values, words as names.

    An image of several entries has the labels of all of them. Lists of one length that contain 0 and 1 alone say of
    each class whether it is there, unless all are the classes 0 and 1. Such with a value are those of several outputs.

    Args:
        known: the labels of all entries, where these are of one split: a class that only others have has its number.

    Raises:
        DataError: a label is not finite, or values are more or less than one an image.
    """
    notes: tuple[str, ...] = ()
    rows = [*labels, *known]
    if len({len(own) for own in rows}) == 1 and len(rows[0]) > 1:
        if _are_hot(rows):
            labels, known = [[index for index, one in enumerate(own) if _as_whole(one)] for own in labels], ()
            notes = ("labels of 0 and 1 in lists of one length say of each class whether an image has it",)
        elif {type(one) for own in rows for one in own} in ({float}, {float, int}):
            return _of_outputs(images, labels, where)
    together: dict[str, list[str | int | float]] = {}
    for image, own in zip(images, labels, strict=True):
        kept = together.setdefault(image, [])
        kept += [label for label in own if label not in kept]
    if len(together) < len(images):
        notes += (
            f"named again: {counted(len(images) - len(together), 'entry')}; an image has the labels of all of "
            "its entries",
        )
    written = [label for own in together.values() for label in own]
    images = list(together)
    if not written:
        return Annotations(images=images, notes=notes)
    bare = next((label for label in written if _is_missing(label)), None)
    if bare is not None and any(is_number(label) for label in written):
        image = next(image for image, own in together.items() if bare in own)
        raise DataError(
            f"{where} has the label {bare} for {image} among numbers; expected a number, or an empty one where an "
            "image has no label"
        )
    written += [label for own in known for label in own]
    pointed = next((label for label in written if not _is_whole(label)), None)
    if all(_is_whole(label) or _is_pointed(label) for label in written):
        if pointed is not None:
            notes += (
                f"whole numbers with a point, such as {pointed}, are taken as without one: for classes, or for the "
                "values of a regression",
            )
        sets = [tuple(sorted({_as_whole(label) for label in own})) for own in together.values()]
        return Annotations(images=images, sets=sets, notes=notes)
    if all(is_number(label) for label in written):
        missing = [image for image, own in together.items() if len(own) != 1]
        if missing:
            raise DataError(f"{where} has {counted(len(together[missing[0]]), 'value')} for {missing[0]}; expected one")
        return Annotations(images=images, values=[(float(own[0]),) for own in together.values()], notes=notes)
    names = [[str(label) for label in own] for own in together.values()]
    return named(images, names, order, notes, [str(label) for label in written])


def _are_hot(rows: Sequence[Sequence[str | int | float]]) -> bool:
    """Whether rows are of 0 and 1 and no lists of classes: these have none twice, and do not all have the same two."""
    if not all((_is_whole(one) or _is_pointed(one)) and _as_whole(one) in (0, 1) for own in rows for one in own):
        return False
    return len({tuple(map(_as_whole, own)) for own in rows}) > 1 or any(len({*own}) < len(own) for own in rows)


def _of_outputs(images: list[str], labels: Sequence[Sequence[str | int | float]], where: Path | str) -> Annotations:
    """A value for each of several outputs."""
    if len(set(images)) < len(images):
        raise DataError(f"{where} names an image twice, {twice(images)}; expected an entry an image")
    values = [tuple(float(value) for value in own) for own in labels]
    if not all(math.isfinite(value) for row in values for value in row):
        raise DataError(f"{where} contains a value that is not finite; expected numbers")
    return Annotations(images=images, values=values)


def twice(images: Sequence[str]) -> str:
    """The first image of those that are named again."""
    names: set[str] = set()
    return next(image for image in images if image in names or names.add(image))  # type: ignore[func-returns-value]


def beside_of(
    annotations: Annotations, images: Sequence[str], columns: Mapping[str, Sequence[str]], where: Path | str
) -> Annotations:
    """The annotations with other images of each entry, such as masks, by the names of their columns.

    A column in which an image named again has another path is left out where the list has labels too, and said.

    Args:
        images: of all entries, as they came: an image of several entries is one of the annotations.

    Raises:
        DataError: an image has two others, and the list has no labels.
    """
    kept: dict[str, list[str]] = {}
    notes = annotations.notes
    for name, paths in columns.items():
        path_of: dict[str, str] = {}
        again = next(
            (image for image, path in zip(images, paths, strict=True) if path_of.setdefault(image, path) != path), None
        )
        if again is None:
            kept[name] = [path_of[image] for image in annotations.images]
            continue
        if annotations.values is None and not any(annotations.sets or ()):
            raise DataError(f"{where} has several images in the column {name} for {again}; expected an entry an image")
        notes = (*notes, f"left out: the column {name}, which has several images for {again}")
    return replace(annotations, columns=kept, notes=notes)


def named(
    images: list[str],
    names: Sequence[Sequence[str]],
    order: ClassOrder,
    notes: tuple[str, ...] = (),
    known: Sequence[str] = (),
) -> Annotations:
    """Entries with class names, numbered in an order that nobody has said; `known` are names of other entries."""
    classes = ordered(sorted({*known, *(name for label_names in names for name in label_names)}), order)
    number = {name: index for index, name in enumerate(classes)}
    return Annotations(
        images=images,
        sets=[tuple(sorted({number[name] for name in label_names})) for label_names in names],
        class_names=tuple(classes),
        ordered_by=f"the class names sorted {'by name' if order == 'torchvision' else 'as timm does'}",
        notes=notes,
    )


def in_order_of(
    entries: Annotations, labels: Sequence[Sequence[str | int | float]], numbers: Sequence[str], column: str,
    where: Path | str,
) -> Annotations:  # fmt: skip
    """Entries with class names, numbered as a column beside the names has it: from 0 or 1 on, without a gap.

    Args:
        labels: of all entries, also those of other splits.
        numbers: likewise, in the column's words.

    Raises:
        DataError: a class has two numbers, or a number two classes.
    """
    pairs = [(own, number) for own, number in zip(labels, numbers, strict=True) if own]
    if entries.class_names is None or any(len(own) > 1 for own, _ in pairs):
        return entries
    strange = next((number for _, number in pairs if not (_is_whole(number) or _is_pointed(number))), None)
    if strange is not None:
        note = f"not used: {column}, which contains {strange} beside the class names"
        return replace(entries, notes=(*entries.notes, note))
    number_of: dict[str, int] = {}
    for (label, *_), number in pairs:
        known = number_of.setdefault(str(label), _as_whole(number))
        if known != _as_whole(number):
            raise DataError(
                f"{where} gives the class {label} the numbers {known} and {number} in {column}; expected one"
            )
    names = sorted(number_of, key=number_of.__getitem__)
    of_names = [number_of[name] for name in names]
    again = next((index for index in range(1, len(names)) if of_names[index] == of_names[index - 1]), None)
    if again is not None:
        raise DataError(
            f"{where} gives the classes {names[again - 1]} and {names[again]} the number {of_names[again]} in "
            f"{column}; expected one each"
        )
    if of_names[0] not in (0, 1) or of_names[-1] - of_names[0] + 1 != len(names):
        note = f"not used: the numbers in {column}, which have gaps"
        return replace(entries, notes=(*entries.notes, note))
    place = [names.index(name) for name in entries.class_names]
    sets = [tuple(sorted(place[label] for label in own)) for own in entries.sets or ()]
    return replace(entries, sets=sets, class_names=tuple(names), ordered_by=None)


def source_of(
    name: str, annotations: Annotations, read_bytes: Callable[[int], bytes], notes: tuple[str, ...]
) -> ImageSource:
    """The source of what annotations say, whoever wrote them."""
    labels, sets = None, annotations.sets
    if sets is not None and all(len(one) == 1 for one in sets):
        labels, sets = np.array([one[0] for one in sets], np.int64), None
        if (labels == -1).all():
            labels = None
    return ImageSource(
        name=name,
        names=unique(annotations.images),
        labels=labels,
        label_sets=None if sets is None else tuple(sets),
        values=None if annotations.values is None else np.array(annotations.values, np.float64),
        class_names=annotations.class_names,
        read_bytes=read_bytes,
        labels_from="column" if annotations.ordered_by is None else "names",
        ordered_by=annotations.ordered_by or "",
        notes=notes,
    )


def _is_whole(label: str | int | float) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and WHOLE.fullmatch(label) is not None)


def _is_pointed(label: str | int | float) -> bool:
    """Whether it is a whole number with a point, as pandas writes those of a column where one is missing."""
    if isinstance(label, float):
        return label.is_integer() and abs(label) < 1e9
    return isinstance(label, str) and re.fullmatch(r"-?(0|[1-9]\d{0,8})\.0*", label) is not None


def _as_whole(label: str | int | float) -> int:
    return int(float(label)) if _is_pointed(label) else int(label)


def _is_missing(label: str | int | float) -> bool:
    """What pandas and JSON write for a number that is not there, and what is too large for one."""
    if isinstance(label, str) and label.lower() in _MISSING:
        return True
    try:
        return not math.isfinite(float(label))
    except ValueError:
        return False


def is_number(label: str | int | float) -> bool:
    """Whether it is a finite number, or the text of one; 007 is a name."""
    try:
        return math.isfinite(float(label)) and not (isinstance(label, str) and re.match(r"-?0\d", label))
    except ValueError:
        return False
