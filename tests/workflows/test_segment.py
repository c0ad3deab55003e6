"""`--task segment` from end to end: what is exported, and what no format and no other verb takes."""

import json
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from segmenters import CLASSES, intersections_over_unions, saved, upernet

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.accuracy import probes
from convnext_deploy.data import preprocess
from convnext_deploy.errors import DataError, UsageError
from convnext_deploy.formats import get
from convnext_deploy.records.accuracy import ScoreResult, ScoreVerdict
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import ExportSpec, ModelSpec, Segmentation
from convnext_deploy.workflows.predicted_masks import places


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


@pytest.mark.slow
def test_an_engine_of_tensorrt_rtx_is_built_without_a_gpu_and_its_stand_in_gives_the_classes(
    checkpoint: str, tmp_path: Path, need_format: Any
) -> None:
    need_format("tensorrt_rtx")
    made = exported(checkpoint, tmp_path / "made", format="tensorrt_rtx", argmax=True, precision="fp16").manifest
    assert all(not parity.failures for parity in made.parity)
    assert made.outputs[0].dtype == "int32"
    assert made.precision.graph["fp16"] > 0.99


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
        lambda: api.half("random", variant="atto", task=task, data="x", out=tmp_path / "half.json"),
        lambda: api.roofline("atto", task=task, device="a100"),
    ):
        with pytest.raises(UsageError, match="segment; expected one of classify, embed, features"):
            call()


def test_the_option_of_pixels_is_for_segmenters(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--argmax is for the pixels of --task segment"):
        api.export("random", variant="atto", argmax=True, out=tmp_path / "made")


def test_a_segmenter_of_one_output_has_no_class_of_a_pixel(labelled: Path, tmp_path: Path) -> None:
    checkpoint = saved(upernet(num_labels=1), tmp_path / "one")
    with pytest.raises(UsageError, match=r"--argmax: the segmenter has one output, .* decide on its"):
        exported(checkpoint, tmp_path / "classes", format="eager", argmax=True)
    made = exported(checkpoint, tmp_path / "logits", format="eager")
    assert convnext_deploy.load(made.path).run(np.zeros((1, 3, 64, 64), np.float32))[0].shape == (1, 1, 16, 16)
    with pytest.raises(UsageError, match="the segmenter has one output"):
        api.evaluate(made.path, labelled, annotations=labelled)


def test_the_largest_batch_that_is_verified_fits_the_heads_widest_map() -> None:
    """Four maps of 512 channels at a quarter of 512 pixels are 134 MB an image, five times the backbone's widest."""
    head = Segmentation(channels=512)
    model = ModelSpec(
        architecture="a", depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), task="segment", segmentation=head
    )
    pixels = np.broadcast_to(np.zeros((), np.uint8), (16, 3, 512, 512))
    assert probes.batches(model, ExportSpec(format="onnx"), probes.Probe("", pixels, ())) == (1, 8)


# What is done with an artifact ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(checkpoint, tmp_path_factory.mktemp("eager") / "made", format="eager")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, and masks of the same."""
    folder, generator = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for number in range(7):
        sides = (70 + 5 * number, 90 - 3 * number)
        (pixels,) = preprocess.probe_images(3, sides, number + 1)[number:]
        mask = np.kron(generator.integers(0, CLASSES, (11, 10)), np.ones((10, 10)))[: sides[0], : sides[1]]
        mask[:3] = 255
        for kind, array in (("images", pixels.transpose(1, 2, 0)), ("masks", mask.astype(np.uint8))):
            (folder / kind / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / "a" / f"{number}.png")
    return folder


