"""Images in a program's memory: lists, datasets and loaders of PyTorch, datasets of Hugging Face, images of Pillow.

They become the same source as a folder or file does. Images in memory are encoded without loss, so that whatever reads
a source reads them as well. A dataset's own transform would change what the artifact computes: images that it has
turned into floats are refused, and of an ImageFolder the files are read.
"""

import io
import operator
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import shown
from ..env import needs
from ..errors import DataError, UsageError, counted, plain
from .decoding import UnreadableImage
from .entries import LABELS, MASKS, PATHS, Annotations, by_labels, source_of
from .image_source import CHOOSE, ClassOrder, ImageSource, chosen, unique
from .image_tables import IMAGES, image_column
from .readers import Reader, file_content, refuse_large

EXPECTED = (
    "a path, a list of (image, label), a dataset or loader of PyTorch, or a dataset of Hugging Face; an image is a "
    "path, one of Pillow's, or an array of uint8"
)


@dataclass(frozen=True, slots=True)
class _Items:
    """Numbered images with their labels, before these are understood."""

    name: str
    images: list[str]  # names
    labels: list[list[str | int | float]]
    read: Callable[[int], bytes]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    columns: Mapping[str, Reader] = field(default_factory=dict)  # of other images of each item, such as masks
    column: str = ""  # of the images, where they are in one


def opened(name: str, value: Any, order: ClassOrder = "torchvision") -> ImageSource:
    """The source of what a program passes in the place of a path.

    Args:
        name: of the argument, for errors.

    Raises:
        UsageError: it is nothing that contains images.
        DataError: it is empty, or an item is no image with its label.
    """
    if isinstance(value, ImageSource):
        return value
    if hasattr(value, "dataset") and hasattr(value, "batch_size"):
        return opened(name, value.dataset, order)  # the loader's batches and their order are its own affair
    if hasattr(value, "dataset") and hasattr(value, "indices"):  # a Subset
        whole, indices = opened(name, value.dataset, order), [operator.index(index) for index in value.indices]
        if not indices:
            raise UsageError(f"{name} is a subset of {whole} without an image; expected at least one")
        part = chosen(whole, indices)
        return replace(part, name=f"{len(indices):,} of {whole}", names=unique(part.names))
    if isinstance(value, Mapping) and value and all(hasattr(part, "column_names") for part in value.values()):
        first = next(iter(value))
        raise UsageError(f"{name} has the splits {', '.join(map(str, value))}; give one of them, such as {first!r}")
    if hasattr(value, "column_names") and hasattr(value, "features"):
        return _source(_hugging_face(name, value), order)
    if isinstance(value, (str, bytes, os.PathLike, Mapping, set)) or not (
        hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, type)
    ):
        raise UsageError(f"{name} {shown(value)}; expected {EXPECTED}")
    if hasattr(value, "ndim"):
        raise UsageError(f"{name} is an array without labels; expected {EXPECTED}")
    if len(value) == 0:
        raise UsageError(f"{name} {shown(value)} is empty; expected {EXPECTED}")
    return _source(_sequence(name, value), order)


def _source(items: _Items, order: ClassOrder) -> ImageSource:
    names = unique(items.images)
    annotations = by_labels(list(names), items.labels, order, items.name)
    if items.class_names is not None:
        if annotations.sets is None:
            raise DataError(f"{items.name} names its classes, and its labels are no numbers of them")
        annotations = Annotations(images=annotations.images, sets=annotations.sets, class_names=items.class_names)
    return replace(source_of(items.name, annotations, items.read, items.notes), columns=items.columns)


