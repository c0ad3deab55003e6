"""Checkpoints in every container they come in, and everything that can be wrong with one. Nothing goes online."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import msgspec
import pytest
import safetensors.torch
import timm
import torch
import transformers
from false_servers import answering
from references import TOLERANCE, randomize_, relative_error
from torch import Tensor, nn

from convnext_deploy.accuracy import probes
from convnext_deploy.artifact import matching
from convnext_deploy.errors import UsageError, WeightsError
from convnext_deploy.models import checkpoint, registry
from convnext_deploy.models.checkpoint import Loaded, load
from convnext_deploy.models.parameters import random_model
from convnext_deploy.models.torchvision_detectors import PREPARED
from convnext_deploy.records.base import Task
from convnext_deploy.records.manifest import Preprocessing

pytestmark = pytest.mark.usefixtures("hub")


def timm_model(name: str = "test_convnext2", seed: int = 0, **arguments: Any) -> Any:
    return randomize_(timm.create_model(name, **({"num_classes": 10} | arguments)), seed)


@pytest.fixture(scope="session")
def reference() -> nn.Module:
    return timm_model()


@pytest.fixture
def file(tmp_path: Path, reference: nn.Module) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(reference.state_dict(), path)
    return path


def images(channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal_logits(loaded: Loaded, reference: nn.Module) -> None:
    x = images(loaded.model.spec.in_chans)
    with torch.inference_mode():
        expected = reference(x)
        result = loaded.model(x)
    assert relative_error(result, getattr(expected, "logits", expected)) <= TOLERANCE


def refusal(source: Path | str | None, **arguments: Any) -> str:
    """The one line that a refused checkpoint ends with."""
    with pytest.raises(WeightsError) as caught:
        load(None if source is None else str(source), **arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 700
    return message


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_is_loaded(file: Path, reference: nn.Module) -> None:
    loaded = load(str(file))
    assert_equal_logits(loaded, reference)
    assert loaded.model.spec == registry.spec("test_convnext2", num_classes=10)
    assert loaded.weights.source == "model.safetensors"
    assert loaded.weights.layout == "timm"
    assert loaded.weights.random is False
    assert loaded.weights.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert loaded.weights.licence is None
    assert loaded.labels is None
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("zipped", [pytest.param(True, id="zip"), pytest.param(False, id="before torch 1.6")])
def test_a_pickled_state_dict_is_loaded(tmp_path: Path, reference: nn.Module, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(reference.state_dict(), path, _use_new_zipfile_serialization=zipped)
    loaded = load(str(path))
    assert_equal_logits(loaded, reference)
    assert loaded.weights.source == path.name


def test_the_hash_of_the_tensors_does_not_depend_on_the_container(tmp_path: Path, file: Path) -> None:
    state = safetensors.torch.load(file.read_bytes())  # not mapped: the file is written over
    torch.save({"state_dict": {f"module.{key}": value for key, value in reversed(state.items())}}, tmp_path / "a.pth")
    one, other = load(str(file)).weights, load(str(tmp_path / "a.pth")).weights
    assert one.tensors_sha256 == other.tensors_sha256
    assert one.file_sha256 != other.file_sha256
    key = "stages.2.blocks.0.gamma"
    state[key][3] = torch.nextafter(state[key][3], torch.tensor(9.0))
    safetensors.torch.save_file(state, file)
    assert load(str(file)).weights.tensors_sha256 != one.tensors_sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_another_float_type_become_float32(tmp_path: Path, reference: nn.Module, dtype: torch.dtype) -> None:
    safetensors.torch.save_file(
        {key: v.to(dtype) for key, v in reference.state_dict().items()}, tmp_path / "a.safetensors"
    )
    loaded = load(str(tmp_path / "a.safetensors"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    rounded = timm_model()
    rounded.load_state_dict({key: v.to(dtype).float() for key, v in reference.state_dict().items()})
    assert_equal_logits(loaded, rounded)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "net", "model_ema", "state_dict_ema", "ema"])
def test_a_training_scripts_wrapper_is_taken_off(tmp_path: Path, reference: nn.Module, wrapper: str) -> None:
    optimizer = torch.optim.AdamW(timm_model().parameters())
    content = {"epoch": 3, "optimizer": optimizer.state_dict(), "scaler": None, wrapper: reference.state_dict()}
    torch.save(content, tmp_path / "a.pth")
    loaded = load(str(tmp_path / "a.pth"))
    assert_equal_logits(loaded, reference)
    assert loaded.weights.source == f"a.pth[{wrapper}]"


def test_averaged_weights_are_taken_and_the_source_says_so(tmp_path: Path) -> None:
    plain, averaged = timm_model(seed=1), timm_model(seed=2)
    torch.save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "a.pth")
    loaded = load(str(tmp_path / "a.pth"))
    assert_equal_logits(loaded, averaged)
    assert loaded.weights.source == "a.pth[model_ema]"
    loaded = load(str(tmp_path / "a.pth"), weights_key="model")
    assert_equal_logits(loaded, plain)
    assert loaded.weights.source == "a.pth[model]"


def test_any_wrapper_can_be_named(tmp_path: Path) -> None:
    teacher, student = timm_model(seed=1), timm_model(seed=2)
    torch.save({"teacher": teacher.state_dict(), "student": student.state_dict()}, tmp_path / "a.pth")
    loaded = load(str(tmp_path / "a.pth"), weights_key="teacher")
    assert_equal_logits(loaded, teacher)
    assert loaded.weights.source == "a.pth[teacher]"
    assert load(str(tmp_path / "a.pth"), weights_key="student").weights.source == "a.pth[student]"


def test_a_key_prefix_can_be_named(tmp_path: Path, reference: nn.Module) -> None:
    state = {f"backbone.{key}": value for key, value in reference.state_dict().items()}
    safetensors.torch.save_file(state | {"decode_head.conv.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert "decode_head.conv.weight" in refusal(tmp_path / "a.safetensors")
    assert_equal_logits(load(str(tmp_path / "a.safetensors"), weights_key="backbone."), reference)
    message = refusal(tmp_path / "a.safetensors", weights_key="neck.")
    assert "is not a ConvNeXt checkpoint (keys: no tensors)" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_file_may_change_after_loading(tmp_path: Path, reference: nn.Module, suffix: str) -> None:
    """A training run may write its next checkpoint over the one that is being exported."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(reference.state_dict(), path)
    else:
        safetensors.torch.save_file(reference.state_dict(), path)
    loaded = load(str(path))
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal_logits(loaded, reference)
    path.unlink()
    assert_equal_logits(loaded, reference)


