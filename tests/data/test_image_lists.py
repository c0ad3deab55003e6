"""Lists of images and annotations beside them; ImageNet's against torchvision's reader."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from convnext_deploy.data import held, image_lists, image_source, masks, numbering, sources
from convnext_deploy.data.decoding import UnreadableImage
from convnext_deploy.errors import DataError


def picture(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 20, 30)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("a.png", "deep/b 1.jpg", "c.webp")):
        picture(tmp_path / "set" / name, index)
    return tmp_path / "set"


def labels(source: sources.ImageSource) -> dict[str, Any]:
    if source.labels is not None:
        return dict(zip(source.names, source.labels.tolist(), strict=True))
    if source.values is not None:
        return dict(zip(source.names, source.values.tolist(), strict=True))
    return dict(zip(source.names, source.label_sets or (), strict=True))


NUMBERS = {"a.png": 2, "deep/b 1.jpg": 0, "c.webp": 2}
LISTS = {
    "plain.csv": "a.png,2\ndeep/b 1.jpg,0\nc.webp,2\n",
    "header.csv": "path,label\na.png,2\ndeep/b 1.jpg,0\nc.webp,2\n",
    "other columns.csv": "index,filename,target,camera\n0,a.png,2,x\n1,deep/b 1.jpg,0,x\n2,c.webp,2,y\n",
    "marked.csv": "\ufeffImage,Class\r\na.png,2\r\ndeep/b 1.jpg,0\r\nc.webp,2\r\n",
    "semicolon.csv": 'path;label\n"a.png";2\n"deep/b 1.jpg";0\nc.webp;2\n',
    "tab.tsv": "a.png\t2\ndeep/b 1.jpg\t0\nc.webp\t2\n",
    "caffe.txt": "a.png 2\ndeep/b 1.jpg 0\nc.webp 2\n",
    "records.json": '[{"path": "a.png", "label": 2}, {"path": "deep/b 1.jpg", "label": 0},'
    '{"path": "c.webp", "label": 2}]',
    "pairs.json": '[["a.png", 2], ["deep/b 1.jpg", 0], ["c.webp", 2]]',
    "map.json": '{"a.png": 2, "deep/b 1.jpg": 0, "c.webp": 2}',
    "mmpretrain.json": '{"metainfo": {"classes": ["x", "y", "z"]}, "data_list": [{"img_path": "a.png", "gt_label": 2}, '
    '{"img_path": "deep/b 1.jpg", "gt_label": 0}, {"img_path": "c.webp", "gt_label": 2}]}',
    "metadata.jsonl": '{"file_name": "a.png", "label": 2}\n\n{"file_name": "deep/b 1.jpg", "label": 0}\n'
    '{"file_name": "c.webp", "label": 2}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_any_form_gives_paths_and_numbers(folder: Path, name: str) -> None:
    (folder / name).write_text(LISTS[name], "utf-8")
    source = sources.open_source(str(folder / name))
    assert labels(source) == NUMBERS
    assert source.class_names is None
    assert source.read(1).size == (8, 8)
    elsewhere = folder.parent / f"elsewhere{Path(name).suffix}"
    elsewhere.write_text(LISTS[name], "utf-8")
    assert labels(sources.open_source(str(folder), annotations=str(elsewhere))) == NUMBERS
    with pytest.raises(DataError, match=r"none of the 3 images .* such as a.png; give the folder that .* with --data"):
        sources.open_source(str(elsewhere))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(",image,breed\n7,a.png,1\n3,c.webp,0\n9,deep/b 1.jpg,1\n", id="the index of pandas"),
        pytest.param("Unnamed: 0,image,breed\n0,a.png,1\n1,c.webp,0\n2,deep/b 1.jpg,1\n", id="read and written again"),
        pytest.param("index,image,breed\n0,a.png,1\n1,c.webp,0\n2,deep/b 1.jpg,1\n", id="by its name"),
        pytest.param("Image Path,Class-Name\na.png,1\nc.webp,0\ndeep/b 1.jpg,1\n", id="spaces and hyphens"),
        pytest.param("sep=;\npath;label\na.png;1\nc.webp;0\ndeep/b 1.jpg;1\n", id="Excel"),
    ],
)
def test_columns_that_are_no_labels_are_not_taken_for_classes(content: str, folder: Path) -> None:
    (folder / "a.csv").write_text(content)
    source = sources.open_source(str(folder / "a.csv"))
    assert labels(source) == {"a.png": 1, "c.webp": 0, "deep/b 1.jpg": 1}
    assert source.class_names is None


@pytest.mark.parametrize(
    "content",
    ["id,image_path\n1,a.png\n0,c.webp\n", ",path\n0,a.png\n1,c.webp\n", "path,index\na.png,0\nc.webp,1\n"],
)
def test_what_counts_the_rows_is_no_label_where_it_is_alone_either(content: str, folder: Path) -> None:
    (folder / "a.csv").write_text(content)
    assert sources.open_source(str(folder / "a.csv")).labels is None


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_split_has_the_numbers_of_all_classes_of_its_list(form: str, folder: Path) -> None:
    entries = [("a.png", "dog", "val"), ("c.webp", "cat", "train"), ("deep/b 1.jpg", "emu", "train")]
    records = [dict(zip(("path", "label", "split"), entry, strict=True)) for entry in entries]
    rows = "path,label,split\n" + "\n".join(map(",".join, entries))
    file = folder / f"list.{form}"
    file.write_text(rows if form == "csv" else json.dumps(records))
    source = sources.open_source(str(file), split="val")
    assert (labels(source), source.class_names) == ({"a.png": 1}, ("cat", "dog", "emu"))


def test_names_are_numbered_by_either_order_and_by_the_models_labels(folder: Path) -> None:
    (folder / "a.csv").write_text("path,label\na.png,10\ndeep/b 1.jpg,2a\nc.webp,10\n")
    text = sources.open_source(str(folder / "a.csv"))
    assert (text.class_names, labels(text)) == (("10", "2a"), {"a.png": 0, "deep/b 1.jpg": 1, "c.webp": 0})
    assert sources.open_source(str(folder / "a.csv"), class_order="timm").class_names == ("2a", "10")
    notes = " ".join(numbering.numbered(text, 2, None).notes)
    assert "assumed to be the class names sorted by name, '10' first" in notes
    assert labels(numbering.numbered(text, 5, ("x", "2a", "y", "10", "z")))["a.png"] == 3


def test_several_labels_of_an_image_are_a_set_and_one_an_image_is_asked_for(folder: Path) -> None:
    forms = {
        "again.csv": "path,label\na.png,cat\na.png,dog\ndeep/b 1.jpg,dog\nc.webp,\n",
        "cells.csv": "path,label\na.png,cat|dog\ndeep/b 1.jpg,dog\nc.webp,\n",
        "python.csv": "path,label\na.png,\"['cat', 'dog']\"\ndeep/b 1.jpg,['dog']\nc.webp,[]\n",
        "hot.csv": "path,cat,dog\na.png,1,1\ndeep/b 1.jpg,0,1\nc.webp,0,0\n",
        "sets.json": '[{"image": "a.png", "labels": ["cat", "dog"]}, {"image": "deep/b 1.jpg", "labels": ["dog"]}, '
        '{"image": "c.webp", "labels": []}]',
    }
    for name, content in forms.items():
        (folder / name).write_text(content)
        source = sources.open_source(str(folder / name))
        assert source.class_names == ("cat", "dog")
        assert labels(source) == {"a.png": (0, 1), "deep/b 1.jpg": (1,), "c.webp": ()}, name
        with pytest.raises(DataError, match=r"1 of the 3 images .* several classes, such as a.png \(cat, dog\)"):
            image_source.with_one_label(source)
        mapped = numbering.numbered(source, 3, ("dog", "emu", "cat"))
        assert labels(mapped)["a.png"] == (2, 0)
    (folder / "some.csv").write_text("path,label\na.png,cat\nc.webp,\n")
    one = image_source.with_one_label(sources.open_source(str(folder / "some.csv")))
    assert labels(one) == {"a.png": 0}
    assert "left out: 1 image without a label" in one.notes
    assert one.sha256 != source.sha256


def test_numbers_with_a_point_are_values_and_columns_of_them_are_several(folder: Path) -> None:
    (folder / "age.csv").write_text("path,label\na.png,2.5\ndeep/b 1.jpg,3\nc.webp,-1e1\n")
    ages = labels(sources.open_source(str(folder / "age.csv")))
    assert ages == {"a.png": [2.5], "deep/b 1.jpg": [3.0], "c.webp": [-10.0]}
    (folder / "xy.csv").write_text("image,x,y\na.png,2.5,1\ndeep/b 1.jpg,3,2\nc.webp,-1e1,3\n")
    source = sources.open_source(str(folder / "xy.csv"))
    assert labels(source)["c.webp"] == [-10.0, 3.0]
    assert source.class_names == ("x", "y")
    assert labels(sources.subset(source, 1)) == {"a.png": [2.5, 1.0]}


POINTED = {
    "a.csv": "path,label\na.png,2.0\ndeep/b 1.jpg,\nc.webp,0.\n",
    "a.json": '[["a.png", 2.0], ["deep/b 1.jpg", null], ["c.webp", 0.0]]',
    "several.json": '[["a.png", 2.0], ["deep/b 1.jpg", []], ["c.webp", [0.0]]]',
}


@pytest.mark.parametrize("name", POINTED)
def test_whole_numbers_with_a_point_are_classes_for_a_classifier_and_that_is_said(name: str, folder: Path) -> None:
    """pandas writes a column of whole numbers so where one is missing, or was."""
    (folder / name).write_text(POINTED[name])
    source = sources.open_source(str(folder / name))
    assert labels(source) == {"a.png": (2,), "deep/b 1.jpg": (), "c.webp": (0,)}
    assert "whole numbers with a point, such as 2.0, are taken as without one" in " ".join(source.notes)
    one = image_source.with_one_label(source)
    assert (labels(one), one.class_names) == ({"a.png": 2, "c.webp": 0}, None)


@pytest.mark.parametrize("other", ["link.png", "./a.png", "deep/../a.png"])
def test_two_entries_that_are_one_file_have_one_label(other: str, folder: Path) -> None:
    (folder / "link.png").symlink_to("a.png")
    for labels_of in (("cat", "dog"), ("0.5", "1.5"), ("cat|dog", "dog")):
        (folder / "a.csv").write_text(f"path,label\na.png,{labels_of[0]}\n{other},{labels_of[1]}\n")
        with pytest.raises(DataError, match=rf"a.png and {other} of .*a.csv are one file and have different labels"):
            sources.open_source(str(folder / "a.csv"))
    (folder / "a.csv").write_text(f"path,label\na.png,cat\n{other},cat\n")
    note = f"counted twice: 1 image by links between files, such as a.png and {other}"
    assert note in sources.open_source(str(folder / "a.csv")).notes


def test_tables_of_celeba_and_of_excel_are_read(folder: Path) -> None:
    (folder / "a.csv").write_text("image_id,Male,Smiling\na.png,1,-1\nc.webp,-1,-1\n")
    source = sources.open_source(str(folder / "a.csv"))
    assert (labels(source), source.class_names) == ({"a.png": (0,), "c.webp": ()}, ("Male", "Smiling"))
    assert "columns of -1 and 1, as CelebA's, say of each class whether an image has it" in source.notes
    (folder / "a.txt").write_bytes("path\tlabel\r\na.png\t2\r\nc.webp\t0\r\n".encode("utf-16"))
    assert labels(sources.open_source(str(folder / "a.txt"))) == {"a.png": 2, "c.webp": 0}


def test_one_number_that_is_not_whole_makes_all_values(folder: Path) -> None:
    for content in ("a.png,2.0,x\nc.webp,0.5,y\n", "a.png,2.0,x\nc.webp,1.0,x\ndeep/b 1.jpg,.5,y\n"):
        (folder / "a.csv").write_text("path,label,split\n" + content)
        source = sources.open_source(str(folder / "a.csv"), "x")
        assert labels(source)["a.png"] == [2.0]
    (folder / "a.csv").write_text("path,label\na.png,2.0\nc.webp,1e3\n")
    assert labels(sources.open_source(str(folder / "a.csv"))) == {"a.png": [2.0], "c.webp": [1000.0]}


def test_rows_of_0_and_1_say_of_each_class_whether_it_is_there(folder: Path) -> None:
    """As numbers of classes they would say of every image that it has the classes 0 and 1."""
    said = '[["a.png", [0, 1, 0]], ["c.webp", [%s]], ["deep/b 1.jpg", [1, 1, 0]]]'
    for row in ("0, 0, 1", "0.0, 0.0, 1.0", "false, false, true"):
        (folder / "a.json").write_text(said % row)
        source = sources.open_source(str(folder / "a.json"))
        assert labels(source) == {"a.png": (1,), "c.webp": (2,), "deep/b 1.jpg": (0, 1)}
    for row in ("0|1|0", "[0 1 0]", "[0, 1, 0]", "[0. 1. 0.]"):
        (folder / "a.csv").write_text(f'path,label\na.png,"{row}"\nc.webp,"{row.replace("1", "0")}"\n')
        assert labels(sources.open_source(str(folder / "a.csv"))) == {"a.png": (1,), "c.webp": ()}
    (folder / "a.json").write_text('[["a.png", [0, 1]], ["c.webp", [1, 0]]]')
    assert labels(sources.open_source(str(folder / "a.json"))) == {"a.png": 1, "c.webp": 0}
    (folder / "a.json").write_text('[["a.png", [0, 1]], ["c.webp", [0, 1]]]')  # two classes, named
    assert labels(sources.open_source(str(folder / "a.json"))) == {"a.png": (0, 1), "c.webp": (0, 1)}
    (folder / "a.json").write_text('[["a.png", true], ["c.webp", false]]')
    assert labels(sources.open_source(str(folder / "a.json"))) == {"a.png": 1, "c.webp": 0}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "", "is empty; expected a line an image"),
        ("a.csv", "cat,1\n", "begins with 'cat,1', which is no image .* and no header with a column path"),
        ("a.csv", "a.png,1\nc.webp\n", "has 1 columns in entry 2 and 2 in the first"),
        ("a.csv", "path,label,class\na.png,1,2\n", "has the columns label, class; expected one of labels"),
        ("a.csv", "path,x,y\na.png,red,blue\n", "2 columns beside the path, and none is called label"),
        ("a.csv", "path,x,y\na.png,1,0\na.png,0,1\n", "names an image twice, a.png"),
        ("a.csv", "path,x,y\na.png,nan,0\n", "contains a value that is not finite"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "3", "contains no list of images"),
        ("a.jsonl", '{"label": 1}', r"entry 1 has no path and label .* \(its keys: label\)"),
        ("a.json", '[["a.png", {"x": 1}]]', r"no path and label that are text or numbers \(its keys: path, label\)"),
        ("a.json", '[{"id": 1, "data": {"image": "a.png"}}]', r"\(its keys: id, data\); expected {"),  # of Label Studio
        ("a.csv", "path,label\na.png,0.5\na.png,0.6\n", "has 2 values for a.png; expected one"),
        # Taken for names, they would number the classes anew: "10" before "2".
        ("missing.csv", "path,label\na.png,1\nb.png,nan\n", "the label nan for b.png among numbers"),
        ("missing.csv", "path,label\na.png,None\nb.png,1\n", "the label None for a.png among numbers"),
        ("missing.csv", "path,label\na.png,10\nb.png,N/A\n", "the label N/A for b.png among numbers"),
        ("a.csv", "path,label\nhttps://x.org/a.png,1\n", "addresses are not read, so copy the images here"),
        ("a.csv", "path,choice\n/data/upload/a.png,1\n", "these paths begin at the root of another disk, so write"),
        ("missing.json", '[{"path": "a.png", "label": NaN}, {"path": "b.png", "label": 1}]', "the label nan for a.png"),
    ],
)
def test_what_leaves_open_what_is_what_is_refused_in_a_line(folder: Path, name: str, content: str, why: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=why) as refusal:
        sources.open_source(str(folder / name))
    assert "\n" not in str(refusal.value)


def test_an_image_that_is_not_there_is_counted_and_unreadable(folder: Path) -> None:
    (folder / "a.csv").write_text("a.png,1\nlost.png,0\n")
    source = sources.open_source(str(folder / "a.csv"))
    assert "not there: 1 image of a.csv, such as lost.png" in source.notes
    with pytest.raises(OSError, match="the file cannot be opened: No such file"):
        source.read(1)


def coco(**changed: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png"},
            {"id": 9, "file_name": "deep/b 1.jpg"},
            {"id": 8, "file_name": "c.webp"},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4]},
            {"image_id": 7, "category_id": 90},
            {"image_id": 9, "category_id": 3},
        ],
    } | changed


def test_a_coco_file_gives_each_image_the_categories_of_its_annotations(folder: Path) -> None:
    file = folder.parent / "instances.json"
    file.write_text(json.dumps(coco()))
    source = sources.open_source(str(folder), annotations=str(file))
    assert source.class_names == ("dog", "cat")  # by their ids
    assert labels(source) == {"a.png": (1,), "deep/b 1.jpg": (0,), "c.webp": ()}
    assert labels(image_source.with_one_label(source)) == {"a.png": 1, "deep/b 1.jpg": 0}
    several = [*coco()["annotations"], {"image_id": 7, "category_id": 3}]
    file.write_text(json.dumps(coco(annotations=several)))
    with pytest.raises(DataError, match=r"several classes, such as a.png \(dog, cat\)"):
        image_source.with_one_label(sources.open_source(str(folder), annotations=str(file)))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"annotations": [{"image_id": 1, "category_id": 3}]}, "annotates the image 1, which it does not list"),
        ({"annotations": [{"image_id": 7, "category_id": 1}]}, "annotates the category 1, which it does not list"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "an id to two categories or to two images"),
        ({"images": [{"id": 7}]}, "is no COCO file"),
    ],
)
def test_a_coco_file_that_contradicts_itself_is_refused(folder: Path, changed: dict[str, Any], why: str) -> None:
    (folder / "x.json").write_text(json.dumps(coco(**changed)))
    with pytest.raises(DataError, match=why):
        sources.open_source(str(folder), annotations=str(folder / "x.json"))


def voc(name: str, *objects: str) -> str:
    inside = "".join(
        f"<object><name>{one.strip('?')}</name><difficult>{int('?' in one)}</difficult></object>" for one in objects
    )
    return f"<annotation><filename>{name}</filename>{inside}</annotation>"


def test_a_folder_of_pascal_voc_is_read_by_its_splits(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    for stem, objects in {"1": ["dog", "dog"], "2": ["cat", "person?"], "3": ["dog", "cat"]}.items():
        picture(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(voc(f"{stem}.jpg", *objects))
    splits = root / "ImageSets" / "Main"
    splits.mkdir(parents=True)
    for name, lines in {"train": "3\n", "val": "1\n2\n", "cat_val": "1 -1\n2 1\n"}.items():
        (splits / f"{name}.txt").write_text(lines)
    source = sources.open_source(str(root), "val")
    assert source.class_names == ("cat", "dog")
    assert labels(source) == {"1.jpg": 1, "2.jpg": 0}
    assert "1 objects marked as difficult give no label, as in VOC's own evaluation" in source.notes
    with pytest.raises(DataError, match="has the splits train, val; choose one with --split"):
        sources.open_source(str(root))
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        sources.open_source(str(root), "test")
    beside = sources.open_source(str(root / "JPEGImages"), annotations=str(root / "Annotations"))
    assert labels(beside)["3.jpg"] == (0, 1)
    (root / "Annotations" / "1.xml").write_text("<x/>")
    with pytest.raises(DataError, match=r"1.xml is no annotation of Pascal VOC"):
        sources.open_source(str(root), "val")


WORDNET = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n02096294"}  # ImageNet's own first two, and others


def devkit(folder: Path) -> Path:
    """The development kit's two files, as small as they can be read by torchvision too."""
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, name, f"words {number}", "", 0) for number, name in WORDNET.items()]
    savemat(kit / "meta.mat", {"synsets": np.array([*rows, (1001, "n00001740", "entity", "", 4)], fields)[:, None]})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n4\n1\n2\n")
    return kit / "ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for number in range(1, 6):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    return tmp_path / "val"


