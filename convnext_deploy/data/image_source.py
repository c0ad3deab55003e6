"""Labelled images to read by index, wherever they are stored."""

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError, counted, plain, printable
from . import decoding
from .readers import part_of

# Where the numbers of the labels come from: positions of class names in an order that the source does not say, a column
# of numbers, or a map from class names to the model's outputs.
LabelsFrom = Literal["names", "column", "map"]

# Who numbers classes by their names: torchvision sorts them as text ("10" before "2"), timm by the numbers in them.
ClassOrder = Literal["torchvision", "timm"]


@dataclass(frozen=True, slots=True)
class Masks:
    """Each image's mask as an encoded image, and how its numbers are meant (`data.masks`)."""

    names: tuple[str, ...]  # what each is called in an error
    read_bytes: Callable[[int], bytes]
    ignored: int  # a number that counts nowhere
    reduce_labels: bool  # numbers count from 1, and 0 counts nowhere

    def encoded(self, index: int) -> bytes:
        """
        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.read_bytes(index)
        except OSError as error:
            raise unreadable_mask(self.names[index], error) from None


def unreadable_mask(name: str, error: Exception) -> DataError:
    return DataError(f"the mask {name} cannot be read: {plain(error)}; mend it or remove its image")


@dataclass(frozen=True, slots=True)
class Boxes:
    """Of each image its objects, float64 (G, 7): left, top, right and bottom in pixels, class, area, crowd."""

    objects: tuple[NDArray[np.float64], ...]
    masks: tuple[tuple[bytes, ...], ...] | None = None  # of each object, as pycocotools has them, where all have one


@dataclass(frozen=True)
class ImageSource:
    """Images to read by index, in an order that is the same on every machine. Reading is safe from many threads."""

    name: str  # as given to `open_source`, the split behind it
    names: tuple[str, ...]  # unique; relative paths where the source has them
    labels: NDArray[np.int64] | None  # (N,); None: the source has no labels, or not one an image
    class_names: tuple[str, ...] | None  # by label
    read_bytes: Callable[[int], bytes]  # the encoded image of an index; one of `readers`, or a program's own
    labels_from: LabelsFrom = "column"
    ordered_by: str = "the class folders sorted by name"  # of labels from names, in words
    label_sets: tuple[tuple[int, ...], ...] | None = None  # of images with any number of labels, in `labels`' place
    values: NDArray[np.float64] | None = None  # (N, K): what a regression is to give, in `labels`' place
    boxes: Boxes | None = None  # what a detector is to give, likewise
    masks: Masks | None = None  # what a segmenter is to give, in `labels`' place
    # Other images of each row, such as masks; a path "" of `Files` is none.
    columns: Mapping[str, Callable[[int], bytes]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was left out or assumed when the source was opened, a line each

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return self.name

    def read(self, index: int) -> Image.Image:
        """Read and decode one image; 8 bits a channel.

        Raises:
            OSError: the image is missing, empty, truncated, too large, or nothing that is decoded here. One line, and
                the same line whenever the same image is read.
            DataError: the source itself cannot be read any more.
        """
        return decoding.decoded(self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of one image's file.

        Raises:
            As `read`.
        """
        try:
            return self.read_bytes(index)
        except decoding.UnreadableImage:
            raise
        except OSError as error:
            if decoding.is_of_the_file(error):
                raise decoding.UnreadableImage(f"the file cannot be opened: {plain(error)}") from error
            # A disk or network that fails says nothing about the image.
            raise DataError(
                f"{self.names[index]} of {self.name} cannot be read: {plain(error)}; run it again"
            ) from None

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the names, and the labels, boxes or masks; the images' pixels are not part of it.

        Raises:
            DataError: a mask cannot be read.
        """
        digest = hashlib.sha256(msgspec.json.encode(self.names))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        if self.label_sets is not None:
            digest.update(msgspec.json.encode(self.label_sets))
        if self.values is not None:
            digest.update(self.values.astype("<f8").tobytes())
        if self.boxes is not None:
            for rows in self.boxes.objects:
                digest.update(rows.astype("<f8").tobytes() + b"\0")
            for masks in self.boxes.masks or ():
                digest.update(msgspec.json.encode([mask.decode("ascii") for mask in masks]))
        if self.masks is not None:
            digest.update(msgspec.json.encode((self.masks.ignored, self.masks.reduce_labels)))
            for index in range(len(self)):
                digest.update(hashlib.sha256(self.masks.encoded(index)).digest())
        return digest.hexdigest()


def subset(source: ImageSource, limit: int) -> ImageSource:
    """At most `limit` images, evenly spaced over the source: the first ones of a class folder are all of one class."""
    if limit >= len(source):
        return source
    return chosen(source, [position * len(source) // limit for position in range(limit)])


CHOOSE = "; choose one with --split"  # ends what is said of data with several splits


def refuse_unlabelled(source: ImageSource) -> None:
    """
    Raises:
        DataError: nothing says what is on the images.
    """
    if source.labels is None and source.label_sets is None:
        if source.columns:
            raise DataError(
                f"{source.name} has no labels: {', '.join(source.columns)} beside the images contains images, as the "
                "masks of a segmenter are; expected a column of class names or numbers, called label"
            )
        raise DataError(
            f"{source.name} has no labels; expected class folders, a column label, a list, or --annotations FILE"
        )


def with_one_label(source: ImageSource) -> ImageSource:
    """The source with one label an image; images that have none are left out, and said.

    Raises:
        DataError: an image with several.
    """
    if source.label_sets is None:
        return source
    several = [index for index, own in enumerate(source.label_sets) if len(own) > 1]
    if several:
        names, first = source.class_names, source.label_sets[several[0]]
        listing = ", ".join(names[label] if names else str(label) for label in first)
        raise DataError(
            f"{len(several):,} of the {len(source):,} images of {source.name} have several classes, such as "
            f"{source.names[several[0]]} ({listing}); expected one an image: evaluate a model of several with "
            "--problem multi-label, or give a list of the images that have one"
        )
    kept = [index for index, own in enumerate(source.label_sets) if own]
    if not kept:
        raise DataError(f"none of the {len(source):,} images of {source.name} has a label")
    labels = np.array([source.label_sets[index][0] for index in kept], np.int64)
    notes = source.notes
    if len(kept) < len(source):
        notes = (*notes, f"left out: {counted(len(source) - len(kept), 'image')} without a label")
    return replace(chosen(replace(source, label_sets=None), kept), labels=labels, notes=notes)


def ordered(names: Sequence[str], order: ClassOrder) -> list[str]:
    """Class names as torchvision or timm numbers them.

    Raises:
        DataError: names that timm's order does not tell apart.
    """
    if order == "torchvision":
        return sorted(names)
    in_order = sorted(names, key=natural)
    for one, other in itertools.pairwise(in_order):
        if natural(one) == natural(other):
            raise DataError(
                f"the classes {one!r} and {other!r} are equal in timm's order, which numbers them by chance; give "
                "--labels FILE with the model's classes in their order"
            )
    return in_order


def natural(name: str) -> list[tuple[int, int, str]]:
    """timm's key, by which 2 comes before 10."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part[:300]), "") if part.isdecimal() else (1, 0, part) for part in parts]