def test_a_home_folder_is_understood(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/model.safetensors").weights.source == "model.safetensors"


# Damaged and hostile files -------------------------------------------------------------------------------------------


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.marker, "the code ran")


@pytest.mark.parametrize("writer", [pytest.param(torch.save, id="torch.save"), pytest.param(None, id="pickle.dump")])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, writer: Callable[..., None] | None) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"state_dict": {"stem.0.weight": torch.zeros(3)}, "hook": Hostile(marker)}
    if writer is None:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        writer(content, path)
    message = refusal(path)
    assert not marker.exists()
    assert str(path) in message
    assert "reading that would run code" in message or "cannot be read as a checkpoint of plain tensors" in message
    if writer is None:  # the file would have run it
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def pth(reference: nn.Module, path: Path) -> Path:
    torch.save(reference.state_dict(), path)
    return path


@pytest.mark.parametrize("keep", [0, 1, 2, 4, 100, 5000, -1, -100])
@pytest.mark.parametrize("kind", [".pth", ".safetensors", "old .pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, reference: nn.Module, kind: str, keep: int) -> None:
    path = tmp_path / f"a{kind.split()[-1]}"
    if kind == ".safetensors":
        safetensors.torch.save_file(reference.state_dict(), path)
    else:
        torch.save(reference.state_dict(), path, _use_new_zipfile_serialization=kind == ".pth")
    content = path.read_bytes()
    assert len(content) > 5000
    path.write_bytes(content[:keep])
    message = refusal(path)
    assert str(path) in message
    damaged = "not a readable safetensors file" if kind == ".safetensors" else "cannot be read as a checkpoint"
    assert (damaged if content[:keep] else "is empty; copy or download it again") in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"this is a text, not a checkpoint\n", id="text"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", id="git-lfs pointer"),
        pytest.param(b"<!DOCTYPE html><html>404</html>", id="web page"),
        pytest.param(b"PK\x03\x04 not a zip", id="a zip's first bytes"),
        pytest.param(b"\xff" * 4096, id="ones"),
        pytest.param(b"\0" * 4096, id="zeros"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param({}, "has no tensors under names (its keys: none)", id="empty dictionary"),
        pytest.param({"model": {}}, "has no tensors under names (its keys: 'model')", id="empty wrapper"),
        pytest.param({"epoch": 3}, "has no tensors under names (its keys: 'epoch')", id="no tensor"),
        pytest.param([torch.zeros(3)], "a list; expected a dictionary of tensors, as model.state_dict()", id="list"),
        pytest.param(torch.zeros(3), "contains a Tensor; expected a dictionary", id="tensor"),
        pytest.param({0: torch.zeros(3)}, "a tensor under the key 0", id="a number as key"),
        pytest.param({"a\nb": torch.zeros(3)}, r"'a\nb'", id="a key of two lines"),
        pytest.param({"fc.weight": torch.zeros(3)}, "(keys: fc.weight)", id="another model"),
    ],
)
def test_a_pickle_without_a_convnext_is_refused(tmp_path: Path, content: object, why: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert why in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"stages.2.blocks.0.norm.bias": None}, "lacks stages.2.0.dwconv_norm.norm.bias", id="missing"),
        pytest.param({"extra.weight": torch.zeros(2)}, "keys that ConvNeXt does not: extra.weight", id="extra"),
        pytest.param({"head.norm.weight": torch.zeros(5)}, "shape (5,), expected (128,)", id="another shape"),
        pytest.param({"head.norm.weight": torch.zeros(128, dtype=torch.int8)}, "is torch.int8", id="integers"),
        pytest.param({"head.norm.weight": torch.zeros(128, dtype=torch.complex64)}, "torch.complex64", id="complex"),
        pytest.param(
            {"head.fc.weight": torch.eye(10, 128).to_sparse()},
            "torch.sparse_coo",
            id="sparse",
            # torch.load warns that its check of sparse tensors takes time
            marks=pytest.mark.filterwarnings("ignore:.*sparse tensor:UserWarning"),
        ),
    ],
)
def test_one_wrong_tensor_is_named(
    tmp_path: Path, reference: nn.Module, change: dict[str, Tensor | None], why: str
) -> None:
    state = {key: value for key, value in (reference.state_dict() | change).items() if value is not None}
    torch.save(state, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert why in message
    assert message.startswith("a.pth")


def test_the_source_of_a_wrong_tensor_is_its_wrapper(tmp_path: Path, reference: nn.Module) -> None:
    state = reference.state_dict() | {"head.norm.weight": torch.zeros(5)}
    torch.save({"model": reference.state_dict(), "model_ema": state}, tmp_path / "a.pth")
    assert refusal(tmp_path / "a.pth").startswith("a.pth[model_ema]: head.norm.weight has shape (5,)")


# Contradictions between the request and the checkpoint ---------------------------------------------------------------


def test_the_wrong_variant_is_refused(file: Path) -> None:
    message = refusal(file, variant="convnext_atto")
    assert message.startswith(
        "model.safetensors is not a convnext_atto: its depths is (1, 1, 1, 1), expected (2, 2, 6, 2)"
    )
    assert message.endswith("it fits test_convnext2")
    assert load(str(file), variant="test-convnext2").model.spec.architecture == "test_convnext2"


def test_an_unknown_variant_gives_near_misses(file: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown variant 'convnext_tny'; did you mean .*convnext_tiny"):
        load(str(file), variant="convnext_tny")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param({"num_classes": 7}, "has 10 classes, not 7", id="classes"),
        pytest.param({"in_chans": 1}, "has 3 channels, not 1", id="channels"),
    ],
)
def test_classes_and_channels_that_contradict_the_checkpoint_are_refused(
    file: Path, arguments: dict[str, int], why: str
) -> None:
    message = refusal(file, **arguments)
    assert why in message
    assert "fine-tune it first" in message


