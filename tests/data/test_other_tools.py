"""Annotations as tools for labelling export them: which are read, and how the others are called."""

import json
from pathlib import Path
from typing import Any

import pytest
from plain_images import colour, save

from convnext_deploy.data import boxes, masks, sources
from convnext_deploy.errors import DataError

NAMES = ("0.jpg", "1.jpg", "2.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(NAMES):
        save(tmp_path / "images" / name, colour(index))
    return tmp_path / "images"


def opened(folder: Path, name: str, content: Any) -> sources.ImageSource:
    file = folder.parent / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return sources.open_source(str(folder), annotations=str(file))


def refused(folder: Path, name: str, content: Any) -> str:
    with pytest.raises(DataError) as error:
        opened(folder, name, content)
    return str(error.value)


def task(image: str, *answers: tuple[str, list[str]], question: str = "animal", **more: Any) -> dict[str, Any]:
    """As Label Studio 1.x exports a task as JSON."""
    results = [
        {"type": kind, "from_name": question, "to_name": "image", "value": {"x": 1.0, kind: labels}}
        for kind, labels in answers
    ]
    return {"id": 1, "data": {"image": image}, "annotations": [{"id": 1, "result": results, **more}], "predictions": []}


def test_the_choices_of_label_studio_are_the_classes_of_images(folder: Path) -> None:
    tasks = [
        task("/data/upload/1/0123abcd-0.jpg", ("choices", ["dog"])),
        task("/data/local-files/?d=1.jpg", ("choices", ["cat"])),
        task("https://images.example/set/2.jpg?size=1", ("choices", ["dog"])),
    ]
    source = opened(folder, "tasks.json", tasks)
    assert (source.names, source.class_names) == (NAMES, ("cat", "dog"))
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]
    assert source.read(0).tobytes() == sources.open_source(str(folder)).read(0).tobytes()


def test_the_regions_of_label_studio_are_labels_of_their_image_and_what_was_cancelled_is_none(folder: Path) -> None:
    tasks = [
        task("0.jpg", ("rectanglelabels", ["dog"]), ("polygonlabels", ["cat"])),
        task("1.jpg", ("rectanglelabels", ["cat"]), was_cancelled=True),
    ]
    source = opened(folder, "tasks.json", tasks)
    assert (source.label_sets, source.class_names) == (((0, 1), ()), ("cat", "dog"))


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (
            [task("0.jpg", ("choices", ["cat"])), task("1.jpg", ("choices", ["red"]), question="colour")],
            "has answers to several questions, animal, colour; expected one",
        ),
        ([task("0.wav", ("choices", ["cat"]))], "the data of task 1 names 0 images"),
        ([{"data": {}, "annotations": 3}], "is no export of Label Studio"),
    ],
)
def test_tasks_that_leave_the_label_open_are_refused(folder: Path, tasks: Any, words: str) -> None:
    assert words in refused(folder, "tasks.json", tasks)


def cvat(*images: str) -> str:
    return f'<?xml version="1.0"?><annotations><version>1.1</version><meta/>{"".join(images)}</annotations>'


def test_the_tags_of_cvat_are_the_classes_of_images_else_the_labels_of_objects(folder: Path) -> None:
    box = '<box label="bee" xtl="1" ytl="1" xbr="2" ybr="2"/>'
    tagged = (f'<image id="0" name="0.jpg"><tag label="dog"/>{box}</image>', '<image id="1" name="1.jpg"/>')
    source = opened(folder, "annotations.xml", cvat(*tagged))
    assert (source.names, source.label_sets, source.class_names) == (NAMES[:2], ((0,), ()), ("dog",))
    assert "left out: 1 object, because tags say the classes of images" in source.notes
    ellipse = '<ellipse label="ant" cx="1" cy="1" rx="1" ry="1"/>'
    source = opened(folder, "annotations.xml", cvat(f'<image name="0.jpg">{box}{ellipse}</image>'))
    assert (source.label_sets, source.class_names) == (((0, 1),), ("ant", "bee"))
    assert sources.open_source(str(save_beside(folder))).label_sets == ((0, 1),)
    for other in (cvat('<track label="ant"/>'), "<annotation/>"):
        assert "is no file of CVAT for images" in refused(folder, "annotations.xml", other)
    assert "is no XML" in refused(folder, "annotations.xml", "<image")


def save_beside(folder: Path) -> Path:
    """The file in the folder of its images."""
    return (folder.parent / "annotations.xml").replace(folder / "annotations.xml")


