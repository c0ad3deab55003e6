"""Boxes beside images: a COCO file of instances, with each category as the number of the model's class."""

import codecs
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..env import needs
from ..errors import DataError, counted, plain
from ..records.base import content_of
from . import other_tools
from .coco import CocoCategory, CocoImage, CocoObject
from .image_lists import MAX_LIST_BYTES
from .image_source import Boxes, ImageSource, chosen

MOST_SIDE = 2**16  # pixels of an image with masks
MOST_TIMES = 4  # a side of the image, for how far from its corner a polygon may have points
MOST_OUTLINE = 2**24  # pixels of a polygon; pycocotools takes about 60 bytes for each
_MOST_CHARACTERS = 8  # of a run length: 40 bits


class _Object(CocoObject):
    bbox: tuple[float, float, float, float]  # left, top, width, height
    area: float | None = None
    iscrowd: int | bool | None = 0
    segmentation: Any = None  # polygons, or run lengths


class _Image(CocoImage):
    height: float | None = None  # pixels; some writers have 480.0, and null where they did not open the image
    width: float | None = None


class _Coco(msgspec.Struct):
    images: list[_Image]
    categories: list[CocoCategory]
    annotations: list[_Object]


def boxed(
    source: ImageSource, file: Path, numbers: Mapping[str, int] | None, classes: int, masks: bool = False
) -> ImageSource:
    """The source with the objects of each image; images that the file does not name are left out, and said.

    Args:
        file: COCO's, such as `instances_val2017.json`.
        numbers: the class of each category's name; None: a category's id is its class, as torchvision's training
            scripts number them.
        classes: how many the model has.
        masks: whether the model outputs masks, so that those of the objects are read where all have one.

    Raises:
        DataError: the file cannot be read, names other images, or has a category that is no class of the model.
    """
    coco = _read(file)
    number_of = _numbered(coco.categories, numbers, classes, file)
    ids = _ids(coco.images, {*source.names}, file)
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
    sides = {one.id: (int(one.height or 0), int(one.width or 0)) for one in coco.images}
    strange = sum(one.image_id not in sides for one in coco.annotations)
    if strange and strange == len(coco.annotations):
        raise DataError(
            f"{file}: none of its {counted(strange, 'object')} is of an image that it lists, such as "
            f"{coco.annotations[0].image_id!r}; expected an image's id ({next(iter(sides))!r} is one) as image_id"
        )
    if strange:
        notes = (*notes, f"left out: {counted(strange, 'object')} of images that {file.name} does not list")
    bare_objects = sum(not one.segmentation for one in coco.annotations) if masks else 0
    if bare_objects:
        where = f"{bare_objects:,} of {counted(len(coco.annotations), 'object')} of {file.name}"
        notes = (*notes, f"masks are not judged: {where} without a segmentation")
    masks = masks and not bare_objects
    encoded: dict[int | str, list[bytes]] = {}
    rows: dict[int | str, list[tuple[float, ...]]] = {}
    for one in coco.annotations:
        if one.image_id not in sides:
            continue
        if one.category_id not in number_of:
            raise DataError(f"{file}: an object has the category {one.category_id}, which categories does not list")
        left, top, width, height = one.bbox
        if not (np.isfinite(one.bbox).all() and width >= 0 and height >= 0):
            raise DataError(f"{file}: the bbox {list(one.bbox)} of image {one.image_id}; expected x, y, width, height")
        area = width * height if one.area is None else one.area
        row = (left, top, left + width, top + height, number_of[one.category_id], area, float(bool(one.iscrowd)))
        rows.setdefault(one.image_id, []).append(row)
        if masks:
            encoded.setdefault(one.image_id, []).append(_encoded(one, sides[one.image_id], file))
    objects = tuple(np.array(rows.get(ids[source.names[index]], []), np.float64).reshape(-1, 7) for index in kept)
    bare = replace(source, labels=None, label_sets=None, values=None, class_names=None)
    of_objects = tuple(tuple(encoded.get(ids[source.names[index]], ())) for index in kept) if masks else None
    return replace(chosen(bare, kept), boxes=Boxes(objects, of_objects), notes=notes)


def _encoded(one: _Object, sides: tuple[int, int], file: Path) -> bytes:
    """An object's polygons or run lengths as pycocotools encodes a mask.

    Raises:
        DataError: they are none of both, or the file does not say how large the image is.
    """
    with needs("pycocotools"):
        from pycocotools import mask as coder

    height, width = sides
    if not (0 < height <= MOST_SIDE and 0 < width <= MOST_SIDE):
        raise DataError(f"{file}: image {one.image_id} is {height}x{width} pixels; expected its height and width")
    told = one.segmentation
    try:
        if isinstance(told, list):
            polygons = [[float(number) for number in polygon] for polygon in told]
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
                raise ValueError("a polygon of less than three points")
            for polygon in polygons:
                _check_places(polygon, sides)
            return bytes(coder.merge(coder.frPyObjects(polygons, height, width))["counts"])
        if [int(side) for side in told["size"]] != [height, width]:
            raise ValueError(f"run lengths of {told['size']} pixels")
        counts = told["counts"]
        if isinstance(counts, str):
            lengths = lengths_of(counts.encode(), sides)
        else:
            lengths = _whole(np.array([int(length) for length in counts], np.int64), sides)
        return bytes(coder.frPyObjects({"size": [height, width], "counts": lengths.tolist()}, height, width)["counts"])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(
            f"{file}: the segmentation of an object of image {one.image_id} is no polygons and no run lengths: "
            f"{plain(error)}; mend or remove that object"
        ) from None