def test_classes_and_channels_may_be_repeated(file: Path) -> None:
    assert load(str(file), num_classes=10, in_chans=3).model.spec.num_classes == 10


@pytest.mark.parametrize("source", ["file", "random"])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((31, 224), id="height one below"),
        pytest.param((224, 31), id="width one below"),
        pytest.param((16, 16), id="half a stride"),
        pytest.param((0, 0), id="nothing"),
        pytest.param((-32, 32), id="negative"),
    ],
)
def test_an_image_size_that_leaves_no_pixel_of_the_last_map_is_refused(
    file: Path, source: str, size: tuple[int, int]
) -> None:
    message = refusal(file if source == "file" else "random", variant="test_convnext2", image_size=size)
    assert f"image size {size[0]}x{size[1]} pixels; expected at least 32x32" in message
    assert "--image-size" in message


def test_the_image_size_is_height_and_width(file: Path, reference: nn.Module) -> None:
    spec = load(str(file), image_size=(96, 160)).model.spec
    assert spec.image_size == (96, 160)
    assert load(str(file)).model.spec.image_size == (224, 224)


def test_a_checkpoint_without_classifier_serves_embeddings_and_features(tmp_path: Path) -> None:
    reference = timm_model(num_classes=0)
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert message == "a.pth has no classifier; use --task embed or --task features"
    loaded = load(str(tmp_path / "a.pth"), task="embed")
    assert_equal_logits(loaded, reference)
    assert (loaded.model.spec.task, loaded.model.spec.num_classes) == ("embed", 0)
    assert load(str(tmp_path / "a.pth"), task="features").model.head is None


def test_a_checkpoint_without_head_norm_serves_features_only(tmp_path: Path) -> None:
    """Self-supervised checkpoints (`.fcmae`) are published so."""
    reference = timm_model("convnextv2_atto", num_classes=0)
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "a.pth")
    assert "has no classifier" in refusal(tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", task="embed")
    assert "lacks head.norm.bias, head.norm.weight" in message
    assert "--task features needs no head" in message
    loaded = load(str(tmp_path / "a.pth"), task="features")
    with torch.inference_mode():
        last = loaded.model(images())[3]
        assert relative_error(last, reference.forward_features(images())) <= TOLERANCE


@pytest.mark.parametrize("task", ["embed", "features"])
def test_labels_belong_to_classes_only(tmp_path: Path, task: Task) -> None:
    folder = saved_by_timm(tmp_path, label_names=[f"kind {i}" for i in range(10)])
    assert load(str(folder)).labels == tuple(f"kind {i}" for i in range(10))
    assert load(str(folder), task=task).labels is None


# No weights, no source -----------------------------------------------------------------------------------------------


def test_no_request_at_all_is_refused() -> None:
    message = refusal(None)
    assert "--variant" in message
    assert "--weights FILE" in message


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "missing.pth")
    assert "no such file or folder" in message
    assert "--weights FILE" in message
    assert "hf-hub:owner/name" in message


def test_an_address_of_a_file_is_refused_as_that() -> None:
    with pytest.raises(WeightsError, match=r"tiny\.pth is an address; download it, and give the file$"):
        load("https://example.org/tiny.pth")


def test_random_weights_need_a_variant() -> None:
    message = refusal("random")
    assert message == "--weights random needs --variant: there are no tensors to infer it from"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param({"num_classes": 0}, "0 classes; expected at least 1", id="no class to classify"),
        pytest.param({"num_classes": -1, "task": "embed"}, "-1 classes; expected at least 0", id="negative classes"),
        pytest.param({"num_classes": 0, "task": "detect"}, "0 classes; expected at least 2", id="nothing to detect"),
        pytest.param({"num_classes": 1, "task": "detect"}, "1 class; expected at least 2", id="background alone"),
        pytest.param({"in_chans": 0}, "0 channels; expected at least 1", id="no channel"),
    ],
)
def test_random_weights_of_no_size_are_refused(arguments: dict[str, object], why: str) -> None:
    assert refusal("random", variant="test_convnext", **arguments) == why
    loaded = load("random", variant="test_convnext", task="embed", num_classes=0)
    assert loaded.model(images()).shape == (2, 64)


