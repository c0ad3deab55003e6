"""Images in folders and in tar files, where the folder that an image is in says its class.

Classes are numbered in the order of their names as text, as torchvision's ImageFolder does, or as timm does. A folder
is read as ImageFolder reads it: the class is the folder directly below the root (for timm the one directly around
the image). What is elsewhere or twice is left out, and said.
"""

import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from ..errors import DataError, counted, plain
from . import remote, webdataset
from .image_source import ClassOrder, ImageSource, ordered, unique
from .links import is_inside, refuse_second_names, with_one_label_a_file
from .readers import Files, Spans, absolute
from .webdataset import Member

# Those of torchvision's ImageFolder, and what Pillow reads since; other files are left out.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".jxl")
SUFFIXES = ", ".join(IMAGE_SUFFIXES)

_OF_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}  # in small letters
_CLASS_BYTES = 1024  # of a file of webdataset's that says a class

# What `tarfile` raises for damaged archives.
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, IndexError, TypeError)


def folder_source(data: str, root: Path, order: ClassOrder = "torchvision") -> ImageSource | None:
    """The images below a folder; None where there are none.

    Links to files are followed. A link to a folder is followed where that folder is outside of the root and was not
    read before: anything else would read images twice, or for ever. Hidden files and folders are left out.

    Raises:
        DataError: images both inside and outside of class folders, a folder that cannot be listed, or a link by which
            images would have two classes.
    """
    left_out: Counter[str] = Counter()
    others: Counter[str] = Counter()
    links = _Links()
    try:
        classes: list[str] = []
        files = sorted(_walk(root, classes, left_out, others, links))
    except OSError as error:
        raise DataError(f"{error.filename} in {data} cannot be listed: {plain(error)}") from None

    notes = _left_out(left_out)
    deep = any(file.count("/") > 1 for file in files)
    if order == "timm":
        labels_of = [PurePosixPath(file).parent.name for file in files]
        # What timm finds no image in gets no number there.
        classes = sorted(set(labels_of) - {""}) if deep else [name for name in classes if name in labels_of]
        notes += ["images in folders inside class folders count to the inner folder, as in timm"] if deep else []
    else:
        labels_of = [file.partition("/")[0] if "/" in file else "" for file in files]
        notes += ["images in folders inside class folders count to the class folder, as in torchvision"] if deep else []
    top = {file.partition("/")[0] for file in files if "/" in file}
    _refuse_classes_of_other_files(data, {name: count for name, count in others.items() if name not in top}, top)
    if top:
        refuse_second_names(data, root, links.folders, classes)
    read_bytes = Files(absolute(root), tuple(files))
    source = _labelled(data, files, labels_of, ordered(classes, order), read_bytes, notes, order)
    if source is None or source.labels is None or not links.of_files:
        return source
    return with_one_label_a_file(source, [root / file for file in files])


def _refuse_classes_of_other_files(data: str, others: Mapping[str, int], classes: Collection[str]) -> None:
    """Refuse class folders with files of which none is an image: without them the other classes would be renumbered."""
    if others and classes:
        name = min(others)
        more = f", and so {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(
            f"the class folder {name} of {data} has {counted(others[name], 'file')} and not one image that is "
            f"read{more}; "
            f"expected {SUFFIXES}: convert the files, or remove the folder if it is no class"
        )


ONE_OF = {  # what is left out, where it is one alone
    "hidden files and folders": "hidden file or folder",
    "hidden files": "hidden file",
    "links to folders that are read already": "link to a folder that is read already",
    "files of other kinds": "file of another kind",
    "devices, sockets and named pipes": "device, socket or named pipe",
}


def _left_out(counts: Counter[str]) -> list[str]:
    return [f"left out: {count:,} {what if count > 1 else ONE_OF[what]}" for what, count in sorted(counts.items())]


@dataclass(slots=True)
class _Links:
    """What was seen of links."""

    folders: dict[str, str] = field(default_factory=dict)  # where those beside class folders lead that are left out
    of_files: bool = False  # whether a file has another name, here or elsewhere


