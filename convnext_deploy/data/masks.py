"""Masks of images, in which each pixel is a class's number: files of the same names in a folder of their own, or the
images of another column of the same table or list.
"""

import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError, counted, plain
from . import decoding, other_tools
from .entries import is_of_masks
from .image_source import ImageSource, Masks, chosen, unreadable_mask
from .readers import Files, absolute

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # formats that keep a number as it is
FORMATS = ("PNG", "TIFF", "BMP", "GIF")
LOOKED_AT = 8  # masks
IGNORED = -1  # in a mask as it is read: a pixel that counts nowhere


def masked(source: ImageSource, annotations: str | None, *, ignored: int, reduce_labels: bool) -> ImageSource:
    """The source with the mask of each image; images that have none are left out, and said.

    Args:
        annotations: a folder that contains `a/b.png` for the image `a/b.jpg`, or the name of a column of masks; None:
            the one column that can be meant. An image without a path there has no mask.
        ignored: a number that counts nowhere.
        reduce_labels: masks count from 1, and 0 counts nowhere.

    Raises:
        DataError: no folder or column, no mask, or several for one image.
    """
    if source.columns and (annotations is None or annotations in source.columns or not Path(annotations).is_dir()):
        column = _column(source, annotations)
        bare = _with_a_path(replace(source, labels=None, label_sets=None, values=None, class_names=None), column)
        read_bytes = bare.columns[column]
        if isinstance(read_bytes, Files):
            names = read_bytes.paths
        else:
            names = tuple(f"of {name} (column {column})" for name in bare.names)
        masks = Masks(names, read_bytes, ignored, reduce_labels)
        notes = bare.notes if annotations else (*bare.notes, f"masks: the column {column} (--annotations otherwise)")
        return replace(bare, masks=masks, notes=notes + _white_is_ignored(masks))
    if annotations is None:
        of_images = source.labels is not None or source.label_sets is not None
        wrong = "has labels of images or objects, and no masks" if of_images else "has no masks"
        drawn = "; polygons are drawn with pycocotools' annToMask, an image's into one PNG of class numbers"
        raise DataError(
            f"{source.name} {wrong}; give --annotations FOLDER with a mask for each image, or a list with the columns "
            f"image and mask, which are paths{drawn if of_images else ''}"
        )
    return _beside(source, Path(annotations), ignored, reduce_labels)


def _column(source: ImageSource, asked: str | None) -> str:
    """Which column has the masks.

    Raises:
        DataError: there is none of that name, or several that may be meant.
    """
    held = ", ".join(source.columns)
    if asked is not None:
        if asked not in source.columns:
            raise DataError(
                f"--annotations {asked} is no folder and no column of images of {source.name}; beside the images it "
                f"has {held}"
            )
        return asked
    candidates = [name for name in source.columns if is_of_masks(name)] or [*source.columns]
    if len(candidates) > 1:
        raise DataError(
            f"{source.name} has the columns {held} beside its images; name the masks' with --annotations (and give a "
            "list itself with --data)"
        )
    return candidates[0]


def _with_a_path(source: ImageSource, column: str) -> ImageSource:
    """The images for which a list names a mask.

    Raises:
        DataError: not one of the masks is there.
    """
    files = source.columns[column]
    if not isinstance(files, Files):
        return source
    kept = [index for index, path in enumerate(files.paths) if path]
    paths = [files.paths[index] for index in kept]
    if not kept:
        raise DataError(f"{source.name} names no mask in the column {column}; expected a path for each image")
    if not any(map(os.path.lexists, paths)):
        raise DataError(
            f"none of the {counted(len(paths), 'mask')} of {source.name} (column {column}) is there, such as "
            f"{paths[0]}; expected paths that begin where the images' do"
        )
    if len(kept) == len(source):
        return source
    note = f"left out: {counted(len(source) - len(kept), 'image')} without a mask in the column {column}"
    return replace(chosen(source, kept), notes=(*source.notes, note))


