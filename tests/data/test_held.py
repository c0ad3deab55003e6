"""Images in a program's memory are the same source as the files that they came from."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from convnext_deploy.data import held, sources
from convnext_deploy.errors import DataError, UsageError

CLASSES = ("ape", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for index in range(2):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def pixels(source: sources.ImageSource) -> list[list[Any]]:
    return [np.asarray(source.read(index).convert("RGB")).tolist() for index in range(len(source))]


def picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def pairs(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.parent.name) for path in sorted(folder.glob("*/*.png"))]


def tensor(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(path)).transpose(2, 0, 1))  # (H, W, C) -> (C, H, W)


class Own(Dataset):  # type: ignore[type-arg]
    """A dataset of somebody's own, of which nothing is known but its items."""

    def __init__(self, folder: Path) -> None:
        self.pairs = pairs(folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, name = self.pairs[index]
        return picture(path), CLASSES.index(name)


def forms(folder: Path) -> dict[str, Any]:
    named, own = pairs(folder), Own(folder)
    hugging_face = datasets.Dataset.from_dict(
        {"image": [str(path) for path, _ in named], "label": [CLASSES.index(name) for _, name in named]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}),
    )
    numbered = [(path, CLASSES.index(name)) for path, name in named]
    return {
        "paths and names": named,
        "paths and numbers": numbered,
        "texts": tuple((str(path), name) for path, name in named),
        "pillow": [(picture(path), name) for path, name in named],
        "arrays": [(np.asarray(picture(path)), name) for path, name in named],
        "tensors": [(tensor(path), torch.tensor(number)) for path, number in numbered],
        "dictionaries": [{"image": picture(path), "label": name} for path, name in named],
        "dataset": own,
        "loader": DataLoader(own, batch_size=3, shuffle=True),
        "folder": ImageFolder(str(folder)),
        "folder with transform": ImageFolder(str(folder), transform=ToTensor()),
        "subset": Subset(own, range(6)),
        "hugging face": hugging_face,
    }  # fmt: skip


@pytest.mark.parametrize(
    "form",
    ["paths and names", "paths and numbers", "texts", "pillow", "arrays", "tensors", "dictionaries", "dataset",
     "loader", "folder", "folder with transform", "subset", "hugging face"],
)  # fmt: skip
def test_every_form_holds_the_pixels_and_labels_of_the_folder(form: str, folder: Path) -> None:
    expected = sources.open_source(str(folder))
    found = held.opened("data", forms(folder)[form])
    assert found.labels is not None
    assert expected.labels is not None
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.class_names in (None, CLASSES)
    assert pixels(found) == pixels(expected)
    assert len(set(found.names)) == len(found)
    assert sources.open_source(found) is found


def test_class_names_are_those_that_the_form_says(folder: Path) -> None:
    for form in ("paths and names", "folder", "hugging face", "dictionaries"):
        assert held.opened("data", forms(folder)[form]).class_names == CLASSES


def test_what_is_not_labelled_is_a_source_without_labels(folder: Path) -> None:
    found = held.opened("data", [path for path, _ in pairs(folder)])
    assert found.labels is None
    assert found.label_sets is None


def test_several_labels_and_values_are_kept(folder: Path) -> None:
    paths = [path for path, _ in pairs(folder)]
    several = held.opened("data", [(path, ["a", "b"][: 1 + index % 2]) for index, path in enumerate(paths)])
    assert several.label_sets == ((0,), (0, 1)) * 3
    values = held.opened("data", [(path, 0.5 + index) for index, path in enumerate(paths)])
    assert values.values is not None
    assert values.values[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"])
def test_pillow_images_of_every_mode_are_encoded_without_loss(mode: str) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    original = pixels.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)
    found = held.opened("data", [(original, 0)]).read(0)
    plain = original.convert("LA") if mode == "La" else original.convert("RGBA") if mode == "RGBa" else original
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(plain.convert("RGB")))


def test_exif_stays_with_an_image_in_memory() -> None:
    image = Image.new("RGB", (4, 6))
    image.getexif()[0x0112] = 6
    assert held.opened("data", [(image, 0)]).read(0).getexif()[0x0112] == 6


def test_the_same_picture_twice_is_two_images(folder: Path) -> None:
    path = pairs(folder)[0][0]
    found = held.opened("data", [(path, 0), (path, 0)])
    assert found.names == (str(path), f"{path}#2")
    assert len(pixels(found)) == 2


class Broken(Own):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise KeyError("column")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([], "data [] is empty; expected a path, a list of (image, label)"),
        ({"a": 1}, "data {'a': 1}; expected a path"),
        (object(), "data of type builtins.object; expected a path"),
        (iter([1]), "data of type builtins.list_iterator; expected a path"),
        (np.zeros((2, 3)), "data is an array without labels; expected a path"),
        ([1, 2], "data: item 0 is 1; expected a path, an image of Pillow's, or an array of uint8"),
        ([("a.png", 1, 2)], "data: item 0 has 3 parts; expected (image, label)"),
        ([("a.png", object())], "data: the label of item 0 is of type builtins.object; expected a number or a name"),
        ([(torch.zeros(3, 8, 8), 0)], "data: item 0 is an array of float32 (3, 8, 8), which a transform has"),
        (TensorDataset(torch.zeros(2, 3, 8, 8)), "data: item 0 has 1 parts; expected (image, label)"),
        ({"train": datasets.Dataset.from_dict({"a": [1]})}, "data has the splits train; give one of"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "data has no column of images (text); expected one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_holds_no_images_is_refused_in_one_line(value: Any, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        held.opened("data", value)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_what_the_callers_own_code_raises_is_said_in_plain_words(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^data: item 0 cannot be read: it has no 'column'$"):
        held.opened("data", Broken(folder))


def test_a_split_is_of_a_path(folder: Path) -> None:
    found = held.opened("data", pairs(folder))
    with pytest.raises(DataError, match="split test is for a path, and a list of 6 images is in memory; leave it out"):
        sources.open_source(found, "test")


def test_what_datasets_saved_to_disk_is_read_one_split_at_a_time(folder: Path, tmp_path: Path) -> None:
    rows = forms(folder)["hugging face"]
    expected = sources.open_source(str(folder))
    with redirect_stderr(io.StringIO()):  # a bar of progress
        rows.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(tmp_path / "several")
    for source in (
        sources.open_source(str(tmp_path / "one")),
        sources.open_source(str(tmp_path / "several"), "test"),
    ):
        assert source.labels is not None
        assert expected.labels is not None
        assert source.labels.tolist() == expected.labels.tolist()
        assert source.class_names == CLASSES
        assert pixels(source) == pixels(expected)
    with pytest.raises(DataError, match="has the split folders test, train; choose one with --split"):
        sources.open_source(str(tmp_path / "several"))
    with pytest.raises(DataError, match="one is one split that datasets saved to disk; leave --split out"):
        sources.open_source(str(tmp_path / "one"), "test")
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(DataError, match="one cannot be opened"):
        sources.open_source(str(tmp_path / "one"))
