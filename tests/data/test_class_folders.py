"""Folders and tar files as users have them: odd names, links, pipes, hidden and empty folders; against ImageFolder."""

import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder

from convnext_deploy.data import numbering, readers, sources
from convnext_deploy.errors import DataError, UsageError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path)


def imagefolder(root: Path) -> dict[str, int]:
    return {str(Path(path).relative_to(root)): label for path, label in ImageFolder(str(root)).samples}


def found(source: sources.ImageSource) -> dict[str, int]:
    assert source.labels is not None
    return dict(zip(source.names, source.labels.tolist(), strict=True))


def test_numbers_as_names_are_sorted_as_text_as_torchvision_does_and_that_is_said(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / str(number) / "a.png")
    source = sources.open_source(str(tmp_path))
    assert found(source) == imagefolder(tmp_path)
    assert source.class_names == ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    assert source.notes == ()  # where the model's labels decide, there is nothing to say
    note = numbering.numbered(source, 12, None).notes[-1]
    assert note.startswith("the order is torchvision's: '10' is 2 and '2' is 4; timm numbers them the other way")
    assert "--class-order timm" in note


def test_classes_are_numbered_as_timms_reader_numbers_them_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("0", "2", "10", "b1", "B10", "b2", "img"):
        picture(tmp_path / name / "deep" / f"{name}x.png")
        picture(tmp_path / name / "a.png")
    (tmp_path / "9").mkdir()  # without an image timm gives it no number
    images, classes = find_images_and_targets(str(tmp_path))
    source = sources.open_source(str(tmp_path), class_order="timm")
    assert found(source) == {str(Path(path).relative_to(tmp_path)): label for path, label in images}
    assert source.class_names == tuple(classes)
    flat = tmp_path / "flat"
    for name in ("0", "2", "10"):
        picture(flat / name / "a.png")
    source = sources.open_source(str(flat), class_order="timm")
    assert source.class_names == tuple(find_images_and_targets(str(flat))[1]) == ("0", "2", "10")
    assert "the order is timm's: '10' is 2 and '2' is 1" in numbering.numbered(source, 3, None).notes[-1]


def test_tar_members_too_are_numbered_as_timm_does_and_names_equal_to_it_are_refused(tmp_path: Path) -> None:
    for name in ("2", "10"):
        picture(tmp_path / "set" / name / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    assert sources.open_source(str(tmp_path / "a.tar"), class_order="timm").class_names == ("2", "10")
    picture(tmp_path / "set" / "02" / "a.png")
    with pytest.raises(DataError, match="classes '02' and '2' are equal in timm's order"):
        sources.open_source(str(tmp_path / "set"), class_order="timm")


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".ppm", ".tif", ".JPEG"])
def test_every_suffix_of_torchvision_is_read(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / "ant" / f"a{suffix}")
    picture(tmp_path / "bee" / "b.png")
    source = sources.open_source(str(tmp_path))
    assert found(source) == imagefolder(tmp_path)
    assert source.read(0).size == (8, 8)


def test_a_class_folder_without_files_keeps_its_number_and_is_named(tmp_path: Path) -> None:
    for name in ("bee", "cat"):
        picture(tmp_path / name / "a.png")
    (tmp_path / "ant").mkdir()
    source = sources.open_source(str(tmp_path))
    assert source.class_names == ("ant", "bee", "cat")
    assert found(source) == {"bee/a.png": 1, "cat/a.png": 2}
    assert "nothing in the class folders ant; they keep their numbers" in source.notes


def test_a_class_whose_files_are_all_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("bee", "cat"):
        picture(tmp_path / "val" / name / "a.png")
    (tmp_path / "val" / "ant").mkdir()
    (tmp_path / "val" / "ant" / "a.heic").write_bytes(b"x")
    (tmp_path / "val" / "readme.txt").write_text("of no class")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "val", "val")
    for data in (tmp_path / "val", tmp_path / "a.tar"):
        with pytest.raises(DataError, match=r"class folder ant of .* has 1 file and not one image that is read"):
            sources.open_source(str(data))


def test_images_in_deeper_folders_belong_to_the_class_folder_as_in_torchvision(tmp_path: Path) -> None:
    for name in ("ant", "bee"):  # Tiny ImageNet's layout
        picture(tmp_path / name / "images" / "a.png")
    source = sources.open_source(str(tmp_path))
    assert found(source) == imagefolder(tmp_path) == {"ant/images/a.png": 0, "bee/images/a.png": 1}


