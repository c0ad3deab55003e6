"""Boxes beside images: a COCO file of instances, with each category as the number of the model's class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from ..errors import DataError, counted, plain
from ..records.base import content_of
from .coco import CocoCategory, CocoImage, CocoObject
from .image_lists import MAX_LIST_BYTES
from .image_source import Boxes, ImageSource, chosen


class _Object(CocoObject):
    bbox: tuple[float, float, float, float]  # left, top, width, height
    area: float | None = None
    iscrowd: int = 0


class _Coco(msgspec.Struct):
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[_Object]


def boxed(source: ImageSource, file: Path, numbers: Mapping[str, int] | None, classes: int) -> ImageSource:
    """The source with the objects of each image; images that the file does not name are left out, and said.

    Args:
        file: COCO's, such as `instances_val2017.json`.
        numbers: the class of each category's name; None: a category's id is its class, as torchvision's training
            scripts number them.
        classes: how many the model has.

    Raises:
        DataError: the file cannot be read, names other images, or has a category that is no class of the model.
    """
    found = _read(file)
    number_of = _numbered(found.categories, numbers, classes, file)
    ids = _ids(found.images, file)
    kept = [index for index, name in enumerate(source.names) if name in ids]
    if not kept:
        raise DataError(
            f"{file} names none of the {len(source):,} images of {source.name}, such as {source.names[0]}; give the "
            "folder that its file_name begin in with --data"
        )
    notes = source.notes
    if numbers is None:
        notes = (*notes, "the categories' ids are taken for the numbers of the classes (--labels FILE otherwise)")
    if len(kept) < len(source):
        notes = (*notes, f"left out: {counted(len(source) - len(kept), 'image')} that {file.name} does not name")
    missing = len(ids) - len(kept)
    if missing:
        notes = (*notes, f"not in {source.name}: {counted(missing, 'image')} of {file.name}")
    rows: dict[int | str, list[tuple[float, ...]]] = {}
    for one in found.annotations:
        if one.category_id not in number_of:
            raise DataError(f"{file}: an object has the category {one.category_id}, which categories does not list")
        left, top, width, height = one.bbox
        if not (np.isfinite(one.bbox).all() and width >= 0 and height >= 0):
            raise DataError(f"{file}: the bbox {list(one.bbox)} of image {one.image_id}; expected x, y, width, height")
        area = width * height if one.area is None else one.area
        row = (left, top, left + width, top + height, number_of[one.category_id], area, float(one.iscrowd != 0))
        rows.setdefault(one.image_id, []).append(row)
    wanted = tuple(np.array(rows.get(ids[source.names[index]], []), np.float64).reshape(-1, 7) for index in kept)
    bare = replace(source, labels=None, label_sets=None, values=None, class_names=None)
    return replace(chosen(bare, kept), boxes=Boxes(wanted), notes=notes)


def _read(file: Path) -> _Coco:
    try:
        return msgspec.json.decode(content_of(file, MAX_LIST_BYTES), type=_Coco)
    except OSError as error:
        raise DataError(f"--annotations {file} cannot be read: {plain(error)}; expected a COCO file") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"--annotations {file} is no COCO file with images, categories and annotations: {plain(error)}"
        ) from None


def _ids(images: Sequence[CocoImage], file: Path) -> dict[str, int | str]:
    ids: dict[str, int | str] = {}
    for image in images:
        if image.file_name in ids:
            raise DataError(f"{file} has {image.file_name} twice; expected each image once")
        ids[image.file_name] = image.id
    if len(set(ids.values())) < len(ids):
        twice, _ = Counter(ids.values()).most_common(1)[0]
        raise DataError(f"{file} gives the id {twice} to two images, whose objects cannot be told apart")
    return ids


def _numbered(
    categories: Sequence[CocoCategory], numbers: Mapping[str, int] | None, classes: int, file: Path
) -> dict[int, int]:
    """The class of each category's id."""
    strange = [one for one in categories if numbers is not None and one.name not in numbers]
    if strange and numbers is not None:
        raise DataError(
            f"{file} has the category {strange[0].name!r}, which is no class of the model, such as "
            f"{next(iter(numbers))!r}; give --labels FILE with the model's classes in their order"
        )
    found = {one.id: one.id if numbers is None else numbers[one.name] for one in categories}
    beyond = [number for number in found.values() if not 0 <= number < classes]
    if beyond:
        raise DataError(
            f"{file} has a category with the id {beyond[0]}, and the model has {counted(classes, 'class')}, 0 to "
            f"{classes - 1}; "
            "give --labels FILE with the names of the model's classes in their order"
        )
    return found
