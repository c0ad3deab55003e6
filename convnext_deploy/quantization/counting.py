"""Images through a model, batch by batch, and what values the inputs of its modules take; here or elsewhere.

What comes of a piece of the images is merged with what comes of any other, in any order, to what comes of both.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import description, preprocess
from ..data import sources as data
from ..env import usable_cores
from ..errors import DataError, UsageError, plain
from ..models.convnext import ConvNeXt, nhwc
from ..records.base import InputKind
from ..records.manifest import Preprocessing
from .images import pixel_reader
from .observers import Histogram, histogram, merged

HALVES = ("even", "odd")
SHOWN = 5  # names of unreadable images

Statistics = dict[str, Histogram]  # "<module>/even" and "<module>/odd" to the histogram of that module's input
Seen = dict[str, NDArray[Any]]  # of each image: "mean" and "std" of its channels (N, C), "classes" (N,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked: the statistics of the inputs of some modules, over the images of a source, `batch` at once."""

    model: ConvNeXt
    names: tuple[str, ...]
    source: data.ImageSource
    preprocessing: Preprocessing
    batch: int
    first: int = 0  # where the source is a part of another, the number of its first image there


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of images that follow one another."""

    images: range  # numbers in the whole source
    statistics: Statistics
    seen: Seen  # of these images, in their order


# Runs the images of these ranges in whole batches from the start of each range; pieces may come in any order.
Runner = Callable[[Work, Sequence[range]], Generator[Piece, None, None]]


def here(threads: int | None = None) -> Runner:
    """Runs images in this process, in order; a piece is a batch.

    Args:
        threads: that decode; None: one a core.
    """

    def ran(work: Work, ranges: Sequence[range]) -> Generator[Piece, None, None]:
        modules = modules_of(work.model, work.names)
        device = work.model.get_parameter("stem.convs.0.weight").device
        kind: InputKind = "uint8" if work.model.takes_uint8 else "float32"
        read = _reader(work)
        with preprocess.decoders(threads) as pool:
            for indices in ranges:
                decoded = preprocess.ahead(pool, read, indices, work.batch + (threads or usable_cores()))
                for start in range(indices.start, indices.stop, work.batch):
                    images = range(work.first + start, work.first + min(start + work.batch, indices.stop))
                    raw = np.stack([next(decoded) for _ in images])
                    given = torch.from_numpy(preprocess.as_input(raw, work.preprocessing, kind)).to(device)
                    statistics, outputs = _observed(work.model, modules, given, images.start)
                    yield Piece(images, statistics, _seen(raw, outputs))

    return ran


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow one another as one."""
    statistics: Statistics = {}
    for piece in pieces:
        statistics = union(statistics, piece.statistics)
    seen = {key: np.concatenate([piece.seen[key] for piece in pieces]) for key in pieces[0].seen}
    return Piece(range(pieces[0].images.start, pieces[-1].images.stop), statistics, seen)


def union(a: Statistics, b: Statistics) -> Statistics:
    return {**a, **{key: merged(a[key], value) if key in a else value for key, value in b.items()}}


def modules_of(model: ConvNeXt, names: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules at these paths.

    Raises:
        UsageError: one is absent, or of another kind.
    """
    return {name: _module(model, name) for name in names}


def _module(model: ConvNeXt, name: str) -> nn.Linear | nn.Conv2d:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        kind = "nothing" if module is None else f"a {type(module).__name__}"
        raise UsageError(f"the model has {kind} at {name!r}; expected the path of a Linear or Conv2d")
    return module


def _reader(work: Work) -> Callable[[int], NDArray[np.uint8]]:
    source = work.source
    read = pixel_reader(source, work.preprocessing, work.model, work.first)

    def pixels(index: int) -> NDArray[np.uint8]:
        try:
            return read(index)  # (C, H, W)
        except OSError as error:
            further = [name for i, name in enumerate(source.names) if i != index and not is_read(i)]
            cure = "replace or remove it, calibration leaves none out"
            if further:
                listing = ", ".join(further[:SHOWN]) + (", ..." if len(further) > SHOWN else "")
                cure = f"replace or remove it and {len(further)} more ({listing}), calibration leaves none out"
            raise DataError(f"{source.names[index]} of {source.name}: {plain(error)}; {cure}") from None

    def is_read(index: int) -> bool:
        try:
            read(index)
        except OSError:
            return False
        return True

    return pixels


@torch.no_grad()
def _observed(
    model: ConvNeXt, modules: Mapping[str, nn.Linear | nn.Conv2d], images: Tensor, first: int
) -> tuple[Statistics, Tensor | tuple[Tensor, ...]]:
    """Observe one batch, whose images are number `first` and following; return also what the model says of them."""
    statistics: Statistics = {}

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = nhwc(inputs[0]) if isinstance(module, nn.Conv2d) else inputs[0]
            for parity, half in enumerate(HALVES):
                part = values[(first + parity) % 2 :: 2]
                if len(part):
                    statistics[f"{name}/{half}"] = histogram(part, name)

        return observe

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(observer(name)).remove)
        outputs = model(images)
    return statistics, outputs


def _seen(raw: NDArray[np.uint8], outputs: Tensor | tuple[Tensor, ...]) -> Seen:
    """What is kept of each image of a batch."""
    mean, std = description.described(raw)
    classes = np.zeros(len(raw), np.int64)
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        classes = description.answered(outputs.float().cpu().numpy())
    return {"mean": mean, "std": std, "classes": classes}
