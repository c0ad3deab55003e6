"""The closed sets of words and the constraints that several records share."""

import errno
from pathlib import Path
from typing import Annotated, Literal

import msgspec

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
NetworkTask = Literal["classify", "embed", "features"]  # of the network alone
# segment: with the head that makes a class of each pixel; detect: with the one that makes boxes.
Task = Literal["classify", "embed", "features", "segment", "detect"]
# Whose products a plan can name, and for which there are models to compare with.
PlanTask = Literal["classify", "embed", "features", "segment"]
# What a classifier's outputs mean, as in transformers' `problem_type`: logits of classes of which an image has one, or
# any number; the one logit of the second of two classes; or values.
Problem = Literal["single-label", "multi-label", "binary", "regression"]
# What a model is judged as: a classifier as its outputs mean, a segmenter by its pixels, a detector by its boxes.
Goal = Literal["single-label", "multi-label", "binary", "regression", "segmentation", "detection"]
InputKind = Literal["float32", "uint8"]
Device = Literal["cpu", "cuda"]
Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]  # what a float holds too, as plots have it
# What a model may be. Records and configurations can be anybody's, and what is made of them takes memory for each of
# these; the limits are far beyond every published model. The largest image has as many pixels as one that is decoded.
MAX_SIDE, MAX_BATCH = 8192, 65_536
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]  # pixels
Channels = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Epsilon = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
Images = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Above0 = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]  # a time or a rate; ratios beyond would overflow
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
SHOWN_ITEMS = 5  # of a sequence, where a record is printed
STRIDE = 32  # input pixels per pixel of the last feature map, in every architecture of the family


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything on disk. A field that a later version has added is not read."""

    def __repr__(self) -> str:
        """Its fields, and of a long sequence the first items: a result fits on a screen, whatever it was made of."""
        fields = (f"{name}={_shown(getattr(self, name))}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(fields)})"


def _shown(value: object) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    items = [_shown(item) for item in value[:SHOWN_ITEMS]]
    more = [f"... {len(value) - SHOWN_ITEMS:,} more"] if len(value) > SHOWN_ITEMS else []
    return f"({', '.join(items + more)}{',' if len(value) == 1 else ''})"


class HandWritten(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what people write or edit: a misspelled field is an error, and not a setting that does nothing."""


# Of every file that is read again. Optional fields are added within a version; whatever else changes raises it, and the
# version before is then still read.
SCHEMA = 1
SchemaVersion = Annotated[int, msgspec.Meta(ge=max(1, SCHEMA - 1), le=SCHEMA)]

MAX_BYTES = 64 << 20  # of a record; the manifest of a model with 21,841 labels has 1 MB
_PIECE = 1 << 20
MAX_RESULTS_BYTES = 1 << 30  # of results, of which a file may contain any number


def content_of(path: Path, most: int = MAX_BYTES) -> bytes:
    """A file of a record or of settings, which may be anybody's: one without an end is not read to the end of memory.

    Raises:
        OSError: it cannot be read, or has more bytes.
    """
    pieces, size = [], 0
    with path.open("rb") as file:
        while size <= most and (piece := file.read(_PIECE)):  # a read of all at once takes `most` bytes beforehand
            pieces.append(piece)
            size += len(piece)
    if size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes, which is the most that is read", str(path))
    return b"".join(pieces)


PlanType = Literal["int8", "fp8"]
KernelChoice = Literal["none", "measured", "all"]
