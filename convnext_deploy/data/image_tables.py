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
from .entries import LABELS, by_labels, is_of_masks, source_of
from .image_source import ClassOrder, ImageSource, ordered, unique
from .readers import PARQUET_ERRORS, Rows, row_group

MAX_GROUP_BYTES = 2**32  # of one row group, decompressed; it is read as a whole
IMAGES = ("image", "img", "pixel_values", "jpg", "png")  # names of a column of images, in small letters


def image_column(columns: Sequence[str]) -> str | None:
    """Which of the columns that hold images has those that masks belong to; None: their names do not say it."""
    named = {column.lower(): column for column in reversed(columns)}
    known = next((named[name] for name in IMAGES if name in named), None)
    rest = [column for column in columns if not is_of_masks(column)]
    return rest[0] if known is None and len(rest) == 1 else known


def parquet_source(data: str, files: Sequence[str], order: ClassOrder = "torchvision") -> ImageSource:
    """Names and labels are read at once, images a row group at a time when they are asked for.

    Args:
        files: absolute paths, or addresses.
        order: who numbers classes of which the column contains the names.

    Raises:
        DataError: damaged, of several data sets, or without a column of images as Hugging Face writes it.
    """
    with needs("pyarrow"):
        import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[Any] = []
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
                    column_names = [f"{columns.images}.path", *((columns.labels,) if columns.labels else ())]
                    rows = row_group(file, group, column_names).to_pylist()
                    names += [
                        (row.get(columns.images) or {}).get("path") or f"{PurePosixPath(path).name}#{number}"
                        for number, row in enumerate(rows, len(names))
                    ]
                    labels += [row.get(columns.labels) for row in rows]
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
    read_bytes = Rows(groups, places, first.images)
    if any(isinstance(label, (list, float, bool)) for label in labels):
        source = _by_labels(data, names, labels, order, first.class_names, read_bytes)
    else:
        source = _in_order(data, names, *_numbers(labels, order), first.class_names, read_bytes)
    return replace(source, columns={other: Rows(groups, places, other) for other in first.others})


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is in a Parquet file."""

    images: str
    others: tuple[str, ...]  # of images too, such as masks
    labels: str | None  # numbers of classes, or their names
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
        raise DataError(
            f"{path} has no column image {{bytes, path}} (its columns: {', '.join(schema.names)}); write a table of "
            "paths as CSV, with the columns path and label"
        )
    images = image_column(candidates)
    if images is None:
        raise DataError(
            f"{path} has the columns of images {', '.join(candidates)}; expected one of them to be called image"
        )
    classes = _class_names(schema)
    kinds = {field.name: field.type for field in schema if _is_of_labels(field.type)}
    # Where several are called so, lists and values are the less likely.
    fitting = sorted(kinds, key=lambda name: (pa.types.is_floating(kinds[name]), pa.types.is_nested(kinds[name])))
    labels = next((name for name in (*fitting, *classes) if name.lower() in LABELS or name in classes), None)
    if "label" in schema.names and "label" not in candidates:
        labels = "label"
        if labels not in fitting:
            raise DataError(
                f"{path} has labels of type {schema.field('label').type}; expected numbers or names of classes, one or "
                "a list, or Hugging Face's own reader with hfds:FOLDER"
            )
    others = tuple(name for name in candidates if name != images)
    return _Columns(images, others, labels, None if labels is None else classes.get(labels))


def _is_of_labels(kind: Any) -> bool:
    """Whether a column of this type contains numbers or texts, plain, in lists or as pandas keeps categories."""
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    plain_kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    return any(is_kind(kind) for is_kind in plain_kinds)


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """The names of the classes that columns have numbers of, as `datasets` writes them beside the schema."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        inner = {name: _inner(features[name]) for name in schema.names}
        with_names = [name for name, feature in inner.items() if isinstance(feature, dict) and "names" in feature]
        return {name: msgspec.convert(inner[name]["names"], tuple[str, ...]) for name in with_names}
    except (LookupError, TypeError, ValueError, RecursionError):  # written by something else than `datasets`
        return {}


def _inner(feature: Any) -> Any:
    """What a list contains, as any version of `datasets` writes that; anything else as it is."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature", feature) if isinstance(feature, dict) else feature


def _by_labels(
    data: str,
    names: list[str],
    labels: Sequence[Any],
    order: ClassOrder,
    class_names: tuple[str, ...] | None,
    read_bytes: Callable[[int], bytes],
) -> ImageSource:
    """The source of a table whose labels are lists or have a point, as lists of images have them."""
    said = [[] if label is None else label if isinstance(label, list) else [label] for label in labels]
    if not any(isinstance(label, list) for label in labels) and None in labels:
        raise DataError(
            f"{data} has no label for {names[labels.index(None)]}; expected one for every image or for none"
        )
    strange = next((label for own in said for label in own if not isinstance(label, (str, int, float))), "")
    if strange != "":
        raise DataError(f"{data} has {strange!r} in a list of labels; expected numbers or names")
    annotations = by_labels(list(unique(names)), said, order, data)
    if class_names is not None:
        annotations = replace(annotations, class_names=class_names)
    return source_of(data, annotations, read_bytes, annotations.notes)


def _numbers(labels: Sequence[int | str | None], order: ClassOrder) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Labels as numbers, and the classes' names where the column has these in the place of numbers."""
    names = {label for label in labels if isinstance(label, str)}
    if not names:
        return [label for label in labels if not isinstance(label, str)], None
    classes = ordered(sorted(names), order)
    number = {name: index for index, name in enumerate(classes)}
    return [number.get(label) if isinstance(label, str) else None for label in labels], tuple(classes)


def _in_order(
    data: str,
    names: list[str],
    labels: Sequence[int | None],
    named: tuple[str, ...] | None,
    class_names: tuple[str, ...] | None,
    read_bytes: Callable[[int], bytes],
) -> ImageSource:
    """The source of a table in the order of its rows. Labels that are all missing, or all -1, are no labels.

    Args:
        named: the classes that the column itself names, in an order that nobody has said.
    """
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
        class_names=named or class_names,
        read_bytes=read_bytes,
        labels_from="column" if named is None else "names",
        ordered_by="" if named is None else "the class names of the column in their order",
    )
