"""The file of a calibration: whose it is, which images are done, and what came of them."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ..artifact.manifest import write_file
from ..errors import UsageError, plain
from ..records.base import Record, Sha256
from ..records.manifest import Preprocessing
from .counting import Piece, Seen, Statistics, union
from .observers import from_arrays, to_arrays

_SEEN = "images"  # in the file, where no module is called so


class Identity(Record, frozen=True, kw_only=True):
    """What statistics belong to."""

    weights_sha256: Sha256  # of the folded module
    data_sha256: Sha256
    names: tuple[str, ...]
    images: int
    batch: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    bins: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The images that are done, as ranges in their order that do not touch, and what came of them."""

    done: tuple[range, ...]
    statistics: Statistics
    seen: Seen  # of these images, in their order

    def __len__(self) -> int:
        return sum(map(len, self.done))

    def missing(self, images: int) -> list[range]:
        """Which of so many images are not done."""
        ends = [(0, 0), *((one.start, one.stop) for one in self.done), (images, images)]
        gaps = (range(stop, start) for (_, stop), (start, _) in itertools.pairwise(ends))
        return [gap for gap in gaps if len(gap)]

    def with_piece(self, piece: Piece) -> "Progress":
        """With one more piece, of images that were missing."""
        before = sum(len(one) for one in self.done if one.stop <= piece.images.start)
        seen = piece.seen
        if self.seen:
            seen = {
                key: np.concatenate([self.seen[key][:before], own, self.seen[key][before:]])
                for key, own in piece.seen.items()
            }
        return Progress(_joined([*self.done, piece.images]), union(self.statistics, piece.statistics), seen)


NOTHING = Progress((), {}, {})


def _joined(ranges: Sequence[range]) -> tuple[range, ...]:
    """In their order, those that touch as one.

    Raises:
        ValueError: an image is in two of them.
    """
    spans: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if spans and one.start < spans[-1].stop:
            raise ValueError(f"it has image {one.start} twice")
        if spans and one.start == spans[-1].stop:
            spans[-1] = range(spans[-1].start, one.stop)
        else:
            spans.append(one)
    return tuple(spans)


def save(path: Path, identity: Identity, progress: Progress) -> None:
    from safetensors.numpy import save as encoded

    arrays = {
        f"{key}/{field}": array for key, own in progress.statistics.items() for field, array in to_arrays(own).items()
    }
    arrays |= {f"{_SEEN}/{field}": array for field, array in progress.seen.items()}
    done = [(one.start, one.stop) for one in progress.done]
    facts = {"identity": msgspec.json.encode(identity).decode(), "done": msgspec.json.encode(done).decode()}
    write_file(path, encoded(arrays, facts))


def opened(path: Path, identity: Identity, device: torch.device) -> Progress:
    """What an earlier run has done; nothing where there is no file.

    Raises:
        UsageError: the file is damaged, of something else, or could not be written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    if not path.exists():
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{path} cannot be written: {path.parent} is absent or not writable")
        return NOTHING
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            identity_there = msgspec.json.decode(facts["identity"], type=Identity)
            done = msgspec.json.decode(facts["done"], type=list[tuple[int, int]])
        grouped: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in load_file(path).items():
            group, field = key.rsplit("/", 1)
            grouped.setdefault(group, {})[field] = array
        seen = {field: grouped[_SEEN][field] for field in ("mean", "std", "classes")}
        del grouped[_SEEN]
        statistics = {group: from_arrays(arrays, device) for group, arrays in grouped.items()}
        progress = Progress(_joined([range(*ends) for ends in done]), statistics, seen)
        if any(len(array) != len(progress) for array in seen.values()):
            raise ValueError(f"it has no {len(progress)} images")
    except (SafetensorError, msgspec.MsgspecError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} does not contain a calibration: {plain(error)}; remove it or name another file"
        ) from None
    if identity_there != identity:
        other = ", ".join(
            field for field in Identity.__struct_fields__ if getattr(identity_there, field) != getattr(identity, field)
        )
        raise UsageError(f"{path} is of another calibration (it differs in {other}); remove it or name another file")
    return progress
