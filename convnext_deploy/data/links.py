"""Links by which an image would have two classes: between class folders, and between files."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, counted
from .image_source import ImageSource

_CURE = "remove the link, or give a list of the images with the class of each"


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder's own or begins with it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def refuse_second_names(data: str, root: Path, aliases: Mapping[str, str], classes: Sequence[str]) -> None:
    """Refuse class folders that are links to what another class folder has.

    Args:
        aliases: where each such link leads, by its name.
        classes: the class folders that are read.

    Raises:
        DataError: there is such a link.
    """
    if not aliases:
        return
    name, real = min(aliases.items())
    if is_inside(os.path.realpath(root), real):
        raise DataError(
            f"the class folder {name} of {data} is a link to {real}, which contains all classes: every image "
            f"would have two; {_CURE}"
        )
    places = {other: os.path.realpath(root / other) for other in classes}
    other = next((one for one, place in places.items() if is_inside(real, place) or is_inside(place, real)), None)
    if other is None:
        raise DataError(
            f"the class folder {name} of {data} is a link to {real}, which is hidden in {data} itself and not "
            "read; move that folder out of it"
        )
    raise DataError(
        f"the class folders {other} and {name} of {data} are one folder, {real}: every image there "
        f"would have two classes; {_CURE}"
    )


def with_one_label_a_file(source: ImageSource, paths: Sequence[Path]) -> ImageSource:
    """The source, in which no link gives another of its files a second label; other names of one file are said.

    Tools that save space make hard links of equal images, and the cache of Hugging Face's hub has links to one copy of
    them elsewhere. So these are what the labels of a data set really are.

    Args:
        paths: of each image's file.

    Raises:
        DataError: a link, or another way of writing a path, gives a file two labels.
    """
    first_of: dict[tuple[int, int], int] = {}
    again: list[tuple[int, int]] = []
    for index, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue  # whoever reads the image says it
        first = first_of.setdefault((status.st_dev, status.st_ino), index) if status.st_ino else index
        if first != index:
            again.append((first, index))
    other = [pair for pair in again if _label(source, pair[0]) != _label(source, pair[1])]
    for first, second in other:
        copies = paths[first].is_symlink() and paths[second].is_symlink()
        if not copies and os.path.realpath(paths[first]) == os.path.realpath(paths[second]):
            raise DataError(
                f"{source.names[first]} and {source.names[second]} of {source.name} are one file and have different "
                "labels; keep one of both, with its own label"
            )
    notes = source.notes
    for pairs, what in ((again, "counted twice"), (other, "of two labels")):
        if pairs:
            first, second = pairs[0]
            names = f"{source.names[first]} and {source.names[second]}"
            notes = (*notes, f"{what}: {counted(len(pairs), 'image')} by links between files, such as {names}")
    return replace(source, notes=notes)


def _label(source: ImageSource, index: int) -> object:
    if source.values is not None:
        return source.values[index].tolist()
    if source.label_sets is not None:
        return source.label_sets[index]
    return None if source.labels is None else int(source.labels[index])
