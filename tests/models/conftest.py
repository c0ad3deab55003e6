"""The small network whose checkpoints several files of tests write in their own ways; whole models on timm's Swin."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from convnext_deploy.artifact import manifest
from convnext_deploy.records.manifest import Manifest
from convnext_deploy.workflows import caches, counterparts


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose minutes where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_convnext2", num_classes=3)


@pytest.fixture(scope="module")
def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


@pytest.fixture
def swin_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_format: Callable[[str], None]
) -> Callable[[str, str], Manifest]:
    """(task, runtime) to the record of a Swin-T with 64x96 pixels that was built and verified."""

    def build(task: str, runtime: str) -> Manifest:
        need_format(runtime)
        monkeypatch.chdir(tmp_path)
        given: Any = {"model": "swin_tiny_patch4_window7_224", "runtime": runtime, "precision": "fp32", "device": "cpu"}
        counterparts.build_baseline({**given, "task": task, "image_size": [64, 96]})
        (folder,) = Path(caches.BENCH).iterdir()
        return manifest.decode((folder / caches.BASELINE_NAME).read_bytes(), str(folder))

    return build
