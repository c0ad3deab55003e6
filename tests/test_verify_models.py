"""Whole exports of models that a comparison of outputs judges badly: few outputs, heads of zeros, constants, NaN."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.data import preprocess
from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange

# Trained; the head is replaced, as for fine-tuning.
TRAINED = Path(__file__).resolve().parent.parent / "examples" / "fashion-mnist" / "model.safetensors"


def with_head(folder: Path, weight: Tensor, bias: Tensor) -> str:
    state = load_file(TRAINED)
    state["head.fc.weight"], state["head.fc.bias"] = weight, bias
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def exported(source: str, folder: Path, precision: Precision = "fp32") -> Artifact:
    return api.export(
        source, format="eager", precision=precision, image_size=(64, 64), batch=BatchRange(min=1, opt=8, max=16),
        preprocessing={"mean": (0.286,), "std": (0.353,)}, out=folder / "artifact",
    )  # fmt: skip


def width() -> int:
    return load_file(TRAINED)["head.fc.weight"].shape[1]


@pytest.mark.parametrize(("outputs", "precision"), [(1, "fp16"), (1, "bf16"), (2, "bf16"), (10, "bf16")])
def test_a_trained_backbone_with_few_outputs_passes_in_half_precision(
    outputs: int, precision: Precision, tmp_path: Path
) -> None:
    """A head of random weights, whose bias puts the decision in the middle of the probe images."""
    weight = torch.randn(outputs, width(), generator=torch.Generator().manual_seed(1)) * 0.05
    made = exported(with_head(tmp_path, weight, -middle(weight)), tmp_path, precision)
    assert all(parity.failures == () for parity in made.manifest.parity)


def middle(weight: Tensor) -> Tensor:
    """The mean of the logits without a bias over the probe images."""
    loaded = checkpoint.load(str(TRAINED), task="embed", image_size=(64, 64))
    images = preprocess.as_input(preprocess.probe_images(1, (64, 64), 16), loaded.preprocessing, "float32")
    with torch.inference_mode():
        embedded = loaded.model(torch.from_numpy(images))
    return (embedded @ weight.t()).mean(0)


@pytest.mark.parametrize(("precision", "bias"), [("fp32", 0.0), ("bf16", 0.0), ("bf16", 0.3)])
def test_a_head_of_zeros_is_exported_as_what_it_is(bias: float, precision: Precision, tmp_path: Path) -> None:
    """Freshly attached: outputs are zero, or constant. Nothing is divided by zero."""
    made = exported(with_head(tmp_path, torch.zeros(3, width()), torch.full((3,), bias)), tmp_path, precision)
    for parity in made.manifest.parity:
        assert parity.failures == ()
        assert parity.relative_error is not None
        assert parity.relative_error < 4e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_not_finite_are_not_called_a_bug(value: float, tmp_path: Path) -> None:
    weight = torch.randn(3, width())
    weight[1] = value
    with pytest.raises(WeightsError) as caught:
        exported(with_head(tmp_path, weight, torch.zeros(3)), tmp_path)
    assert "bug" not in str(caught.value)