def _sequence(name: str, value: Any) -> _Items:
    """A list of pairs, or a dataset of PyTorch."""
    kind = type(value).__name__
    called = f"a {kind} of {len(value):,} images"
    classes = getattr(value, "classes", None)
    class_names = tuple(map(str, classes)) if isinstance(classes, Iterable) and not isinstance(classes, str) else None
    samples = getattr(value, "samples", None)  # of an ImageFolder: paths and numbers, which no transform has touched
    rows = value if samples is None else samples
    notes: tuple[str, ...] = ()
    if samples is not None and getattr(value, "transform", None) is not None:
        notes = ("the dataset's own transform is not applied: the artifact has its own",)
    labels: list[list[str | int | float]] = []
    names: list[str] = []
    masks = 0
    for index in range(len(rows)):
        image, label = _pair(name, _item(name, rows, index), index)
        names.append(_name(name, image, index))
        masked = isinstance(label, Image.Image) or getattr(label, "ndim", 0) > 1
        labels.append([] if masked else _labels(name, label, index))
        masks += masked
    if masks not in (0, len(rows)):
        raise UsageError(
            f"{name} has a mask for {masks:,} of its {counted(len(rows), 'image')}; expected one for each or none"
        )

    def read(index: int) -> bytes:
        return _encoded(_pair(name, _item(name, rows, index), index)[0])

    def read_mask(index: int) -> bytes:
        return _encoded(_as_mask(_pair(name, _item(name, rows, index), index)[1]))

    return _Items(called, names, labels, read, class_names, notes, {"mask": read_mask} if masks else {})


def _item(name: str, rows: Any, index: int) -> Any:
    try:
        return rows[index]
    except ConnectionError as error:
        raise DataError(f"{name}: item {index} cannot be read: {plain(error)}; run it again") from None
    except Exception as error:  # of the caller's own code, which raises anything
        raise DataError(f"{name}: item {index} cannot be read: {plain(error)}") from error


def _pair(name: str, item: Any, index: int) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        keys = {str(key).lower(): value for key, value in item.items()}
        image = next((keys[key] for key in (*IMAGES, *PATHS) if keys.get(key) is not None), None)
        return image, next((keys[key] for key in (*LABELS, *MASKS) if key in keys), None)
    if isinstance(item, (tuple, list)):
        if len(item) != 2:
            raise UsageError(f"{name}: item {index} has {len(item)} parts; expected (image, label)")
        return item[0], item[1]
    return item, None


def _name(name: str, image: Any, index: int) -> str:
    """What an image is called; refuses what is none."""
    if isinstance(image, (str, os.PathLike)):
        return str(os.fspath(image))
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "") or f"image {index}")
    if hasattr(image, "dtype") and hasattr(image, "shape"):
        if str(image.dtype).removeprefix("torch.") != "uint8" or len(image.shape) not in (2, 3):
            raise UsageError(
                f"{name}: item {index} is an array of {str(image.dtype).removeprefix('torch.')} "
                f"{tuple(image.shape)}, which a transform has made; give the dataset without its transform, for the "
                "artifact has its own"
            )
        return f"image {index}"
    raise UsageError(
        f"{name}: item {index} is {shown(image)}; expected a path, an image of Pillow's, or an array of uint8"
    )


def _labels(name: str, label: Any, index: int) -> list[str | int | float]:
    if hasattr(label, "tolist"):  # arrays and tensors, those of one number among them
        label = label.tolist()
    if label is None:
        return []
    if isinstance(label, (list, tuple, set)):
        return [one for part in label for one in _labels(name, part, index)]
    if isinstance(label, (str, float)):
        return [label]
    try:
        return [operator.index(label)]
    except TypeError:
        raise UsageError(f"{name}: the label of item {index} is {shown(label)}; expected a number or a name") from None


# Modes that live in memory only: an image is given to a model in the mode on the right anyway.
_AS_A_FILE_HAS_IT = {"YCbCr": "RGB", "HSV": "RGB", "La": "LA", "RGBa": "RGBA"}


def _encoded(image: Any) -> bytes:
    """The bytes of an image, those of a file as they are."""
    if isinstance(image, (str, os.PathLike)):
        return file_content(Path(image))
    if not isinstance(image, Image.Image):
        image = _pillow(image)
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):
        raise UnreadableImage(f"pixels of 32 bits (mode {image.mode}) have no known white; convert it to 8 bits")
    kept = io.BytesIO()
    exif = image.getexif().tobytes()
    if image.mode in _AS_A_FILE_HAS_IT:
        image = image.convert(_AS_A_FILE_HAS_IT[image.mode])
    if image.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):
        image.save(kept, "PNG", compress_level=1, **({"exif": exif} if len(image.getexif()) else {}))
    else:
        image.save(kept, "TIFF")  # CMYK and LAB, of which PNG has none
    return kept.getvalue()


