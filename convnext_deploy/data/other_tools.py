"""Annotations as tools for labelling export them: Label Studio's JSON and CVAT's XML are read, others refused by name.

Both give the classes of whole images (choices and tags), or those of the objects in them, as Pascal VOC does.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from ..errors import DataError, counted, plain
from .class_folders import IMAGE_SUFFIXES
from .entries import Annotations, named
from .image_source import ClassOrder

_UPLOADED = re.compile(r"[0-9a-f]{8}-")  # before the name of a file that was uploaded to Label Studio
_OBJECTS = ("box", "polygon", "polyline", "points", "ellipse", "mask", "cuboid", "skeleton")  # CVAT's
_COCO = "export COCO's, or a list with the columns path and label"
_FROM_YOLO = (
    "labels of YOLO, a text file an image; convert them with supervision: supervision.DetectionDataset.from_yolo("
    "IMAGES, LABELS, 'data.yaml').as_coco(annotations_path='instances.json')"
)
_FROM_LABELME = (
    "labelme's, a JSON file an image; convert them with the scripts in labelme's examples: labelme2voc.py writes "
    "masks, labelme2coco.py a COCO file"
)
# What a file of JSON has, as `_marks` writes it, what it is then, and what to do.
_JSON: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"shapes[]", "imagePath"}), _FROM_LABELME),
    (frozenset({"_via_img_metadata{}"}), "a project of VIA; export its annotations in COCO's format"),
    (frozenset({"filename", "regions[]"}), "of VIA; export its annotations in COCO's format"),
    (
        frozenset({"classes", "labels{}"}),
        "of FiftyOne; export class folders there, with dataset_type=fiftyone.types.ImageClassificationDirectoryTree, "
        "or COCO's file, with fiftyone.types.COCODetectionDataset",
    ),
    (frozenset({"samples[].filepath"}), f"samples of FiftyOne; {_COCO}"),
    (frozenset({"annotations[].coordinates"}), f"CreateML's; {_COCO}"),
    (frozenset({"tags[]", "objects[]", "size{}"}), f"Supervisely's, a file an image; {_COCO}"),
    (
        frozenset({"images[].file_name", "annotations[].caption"}),
        "of COCO's captions, which say no class; give its file of instances",
    ),
)
# Likewise of the columns of a table.
_TABLES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"region_shape_attributes", "region_attributes"}), "of VIA; export its annotations in COCO's format"),
    (
        frozenset({"imageid", "labelname", "confidence"}),
        "of Open Images, where a confidence of 0 says that a label is absent; keep the rows of 1, and write them with "
        "the columns path and label",
    ),
)


class _Result(msgspec.Struct):
    value: dict[str, Any]
    type: str = ""
    from_name: str = ""


class _Annotation(msgspec.Struct):
    result: list[_Result]
    was_cancelled: bool = False


class _Task(msgspec.Struct):
    data: dict[str, Any]
    annotations: list[_Annotation]


def is_label_studio(document: Any) -> bool:
    first = document[0] if isinstance(document, list) and document else None
    return isinstance(first, dict) and isinstance(first.get("data"), dict) and "annotations" in first


def label_studio(document: Any, file: Path, folder: Path, order: ClassOrder) -> Annotations:
    """The labels of each task: its choices, or those of its regions.

    Args:
        folder: where the images are; a file that was uploaded may have its own name there.

    Raises:
        DataError: it is damaged, has no image in a task, or answers to several questions.
    """
    try:
        tasks = msgspec.convert(document, list[_Task])
    except msgspec.ValidationError as error:
        raise DataError(f"{file} is no export of Label Studio: {plain(error)}; export it again as JSON") from None
    images, names, questions = [], [], dict[str, None]()
    for number, task in enumerate(tasks, 1):
        paths = [path for path in map(_path_of, task.data.values()) if path.lower().endswith(IMAGE_SUFFIXES)]
        if len(paths) != 1:
            raise DataError(f"{file}: the data of task {number} names {len(paths)} images; expected one")
        images.append(_as_it_is_there(paths[0], folder))
        results = [one for whole in task.annotations if not whole.was_cancelled for one in whole.result]
        said = [(one.from_name, one.value.get(one.type)) for one in results]
        labels = [(question, label) for question, value in said if isinstance(value, list) for label in value]
        questions |= dict.fromkeys(question for question, _ in labels)
        names.append(sorted({str(label) for _, label in labels}))
    if len(questions) > 1:
        raise DataError(
            f"{file} has answers to several questions, {', '.join(questions)}; expected one: write that one's as a "
            "list with the columns path and label"
        )
    return named(images, names, order)


def _path_of(value: Any) -> str:
    """The path in an address: `/data/upload/1/a.jpg`, and `/data/local-files/?d=folder/a.jpg`."""
    parts = urlsplit(value) if isinstance(value, str) else urlsplit("")
    return parse_qs(parts.query).get("d", [parts.path])[0].lstrip("/")


def _as_it_is_there(path: str, folder: Path) -> str:
    name = PurePosixPath(path).name
    candidates = (path, name, _UPLOADED.sub("", name, count=1))
    return next((one for one in candidates if (folder / one).is_file()), name)


def cvat(root: ElementTree.Element, file: Path, order: ClassOrder) -> Annotations:
    """The tags of each image in a file of "CVAT for images"; without any in it, the labels of the objects.

    Raises:
        DataError: it names no images, as that of a video.
    """
    pictures = root.findall("image")
    if root.tag != "annotations" or not pictures or any(not one.get("name") for one in pictures):
        raise DataError(
            f"{file} is no file of CVAT for images, <annotations> with <image name=...>; export the task as CVAT for "
            "images, or write a list with the columns path and label"
        )
    kinds: tuple[str, ...] = ("tag",) if any(one.find("tag") is not None for one in pictures) else _OBJECTS
    names = [sorted({part.get("label", "") for part in one if part.tag in kinds}) for one in pictures]
    objects = sum(part.tag in _OBJECTS for one in pictures for part in one)
    notes = (f"left out: {counted(objects, 'object')}, because tags say the classes of images",)
    return named(
        [one.get("name", "") for one in pictures], names, order, notes if objects and kinds == ("tag",) else ()
    )


def refuse_json(document: Any, file: Path) -> None:
    """Refuse a tool's own JSON by its name.

    Raises:
        DataError: with how to convert it.
    """
    entry = document[0] if isinstance(document, list) and document else document
    if not isinstance(entry, Mapping):
        return
    for marks in (_marks(entry), _marks(next(iter(entry.values()), None))):
        for mark, what in _JSON:
            if mark <= marks:
                raise DataError(f"{file} is {what}")


def _marks(entry: Any) -> set[str]:
    """An object's keys, with what they contain: `a{}` an object, `a[]` a list, and `a[].b` a list of objects."""
    marks: set[str] = set()
    for key, value in entry.items() if isinstance(entry, Mapping) else ():
        if isinstance(value, list):
            marks |= {f"{key}[]"} | {
                f"{key}[].{name}" for name in (value[0] if value and isinstance(value[0], dict) else ())
            }
        marks.add(f"{key}{{}}" if isinstance(value, Mapping) else str(key))
    return marks


def refuse_table(header: list[str], file: Path) -> None:
    """Refuse a tool's own table by its name.

    Raises:
        DataError: with how to convert it.
    """
    for mark, what in _TABLES:
        if mark <= {*header}:
            raise DataError(f"{file} is a table {what}")


def refuse_folder(folder: Path) -> None:
    """Refuse a folder with a file of annotations an image, in another form than Pascal VOC's.

    Raises:
        DataError: with how to convert them.
    """
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    for suffix, what in ((".txt", _FROM_YOLO), (".json", _FROM_LABELME)):
        if suffix in suffixes:
            raise DataError(f"{folder} seems to have {what}")
