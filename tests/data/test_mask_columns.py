"""Masks that are another column of the images' table, wherever that is."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest
from PIL import Image
from plain_images import colour, grey, save

from convnext_deploy.data import held, image_source, masks, sources
from convnext_deploy.errors import DataError, UsageError


def rows(tmp_path: Path, name: str = "annotation", **more: Any) -> Any:
    """Three images of 4x5 pixels and masks of 0, 1 and 2, as a dataset of Hugging Face."""
    picture, held = datasets.Image(), {"image": [], name: []}  # type: ignore[var-annotated]
    for number in range(3):
        held["image"].append(str(save(tmp_path / f"rows/{number}.png", colour(number))))
        held[name].append(str(save(tmp_path / f"rows/mask {number}.png", grey(number))))
    features = datasets.Features(dict.fromkeys([*held, *more], picture))
    return datasets.Dataset.from_dict(held | {key: held[value] for key, value in more.items()}, features=features)


def truth(source: sources.ImageSource, annotations: str | None = None) -> list[list[int]]:
    """The classes in each mask."""
    found = masks.masked(source, annotations, ignored=255, reduce_labels=False)
    assert found.masks is not None
    part = image_source.chosen(found, [2, 0])
    assert part.masks is not None
    assert np.array_equal(masks.read(part.masks, 0, 3), masks.read(found.masks, 2, 3))
    assert found.sha256 != part.sha256
    return [np.unique(masks.read(found.masks, index, 3)).tolist() for index in range(len(found))]


@pytest.mark.parametrize("kind", ["in memory", "saved to disk", "parquet"])
def test_masks_are_a_column_of_a_dataset_wherever_it_is(kind: str, tmp_path: Path) -> None:
    dataset = rows(tmp_path)
    with redirect_stderr(io.StringIO()):  # a bar of progress
        if kind == "saved to disk":
            dataset.save_to_disk(tmp_path / "set")
        elif kind == "parquet":
            dataset.to_parquet(tmp_path / "set")
            (tmp_path / "set").rename(tmp_path / "set.parquet")
    where = str(tmp_path / ("set.parquet" if kind == "parquet" else "set"))
    source = held.opened("data", dataset) if kind == "in memory" else sources.open_source(where)
    assert truth(source) == truth(source, "annotation") == [[0], [1], [2]]
    assert np.unique(np.asarray(source.read(2))).tolist() == [2]
    with pytest.raises(DataError, match=r"--annotations mask is no folder and no column .* it has annotation$"):
        truth(source, "mask")


def test_a_name_of_masks_is_one_wherever_it_stands(tmp_path: Path) -> None:
    """`label_path` is of masks in a list; so it is of a table's columns, of which the other has the images."""
    table = rows(tmp_path, "label_path").rename_column("image", "photo")
    assert truth(held.opened("data", table)) == [[0], [1], [2]]
    table.to_parquet(tmp_path / "set.parquet")
    assert truth(sources.open_source(str(tmp_path / "set.parquet"))) == [[0], [1], [2]]


def test_a_column_of_masks_is_found_by_its_name_or_has_to_be_named(tmp_path: Path) -> None:
    several = rows(tmp_path, "label", parts="label")
    assert truth(held.opened("data", several)) == [[0], [1], [2]]
    unknown = rows(tmp_path, "one", other="one")
    source = held.opened("data", unknown)
    assert truth(source, "other") == [[0], [1], [2]]
    with pytest.raises(DataError, match="has the columns one, other beside its images; name the masks'"):
        truth(source)
    with pytest.raises(UsageError, match="the columns of images one, other; expected one of them to be called image"):
        held.opened("data", unknown.remove_columns("image"))


@pytest.mark.parametrize("kind", ["pillow", "int64", "bool"])
def test_masks_are_the_second_of_a_pair(kind: str) -> None:
    as_it_is = {
        "pillow": Image.fromarray, "int64": lambda mask: mask.astype(np.int64), "bool": lambda mask: mask > 1,
    }[kind]  # fmt: skip
    found = truth(held.opened("data", [(colour(number), as_it_is(grey(number))) for number in range(3)]))
    assert found == ([[0], [0], [1]] if kind == "bool" else [[0], [1], [2]])


def test_pairs_of_which_some_have_a_mask_and_arrays_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="data has a mask for 1 of its 2 images; expected one for each or none"):
        held.opened("data", [(colour(0), grey(0)), (colour(1), 1)])
    source = held.opened("data", [(colour(0), grey(0).astype(np.float32))] * 3)
    with pytest.raises(
        DataError, match=r"mask of image 2 \(column mask\) cannot be read: it is an array of float32 \(4, 5\)"
    ):
        truth(source)


def test_a_part_of_a_source_has_the_masks_of_its_objects() -> None:
    objects = tuple(np.zeros((count, 7)) for count in (1, 2, 0))
    masks = ((b"a",), (b"b", b"c"), ())
    source = image_source.ImageSource(
        name="d", names=("a", "b", "c"), labels=None, class_names=None, read_bytes=lambda _: b"",
        boxes=image_source.Boxes(objects, masks),
    )  # fmt: skip
    part = image_source.chosen(source, [1, 0])
    assert part.boxes is not None
    assert part.boxes.masks == ((b"b", b"c"), (b"a",))
    assert [len(of) for of in part.boxes.objects] == [2, 1]


# Lists ----------------------------------------------------------------------------------------------------------------

