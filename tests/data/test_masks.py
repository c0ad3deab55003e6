"""Masks beside images: which file is whose, what its numbers mean, and how predicted ones are written."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnext_deploy.data import held, image_source, masks, sources
from convnext_deploy.data.image_source import Masks
from convnext_deploy.errors import DataError, UsageError


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def grey(value: int) -> Any:
    return np.full((4, 5), value, np.uint8)


def colour(value: int) -> Any:
    return np.full((4, 5, 3), value, np.uint8)


def opened(tmp_path: Path, **given: Any) -> sources.ImageSource:
    source = sources.open_source(str(tmp_path / "images"))
    return masks.masked(source, str(tmp_path / "masks"), **{"ignored": 255, "reduce_labels": False} | given)


def one(path: Path, ignored: int = 255, reduce_labels: bool = False) -> Masks:
    return masks.of_files([path], ignored=ignored, reduce_labels=reduce_labels)


def test_a_mask_is_found_by_its_images_path_and_images_without_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        save(tmp_path / "images" / name, colour(0))
    save(tmp_path / "masks/a/1.png", grey(1))
    save(tmp_path / "masks/b/1.tif", grey(2))
    found = opened(tmp_path)
    assert found.names == ("a/1.jpg", "b/1.jpg")
    assert found.masks is not None
    assert [Path(name).name for name in found.masks.names] == ["1.png", "1.tif"]
    assert found.notes[-1].startswith("left out: 1 image without a mask")
    assert sources.subset(found, 1).masks == masks.of_files(
        [tmp_path / "masks/a/1.png"], ignored=255, reduce_labels=False
    )
    before = found.sha256
    save(tmp_path / "masks/b/1.tif", grey(1))
    assert opened(tmp_path).sha256 != before
    save(tmp_path / "masks/a/1.gif", grey(1))
    with pytest.raises(DataError, match=r"a/1\.jpg of .* has the masks 1\.gif and 1\.png"):
        opened(tmp_path)


def test_no_folder_and_no_mask_at_all_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg", colour(0))
    with pytest.raises(DataError, match="is no folder; expected one of masks"):
        opened(tmp_path)
    save(tmp_path / "masks/b.png", grey(0))
    with pytest.raises(DataError, match=r"none of the 1 images .* such as a\.png"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits"])
def test_numbers_are_read_and_no_colours(kind: str, tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 2], [150, 3, 255]])
    if kind == "16 bits":
        image = Image.fromarray(numbers.astype(np.uint16))
    else:
        image = Image.fromarray(numbers.astype(np.uint8))
        if kind == "palette":
            image.putpalette([7, 7, 7] * 256)
    image.save(tmp_path / "m.png")
    read = lambda reduce: masks.read(one(tmp_path / "m.png", reduce_labels=reduce), 0, 151)  # noqa: E731
    assert read(False).tolist() == [[0, 1, 2], [150, 3, -1]]
    assert read(True).tolist() == [[-1, 0, 1], [149, 2, -1]]


def test_what_is_no_mask_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(path: Path, message: str, reduce: bool = False) -> None:
        with pytest.raises(DataError, match=message) as raised:
            masks.read(one(path, reduce_labels=reduce), 0, 5)
        assert "\n" not in str(raised.value)

    refused(
        save(tmp_path / "a.png", grey(5)), "the number 5, and the model 5 classes; expected 0 to 4, or 255 .*--reduce"
    )
    refused(save(tmp_path / "b.png", grey(6)), "the number 6, .* expected 1 to 5", reduce=True)
    refused(save(tmp_path / "c.png", colour(1)), "its pixels are RGB; expected one number a pixel")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    refused(tmp_path / "d.png", "cannot be read")
    refused(tmp_path / "e.png", "cannot be read")


def rows(tmp_path: Path, name: str = "annotation", **more: Any) -> Any:
    """Three images of 4x5 pixels and masks of 0, 1 and 2, as a dataset of Hugging Face."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")

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


@pytest.mark.parametrize(("most", "reduce"), [(5, False), (150, True), (256, False), (256, True), (1000, False)])
def test_a_written_mask_is_read_as_what_it_was(most: int, reduce: bool, tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, most, (9, 7)).astype(np.int32)
    (tmp_path / "m.png").write_bytes(masks.written(classes, most=most, reduce_labels=reduce))
    assert np.array_equal(masks.read(one(tmp_path / "m.png", 70_000, reduce), 0, most), classes)
    with Image.open(tmp_path / "m.png") as image:
        assert (image.mode == "P") == (most + reduce <= 256)
