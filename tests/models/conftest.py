"""The small network whose checkpoints several files of tests write in their own ways."""

import pytest
import timm
from torch import Tensor, nn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_convnext2", num_classes=3)


@pytest.fixture(scope="module")
def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()