LISTS = {
    "kaggle.csv": "image,mask\na.png,m/a.png\nb.jpg,m/b.gif\n",
    "paths.csv": "Image Path;Mask Path;source\na.png;m/a.png;camera\nb.jpg;m/b.gif;phone\n",
    "label.csv": "path,label\na.png,m/a.png\nb.jpg,m/b.gif\n",
    "more.csv": "image,depth,label,cloudy\na.png,d.png,m/a.png,1\nb.jpg,d.png,m/b.gif,0\n",
    "windows.csv": "image,mask\na.png,m\\a.png\nb.jpg,m\\b.gif\n",
    "paddle.txt": "a.png m/a.png\nb.jpg m/b.gif\n",
    "some.csv": "image,mask\na.png,m/a.png\nnone.png,\nb.jpg,m/b.gif\n",
    "objects.json": '[{"image": "a.png", "mask": "m/a.png"}, {"image": "b.jpg", "mask": "m/b.gif"}]',
    "hf.jsonl": '{"file_name": "a.png", "mask_file_name": "m/a.png", "text": "x"}\n'
    '{"file_name": "b.jpg", "mask_file_name": "m/b.gif", "text": "y"}\n',
    "spaces.json": '[{"Image Path": "a.png", "Mask Path": "m/a.png"}, {"Image Path": "b.jpg", "Mask Path": "m/b.gif"}]',
    "pairs.json": '[["a.png", "m/a.png"], ["b.jpg", "m/b.gif"]]',
    "map.json": '{"a.png": "m/a.png", "b.jpg": "m/b.gif"}',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (image, mask) in enumerate((("a.png", "a.png"), ("b.jpg", "b.gif"))):
        save(tmp_path / "set" / image, colour(number))
        indices = Image.fromarray(grey(number + 1)).convert("P")  # else a GIF has each grey's place in its palette
        indices.putpalette([value for entry in range(256) for value in (entry, 255 - entry, 0)])
        (tmp_path / "set/m").mkdir(exist_ok=True)
        indices.save(tmp_path / "set/m" / mask, optimize=False)
    return tmp_path / "set"


def classes_of(source: sources.ImageSource, annotations: str | None = None) -> list[list[int]]:
    with_masks = masks.masked(source, annotations, ignored=255, reduce_labels=False)
    assert with_masks.masks is not None
    return [np.unique(masks.read(with_masks.masks, index, 3)).tolist() for index in range(len(with_masks))]


@pytest.mark.parametrize("name", LISTS)
def test_masks_are_a_column_of_a_list(name: str, folder: Path) -> None:
    (folder / name).write_text(LISTS[name])
    source = sources.open_source(str(folder / name))
    assert classes_of(source) == [[1], [2]]
    assert classes_of(source, next(iter(column for column in source.columns if column != "depth"))) == [[1], [2]]
    elsewhere = folder.parent / f"elsewhere{Path(name).suffix}"
    elsewhere.write_text(LISTS[name])
    assert classes_of(sources.open_source(str(folder), annotations=str(elsewhere))) == [[1], [2]]


def test_masks_are_no_classes_of_a_classifier(folder: Path) -> None:
    for name in ("kaggle.csv", "label.csv", "map.json"):
        (folder / name).write_text(LISTS[name])
        with pytest.raises(
            DataError, match=r"(label|mask) beside the images contains images, as the masks of a segment"
        ):
            image_source.refuse_unlabelled(sources.open_source(str(folder / name)))


def test_a_folders_own_metadata_names_its_masks(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(LISTS["hf.jsonl"])
    assert classes_of(sources.open_source(str(folder))) == [[1], [2]]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,Mask Path\na.png,m/a.png\nb.jpg,m/b.gif\n")
    assert classes_of(sources.open_source(str(folder))) == [[1], [2]]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_captions_under_a_name_of_masks_are_no_labels(name: str, folder: Path) -> None:
    contents = {
        "metadata.csv": "file_name,annotation\na.png,a cat\n",
        "metadata.jsonl": '{"file_name": "a.png", "annotation": "a cat"}',
    }
    (folder / "m" / "a.png").unlink()
    (folder / "m" / "b.gif").unlink()
    (folder / name).write_text(contents[name])
    source = sources.open_source(str(folder))
    assert (source.labels, source.names) == (None, ("a.png", "b.jpg"))


def test_labels_beside_masks_are_labels(folder: Path) -> None:
    (folder / "a.csv").write_text("image,mask,label\na.png,m/a.png,cat\na.png,m/x.png,dog\nb.jpg,m/b.gif,dog\n")
    source = sources.open_source(str(folder / "a.csv"))
    assert (source.label_sets, source.class_names) == (((0, 1), (1,)), ("cat", "dog"))
    assert "left out: the column mask, which has several images for a.png" in source.notes
    (folder / "b.csv").write_text("image,mask,label,split\na.png,m/a.png,cat,val\nb.jpg,m/b.gif,dog,train\n")
    source = sources.open_source(str(folder / "b.csv"), "train")
    assert source.labels is not None
    assert source.labels.tolist() == [1]
    assert classes_of(source) == [[2]]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("image,mask\na.png,x.png\nb.jpg,y.png\n", "none of the 2 masks of .* is there, such as .*x.png; expected"),
        ("image,mask\na.png,m/a.png\na.png,m/b.gif\n", "several images in the column mask for a.png"),
        ("image,mask,label\na.png,m/a.png,m/a.png\n", "has the columns mask, label beside its images; name the masks'"),
        ("image,mask\na.png,cat\nb.jpg,dog\n", " no masks; .* or a list with the columns image and mask"),
    ],
)
def test_a_list_that_leaves_open_which_masks_are_meant_is_refused(content: str, why: str, folder: Path) -> None:
    (folder / "a.csv").write_text(content)
    with pytest.raises(DataError, match=why):
        classes_of(sources.open_source(str(folder / "a.csv")))