@pytest.mark.parametrize("said", ["a b.jpg", "C:\\\\photos\\\\a b.png", "", "elsewhere/a b.png"])
def test_an_annotation_of_pascal_voc_is_of_the_image_with_its_own_name(said: str, tmp_path: Path) -> None:
    """As torchvision's VOCDetection pairs them; tools write into `filename` what the image was called before."""
    picture(tmp_path / "JPEGImages" / "a b.png")
    annotation = tmp_path / "Annotations" / "a b.xml"
    annotation.parent.mkdir()
    text = f"<annotation><filename>{said}</filename><object><name>cat</name></object></annotation>"
    annotation.write_text(text)
    source = sources.open_source(str(tmp_path))
    assert (list(labels(source).values()), source.class_names) == ([0], ("cat",))
    assert source.read(0).size == (8, 8)


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # torchvision 0.24, which unpacks the archive
def test_imagenets_flat_folder_gets_the_classes_that_torchvision_gives_it(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import imagenet

    truth, root = devkit(flat.parent), flat.parent
    with tarfile.open(root / imagenet.ARCHIVE_META["devkit"][0], "w:gz") as tar:
        tar.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # which knows the real archive's hash
    imagenet.parse_devkit_archive(root)
    wanted = imagenet.load_meta_file(root)[1]
    source = sources.open_source(str(flat), annotations=str(truth))
    assert source.class_names == tuple(sorted(WORDNET.values()))
    assert source.labels is not None
    assert [source.class_names[label] for label in source.labels] == wanted
    numbered = numbering.numbered(source, 1000, None)
    assert numbered.labels is not None
    assert numbered.labels[0] == 0  # n01440764, the tench, is the first output of every model
    (flat / "ILSVRC2012_val_00000002.JPEG").unlink()  # a part of the images keeps its labels
    part = sources.open_source(str(flat), annotations=str(truth))
    assert part.labels is not None
    assert [source.class_names[label] for label in part.labels] == [wanted[0], *wanted[2:]]


def test_imagenets_own_numbers_without_the_development_kit_are_refused(flat: Path) -> None:
    file = flat.parent / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("3\n1\n4\n1\n2\n")
    with pytest.raises(DataError, match=r"own numbers 1..1000, which are not those of models; expected meta.mat"):
        sources.open_source(str(flat), annotations=str(file))
    file.write_text("3\n1\n")
    with pytest.raises(DataError, match=r"has 2 lines and .* 5 images"):
        sources.open_source(str(flat), annotations=str(file))


def test_kaggles_solution_of_imagenet_and_a_class_a_line_say_the_same(flat: Path) -> None:
    names = [WORDNET[number] for number in (3, 1, 4, 1, 2)]
    solution, lines = flat.parent / "LOC_val_solution.csv", flat.parent / "synsets.txt"
    rows = [f"ILSVRC2012_val_{number:08d},{name} 1 2 3 4 {name} 5 6 7 8 " for number, name in enumerate(names, 1)]
    solution.write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
    lines.write_text("\n".join(names))
    for file in (solution, lines):
        source = sources.open_source(str(flat), annotations=str(file))
        assert source.labels is not None
        assert source.class_names is not None
        found = [source.class_names[label] for _, label in sorted(zip(source.names, source.labels, strict=True))]
        assert found == names
        assert source.read(0).size == (8, 8)
    solution.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2\n")
    with pytest.raises(DataError, match="no boxes of ImageNet in line 2"):
        sources.open_source(str(flat), annotations=str(solution))


def test_annotations_go_with_a_folder_and_name_a_file_that_is_there(folder: Path) -> None:
    for annotations, data, why in (
        ("absent.csv", folder, "absent.csv does not exist; expected a list, a COCO file, or a folder of XML"),
        (str(folder / "a.png"), folder, "ends in '.png'; expected one of .csv"),
        (str(folder / "a.png"), folder / "a.png", "is for a folder of images"),
        (str(folder), folder, "has no .xml"),
    ):
        with pytest.raises(DataError, match=why):
            sources.open_source(str(data), annotations=annotations)


def test_text_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        sources.open_source(str(folder / "a.csv"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device without an end here")
def test_a_pipe_or_a_device_in_a_list_is_an_image_that_cannot_be_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "list.csv").write_text("pipe.png,0\n/dev/zero,0\ndeep,1\na.png,1\n")
    source = sources.open_source(str(folder / "list.csv"))
    for index, why in enumerate(("it is a pipe, a device or a folder",) * 2 + ("Is a directory",)):
        with pytest.raises(UnreadableImage, match=why):
            source.read(index)
    assert source.read(3).size == (8, 8)
    in_memory = held.opened("data", [(folder / "pipe.png", 0), ("/dev/zero", 0)])
    for index in (0, 1):
        with pytest.raises(UnreadableImage, match="it is a pipe, a device or a folder"):
            in_memory.read(index)
    with pytest.raises(DataError, match=r"the mask .*pipe.png cannot be read: it is a pipe, a device or a folder"):
        masks.read(masks.of_files([folder / "pipe.png"], ignored=255, reduce_labels=False), 0, 2)


# Splits, folders of Hugging Face, other systems and other kinds of file -----------------------------------------------

SPLIT = {
    "a.csv": "path,label,split\na.png,cat,train\ndeep/b 1.jpg,dog,val\nc.webp,dog,train\n",
    "a.jsonl": '{"path": "a.png", "label": "cat", "split": "train"}\n'
    '{"path": "deep/b 1.jpg", "label": "dog", "split": "val"}\n{"path": "c.webp", "label": "dog", "split": "train"}',
    "fastai.csv": "path,label,is_valid\na.png,cat,train\ndeep/b 1.jpg,dog,val\nc.webp,dog,train\n",
    "folds.csv": "path,label,fold\na.png,cat,train\ndeep/b 1.jpg,dog,val\nc.webp,dog,train\n",
    "hot.csv": "path,cat,dog,subset\na.png,1,0,train\ndeep/b 1.jpg,0,1,val\nc.webp,0,1,train\n",
}


@pytest.mark.parametrize("name", SPLIT)
def test_entries_of_several_splits_are_never_mixed(name: str, folder: Path) -> None:
    (folder / name).write_text(SPLIT[name])
    with pytest.raises(DataError, match="has entries of the splits train, val; choose one with --split"):
        sources.open_source(str(folder / name))
    found = sources.open_source(str(folder / name), "train")
    assert labels(found) == {"a.png": 0, "c.webp": 1}
    beside = sources.open_source(str(folder), "train", annotations=str(folder / name))
    assert labels(beside) == labels(found)
    with pytest.raises(DataError, match="has no entries of the split 'test'; it has train, val"):
        sources.open_source(str(folder / name), "test")


def test_a_list_without_splits_takes_no_split(folder: Path) -> None:
    (folder / "a.csv").write_text("path,label\na.png,cat\n")
    with pytest.raises(DataError, match="no column says one, leave --split out"):
        sources.open_source(str(folder / "a.csv"), "val")


def test_paths_of_windows_are_found(folder: Path) -> None:
    (folder / "a.csv").write_text("path,label\ndeep\\b 1.jpg,cat\na.png,dog\n")
    source = sources.open_source(str(folder / "a.csv"))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    assert all(source.read(index).size for index in range(2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,label\na.png,cat\nc.webp,dog\n"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": "cat"}\n{"file_name": "c.webp", "label": "dog"}\n'),
    ],
)
def test_the_metadata_of_a_folder_of_hugging_face_says_its_labels(name: str, content: str, folder: Path) -> None:
    (folder / "deep" / "b 1.jpg").unlink()
    (folder / "deep").rmdir()
    (folder / name).write_text(content)
    assert labels(sources.open_source(str(folder))) == {"a.png": 0, "c.webp": 1}
    (folder / name).write_text(content.replace("label", "text"))  # captions are no labels
    assert sources.open_source(str(folder)).labels is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.zip", "is an archive; unpack it"),
        ("x.tar.gz", "is compressed; unpack it, and give the folder or the .tar"),
        ("x.npz", "is no image file; read it in Python"),
        ("x.tfrecord", "is no image file; read it in Python"),
        ("x.xlsx", "is a spreadsheet; save it as CSV"),
        ("x.PNG", "is one image; give the folder that it is in"),
        ("data.yaml", "is a description; give the folder of images"),
        ("train.lst", "is a list of another tool; write it as CSV"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        sources.open_source(str(tmp_path / name))
    assert words in str(caught.value)


def test_a_list_whose_size_the_system_does_not_know_is_read_up_to_a_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a device, which says 0 bytes."""
    monkeypatch.setattr(image_lists, "MAX_LIST_BYTES", 1000)
    with pytest.raises(DataError, match="has more than 1,000 bytes"):
        image_lists.text_of(Path("/dev/zero"))


# Objects of JSON, by which of its sides names images ------------------------------------------------------------------

OBJECTS = {
    "classes": '{"dog": ["a.png", "c.webp"], "cat": ["deep/b 1.jpg"]}',
    "one path": '{"dog": ["a.png", "c.webp"], "cat": "deep/b 1.jpg"}',
    "sets": '{"a.png": ["dog"], "c.webp": ["dog"], "deep/b 1.jpg": ["cat"]}',
    "columns": '{"image": ["a.png", "c.webp", "deep/b 1.jpg"], "label": ["dog", "dog", "cat"]}',
    "plural": '{"images": ["a.png", "c.webp", "deep/b 1.jpg"], "labels": ["dog", "dog", "cat"]}',
    "pandas": '{"image": {"0": "a.png", "1": "c.webp", "2": "deep/b 1.jpg"},'
    ' "label": {"0": "dog", "1": "dog", "2": "cat"}}',
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_of_json_names_images_on_either_side(kind: str, folder: Path) -> None:
    (folder / "list.json").write_text(OBJECTS[kind])
    source = sources.open_source(str(folder / "list.json"))
    assert (labels(source), source.class_names) == ({"a.png": 1, "c.webp": 1, "deep/b 1.jpg": 0}, ("cat", "dog"))


def test_a_class_without_images_keeps_its_number_and_an_image_of_two_has_both(folder: Path) -> None:
    (folder / "list.json").write_text('{"cat": [], "dog": ["a.png"], "emu": ["a.png", "c.webp"]}')
    source = sources.open_source(str(folder / "list.json"))
    assert (labels(source), source.class_names) == ({"a.png": (1, 2), "c.webp": (2,)}, ("cat", "dog", "emu"))
    (folder / "list.json").write_text('{"0": ["c.webp"], "10": ["a.png"]}')
    assert labels(sources.open_source(str(folder / "list.json"))) == {"c.webp": 0, "a.png": 10}


def test_an_object_of_json_with_splits_has_their_entries(folder: Path) -> None:
    entries = {"train": [{"image": "a.png", "label": "dog"}], "val": [["c.webp", "emu"]], "test": ["deep/b 1.jpg"]}
    (folder / "list.json").write_text(json.dumps(entries))
    source = sources.open_source(str(folder / "list.json"), "val")
    assert (labels(source), source.class_names) == ({"c.webp": 1}, ("dog", "emu"))
    with pytest.raises(DataError, match="has entries of the splits test, train, val; choose one with --split"):
        sources.open_source(str(folder / "list.json"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"a.png": ["c.webp"]}', "does not say which side names images, as in 'a.png'"),
        ('{"cat.png": ["a.png"], "dog": ["c.webp"]}', "does not say which side names images, as in 'cat.png'"),
        ('{"cat": "a.png", "dog": "c.webp"}', "does not say which side names images, as in 'cat': a.png; expected"),
        ('{"cat": ["a.png"], "dog": 3}', "does not say which side names images"),
        ('{"image": ["a.png"], "label": [1, 2]}', "has the keys image, label; expected lists of one length"),
        (
            '{"root": "x", "images": ["a.png"], "labels": [1]}',
            "has the keys root, images, labels; expected lists of one",
        ),
    ],
)
def test_an_object_of_json_that_does_not_say_which_side_names_images_is_refused(
    content: str, why: str, folder: Path
) -> None:
    (folder / "list.json").write_text(content)
    with pytest.raises(DataError, match=why):
        sources.open_source(str(folder / "list.json"))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_numbers_beside_class_names_order_them(kind: str, first: int, folder: Path) -> None:
    """They were left aside, and the names sorted."""
    rows = [("a.png", "zebra", first), ("b.png", "ant", first + 1), ("c.png", "zebra", first)]
    file = folder / f"list.{kind}"
    if kind == "csv":
        file.write_text("path,class_name,class_id\n" + "".join(f"{p},{n},{i}\n" for p, n, i in rows))
    else:
        file.write_text(json.dumps([{"path": p, "class_name": n, "class_id": i} for p, n, i in rows]))
    source = sources.open_source(str(file))
    assert source.class_names == ("zebra", "ant")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 0]
    assert source.labels_from == "column"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("a.png,ant,0\nb.png,ant,1\n", r"gives the class ant the numbers 0 and 1 in class_id; expected one"),
        ("a.png,ant,0\nb.png,bee,0\n", r"gives the classes ant and bee the number 0 in class_id; expected one each"),
    ],
)
def test_numbers_that_contradict_class_names_are_refused(rows: str, why: str, folder: Path) -> None:
    (folder / "list.csv").write_text(f"path,label,class_id\n{rows}")
    with pytest.raises(DataError, match=why):
        sources.open_source(str(folder / "list.csv"))


@pytest.mark.parametrize(
    ("number", "why"),
    [
        ("17", "not used: the numbers in category_id, which have gaps"),
        ("n1", "not used: category_id, which contains n1 beside the class names"),
    ],
)
def test_numbers_that_order_nothing_are_said_and_the_names_are_sorted(number: str, why: str, folder: Path) -> None:
    (folder / "list.csv").write_text(f"path,label,category_id\na.png,zebra,3\nb.png,ant,{number}\nc.png,,\n")
    source = sources.open_source(str(folder / "list.csv"))
    assert source.class_names == ("ant", "zebra")
    assert why in source.notes
