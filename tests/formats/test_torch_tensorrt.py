"""Torch-TensorRT's precision is what can be read back, and no more; its engines need a GPU that few machines have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.artifact.verify import precision_failures
from convnext_deploy.records.manifest import PrecisionTruth
from convnext_deploy.runtimes.torch_engines import EnginesSession


def truth_of(call: Callable[[Tensor], Tensor], artifact: Artifact) -> PrecisionTruth:
    session = EnginesSession(call, artifact.manifest, RunOptions())
    session.bind(torch.zeros(1, 3, 64, 64).numpy())
    return session.precision()


def in_an_engine(images: Tensor) -> Tensor:
    """What PyTorch sees of a product inside an engine: its output."""
    return images.new_zeros(len(images), 10)


def beside_the_engine(type: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda images: images.mean((2, 3)).to(type) @ torch.ones(3, 10, dtype=type)


@pytest.mark.parametrize(
    ("call", "expected", "refusal"),
    [
        (in_an_engine, {}, "fp32 was asked for, but the built graph has unknown"),
        (beside_the_engine(torch.float16), {"fp16": 1.0}, "fp32 was asked for, but the built graph has 100% fp16"),
        (beside_the_engine(torch.float32), {"fp32": 1.0}, None),
    ],
)
def test_only_a_precision_that_was_read_back_is_delivered(
    call: Callable[[Tensor], Tensor], expected: dict[str, float], refusal: str | None, artifact_of: Any
) -> None:
    artifact = artifact_of("eager")
    truth = truth_of(call, artifact)
    assert truth.graph == expected
    failures = precision_failures(truth, artifact.manifest, typed_graph=True)
    assert [line[: len(refusal or "")] for line in failures] == ([] if refusal is None else [refusal])
