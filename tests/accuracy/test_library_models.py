"""Other libraries' models of a checkpoint: filled from its tensors, or refused in words."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from convnext_deploy.accuracy.library_models import BUILDERS, NotBuilt, State
from convnext_deploy.accuracy.oracle import LIBRARIES
from convnext_deploy.models.checkpoint import Loaded
from convnext_deploy.models.source import Source


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=5).state_dict()


def loaded(state: State, folder: Path) -> Loaded:
    file = folder / "model.safetensors"
    save_file(state, file)
    return Source.of(file, image_size=64).load()


def test_every_layout_is_judged_by_a_library_that_is_known() -> None:
    assert set(LIBRARIES.values()) == set(BUILDERS)


def test_timms_model_of_the_tensors_gives_what_timms_module_gave(state: State, tmp_path: Path) -> None:
    model, call = BUILDERS["timm"](state, {"architecture": "test_convnext"}, loaded(state, tmp_path))
    own = timm.create_model("test_convnext", num_classes=5).eval()
    own.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(call(model.eval(), images), (own(images),))


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("timm", "the head is not timm's own"),
        ("torchvision", "its model has a classifier, the file has none"),
        ("transformers", "the head is not transformers' own"),
    ],
)
def test_what_a_library_has_no_model_for_is_said_in_words(
    library: str, line: str, state: State, tmp_path: Path
) -> None:
    source = loaded(state, tmp_path)
    del state["head.fc.weight"]
    if library == "torchvision":
        state = {f"features.{stage}.0.block.0.weight": torch.zeros(8, 1, 7, 7) for stage in (1, 3, 5, 7)}
    with pytest.raises(NotBuilt, match=line):
        BUILDERS[library](state, {}, source)