def test_preprocessing_that_nothing_says_is_named_and_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save(timm_model().state_dict(), path)
    assert load(str(path)).preprocessing.assumed == (
        "mean", "std", "interpolation", "crop_pct", "image_size", "global_pool"
    )  # fmt: skip
    given = load(str(path), preprocessing={"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}, image_size=(64, 64)).preprocessing
    assert (given.mean, given.crop_pct) == ((0.1, 0.2, 0.3), 1.0)
    assert given.assumed == ("std", "interpolation", "global_pool")
    assert load(str(path), task="features", image_size=(64, 64)).preprocessing.assumed[4:] == ()


def test_one_mean_and_std_are_every_channels(tmp_path: Path) -> None:
    torch.save(timm_model().state_dict(), tmp_path / "plain.pth")
    for given in ((0.5,), 0.5):
        found = load(str(tmp_path / "plain.pth"), preprocessing={"mean": given, "std": given}).preprocessing
        assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_a_mean_in_0_to_255_is_refused_with_what_to_give(tmp_path: Path) -> None:
    torch.save(timm_model().state_dict(), tmp_path / "plain.pth")
    given = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    why = (
        "mean 123.675,116.28,103.53 and std 58.395,57.12,57.375; expected values in [0, 1], because pixels are divided "
        "by 255 first: give --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, which is those divided by 255"
    )
    assert refusal(tmp_path / "plain.pth", preprocessing=given) == why
    folder = saved_by_timm(tmp_path)
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder / "config.json", pretrained_cfg=cfg | given)
    assert refusal(folder) == why


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_random_weights_refuse_a_preparation_that_moves_masks_or_boxes(task: Task) -> None:
    message = refusal(
        "random", variant="test_convnext", task=task, preprocessing={"crop_pct": 0.5, "crop_mode": "center"}
    )
    assert message.startswith("random weights: ")
    assert "crop_pct 0.5" in message


def test_images_of_a_random_detector_are_prepared_as_torchvision_prepares_them() -> None:
    steps = load("random", variant="test_convnext", task="detect", image_size=(64, 64)).preprocessing
    assert {name: getattr(steps, name) for name in PREPARED} == PREPARED
    assert not {"interpolation", "crop_pct"} & set(steps.assumed)


def test_a_random_detector_is_of_coco_and_detects_on_every_probe() -> None:
    """An export of one that detects nothing would prove nothing."""
    loaded = load("random", variant="atto", task="detect", image_size=(32, 32))
    assert loaded.model.spec.num_classes == 91
    (probe,) = probes.of_source(loaded, False, None)
    for index in range(len(probe.pixels)):
        candidates = [output[index : index + 1] for output in probe.expected]
        assert matching.detections_in(candidates, loaded.model.spec, probe.image_size)


def test_a_random_segmenter_is_of_ade20k() -> None:
    assert load("random", variant="test_convnext", task="segment", image_size=(64, 64)).model.spec.num_classes == 150


def test_random_weights_say_so() -> None:
    loaded = load("random", variant="v2-atto", num_classes=7, in_chans=4, image_size=(64, 96), task="classify")
    assert loaded.weights.random is True
    assert (loaded.weights.source, loaded.weights.layout, loaded.weights.file_sha256) == ("random", "own", None)
    assert loaded.model.spec == registry.spec("convnextv2_atto", num_classes=7, in_chans=4, image_size=(64, 96))
    assumed = ("mean", "std", "interpolation", "crop_pct")
    assert loaded.preprocessing == Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4, assumed=assumed)
    assert loaded.labels is None
    again = load("random", variant="v2-atto", num_classes=7, in_chans=4)
    assert again.weights.tensors_sha256 == loaded.weights.tensors_sha256


@pytest.mark.parametrize(
    "name", ["test_convnext", "convnext_zepto_rms_ols", "convnext_atto_rms", "convnextv2_atto", "convnext_atto_ols"]
)
def test_every_parameter_of_a_random_model_matters(name: str) -> None:
    """In float64, by the gradient: none is at a value where the output does not see it."""
    model = random_model(registry.spec(name, num_classes=10)).double().requires_grad_(True)
    logits = model(images().double())
    assert float(logits.detach().std()) > 0.1
    assert float((logits[0] - logits[1]).detach().norm()) > 1e-3  # it looks at the image
    torch.manual_seed(0)
    (logits * torch.randn_like(logits)).sum().backward()
    effects = {name: float((p.grad * p.detach()).norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert effects.keys() == dict(model.named_parameters()).keys()
    weakest = min(effects, key=effects.__getitem__)
    assert effects[weakest] > 1e-4, weakest


def test_random_models_depend_on_the_seed_alone() -> None:
    spec = registry.spec("test_convnext2")
    torch.manual_seed(1)
    one = random_model(spec, seed=5).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    other, third = random_model(spec, seed=5).state_dict(), random_model(spec, seed=6).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(torch.equal(one[key], third[key]) for key in one)


# Folders: timm -------------------------------------------------------------------------------------------------------


def saved_by_timm(
    folder: Path,
    model: nn.Module | None = None,
    safe: bool = True,
    arguments: dict[str, Any] | None = None,
    **config: object,
) -> Path:
    """`arguments` are those that the model was made with, which timm before 1.0.31 does not write by itself."""
    folder = folder / "saved"
    known = {"global_pool": (arguments or {}).get("global_pool", "avg"), **config}
    timm.models.save_for_hf(
        model or timm_model(), folder, model_config=known, model_args=arguments, safe_serialization=safe
    )
    return folder


@pytest.mark.parametrize("safe", [pytest.param(True, id="safetensors"), pytest.param(False, id="pytorch_model.bin")])
def test_a_folder_of_timm_brings_its_preprocessing(tmp_path: Path, safe: bool) -> None:
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "interpolation": "bilinear"}
    reference = timm_model(pretrained_cfg_overlay=overlay | {"license": "mit"})
    folder = saved_by_timm(tmp_path, reference, safe)
    loaded = load(str(folder))
    assert_equal_logits(loaded, reference)
    assert loaded.preprocessing == Preprocessing(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9, interpolation="bilinear"
    )
    assert loaded.model.spec.image_size == (160, 160)  # what test_convnext2 is trained at
    assert loaded.weights.licence == "mit"
    assert loaded.weights.source == str(folder)
    file = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    assert loaded.weights.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("size", "use_test_size"), [pytest.param(None, False, id="trained"), pytest.param((192, 192), True, id="tested")]
)
def test_preprocessing_is_what_timm_resolves(tmp_path: Path, size: tuple[int, int] | None, use_test_size: bool) -> None:
    overlay = {"test_input_size": (3, 192, 192), "test_crop_pct": 1.0, "crop_pct": 0.85, "crop_mode": "squash"}
    reference = timm_model(pretrained_cfg_overlay=overlay)
    loaded = load(str(saved_by_timm(tmp_path, reference)), image_size=size)
    theirs = timm.data.resolve_model_data_config(reference, use_test_size=use_test_size)
    ours = msgspec.structs.asdict(loaded.preprocessing)
    assert ours.pop("assumed") == ()
    assert ours.pop("exif_orientation") is False
    assert ours == {key: theirs[key] for key in ours}
    assert loaded.model.spec.image_size == theirs["input_size"][1:]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"act_layer": "silu"}, id="activation"),
        pytest.param({"norm_eps": 1e-2}, id="epsilon"),
        pytest.param({"act_layer": "gelu", "norm_eps": 1e-6}, id="the paper's in a test model"),
        pytest.param({"conv_mlp": True, "drop_path_rate": 0.1, "in_chans": 2}, id="nothing that is hidden"),
        pytest.param({"norm_layer": "layernorm2d", "conv_mlp": True}, id="the same norm"),
    ],
)
def test_what_timms_arguments_change_is_not_lost(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """timm writes them into `config.json`; the tensors look the same without them."""
    reference = timm_model(**arguments)
    assert_equal_logits(load(str(saved_by_timm(tmp_path, reference, arguments=arguments))), reference)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param({"act_layer": "relu"}, "act_layer 'relu'", id="activation"),
        pytest.param({"output_stride": 16}, "output_stride 16", id="dilation"),
        pytest.param({"global_pool": "max"}, "global_pool 'max'", id="pooling"),
    ],
)
def test_an_argument_of_timm_that_we_do_not_have_is_refused(
    tmp_path: Path, arguments: dict[str, Any], why: str
) -> None:
    folder = saved_by_timm(tmp_path, timm_model(**arguments), arguments=arguments)
    assert f"asks for {why}; expected" in refusal(folder)