def parts(source: ImageSource, sizes: Sequence[int], seed: int = 0) -> list[ImageSource]:
    """Disjoint random parts of a source, each in the source's order; the last size may be -1 for all that is left.

    Raises:
        DataError: there are fewer images than that.
    """
    total = sum(size for size in sizes if size > 0)
    if total + (sizes[-1] == -1) > len(source):
        raise DataError(f"{source.name} has {counted(len(source), 'image')}; {total} and more are needed, give more")
    order = np.random.default_rng(seed).permutation(len(source))
    ranges, start = [], 0
    for size in sizes:
        stop = len(source) if size == -1 else start + size
        ranges.append(chosen(source, sorted(order[start:stop].tolist())))
        start = stop
    return ranges


def chosen(source: ImageSource, indices: list[int]) -> ImageSource:
    """Those images of a source, in that order."""
    return replace(
        source,
        names=tuple(source.names[index] for index in indices),
        labels=None if source.labels is None else source.labels[indices],
        label_sets=None if source.label_sets is None else tuple(source.label_sets[index] for index in indices),
        values=None if source.values is None else source.values[indices],
        boxes=source.boxes and _boxes_of(source.boxes, indices),
        masks=source.masks and _masks_of(source.masks, indices),
        columns={name: part_of(read, indices) for name, read in source.columns.items()},
        read_bytes=part_of(source.read_bytes, indices),
    )


def _boxes_of(boxes: Boxes, indices: list[int]) -> Boxes:
    masks = None if boxes.masks is None else tuple(boxes.masks[index] for index in indices)
    return Boxes(tuple(boxes.objects[index] for index in indices), masks)


def _masks_of(masks: Masks, indices: list[int]) -> Masks:
    names = tuple(masks.names[index] for index in indices)
    return replace(masks, names=names, read_bytes=part_of(masks.read_bytes, indices))


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names that can be written as UTF-8; the second and later of the same name get #2, #3 ... behind them."""
    counts: Counter[str] = Counter()
    result = []
    for name in names:
        text = printable(name)
        counts[text] += 1
        result.append(text if counts[text] == 1 else f"{text}#{counts[text]}")
    return tuple(result)
