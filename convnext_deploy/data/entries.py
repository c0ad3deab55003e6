"""What a list, an annotation or a program says of images: an entry each, with labels as they are written there."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import DataError, counted
from .image_source import ClassOrder, ordered

PATHS = (
    "path", "image", "image_path", "file", "filename", "file_name", "filepath", "file_path", "img", "img_path",
    "image_id", "imageid", "image_name", "image_index", "id", "id_code", "name",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "classes", "class_name", "label_name", "category", "categories", "target", "targets",
    "tags", "finding_labels", "predictionstring", "value", "score",
)  # fmt: skip
MASKS = (
    "annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask",
    "semantic_segmentation", "semantic_mask", "label_map", "ground_truth", "gt",
)  # fmt: skip  # of a column of images that are masks
_OF_FILES = re.compile(r"_(path|name|(file_?)(path|name)?)$")  # behind such a name, where a column contains paths
SPLITS = ("split", "subset", "partition", "fold", "set", "usage")  # columns that say what an entry is for
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

    An image of several entries has the labels of all of them.

    Args:
        known: the labels of all entries, where these are of one split: a class that only others have has its number.
    """
    together: dict[str, list[str | int | float]] = {}
    for image, own in zip(images, labels, strict=True):
        kept = together.setdefault(image, [])
        kept += [label for label in own if label not in kept]
    notes: tuple[str, ...] = ()
    if len(together) < len(images):
        notes = (
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
    if all(_is_whole(label) for label in written):
        sets = [tuple(sorted(int(label) for label in own)) for own in together.values()]
        return Annotations(images=images, sets=sets, notes=notes)
    if all(is_number(label) for label in written):
        missing = [image for image, own in together.items() if len(own) != 1]
        if missing:
            raise DataError(f"{where} has {counted(len(together[missing[0]]), 'value')} for {missing[0]}; expected one")
        return Annotations(images=images, values=[(float(own[0]),) for own in together.values()], notes=notes)
    names = [[str(label) for label in own] for own in together.values()]
    return named(images, names, order, notes, [str(label) for label in written])


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


def _is_whole(label: str | int | float) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and WHOLE.fullmatch(label) is not None)


def _is_missing(label: str | int | float) -> bool:
    """What pandas and JSON write for a number that is not there, and what is too large for one."""
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
