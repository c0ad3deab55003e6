"""Sources and pixels, held against timm's own dataset, loader and normalization."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sample_records
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from image_tars import write_tar
from PIL import Image

from convnext_deploy.data import decoding, preprocess, readers, sources
from convnext_deploy.errors import DataError, MissingPackageError
from convnext_deploy.records.base import InputKind
from convnext_deploy.records.manifest import (
    ExportSpec,
    Manifest,
    Preprocessing,
)

CLASSES = ("ant", "bee", "cow10", "cow9")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROOT = Path(__file__).parents[2]


def encoded(seed: int, size: tuple[int, int] = (70, 50), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A smooth random picture of (width, height) pixels as an image file."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def samples() -> dict[str, tuple[bytes, int]]:
    """Path -> (file, label in CLASSES), of several sizes, modes and formats."""
    kinds = ((70, 50), "RGB", "JPEG"), ((31, 90), "L", "PNG"), ((64, 64), "RGBA", "PNG"), ((200, 33), "P", "PNG")
    made = {}
    for number in range(20):
        name, (size, mode, kind) = CLASSES[number % 4], kinds[number % 4 if number > 3 else 0]
        suffix = "png" if kind == "PNG" else "JPEG" if number % 3 else "jpg"
        made[f"{name}/{number}.{suffix}"] = (encoded(number, size, mode, kind), CLASSES.index(name))
    return made


def write_folder(root: Path, files: dict[str, tuple[bytes, int]]) -> Path:
    for path, (content, _) in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def write_parquet(
    path: Path,
    rows: Sequence[tuple[bytes | None, str | None, int | None]],
    names: tuple[str, ...] | None = CLASSES,
    group: int = 3,
) -> Path:
    metadata = {}
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        metadata["huggingface"] = json.dumps({"info": {"features": features}})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    columns = {"image": [{"bytes": row[0], "path": row[1]} for row in rows], "label": [row[2] for row in rows]}
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=group)
    return path


def manifest(input: InputKind = "float32", mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Manifest:
    return sample_records.manifest(
        ExportSpec(format="onnx", input=input), preprocessing=Preprocessing(mean=mean, std=std)
    )


def contents(source: sources.ImageSource) -> dict[str, tuple[str, int]]:
    """Name -> (hash of the file, label)."""
    assert source.labels is not None
    return {
        name: (hashlib.sha256(source.read_bytes(index)).hexdigest(), int(source.labels[index]))
        for index, name in enumerate(source.names)
    }


def expected() -> dict[str, tuple[str, int]]:
    return {name: (hashlib.sha256(content).hexdigest(), label) for name, (content, label) in samples().items()}


def test_a_folder_of_class_folders_has_torchvisions_labels_and_the_order_of_its_names(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, samples())
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    source = sources.open_source(str(tmp_path))
    assert contents(source) == expected()
    assert list(source.names) == sorted(source.names)
    assert source.class_names == CLASSES
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    theirs = {str(Path(path).relative_to(tmp_path)): label for path, label in ImageFolder(str(tmp_path)).samples}
    assert theirs == dict(zip(source.names, source.labels.tolist(), strict=True))


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))
    source = sources.open_source(str(tmp_path))
    assert (source.names, source.labels, source.class_names) == (("0.jpg", "1.jpg", "2.jpg"), None, None)
    assert source.read(1).size == (70, 50)


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, samples())
    (tmp_path / "stray.jpg").write_bytes(encoded(0))
    with pytest.raises(DataError, match=r"inside and outside class folders, such as stray\.jpg"):
        sources.open_source(str(tmp_path))


def test_split_folders_ask_for_a_choice(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", samples())
    write_folder(tmp_path / "val", samples())
    with pytest.raises(DataError, match=r"split folders train, val; choose one with --split"):
        sources.open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"no folder for the split 'test'; it has train, val"):
        sources.open_source(str(tmp_path), "test")
    source = sources.open_source(str(tmp_path), "val")
    assert contents(source) == expected()
    assert source.name == f"{tmp_path}, split val"


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "testing"), ("TRAIN", "Validation")])
def test_split_folders_are_known_in_any_writing_and_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        write_folder(tmp_path / name, samples())
    with pytest.raises(DataError, match=f"split folders {', '.join(sorted(names))}; choose one with --split"):
        sources.open_source(str(tmp_path))
    assert contents(sources.open_source(str(tmp_path), names[1])) == expected()


def test_what_macos_puts_beside_an_archives_files_is_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, samples())
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._1.jpg").write_bytes(b"x")
    assert contents(sources.open_source(str(tmp_path))) == expected()


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bus/1.jpg": (encoded(0), 0), "train/1.jpg": (encoded(1), 1)})
    assert sources.open_source(str(tmp_path)).class_names == ("bus", "train")


def test_a_tar_with_class_folders_reads_as_the_folder_does(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", {f"./{name}": content for name, (content, _) in samples().items()})
    source = sources.open_source(str(path))
    assert contents(source) == expected()
    assert source.class_names == CLASSES


def test_shards_with_class_folders_are_one_source(tmp_path: Path) -> None:
    files = list(samples().items())
    for shard in range(3):
        write_tar(tmp_path / f"shard-{shard}.tar", {name: content for name, (content, _) in files[shard::3]})
    source = sources.open_source(str(tmp_path))
    assert {name.partition("/")[2]: value for name, value in contents(source).items()} == expected()
    assert source.names[0].startswith("shard-0.tar/")


def test_shards_without_class_folders_are_one_class_each(tmp_path: Path) -> None:
    for name in CLASSES:
        write_tar(tmp_path / f"{name}.tar", {f"{n}.jpg": encoded(n) for n in range(2)})  # the same names in each
    source = sources.open_source(str(tmp_path))
    assert source.class_names == CLASSES
    assert source.names[:3] == ("ant.tar/0.jpg", "ant.tar/1.jpg", "bee.tar/0.jpg")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tars_inside_a_tar_are_read_at_their_place(tmp_path: Path) -> None:
    inner = {}
    for number, name in enumerate(CLASSES):
        inner[f"{name}.tar"] = write_tar(tmp_path / "inner", {"a.jpg": encoded(number)}).read_bytes()
    path = write_tar(tmp_path / "outer.tar", inner)
    source = sources.open_source(str(path))
    assert contents(source) == {
        f"{name}.tar/a.jpg": (hashlib.sha256(encoded(number)).hexdigest(), number)
        for number, name in enumerate(CLASSES)
    }
    assert source.class_names == CLASSES


def test_a_flat_tar_has_no_labels(tmp_path: Path) -> None:
    source = sources.open_source(str(write_tar(tmp_path / "flat.tar", {"b.jpg": encoded(1), "a.png": encoded(2)})))
    assert (source.names, source.labels) == (("a.png", "b.jpg"), None)


def test_repeated_names_are_told_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for seed in range(3):  # as `tar --append` leaves them
            member = tarfile.TarInfo("ant/a.jpg")
            member.size = len(encoded(seed))
            tar.addfile(member, io.BytesIO(encoded(seed)))
    assert sources.open_source(str(tmp_path / "twice.tar")).names == ("ant/a.jpg", "ant/a.jpg#2", "ant/a.jpg#3")


def test_webdatasets_numbers_and_names_of_classes_are_read(tmp_path: Path) -> None:
    (tmp_path / "numbers").mkdir()
    for shard in (0, 1):
        write_tar(
            tmp_path / "numbers" / f"{shard}.tar",
            {
                f"{key}{suffix}": content
                for key in ("a", "b")
                for suffix, content in ((".cls", f"{shard}{ord(key) % 2}\n".encode()), (".jpg", encoded(ord(key))))
            }
            | {"a.json": b"{}"},
        )
    source = sources.open_source(str(tmp_path / "numbers"))
    assert source.names == ("0.tar/a.jpg", "0.tar/b.jpg", "1.tar/a.jpg", "1.tar/b.jpg")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 11, 10]
    assert (source.class_names, source.labels_from) == (None, "column")
    assert source.read_bytes(3) == encoded(ord("b"))
    named = write_tar(
        tmp_path / "names.tar", {"1.jpg": encoded(1), "1.cls": b"dog", "2.cls": b"cat", "2.jpg": encoded(2)}
    )
    source = sources.open_source(str(named))
    assert source.labels is not None
    assert (source.class_names, source.labels.tolist(), source.labels_from) == (("cat", "dog"), [1, 0], "names")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": encoded(0), "a.cls": b"3", "b.jpg": encoded(1)}, r"has no class for b\.jpg; expected a \.cls file"),
        ({"a.jpg": encoded(0), "a.cls": b" \n"}, r"has no class for a\.jpg"),
        ({"a.txt": b"a dog", "a.cls": b"3"}, r"has \.cls files and no .* images"),
    ],
)
def test_webdatasets_images_without_a_class_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sources.open_source(str(write_tar(tmp_path / "000.tar", files)))


def test_the_webdataset_layout_without_classes_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "000.tar", {"000.jpg": encoded(0), "000.json": b"3"})
    with pytest.raises(DataError, match=r"webdataset layout \(000\.json beside its image\) without \.cls files"):
        sources.open_source(str(path))
    with pytest.raises(DataError, match="webdataset layout"):
        sources.open_source(str(tmp_path))


def test_no_pickle_is_written_beside_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": encoded(0)})
    sources.open_source(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_parquet_reads_as_the_folder_does(tmp_path: Path) -> None:
    rows = [(content, name, label) for name, (content, label) in samples().items()]
    path = write_parquet(tmp_path / "set.parquet", rows)
    source = sources.open_source(str(path))
    assert contents(source) == expected()
    assert source.names == tuple(samples())  # the order of the rows
    assert source.class_names == CLASSES


def test_parquet_files_of_a_folder_are_one_source_a_split(tmp_path: Path) -> None:
    rows = [(content, name, label) for name, (content, label) in samples().items()]
    write_parquet(tmp_path / "test-00000-of-00002.parquet", rows[:7])
    write_parquet(tmp_path / "test-00001-of-00002.parquet", rows[7:])
    assert contents(sources.open_source(str(tmp_path))) == expected()
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows[:2])
    with pytest.raises(DataError, match=r"has the splits test, train; choose one with --split"):
        sources.open_source(str(tmp_path))
    assert contents(sources.open_source(str(tmp_path), "test")) == expected()
    with pytest.raises(DataError) as refused:  # an option that has no --split beside it does not name it
        sources.open_whole("--verify-data", str(tmp_path))
    assert str(refused.value) == (
        f"--verify-data: {tmp_path} has the splits test, train; give the files of one split alone"
    )
    with pytest.raises(DataError, match=r"no parquet files of the split 'val'; it has test, train"):
        sources.open_source(str(tmp_path), "val")


def test_parquet_files_of_two_datasets_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [(encoded(0), None, 0)])
    write_parquet(tmp_path / "b.parquet", [(encoded(0), None, 0)], names=("x", "y"))
    with pytest.raises(DataError, match="names other classes than"):
        sources.open_source(str(tmp_path))


def test_parquet_rows_without_a_path_are_named_by_their_number(tmp_path: Path) -> None:
    source = sources.open_source(str(write_parquet(tmp_path / "a.parquet", [(encoded(n), None, n) for n in range(2)])))
    assert source.names == ("a.parquet#0", "a.parquet#1")


@pytest.mark.parametrize("label", [None, -1])  # -1 is how Hugging Face hides the labels of a test split
def test_parquet_with_hidden_labels_has_none(tmp_path: Path, label: int | None) -> None:
    source = sources.open_source(
        str(write_parquet(tmp_path / "a.parquet", [(encoded(0), None, label)] * 2, names=None))
    )
    assert (source.labels, source.class_names) == (None, None)


def test_parquet_with_some_labels_missing_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [(encoded(0), "x", 1), (encoded(0), "y", None)])
    with pytest.raises(DataError, match="no label for y"):
        sources.open_source(str(path))


@pytest.mark.parametrize(
    ("column", "values", "names", "numbers"),
    [
        pytest.param("label", ["10", "2"], ("10", "2"), [0, 1], id="names"),
        pytest.param("label", pa.array(["b", "a"]).dictionary_encode(), ("a", "b"), [1, 0], id="pandas' categories"),
        pytest.param("labels", [4, 3], None, [4, 3], id="another name of the column"),
        pytest.param("Class", ["b", "a"], ("a", "b"), [1, 0], id="names under another name"),
        pytest.param("tags", [["b"], ["a"]], ("a", "b"), [1, 0], id="lists of one name"),
        pytest.param("label", [1.0, 3.0], None, [1, 3], id="as pandas has them where one was missing"),
        pytest.param("label", [True, False], None, [1, 0], id="true and false"),
        pytest.param("tags", [{"a": 1}, {"a": 2}], None, None, id="of another kind"),
    ],
)
def test_labels_in_parquet_are_numbers_or_names_as_in_other_tables(
    column: str, values: Any, names: tuple[str, ...] | None, numbers: list[int] | None, tmp_path: Path
) -> None:
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(2)]
    pq.write_table(pa.table({"image": images, column: values}), tmp_path / "a.parquet")
    source = sources.open_source(str(tmp_path / "a.parquet"))
    assert (None if source.labels is None else source.labels.tolist(), source.class_names) == (numbers, names)


@pytest.mark.parametrize(
    ("values", "sets"),
    [
        pytest.param([[4, 0], [], [4]], ((0, 4), (), (4,)), id="numbers"),
        pytest.param([["b", "a"], None, ["b"]], ((0, 1), (), (1,)), id="names"),
        pytest.param([[1, 0, 1], [0, 0, 0], [0, 0, 1]], ((0, 2), (), (2,)), id="one a class"),
        pytest.param([[1.0, 0.0, 1.0], [0.0] * 3, [0.0, 0.0, 1.0]], ((0, 2), (), (2,)), id="one a class, as floats"),
    ],
)
def test_lists_of_labels_in_parquet_are_those_of_an_image(values: Any, sets: Any, tmp_path: Path) -> None:
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(3)]
    pq.write_table(pa.table({"image": images, "label": values}), tmp_path / "a.parquet")
    assert sources.open_source(str(tmp_path / "a.parquet")).label_sets == sets


def test_names_of_classes_in_lists_are_those_that_datasets_writes(tmp_path: Path) -> None:
    """`List(ClassLabel)`, whose JSON beside the schema has other forms in other versions of `datasets`."""
    several = getattr(datasets, "List", None) or datasets.Sequence  # before datasets 4
    features = datasets.Features({
        "image": datasets.Image(), "labels": several(datasets.ClassLabel(names=["x", "a", "m"])),
    })  # fmt: skip
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "labels": [[2, 0], [1]]}
    with redirect_stderr(io.StringIO()):  # a bar of progress
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    source = sources.open_source(str(tmp_path / "a.parquet"))
    assert (source.label_sets, source.class_names) == (((0, 2), (1,)), ("x", "a", "m"))
    table = pq.read_table(tmp_path / "a.parquet")
    classes = {"names": ["x", "a", "m"], "_type": "ClassLabel"}
    for kind in ([classes], {"feature": classes, "_type": "Sequence"}):
        written = {"info": {"features": {"image": {"_type": "Image"}, "labels": kind}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(written)}), tmp_path / "a.parquet")
        assert sources.open_source(str(tmp_path / "a.parquet")).class_names == ("x", "a", "m")


def test_numbers_in_parquet_that_are_not_whole_are_values(tmp_path: Path) -> None:
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(2)]
    for values in ([0.5, 2.0], [[0.5, 1.0], [2.0, 3.0]]):
        pq.write_table(pa.table({"image": images, "label": values}), tmp_path / "a.parquet")
        source = sources.open_source(str(tmp_path / "a.parquet"))
        assert source.values is not None
        assert source.values.tolist() == [value if isinstance(value, list) else [value] for value in values]
    pq.write_table(pa.table({"image": images, "label": [0.5, None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no label for 1.png; expected one for every image"):
        sources.open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": images, "label": [[1], [None]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has None in a list of labels; expected numbers or names"):
        sources.open_source(str(tmp_path / "a.parquet"))


def test_names_in_parquet_are_numbered_as_timm_does_where_that_is_asked_for(tmp_path: Path) -> None:
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(2)]
    pq.write_table(pa.table({"image": images, "label": ["10", "2"]}), tmp_path / "a.parquet")
    assert sources.open_source(str(tmp_path / "a.parquet"), class_order="timm").class_names == ("2", "10")


def test_parquet_row_groups_stay_in_memory_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [(encoded(n), f"{n}", 0) for n in range(12)], group=3)
    source = sources.open_source(str(path))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def recorded(self: Any, group: int, **options: Any) -> pa.Table:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    for index in (0, 1, 3, 2, 4, 5, 6, 7, 8, 0):
        source.read(index)
    assert read == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"img": [b"x"], "label": [0]}, r"no column image {bytes, path} \(its columns: img, label\)"),
        ({"image": [b"x"], "label": [0]}, "no column image {bytes, path}"),  # not the struct
        ({"image": [{"path": "a.jpg"}], "label": [0]}, "no column image {bytes, path}"),  # files are elsewhere
        (
            {"image": [{"bytes": b"x", "path": "a"}], "label": [{"a": 1}]},
            "labels of type struct<a: int64>; expected numbers or names of classes, one or a list",
        ),
        ({"image": pa.array([], pa.struct([("bytes", pa.binary())])), "label": pa.array([], pa.int64())}, "no rows"),
    ],
)
def test_parquet_of_another_layout_is_refused(tmp_path: Path, table: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        sources.open_source(str(tmp_path / "a.parquet"))


def test_parquet_without_a_label_column_has_no_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": encoded(0), "path": "a.jpg"}]}), tmp_path / "a.parquet")
    source = sources.open_source(str(tmp_path / "a.parquet"))
    assert (source.names, source.labels) == (("a.jpg",), None)


def garbage(path: Path) -> None:
    path.write_bytes(b"nothing of the kind " * 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"does not exist; expected a folder of class folders"),
        (lambda path: path.mkdir(), r"contains no \.jpg, \.jpeg, \.png, .* images; expected"),
        (lambda path: (path / "cat").mkdir(parents=True), r"contains no \.jpg, \.jpeg, \.png, .* images"),
        (garbage, "is a file of another kind; expected"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        sources.open_source(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(DataError, match="'' does not exist"):
        sources.open_source("")


@pytest.mark.parametrize(("name", "message"), [("a.tar", "as uncompressed tar"), ("a.parquet", "as parquet")])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind " * 100])
def test_a_damaged_container_is_refused(tmp_path: Path, name: str, message: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot be read {message}") as caught:
        sources.open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"cat/{n}.jpg": encoded(n) for n in range(9)})
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(DataError, match="cannot be read as uncompressed tar"):
        sources.open_source(str(path))


def test_a_tar_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no \.jpg, \.jpeg, \.png, .* images"):
        sources.open_source(str(write_tar(tmp_path / "a.tar", {"readme.md": b"x"})))


def test_a_folder_of_both_tar_and_parquet_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a/a.jpg": encoded(0)})
    write_parquet(tmp_path / "a.parquet", [(encoded(0), None, 0)])
    with pytest.raises(DataError, match=r"both \.parquet and \.tar"):
        sources.open_source(str(tmp_path))


def test_a_file_has_no_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [(encoded(0), None, 0)])
    with pytest.raises(DataError, match="has no split 'test'; leave --split out"):
        sources.open_source(str(path), "test")


def test_a_file_that_shrinks_after_opening_stops_the_reading(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a/a.jpg": encoded(0)})
    source = sources.open_source(str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="was truncated while it was read"):
        source.read(0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is text\n", "not an image in a format that is read here"),
        (encoded(0, (300, 300))[:2000], "truncated"),
        (encoded(0, kind="PNG")[:300], "truncated|broken"),
        (encoded(0, kind="PNG").replace(b"IDAT", b"IDAX"), "."),  # which of Pillow's errors it is differs by version
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "damaged png"],
)
def test_a_corrupt_image_is_an_oserror_of_one_constant_line(tmp_path: Path, content: bytes, reason: str) -> None:
    write_folder(tmp_path, {"cat/a.jpg": (content, 0), "cat/b.jpg": (encoded(1), 0)})
    source = sources.open_source(str(tmp_path))
    errors = []
    for _ in range(2):
        with pytest.raises(OSError, match=reason) as caught:
            source.read(0)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "\n" not in errors[0]
    assert source.read(1).size == (70, 50)


def test_a_link_to_nothing_is_a_corrupt_image(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(OSError, match="cannot be opened: No such file"):
        sources.open_source(str(tmp_path)).read(0)


def test_an_image_too_large_to_decode_safely_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"cat/a.jpg": (encoded(0), 0)})
    source = sources.open_source(str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 3500 pixels are more than twice that
    with pytest.raises(OSError, match="decompression bomb"):
        source.read(0)


def test_a_failing_disk_is_not_a_corrupt_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"cat/a.jpg": (encoded(0), 0)})
    source = sources.open_source(str(tmp_path))

    def fail(*_: Any, **__: Any) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(readers, "open", fail, raising=False)
    with pytest.raises(DataError, match=r"cat/a\.jpg of .* cannot be read: .*Input/output error"):
        source.read(0)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_many_threads_read_the_same_bytes(tmp_path: Path, kind: str) -> None:
    files = {f"cat/{number:03d}.jpg": encoded(number) for number in range(60)}
    if kind == "tar":
        path = write_tar(tmp_path / "a.tar", files)
    else:
        rows = [(content, name, 0) for name, content in files.items()]
        path = write_parquet(tmp_path / "a.parquet", rows, group=4)
    source = sources.open_source(str(path))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read_bytes, list(range(60)) * 5))
    assert read == list(files.values()) * 5


def test_the_hash_is_of_names_and_labels(tmp_path: Path) -> None:
    def made(name: str, rows: list[tuple[bytes | None, str | None, int | None]]) -> str:
        return sources.open_source(str(write_parquet(tmp_path / name, rows))).sha256

    first = made("1.parquet", [(encoded(0), "a", 0), (encoded(1), "b", 1)])
    assert first == made("2.parquet", [(encoded(5), "a", 0), (encoded(6), "b", 1)])
    assert first != made("3.parquet", [(encoded(0), "a", 0), (encoded(1), "b", 2)])
    assert first != made("4.parquet", [(encoded(0), "a", 0), (encoded(1), "c", 1)])
    assert first != made("5.parquet", [(encoded(0), "a", None), (encoded(1), "b", None)])


def test_a_subset_is_spread_over_the_source(tmp_path: Path) -> None:
    source = sources.open_source(str(write_folder(tmp_path, samples())))
    part = sources.subset(source, 4)
    assert part.names == tuple(source.names[index] for index in (0, 5, 10, 15))
    assert part.labels is not None
    assert set(part.labels.tolist()) == {0, 1, 2, 3}
    assert contents(part).items() <= contents(source).items()
    assert part.sha256 != source.sha256
    assert sources.subset(source, 20) is source


def test_a_missing_datasets_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(MissingPackageError) as caught:
        sources.open_source("hfds:somewhere", "test")
    assert str(caught.value) == "datasets is not installed; run: pip install 'convnext-deploy[hf]'"
    assert capsys.readouterr().out == ""  # timm prints a line of its own


def test_a_dataset_needs_a_split() -> None:
    with pytest.raises(DataError, match="hfds:somewhere needs a split"):
        sources.open_source("hfds:somewhere")


def test_a_dataset_reads_as_its_parquet_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [(content, name, label) for name, (content, label) in samples().items()]
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", rows)
    source = sources.open_source(f"hfds:{tmp_path / 'set'}", "test")
    assert contents(source) == expected()
    assert source.names == tuple(samples())
    assert source.class_names == CLASSES
    with pytest.raises(DataError, match=r"split val\) cannot be opened"):
        sources.open_source(f"hfds:{tmp_path / 'set'}", "val")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's ImageDataset leaves its files to the GC
@pytest.mark.parametrize("image_size", [(64, 64), (32, 96)], ids=["square", "wide"])
@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "interpolation"),
    [
        ("center", 0.875, "bicubic"),
        ("squash", 1.0, "bilinear"),
        ("border", 0.95, "lanczos"),
        ("center", 0.9, "nearest"),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_pixels_and_inputs_equal_timms_loader(
    tmp_path: Path, image_size: tuple[int, int], crop_mode: Any, crop_pct: float, interpolation: Any, in_chans: int
) -> None:
    from timm.data import create_dataset, create_loader

    write_folder(tmp_path, samples())
    mean, std = MEAN[:in_chans], STD[:in_chans]
    dataset = create_dataset("", root=str(tmp_path), input_img_mode="L" if in_chans == 1 else "RGB")
    loader = create_loader(
        dataset,
        (in_chans, *image_size),
        batch_size=7,
        use_prefetcher=True,
        device=torch.device("cpu"),
        num_workers=0,
        persistent_workers=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    theirs = torch.cat([images for images, _ in loader]).numpy()
    source = sources.open_source(str(tmp_path))
    preprocessing = Preprocessing(
        mean=mean, std=std, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation
    )
    to_pixels = preprocess.transform(preprocessing, image_size, in_chans)
    order = [source.names.index(dataset.filename(index)) for index in range(len(source))]
    pixels = np.stack([to_pixels(source.read(index)) for index in order])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (20, in_chans, *image_size)
    np.testing.assert_array_equal(as_input_of(pixels, manifest(mean=mean, std=std)), theirs)


def as_input_of(pixels: np.ndarray, manifest: Manifest) -> np.ndarray:
    return preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(DataError, match=r"takes 4 channels; image files can be read as 1 \(grey\) or 3 \(RGB\)"):
        preprocess.transform(Preprocessing(mean=MEAN, std=STD), (32, 32), 4)


def test_an_image_too_narrow_to_resize_is_an_oserror() -> None:
    to_pixels = preprocess.transform(Preprocessing(mean=MEAN, std=STD, crop_mode="border"), (32, 32), 3)
    with pytest.raises(OSError, match="1x500 pixels cannot be resized"):
        to_pixels(Image.new("RGB", (1, 500)))


def test_a_strip_that_would_become_larger_than_the_limit_is_an_oserror() -> None:
    to_pixels = preprocess.transform(Preprocessing(mean=MEAN, std=STD), (224, 224), 3)
    with pytest.raises(OSError, match="256x7680000 pixels; at most 67,108,864 are decoded"):
        to_pixels(Image.new("RGB", (1, 30_000)))


@pytest.mark.parametrize("mode", ["squash", "fit"])  # the others would make a strip too long, or nothing
def test_a_strip_whose_filter_would_take_gigabytes_is_an_oserror(mode: Any) -> None:
    to_pixels = preprocess.transform(Preprocessing(mean=MEAN, std=STD, crop_mode=mode), (32, 32), 3)
    for shape in ((1, 2**20 + 1), (2**20 + 1, 1)):
        with pytest.raises(OSError, match=f"{shape[1]}x{shape[0]} pixels; sides of at most 1,048,576 are resized"):
            to_pixels(np.zeros(shape, np.uint8))


def test_only_the_pixels_that_a_fitted_image_needs_become_floats() -> None:
    to_pixels = preprocess.transform(Preprocessing(mean=MEAN, std=STD, crop_mode="fit"), (32, 32), 3)
    image = Image.new("RGB", (2048, 2048), "red")
    tracemalloc.start()
    try:
        pixels = to_pixels(image)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2048 * 2048 * 2.5  # Pillow's bytes once or twice; float32 alone would be four times as many
    assert np.array_equal(pixels[:, 16, 16], (255, 0, 0))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pixels_of_any_shape_equal_timms_transform(draw: st.DataObject) -> None:
    from timm.data import create_transform

    side = st.integers(1, 300)
    width, height = draw.draw(side), draw.draw(side)
    size = draw.draw(st.sampled_from([(32, 32), (64, 64), (32, 96), (96, 64)]))
    mode: Any = draw.draw(st.sampled_from(["center", "squash", "border"]))
    preprocessing = Preprocessing(
        mean=MEAN,
        std=STD,
        crop_mode=mode,
        crop_pct=draw.draw(st.sampled_from([0.875, 0.9, 0.95, 1.0, 2 / 3])),
        interpolation=draw.draw(st.sampled_from(["bicubic", "bilinear", "nearest", "lanczos"])),
    )
    theirs = create_transform(
        (3, *size), use_prefetcher=True, interpolation=preprocessing.interpolation, mean=MEAN, std=STD,
        crop_pct=preprocessing.crop_pct, crop_mode=mode,
    )  # fmt: skip
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
    try:
        expected = np.asarray(theirs(image))
    except ValueError:  # nothing would be left of the shorter side
        with pytest.raises(OSError, match="cannot be resized"):
            preprocess.transform(preprocessing, size, 3)(image)
        return
    np.testing.assert_array_equal(preprocess.transform(preprocessing, size, 3)(image), expected)


def _encoded(mode: str, width: int, height: int) -> bytes:
    """An image file of random pixels, in a format that keeps the mode."""
    random = np.random.default_rng(width * 1000 + height)
    colours = random.integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(colours[..., :3])
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(random.integers(0, 2**16, (height, width), np.uint16)).save(file, "png")
    elif mode == "P with a transparent colour":
        image.quantize(17).save(file, "png", transparency=3)
    elif mode in ("CMYK", "YCbCr"):
        image.convert(mode).save(file, "tiff" if mode == "CMYK" else "jpeg")
    else:
        (image if mode == "P" else Image.fromarray(colours)).convert(mode).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "P with a transparent colour", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
)
def test_pixels_of_every_mode_equal_timms(mode: str, in_chans: int) -> None:
    """As timm's dataset opens an image; a grey one of 16 bits, which that cuts off at 255, in its 8 bits."""
    from timm.data import create_transform

    for number, (width, height) in enumerate([(64, 64), (75, 50), (33, 131), (301, 99)]):
        content = _encoded(mode, width, height)
        preprocessing = Preprocessing(
            mean=MEAN[:in_chans], std=STD[:in_chans], crop_mode=("center", "squash", "border")[number % 3],
            crop_pct=(0.875, 0.95)[number % 2], interpolation=("bicubic", "bilinear", "lanczos", "nearest")[number],
        )  # fmt: skip
        size = ((64, 64), (32, 96))[number % 2]
        theirs = create_transform(
            (in_chans, *size), use_prefetcher=True, interpolation=preprocessing.interpolation,
            mean=preprocessing.mean, std=preprocessing.std, crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
        )  # fmt: skip
        image: Image.Image = Image.open(io.BytesIO(content))
        if mode == "I;16":
            image = Image.fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
        expected = np.asarray(theirs(image.convert("L" if in_chans == 1 else "RGB"))).reshape(in_chans, *size)
        ours = preprocess.transform(preprocessing, size, in_chans)(decoding.decoded(content))
        np.testing.assert_array_equal(ours, expected)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_float_input_is_the_normalized_image_to_float32_rounding(draw: st.DataObject) -> None:
    channels = draw.draw(st.integers(1, 4))
    pixels = draw.draw(
        hnp.arrays(np.uint8, st.tuples(*map(st.just, (2, channels)), st.integers(1, 5), st.integers(1, 5)))
    )
    per_channel = st.lists(st.floats(0.01, 1.0), min_size=channels, max_size=channels).map(tuple)
    mean, std = draw.draw(per_channel), draw.draw(per_channel)
    images = as_input_of(pixels, manifest(mean=mean, std=std))
    exact = (pixels / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert images.dtype == np.float32
    assert images.flags.c_contiguous
    # Rounding of 255 mean (at most 255) and of the difference, each half a unit of 2**-24, divided by 255 std, and two
    # more roundings of the quotient.
    bound = 2.0**-24 * (255 + 255) / (255 * np.array(std)[:, None, None]) + 3 * 2.0**-24 * np.abs(exact)
    assert np.all(np.abs(images - exact) <= bound)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 4)))
