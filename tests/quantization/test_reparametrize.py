"""The rewrites that the quantization tests lean on compute the same function, and are as hard as they say."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
from reparametrize import OFFSET, OUTLIER, hardened, with_outlier_channels, with_residual_offsets, write_twin
from torch import Tensor, nn

from convnext_deploy.models import checkpoint as weights
from convnext_deploy.models.convnext import ConvNeXt

Rewrite = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
REWRITES = {"outliers": with_outlier_channels, "offsets": with_residual_offsets, "both": hardened}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"


def outputs(model: nn.Module, state: Mapping[str, Tensor]) -> Tensor:
    model.load_state_dict(dict(state))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.double()(images)


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize("name", ["test_convnext", "test_convnext2", "convnextv2_atto"])
def test_timms_own_module_computes_the_same_with_the_rewritten_tensors(
    timm_reference: Callable[..., nn.Module], name: str, rewrite: Rewrite
) -> None:
    state = {key: value.double() for key, value in timm_reference(name).state_dict().items()}
    model = timm.create_model(name, num_classes=10).double().eval()
    expected = outputs(model, state)
    found = outputs(model, rewrite(state))
    assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_the_rewritten_tensors_are_the_same_ones_under_our_own_names(checkpoint: Path, rewrite: Rewrite) -> None:
    loaded = weights.load(str(checkpoint), image_size=(64, 64))
    state = {key: value.double() for key, value in loaded.model.state_dict().items()}
    changed = rewrite(state)
    model = ConvNeXt(loaded.model.spec).double().eval()
    expected = outputs(model, state)
    assert (outputs(model, changed) - expected).norm() <= 1e-9 * expected.norm()
    assert any(not torch.equal(changed[key], state[key]) for key in state)


def test_outliers_are_in_every_norm_that_a_product_follows(timm_reference: Callable[..., nn.Module]) -> None:
    state = timm_reference().state_dict()
    changed = with_outlier_channels(state, channels=3)
    norms = {key for key in state if key.endswith(".weight") and not torch.equal(changed[key], state[key])}
    blocks = sum(key.endswith("mlp.fc1.weight") for key in state)
    assert len(norms) == 2 * (blocks + 3 + 1)  # blocks, downsamples, head: the norm and its product
    for key in norms:
        ratio = changed[key] / state[key]
        far = ratio.flatten()[ratio.flatten() != 1]
        if state[key].ndim == 1:
            assert far.tolist() == [OUTLIER] * 3
        else:
            assert set(far.tolist()) == {1 / OUTLIER}


def test_offsets_reach_the_stream_and_end_with_each_stage(timm_reference: Callable[..., nn.Module]) -> None:
    state = timm_reference().state_dict()
    model = timm.create_model("test_convnext", num_classes=10).eval()
    means: dict[str, list[Tensor]] = {}
    hooks = [
        stage.register_forward_hook(lambda _, __, out, i=str(i): means.setdefault(i, []).append(out.mean()))
        for i, stage in enumerate(model.stages)
    ]
    for tensors in (state, with_residual_offsets(state)):
        model.load_state_dict(tensors)
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    for before, after in means.values():
        assert float(after - before) == pytest.approx(OFFSET, rel=1e-3)


def test_the_twin_of_a_file_keeps_its_header(tmp_path: Path) -> None:
    write_twin(EXAMPLE / "model.safetensors", tmp_path / "twin.safetensors")
    source, twin = (weights.load(str(path)) for path in (EXAMPLE / "model.safetensors", tmp_path / "twin.safetensors"))
    assert (twin.labels, twin.preprocessing, twin.model.spec) == (
        source.labels,
        source.preprocessing,
        source.model.spec,
    )
    assert twin.weights.tensors_sha256 != source.weights.tensors_sha256
