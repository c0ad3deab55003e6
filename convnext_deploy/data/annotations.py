"""Annotations beside a folder of images: lists, COCO's JSON, Pascal VOC's XML, ImageNet's ground truth, tools' exports.

A data set for detection says the classes of an image through its objects. Such an image has as many labels as its
objects have classes; who needs one an image asks for it (`image_source.with_one_label`).
"""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..errors import DataError, counted, plain
from . import other_tools
from .class_folders import IMAGE_SUFFIXES, SUFFIXES, folder_source
from .coco import CocoCategory, CocoImage, CocoObject
from .entries import Annotations, by_labels, named, source_of
from .image_lists import LIST_SUFFIXES, read_list, text_of
from .image_source import CHOOSE, ClassOrder, ImageSource
from .links import with_one_label_a_file
from .readers import Files, absolute

SUFFIXES_OF_FILES = (*LIST_SUFFIXES, ".xml")
_WORDNET = re.compile(r"n\d{8}")
_OF_IMAGENET = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "meta.mat"  # of ImageNet's development kit: which WordNet id has which of its own numbers
_IMAGENET_CLASSES = 1000


class _Coco(msgspec.Struct):
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[CocoObject]


def list_source(data: str, file: Path, order: ClassOrder, split: str | None = None) -> ImageSource:
    """The images that a list or a COCO file names, relative to its folder.

    Raises:
        DataError: it cannot be read, or the images are not there.
    """
    annotations = _of_file(file, file.parent, order, split)
    return _source(data, file.parent, file, annotations)


def annotated_source(
    data: str, folder: Path, annotations: Path, order: ClassOrder, split: str | None = None
) -> ImageSource:
    """The images of a folder with their labels in a file, or in a folder of XML.

    Raises:
        DataError: the annotations cannot be read, or are of other images.
    """
    if annotations.is_dir():
        _refuse_split(annotations, split)
        return _source(data, folder, annotations, _voc(annotations, sorted(annotations.glob("*.xml")), order, folder))
    if not annotations.is_file():
        raise DataError(f"--annotations {annotations} does not exist; expected a list, a COCO file, or a folder of XML")
    if annotations.suffix.lower() not in SUFFIXES_OF_FILES:
        raise DataError(
            f"--annotations {annotations} ends in {annotations.suffix!r}; expected one of "
            f"{', '.join(SUFFIXES_OF_FILES)}"
        )
    return _source(data, folder, annotations, _of_file(annotations, folder, order, split))


