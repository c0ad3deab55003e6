"""Images in Parquet files, as Hugging Face writes them: a row an image, its label or mask in a column."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np

from ..env import needs
from ..errors import DataError, plain
from . import remote
from .image_source import ImageSource, unique
from .readers import PARQUET_ERRORS, Rows

MAX_GROUP_BYTES = 2**32  # of one row group, decompressed; it is read as a whole
IMAGES = ("image", "img", "pixel_values", "jpg", "png")  # names of a column of images, in small letters
MASKS = (
    "annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask",
    "semantic_segmentation", "semantic_mask", "label_map", "ground_truth", "gt",
)  # fmt: skip  # of one whose images are masks


def image_column(columns: Sequence[str]) -> str | None:
    """Which of the columns that hold images has those that masks belong to; None: their names do not say it."""
    named = {column.lower(): column for column in reversed(columns)}
    known = next((named[name] for name in IMAGES if name in named), None)
    rest = [column for column in columns if column.lower() not in MASKS]
    return rest[0] if known is None and len(rest) == 1 else known


def parquet_source(data: str, files: Sequence[str]) -> ImageSource:
    """Names and labels are read at once, images a row group at a time when they are asked for.

    Args:
        files: absolute paths, or addresses.
    """
    with needs("pyarrow"):
        import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[int | None] = []
    first: _Columns | None = None
    groups: list[tuple[str, int]] = []
    starts: list[int] = []  # index of the first image of each row group
    for path in files:
        try:
            with remote.opened(path) as stream, pq.ParquetFile(stream) as file:
                columns = _columns(file.schema_arrow, path)
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).total_byte_size
                    if size > MAX_GROUP_BYTES:
                        raise DataError(
                            f"{path} has a row group of {size:,} bytes; at most {MAX_GROUP_BYTES:,} are read at once, "
                            "write it with smaller row groups"
                        )
                    groups.append((path, group))
                    starts.append(len(names))
                    column_names = [f"{columns.images}.path", *(("label",) if columns.labelled else ())]
                    rows = file.read_row_group(group, columns=column_names).to_pylist()
                    names += [
                        (row.get(columns.images) or {}).get("path") or f"{PurePosixPath(path).name}#{number}"
                        for number, row in enumerate(rows, len(names))
                    ]
                    labels += [row.get("label") for row in rows]
        except PARQUET_ERRORS as error:
            raise DataError(f"{path} cannot be read as parquet: {plain(error)}") from None
        if first is not None and columns != first:
            what = "names other classes" if columns.class_names != first.class_names else "has other columns"
            raise DataError(f"{path} {what} than {files[0]}; give files of one dataset")
        first = columns

    sizes = np.diff([*starts, len(names)])
    rows = np.concatenate([np.arange(size) for size in sizes]) if names else np.empty(0, np.int64)
    places = np.stack([np.repeat(np.arange(len(groups)), sizes), rows], axis=1)
    assert first is not None  # no caller gives no file
    source = _in_order(data, names, labels, first.class_names, Rows(groups, places, first.images))
    return replace(source, columns={other: Rows(groups, places, other) for other in first.others})


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is in a Parquet file."""

    images: str
    others: tuple[str, ...]  # of images too, such as masks
    labelled: bool  # by the column `label`
    class_names: tuple[str, ...] | None


def _columns(schema: Any, path: str) -> _Columns:
    """
    Raises:
        DataError: the columns are not those of Hugging Face's image layout.
    """
    import pyarrow as pa

    candidates = []
    for field in schema:
        inner = {part.name: part.type for part in field.type} if pa.types.is_struct(field.type) else {}
        if inner.get("bytes") in (pa.binary(), pa.large_binary()):
            candidates.append(field.name)
    if not candidates:
        raise DataError(f"{path} has no column image {{bytes, path}} (its columns: {', '.join(schema.names)})")
    images = image_column(candidates)
    if images is None:
        raise DataError(
            f"{path} has the columns of images {', '.join(candidates)}; expected one of them to be called image"
        )
    labelled = "label" in schema.names and "label" not in candidates
    if labelled and not pa.types.is_integer(schema.field("label").type):
        raise DataError(f"{path} has labels of type {schema.field('label').type}; expected integers")
    names = None
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = msgspec.convert(features["label"]["names"], tuple[str, ...])
    except (LookupError, TypeError, ValueError, RecursionError):  # written by something else than `datasets`
        pass
    return _Columns(images, tuple(name for name in candidates if name != images), labelled, names)


def _in_order(
    data: str,
    names: list[str],
    labels: Sequence[int | None],
    class_names: tuple[str, ...] | None,
    read_bytes: Callable[[int], bytes],
) -> ImageSource:
    """The source of a table in the order of its rows. Labels that are all missing, or all -1, are no labels."""
    if not names:
        raise DataError(f"{data} has no rows; expected one an image")
    unlabelled = set(labels) <= {None, -1}
    if not unlabelled and None in labels:
        raise DataError(
            f"{data} has no label for {names[labels.index(None)]}; expected one for every image or for none"
        )
    try:
        numbers = None if unlabelled else np.array(labels, np.int64)
    except OverflowError:
        raise DataError(f"{data} has a label past 2**63; expected the numbers of classes") from None
    return ImageSource(
        name=data,
        names=unique(names),
        labels=numbers,
        class_names=class_names,
        read_bytes=read_bytes,
    )
