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
from convnext_deploy.errors import BuildError, UsageError
from convnext_deploy.formats import pt2, torchscript
from convnext_deploy.runtimes.torch_files import written

SAVE = """
import sys, warnings
from pathlib import Path
import torch
from convnext_deploy.runtimes.torch_files import written
warnings.simplefilter("ignore")
model, images = torch.nn.Linear(400, 400), torch.zeros(2, 400)
kinds = {
    "torchscript": lambda file: torch.jit.save(torch.jit.trace(model, images), file),
    "pt2": lambda file: torch.export.save(torch.export.export(model, (images,)), file),
}
try:
    with written(Path("/dev/full")) as file:
        kinds[sys.argv[1]](file)
except OSError as error:
    print(error.errno)
"""

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
def test_pytorch_s_writer_does_not_abort_the_process_on_a_full_disk(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAVE, kind], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{errno.ENOSPC}\n"), done.stderr[-500:]


@full
@pytest.mark.parametrize(("format", "module"), [("torchscript", torchscript), ("pt2", pt2)])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(
    format: str, module: Any, checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "written", lambda path: written(Path("/dev/full")))
    target = tmp_path / "artifact"
    with pytest.raises(UsageError, match=f"^{tmp_path} is full; make room, or choose another --out$"):
        api.export(str(checkpoint_of()), format=format, image_size=(64, 64), out=target)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_behind_another_error_is_found(tmp_path: Path, number: int) -> None:
    error = BuildError("the converter failed")
    error.__cause__ = OSError(number, os.strerror(number))
    with pytest.raises(UsageError, match="is full; make room"), manifest.staged(tmp_path / "artifact"):
        raise error


def test_another_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="converter"), manifest.staged(tmp_path / "artifact"):
        raise BuildError("the converter failed")