@pytest.mark.parametrize("pooling", ["max", "avgmax", "catavgmax"])
def test_another_pooling_is_refused_wherever_it_is_said(tmp_path: Path, pooling: str) -> None:
    folder = saved_by_timm(tmp_path)
    edit(folder / "config.json", global_pool=pooling)
    assert refusal(folder) == f"config.json asks for global_pool {pooling!r}; expected 'avg'"
    torch.save({"state_dict": timm_model().state_dict(), "args": {"gp": pooling}}, tmp_path / "last.pth")
    assert f"args.gp asks for global_pool {pooling!r}" in refusal(tmp_path / "last.pth")
    torch.save({"state_dict": timm_model().state_dict(), "args": {"gp": "fast"}}, tmp_path / "last.pth")
    assert "global_pool" not in load(str(tmp_path / "last.pth")).preprocessing.assumed


def test_a_norm_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    folder = saved_by_timm(tmp_path, timm_model("convnext_atto_rms"))
    edit(folder / "config.json", model_args={"norm_layer": "simplenorm"})
    assert "norm_layer 'simplenorm'; its tensors say 'rmsnorm'" in refusal(folder)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        pytest.param({"mean": [0.5, 0.4]}, "expected 3 numbers each; give --mean and --std", id="two means for three"),
        pytest.param({"mean": [-0.5, 0.4, 0.4]}, "expected values in [0, 1]", id="a negative mean"),
        pytest.param({"std": [0.5, 0.5, 0.0]}, "no std of 0 or below", id="division by zero"),
        pytest.param({"crop_pct": 0}, "or beside the checkpoint: ", id="nothing left of the image"),
        pytest.param({"interpolation": "cubic"}, "or beside the checkpoint: ", id="an unknown filter"),
        pytest.param({"crop_mode": "middle"}, "or beside the checkpoint: ", id="an unknown crop"),
        pytest.param({"mean": "0.5"}, "or beside the checkpoint: ", id="text for a list"),
        pytest.param({"input_size": [3, 20, 100]}, "image size 20x100", id="below 32 pixels"),
        pytest.param({"input_size": 160}, "config.json cannot be understood", id="a number for a size"),
        pytest.param({"input_size": [3, "a", "b"]}, "image size axb", id="words for a size"),
    ],
)
def test_preprocessing_that_cannot_be_carried_out_is_refused(
    tmp_path: Path, values: dict[str, object], why: str
) -> None:
    folder = saved_by_timm(tmp_path)
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edit(folder / "config.json", pretrained_cfg=cfg | values)
    assert why in refusal(folder)


def test_labels_that_do_not_fit_the_classes_are_refused(tmp_path: Path) -> None:
    assert "3 labels for 10 classes" in refusal(saved_by_timm(tmp_path, label_names=["a", "b", "c"]))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"{", "is not JSON", id="truncated"),
        pytest.param(b"\xff\xfe", "is not JSON", id="not text"),
        pytest.param(b"[1]", "contains a list; expected a JSON object", id="a list"),
        pytest.param(b'{"pretrained_cfg": {}, "model_args": 3}', "cannot be understood", id="a number for arguments"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    folder = saved_by_timm(tmp_path)
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert why in message
    assert "config.json" in message


def test_a_folder_without_config_is_loaded_as_its_file_alone(tmp_path: Path, reference: nn.Module) -> None:
    folder = saved_by_timm(tmp_path, reference)
    (folder / "config.json").unlink()
    loaded = load(str(folder))
    assert_equal_logits(loaded, reference)
    assert loaded.model.spec.image_size == (224, 224)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "has no weights (in it: config.json)" in message
    assert "--weights" in message


# Folders: transformers -----------------------------------------------------------------------------------------------


def saved_by_transformers(folder: Path, v2: bool = False, shards: str = "1GB", **arguments: Any) -> Any:
    settings = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40], "num_labels": 3} | arguments
    model: Any
    if v2:
        model = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**settings))
    else:
        model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**settings))
    randomize_(model)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