def _pillow(array: Any) -> Image.Image:
    """(H, W), (H, W, C), or a tensor's (C, H, W), of uint8."""
    pixels = np.asarray(array)
    channels, is_tensor = (1, 3, 4), hasattr(array, "permute")
    if pixels.ndim == 3 and pixels.shape[0] in channels and (is_tensor or pixels.shape[2] not in channels):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and pixels.shape[2] not in channels:
        raise UnreadableImage(f"an array of shape {tuple(np.shape(array))}; expected 1, 3 or 4 channels")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _as_mask(mask: Any) -> Any:
    """An image of Pillow's, of an array (H, W) of whole numbers too."""
    if isinstance(mask, Image.Image):
        return mask
    array = np.asarray(mask)
    array = array.reshape([side for side in array.shape if side != 1]) if array.ndim == 3 else array
    if array.ndim != 2 or array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 65535:
        raise UnreadableImage(
            f"it is an array of {array.dtype} {tuple(np.shape(mask))}; expected whole numbers of 0 to 65535, (H, W)"
        )
    return Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16))


def saved_source(data: str, path: Path, order: ClassOrder) -> ImageSource:
    """What `datasets` saved to disk, one split of it."""
    with needs("datasets"):
        import datasets  # type: ignore[import-untyped]
    return _loaded(data, lambda: datasets.load_from_disk(str(path)), order, "row ")


def dataset_source(data: str, name: str, split: str | None, order: ClassOrder) -> ImageSource:
    """A split of what `datasets.load_dataset` takes."""
    if split is None:
        raise DataError(f"{data} needs a split{CHOOSE}, such as validation or test")
    with needs("datasets"):
        import datasets
    return _loaded(f"{data} (split {split})", lambda: datasets.load_dataset(name, split=split), order, f"{split}#")


def _loaded(data: str, load: Callable[[], Any], order: ClassOrder, row: str) -> ImageSource:
    try:
        dataset = load()
    except Exception as error:  # of `datasets`, its file systems and its network client, which share no base class
        raise DataError(f"{data} cannot be opened: {plain(error)}") from error
    items = _hugging_face(data, dataset)
    # Nobody has chosen rows of it yet, so those of its table are in order. Its chunks are not joined: that would copy
    # all images, and more than 2 GiB of them are too many for one.
    chunks = dataset.data.column(items.column).chunks
    paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
    return _source(
        replace(items, name=data, images=[path or f"{row}{index}" for index, path in enumerate(paths)]), order
    )


def _hugging_face(name: str, value: Any) -> _Items:
    """A dataset of Hugging Face: the encoded bytes of its column of images, and the names of its classes."""
    features = value.features
    if features is None or not hasattr(value, "__len__"):
        raise UsageError(f"{name} is a dataset that streams; load it without streaming=True")
    images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    column = image_column(images)
    if column is None:
        what = (
            f"the columns of images {', '.join(images)}" if images else f"no column of images ({', '.join(features)})"
        )
        raise UsageError(f"{name} has {what}; expected one" + (" of them to be called image" if images else ""))
    if len(value) == 0:
        raise UsageError(f"{name} is a dataset without a row; expected {EXPECTED}")
    classes = [other for other, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    others = [other for other in features if other not in images]
    labels = next((other for other in (*others, *classes) if other.lower() in LABELS or other in classes), None)
    class_names = getattr(features[labels], "names", None) if labels else None
    inner = getattr(features[labels], "feature", None) if labels else None  # of several labels an image
    said: Any = value[labels] if labels else [None] * len(value)
    return _Items(
        name=f"a dataset of {len(value):,} images",
        images=[f"row {index}" for index in range(len(value))],
        labels=[_labels(name, one, index) for index, one in enumerate(said)],
        read=_cells(value, column),
        class_names=tuple(class_names or getattr(inner, "names", None) or ()) or None,
        column=column,
        columns={other: _cells(value, other) for other in images if other != column},
    )


def _cells(dataset: Any, column: str) -> Reader:
    """What reads the encoded images of a column."""
    raw = dataset.select_columns([column])  # else each access would read the others too
    raw = raw.cast_column(column, type(dataset.features[column])(decode=False))
    lock = threading.Lock()

    def read(index: int) -> bytes:
        with lock:
            cell = raw[index][column] or {"bytes": None, "path": None}
        content: bytes = cell["bytes"] or (file_content(Path(cell["path"])) if cell["path"] else b"")
        refuse_large(len(content))
        return content

    return read
