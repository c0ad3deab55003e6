"""`--task segment` from end to end: what is exported, and what no format and no other verb takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segmenters import CLASSES, saved, upernet

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.data import preprocess
from convnext_deploy.errors import UsageError
from convnext_deploy.formats import get
from convnext_deploy.records.base import Precision


@pytest.fixture(scope="module")
def model() -> Any:
    return upernet()


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(model, tmp_path_factory.mktemp("upernet"))


def exported(checkpoint: str, out: Path, **arguments: Any) -> Any:
    return api.export(checkpoint, task="segment", out=out, batch=(1, 2, 4), **arguments)


def photographs(size: tuple[int, int] = (64, 64)) -> Any:
    return preprocess.probe_images(3, size, 2)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "eager"])
def test_an_artifact_gives_transformers_logits(format: str, model: Any, checkpoint: str, tmp_path: Path) -> None:
    made = exported(checkpoint, tmp_path / "made", format=format)
    found = made.manifest
    assert found.oracle is not None
    assert found.oracle.name.startswith("transformers")
    assert found.read_back is not None
    assert not found.read_back.failures
    assert found.outputs[0].shape == ("batch", CLASSES, 16, 16)
    assert found.parity[0].top1_agreement == 1.0
    images = preprocess.as_input(photographs(), found.preprocessing, "float32")
    logits = convnext_deploy.load(made.path).run(images.astype(np.float32))[0]  # type: ignore[arg-type]
    with torch.inference_mode():
        expected = model.decode_head(model.backbone(torch.from_numpy(images)).feature_maps).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "openvino"])
def test_classes_of_any_size_from_raw_pixels(format: str, model: Any, checkpoint: str, tmp_path: Path) -> None:
    """Resizing, the choice of the class and the normalization in the graph, verified at three sizes."""
    made = exported(checkpoint, tmp_path / "made", format=format, argmax=True, input="uint8", dynamic_image_size=True)
    assert {parity.image_size for parity in made.manifest.parity} == {(64, 64), (32, 32), (191, 255)}
    pixels = photographs((70, 101))
    classes = convnext_deploy.load(made.path).run(pixels.transpose(0, 2, 3, 1))[0]
    assert (classes.dtype, classes.shape) == (np.int32, (2, 70, 101))
    images = preprocess.as_input(pixels, made.manifest.preprocessing, "float32")
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).logits.argmax(1).numpy()
    assert (classes == expected).mean() > 0.999


@pytest.mark.parametrize(
    ("format", "precision"),
    [
        pytest.param("onnx", "fp16", marks=pytest.mark.slow),
        pytest.param("openvino", "bf16", marks=pytest.mark.slow),
        ("eager", "bf16"),
        pytest.param("torchscript", "fp32", marks=pytest.mark.slow),
        pytest.param("pt2", "fp32", marks=pytest.mark.slow),
        pytest.param("aotinductor", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_head_is_in_the_type_that_was_asked_for(
    format: str, precision: Precision, checkpoint: str, tmp_path: Path
) -> None:
    made = exported(checkpoint, tmp_path / "made", format=format, precision=precision)
    assert all(not parity.failures for parity in made.manifest.parity)


def test_a_changed_class_of_one_pixel_fails_the_verification(checkpoint: str, tmp_path: Path) -> None:
    from convnext_deploy.artifact import verify

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 8, 8)).astype(np.float32)
    from convnext_deploy.artifact.label_maps import classes_of

    classes = np.stack([classes_of(one, (32, 32)) for one in logits])
    limit = verify.TOLERANCES["fp32"]
    assert not verify.compare((classes,), (logits,), limit, "images", classify=True).failures  # type: ignore[arg-type]
    classes[1, 3, 4] = (classes[1, 3, 4] + 1) % 5
    (failure,) = verify.compare((classes,), (logits,), limit, "images", classify=True).failures  # type: ignore[arg-type]
    assert failure == "the classes of 1 of 2048 pixels that are no near-ties differ"
    classes[1, 3, 4] = 5
    (failure,) = verify.compare((classes,), (logits,), limit, "images", classify=True).failures  # type: ignore[arg-type]
    assert "a class that the model has not" in failure


def test_a_format_without_the_heads_operations_refuses_in_one_line(checkpoint: str, tmp_path: Path) -> None:
    assert "segment" not in get("native").tasks
    with pytest.raises(UsageError, match="does not take --task segment") as raised:
        exported(checkpoint, tmp_path / "made", format="native")
    assert "onnx" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_verbs_of_the_network_alone_refuse_segmenters(tmp_path: Path) -> None:
    task: Any = "segment"
    for call in (
        lambda: api.quantize(
            "random", variant="atto", task=task, target="onnx", calibration="x", out=tmp_path / "plan.json"
        ),
        lambda: api.half("random", variant="atto", task=task, data="x", out=tmp_path / "half.json"),
        lambda: api.roofline("atto", task=task, device="a100"),
    ):
        with pytest.raises(UsageError, match="segment; expected one of classify, embed, features"):
            call()


def test_the_option_of_pixels_is_for_segmenters(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--argmax is for the pixels of --task segment"):
        api.export("random", variant="atto", argmax=True, out=tmp_path / "made")
