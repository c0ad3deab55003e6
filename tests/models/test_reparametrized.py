"""Weights that are stored in parts: what PyTorch computes from them is what is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from references import DEPTHS, DIMS, TOLERANCE, images, randomize_, relative_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from convnext_deploy.errors import WeightsError
from convnext_deploy.models import checkpoint


def small() -> Any:
    model = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, num_classes=7, conv_mlp=False)
    return randomize_(model)


def each(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def changed(model: nn.Module) -> None:
        for module in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
            change(module)

    return changed


def old_norm(norm: str) -> Callable[[nn.Module], None]:
    def changed(model: Any) -> None:
        getattr(nn.utils, norm)(model.head.fc)
        model.train()(images())  # which computes the weight
        model.eval()

    return changed


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")  # what older checkpoints are made with
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (each(lambda m: prune.random_unstructured(m, "weight", 0.3)), "pruned"),
        (each(lambda m: prune.random_unstructured(m, "bias", 0.3)), "pruned"),
        (each(parametrizations.weight_norm), "weight norm"),
        (each(lambda m: parametrizations.weight_norm(m, dim=None)), "weight norm"),  # type: ignore[arg-type]
        (each(lambda m: parametrizations.weight_norm(m, dim=1)), "weight norm"),
        (old_norm("weight_norm"), "weight norm"),
        (each(parametrizations.spectral_norm), "spectral norm"),
        (old_norm("spectral_norm"), "spectral norm"),
    ],
    ids=[
        "pruned",
        "pruned bias",
        "weight norm",
        "one length",
        "columns",
        "old weight norm",
        "spectral",
        "old spectral",
    ],
)
def test_a_weight_in_parts_is_what_pytorch_computes(
    change: Callable[[nn.Module], None], words: str, tmp_path: Path
) -> None:
    model = small()
    change(model)
    model.eval()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pth"
    )
    loaded = checkpoint.load(str(tmp_path / "a.pth"), image_size=(64, 64))
    assert loaded.note is not None
    assert f"computed from parts ({words})" in loaded.note
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) < TOLERANCE


def test_a_parametrization_that_tensors_do_not_tell_is_refused_with_the_cure(tmp_path: Path) -> None:
    model = small()
    parametrizations.orthogonal(model.head.fc)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"has the weight head\.fc\.weight in a parametrization") as caught:
        checkpoint.load(str(tmp_path / "a.pth"), image_size=(64, 64))
    assert "remove_parametrizations(module, 'weight')" in str(caught.value)
    parametrize.remove_parametrizations(model.head.fc, "weight")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert checkpoint.load(str(tmp_path / "a.pth"), image_size=(64, 64)).note is None