@pytest.mark.parametrize("v2", [pytest.param(False, id="V1"), pytest.param(True, id="V2")])
@pytest.mark.parametrize("shards", [pytest.param("1GB", id="one file"), pytest.param("20KB", id="sharded")])
def test_a_folder_of_transformers_is_loaded(tmp_path: Path, v2: bool, shards: str) -> None:
    reference = saved_by_transformers(tmp_path, v2, shards, id2label={0: "cat", 1: "dog", 2: "é"}, image_size=96)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    loaded = load(str(tmp_path))
    assert_equal_logits(loaded, reference)
    assert loaded.weights.layout == "transformers"
    assert loaded.labels == ("cat", "dog", "é")
    assert loaded.model.spec.image_size == (96, 96)
    assert loaded.model.spec.head_norm_eps == 1e-12
    assert (loaded.weights.file_sha256 is None) == (shards == "20KB")
    assert load(str(tmp_path), task="embed").model.spec.head_norm_eps == 1e-12


def test_eleven_labels_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As text, "10" comes before "2"."""
    saved_by_transformers(tmp_path, num_labels=11)
    assert load(str(tmp_path)).labels == tuple(f"LABEL_{i}" for i in range(11))


def test_the_last_epsilon_of_transformers_is_read_from_its_config(tmp_path: Path) -> None:
    reference = saved_by_transformers(tmp_path, layer_norm_eps=0.5)
    loaded = load(str(tmp_path))
    assert (loaded.model.spec.head_norm_eps, loaded.model.spec.norm_eps) == (0.5, 1e-6)
    assert_equal_logits(loaded, reference)


@pytest.mark.parametrize(
    ("edge", "expected", "size"),
    [
        pytest.param(224, {"crop_pct": 0.8, "crop_mode": "center"}, (224, 224), id="cropped below 384"),
        pytest.param(384, {"crop_pct": 1.0, "crop_mode": "squash"}, (384, 384), id="squashed from 384 on"),
    ],
)
@pytest.mark.parametrize("old", [pytest.param(False, id="of now"), pytest.param(True, id="before 4.26")])
def test_the_image_processor_of_transformers_is_read(
    tmp_path: Path, edge: int, expected: dict[str, Any], size: tuple[int, int], old: bool
) -> None:
    saved_by_transformers(tmp_path)
    transformers.ConvNextImageProcessor(
        size={"shortest_edge": edge}, crop_pct=0.8, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path)
    if old:
        edit(tmp_path / "preprocessor_config.json", size=edge)
    loaded = load(str(tmp_path))
    assert loaded.preprocessing == Preprocessing(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", **expected
    )
    assert loaded.model.spec.image_size == size


def test_another_activation_of_transformers_is_refused(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path, hidden_act="relu")
    assert refusal(tmp_path).startswith("config.json asks for hidden_act 'relu'; expected one of gelu, gelu_tanh, silu")


def test_another_model_of_transformers_is_refused(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    edit(tmp_path / "config.json", model_type="vit")
    assert refusal(tmp_path) == (
        "config.json describes a 'vit'; expected convnext, convnextv2, dinov3_convnext, or a backbone of these; for a "
        "ConvNeXt in it give the file of weights with --weights, which leaves config.json out"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path, shards="20KB")
    (lost,) = tmp_path.glob("model-00002*")
    lost.unlink()
    assert refusal(tmp_path) == f"{tmp_path} lacks the part {lost.name!r}"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="truncated"),
        pytest.param("{}", id="no map"),
        pytest.param('{"weight_map": 3}', id="a number for a map"),
        pytest.param('{"weight_map": {"a": 3}}', id="a number for a file"),
        pytest.param('{"weight_map": {"a": ["b"]}}', id="a list for a file"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    saved_by_transformers(tmp_path, shards="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "lacks the part 'model.safetensors'" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_preprocessor_is_refused(tmp_path: Path, content: str) -> None:
    saved_by_transformers(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    assert "preprocessor_config.json" in refusal(tmp_path)


# Metadata in a safetensors header ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        {str(i): f"kind {i}" for i in reversed(range(10))},
        {f"kind {i}": i for i in range(10)},
        [f"kind {i}" for i in range(10)],
    ],
    ids=["by number", "by name", "list"],
)
def test_labels_in_the_header_are_names_in_every_form(tmp_path: Path, labels: object) -> None:
    metadata = {"labels": json.dumps(labels)}
    safetensors.torch.save_file(timm_model().state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    assert load(str(tmp_path / "a.safetensors")).labels == tuple(f"kind {i}" for i in range(10))


@pytest.mark.parametrize("labels", [{"1": "a", "2": "b"}, {"a": 0, "b": 0}, "abcdefghij", 3, {"a": "b"}])
def test_labels_that_are_no_names_in_order_are_refused(tmp_path: Path, labels: object) -> None:
    metadata = {"labels": json.dumps(labels)}
    safetensors.torch.save_file(timm_model().state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    assert "labels" in refusal(tmp_path / "a.safetensors") or "metadata" in refusal(tmp_path / "a.safetensors")


def test_facts_in_the_header_are_read(tmp_path: Path) -> None:
    reference = timm_model(in_chans=1)
    metadata = {
        "image_size": "64", "mean": "0.286", "std": "0.353", "interpolation": "bilinear", "crop_pct": "1.0",
        "license": "mit", "labels": json.dumps([f"kind {i}" for i in range(10)]),
    }  # fmt: skip
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    loaded = load(str(tmp_path / "a.safetensors"))
    assert_equal_logits(loaded, reference)
    assert loaded.preprocessing == Preprocessing(mean=(0.286,), std=(0.353,), interpolation="bilinear", crop_pct=1.0)
    assert loaded.model.spec.image_size == (64, 64)
    assert loaded.weights.licence == "mit"
    assert loaded.labels == tuple(f"kind {i}" for i in range(10))


def test_a_licence_in_the_header_says_nothing_of_the_pooling(tmp_path: Path, reference: nn.Module) -> None:
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "a.safetensors", metadata={"license": "mit"})
    loaded = load(str(tmp_path / "a.safetensors"))
    assert (loaded.weights.licence, "global_pool" in loaded.preprocessing.assumed) == ("mit", True)


def test_metadata_of_another_meaning_is_refused_with_how_to_leave_it_out(tmp_path: Path, reference: nn.Module) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(reference.state_dict(), path, metadata={"labels": "ant, bee"})
    assert "safetensors.torch.save_file(safetensors.torch.load_file(FILE), OTHER)" in refusal(path)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    assert_equal_logits(load(str(path)), reference)


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        pytest.param({"image_size": "64x64"}, "its metadata cannot be understood", id="size"),
        pytest.param({"mean": "a"}, "its metadata cannot be understood", id="mean"),
        pytest.param({"mean": '["a", "b", "c"]'}, "or beside the checkpoint: ", id="words"),
        pytest.param({"labels": '["a"]'}, "1 label for 10 classes", id="labels"),
    ],
)
def test_damaged_facts_in_the_header_are_refused(
    tmp_path: Path, reference: nn.Module, metadata: dict[str, str], why: str
) -> None:
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "a.safetensors", metadata=metadata)
    assert why in refusal(tmp_path / "a.safetensors")


# The hub -------------------------------------------------------------------------------------------------------------


def cached(hub: Path, repository: str, folder: Path) -> None:
    """What huggingface_hub leaves on disk after a download, filled by hand from a folder."""
    commit = "0" * 40
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for path in (root / "refs", root / "blobs", snapshot):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)


@pytest.fixture
def published(hub: Path, tmp_path: Path) -> Iterator[nn.Module]:
    """`timm/test_convnext.r160_in1k` in the cache, with weights of ours."""
    reference = timm_model("test_convnext", num_classes=1000)
    folder = saved_by_timm(tmp_path, reference)
    cached(hub, "timm/test_convnext.r160_in1k", folder)
    return reference


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"weights": None, "variant": "test_convnext.r160_in1k"}, id="variant with a tag"),
        pytest.param({"weights": None, "variant": "test-convnext"}, id="variant alone: timm's first tag"),
        pytest.param({"weights": "test_convnext.r160_in1k"}, id="weights by timm's name"),
        pytest.param({"weights": "timm:test_convnext"}, id="timm:"),
        pytest.param({"weights": "timm/test_convnext.r160_in1k", "variant": "test_convnext"}, id="both"),
        pytest.param({"weights": "hf-hub:timm/test_convnext.r160_in1k"}, id="hf-hub:"),
        pytest.param({"weights": "hf_hub:timm/test_convnext.r160_in1k"}, id="hf_hub:"),
    ],
)
def test_cached_weights_are_loaded_without_a_network(published: nn.Module, request_: dict[str, Any]) -> None:
    loaded = load(**request_)
    assert_equal_logits(loaded, published)
    assert loaded.weights.random is False
    assert loaded.weights.source in ("timm:test_convnext.r160_in1k", request_["weights"])
    assert loaded.weights.file_sha256 is not None
    assert loaded.weights.licence == "apache-2.0"
    theirs = timm.data.resolve_model_data_config(published)
    ours = msgspec.structs.asdict(loaded.preprocessing)
    assert ours.pop("assumed") == ()
    assert ours.pop("exif_orientation") is False
    assert ours == {key: theirs[key] for key in ours}
    assert loaded.model.spec.image_size == (160, 160)


def test_every_file_comes_from_one_commit_and_the_manifest_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: nn.Module
) -> None:
    """A fake hub, whose branch moves on between two downloads."""
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        folder = tmp_path / "models--someone--mine" / "snapshots" / commit
        shutil.copytree(saved_by_timm(tmp_path / commit, reference), folder)
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, filename: str, revision: str | None = None, local_files_only: bool = False) -> str:
        assert (repository, local_files_only) == ("someone/mine", False)
        asked.append((filename, revision))
        commit = revision if revision in commits else commits[len(asked) > 1]
        file = tmp_path / "models--someone--mine" / "snapshots" / commit / filename
        if not file.exists():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("hf-hub:someone/mine").weights.revision == "a" * 40
    assert [revision for _, revision in asked] == [None, *["a" * 40] * (len(asked) - 1)]
    asked.clear()
    loaded = load("hf-hub:someone/mine@v1.0")
    assert loaded.weights.revision == "a" * 40
    assert loaded.weights.source == "hf-hub:someone/mine@v1.0"
    assert asked[0][1] == "v1.0"
    assert load(f"hf-hub:someone/mine@{'b' * 40}").weights.revision == "b" * 40


def test_a_cached_repository_has_a_revision(hub: Path, tmp_path: Path, reference: nn.Module) -> None:
    cached(hub, "someone/mine", saved_by_timm(tmp_path, reference))
    assert load("hf-hub:someone/mine").weights.revision == "0" * 40
    assert load(f"hf-hub:someone/mine@{'0' * 40}").weights.revision == "0" * 40
    assert "is not cached" in refusal("hf-hub:someone/mine@v2")


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX-Repo-Commit: 1\r\nETag: a\r\n\r\n{}"],
    ids=["nothing", "another protocol", "cut off"],
)
def test_a_hub_whose_connection_breaks_is_one_line_and_the_cache_serves_what_it_has(
    answer: bytes, hub: Path, tmp_path: Path, reference: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own errors, of another package in every version: not all of them are OSError."""

    cached(hub, "someone/mine", saved_by_timm(tmp_path, reference))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with answering(answer) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{address}")
        assert load("hf-hub:someone/mine").weights.revision == "0" * 40
        assert "cannot be fetched from the hub and is not cached (" in refusal("hf-hub:someone/other")


