"""Readers of images as data: a part of one, sent to another process, reads what the whole does."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convnext_deploy.data import readers, sources
from convnext_deploy.data.decoding import UnreadableImage
from convnext_deploy.data.image_source import chosen

COUNT = 23


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def folder(root: Path) -> Path:
    for number in range(COUNT):
        (root / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"c{number % 2}" / f"{number:02d}.png").write_bytes(image(number))
    return root


def tar(root: Path) -> Path:
    folder(root / "images")
    with tarfile.open(root / "a.tar", "w") as file:
        file.add(root / "images", "images")
    return root / "a.tar"


def parquet(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    rows = [
        {"image": {"bytes": image(number), "path": f"{number}.png"}, "label": number % 2} for number in range(COUNT)
    ]
    for part, start in enumerate((0, 11)):  # a row group of three images, and the last one of two
        table = pa.Table.from_pylist(rows[start : start + 11] if part == 0 else rows[start:])
        pq.write_table(table, root / f"{part}.parquet", row_group_size=3)
    return root


def listed(root: Path) -> Path:
    folder(root)
    lines = [f"c{number % 2}/{number:02d}.png,{number % 2}" for number in range(COUNT)]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]))
    return root / "list.csv"


@pytest.mark.parametrize("write", [folder, tar, parquet, listed])
def test_a_part_that_was_sent_reads_what_the_whole_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    place = write(Path("data"))  # relative, as a user gives it
    whole = sources.open_source(str(place))
    assert readers.is_data(whole.read_bytes)
    indices = [22, 3, 4, 5, 11, 0]
    part = pickle.loads(pickle.dumps(chosen(whole, indices)))
    os.chdir("/")  # where a worker runs
    assert part.names == tuple(whole.names[index] for index in indices)
    assert [part.read_bytes(position) for position in range(6)] == [whole.read_bytes(index) for index in indices]
    again = chosen(part, [5, 1])
    assert [again.read_bytes(position) for position in range(2)] == [whole.read_bytes(0), whole.read_bytes(3)]


@pytest.mark.parametrize(("write", "most"), [(folder, 1000), (tar, 1000), (parquet, 1000), (listed, 1000)])
def test_a_part_holds_no_more_than_it_needs(tmp_path: Path, write: Callable[[Path], Path], most: int) -> None:
    whole = sources.open_source(str(write(tmp_path)))
    assert len(pickle.dumps(chosen(whole, [7]).read_bytes)) < most


def test_a_programs_own_images_are_no_data() -> None:
    source = sources.ImageSource("mine", ("a", "b"), None, None, lambda index: bytes([index]))
    assert not readers.is_data(source.read_bytes)
    assert not readers.is_data(chosen(source, [1]).read_bytes)
    assert chosen(source, [1]).read_bytes(0) == b"\1"


def test_contents_keep_the_reason_of_what_cannot_be_read() -> None:
    held = pickle.loads(pickle.dumps(readers.Contents((b"x", None, b"y"), ("", "the file is gone", "")).only([1, 2])))
    assert held(1) == b"y"
    with pytest.raises(UnreadableImage, match="the file is gone"):
        held(0)


def test_rows_of_no_row_group_can_be_none() -> None:
    assert readers.Rows([], np.empty((0, 2), np.int64)).only([])._groups == ()
