"""Tars as the library webdataset writes them: the files of a sample have one key, and what follows it is a field.

webdataset ends a key at the first dot of a file's name (`base_plus_ext`). People's own writers often end it at the
last one. So `a.b.cls` is the class of `a.b.jpg`, and where there is none `a.cls` is.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from ..errors import DataError, counted
from .entries import is_of_masks
from .image_source import ClassOrder, ImageSource, ordered, unique
from .readers import Reader, Spans

Member = tuple[str, str, tuple[str, int, int]]  # an image's name, the folder around it, and where it is


def key_of(name: str) -> str:
    """What webdataset takes for the key of a file: its path up to the first dot of its name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def field_of(name: str) -> str:
    """What follows the key, without the suffix: "seg" of `a.seg.png`, nothing of `a.jpg`."""
    return PurePosixPath(name).stem.partition(".")[2]


def with_fields(
    data: str, members: Sequence[Member], own: Collection[str]
) -> tuple[list[Member], dict[str, Reader], list[str]]:
    """The images of the samples, other images of each by the names of their fields, and notes.

    Args:
        own: images that are samples by themselves, whatever their names begin with.

    Raises:
        DataError: several images of a sample of which none is called by the key alone.
    """
    samples: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        samples[member[0] if member[0] in own else key_of(member[0])].append(member)
    images: list[Member] = []
    others: dict[str, dict[str, tuple[str, int, int]]] = defaultdict(dict)
    for key, parts in samples.items():
        first = [part for part in parts if len(parts) == 1 or part[0] in own or not field_of(part[0])]
        if not first:
            listing = " and ".join(PurePosixPath(part[0]).name for part in parts[:2])
            raise DataError(f"{data} has several images for the key {key}, {listing}; expected one, such as {key}.jpg")
        images += first
        for part in parts:
            if part not in first:
                others[field_of(part[0])][first[0][0]] = part[2]
    columns: dict[str, Reader] = {}
    notes = []
    for field, places in others.items():
        if len(places) == len(images):
            columns[field] = Spans(tuple(places[name] for name, _, _ in images))
        else:
            notes.append(f"left out: {counted(len(places), 'image')} of the field {field}, which not every sample has")
    return images, columns, notes


def are_masks(members: Sequence[Member]) -> bool:
    """Whether images without classes have masks beside them, by the names of the fields."""
    keys = {name for name, _, _ in members if not field_of(name)}
    plain = {key_of(name) for name in keys}
    fields = [(key_of(name), field_of(name)) for name, _, _ in members if name not in keys]
    return bool(fields) and all(key in plain and is_of_masks(field) for key, field in fields)


def labelled(data: str, images: Sequence[Member], written: Mapping[str, str], order: ClassOrder) -> ImageSource:
    """The source of images whose classes are said beside them, as numbers or as names.

    Args:
        written: the content of .cls files by their names without the suffix.

    Raises:
        DataError: an image without a class.
    """
    names = [name for name, _, _ in images]
    read_bytes = Spans(tuple(place for _, _, place in images))
    said = [written.get(_stem(name), written.get(key_of(name))) for name in names]
    if None in said or "" in said:
        lacking = names[next(index for index, text in enumerate(said) if not text)]
        raise DataError(f"{data} has no class for {lacking}; expected a .cls file beside each image")
    texts = [text for text in said if text is not None]
    if all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts):
        return ImageSource(
            name=data,
            names=unique(names),
            labels=np.array([int(text) for text in texts], np.int64),
            class_names=None,
            read_bytes=read_bytes,
        )
    classes = ordered(sorted(set(texts)), order)
    number = {text: index for index, text in enumerate(classes)}
    return ImageSource(
        name=data,
        names=unique(names),
        labels=np.array([number[text] for text in texts], np.int64),
        class_names=unique(classes),
        read_bytes=read_bytes,
        labels_from="names",
        ordered_by=f"the .cls files' names sorted {'by name' if order == 'torchvision' else 'as timm does'}",
    )


def with_own_class(members: Sequence[Member], written: Mapping[str, str]) -> set[str]:
    """Images with a longer name than their key, beside which a .cls file has the same up to the last dot."""
    return {name for name, _, _ in members if field_of(name) and _stem(name) in written}


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