def _check_places(polygon: Sequence[float], sides: tuple[int, int]) -> None:
    """Raises ValueError where pycocotools would take more memory for a polygon's outline than there is."""
    places = np.array([*polygon, *polygon[:2]], np.float64).reshape(-1, 2)
    height, width = sides
    far = ~(np.abs(places) <= MOST_TIMES * np.array([width, height])).all(axis=1)
    if far.any():
        x, y = places[far][0].tolist()
        raise ValueError(f"the point ({x:g}, {y:g}) is far outside of an image of {height}x{width} pixels")
    outline = float(np.abs(np.diff(places, axis=0)).max(axis=1).sum())
    if outline > MOST_OUTLINE:
        raise ValueError(f"a polygon whose outline is {outline:,.0f} pixels long; at most {MOST_OUTLINE:,} are drawn")


def lengths_of(coded: bytes, sides: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths in a string of pycocotools: 5 bits a character, from the third on changes from the last but one.

    Its own reader checks nothing, and a file may be anybody's.

    Args:
        sides: (height, width) of the image.

    Raises:
        ValueError: it is in another code, or the lengths do not make up the image.
    """
    codes = np.frombuffer(coded, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)  # of each value
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("run lengths in another code than pycocotools'")
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() >= _MOST_CHARACTERS:
        raise ValueError("run lengths in another code than pycocotools'")
    places = 5 * (np.arange(len(codes)) - np.repeat(first, last - first + 1))
    values = np.add.reduceat((codes & 31) << places, first)
    values -= np.where(codes[last] & 16, np.int64(1) << places[last] + 5, 0)
    for start in (1, 2):
        values[start::2] = np.cumsum(values[start::2])
    return _whole(values, sides)


def _whole(lengths: NDArray[np.int64], sides: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths, which are those of every pixel of an image."""
    if not len(lengths) or lengths.min() < 0 or lengths.max() >= 2**32 or int(lengths.sum()) != sides[0] * sides[1]:
        raise ValueError("run lengths that do not make up the image")
    return lengths


def _read(file: Path) -> _Coco:
    if file.is_dir():
        other_tools.refuse_folder(file)
    try:
        content = content_of(file, MAX_LIST_BYTES).removeprefix(codecs.BOM_UTF8)
        try:
            return msgspec.json.decode(content, type=_Coco)
        except msgspec.ValidationError:
            other_tools.refuse_json(msgspec.json.decode(content), file)
            raise
    except OSError as error:
        raise DataError(f"--annotations {file} cannot be read: {plain(error)}; expected a COCO file") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"--annotations {file} is no COCO file with images, categories and annotations: {plain(error)}; tools for "
            "labelling export one"
        ) from None


def _ids(images: Sequence[CocoImage], names: Collection[str], file: Path) -> dict[str, int | str]:
    """The id of each image, by the name that the source has for it: files may say ./a.jpg, or a\\b.jpg on Windows."""
    ids: dict[str, int | str] = {}
    for image in images:
        name = image.file_name
        if name not in names:
            name = str(PurePosixPath(name.replace("\\", "/")))
        if name in ids:
            raise DataError(f"{file} has {image.file_name} twice; expected each image once")
        ids[name] = image.id
    if len(set(ids.values())) < len(ids):
        twice, _ = Counter(ids.values()).most_common(1)[0]
        raise DataError(f"{file} gives the id {twice} to two images, whose objects cannot be told apart")
    return ids


def _numbered(
    categories: Sequence[CocoCategory], numbers: Mapping[str, int] | None, classes: int, file: Path
) -> dict[int, int]:
    """The class of each category's id."""
    (twice, count), *_ = [*Counter(one.id for one in categories).most_common(1), (0, 0)]
    if count > 1:
        raise DataError(f"{file} gives the id {twice} to {count} categories, whose objects cannot be told apart")
    strange = [one for one in categories if numbers is not None and one.name not in numbers]
    if strange and numbers is not None:
        raise DataError(
            f"{file} has the category {strange[0].name!r}, which is no class of the model, such as "
            f"{next(iter(numbers))!r}; give --labels FILE with the model's classes in their order"
        )
    numbers_of = {one.id: one.id if numbers is None else numbers[one.name] for one in categories}
    beyond = [number for number in numbers_of.values() if not 0 <= number < classes]
    if beyond:
        raise DataError(
            f"{file} has a category with the id {beyond[0]}, and the model has {counted(classes, 'class')}, 0 to "
            f"{classes - 1}; "
            "give --labels FILE with the names of the model's classes in their order"
        )
    return numbers_of
