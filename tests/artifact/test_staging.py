"""How a target is replaced: in one step, and what killed processes have left beside it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from artifact_files import FILES, contents, fill

from convnext_deploy.artifact import manifest, staging
from convnext_deploy.artifact.manifest import MANIFEST_NAME, check_target, not_ours, staged, verified, write_file
from convnext_deploy.errors import UsageError

LEFT = ".artifact.abcd1234.part"


def exchanges(folder: Path) -> bool:
    """Whether the system and the file system here can exchange two names."""
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    try:
        return staging.exchange(folder / "one", folder / "two")
    finally:
        (folder / "one").rmdir()
        (folder / "two").rmdir()


def made(target: Path) -> Path:
    target.mkdir()
    fill(target)
    return target


# Replacing -----------------------------------------------------------------------------------------------------------


def test_a_reader_finds_an_artifact_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    if not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    target = made(tmp_path / "artifact")
    done = threading.Event()

    def replaced() -> None:
        try:
            for number in range(60):
                with staged(target) as folder:
                    fill(folder, {"model.onnx": b"%d" % number, f"data/{number}": b"x" * number})
        finally:
            done.set()

    writer = threading.Thread(target=replaced)
    writer.start()
    reads = 0
    while not done.is_set():
        assert verified(target).manifest.files  # one whole artifact, the old or the new
        reads += 1
    writer.join()
    assert reads > 10
    assert os.listdir(tmp_path) == ["artifact"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_replaced_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    target = made(tmp_path / "artifact")
    with staged(target) as folder:
        fill(folder, {"model.new": b"new"})
    assert contents(target).keys() == {"model.new", MANIFEST_NAME}
    assert os.listdir(tmp_path) == ["artifact"]


# What is in the way --------------------------------------------------------------------------------------------------


def test_a_folder_with_a_manifest_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    """A web extension has a manifest.json too."""
    target = tmp_path / "extension"
    target.mkdir()
    (target / MANIFEST_NAME).write_text(json.dumps({"manifest_version": 3, "name": "mine"}))
    (target / "background.js").write_text("mine")
    before = contents(target)
    with pytest.raises(UsageError, match=r"is no artifact of this version .*--force replaces artifacts only"):
        check_target(target, force=True)
    with pytest.raises(UsageError, match="so it was not replaced"), staged(target) as folder:
        fill(folder)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["extension"]


@pytest.mark.parametrize("name", ["notes.txt", "data/notes.txt", "more/notes.txt", ".hidden"])
def test_an_artifact_with_something_else_inside_is_never_replaced(tmp_path: Path, name: str) -> None:
    target = made(tmp_path / "artifact")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    with pytest.raises(UsageError) as caught:
        check_target(target, force=True)
    first = target / (Path(name).parts[0] if name.startswith("more") else name)
    assert str(caught.value).startswith(f"{first} is not a file of the manifest; --force")
    with pytest.raises(UsageError, match="was not removed"):
        manifest.remove(target)
    assert (target / name).read_text() == "mine"


def test_a_link_is_never_replaced(tmp_path: Path) -> None:
    made(tmp_path / "real")
    (tmp_path / "artifact").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("artifact", "dangling"):
        with pytest.raises(UsageError, match="is a symbolic link"):
            check_target(tmp_path / name, force=True)
    with pytest.raises(UsageError, match="exists"):
        check_target(tmp_path / "dangling", force=False)


def test_a_damaged_artifact_is_replaced(tmp_path: Path) -> None:
    target = made(tmp_path / "artifact")
    (target / "model.onnx").write_bytes(b"changed")
    (target / "empty").unlink()
    check_target(target, force=True)
    assert not_ours(target) is None


def test_what_came_to_the_target_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "artifact"

    def overtaken() -> None:
        with staged(target) as folder:
            fill(folder)
            target.mkdir()
            (target / "thesis.tex").write_text("mine")

    with pytest.raises(UsageError, match="so it was not replaced"):
        overtaken()
    assert contents(target) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("force", [True, False])
def test_a_name_that_is_not_utf_8_is_refused_in_one_line(tmp_path: Path, force: bool) -> None:
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UsageError, match="is not a name in UTF-8"):
        check_target(name, force)
    with pytest.raises(UsageError, match="is not a name in UTF-8"):
        manifest.read(name)


# What is left over ---------------------------------------------------------------------------------------------------


def test_what_a_killed_export_left_is_removed_by_the_next_which_says_so(tmp_path: Path) -> None:
    target = made(tmp_path / "artifact")
    code = (
        "import os, signal, sys; from pathlib import Path; from convnext_deploy.artifact.manifest import staged\n"
        "with staged(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.onnx').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
        assert killed.returncode == -signal.SIGKILL
    left = [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    assert len(left) == 1  # the second removed what the first had left
    verified(target)
    said: list[str] = []
    with staged(target, said.append) as folder:
        fill(folder)
    assert said == [f"removed what an interrupted export had left: {left[0]}"]
    assert os.listdir(tmp_path) == ["artifact"]


def test_what_a_running_export_works_on_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    said: list[str] = []
    with staged(target) as first:
        fill(first)
        with staged(target, said.append) as second:
            fill(second, {"model.new": b"new"})
        assert contents(first).keys() == {*FILES, MANIFEST_NAME}
    assert said == []
    assert contents(target).keys() == {*FILES, MANIFEST_NAME}
    assert os.listdir(tmp_path) == ["artifact"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(".other.abcd1234.part", id="another target's"),
        pytest.param(".artifact.abcd1234.partial", id="another ending"),
        pytest.param(".artifact.part", id="no random part"),
        pytest.param("artifact.abcd1234.part", id="not hidden"),
        pytest.param(".artifact.ABCD1234.part", id="letters that are never chosen"),
    ],
)
def test_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with staged(tmp_path / "artifact") as folder:
        fill(folder)
    assert sorted(os.listdir(tmp_path)) == sorted(["artifact", name])


def test_a_link_of_a_temporary_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / LEFT).symlink_to("mine")
    with staged(tmp_path / "artifact") as folder:
        fill(folder)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"


def test_an_artifact_that_was_moved_aside_and_never_replaced_comes_back(tmp_path: Path) -> None:
    """A process that was killed between the two renames."""
    aside = tmp_path / ".artifact.abcd1234.old"
    aside.mkdir()
    made(aside / "artifact")

    def interrupted() -> None:
        with staged(tmp_path / "artifact"):
            verified(tmp_path / "artifact")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    verified(tmp_path / "artifact")
    assert os.listdir(tmp_path) == ["artifact"]


def test_write_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".result.json.abcd1234.part").write_bytes(b"half")
    write_file(tmp_path / "result.json", b"whole")
    assert contents(tmp_path) == {"result.json": b"whole"}


# What an opened folder may contain -----------------------------------------------------------------------------------


def refusal(target: Path) -> str:
    from convnext_deploy.errors import ArtifactError

    with pytest.raises(ArtifactError) as caught:
        verified(target)
    return str(caught.value)


@pytest.mark.parametrize("name", ["extra", "data/extra", ".extra"])
def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path, name: str) -> None:
    target = made(tmp_path / "artifact")
    (target / name).write_bytes(b"x")
    assert refusal(target).startswith(f"{target / name} is not a file of the manifest")


@pytest.mark.parametrize("name", ["model.onnx", "data", MANIFEST_NAME])
def test_a_link_in_an_artifact_is_refused(tmp_path: Path, name: str) -> None:
    target = made(tmp_path / "artifact")
    (target / name).rename(tmp_path / "moved")
    (target / name).symlink_to(tmp_path / "moved")
    assert "is a symbolic link" in refusal(target)


@pytest.mark.parametrize("kept", [(), ("data/weights.bin",)])
def test_a_manifest_without_the_main_file_is_refused(tmp_path: Path, kept: tuple[str, ...]) -> None:
    target = made(tmp_path / "artifact")
    found = manifest.read(target).manifest
    records = tuple(record for record in found.files if record.path in kept)
    (target / MANIFEST_NAME).write_bytes(manifest.encode(msgspec.structs.replace(found, files=records)))
    assert "and no model.*, which every artifact has" in refusal(target)


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    target = made(tmp_path / "artifact")
    (target / "model.onnx").unlink()
    os.mkfifo(target / "model.onnx")
    assert "model.onnx is missing" in refusal(target)
    (target / MANIFEST_NAME).unlink()
    os.mkfifo(target / MANIFEST_NAME)
    assert "manifest.json cannot be read: it is not a file" in refusal(target)