def _refuse_split(file: Path, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{file} says nothing of a split {split!r}; leave --split out")


def _of_file(file: Path, folder: Path, order: ClassOrder, split: str | None) -> Annotations:
    if file.suffix.lower() == ".json":
        try:
            document = json.loads(text_of(file))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is no JSON: {plain(error)}") from None
        if isinstance(document, dict) and {"images", "annotations", "categories"} <= document.keys():
            _refuse_split(file, split)
            return _coco(document, file)
        if other_tools.is_label_studio(document):
            _refuse_split(file, split)
            return other_tools.label_studio(document, file, folder, order)
        other_tools.refuse_json(document, file)
    if file.suffix.lower() == ".xml":
        _refuse_split(file, split)
        return other_tools.cvat(_xml(file), file, order)
    if file.suffix.lower() == ".txt":
        lines = [line.strip() for line in text_of(file).splitlines() if line.strip()]
        if lines and not any(re.search(r"[\s,;]", line) or line.lower().endswith(IMAGE_SUFFIXES) for line in lines):
            _refuse_split(file, split)
            return _of_positions(lines, file, folder, order)
    return read_list(file, order, split)


def _source(data: str, folder: Path, file: Path, annotations: Annotations) -> ImageSource:
    if not annotations.images:
        raise DataError(f"{file} names no images")
    paths = _located(folder, [_with_slashes(folder, image) for image in annotations.images])
    missing = [image for image, path in zip(annotations.images, paths, strict=True) if not os.path.lexists(path)]
    if len(missing) == len(paths):
        if "://" in missing[0]:
            cure = "addresses are not read, so copy the images here and write their paths"
        elif os.path.isabs(missing[0]):
            cure = "these paths begin at the root of another disk, so write them from the folder of the images"
        else:
            cure = "give the folder that their paths begin in with --data, and the file with --annotations"
        raise DataError(f"none of the {len(paths):,} images of {file} is in {folder}, such as {missing[0]}; {cure}")
    notes = list(annotations.notes)
    if missing:
        notes.append(f"not there: {counted(len(missing), 'image')} of {file.name}, such as {missing[0]}")

    read_bytes = Files("", tuple(map(absolute, paths)))
    source = source_of(data if str(file) == data else f"{data}, {file.name}", annotations, read_bytes, tuple(notes))
    columns = {
        name: Files("", tuple(other and absolute(folder / _with_slashes(folder, other)) for other in others))
        for name, others in annotations.columns.items()
    }
    return with_one_label_a_file(replace(source, columns=columns), paths)


def _with_slashes(folder: Path, image: str) -> str:
    """A path as this system writes it, where the list was written on Windows."""
    if "\\" not in image or os.path.lexists(folder / image):
        return image
    return image.replace("\\", "/")


def _located(folder: Path, images: list[str]) -> list[Path]:
    """Where the images are. A name without a suffix is that of the one image below the folder that has it."""
    if all(image.lower().endswith(IMAGE_SUFFIXES) for image in images):
        return [folder / image for image in images]
    stems = {image for image in images if not image.lower().endswith(IMAGE_SUFFIXES)}
    by_stem: dict[str, Path] = {}
    for below, _, files in os.walk(folder):
        for name in sorted(files):
            stem = name.rpartition(".")[0]
            if stem not in stems or not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            if by_stem.setdefault(stem, Path(below, name)) != Path(below, name):
                raise DataError(
                    f"{folder} has two images {stem}: {by_stem[stem]} and {Path(below, name)}; give the folder of the "
                    "one that is meant with --data, and the list with --annotations"
                )
    return [
        folder / image if image.lower().endswith(IMAGE_SUFFIXES) else by_stem.get(image, folder / image)
        for image in images
    ]


def _coco(document: dict[str, Any], file: Path) -> Annotations:
    try:
        coco = msgspec.convert(document, _Coco)
    except msgspec.ValidationError as error:
        raise DataError(f"{file} is no COCO file: {plain(error)}") from None
    categories = sorted(coco.categories, key=lambda category: category.id)
    number = {category.id: index for index, category in enumerate(categories)}
    sets: dict[int | str, set[int]] = {image.id: set() for image in coco.images}
    if len(number) < len(categories) or len(sets) < len(coco.images):
        raise DataError(f"{file} gives an id to two categories or to two images; expected each once")
    for entry in coco.annotations:
        if entry.image_id not in sets or entry.category_id not in number:
            what = f"the image {entry.image_id}" if entry.image_id not in sets else f"the category {entry.category_id}"
            raise DataError(f"{file} annotates {what}, which it does not list")
        sets[entry.image_id].add(number[entry.category_id])
    return Annotations(
        images=[image.file_name for image in coco.images],
        sets=[tuple(sorted(sets[image.id])) for image in coco.images],
        class_names=tuple(category.name for category in categories),
        ordered_by="the categories by their ids",
    )


def is_voc(folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir()


def voc_source(data: str, folder: Path, split: str | None, order: ClassOrder) -> ImageSource:
    """The images of a folder of Pascal VOC, of one of its splits.

    Raises:
        DataError: no such split, several and none was asked for, or XML of another kind.
    """
    lists = folder / "ImageSets" / "Main"
    splits = {file.stem: file for file in sorted(lists.glob("*.txt")) if "_" not in file.stem}
    files = sorted((folder / "Annotations").glob("*.xml"))
    if split is not None and split not in splits:
        raise DataError(f"{data} has no split {split!r}; it has {', '.join(splits) or 'none, leave --split out'}")
    if split is None and len(splits) > 1:
        raise DataError(f"{data} has the splits {', '.join(splits)}{CHOOSE}")
    if splits:
        listed = text_of(splits[split or next(iter(splits))])
        files = [folder / "Annotations" / f"{line.split()[0]}.xml" for line in listed.splitlines() if line.strip()]
    images = folder / "JPEGImages"
    return _source(data, images, folder / "Annotations", _voc(folder / "Annotations", files, order, images))


def _voc(folder: Path, files: list[Path], order: ClassOrder, beside: Path) -> Annotations:
    """
    Args:
        beside: where the images are. A file that names one that is not there is of the image that has its own name.
    """
    images, names, difficult = [], [], 0
    for file in files:
        root = _xml(file)
        objects = list(root.iter("object"))
        image = root.findtext("filename", "").strip()
        if not image or not os.path.lexists(beside / image):
            image = file.stem
        if root.tag != "annotation" or any(not one.findtext("name", "").strip() for one in objects):
            raise DataError(f"{file} is no annotation of Pascal VOC: expected <annotation> with <object><name>")
        easy = [one for one in objects if one.findtext("difficult", "0").strip() != "1"]
        difficult += len(objects) - len(easy)
        images.append(image)
        names.append(sorted({one.findtext("name", "").strip() for one in easy}))
    if not images:
        other_tools.refuse_folder(folder)
        masks = any(path.suffix.lower() == ".png" for path in folder.rglob("*"))
        hint = "; masks are for a segmenter, which `eval` and `gate` judge" if masks else ""
        raise DataError(f"{folder} has no .xml; expected the annotations of Pascal VOC{hint}")
    notes = (
        (f"{difficult:,} objects marked as difficult give no label, as in VOC's own evaluation",) if difficult else ()
    )
    return named(images, names, order, notes)


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(text_of(file))
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is no XML: {plain(error)}") from None


def _of_positions(lines: list[str], file: Path, folder: Path, order: ClassOrder) -> Annotations:
    """A label a line, for the images of a folder in the order of their names."""
    images = list(_images_of(folder))
    numbers = [int(match[1]) if match else None for match in map(_OF_IMAGENET.match, images)]
    if all(numbers) and max(number or 0 for number in numbers) <= len(
        lines
    ):  # a part of ImageNet's validation images will do
        labels = [lines[number - 1] for number in numbers if number]
    elif len(lines) == len(images):
        labels = lines
    else:
        raise DataError(
            f"{file} has {counted(len(lines), 'line')} and {folder} {counted(len(images), 'image')}; expected a "
            "label an image, in the "
            "order of their names"
        )
    if all(_WORDNET.fullmatch(line) for line in lines):
        return named(images, [[label] for label in labels], order)
    if all(line.isdecimal() for line in lines) and (
        "ground_truth" in file.name or max(map(int, lines)) == _IMAGENET_CLASSES
    ):
        wordnet = _devkit(file)
        unknown = sorted({int(label) for label in labels} - wordnet.keys())
        if unknown:
            raise DataError(f"{file} has the class {unknown[0]}, which {_DEVKIT} of the development kit does not")
        # All names, also those that no image here has, because their number is that of the classes.
        classes = sorted(wordnet.values())
        number = {name: index for index, name in enumerate(classes)}
        sets: list[tuple[int, ...]] = [(number[wordnet[int(label)]],) for label in labels]
        return Annotations(
            images=images, sets=sets, class_names=tuple(classes), ordered_by="the WordNet ids sorted by name"
        )
    return by_labels(images, [[label] for label in labels], order, file)


def _images_of(folder: Path) -> Iterator[str]:
    source = folder_source(str(folder), folder)
    if source is None:
        raise DataError(f"{folder} has no {SUFFIXES} images")
    if any("/" in name for name in source.names):
        raise DataError(f"{folder} has images in folders; a label a line is for a flat folder of images")
    yield from source.names


def _devkit(file: Path) -> dict[int, str]:
    """WordNet ids by the numbers that ImageNet's own ground truth has, which are not those of any model's outputs."""
    places = [file.parent / _DEVKIT, file.parent / "data" / _DEVKIT]
    meta_file = next((place for place in places if place.is_file()), None)
    if meta_file is None:
        raise DataError(
            f"{file} has ImageNet's own numbers 1..{_IMAGENET_CLASSES}, which are not those of models; expected "
            f"{_DEVKIT} of the development kit beside it"
        )
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta_file, squeeze_me=True)["synsets"]
        pairs = [(int(one["ILSVRC2012_ID"]), str(one["WNID"])) for one in synsets]
    except Exception as error:  # scipy's reader raises whatever a damaged file leads it into
        raise DataError(f"{meta_file} is no {_DEVKIT} of ImageNet's development kit: {plain(error)}") from None
    return {number: name for number, name in pairs if 1 <= number <= _IMAGENET_CLASSES}