def test_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/a.png", "ant/._a.png", "ant/a.png", "bee/.git/b.png"):
        picture(tmp_path / name)
    with tarfile.open(tmp_path / "same.tar", "w") as tar:
        tar.add(tmp_path / "ant", "./ant")
        tar.add(tmp_path / ".ipynb_checkpoints", "./.ipynb_checkpoints")
    (tmp_path / "folder").mkdir()
    assert found(sources.open_source(str(tmp_path / "same.tar"))) == {"ant/a.png": 0}
    os.remove(tmp_path / "same.tar")
    os.rmdir(tmp_path / "folder")
    source = sources.open_source(str(tmp_path))
    assert (source.class_names, source.names) == (("ant", "bee"), ("ant/a.png",))
    assert "left out: 3 hidden files and folders" in source.notes


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"])
def test_what_a_system_keeps_beside_images_is_no_class_and_no_image(name: str, tmp_path: Path) -> None:
    for path in ("ant/a.png", "bee/b.png", f"{name}/a.png", f"ant/{name}/a.png/thumbnail.jpg"):
        picture(tmp_path / path)
    source = sources.open_source(str(tmp_path))
    assert (source.class_names, source.names) == (("ant", "bee"), ("ant/a.png", "bee/b.png"))
    assert source.notes == ("left out: 2 hidden files and folders",)


def test_splits_without_classes_are_not_taken_for_classes(tmp_path: Path) -> None:
    for path in ("train/a.png", "Val/b.png", ".cache/c.png"):
        picture(tmp_path / path)
    with pytest.raises(DataError, match="has images in Val, train, which are names of splits and no classes"):
        sources.open_source(str(tmp_path))
    picture(tmp_path / "ant/a.png")  # a class may be called so where another is not
    assert sources.open_source(str(tmp_path)).class_names == ("Val", "ant", "train")


def test_splits_in_the_only_folder_are_not_taken_for_one_class(tmp_path: Path) -> None:
    for path in ("images/train/ant/a.png", "images/val/ant/b.png", "__MACOSX/images/c.png"):
        picture(tmp_path / path)
    with pytest.raises(DataError, match=r"has one folder, images, with the splits train, val; give .*/images$"):
        sources.open_source(str(tmp_path))
    assert found(sources.open_source(str(tmp_path / "images"), "val")) == {"ant/b.png": 0}


def test_a_tar_of_several_splits_is_refused(tmp_path: Path) -> None:
    for path in ("set/train/ant/a.png", "set/val/ant/b.png"):
        picture(tmp_path / path)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    with pytest.raises(DataError, match="has images of the splits train, val; make a tar of one of them"):
        sources.open_source(str(tmp_path / "set.tar"))


def test_the_metadata_of_hugging_face_goes_before_the_folders_that_its_images_are_in(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nimages/a.png,dog\nimages/b.png,cat\n")
    source = sources.open_source(str(tmp_path))
    assert (found(source), source.class_names) == ({"images/a.png": 1, "images/b.png": 0}, ("cat", "dog"))


def test_one_thing_that_is_left_out_is_said_as_one(tmp_path: Path) -> None:
    for name in ("ant/a.png", "ant/.b.png", "store/c.png"):
        picture(tmp_path / name)
    (tmp_path / "ant" / "notes.txt").write_text("")
    (tmp_path / "ant" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "ant" / "round").symlink_to(tmp_path / "store")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    notes = sources.open_source(str(tmp_path)).notes
    for said in ("hidden file or folder", "file of another kind", "device, socket or named pipe"):
        assert f"left out: 1 {said}" in notes


@pytest.mark.parametrize("target", ["..", ".", "../..", "ant", "/"])
def test_a_link_that_leads_back_is_not_followed(tmp_path: Path, target: str) -> None:
    root = tmp_path / "set"
    picture(root / "ant" / "a.png")
    picture(root / "bee" / "b.png")
    (root / "bee" / "up").symlink_to(target)
    source = sources.open_source(str(root))
    assert (source.names, source.class_names) == (("ant/a.png", "bee/b.png"), ("ant", "bee"))
    assert any("link to a folder that is read already" in note for note in source.notes) or target == "ant"
    (root / "cat").symlink_to(target)
    why = "cat of .* are one folder" if target == "ant" else "cat of .* is a link to .*, which contains all classes"
    with pytest.raises(DataError, match=f"the class folders? .*{why}.* two.*; remove the link, or give a list"):
        sources.open_source(str(root))


def test_a_class_folder_with_two_names_is_refused_by_both(tmp_path: Path) -> None:
    """ImageFolder reads it twice, and without one of them the other classes would have other numbers."""
    for name in ("ant/a.png", "bee/b.png"):
        picture(tmp_path / "set" / name)
    picture(tmp_path / "store" / "c" / "c.png")
    alias = tmp_path / "set" / "alias"
    for target, other in (("ant", "ant"), ("bee/../ant", "ant"), (tmp_path / "set/bee", "bee")):
        alias.symlink_to(target)
        assert len(imagefolder(tmp_path / "set")) == 3
        with pytest.raises(DataError, match=rf"the class folders {other} and alias of .* are one folder"):
            sources.open_source(str(tmp_path / "set"))
        alias.unlink()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store" / "c")
    assert found(sources.open_source(str(tmp_path / "set"))) == {"ant/a.png": 0, "bee/b.png": 1, "cat/c.png": 2}
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "store")
    with pytest.raises(DataError, match=r"the class folders cat and dog of .* are one folder"):
        sources.open_source(str(tmp_path / "set"))
    (tmp_path / "set" / "dog").unlink()
    picture(tmp_path / "set" / ".store" / "d" / "d.png")
    (tmp_path / "set" / "dog").symlink_to(".store/d")
    with pytest.raises(DataError, match=r"the class folder dog of .* is a link to .*/d, which is hidden in .*; move"):
        sources.open_source(str(tmp_path / "set"))


