"""What `predict` makes of a segmenter's outputs: a mask of each image's own size, and the share of each class in it."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..artifact import label_maps
from ..artifact.manifest import write_file
from ..data import masks
from ..errors import UsageError
from ..records.manifest import Manifest
from ..records.prediction import ClassArea, Prediction


def places(out: Path, names: Sequence[str]) -> list[Path]:
    """Where the mask of each image goes: into the one file, or below the folder under the image's own name.

    Raises:
        UsageError: one file for several images, or two images whose masks would have one name.
    """
    if out.suffix.lower() == ".png":
        if len(names) != 1:
            raise UsageError(f"--out {out} is one mask, and there are {len(names):,} images; give a folder")
        return [out]
    paths = [out / _inside(name) for name in names] if len(names) > 1 else [out / f"{PurePosixPath(names[0]).stem}.png"]
    owners: dict[Path, str] = {}
    for place, name in zip(paths, names, strict=True):
        if place in owners:
            raise UsageError(f"the masks of {owners[place]} and {name} would both be {place}; predict them one by one")
        owners[place] = name
    return paths


def _inside(name: str) -> Path:
    """An image's name as a path that stays inside a folder, whoever packed the name into an archive."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return Path(*parts[:-1], f"{PurePosixPath(parts[-1]).stem}.png") if parts else Path("mask.png")


def predicted(
    name: str,
    output: NDArray[np.generic],
    sides: tuple[int, int],
    manifest: Manifest,
    names: Sequence[str] | None,
    top: int,
    place: Path | None,
) -> Prediction:
    """One image's classes, the largest first; its mask is written where there is a place for it.

    Args:
        output: logits (K, h, w), or classes (h, w).
        sides: (height, width) of the image in pixels.
    """
    model = manifest.model
    assert model.segmentation is not None
    classes = label_maps.classes_of(output, sides)
    counts = np.bincount(classes.reshape(-1), minlength=model.num_classes)
    largest = [number for number in np.argsort(-counts, kind="stable")[:top].tolist() if counts[number]]
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        content = masks.written(classes, most=model.num_classes, reduce_labels=model.segmentation.reduce_labels)
        write_file(place, content)
    return Prediction(
        image=name,
        classes=(),
        areas=tuple(
            ClassArea(
                number=number, name=None if names is None else names[number], share=float(counts[number] / classes.size)
            )
            for number in largest
        ),
        mask=None if place is None else str(place),
    )
