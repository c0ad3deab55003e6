"""What an attacker's artifact of each format can run: nothing, unless its format contains code and it is trusted.

SECURITY.md has the table that these tests derive.
"""

import contextlib
import io
import os
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from convnext_deploy import api, cli, formats
from convnext_deploy.artifact import manifest, private, trust
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import ArtifactError, UsageError

IMAGES = np.zeros((1, 3, 64, 64), np.float32)
RAN = "ran"  # the file that an attack makes in the folder that it is told


@pytest.fixture
def built(artifact_of: Callable[..., Artifact]) -> Callable[[str], Path]:
    """A format's artifact, built by this user."""
    return lambda format: artifact_of(format).path


def attacked(source: Path, folder: Path, name: str, content: bytes) -> Path:
    """An artifact with one other file, and a manifest that fits it: what an attacker would send."""
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    found = msgspec.structs.replace(manifest.read(folder).manifest, files=manifest.file_records(folder))
    (folder / "manifest.json").write_bytes(manifest.encode(found))
    manifest.verified(folder)
    return folder


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def evil_pt2(source: Path, ran: Path) -> bytes:
    """A program whose sample inputs are a pickle of the attacker's."""
    pickled = io.BytesIO()
    torch.save(Payload(ran), pickled)
    made = io.BytesIO()
    with zipfile.ZipFile(source / "model.pt2") as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled.getvalue() if "sample_inputs" in entry else old.read(entry))
    return made.getvalue()


def evil_aotinductor(source: Path, ran: Path) -> bytes:
    """A package whose library makes a file as soon as it is opened."""
    work = ran.parent
    (work / "evil.cpp").write_text(
        f'#include <sys/stat.h>\n__attribute__((constructor)) static void run() {{ mkdir("{ran}", 0700); }}\n'
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(work / "evil.cpp"), "-o", str(work / "evil.so")], check=True)
    made = io.BytesIO()
    with zipfile.ZipFile(source / "model.pt2") as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, (work / "evil.so").read_bytes() if entry.endswith(".so") else old.read(entry))
    return made.getvalue()


def evil_torchscript(source: Path, ran: Path) -> bytes:
    """A module that makes a file when it runs: TorchScript's operators read and write files."""

    class Evil(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :10] + torch.from_file(str(ran), shared=True, size=10)

    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Evil(), torch.from_numpy(IMAGES), check_trace=False), made)
    ran.unlink()  # tracing ran it
    return made.getvalue()


ATTACKS = {
    "pt2": ("model.pt2", evil_pt2), "aotinductor": ("model.pt2", evil_aotinductor),
    "torchscript": ("model.ts", evil_torchscript),
}  # fmt: skip


@pytest.fixture
def evil(built: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A format's attack: the artifact, and what is there once its code has run."""

    def one(format: str) -> tuple[Path, Path]:
        source, ran = built(format), tmp_path / RAN
        name, attack = ATTACKS[format]
        return attacked(source, tmp_path / "evil", name, attack(source, ran)), ran

    return one


@pytest.mark.parametrize("format", [pytest.param("aotinductor", marks=pytest.mark.slow), "pt2", "torchscript"])
def test_code_of_others_runs_only_when_it_is_trusted(format: str, evil: Callable[[str], tuple[Path, Path]]) -> None:
    artifact, ran = evil(format)
    with pytest.raises(ArtifactError, match=rf"format {format} runs code .*you did not build it here.*--trust"):
        api.load(artifact)
    assert not ran.exists()
    with contextlib.suppress(Exception):  # whatever the runtime says of what the attack left of the model
        api.load(artifact, trust=True).run(IMAGES)
    assert ran.exists()  # so the attack is a real one


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "EVIL", "--data", "IMAGES"],
        ["bench", "EVIL", "--batch", "1", "--seconds", "0.1"],
        ["profile", "EVIL"],
        ["gate", "--baseline", "EVIL", "--candidate", "EVIL", "--data", "IMAGES", "--max-drop", "1"],
        ["inspect", "EVIL"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_runs_code_of_others(
    command: list[str], evil: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    artifact, ran = evil("torchscript")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / name / "1.png")
    places = {"EVIL": str(artifact), "IMAGES": str(tmp_path / "images")}
    code = cli.run([places.get(word, word) for word in command])
    assert not ran.exists()
    if command[0] == "inspect":  # opens nothing
        assert code == 0
    else:
        assert code == 2
        assert "you did not build it here" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["torchscript", "pt2", "eager"])
