"""Whole segmenters of transformers, which ours are compared with."""

from collections.abc import Callable

import pytest
import torch

from convnext_deploy.errors import UsageError
from convnext_deploy.models import baseline_segmenters
from convnext_deploy.records.manifest import Manifest
from convnext_deploy.workflows import contenders


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("swin_tiny_patch4_window7_224", 60e6),  # arXiv:2103.14030, table 3
        ("swin_base_patch4_window7_224", 121e6),
        ("convnext_tiny", 60e6),  # arXiv:2201.03545, table 4
    ],
)
def test_a_segmenter_has_the_parameters_that_its_paper_says(name: str, published: float) -> None:
    """Without the second head of training, which has about a million."""
    with torch.device("meta"):
        made = baseline_segmenters.BaselineSegmenter(name, (512, 512))
    assert 0 < published - sum(parameter.numel() for parameter in made.parameters()) < 1.2e6


def test_what_has_no_segmenter_is_refused() -> None:
    with pytest.raises(UsageError, match="resnet50 has no UPerNet of transformers here"):
        baseline_segmenters.BaselineSegmenter("resnet50", (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_segmenter_on_a_swin_is_built_and_verified(
    runtime: str, monkeypatch: pytest.MonkeyPatch, swin_of: Callable[[str, str], Manifest]
) -> None:
    monkeypatch.setitem(baseline_segmenters.SWINS, "tiny", (16, (1, 1, 1, 1), (1, 2, 2, 2)))
    found = swin_of("segment", runtime)
    assert found.outputs[0].shape == ("batch", 150, 16, 24)
    assert found.parity[0].relative_error is not None
    assert found.parity[0].relative_error < 1e-5


def test_a_runtime_without_the_task_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "built", lambda wanted, say: list(wanted))
    monkeypatch.setattr(contenders, "installed_runtimes", lambda device: (["torch", "native", "onnx"], []))
    lines: list[str] = []
    (group,) = contenders.of_variants(["tiny"], ["swin"], [], ["fp32"], [(64, 64)], "segment", "cpu", lines.append)
    assert lines == ["native is left out: it does not take --task segment"]
    assert [f"{one.model} {one.runtime}" for one in group] == [
        "convnext_tiny torch", "convnext_tiny onnx",
        "swin_tiny_patch4_window7_224 torch", "swin_tiny_patch4_window7_224 onnx",
    ]  # fmt: skip