def test_the_licence_comes_from_timm_where_the_repository_does_not_say(hub: Path, tmp_path: Path) -> None:
    folder = saved_by_timm(tmp_path, timm_model("convnextv2_atto", num_classes=1000))
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert cfg.pop("license") == "cc-by-nc-4.0"
    edit(folder / "config.json", pretrained_cfg=cfg)
    cached(hub, "timm/convnextv2_atto.fcmae_ft_in1k", folder)
    assert load(None, variant="v2-atto.fcmae_ft_in1k").weights.licence == "cc-by-nc-4.0"
    assert load("hf-hub:timm/convnextv2_atto.fcmae_ft_in1k").weights.licence is None


@pytest.mark.parametrize("shards", [pytest.param("1GB", id="one file"), pytest.param("20KB", id="sharded")])
def test_a_cached_repository_of_transformers_brings_its_image_processor(hub: Path, tmp_path: Path, shards: str) -> None:
    reference = saved_by_transformers(tmp_path, shards=shards)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 384}, resample=3).save_pretrained(tmp_path)
    cached(hub, "someone/convnext-384", tmp_path)
    loaded = load("hf-hub:someone/convnext-384")
    assert_equal_logits(loaded, reference)
    assert loaded.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode="squash")
    assert loaded.weights.source == "hf-hub:someone/convnext-384"