def test_images_without_classes_may_have_links_beside_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "all").symlink_to(".")
    assert sources.open_source(str(tmp_path)).names == ("a.png",)


def test_a_file_with_two_names_has_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "a.png")
    (tmp_path / "ant" / "b.png").symlink_to("a.png")
    note = "counted twice: 1 image by links between files, such as ant/a.png and ant/b.png"
    assert note in sources.open_source(str(tmp_path)).notes
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "c.png").symlink_to("../ant/a.png")
    with pytest.raises(DataError, match=r"ant/a.png and bee/c.png of .* are one file and have different labels"):
        sources.open_source(str(tmp_path))
    (tmp_path / "bee" / "c.png").unlink()
    os.link(tmp_path / "ant" / "a.png", tmp_path / "bee" / "c.png")
    note = "of two labels: 1 image by links between files, such as ant/a.png and bee/c.png"
    assert note in sources.open_source(str(tmp_path)).notes


def test_links_to_one_copy_elsewhere_are_said_as_the_cache_of_hugging_faces_hub_has_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "blobs" / "1f", "PNG")
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / f"{name}.png").symlink_to(tmp_path / "blobs" / "1f")
    source = sources.open_source(str(tmp_path / "set"))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    assert "of two labels: 1 image by links between files, such as ant/ant.png and bee/bee.png" in source.notes


def test_a_folder_elsewhere_is_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "set"
    picture(tmp_path / "store" / "ants" / "a.png")
    picture(root / "bee" / "b.png")
    (tmp_path / "store" / "ants" / "round").symlink_to(tmp_path / "store")
    (root / "ant").symlink_to(tmp_path / "store" / "ants")
    source = sources.open_source(str(root))
    assert found(source) == {"ant/a.png": 0, "bee/b.png": 1}
    assert "left out: 1 link to a folder that is read already" in source.notes
    (root / "cat").symlink_to(tmp_path / "store" / "ants")
    with pytest.raises(DataError, match=r"the class folders ant and cat of .* are one folder"):
        sources.open_source(str(root))


def test_a_root_that_is_a_link_and_links_to_files_are_followed(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "a.png")
    (tmp_path / "set" / "ant").mkdir(parents=True)
    (tmp_path / "set" / "ant" / "a.png").symlink_to(tmp_path / "store" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    source = sources.open_source(str(tmp_path / "link"))
    assert source.names == ("ant/a.png",)
    assert source.read(0).size == (8, 8)


def test_a_named_pipe_does_not_hang_and_a_looping_link_is_one_image_that_cannot_be_read(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "a.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    (tmp_path / "ant" / "pipe2.png").symlink_to("pipe.png")
    (tmp_path / "ant" / "loop.png").symlink_to("loop.png")
    source = sources.open_source(str(tmp_path))
    assert source.names == ("ant/a.png", "ant/loop.png")
    assert "left out: 2 devices, sockets and named pipes" in source.notes
    with pytest.raises(OSError, match="cannot be opened: Too many levels of symbolic links"):
        source.read(1)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "ant" / "a.png")
    picture(tmp_path / "bee" / "b.png")
    real = os.scandir

    def scandir(path: Path) -> object:  # a test may run as root, whom no permission stops
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"bee in .* cannot be listed: Permission denied"):
        sources.open_source(str(tmp_path))


def test_a_file_of_an_absurd_size_is_an_unreadable_image_and_is_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "a.png")
    with (tmp_path / "ant" / "b.png").open("wb") as file:
        file.truncate(2**40)  # a hole: nothing is on the disk
    source = sources.open_source(str(tmp_path))
    with pytest.raises(OSError, match=f"1,099,511,627,776 bytes; at most {readers.MAX_FILE_BYTES:,} are read"):
        source.read(1)


def test_a_member_larger_than_its_tar_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("ant/a.png")
    member.size = 2**40
    (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(DataError, match="cannot be read as uncompressed tar"):
        sources.open_source(str(tmp_path / "a.tar"))
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(2**40 + 4096)
    source = sources.open_source(str(tmp_path / "a.tar"))
    with pytest.raises(OSError, match="1,099,511,627,776 bytes; at most"):
        source.read(0)


def test_a_number_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for digit in "12":
            tar.addfile(tarfile.TarInfo(f"{digit * 5000}/a.png"))
    assert len(sources.open_source(str(tmp_path / "a.tar"))) == 2


def test_a_model_with_one_output_has_no_top_1_whatever_the_classes_are(tmp_path: Path) -> None:
    """`eval`, `gate` and a search ask for the model's numbers of the classes first."""
    for names in (("ant",), ("ant", "bee")):
        picture(tmp_path / names[-1] / "a.png")
        source = sources.open_source(str(tmp_path))
        for given in (None, dict(zip(names, range(2), strict=False))):
            with pytest.raises(UsageError, match=r"the model has one output, .* would be 100 % whatever it computes"):
                numbering.numbered(source, 1, labels=None, given=given)