def test_uint8_input_is_the_same_pixels_channels_last(pixels: np.ndarray) -> None:
    images = as_input_of(pixels, manifest("uint8"))
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), pixels)


def test_one_mean_serves_all_channels_and_two_of_three_are_refused() -> None:
    pixels = np.zeros((1, 3, 2, 2), np.uint8)
    np.testing.assert_array_equal(as_input_of(pixels, manifest(mean=(0.5,), std=(0.5,))), np.float32(-1))
    with pytest.raises(DataError, match="2 values for 3 channels"):
        as_input_of(pixels, manifest(mean=(0.5, 0.5), std=(0.5,)))


def test_probe_images_are_forty_different_natural_samples() -> None:
    images = preprocess.probe_images(3, (64, 64), 99)
    assert images.shape == (40, 3, 64, 64)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 40
    assert min(image.std() for image in images) > 5  # none is flat
    np.testing.assert_array_equal(images, preprocess.probe_images(3, (64, 64), 99))
    np.testing.assert_array_equal(images[:8], preprocess.probe_images(3, (64, 64), 8))  # one of each photograph


def test_probe_images_have_any_size_and_any_number_of_channels() -> None:
    assert preprocess.probe_images(1, (28, 28), 3).shape == (3, 1, 28, 28)
    five, three = preprocess.probe_images(5, (32, 96), 2), preprocess.probe_images(3, (32, 96), 2)
    np.testing.assert_array_equal(five, three[:, [0, 1, 2, 0, 1]])