def _walk(root: Path, classes: list[str], left_out: Counter[str], others: Counter[str], links: _Links) -> Iterator[str]:
    """Paths of images relative to the root, with "/" between their parts; folders directly below it are classes.

    Args:
        others: counts files of other kinds by the class folder that they are in.
    """
    top = os.path.realpath(root)
    read = {top}  # real paths of the folders behind links, and the root
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
            path = f"{below}/{entry.name}" if below else entry.name
            if is_hidden(entry.name):
                left_out["hidden files and folders"] += 1
            elif _is_folder(entry):
                if entry.is_symlink():
                    real = os.path.realpath(entry.path)
                    if any(is_inside(real, other) or is_inside(other, real) for other in read):
                        left_out["links to folders that are read already"] += 1
                        if not below:
                            links.folders[entry.name] = real
                        continue
                    read.add(real)
                waiting.append(path)
                if not below:
                    classes.append(path)
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                left_out["files of other kinds"] += 1
                if below:
                    others[below.partition("/")[0]] += 1
            elif _is_image_file(entry, links):
                yield path
            else:
                left_out["devices, sockets and named pipes"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_image_file(entry: os.DirEntry[str], links: _Links) -> bool:
    """A regular file, or a link that leads nowhere: that one is an image which cannot be read."""
    try:
        status = entry.stat()
    except OSError:
        return True
    links.of_files |= entry.is_symlink() or status.st_nlink > 1
    return stat.S_ISREG(status.st_mode)


def is_hidden(name: str) -> bool:
    """By its name, or by what a system puts beside what it keeps: macOS in archives, a NAS, a disk itself."""
    return name.startswith(".") or name in _OF_SYSTEMS


def tar_source(
    data: str, shards: Sequence[str], several: bool, order: ClassOrder = "torchvision"
) -> ImageSource | None:
    """The images in tar files, whose class is the folder directly around them; None where there are none.

    One of `several` shards that has no class folders is itself one class, and so is a tar inside a tar. In webdataset's
    layout, `a.cls` says the class of `a.jpg`, and further images of a sample are columns (`webdataset`).

    Args:
        shards: absolute paths, or addresses.

    Raises:
        DataError: a file is damaged, compressed, sparse, or contains images without a class.
    """
    members: list[Member] = []
    left_out: Counter[str] = Counter()
    others: list[tuple[str, PurePosixPath]] = []  # class and path of files of other kinds
    written: dict[str, str] = {}  # what webdataset's files say, by the names of images without their suffix
    for shard in shards:
        prefix = PurePosixPath(shard).name if several else ""
        try:
            with remote.opened(shard, forwards=True) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members += _members(tar, shard, prefix, remote.size_of(file), left_out, others, written)
        except _TAR_ERRORS as error:
            raise DataError(f"{shard} cannot be read as uncompressed tar: {plain(error)}") from None
    members.sort(key=lambda entry: entry[0])
    if written and not members:
        raise DataError(f"{data} has .cls files and no {SUFFIXES} images")
    notes = _left_out(left_out)
    if written:
        members, columns, more = webdataset.with_fields(data, members, webdataset.with_own_class(members, written))
        said = webdataset.labelled(data, members, written, order)
        return replace(said, columns=columns, notes=(*notes, *more))
    if webdataset.are_masks(members):
        members, columns, more = webdataset.with_fields(data, members, ())
        names = [name for name, _, _ in members]
        read_bytes = Spans(tuple(place for _, _, place in members))
        source = _labelled(data, names, [""] * len(names), [], read_bytes, [*notes, *more], order)
        return None if source is None else replace(source, columns=columns)
    read_bytes = Spans(tuple(place for _, _, place in members))
    names, labels_of = [name for name, _, _ in members], [label for _, label, _ in members]
    around = {PurePosixPath(name).parent.parent for name in names if "/" in name}  # of the class folders
    splits = sorted({folder.name for folder in around if folder.name.lower() in SPLITS})
    if len(splits) > 1:
        raise DataError(f"{data} has images of the splits {', '.join(splits)}; make a tar of one of them")
    beside = Counter(label for label, path in others if label and path.parent.parent in around)
    with_images = set(labels_of)
    _refuse_classes_of_other_files(data, {n: c for n, c in beside.items() if n not in with_images}, with_images)
    return _labelled(data, names, labels_of, ordered(sorted(with_images - {""}), order), read_bytes, notes, order)


def _members(
    tar: tarfile.TarFile,
    shard: str,
    prefix: str,
    end: int,
    left_out: Counter[str],
    others: list[tuple[str, PurePosixPath]],
    written: dict[str, str],
    start: int = 0,
) -> Iterator[Member]:
    """The images of one archive; `start` is its own offset in the shard."""
    texts: list[PurePosixPath] = []
    images: set[PurePosixPath] = set()
    for member in tar:
        path = PurePosixPath(member.name)
        if not member.isfile():
            continue
        if member.sparse is not None:
            raise DataError(f"{member.name} in {shard} is stored as a sparse file; make the tar again without --sparse")
        offset = start + member.offset_data
        if member.size < 0 or offset + member.size > end:
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes, which is more than there are")
        suffix = path.suffix.lower()
        if any(is_hidden(part) for part in path.parts):
            left_out["hidden files"] += 1
        elif suffix == ".tar" and not start:
            inner = tar.extractfile(member)
            assert inner is not None  # of a regular member
            name = f"{prefix}/{member.name}".lstrip("/")
            yield from _nested(inner, shard, name, offset, member.size, left_out, others, written)
        elif suffix in IMAGE_SUFFIXES:
            images.add(path.with_suffix(""))
            name = str(PurePosixPath(prefix, path))
            yield name, path.parent.name or PurePosixPath(prefix).stem, (shard, offset, member.size)
        elif suffix == ".cls" and member.size < _CLASS_BYTES:
            said = tar.extractfile(member)
            assert said is not None  # of a regular member
            written[str(PurePosixPath(prefix, path.with_suffix("")))] = said.read().decode("utf-8", "replace").strip()
        else:
            left_out["files of other kinds"] += 1
            others.append((path.parent.name or PurePosixPath(prefix).stem, PurePosixPath(prefix, path)))
            if suffix in {".json", ".txt"} and len(texts) < 1000:
                texts.append(path)
    for text in texts:
        if text.with_suffix("") in images and str(PurePosixPath(prefix, text.with_suffix(""))) not in written:
            # A map-style reader sees only the images of such a shard and would take its name for their class.
            raise DataError(
                f"{shard} is in the webdataset layout ({text.name} beside its image) without .cls files, which say "
                "the class; add them, or use class folders in the tar"
            )


def _nested(
    inner: IO[bytes],
    shard: str,
    prefix: str,
    offset: int,
    size: int,
    left_out: Counter[str],
    others: list[tuple[str, PurePosixPath]],
    written: dict[str, str],
) -> Iterable[Member]:
    with tarfile.open(fileobj=inner, mode="r:") as tar:
        return list(_members(tar, shard, prefix, offset + size, left_out, others, written, offset))


def _labelled(
    data: str,
    names: list[str],
    labels_of: list[str],
    classes: list[str],
    read_bytes: Callable[[int], bytes],
    notes: list[str],
    order: ClassOrder,
) -> ImageSource | None:
    """The source of images whose classes have these names; "" is none."""
    if not names:
        return None
    with_class = set(labels_of) - {""}
    if with_class and "" in labels_of:
        stray = names[labels_of.index("")]
        raise DataError(f"{data} has images both inside and outside class folders, such as {stray}; move those outside")
    labels = None
    if with_class:
        number = {name: index for index, name in enumerate(classes)}
        labels = np.array([number[label] for label in labels_of], np.int64)
        empty = [name for name in classes if name not in with_class]
        if empty:
            more = f" and {len(empty) - 4} more" if len(empty) > 4 else ""
            notes.append(f"nothing in the class folders {', '.join(empty[:4])}{more}; they keep their numbers")
    return ImageSource(
        name=data,
        names=unique(names),
        labels=labels,
        class_names=unique(classes) if with_class else None,
        read_bytes=read_bytes,
        labels_from="names",
        ordered_by=f"the class folders sorted {'by name' if order == 'torchvision' else 'as timm does'}",
        notes=tuple(notes),
    )
