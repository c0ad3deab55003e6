"""Whole detectors on timm's backbones, which ours are compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from convnext_deploy.errors import UsageError
from convnext_deploy.models import baseline_detectors, baselines, torchvision_detectors
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.records.manifest import Manifest, ModelSpec
from convnext_deploy.workflows import contenders


def created(name: str, image_size: tuple[int, int]) -> tuple[Any, ModelSpec]:
    return baselines._created(name, image_size, "detect")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_a_detector_has_the_parameters_that_its_paper_says(name: str) -> None:
    """48 million for both: arXiv:2103.14030 (its repository), arXiv:2201.03545."""
    with torch.device("meta"):
        backbone = timm.create_model(name, features_only=True)
        widths: Any = tuple(backbone.feature_info.channels())
        made, _ = baseline_detectors.created(name, backbone, widths, (800, 1280))
    assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(48e6, rel=0.01)


def test_both_backbones_have_the_same_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """So two rows of a benchmark differ in the backbone alone."""
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Identity())
    spec = torchvision_detectors.random_spec(
        ModelSpec(architecture="ours", depths=(1, 1, 1, 1), dims=(96, 192, 384, 768), num_classes=91, task="detect")
    )
    with torch.device("meta"):
        ours = ConvNeXt(spec)
        theirs, _ = baseline_detectors.created("swin", torch.nn.Identity(), (96, 192, 384, 768), (224, 224))
    assert ours.detector is not None
    assert isinstance(theirs.detector, torch.nn.Module)
    own, other = ours.detector.state_dict(), theirs.detector.state_dict()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in other.items()}


def test_an_artifact_is_not_compared_with_another_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def artifact(path: Path, *_: Any) -> Any:
        size: Any = {"model": "convnext_tiny", "runtime": "onnx", "precision": "fp32", "image_size": (64, 96)}
        return contenders.Contender(
            **size, task="detect", batch=contenders.BatchRange(), opener="", arguments={}, imports=(), artifact="made"
        )

    monkeypatch.setattr(contenders, "of_artifact", artifact)
    with pytest.raises(UsageError, match="made is a detector, whose counterpart would need the same pyramid"):
        contenders.of_artifacts([tmp_path], ["swin"], "cpu", False, lambda _: None)


@pytest.mark.slow
def test_a_detector_on_a_swin_is_built_and_verified(swin_of: Callable[[str, str], Manifest]) -> None:
    """For OpenVINO a smaller Swin, the segmenter's, and the detectors on a ConvNeXt show the same."""
    found = swin_of("detect", "onnx")
    assert [output.name for output in found.outputs] == ["boxes", "scores", "labels", "masks"]
    assert found.parity[0].top1_agreement == 1.0
    assert not found.parity[0].failures