@pytest.mark.parametrize("size", [(800, 1344), (32, 1344)])
def test_probe_images_of_sides_whose_scale_is_rounded_up_are_made(size: tuple[int, int]) -> None:
    """1344 pixels, the widest image of torchvision's detectors: Pillow refused a box that began at -5e-14."""
    assert preprocess.probe_images(3, size, 8).shape == (8, 3, *size)


def test_probe_images_need_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from convnext_deploy.data.preprocess import probe_images; probe_images(3, (32, 32), 1); "
        "print({'torch', 'timm', 'pyarrow'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "set()\n"


def test_every_bundled_photograph_has_its_licence_and_they_are_small() -> None:
    folder = ROOT / "convnext_deploy" / "data" / "images"
    listed = (folder / "LICENSES.md").read_text()
    photographs = sorted(folder.glob("*.jpg"))
    assert all(f"`{photograph.name}`" in listed for photograph in photographs)
    assert len(photographs) == 8
    assert sum(file.stat().st_size for file in folder.iterdir()) < 400_000


def test_the_example_is_the_first_2000_test_images_of_fashion_mnist() -> None:
    path = ROOT / "examples" / "fashion-mnist" / "test-2000.parquet"
    source = sources.open_source(str(path))
    assert path.stat().st_size < 1_500_000
    assert len(source) == 2000
    assert (source.names[0], source.names[-1]) == ("test/00000.png", "test/01999.png")
    assert source.class_names is not None
    assert (source.class_names[0], source.class_names[9], len(source.class_names)) == ("T-shirt/top", "Ankle boot", 10)
    assert source.labels is not None
    assert source.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # as published
    image = source.read(0)
    assert (image.mode, image.size) == ("L", (28, 28))


def test_the_example_can_be_made_again_byte_for_byte(tmp_path: Path) -> None:
    import gzip

    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    labels = np.arange(4, dtype=np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + array.tobytes()))
    made = []
    for attempt in ("1.parquet", "2.parquet"):
        command = [
            sys.executable,
            "scripts/make_demo_data.py",
            *(str(tmp_path / n) for n in ("images", "labels", attempt)),
        ]
        subprocess.run([*command, "--count", "3"], check=True, cwd=ROOT, capture_output=True)
        made.append((tmp_path / attempt).read_bytes())
    assert made[0] == made[1]
    source = sources.open_source(str(tmp_path / "1.parquet"))
    np.testing.assert_array_equal(np.stack([np.asarray(source.read(index)) for index in range(3)]), images[:3])
