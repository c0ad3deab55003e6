"""What `quantize` and `half` would write over: plans of this package, and nothing else."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from convnext_deploy import api
from convnext_deploy.errors import UsageError
from convnext_deploy.quantization import plan as plans
from convnext_deploy.records.plan import Plan
from convnext_deploy.workflows import quantize


def refusal(out: Path, force: bool = False) -> str:
    """What both commands say before any work: the data do not even exist."""
    said = []
    for command in (
        lambda: api.half("random", out=out, data="/nowhere", force=force),
        lambda: api.quantize("random", out=out, calibration="/nowhere", target="onnx", force=force),
    ):
        with pytest.raises(UsageError) as caught:
            command()
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_beside_the_plan_is_never_replaced(tmp_path: Path, force: bool) -> None:
    """A plan's tensors go to the name of the plan: `--out model.json` beside model.safetensors."""
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    assert refusal(tmp_path / "model.json", force).startswith(
        f"{tmp_path / 'model.safetensors'}, where the plan's tensors would go, is not of a plan"
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_is_no_plan_is_not_replaced_by_force(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    assert refusal(tmp_path / "package.json", force=True).endswith(
        "package.json is not a plan, so it is not replaced; choose another --out"
    )


def test_a_plan_and_its_own_tensors_are_replaced_by_force(tmp_path: Path) -> None:
    found = Plan(
        target="onnx", architecture="custom", input="float32", weights_sha256="0" * 64, image_size=(32, 32),
        rest="fp32", calibration=None, operations={},
    )  # fmt: skip
    written = plans.write(tmp_path / "a.json", found, {"x": torch.ones(2)})
    content = (tmp_path / "a.safetensors").read_bytes()
    assert written.tensors_sha256 == hashlib.sha256(content).hexdigest()
    plans.refuse_foreign(tmp_path / "a.json")
    (tmp_path / "a.safetensors").write_bytes(content + b" ")
    with pytest.raises(UsageError, match="is not of a plan"):
        plans.refuse_foreign(tmp_path / "a.json")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)  # root may write anywhere
    wanted = tmp_path / "plan.json"
    assert refusal(wanted) == f"{wanted} cannot be written: {tmp_path}: Permission denied; write elsewhere"


def test_a_folder_of_something_else_is_not_searched_in(tmp_path: Path) -> None:
    folder = tmp_path / "plan.search"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"plan\.search holds no search of `quantize`"):
        quantize._check_identity(folder, "facts")
    assert os.listdir(folder) == ["notes.txt"]
    quantize._check_identity(tmp_path / "new.search", "facts")
    quantize._check_identity(tmp_path / "new.search", "facts")
    with pytest.raises(UsageError, match="is of another search"):
        quantize._check_identity(tmp_path / "new.search", "others")
