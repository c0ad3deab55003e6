"""Whole exports of models that a comparison of outputs judges badly: few outputs, heads of zeros, constants, NaN."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from references import randomize_
from safetensors.torch import load_file, save_file
from torch import Tensor

from convnext_deploy import api
from convnext_deploy.accuracy import probes
from convnext_deploy.artifact import verify
from convnext_deploy.artifact.deviation import relative_errors, sizes
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.data import preprocess
from convnext_deploy.errors import ParityError, WeightsError
from convnext_deploy.formats import torchscript
from convnext_deploy.models import checkpoint
from convnext_deploy.records.base import Precision, Task
from convnext_deploy.records.manifest import BatchRange

# Trained; the head is replaced, as for fine-tuning.
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist" / "model.safetensors"


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


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A model whose outputs are small beside what they are summed from, and its float32's distance from float64.

    The head looks where the features of the probe images are all alike, and a little where they differ.
    """
    folder = tmp_path_factory.mktemp("cancelling")
    size: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 12}
    state = randomize_(timm.models.convnext.ConvNeXt(**size)).state_dict()
    source = str(folder / "model.safetensors")
    save_file(state, source)
    features = beside_float64(source, "embed")[1]
    mean = features.mean(0)
    directions = np.linalg.svd(features - mean)[2]
    chance = np.random.default_rng(0)
    weight = (
        chance.standard_normal((12, 17)) @ directions[15:] + 0.015 * chance.standard_normal((12, 6)) @ directions[:6]
    )
    state["head.fc.weight"], state["head.fc.bias"] = (
        torch.from_numpy(weight).float(),
        torch.from_numpy(-weight @ mean).float(),
    )
    save_file(state, source)
    found, exact = beside_float64(source, "classify")
    return source, float(relative_errors(found, exact).max())


def beside_float64(source: str, task: Task) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    loaded = checkpoint.load(source, task=task, image_size=(64, 64))
    (probe,) = probes.of_source(loaded, False, None)
    (exact,) = probes.outputs(loaded, loaded.model.double(), probe.pixels)
    return probe.expected[0], exact


@pytest.mark.parametrize("share", [0.0, 1.9, 20.0])
def test_a_model_that_float32_computes_badly_is_judged_by_how_badly(
    share: float, cancelling: tuple[str, float], tmp_path: Path, replaced_format: Callable[..., None]
) -> None:
    """As built it passes; off by a little more than rounding can be, it does not. Outputs alone are asked."""
    source, rounding = cancelling
    assert 1e-5 < rounding < verify.LOOSEST_FP32 / 2

    def build(graph: Any, folder: Path) -> None:
        wrong = copy.deepcopy(graph.module)
        size = float(sizes(beside_float64(source, "classify")[1]).min())
        wrong.head.classifier.bias += share * rounding * size / math.sqrt(12)
        torchscript.build(dataclasses.replace(graph, module=wrong), folder)

    replaced_format("torchscript", build=build, read_back=None)
    options: dict[str, Any] = {"format": "torchscript", "image_size": (64, 64), "out": tmp_path / "artifact"}
    options["batch"] = BatchRange(min=1, opt=4, max=16)
    if share:
        with pytest.raises(ParityError, match=r"on bundled: relative error \S+ on sample \d+, above"):
            api.export(source, **options)
    else:
        (parity,) = api.export(source, **options).manifest.parity
        assert parity.source_rounding == pytest.approx(rounding)
        assert parity.relative_error is not None
        assert parity.relative_error > verify.TOLERANCES["fp32"].relative_error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_not_finite_are_not_called_a_bug(value: float, tmp_path: Path) -> None:
    weight = torch.randn(3, width())
    weight[1] = value
    with pytest.raises(WeightsError) as caught:
        exported(with_head(tmp_path, weight, torch.zeros(3)), tmp_path)
    assert "bug" not in str(caught.value)
