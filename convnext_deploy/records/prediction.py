"""What a model says of single images."""

from collections.abc import Iterator
from typing import Annotated, Literal, overload

import msgspec

from .base import Fraction, Goal, Record, Sha256

NamesFrom = Literal["artifact", "file", "imagenet", "none"]


class ClassProbability(Record, frozen=True, kw_only=True):
    """One class for one image. `name` is None where nothing says what the output means.

    Probabilities sum to 1 over the classes of which an image has one. Those of a multi-label model are each for itself.
    """

    number: Annotated[int, msgspec.Meta(ge=0)]
    name: str | None
    probability: float


class ClassArea(Record, frozen=True, kw_only=True):
    """The share of an image's pixels that a segmenter assigns to one class."""

    number: Annotated[int, msgspec.Meta(ge=0)]
    name: str | None
    share: Fraction


class Mask(Record, frozen=True, kw_only=True):
    """The pixels of an object as COCO's run lengths: column after column, those outside and those inside in turn."""

    size: tuple[int, int]  # (height, width)
    counts: tuple[int, ...]


class Box(Record, frozen=True, kw_only=True):
    """One object that a detector finds, in the image's own pixels."""

    number: Annotated[int, msgspec.Meta(ge=0)]
    name: str | None
    score: Fraction
    left: float
    top: float
    right: float
    bottom: float
    mask: Mask | None = None  # of a detector that outputs masks


class Prediction(Record, frozen=True, kw_only=True):
    """The most probable classes of one image, the first first; none of a model that outputs no classes."""

    image: str
    classes: tuple[ClassProbability, ...]
    values: tuple[float, ...] = ()  # of a regression, in the order of its outputs
    areas: tuple[ClassArea, ...] = ()  # of a segmenter, the largest first
    boxes: tuple[Box, ...] = ()  # of a detector, the one with the highest score first
    mask: str | None = None  # of a segmenter: the file


class PredictResult(Record, frozen=True, kw_only=True):
    """What one call of `predict` found: a sequence of `predictions`, in the order of the images.

    An image that could not be read has none and is in `unreadable`, so pair them by `image` and not by position.
    """

    artifact: str  # its folder, or the architecture of a session that was given
    artifact_sha256: Sha256 | None  # of manifest.json
    names_from: NamesFrom
    predictions: tuple[Prediction, ...]
    unreadable: tuple[str, ...]  # each with its reason
    notes: tuple[str, ...] = ()  # what was assumed
    problem: Goal | None = None  # what the outputs mean

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Prediction, ...]: ...

    def __getitem__(self, index: int | slice) -> Prediction | tuple[Prediction, ...]:
        return self.predictions[index]
