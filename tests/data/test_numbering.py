"""Which outputs class names mean: from a file, the model's labels or WordNet ids, and refused where nothing tells."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convnext_deploy.data import numbering
from convnext_deploy.data.image_source import ImageSource
from convnext_deploy.errors import DataError, UsageError


def source(*names: str, **fields: object) -> ImageSource:
    """One image a class."""
    made = ImageSource(
        name="set",
        names=tuple(f"{name}/a.png" for name in names),
        labels=np.arange(len(names)),
        class_names=names,
        read_bytes=lambda index: b"",
        labels_from="names",
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def labels(found: ImageSource) -> list[int]:
    assert found.labels is not None
    return found.labels.tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "cat\ndog\nemu\n"),
        ("a.json", '["cat", "dog", "emu"]'),
        ("a.json", '{"dog": 1, "emu": 2, "cat": 0}'),  # torchvision's class_to_idx
        ("a.json", '{"0": "cat", "2": "emu", "1": "dog"}'),
        ("config.json", '{"id2label": {"0": "cat", "2": "emu", "1": "dog"}, "model_type": "convnext"}'),
    ],
)
def test_a_map_is_read_from_text_and_json(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert numbering.class_map(tmp_path / name) == {"cat": 0, "dog": 1, "emu": 2}


def test_a_wordnet_id_before_a_name_is_a_name_too(tmp_path: Path) -> None:
    (tmp_path / "synset_words.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    (tmp_path / "keras.json").write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}')
    for name in ("synset_words.txt", "keras.json"):
        found = numbering.class_map(tmp_path / name)
        assert (found["n01440764"], found["n01443537"]) == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3", "contains no class names; expected a name a line, or JSON"),
        ('{"cat": "dog"}', "contains no class names"),
        ('[["cat"]]', "contains no class names"),
        ("{", "cannot be read: "),
        ("[]", "is empty"),
        ('["cat", "dog", "cat"]', "gives 'cat' the numbers 0 and 2"),
        ("[" * 100_000, "cannot be read: "),
        ("\xff", "cannot be read: "),
    ],
)
def test_what_is_no_map_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        numbering.class_map(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_the_models_labels_number_a_subset_of_its_classes() -> None:
    found = numbering.numbered(source("cat", "emu"), 4, ("dog", "emu", "yak", "cat"))
    assert labels(found) == [3, 1]
    assert (found.class_names, found.labels_from) == (("0", "emu", "2", "cat"), "map")
    assert found.notes == ("2 classes numbered by the model's labels",)
    assert numbering.numbered(found, 4, ("dog", "emu", "yak", "cat")) is found


@pytest.mark.parametrize(
    ("names", "model"),
    [
        pytest.param(("golden retriever", "tabby cat"), ("tabby_cat", "Golden-Retriever"), id="spaces and capitals"),
        pytest.param(("cafe\u0301", "the"), ("the", "caf\xe9"), id="accents as macOS writes them"),
    ],
)
def test_names_that_are_written_otherwise_keep_the_models_numbers(
    names: tuple[str, ...], model: tuple[str, ...]
) -> None:
    found = numbering.numbered(source(*names), 2, model)
    assert labels(found) == [1, 0]
    assert found.notes == (
        "2 classes numbered by the model's labels, which are the same but for capitals, spaces and accents",
    )


def test_names_that_differ_in_capitals_alone_are_two() -> None:
    found = numbering.numbered(source("Turkey", "turkey"), 2, ("TURKEY", "other"))
    assert labels(found) == [0, 1]
    assert "the model's labels are other words" in found.notes[0]


def test_wordnet_ids_number_a_subset_of_imagenet() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    chosen = [999, 3, 500]
    names = [info.index_to_label_name(index) for index in chosen]
    found = numbering.numbered(source(*names), 1000, None)
    assert labels(found) == chosen
    with pytest.raises(DataError, match="3 classes and the model has 10 outputs"):
        numbering.numbered(source(*names), 10, None)
    with pytest.raises(DataError, match="2 classes and the model has 1,000 outputs"):  # no class of ImageNet-1k
        numbering.numbered(source("n02000000", "n02100000"), 1000, None)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_classes_than_outputs_is_refused(count: int) -> None:
    with pytest.raises(DataError, match=rf"{count} class(es)? and the model has 4 outputs.*give --labels FILE"):
        numbering.numbered(source(*"abcde"[:count]), 4, None)
    with pytest.raises(DataError, match="positions say nothing"):
        numbering.numbered(source(*"abcde"[:count], labels_from="column"), 4, ("w", "x", "y", "z"))


def test_some_of_the_models_names_at_other_positions_are_refused() -> None:
    with pytest.raises(
        DataError, match="label 0 is 'cat' in set, and in the model 'cat' is 1, while 'emus' is unknown"
    ):
        numbering.numbered(source("cat", "emus"), 2, ("dog", "cat"))


def test_positions_are_assumed_aloud() -> None:
    assert numbering.numbered(source("a", "b"), 2, None).notes == (
        "the model has no labels: its outputs are assumed to be the class folders sorted by name, 'a' first",
    )
    (note,) = numbering.numbered(source("a", "b"), 2, ("x", "y")).notes
    assert note.startswith("the model's labels are other words: ")
    assert numbering.numbered(source("a", "b", labels_from="column"), 2, None).notes == ()


@pytest.mark.parametrize(("numbers", "said"), [([1, 2], True), ([0, 2], False), ([2, 3], False)])
def test_numbers_of_which_none_is_0_may_count_from_1_and_that_is_said(numbers: list[int], said: bool) -> None:
    column = source("a", "b", class_names=None, labels=np.array(numbers), labels_from="column")
    notes = numbering.numbered(column, 4, None).notes
    assert [note.startswith("no image has the label 0: labels count from 0") for note in notes] == [True] * said


def test_a_map_that_is_given_goes_before_everything_else() -> None:
    found = numbering.numbered(source("a", "b"), 3, ("a", "b", "c"), {"a": 2, "b": 0, "z": 1})
    assert labels(found) == [2, 0]
    assert found.notes == ("2 classes numbered by --labels",)
    with pytest.raises(DataError, match="--labels does not name 'a' and 1 more of the 2 classes of set"):
        numbering.numbered(source("a", "b"), 3, None, {"z": 1})
    with pytest.raises(DataError, match=r"gives 'b' the number 5; the model has 3 outputs \(0\.\.2\)"):
        numbering.numbered(source("a", "b"), 3, None, {"a": 0, "b": 5})
    with pytest.raises(DataError, match="numbers for classes and no names"):
        numbering.numbered(source("a", class_names=None), 3, None, {"a": 0})


def test_a_column_of_numbers_without_names_is_checked_for_its_range() -> None:
    three = source("a", "b", "c", class_names=None)
    assert labels(numbering.numbered(three, 1000, None)) == [0, 1, 2]
    with pytest.raises(DataError, match=r"c/a\.png of set has the label 2; expected 0\.\.1"):
        numbering.numbered(three, 2, None)
    assert json.dumps(labels(source("a")))