def test_a_cached_repository_of_pickles_is_loaded(hub: Path, tmp_path: Path, reference: nn.Module) -> None:
    cached(hub, "someone/old", saved_by_timm(tmp_path, reference, safe=False))
    assert_equal_logits(load("hf-hub:someone/old"), reference)


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"weights": None, "variant": "convnext_tiny.fb_in1k"}, id="variant with a tag"),
        pytest.param({"weights": None, "variant": "base"}, id="variant alone"),
        pytest.param({"weights": "convnext_tiny.fb_in1k"}, id="weights by timm's name"),
        pytest.param({"weights": "hf-hub:timm/convnext_tiny.fb_in1k"}, id="hf-hub:"),
    ],
)
def test_without_a_network_and_a_cache_there_are_no_weights(request_: dict[str, Any]) -> None:
    """Above all no random ones, which a benchmark would take without a word."""
    source = request_.pop("weights")
    message = refusal(source, **request_)
    assert "cannot be fetched from the hub and is not cached" in message
    assert "--weights FILE" in message
    assert "--weights random" in message


@pytest.mark.parametrize("lost", ["config.json", "preprocessor_config.json", "model.safetensors", "model-00002"])
def test_a_repository_that_is_cached_in_part_is_refused(hub: Path, tmp_path: Path, lost: str) -> None:
    saved_by_transformers(tmp_path, shards="20KB" if lost == "model-00002" else "1GB")
    transformers.ConvNextImageProcessor().save_pretrained(tmp_path)
    (file,) = tmp_path.glob(f"{lost}*")
    file.unlink()
    cached(hub, "someone/half", tmp_path)
    assert "cannot be fetched from the hub and is not cached" in refusal("hf-hub:someone/half")


def test_a_damaged_config_in_the_cache_is_refused(hub: Path, tmp_path: Path) -> None:
    folder = saved_by_timm(tmp_path)
    (folder / "config.json").write_text("<html>")
    cached(hub, "someone/odd", folder)
    assert "is not JSON" in refusal("hf-hub:someone/odd")


@pytest.mark.parametrize("name", ["", "a/b/c", "owner/", "no spaces/please", "../x", "owner/na..me"])
def test_what_is_no_hub_name_is_refused(name: str) -> None:
    message = refusal(f"hf-hub:{name}")
    assert message == f"hf-hub:{name} is not a hub name; expected hf-hub:owner/name or owner/name@revision"


def test_a_variant_that_nobody_trained_says_so() -> None:
    message = refusal(None, variant="convnext_atto_rms")
    assert message.startswith("timm publishes no weights 'convnext_atto_rms'")
    assert "--weights random" in message


def test_an_unknown_tag_gives_those_that_exist() -> None:
    message = refusal(None, variant="convnext_base.in21k")
    assert message.startswith("timm publishes no weights 'convnext_base.in21k'; it has ")
    for tag in ("fb_in1k", "fb_in22k_ft_in1k", "clip_laion2b"):
        assert f"convnext_base.{tag}" in message


def test_two_names_that_contradict_each_other_are_refused() -> None:
    message = refusal("convnext_tiny.fb_in1k", variant="base")
    assert "--weights convnext_tiny.fb_in1k is not a convnext_base" in message


def test_cached_weights_of_another_variant_are_refused(published: nn.Module) -> None:
    message = refusal("hf-hub:timm/test_convnext.r160_in1k", variant="convnext_atto")
    assert "is not a convnext_atto" in message
    assert "it fits test_convnext" in message


def test_every_published_name_is_found() -> None:
    """Every weight timm lists for these architectures is asked for at the hub under timm's own repository name."""
    for full in timm.list_pretrained("*convnext*"):
        name, _, tag = full.partition(".")
        if name in registry.VARIANTS:
            with pytest.raises(WeightsError, match="cannot be fetched from the hub"):
                checkpoint.load(None, variant=f"{name}.{tag}")


def test_a_text_that_is_no_checkpoint_is_refused_without_advice_to_run_code(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint of plain tensors") as caught:
        load(str(path))
    assert "weights_only" not in str(caught.value)