def test_what_this_user_built_is_opened_without_a_word(format: str, built: Callable[[str], Path]) -> None:
    api.load(built(format)).run(IMAGES)


def test_a_copy_of_what_this_user_built_is_opened_too(built: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(built("torchscript"), tmp_path / "copy")
    api.load(tmp_path / "copy")


def test_an_onnx_model_reads_no_file_outside_its_folder(built: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights may be in other files, whose names stand in the model."""
    import onnx

    (tmp_path / "secret").write_bytes(b"\0" * 64)
    model = onnx.load(str(built("onnx") / "model.onnx"))
    for location in ("../secret", str(tmp_path / "secret")):
        tensor = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.FLOAT, dims=[4])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        changed.graph.initializer.append(tensor)
        changed.graph.node.append(onnx.helper.make_node("Identity", ["secret"], ["told"]))
        changed.graph.output.append(onnx.helper.make_tensor_value_info("told", onnx.TensorProto.FLOAT, [4]))
        folder = tmp_path / f"evil{len(location)}"
        attacked(built("onnx"), folder, "model.onnx", changed.SerializeToString())
        with pytest.raises(ArtifactError, match=f"its weights are in '{location}'; expected a file of its own folder"):
            api.load(folder)


def test_every_format_says_whether_it_holds_code() -> None:
    """A new format has to decide; those that hold data only are named here one by one."""
    data_only = {"eager", "onnx", "openvino", "native"}
    for name in formats.names():
        assert formats.get(name).runs_code == (name not in data_only), name


# The record ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "convnext-deploy"


def test_the_record_is_this_users_alone(state: Path) -> None:
    before = os.umask(0)
    try:
        assert trust.remember("a" * 64) is None
    finally:
        os.umask(before)
    assert state.stat().st_mode & 0o777 == 0o700
    assert trust.record_file().stat().st_mode & 0o777 == 0o600
    assert trust.built_here("a" * 64)
    assert not trust.built_here("b" * 64)


def test_a_record_that_others_can_write_is_not_believed(state: Path) -> None:
    trust.remember("a" * 64)
    state.chmod(0o777)
    with pytest.raises(UsageError, match=r"others may write to .*remove the folder"):
        trust.built_here("a" * 64)
    state.chmod(0o700)
    for mode in (0o602, 0o620):  # by anybody; by the group
        trust.record_file().chmod(mode)
        with pytest.raises(UsageError, match="can be written by others"):
            trust.built_here("a" * 64)
    trust.record_file().chmod(0o655)  # they may read it
    assert trust.built_here("a" * 64)


def test_the_record_is_closed_again(state: Path) -> None:
    trust.remember("a" * 64)
    before = os.listdir("/dev/fd")
    trust.remember("b" * 64)
    trust.built_here("b" * 64)
    assert os.listdir("/dev/fd") == before


def test_a_record_that_is_a_link_is_not_believed(state: Path, tmp_path: Path) -> None:
    trust.remember("b" * 64)
    (tmp_path / "theirs").write_text("a" * 64 + "\n")
    trust.record_file().unlink()
    trust.record_file().symlink_to(tmp_path / "theirs")
    assert not trust.built_here("a" * 64)


def test_an_export_that_cannot_be_recorded_says_that_it_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, replaced_format: Callable[..., None]
) -> None:
    replaced_format("eager", runs_code=True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    said: list[str] = []
    made = api.export(str(checkpoint), format="eager", out=tmp_path / "m", image_size=(64, 64), say=said.append)
    assert said[-1].startswith("not recorded as built by you, so that opening it needs --trust: ")
    with pytest.raises(ArtifactError, match="--trust"):
        api.load(made.path)
    api.load(made.path, trust=True)


# Folders -------------------------------------------------------------------------------------------------------------


def test_without_a_home_the_folders_are_temporary_and_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / f"convnext-deploy-{os.getuid()}"
    assert private.cache_root().parent == private.state_root().parent == mine
    assert private.made(private.cache_root()).stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)  # as if somebody had made it before
    with pytest.raises(UsageError, match="others may write"):
        private.made(private.cache_root())


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private.made(tmp_path / "mine")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UsageError, match="belongs to user"):
        private.checked(folder)


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    private.made(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UsageError, match="is not a folder"):
        private.checked(tmp_path / "link")
