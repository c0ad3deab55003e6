"""Heads as fine-tunes have them, beside the module that the checkpoint was saved from."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import torchvision_model
from references import DEPTHS, DIMS, TOLERANCE, Official, images, randomize_, relative_error
from torch import Tensor, nn

from convnext_deploy import api
from convnext_deploy.errors import UsageError, WeightsError
from convnext_deploy.models.checkpoint import Loaded, load
from convnext_deploy.models.heads import classifier_of
from convnext_deploy.records.base import Task

WIDTH, CLASSES = DIMS[3], 7


def network(head: nn.Module, **arguments: Any) -> Any:
    model = timm.create_model("convnext_atto", depths=DEPTHS, dims=DIMS, num_classes=CLASSES, **arguments)
    model.head.fc = head
    return ready(model)


def ready(model: nn.Module) -> nn.Module:
    randomize_(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def read(model: nn.Module, folder: Path, **arguments: Any) -> Loaded:
    torch.save(model.state_dict(), folder / "model.pth")
    return load(str(folder / "model.pth"), image_size=(64, 64), **arguments)


def assert_equal(loaded: Loaded, reference: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        expected = reference(images())
        assert relative_error(loaded.model(images()), getattr(expected, "logits", expected)) <= TOLERANCE


ACTIVATIONS = {
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU(), "tanh": nn.Tanh(),
    "none": nn.Identity(),
}  # fmt: skip


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(x)))


LINEAR = {
    "dropout": nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, CLASSES)),
    "names": nn.Sequential(OrderedDict(drop=nn.Dropout(0.3), fc=nn.Linear(WIDTH, CLASSES))),
    "BatchNorm before": nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, CLASSES)),
    "BatchNorm without affine": nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, CLASSES)),
    "BatchNorm after": nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.BatchNorm1d(CLASSES)),
    "nested": nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, CLASSES))),
    "two in a row": nn.Sequential(nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES)),
}


@pytest.mark.parametrize("form", LINEAR)
def test_a_head_that_is_one_linear_is_read_as_one(form: str, tmp_path: Path) -> None:
    """Before, only a dropout in front of it was; BatchNorm is exact at inference, and so is a product of linears."""
    model = network(LINEAR[form])
    loaded = read(model, tmp_path)
    assert loaded.model.spec.head_hidden is None
    assert_equal(loaded, model)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_head_has_the_activation_that_is_said(activation: str, tmp_path: Path) -> None:
    model = network(nn.Sequential(nn.Linear(WIDTH, 24), ACTIVATIONS[activation], nn.Dropout(), nn.Linear(24, CLASSES)))
    loaded = read(model, tmp_path, head_activation=activation)
    assert loaded.model.spec.head_hidden == (None if activation == "none" else 24)
    assert f"with the activation {activation} between them" in str(loaded.note)
    assert_equal(loaded, model)
    embedding = read(model, tmp_path, task="embed")  # the pooled vector, whatever the classifier is
    assert_equal(embedding, lambda x: model.forward_head(model.forward_features(x), pre_logits=True))


def test_a_hidden_width_of_twice_the_networks_is_no_joined_pooling(tmp_path: Path) -> None:
    model = network(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, CLASSES)))
    assert_equal(read(model, tmp_path, head_activation="relu"), model)


BATCH_NORMS = {
    "behind the first": [nn.Linear(WIDTH, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES)],
    "before the last": [nn.Linear(WIDTH, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24, CLASSES)],
    "fastai's": [
        nn.BatchNorm1d(WIDTH), nn.Dropout(), nn.Linear(WIDTH, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Dropout(),
        nn.Linear(24, CLASSES),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", BATCH_NORMS)
def test_batch_norms_stay_on_their_side_of_the_activation(form: str, tmp_path: Path) -> None:
    model = network(nn.Sequential(*BATCH_NORMS[form]))
    assert_equal(read(model, tmp_path, head_activation="relu"), model)


def test_a_head_with_names_of_its_own_is_read(tmp_path: Path) -> None:
    model = network(Named())
    assert_equal(read(model, tmp_path, head_activation="tanh"), model)


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_the_other_layouts_have_the_same_heads(library: str, tmp_path: Path) -> None:
    head = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    model: Any
    if library == "torchvision":
        from torchvision.models.convnext import CNBlockConfig

        stages = [CNBlockConfig(*stage) for stage in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)]
        model = torchvision.models.ConvNeXt(stages)
        model.classifier[2] = head
    else:
        config = transformers.ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES)
        model = transformers.ConvNextForImageClassification(config)
        model.classifier = head
    assert_equal(read(ready(model), tmp_path, head_activation="relu"), model)


def test_a_variants_epsilon_and_activation_survive_another_head(tmp_path: Path) -> None:
    """Its tensors are recognised without their head; a head of another width made it custom, with other constants."""
    model = timm.create_model("test_convnext2", num_classes=CLASSES)
    model.head.fc = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    loaded = read(ready(model), tmp_path, head_activation="relu")
    assert (loaded.model.spec.architecture, loaded.model.spec.activation) == ("test_convnext2", "gelu_tanh")
    assert_equal(loaded, model)


REFUSED = {
    "unsaid": (
        nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, CLASSES)), None,
        r"has an MLP head, head\.fc\.0 and head\.fc\.2, and its tensors do not tell .* give --head-activation \(gelu,",
    ),
    "three linears": (
        nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, CLASSES)), "relu",
        r"has 3 linears in its head \(head\.fc\.0, head\.fc\.2, head\.fc\.4\)",
    ),
    "a second LayerNorm": (
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)), None,
        r"head\.fc\.0 is no linear and no BatchNorm \(weight, bias\)",
    ),
    "two classifiers by name": (
        nn.ModuleDict({"color": nn.Linear(WIDTH, 5), "shape": nn.Linear(WIDTH, 3)}), None,
        rf"has two classifiers, head\.fc\.color and head\.fc\.shape, which both take {WIDTH} channels",
    ),
    "two classifiers by number": (
        nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 3)]), "relu",
        r"has two classifiers, head\.fc\.0 and head\.fc\.1, .* use --task embed and compute both yourself",
    ),
    "two of one width, which may be either": (
        nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]), None,
        rf"has the linears head\.fc\.0 and head\.fc\.1, which both take {WIDTH} channels, so that they may stand one",
    ),
    "an embedding beside a classifier": (
        nn.ModuleDict({"embed": nn.Linear(WIDTH, WIDTH), "out": nn.Linear(WIDTH, 5)}), "gelu",
        r"has the linears head\.fc\.embed and head\.fc\.out, .* or side by side; save them as an nn.Sequential",
    ),
    "one in a module of its own beside another": (
        nn.ModuleDict({"a": nn.Sequential(nn.Linear(WIDTH, WIDTH)), "b": nn.Sequential(nn.Linear(WIDTH, 5))}), "none",
        r"has the linears head\.fc\.a\.0 and head\.fc\.b\.0, .* or side by side",
    ),
    "beside one another in a list": (
        nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)]), "relu",
        r"has the linears head\.fc\.0 and head\.fc\.1, .* or side by side",
    ),
    "one linear": (nn.Linear(WIDTH, CLASSES), "relu", "--head-activation relu: the head of .* is one linear"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_head_that_cannot_be_told_is_refused_by_name(form: str, tmp_path: Path) -> None:
    head, activation, words = REFUSED[form]
    with pytest.raises(WeightsError, match=words) as caught:
        read(network(head), tmp_path, head_activation=activation)
    assert "\n" not in str(caught.value)


def batch_normed(library: str) -> nn.Module:
    """With a BatchNorm in the place of the last LayerNorm, whose names its weight and bias have."""
    model: Any
    if library == "timm":
        model = network(nn.Linear(WIDTH, CLASSES))
        model.head.norm = nn.BatchNorm2d(WIDTH)
    elif library == "transformers":
        config = transformers.ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES)
        model = transformers.ConvNextForImageClassification(config)
        model.convnext.layernorm = nn.BatchNorm1d(WIDTH)
    elif library == "torchvision":
        model = torchvision_model(DEPTHS, DIMS)
        model.classifier = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Flatten(1), nn.Linear(WIDTH, CLASSES))
    else:
        model = Official(DEPTHS, DIMS, False, CLASSES)
        model.norm = nn.BatchNorm1d(WIDTH)
    return ready(model)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers", "official"])
@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_batch_norm_under_the_name_of_the_last_norm_is_refused(library: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"running_mean: .* is a BatchNorm, and a ConvNeXt has a LayerNorm there"):
        read(batch_normed(library), tmp_path, task=task)


def test_two_linears_with_sorted_names_are_in_the_order_that_fits(tmp_path: Path) -> None:
    """As a `.safetensors` has them: `fc` before `hidden`."""
    parts = nn.ModuleDict({"fc": nn.Linear(24, CLASSES), "hidden": nn.Linear(WIDTH, 24)})
    model = network(parts)
    loaded = read(model, tmp_path, head_activation="relu")
    model.head.fc = nn.Sequential(parts["hidden"], nn.ReLU(), parts["fc"])
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) <= TOLERANCE


def test_two_square_linears_in_a_sequence_follow_one_another(tmp_path: Path) -> None:
    model = network(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)))
    loaded = read(model, tmp_path, head_activation="gelu")
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) <= TOLERANCE


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("linear_1", "linear_2")])
def test_two_square_linears_with_numbers_in_their_names_follow_one_another(
    names: tuple[str, str], tmp_path: Path
) -> None:
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
    model = network(nn.ModuleDict({names[0]: one, names[1]: other}))
    loaded = read(model, tmp_path, head_activation="relu")
    model.head.fc = nn.Sequential(one, nn.ReLU(), other)
    with torch.inference_mode():
        assert relative_error(loaded.model(images()), model(images())) <= TOLERANCE


@pytest.mark.parametrize("format", ["native", "onnx", "torchscript", pytest.param("openvino", marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_every_format_computes_the_heads_activation(
    format: str, activation: Any, need_format: Callable[[str], None], tmp_path: Path
) -> None:
    need_format(format)
    model = network(nn.Sequential(nn.Linear(WIDTH, 24), ACTIVATIONS[activation], nn.Linear(24, CLASSES)))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    made = api.export(
        tmp_path / "model.pth", format=format, head_activation=activation, image_size=64, batch=2, out=tmp_path / "a"
    )
    (found,) = api.load(made.path).run(images().numpy())
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(found), model(images())) <= TOLERANCE


def test_an_unknown_activation_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"head_activation rel; expected one of .*; did you mean relu\?"):
        api.export("random", variant="atto", head_activation="rel", out=tmp_path / "a")  # type: ignore[arg-type]


@pytest.mark.parametrize(("weights", "task"), [("random", "classify"), ("model.pth", "embed")])
def test_an_activation_that_nothing_uses_is_refused(weights: str, task: Any) -> None:
    with pytest.raises(WeightsError, match="--head-activation relu is for a checkpoint's classifier, not for"):
        load(weights, variant="atto", task=task, head_activation="relu")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shapes=st.dictionaries(
        st.tuples(
            st.sampled_from(["", "0.", "1.", "2.", "4.", "fc.", "a.b.", "00.", "1.1.", "\0."]),
            st.sampled_from(["weight", "bias", "running_mean", "running_var", "num_batches_tracked", "gamma"]),
        ).map("".join),
        st.lists(st.sampled_from([0, 1, 2, 8]), max_size=4).map(tuple),
        min_size=1,
        max_size=8,
    ),
    activation=st.sampled_from([None, "relu", "none"]),
)
def test_no_head_raises_anything_but_a_weights_error(shapes: dict[str, tuple[int, ...]], activation: Any) -> None:
    entries = {name: torch.ones(shape) for name, shape in shapes.items()}
    with contextlib.suppress(WeightsError):
        found = classifier_of(entries, "head.fc.", "a.pth", activation)
        assert all(isinstance(value, Tensor) for value in found.tensors.values())


@pytest.mark.parametrize("name", ["test_convnext", "test_convnext3", "convnext_atto"])  # GELU's tanh form, SiLU, GELU
@torch.inference_mode()
def test_a_hidden_linear_of_a_fine_tune_hides_no_variant_and_its_activation(name: str, tmp_path: Path) -> None:
    reference = randomize_(timm.create_model(name, num_classes=5, head_hidden_size=40))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    model = load(str(tmp_path / "a.pth")).model
    assert (model.spec.architecture, model.spec.head_hidden) == (name, 40)
    assert relative_error(model(images()), reference(images())) <= TOLERANCE
