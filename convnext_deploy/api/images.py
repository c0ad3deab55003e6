"""Arguments that are images: a path stays one, and what a program holds becomes a source."""

import os
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .. import arguments

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

    # A path or hfds:NAME; (image, label) in a list; a dataset or loader. An image is a path, Pillow's, or an array.
    Images = arguments.Location | Indexed | Loader | ImageSource
else:
    Images = Any  # what names it needs Pillow


def images(name: str, value: Any, class_order: ClassOrder = "torchvision") -> "str | ImageSource":
    """Where images are, or the source of those that are in memory.

    Raises:
        UsageError: it is nothing that holds images.
        DataError: an item is no image with its label.
    """
    arguments.check(class_order=class_order)
    if isinstance(value, str | os.PathLike) or value is None or isinstance(value, bool | int | float | bytes):
        return arguments.images(name, value)
    from ..data import held

    return held.opened(name, value, class_order)