REGION = {"shape_attributes": {"name": "rect"}, "region_attributes": {"class": "cat"}}
OF_VIA = {"filename": "0.jpg", "size": 9, "regions": [REGION], "file_attributes": {}}
LABELME = {"version": "5.2", "flags": {}, "shapes": [{"label": "cat", "points": [[0, 0]]}], "imagePath": "0.jpg"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", LABELME, "is labelme's"),
        ("a.json", {"_via_settings": {}, "_via_img_metadata": {"0.jpg9": OF_VIA}}, "is a project of VIA"),
        ("a.json", {"0.jpg9": OF_VIA}, "is of VIA"),
        ("a.csv", "filename,region_shape_attributes,region_attributes\n0.jpg,{},{}\n", "is a table of VIA"),
        ("a.json", {"classes": ["cat"], "labels": {"0": 0, "1": None}}, "is of FiftyOne"),
        ("a.json", {"samples": [{"filepath": "data/0.jpg", "ground_truth": {}}]}, "is samples of FiftyOne"),
        ("a.json", [{"image": "0.jpg", "annotations": [{"label": "cat", "coordinates": {}}]}], "is CreateML's"),
        ("a.json", {"description": "", "tags": [], "objects": [], "size": {"height": 1}}, "is Supervisely's"),
        (
            "a.json",
            {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]},
            "is of COCO's captions",
        ),
        ("a.csv", "ImageID,Source,LabelName,Confidence\n0,verification,/m/01,0\n", "is a table of Open Images"),
    ],
    ids=str,
)
def test_other_tools_annotations_are_refused_by_name_with_what_to_do(
    folder: Path, name: str, content: Any, words: str
) -> None:
    message = refused(folder, name, content)
    assert words in message
    assert any(cure in message for cure in ("export", "convert", "give", "write"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"classes": ["0.jpg"], "labels": ["1.jpg"]}),  # of two classes that are called so
        ("a.json", {"samples": ["0.jpg"], "shapes": ["1.jpg"]}),
        ("a.csv", "path,label,confidence\n0.jpg,cat,0.5\n1.jpg,dog,0.5\n"),
    ],
    ids=str,
)
def test_lists_with_words_of_these_tools_are_still_read(folder: Path, name: str, content: Any) -> None:
    assert len(opened(folder, name, content)) == 2


@pytest.mark.parametrize(("suffix", "words"), [(".txt", "labels of YOLO"), (".json", "labelme's")])
def test_a_file_an_image_is_refused_by_name_wherever_it_is_given(folder: Path, suffix: str, words: str) -> None:
    labels = folder.parent / "labels"
    labels.mkdir()
    for name in NAMES:
        (labels / name).with_suffix(suffix).write_text("0 0.5 0.5 0.1 0.1" if suffix == ".txt" else json.dumps(LABELME))
    source = sources.open_source(str(folder))
    for given in (
        lambda: sources.open_source(str(folder), annotations=str(labels)),
        lambda: boxes.boxed(source, labels, None, 3),
        lambda: masks.masked(source, str(labels), ignored=255, reduce_labels=False),
        lambda: sources.open_source(str(folder.parent)),  # not two classes, images and labels
    ):
        with pytest.raises(DataError, match=f"labels seems to have {words}"):
            given()


def test_a_detector_is_told_whose_file_it_was_given(folder: Path) -> None:
    source, file = sources.open_source(str(folder)), folder.parent / "a.json"
    file.write_text(json.dumps(LABELME))
    with pytest.raises(DataError, match="is labelme's"):
        boxes.boxed(source, file, None, 3)


def test_a_segmenter_is_told_that_objects_are_no_masks(folder: Path) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "segmentation": [[1, 1, 2, 1, 2, 2]]}
    coco = {
        "images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [entry], "categories": [{"id": 1, "name": "cat"}]
    }  # fmt: skip
    source = opened(folder, "instances.json", coco)
    with pytest.raises(DataError, match=r"labels of images or objects, and no masks; .* pycocotools' annToMask"):
        masks.masked(source, None, ignored=255, reduce_labels=False)


def test_an_id_without_a_suffix_may_be_of_another_folders_image_too_where_no_entry_means_it(folder: Path) -> None:
    save(folder / "other/0.jpg", colour(5))
    save(folder / "a/9.jpg", colour(6))
    source = opened(folder, "labels.csv", "id,label\n1,cat\n9,dog\n")
    assert len(source) == 2
    message = refused(folder, "labels.csv", "id,label\n0,cat\n9,dog\n")
    assert "two images 0" in message
    assert "give the folder of the one that is meant with --data" in message