def test_eval_is_transformers_answers_and_the_definitions_score(
    eager: Any, model: Any, labelled: Path, tmp_path: Path
) -> None:
    """Preprocessing, network and resizing to the masks by transformers; the score by its definition."""
    found = api.evaluate(
        eager.path, labelled / "images", annotations=labelled / "masks", out=tmp_path / "result", batch=2
    )
    assert isinstance(found, ScoreResult)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    wanted, given = [], []
    for file in sorted((labelled / "images/a").iterdir()):
        mask = np.asarray(Image.open(labelled / "masks/a" / file.name))
        with torch.inference_mode():
            answer = model(**processor(Image.open(file), return_tensors="pt"))
        (classes,) = processor.post_process_semantic_segmentation(answer, [mask.shape])
        wanted.append(mask[mask != 255])
        given.append(classes.numpy()[mask != 255])
    expected = np.mean(intersections_over_unions(np.concatenate(wanted), np.concatenate(given), range(CLASSES)))
    # transformers resizes pixels with another library, by a level or two at edges.
    assert found.score == pytest.approx(expected, abs=0.01)
    assert found.images == 7
    assert found.pixel_accuracy is not None
    assert [one.name for one in found.per_output] == list(eager.manifest.labels)
    files = sorted((labelled / "images/a").iterdir())
    table = {"image": list(map(str, files)), "annotation": [str(labelled / "masks/a" / file.name) for file in files]}
    kinds = datasets.Features(dict.fromkeys(table, datasets.Image()))
    in_memory = api.evaluate(eager.path, datasets.Dataset.from_dict(table, features=kinds), batch=2)
    assert isinstance(in_memory, ScoreResult)
    assert (in_memory.score, in_memory.per_output) == (found.score, found.per_output)
    assert "masks: the column annotation (--annotations otherwise)" in in_memory.notes
    rows = [f"images/a/{file.name},masks/a/{file.name}" for file in files]
    (labelled / "list.csv").write_text("\n".join(["image,mask", *rows]))
    for given_as in (
        {"data": labelled / "list.csv"}, {"data": labelled / "list.csv", "annotations": "mask"},
        {"data": labelled, "annotations": labelled / "list.csv"},
    ):  # fmt: skip
        of_list = api.evaluate(eager.path, **given_as, batch=2)
        assert isinstance(of_list, ScoreResult)
        assert (of_list.score, of_list.per_output) == (found.score, found.per_output)
    again = api.gate(tmp_path / "result.json", tmp_path / "result.json", limits={"max_drop": 1.0})
    assert isinstance(again, ScoreVerdict)
    assert again.decision == "INCONCLUSIVE"  # seven images show nothing


def test_predicted_masks_are_the_images_size_and_evaluate_to_100_percent(
    eager: Any, labelled: Path, tmp_path: Path
) -> None:
    result = api.predict(eager.path, labelled / "images", out=tmp_path / "masks")
    assert result.problem == "segmentation"
    for one in result.predictions:
        assert one.mask is not None
        with Image.open(one.mask) as mask, Image.open(labelled / "images" / one.image) as image:
            assert mask.size == image.size
        assert sum(area.share for area in one.areas) == pytest.approx(1)
    found = api.evaluate(eager.path, labelled / "images", annotations=tmp_path / "masks")
    assert isinstance(found, ScoreResult)
    assert (found.score, found.pixel_accuracy) == (1.0, 1.0)
    (file,) = api.predict(eager.path, labelled / "images/a/1.png", out=tmp_path / "one.png").predictions
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "masks/a/1.png").read_bytes()
    assert file.mask == str(tmp_path / "one.png")
    with pytest.raises(UsageError, match="is one mask, and there are 7 images"):
        api.predict(eager.path, labelled / "images", out=tmp_path / "two.png")


def test_a_server_answers_with_the_class_of_each_pixel(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from server_process import serving

    made = exported(checkpoint, tmp_path / "made", format="eager", argmax=True, input="uint8")
    pixels = photographs().transpose(0, 2, 3, 1)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    with serving(f"m={made.path}") as running:
        status, answer, _ = running.ask("POST", "/v2/models/m/infer", json.dumps({"inputs": [tensor]}).encode())
        refused, words, _ = running.ask("POST", "/classify", b"")
    assert status == 200
    (found,) = answer["outputs"]
    assert (found["name"], found["datatype"], found["shape"]) == ("classes", "INT32", [2, 64, 64])
    assert found["data"] == convnext_deploy.load(made.path).run(pixels)[0].ravel().tolist()
    assert (refused, words["error"]) == (400, "m has no classes; its outputs are at /v2/models/m/infer")


def test_optimize_says_what_to_do_with_a_segmenter_and_with_masks(
    checkpoint: str, labelled: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"optimize judges top-1: .* export it with --task features, segment or detect"
    ):
        api.optimize(checkpoint, data=labelled / "images", out=tmp_path / "best")
    with pytest.raises(DataError, match="masks are for a segmenter, which `eval` and `gate` judge"):
        api.optimize(checkpoint, data=labelled / "images", annotations=labelled / "masks", out=tmp_path / "best")


def test_two_images_of_one_name_and_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the masks of a\.jpg and a\.png would both be"):
        places(tmp_path, ["a.jpg", "a.png"])
    assert places(tmp_path, ["../../etc/x.jpg", "/b/y.png"]) == [tmp_path / "etc/x.png", tmp_path / "b/y.png"]


def test_options_of_masks_are_for_segmenters_and_those_of_classifiers_are_not(eager: Any, labelled: Path) -> None:
    images = labelled / "images"
    with pytest.raises(DataError, match="give --annotations FOLDER with a mask for each image"):
        api.evaluate(eager.path, images)
    with pytest.raises(UsageError, match="--problem multi-label is for a classifier's outputs"):
        api.evaluate(eager.path, images, problem="multi-label")
    with pytest.raises(UsageError, match="masks contain the numbers of classes"):
        api.evaluate(eager.path, images, annotations=labelled / "masks", labels=labelled / "names.txt")
