"""A disk that fills up while an artifact is written: one line, whoever writes. /dev/full is the reference."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convnext_deploy import api
from convnext_deploy.artifact import manifest
from convnext_deploy.errors import BuildError, UsageError, full_disk
from convnext_deploy.formats import torchscript
from convnext_deploy.runtimes import torch_files
from convnext_deploy.runtimes.torch_files import written

SAVE = """
import sys, warnings
from pathlib import Path
import torch
from convnext_deploy.runtimes.torch_files import written
warnings.simplefilter("ignore")
model, images = torch.nn.Linear(400, 400), torch.zeros(2, 400)
try:
    with written(Path("/dev/full")) as file:
        torch.export.save(torch.export.export(model, (images,)), file)
except OSError as error:
    print(error.errno)
"""
# A limit on the size of files stands in for a disk that has less room than a file needs.
SCRIPT = """
import resource, sys, warnings
from convnext_deploy import api
warnings.simplefilter("ignore")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    api.export("random", variant="test_convnext", format="torchscript", image_size=(64, 64), out=sys.argv[1])
except OSError as error:
    print(error.errno)
"""

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full
@pytest.mark.slow
def test_pytorch_s_writer_does_not_abort_the_process_on_a_full_disk() -> None:
    done = subprocess.run([sys.executable, "-c", SAVE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{errno.ENOSPC}\n"), done.stderr[-500:]


@pytest.mark.slow
def test_torchscript_s_writer_does_not_abort_the_process_where_a_file_cannot_be_as_long(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "artifact")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr[-500:]
    assert list(tmp_path.iterdir()) == []


def fills_up(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@full
@pytest.mark.parametrize(
    ("format", "name", "stand_in"),
    [
        ("torchscript", "reserve", fills_up),
        ("pt2", "written", lambda path: written(Path("/dev/full"))),
    ],
)
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    format: str, name: str, stand_in: Callable[..., Any], checkpoint_of: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch_files, name, stand_in)
    target = tmp_path / "artifact"
    with pytest.raises(UsageError, match=f"^{tmp_path} is full; make room, or choose another --out$"):
        api.export(str(checkpoint_of()), format=format, image_size=(64, 64), out=target)
    assert list(tmp_path.iterdir()) == []


def test_a_torchscript_file_fits_in_what_was_reserved_for_it(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(torch_files, "reserve", lambda path, size: sizes.append(size))
    target = tmp_path / "artifact"
    api.export(str(checkpoint_of()), format="torchscript", image_size=(64, 64), out=target)
    assert sizes[0] - torchscript.BESIDE_TENSORS < (target / "model.ts").stat().st_size < sizes[0]


@full
def test_numpy_s_short_write_is_called_a_full_disk(tmp_path: Path) -> None:
    """What onnx_ir writes external weights with: an OSError without a number."""
    with (
        pytest.raises(UsageError, match="is full; make room"),
        manifest.staged(tmp_path / "artifact"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        np.zeros(1 << 20, np.float32).tofile(file)
    assert list(tmp_path.iterdir()) == []


def test_numpy_s_short_write_of_a_single_file_names_the_folder_whose_disk_is_full(tmp_path: Path) -> None:
    def fill() -> None:
        with manifest.writing(tmp_path / "result.npz") as file:
            file.write(b"a part")
            raise OSError("1048576 requested and 1 written")  # as `tofile` says it

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        fill()
    assert full_disk(caught.value) == f"{tmp_path} is full; make room, or write elsewhere"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_behind_another_error_is_found(tmp_path: Path, number: int) -> None:
    error = BuildError("the converter failed")
    error.__cause__ = OSError(number, os.strerror(number))
    with pytest.raises(UsageError, match="is full; make room"), manifest.staged(tmp_path / "artifact"):
        raise error


@pytest.mark.parametrize(
    "said",
    [
        "the converter failed",
        "2 outputs were requested and 3 given",  # what only resembles NumPy's words
        "12 requested and 7 were written",
    ],
)
def test_another_error_is_not_called_a_full_disk(tmp_path: Path, said: str) -> None:
    with pytest.raises(BuildError, match=said), manifest.staged(tmp_path / "artifact"):
        raise BuildError(said)