def _beside(source: ImageSource, folder: Path, ignored: int, reduce_labels: bool) -> ImageSource:
    """With masks that are files."""
    if not folder.is_dir():
        raise DataError(f"--annotations {folder} is no folder; expected one of masks, with the names of the images")
    beside_of: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            beside_of[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    places = [beside_of.get(PurePosixPath(name).with_suffix("").as_posix(), []) for name in source.names]
    for name, paths in zip(source.names, places, strict=True):
        if len(paths) > 1:
            raise DataError(f"{name} of {source.name} has the masks {paths[0].name} and {paths[1].name}; expected one")
    themselves = _masks_among(source, places)
    places = [[] if index in themselves else paths for index, paths in enumerate(places)]
    kept = [index for index, paths in enumerate(places) if paths]
    if not kept:
        other_tools.refuse_folder(folder)
        raise DataError(
            f"none of the {len(source):,} images of {source.name} has a mask in {folder}; expected files of the same "
            f"names, such as {PurePosixPath(source.names[0]).with_suffix('.png')}"
        )
    notes = source.notes
    if themselves:
        notes = (*notes, f"left out: {counted(len(themselves), 'image')} of {source.name} that are masks themselves")
    if len(kept) < len(source) - len(themselves):
        bare = len(source) - len(themselves) - len(kept)
        notes = (*notes, f"left out: {counted(bare, 'image')} without a mask in {folder}")
    with_masks = chosen(replace(source, labels=None, label_sets=None, values=None, class_names=None), kept)
    masks = of_files([places[index][0] for index in kept], ignored=ignored, reduce_labels=reduce_labels)
    return replace(with_masks, masks=masks, notes=notes + _white_is_ignored(masks))


def _masks_among(source: ImageSource, places: Sequence[Sequence[Path]]) -> set[int]:
    """Images that are their own masks, where one folder has both."""
    files = source.read_bytes
    if not isinstance(files, Files):
        return set()
    paired = [(index, paths[0], Path(files.folder, files.paths[index])) for index, paths in enumerate(places) if paths]
    return {index for index, mask, image in paired if image.exists() and image.samefile(mask)}


def _white_is_ignored(masks: Masks) -> tuple[str, ...]:
    """A note where the first masks are black and white, of which a number that counts nowhere is the white.

    Tools for two classes write them so, and then no pixel of the second class would count.
    """
    if masks.ignored <= 0:
        return ()
    numbers: set[int] = set()
    for index in range(min(len(masks.names), LOOKED_AT)):
        try:
            numbers |= set(np.unique(_numbers(masks.encoded(index))).tolist())
        except (DataError, decoding.UnreadableImage):
            continue  # whoever reads the masks says it
    if numbers != {0, masks.ignored}:
        return ()
    return (
        f"the first masks have the numbers 0 and {masks.ignored} alone, and {masks.ignored} counts nowhere: if it is a "
        "class, write its number in the masks",
    )


def of_files(paths: Sequence[Path], *, ignored: int, reduce_labels: bool) -> Masks:
    """Masks that are files, in the order of their images."""
    files = Files("", tuple(absolute(path) for path in paths))
    return Masks(tuple(map(str, paths)), files, ignored, reduce_labels)


def read(masks: Masks, index: int, classes: int) -> NDArray[np.int32]:
    """The class of each pixel, (H, W), and `IGNORED`.

    Raises:
        DataError: the file cannot be read, or contains what is no class of the model.
    """
    try:
        numbers = _numbers(masks.encoded(index), classes + masks.reduce_labels)
    except decoding.UnreadableImage as error:
        raise unreadable_mask(masks.names[index], error) from None
    least = int(masks.reduce_labels)
    nowhere = numbers == masks.ignored
    if masks.reduce_labels:
        nowhere |= numbers == 0
    strange = (numbers < least) | (numbers >= classes + least)
    strange &= ~nowhere
    if strange.any():
        first = int(numbers.min(where=strange, initial=np.iinfo(np.int32).max))
        remedy = "" if masks.reduce_labels else "; masks that count from 1 need --reduce-labels"
        raise DataError(
            f"the mask {masks.names[index]} has the number {first}, and the model {counted(classes, 'class')}; "
            f"expected {least} to {classes - 1 + least}, or {masks.ignored} for pixels that count nowhere{remedy}"
        )
    numbers -= least  # in place, as all of this: a mask of the largest size is a quarter of a gigabyte
    numbers[nowhere] = IGNORED
    return numbers


def _numbers(content: bytes, most: int = 0) -> NDArray[np.int32]:
    """
    Args:
        most: numbers below may be classes; 0: nobody knows.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        decoding.refuse_many(image.width, image.height)
        decoding.refuse_incomplete(image)
        image.load()
    except decoding.UnreadableImage:
        raise
    except Exception as error:  # as `decoding.decoded`: decoders raise anything
        raise decoding.UnreadableImage(plain(error)) from error
    if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
        raise decoding.UnreadableImage(f"its pixels are {image.mode}; expected one number a pixel (grey or a palette)")
    numbers = np.asarray(image).astype(np.int32)
    if image.mode == "P":
        _refuse_greys(image, np.unique(numbers), most)
    return numbers


def _refuse_greys(image: Image.Image, entries: NDArray[np.int32], most: int) -> None:
    """Refuse a palette that is a grey mask's: Pillow writes the greys of a GIF as entries without gaps.

    Args:
        entries: of the palette, those that pixels have.

    Raises:
        UnreadableImage: the greys are other numbers than the entries, and may be classes too.
    """
    palette = np.array(image.getpalette("RGB"), np.int32).reshape(-1, 3)
    if (palette != palette[:, :1]).any() or entries[-1] >= len(palette):
        return
    greys = palette[entries, 0]
    if len(set(greys.tolist())) < len(entries):
        return  # several entries of one grey tell no numbers
    if (greys != entries).any() and (greys < most).all():
        first = int(np.flatnonzero(greys != entries)[0])
        raise decoding.UnreadableImage(
            f"its palette is grey, and entry {entries[first]} is the grey {greys[first]}: either may be the class; "
            "write it as a grey PNG"
        )


def written(classes: NDArray[np.int32], *, most: int, reduce_labels: bool) -> bytes:
    """Classes (H, W) as a PNG: with a palette where 8 bits hold all numbers, else grey of 16 bits.

    Args:
        most: how many classes there are.
        reduce_labels: number them from 1, as the masks of the training did.
    """
    numbers = classes + int(reduce_labels)
    file = io.BytesIO()
    if most + reduce_labels <= 256:
        image = Image.fromarray(numbers.astype(np.uint8), "L")
        image.putpalette(_palette())
    else:
        image = Image.fromarray(numbers.astype(np.uint16))
    image.save(file, "PNG")
    return file.getvalue()


def _palette() -> list[int]:
    """256 colours, those of small numbers far apart: a number's bits are the high bits of red, green and blue."""
    colours = []
    for number in range(256):
        for channel in range(3):
            bits = [(number >> (3 * place + channel)) & 1 for place in range(3)]
            colours.append(sum(bit << (7 - place) for place, bit in enumerate(bits)))
    return colours
