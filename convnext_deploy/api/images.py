"""Arguments that are images: a path stays one, and what a program has in memory becomes a source."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypedDict

from .. import argument_names, arguments
from ..errors import UsageError
from ..records.base import Problem

ClassOrder = Literal["torchvision", "timm"]  # of `data.sources`, which needs Pillow


class Indexed(Protocol):
    """A list, a dataset of PyTorch or of Hugging Face."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Loader(Protocol):
    """A DataLoader of PyTorch, whose dataset is read."""

    @property
    def dataset(self) -> Any: ...

    @property
    def batch_size(self) -> Any: ...


if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..workflows import evaluate as workflow

    # A path or hfds:NAME; (image, label) in a list; a dataset or loader. An image is a path, Pillow's, or an array.
    Images = arguments.Location | Indexed | Loader | ImageSource
else:
    Images = Any  # what names it needs Pillow


class LabelOptions(TypedDict, total=False):
    """How the labels of `data` are found and numbered; of every function that takes labelled images."""

    split: Annotated[str | None, "which split of `data`, where it has several."]
    labels: Annotated[
        arguments.Location | None,
        "file of the model's class names in their order, a name a line or JSON (`data.numbering.class_map`); `export` "
        "writes them into the artifact. None: the artifact's own, or WordNet ids.",
    ]
    annotations: Annotated[
        arguments.Location | None,
        "what says the labels of the images in the folder `data`: a list, a COCO file, a folder of Pascal VOC's XML, "
        "or ImageNet's ground truth. Of a segmenter: a folder of masks with the images' names, or "
        "the column of the masks in a table.",
    ]
    class_order: Annotated[
        ClassOrder, 'how classes are numbered by their names: as torchvision ("10" before "2") or as timm.'
    ]


class JudgedOptions(LabelOptions, total=False):
    """How labels are found and numbered, and how outputs are compared with them."""

    problem: Annotated[
        Problem | None,
        "what the outputs mean, where the artifact does not say it: single-label, multi-label, binary (one logit) or "
        "regression. A multi-label model is judged by its mAP, a regression by its R2.",
    ]
    reduce_labels: Annotated[bool, "the masks of a segmenter count from 1, and 0 counts nowhere, as ADE20K's do."]


def images(name: str, value: Any, class_order: ClassOrder = "torchvision") -> "str | ImageSource":
    """Where images are, or the source of those that are in memory.

    Raises:
        UsageError: it is nothing that contains images.
        DataError: an item is no image with its label.
    """
    argument_names.check(class_order=class_order)
    if isinstance(value, str | os.PathLike) or value is None or isinstance(value, bool | int | float | bytes):
        return arguments.images(name, value)
    from ..data import held

    return held.opened(name, value, class_order)


def labelled(data: Any, options: Mapping[str, Any]) -> "workflow.Images":
    """Labelled images, each argument in any form that it may be written in.

    Args:
        options: `LabelOptions` or `JudgedOptions`.

    Raises:
        UsageError: an argument is not what its name means.
        DataError: an item is no image with its label.
    """
    read = _checked(options)
    read["data"] = images("data", data, options.get("class_order", "torchvision"))
    from ..workflows import evaluate as workflow

    return workflow.Images(**read)


def labelled_or_none(data: Any, options: Mapping[str, Any]) -> "workflow.Images | None":
    """Labelled images, or None where `data` is left out; what is said about images that are not given is refused.

    `labels` is not: `export` writes the names into the artifact without looking at an image.
    """
    if data is not None:
        return labelled(data, options)
    read = _checked(options)
    for name in ("annotations", "split"):
        if read.get(name) is not None:
            value = arguments.shown(read[name])
            raise UsageError(f"{name} {value} is of labelled images; give --data too, or leave it out")
    return None


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    argument_names.check(**{name: value for name, value in options.items() if name not in ("labels", "annotations")})
    read = dict(options)
    read["labels"] = arguments.maybe(arguments.path, "labels", options.get("labels"))
    read["annotations"] = arguments.maybe(arguments.images, "annotations", options.get("annotations"))
    return read
