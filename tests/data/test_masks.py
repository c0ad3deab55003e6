"""Masks beside images: which file is whose, what its numbers mean, and how predicted ones are written."""

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plain_images import colour, grey, save

from convnext_deploy.data import masks, sources
from convnext_deploy.data.image_source import Masks
from convnext_deploy.errors import DataError


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


def test_masks_that_are_in_the_folder_of_the_images_are_no_images(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", colour(0))
    save(tmp_path / "a.png", grey(1))
    save(tmp_path / "b.jpg", colour(0))
    both = sources.open_source(str(tmp_path))
    found = masks.masked(both, str(tmp_path), ignored=255, reduce_labels=False)
    assert found.names == ("a.jpg",)
    assert [note.partition(" of ")[0] for note in found.notes[:1]] == ["left out: 1 image"]
    assert "that are masks themselves" in found.notes[0]
    assert found.notes[1].startswith("left out: 1 image without a mask")


def test_black_and_white_masks_say_that_white_counts_nowhere(tmp_path: Path) -> None:
    """As tools for two classes write them; the second class would have no pixel."""
    save(tmp_path / "images/a.jpg", colour(0))
    save(tmp_path / "masks/a.png", Image.fromarray(np.array([[0, 255]], np.uint8)))
    (note,) = opened(tmp_path).notes
    assert note.startswith("the first masks have the numbers 0 and 255 alone, and 255 counts nowhere")
    assert opened(tmp_path, ignored=-1).notes == ()
    save(tmp_path / "masks/a.png", Image.fromarray(np.array([[0, 1, 255]], np.uint8)))
    assert opened(tmp_path).notes == ()


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


@pytest.mark.parametrize(("most", "reduce"), [(5, False), (150, True), (256, False), (256, True), (1000, False)])
def test_a_written_mask_is_read_as_what_it_was(most: int, reduce: bool, tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, most, (9, 7)).astype(np.int32)
    (tmp_path / "m.png").write_bytes(masks.written(classes, most=most, reduce_labels=reduce))
    assert np.array_equal(masks.read(one(tmp_path / "m.png", 70_000, reduce), 0, most), classes)
    with Image.open(tmp_path / "m.png") as image:
        assert (image.mode == "P") == (most + reduce <= 256)


@pytest.mark.parametrize(("number", "reduce"), [(3, False), (3, True), (200, False)])
def test_a_mask_takes_ten_bytes_a_pixel_at_most(number: int, reduce: bool) -> None:
    """At the largest size these are two thirds of a gigabyte."""
    file = io.BytesIO()
    Image.fromarray(np.full((1500, 1600), number, np.uint8)).save(file, "PNG")
    source = Masks(("m.png",), lambda index: file.getvalue(), 255, reduce)
    tracemalloc.start()
    try:
        if number == 200:
            with pytest.raises(DataError, match="has the number 200, and the model 4 classes; expected 0 to 3, or 255"):
                masks.read(source, 0, 4)
        else:
            assert (masks.read(source, 0, 4) == number - reduce).all()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most <= 10 * 1500 * 1600


def test_a_grey_gif_whose_palette_has_other_numbers_is_refused(tmp_path: Path) -> None:
    """Pillow writes the greys 0 and 2 as the entries 0 and 1, and Carvana's masks have 1 for the grey 255."""
    truth = np.array([[0, 2], [2, 0]], np.uint8)
    for name, pixels in (("grey.gif", truth), ("carvana.gif", truth // 2 * 255), ("same.gif", truth // 2)):
        Image.fromarray(pixels).save(tmp_path / name)
    files = masks.of_files([tmp_path / f"{name}.gif" for name in ("grey", "carvana", "same")], ignored=255,
                           reduce_labels=False)  # fmt: skip
    with pytest.raises(DataError, match=r"grey.gif cannot be read: its palette is grey, and entry 1 is the grey 2"):
        masks.read(files, 0, 3)
    for index in (1, 2):
        assert np.array_equal(masks.read(files, index, 3), truth // 2)
    assert np.array_equal(masks.read(files, 0, 2), truth // 2)  # the grey is no class of this model
