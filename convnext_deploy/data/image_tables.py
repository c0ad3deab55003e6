"""Images in parquet files and datasets of Hugging Face: a row an image, its label in a column."""

import io
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from ..env import needs
from ..errors import DataError, plain
from . import remote
from .image_source import CHOOSE, ImageSource, unique
from .readers import PARQUET_ERRORS, Rows, file_content, refuse_large

MAX_GROUP_BYTES = 2**32  # of one row group, decompressed; it is read as a whole


def parquet_source(data: str, files: Sequence[str]) -> ImageSource:
    """Names and labels are read at once, images a row group at a time when they are asked for.

    Args:
        files: absolute paths, or addresses.
    """
    with needs("pyarrow"):
        import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[int | None] = []
    class_names = None
    groups: list[tuple[str, int]] = []
    starts: list[int] = []  # index of the first image of each row group
    for path in files:
        try:
            with remote.opened(path) as stream, pq.ParquetFile(stream) as file:
                columns = _check_schema(file.schema_arrow, path)
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).total_byte_size
                    if size > MAX_GROUP_BYTES:
                        raise DataError(
                            f"{path} has a row group of {size:,} bytes; at most {MAX_GROUP_BYTES:,} are read at once, "
                            "write it with smaller row groups"
                        )
                    groups.append((path, group))
                    starts.append(len(names))
                    rows = file.read_row_group(group, columns=["image.path", "label"]).to_pylist()
                    names += [
                        (row.get("image") or {}).get("path") or f"{PurePosixPath(path).name}#{number}"
                        for number, row in enumerate(rows, len(names))
                    ]
                    labels += [row.get("label") for row in rows]
        except PARQUET_ERRORS as error:
            raise DataError(f"{path} cannot be read as parquet: {plain(error)}") from None
        if path != files[0] and columns != class_names:
            raise DataError(f"{path} names other classes than {files[0]}; give files of one dataset")
        class_names = columns

    sizes = np.diff([*starts, len(names)])
    rows = np.concatenate([np.arange(size) for size in sizes]) if names else np.empty(0, np.int64)
    places = np.stack([np.repeat(np.arange(len(groups)), sizes), rows], axis=1)
    return _in_order(data, names, labels, class_names, Rows(groups, places))


def _check_schema(schema: Any, path: str) -> tuple[str, ...] | None:
    """The class names in the schema of a parquet file, None where it has none.

    Raises:
        DataError: the columns are not those of Hugging Face's image layout.
    """
    import pyarrow as pa

    image = schema.field("image").type if "image" in schema.names else None
    fields = {field.name: field.type for field in image} if image is not None and pa.types.is_struct(image) else {}
    if fields.get("bytes") not in (pa.binary(), pa.large_binary()):
        raise DataError(f"{path} has no column image {{bytes, path}} (its columns: {', '.join(schema.names)})")
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise DataError(f"{path} has labels of type {schema.field('label').type}; expected integers")
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return msgspec.convert(features["label"]["names"], tuple[str, ...])
    except (LookupError, TypeError, ValueError, RecursionError):  # written by something else than `datasets`
        return None


def dataset_source(data: str, name: str, split: str | None) -> ImageSource:
    if split is None:
        raise DataError(f"{data} needs a split{CHOOSE}, such as validation or test")
    with needs("datasets"), redirect_stdout(io.StringIO()):  # timm prints advice of its own
        from timm.data.readers.reader_hfds import ReaderHfds
    try:
        reader = ReaderHfds(name=name, split=split)
        # The column of the Arrow table, because a row of the dataset would read the image too.
        paths = reader.dataset.data.column(reader.image_key).combine_chunks().field("path").to_pylist()
        labels = list(reader.dataset["label"]) if "label" in reader.dataset.column_names else [None] * len(reader)
    except Exception as error:  # of `datasets`, its file systems and its network client, which share no base class
        raise DataError(f"{data} (split {split}) cannot be opened: {plain(error)}") from error
    lock = threading.Lock()

    def read_bytes(index: int) -> bytes:
        with lock:
            image = reader.dataset[index][reader.image_key]
        content: bytes = image["bytes"] or (file_content(Path(image["path"])) if image["path"] else b"")
        refuse_large(len(content))
        return content

    names = [path or f"{split}#{row}" for row, path in enumerate(paths)]
    class_names = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)) or None
    return _in_order(data, names, labels, class_names, read_bytes)


def _in_order(
    data: str,
    names: list[str],
    labels: Sequence[int | None],
    class_names: tuple[str, ...] | None,
    read_bytes: Callable[[int], bytes],
) -> ImageSource:
    """The source of a table in the order of its rows. Labels that are all missing, or all -1, are no labels."""
    if not names:
        raise DataError(f"{data} holds no rows; expected one an image")
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
