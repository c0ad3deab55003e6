"""Labelled images from folders, tar shards, lists, annotations, Hugging Face parquet and datasets: a path, opened.

How an image becomes pixels is timm's evaluation transform (`data.preprocess.transform`), so that an accuracy measured
here is the one that timm's `validate.py` measures. Three things differ on purpose: a corrupt image is an error of that
image (timm takes the next one in its place and counts that twice), class folders are numbered as torchvision's
ImageFolder numbers them unless timm's order is asked for, and images are read in the order of their names.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..errors import DataError, printable
from . import other_tools, remote
from .annotations import SUFFIXES_OF_FILES, annotated_source, is_voc, list_source, voc_source
from .class_folders import IMAGE_SUFFIXES, SPLITS, SUFFIXES, folder_source, is_hidden, tar_source
from .held import dataset_source, saved_source
from .image_lists import LIST_SUFFIXES, says_labels
from .image_source import CHOOSE, ClassOrder, ImageSource, parts, subset
from .image_tables import parquet_source
from .readers import absolute

__all__ = ["ClassOrder", "ImageSource", "open_source", "open_whole", "parts", "subset"]

EXPECTED = (
    "expected a folder of class folders, a folder of images, a .tar file or a folder of them, "
    "a .parquet file or a folder of them, a list of images (.csv, .tsv, .txt, .json, .jsonl), hfds:NAME, or an "
    "address such as s3://bucket/val-*.tar"
)
SAVED = ("state.json", "dataset_info.json")  # of a split that `datasets` saved to disk
METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's folders of images

_IN_PYTHON = "read it in Python, and give `convnext_deploy.evaluate` the images and labels as a list or Dataset"
# Other files that people have images in: how their names end, what they are, and what to do.
_OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".zip", ".7z", ".rar"), "an archive", "unpack it, and give the folder"),
    ((".gz", ".tgz", ".bz2", ".xz", ".zst"), "compressed", "unpack it, and give the folder or the .tar"),
    ((".npz", ".npy", ".mat", ".h5", ".hdf5", ".pkl", ".pt", ".tfrecord", ".mdb", ".beton"), "no image file",
     _IN_PYTHON),
    ((".arrow",), "a table of Arrow", "write it with datasets.Dataset.from_file(FILE).to_parquet('images.parquet')"),
    ((".xlsx", ".xls", ".ods"), "a spreadsheet", "save it as CSV"),
    ((".lst", ".manifest"), "a list of another tool", "write it as CSV with the columns path and label"),
    ((".rec", ".idx"), "no image file", _IN_PYTHON),
    ((".yaml", ".yml"), "a description", "give the folder of images, and a list with --annotations"),
    (IMAGE_SUFFIXES, "one image", "give the folder that it is in, or use `predict` for single images"),
)  # fmt: skip


def open_source(
    data: str | ImageSource,
    split: str | None = None,
    *,
    annotations: str | None = None,
    class_order: ClassOrder = "torchvision",
) -> ImageSource:
    """Open an image source by what is at a path, or a dataset by `hfds:NAME`.

    Taken are a folder of class folders, a folder of images without labels, .tar files with class folders inside, a
    folder of .tar shards (a shard without class folders is itself one class), parquet files with the columns `image`
    {bytes, path} and `label`, lists of images with their labels (`image_lists`), and a folder of Pascal VOC. Parquet
    files and tars may be behind an address such as s3://bucket/val-*.tar (`remote`).

    Args:
        data: a path, or `hfds:` and the name or path that `datasets.load_dataset` takes; or a source, which is given
            back (`data.held` makes one of what a program has in memory).
        split: a subfolder, the first part of parquet names such as `test-00000-of-00001.parquet`, or the split of a
            dataset. None where there is only one.
        annotations: what says the labels of the images in the folder `data`: a list, COCO's or ImageNet's file, or
            a folder of Pascal VOC's (`annotations`).
        class_order: who numbers classes by their names.

    Raises:
        DataError: the source is absent, of no known kind, without images, or leaves open what its labels are.
        MissingPackageError: `hfds:` without the `datasets` package.
    """
    if isinstance(data, ImageSource):
        for option, value in (("split", split), ("annotations", annotations)):
            if value is not None:
                raise DataError(f"{option} {value} is for a path, and {data} is in memory; leave it out")
        return data
    if annotations is not None:
        if not Path(data).is_dir():
            raise DataError(f"--annotations is for a folder of images, and {data} is none")
        source = annotated_source(data, Path(data), Path(annotations), class_order, split)
        return replace(source, name=printable(source.name))
    source = _opened(data, split, class_order)
    return replace(source, name=printable(source.name if split is None else f"{data}, split {split}"))


def is_list(path: str) -> bool:
    """Whether a file is there, called as lists are: `annotations` may name a folder or a column of masks too."""
    return path.lower().endswith(LIST_SUFFIXES) and Path(path).is_file()


def open_whole(option: str, data: str | ImageSource) -> ImageSource:
    """`open_source` for an option that has none beside it for a split.

    Raises:
        DataError: likewise; of data with several splits it says what can be done here.
    """
    try:
        return open_source(data)
    except DataError as error:
        wrong, several, _ = str(error).partition(CHOOSE)
        if not several:
            raise
        raise DataError(f"{option}: {wrong}; give the files of one split alone") from None


def _opened(data: str, split: str | None, order: ClassOrder) -> ImageSource:
    if data.startswith("hfds:"):
        return dataset_source(data, data.removeprefix("hfds:"), split, order)
    if remote.is_address(data):
        return _elsewhere(data, split, order)
    path = Path(data)
    if not data or not path.exists():
        raise DataError(f"{data!r} does not exist; {EXPECTED}")
    if path.is_dir():
        return _folder(data, path, split, order)
    if path.suffix.lower() in SUFFIXES_OF_FILES:
        return list_source(data, path, order, split)
    if split is not None:
        raise DataError(f"{data} is one file and has no split {split!r}; leave --split out")
    if path.suffix.lower() == ".tar":
        return _with_images(data, tar_source(data, [absolute(path)], False, order))
    if path.suffix.lower() == ".parquet":
        return parquet_source(data, [absolute(path)], order)
    for suffixes, what, cure in _OTHERS:
        if path.name.lower().endswith(suffixes):
            raise DataError(f"{data} is {what}; {cure}")
    raise DataError(f"{data} is a file of another kind; {EXPECTED}")


def _elsewhere(data: str, split: str | None, order: ClassOrder) -> ImageSource:
    """What an address names: Parquet files or tars."""
    files = remote.listed(data)
    if files[0].lower().endswith(".parquet"):
        return parquet_source(data, _of_split(data, files, split), order)
    if split is not None:
        raise DataError(
            f"{data} has tars and no split {split!r}; name those of the split, such as s3://bucket/val-*.tar"
        )
    return _with_images(data, tar_source(data, files, data != files[0], order))


def _folder(data: str, path: Path, split: str | None, order: ClassOrder) -> ImageSource:
    if is_voc(path):
        return voc_source(data, path, split, order)
    if all((path / name).is_file() for name in SAVED):
        if split is not None:
            raise DataError(f"{data} is one split that datasets saved to disk; leave --split out")
        return saved_source(data, path, order)
    folders = {child.name: child for child in path.iterdir() if child.is_dir()}
    if split in folders:
        return _folder(data, folders[split], None, order)
    parquets, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
    if parquets and tars:
        raise DataError(f"{data} contains both .parquet and .tar files; give one of the two")
    if parquets:
        return parquet_source(data, _of_split(data, list(map(absolute, parquets)), split), order)
    # A class may be called "train" too, but the folder of a split contains folders.
    saved = [name for name, folder in folders.items() if all((folder / file).is_file() for file in SAVED)]
    named = [name for name in folders if name.lower() in SPLITS]
    splits = sorted({*saved, *(name for name in named if any(child.is_dir() for child in folders[name].iterdir()))})
    if split is not None:
        choice = f"it has {', '.join(splits)}" if splits else "it has no splits, leave --split out"
        raise DataError(f"{data} has no folder for the split {split!r}; {choice}")
    if tars:
        return _with_images(data, tar_source(data, list(map(absolute, tars)), True, order))
    if splits:
        raise DataError(f"{data} has the split folders {', '.join(splits)}{CHOOSE}")
    listed = [path / name for name in METADATA if (path / name).is_file() and says_labels(path / name)]
    if len(listed) == 1:  # Hugging Face's own reader goes by it too, whatever the folders are called
        return list_source(str(listed[0]), listed[0], order)
    _refuse_splits_for_classes(data, folders)
    if {"images", "labels"} <= folders.keys():  # and no class of them, as YOLO has it
        other_tools.refuse_folder(folders["labels"])
    return _with_images(data, folder_source(data, path, order))


def _refuse_splits_for_classes(data: str, folders: Mapping[str, Path]) -> None:
    """Refuse folders that are called as splits are, where they would be taken for classes.

    Raises:
        DataError: all of several are called so, or those within the only one.
    """
    shown = [name for name in folders if not is_hidden(name)]
    if len(shown) > 1 and all(name.lower() in SPLITS for name in shown):
        raise DataError(
            f"{data} has images in {', '.join(sorted(shown))}, which are names of splits and no classes; give one of "
            "them, with --annotations for its labels"
        )
    inner = folders[shown[0]] if len(shown) == 1 else None
    within = sorted(child.name for child in inner.iterdir() if child.is_dir()) if inner is not None else []
    splits = [name for name in within if name.lower() in SPLITS]
    if inner is not None and len(splits) > 1:
        raise DataError(f"{data} has one folder, {inner.name}, with the splits {', '.join(splits)}; give {inner}")


def _with_images(data: str, source: ImageSource | None) -> ImageSource:
    if source is None:
        raise DataError(f"{data} contains no {SUFFIXES} images; {EXPECTED}")
    return source


def _of_split(data: str, files: list[str], split: str | None) -> list[str]:
    """Those parquet files that belong to a split by Hugging Face's naming, `test-00000-of-00003.parquet`."""
    stems = {file: PurePosixPath(file).stem for file in files}
    named = {file: match[1] for file, stem in stems.items() if (match := re.fullmatch(r"(.+?)-\d+-of-\d+.*", stem))}
    splits = sorted(set(named.values()))
    if split is None and len(splits) > 1:
        raise DataError(f"{data} has the splits {', '.join(splits)}{CHOOSE}")
    if split is not None and split not in splits:
        choice = f"it has {', '.join(splits)}" if splits else "its files name no split, leave --split out"
        raise DataError(f"{data} has no parquet files of the split {split!r}; {choice}")
    return files if split is None else [file for file in files if named.get(file) == split]
