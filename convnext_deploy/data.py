"""Labelled images from folders, tar shards, Hugging Face parquet and datasets, and what makes them a model's input.

Which images a source holds and which labels they have is decided by timm's own readers, and how an image becomes
pixels by timm's own evaluation transform, so that an accuracy measured here is the one that timm's `validate.py`
measures. Two things differ on purpose: a corrupt image is an error of that image (timm takes the next one in its
place and counts that twice), and folders and tars are read in the order of their names, not in that of the disk.
"""

import bisect
import functools
import hashlib
import io
import itertools
import json
import re
import struct
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .env import needs
from .errors import DataError

EXPECTED = (
    "expected a folder of class folders, a folder of images, a .tar file or a folder of them, "
    "a .parquet file or a folder of them, or hfds:NAME"
)
SPLITS = {"train", "val", "valid", "validation", "test", "eval"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}  # what timm's readers take for an image; other files are left out
ROW_GROUPS_KEPT = 2  # of a parquet source in memory at once; neighbouring images may straddle two

# What Pillow's decoders raise for damaged files beside OSError.
_DECODER_ERRORS = (
    SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageSource:
    """Images to read by index, in an order that is the same on every machine. Reading is safe from many threads."""

    name: str  # as given to `open_source`, the split behind it
    names: tuple[str, ...]  # unique; relative paths where the source has them
    labels: NDArray[np.int64] | None  # (N,); None: the source has no labels
    class_names: tuple[str, ...] | None  # by label
    read_bytes: Callable[[int], bytes]  # the encoded image of an index

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read and decode one image.

        Raises:
            OSError: the image is missing, empty, truncated, or nothing that Pillow decodes. One line, and the same
                line whenever the same image is read.
            DataError: the source itself cannot be read any more.
        """
        try:
            content = self.read_bytes(index)
        except (FileNotFoundError, PermissionError) as error:
            raise OSError(f"the file cannot be opened: {error.strerror}") from error
        except OSError as error:  # a disk or network that fails says nothing about the image
            raise DataError(f"{self.names[index]} of {self.name} cannot be read: {error}; run again to go on") from None
        if not content:
            raise OSError("the file is empty")
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except UnidentifiedImageError as error:  # its own text holds a memory address
            raise OSError("not an image in a format that Pillow knows") from error
        except _DECODER_ERRORS as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        return image

    @functools.cached_property
    def sha256(self) -> str:
        """Of the names and labels; the pixels are not part of it."""
        digest = hashlib.sha256(msgspec.json.encode(self.names))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def open_source(data: str, split: str | None = None) -> ImageSource:
    """Open an image source by what lies at a path, or a dataset by `hfds:NAME`.

    Taken are a folder of class folders (labels are the folders' names in timm's natural order), a folder of images
    without labels, .tar files with class folders inside, a folder of .tar shards (a shard without class folders is
    itself one class), and parquet files with the columns `image` {bytes, path} and `label`.

    Args:
        data: a path, or `hfds:` and the name or path that `datasets.load_dataset` takes.
        split: a subfolder, the first part of parquet names such as `test-00000-of-00001.parquet`, or the split of a
            dataset. None where there is only one.

    Raises:
        DataError: the source is absent, of no known kind, without images, or leaves open what its labels are.
        MissingPackageError: `hfds:` without the `datasets` package.
    """
    source = _opened(data, split)
    return source if split is None else replace(source, name=f"{data}, split {split}")


def _opened(data: str, split: str | None) -> ImageSource:
    if data.startswith("hfds:"):
        return _hfds(data, data.removeprefix("hfds:"), split)
    path = Path(data)
    if not data or not path.exists():
        raise DataError(f"{data!r} does not exist; {EXPECTED}")
    if path.is_dir():
        return _folder(data, path, split)
    if split is not None:
        raise DataError(f"{data} is one file and has no split {split!r}; leave --split out")
    if path.suffix.lower() == ".tar":
        return _tar(data, path)
    if path.suffix.lower() == ".parquet":
        return _parquet(data, [path])
    raise DataError(f"{data} is a file of another kind; {EXPECTED}")


def subset(source: ImageSource, limit: int) -> ImageSource:
    """At most `limit` images, evenly spaced over the source: the first ones of a class folder are all of one class."""
    if limit >= len(source):
        return source
    return _chosen(source, [position * len(source) // limit for position in range(limit)])


def parts(source: ImageSource, sizes: Sequence[int], seed: int = 0) -> list[ImageSource]:
    """Disjoint random parts of a source, each in the source's order; the last size may be -1 for all that is left.

    Raises:
        DataError: there are fewer images than that.
    """
    wanted = sum(size for size in sizes if size > 0)
    if wanted + (sizes[-1] == -1) > len(source):
        raise DataError(f"{source.name} has {len(source)} images; {wanted} and more are needed, give more")
    order = np.random.default_rng(seed).permutation(len(source))
    found, start = [], 0
    for size in sizes:
        stop = len(source) if size == -1 else start + size
        found.append(_chosen(source, sorted(order[start:stop].tolist())))
        start = stop
    return found


def _chosen(source: ImageSource, indices: list[int]) -> ImageSource:
    return replace(
        source,
        names=tuple(source.names[index] for index in indices),
        labels=None if source.labels is None else source.labels[indices],
        read_bytes=lambda position: source.read_bytes(indices[position]),
    )


def _folder(data: str, path: Path, split: str | None) -> ImageSource:
    folders = {child.name: child for child in path.iterdir() if child.is_dir()}
    if split in folders:
        return _folder(data, folders[split], None)
    parquets, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
    if parquets and tars:
        raise DataError(f"{data} holds both .parquet and .tar files; give one of the two")
    if parquets:
        return _parquet(data, _of_split(data, parquets, split))
    # A class may be called "train" too, but the folder of a split holds folders.
    splits = sorted(name for name in SPLITS & set(folders) if any(child.is_dir() for child in folders[name].iterdir()))
    if split is not None:
        found = f"it has {', '.join(splits)}" if splits else "it has no splits, leave --split out"
        raise DataError(f"{data} has no folder for the split {split!r}; {found}")
    if tars:
        return _tar(data, path)
    if splits:
        raise DataError(f"{data} has the split folders {', '.join(splits)}; choose one with --split")
    return _class_folders(data, path)


def _class_folders(data: str, path: Path) -> ImageSource:
    from timm.data.readers import create_reader

    try:
        reader = create_reader("", root=str(path))
    except RuntimeError:  # timm's for a folder without images
        raise DataError(f"{data} holds no {_suffixes()} images; {EXPECTED}") from None
    files = [Path(file) for file, _ in reader.samples]
    return _by_name(
        data,
        [file.relative_to(path).as_posix() for file in files],
        [label for _, label in reader.samples],
        reader.class_to_idx,
        lambda index: files[index].read_bytes(),
    )


def _tar(data: str, path: Path) -> ImageSource:
    """A .tar file, or a folder of them. Tars inside tars are read too."""
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        for shard in [path] if path.is_file() else sorted(path.glob("*.tar")):
            _refuse_webdataset(shard)
        # Without cache_tarinfo=False timm writes, and later trusts, a pickle beside shards of more than 10 GB.
        reader = ReaderImageInTar(str(path), cache_tarinfo=False)
    except (tarfile.TarError, OSError, AssertionError) as error:
        raise DataError(f"{data} cannot be read as uncompressed tar: {error}") from None
    except ValueError:  # timm's for tars without images
        raise DataError(f"{data} holds no {_suffixes()} images; {EXPECTED}") from None
    names, places = [], []
    for member, shard_name, child in reader.samples:
        if member.sparse is not None:
            raise DataError(f"{member.name} in {data} is stored as a sparse file; make the tar again without --sparse")
        shard = path if shard_name is None else path / shard_name
        names.append(str(PurePosixPath(shard_name or "", child.name if child else "", member.name)))
        places.append((shard, member.offset_data + (child.offset_data if child else 0), member.size))

    def read_bytes(index: int) -> bytes:
        # Without `tarfile`, whose open files can serve one thread at a time.
        shard, offset, size = places[index]
        with shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise DataError(f"{shard} was truncated while it was read; run again with the whole file")
        return content

    return _by_name(data, names, reader.targets.tolist(), reader.class_name_to_idx, read_bytes)


def _refuse_webdataset(shard: Path) -> None:
    """timm's map-style reader sees only the images of such a shard and would take the shard's name for their class."""
    with tarfile.open(shard, "r:") as tar:
        first = [PurePosixPath(member.name) for member in itertools.islice(tar, 32)]
    images = {path.with_suffix("") for path in first if path.suffix.lower() in IMAGE_SUFFIXES}
    for path in first:
        if path.suffix in {".cls", ".json", ".txt"} and path.with_suffix("") in images:
            raise DataError(
                f"{shard} is in the webdataset layout ({path.name} beside its image); expected class folders in the "
                "tar, or convert it to parquet"
            )


def _by_name(
    data: str,
    names: list[str],
    labels: list[int],
    class_to_index: dict[str, int],
    read_bytes: Callable[[int], bytes],
) -> ImageSource:
    """The source in the order of its names; timm's has ties that follow the order of the disk."""
    unlabelled = set(class_to_index) == {""}
    if "" in class_to_index and not unlabelled:
        stray = names[labels.index(class_to_index[""])]
        raise DataError(f"{data} has images both inside and outside class folders, such as {stray}; move those outside")
    order = sorted(range(len(names)), key=names.__getitem__)
    return ImageSource(
        name=data,
        names=_unique([names[index] for index in order]),
        labels=None if unlabelled else np.array([labels[index] for index in order], np.int64),
        class_names=None if unlabelled else tuple(sorted(class_to_index, key=class_to_index.__getitem__)),
        read_bytes=lambda position: read_bytes(order[position]),
    )


def _of_split(data: str, files: list[Path], split: str | None) -> list[Path]:
    """Those parquet files that belong to a split by Hugging Face's naming, `test-00000-of-00003.parquet`."""
    named = {file: match[1] for file in files if (match := re.fullmatch(r"(.+?)-\d+-of-\d+.*", file.stem))}
    splits = sorted(set(named.values()))
    if split is None and len(splits) > 1:
        raise DataError(f"{data} has the splits {', '.join(splits)}; choose one with --split")
    if split is not None and split not in splits:
        found = f"it has {', '.join(splits)}" if splits else "its files name no split, leave --split out"
        raise DataError(f"{data} has no parquet files of the split {split!r}; {found}")
    return files if split is None else [file for file in files if named.get(file) == split]


def _parquet(data: str, files: list[Path]) -> ImageSource:
    """Names and labels are read at once, images a row group at a time when they are asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[int | None] = []
    class_names = None
    groups: list[tuple[Path, int]] = []
    starts: list[int] = []  # index of the first image of each row group
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                found = _check_schema(file.schema_arrow, path)
                for group in range(file.num_row_groups):
                    groups.append((path, group))
                    starts.append(len(names))
                    rows = file.read_row_group(group, columns=["image.path", "label"]).to_pylist()
                    names += [
                        (row.get("image") or {}).get("path") or f"{path.name}#{number}"
                        for number, row in enumerate(rows, len(names))
                    ]
                    labels += [row.get("label") for row in rows]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {_one_line(error)}") from None
        if path != files[0] and found != class_names:
            raise DataError(f"{path} names other classes than {files[0]}; give files of one dataset")
        class_names = found

    @functools.lru_cache(ROW_GROUPS_KEPT)
    def images(path: Path, group: int) -> Any:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=["image.bytes"])["image"]

    lock = threading.Lock()

    def read_bytes(index: int) -> bytes:
        group = bisect.bisect_right(starts, index) - 1
        try:
            with lock:  # threads wait for one another's row group instead of each reading it
                image = images(*groups[group])[index - starts[group]].as_py()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{groups[group][0]} cannot be read: {_one_line(error)}; run again to go on") from None
        return (image and image["bytes"]) or b""

    return _in_order(data, names, labels, class_names, read_bytes)


def _check_schema(schema: Any, path: Path) -> tuple[str, ...] | None:
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
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):  # written by something else than `datasets`
        return None


def _hfds(data: str, name: str, split: str | None) -> ImageSource:
    if split is None:
        raise DataError(f"{data} needs a split; give --split, such as validation or test")
    with needs("datasets"), redirect_stdout(io.StringIO()):  # timm prints advice of its own
        from timm.data.readers.reader_hfds import ReaderHfds
    try:
        reader = ReaderHfds(name=name, split=split)
        # The column of the Arrow table, because a row of the dataset would read the image too.
        paths = reader.dataset.data.column(reader.image_key).combine_chunks().field("path").to_pylist()
        labels = list(reader.dataset["label"]) if "label" in reader.dataset.column_names else [None] * len(reader)
    except Exception as error:  # of `datasets`, its file systems and its network client, which share no base class
        raise DataError(f"{data} (split {split}) cannot be opened: {_one_line(error)}") from error
    lock = threading.Lock()

    def read_bytes(index: int) -> bytes:
        with lock:
            image = reader.dataset[index][reader.image_key]
        return image["bytes"] or (Path(image["path"]).read_bytes() if image["path"] else b"")

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
        raise DataError(f"{data} holds no rows; {EXPECTED}")
    unlabelled = set(labels) <= {None, -1}
    if not unlabelled and None in labels:
        raise DataError(
            f"{data} has no label for {names[labels.index(None)]}; expected one for every image or for none"
        )
    return ImageSource(
        name=data,
        names=_unique(names),
        labels=None if unlabelled else np.array(labels, np.int64),
        class_names=class_names,
        read_bytes=read_bytes,
    )


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names that can be written as UTF-8; the second and later of the same name get #2, #3 ... behind them."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        printable = name.encode("utf-8", "backslashreplace").decode()
        seen[printable] += 1
        result.append(printable if seen[printable] == 1 else f"{printable}#{seen[printable]}")
    return tuple(result)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
