"""`--task detect` from end to end: what is exported, evaluated and predicted, and what is refused."""

import argparse
import json
import re
from pathlib import Path
from typing import Any, cast

import detectors
import numpy as np
import pytest
import torch
from detectors import CHANNELS, CLASSES, body, detector, drawn, found_by, on_timm, saved
from references import DIMS
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.accuracy import canary
from convnext_deploy.artifact import instance_masks
from convnext_deploy.artifact.session import Session
from convnext_deploy.data import preprocess
from convnext_deploy.errors import DataError, UsageError, WeightsError
from convnext_deploy.formats import get
from convnext_deploy.models import given, provenance
from convnext_deploy.models.checkpoint import load
from convnext_deploy.records.accuracy import ScoreResult
from convnext_deploy.records.manifest import Preprocessing

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model() -> Any:
    return detector()


def exported(weights: Any, out: Path, **arguments: Any) -> Any:
    return api.export(weights, task="detect", out=out, batch=(1, 2, 4), **{"image_size": SIZE} | arguments)


def run(artifact: Any, pixels: Any) -> tuple[Any, ...]:
    facts = artifact.manifest
    return convnext_deploy.load(artifact.path).run(preprocess.as_input(pixels, facts.preprocessing, facts.export.input))


def assert_equal(found: tuple[Any, ...], expected: list[dict[str, torch.Tensor]]) -> None:
    boxes, scores, labels = found[:3]
    for index, one in enumerate(expected):
        count = len(one["scores"])
        assert (scores[index] > 0).sum() == count
        assert np.abs(scores[index, :count] - one["scores"].numpy()).max() < 1e-5
        assert np.abs(boxes[index, :count] - one["boxes"].numpy()).max() < 1e-3
        assert (labels[index, :count] == one["labels"].numpy()).all()
        assert (labels[index, count:] == -1).all()
        assert not boxes[index, count:].any()


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("retinanet", "eager"),
        ("fcos", "eager"),
        pytest.param("faster_rcnn", "eager", marks=pytest.mark.slow),  # a Mask R-CNN has its two stages
        ("mask_rcnn", "eager"),
        ("retinanet", "onnx"),
        pytest.param("mask_rcnn", "onnx", marks=pytest.mark.slow),  # with the first stage of a Faster R-CNN too
        pytest.param("fcos", "onnx", marks=pytest.mark.slow),
        pytest.param("fcos", "openvino", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", "openvino", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_finds_what_torchvision_finds(
    kind: str, format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = detector(kind)
    shared = {("retinanet", "eager"): "eager", ("mask_rcnn", "eager"): "with_masks"}.get((kind, format))
    made = request.getfixturevalue(shared) if shared else exported(model, tmp_path / "made", format=format)
    facts = made.manifest
    assert facts.oracle is not None
    assert facts.oracle.name.startswith("torchvision")
    assert facts.oracle.relative_error is not None
    assert facts.read_back is not None
    assert not facts.read_back.failures
    assert facts.parity[0].top1_agreement == 1.0
    masks = ["masks"] if kind == "mask_rcnn" else []
    assert [output.name for output in facts.outputs] == ["boxes", "scores", "labels", *masks]
    pixels = preprocess.probe_images(3, SIZE, 2)
    found = run(made, pixels)
    expected = found_by(model, pixels)
    assert_equal(found, expected)
    for index, one in enumerate(expected if masks else ()):
        count = len(one["masks"])
        assert not found[3][index, count:].any()
        pasted = instance_masks.pasted(found[3][index, :count], found[0][index, :count], SIZE)
        assert np.abs(pasted - one["masks"][:, 0].numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("retinanet", "eager"),
        pytest.param("mask_rcnn", "eager", marks=pytest.mark.slow),
        pytest.param("retinanet", "onnx", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", "openvino", marks=pytest.mark.slow),  # which reads the ONNX graph of this size
    ],
)
def test_an_artifact_of_any_size_finds_what_torchvision_finds(kind: str, format: str, tmp_path: Path) -> None:
    """Sides that are no multiples of 32 are filled up, and boxes end at the image."""
    made = exported(detector(kind), tmp_path / "made", format=format, dynamic_image_size=True)
    assert {parity.image_size for parity in made.manifest.parity} == {SIZE, (32, 32), (191, 255)}
    pixels = preprocess.probe_images(3, (70, 101), 2)
    assert_equal(run(made, pixels), found_by(detector(kind, min_size=70, max_size=101), pixels))


@pytest.mark.parametrize(
    "arguments",
    [
        {"first": 2, "extra": LastLevelP6P7(64, 64)},  # P3 to P7, P6 made of P5
        {"first": 2, "extra": LastLevelP6P7(40, 64)},  # P6 made of the backbone's last map
        {"kind": "fcos", "first": 2, "extra": LastLevelP6P7(64, 64)},
    ],
)
def test_pyramids_with_more_levels_are_torchvisions(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = detector(**arguments)
    made = exported(model, tmp_path / "made", format="eager", image_size=(64, 93))
    pixels = preprocess.probe_images(3, (64, 93), 2)
    assert_equal(run(made, pixels), found_by(model, pixels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format", "precision"),
    [
        ("retinanet", "onnx", "fp16"),
        ("retinanet", "openvino", "bf16"),
        ("retinanet", "eager", "bf16"),
        ("mask_rcnn", "openvino", "bf16"),  # its first stage chooses in bf16 what its second looks at
    ],
)
def test_half_precision_is_verified_beside_the_same_type(
    kind: str, format: str, precision: Any, tmp_path: Path
) -> None:
    made = exported(detector(kind), tmp_path / "made", format=format, precision=precision)
    assert [parity.reference for parity in made.manifest.parity] == ["source", "type"]
    assert not any(parity.failures for parity in made.manifest.parity)
    assert {parity.top1_agreement for parity in made.manifest.parity} == {1.0}  # of detections


def test_timms_convnext_below_the_pyramid_is_found(tmp_path: Path) -> None:
    model = on_timm()
    made = exported(model, tmp_path / "made", format="eager")
    assert made.manifest.weights.layout == "timm_features"
    assert made.manifest.oracle.name.startswith("torchvision")
    pixels = preprocess.probe_images(3, SIZE, 2)
    assert_equal(run(made, pixels), found_by(model, pixels))


def test_raw_pixels_of_whole_tiles_are_taken(model: Any, tmp_path: Path) -> None:
    made = exported(model, tmp_path / "made", format="eager", input="uint8")
    pixels = preprocess.probe_images(3, SIZE, 2)
    assert_equal(run(made, pixels), found_by(model, pixels))


def test_raw_pixels_that_have_to_be_filled_up_are_refused(model: Any, tmp_path: Path) -> None:
    """The mean of the training images is between two numbers of a byte."""
    with pytest.raises(UsageError, match="multiples of 32"):
        exported(model, tmp_path / "made", format="eager", input="uint8", image_size=(64, 90))


def test_a_state_dict_says_what_is_assumed(model: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    file = saved(model, tmp_path / "model.pth")
    made = exported(file, tmp_path / "made", format="eager", say=lines.append)
    (assumed,) = (line for line in lines if line.startswith("assumed"))
    for name in ("anchor_sizes", "score_thresh 0.05", "nms_thresh 0.5", "min_size 800", "mean"):
        assert name in assumed
    assert made.manifest.provenance["nms_thresh"].how == "assumed"


@pytest.mark.parametrize(
    ("content", "how"), [({"min_size": 64, "max_size": 96}, "known"), ({"min_size": 800, "nms_thresh": 0.4}, "assumed")]
)
def test_an_image_size_is_known_where_both_of_its_sides_are(
    content: dict[str, Any], how: str, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "detector.json").write_text(json.dumps(content))
    loaded = load(saved(model, tmp_path / "model.pth"), task="detect", config=tmp_path / "detector.json")
    assert loaded.provenance["image_size"].how == how
    assert ("image_size" in loaded.preprocessing.assumed) == (how == "assumed")


def test_a_configuration_says_what_the_tensors_do_not(model: Any, tmp_path: Path) -> None:
    config = tmp_path / "detector.json"
    labels = ["background", "red", "blue", "green"]
    config.write_text(json.dumps({"score_thresh": 0.7, "nms_thresh": 0.3, "detections_per_img": 7, "labels": labels}))
    file = saved(model, tmp_path / "model.pth")
    made = exported(file, tmp_path / "made", format="eager", config=config)
    assert made.manifest.labels == tuple(labels)
    assert made.manifest.outputs[0].shape == ("batch", 7, 4)
    assert made.manifest.provenance["nms_thresh"].how == "known"
    pixels = preprocess.probe_images(3, SIZE, 2)
    wanted = detector(score_thresh=0.7, nms_thresh=0.3, detections_per_img=7)
    assert_equal(run(made, pixels), found_by(wanted, pixels))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("topk_candidates", 9),
        ("min_size", 64),
        ("max_size", 96),
        ("aspect_ratios", [0.5, 1.0, 4.0]),
        ("labels", ["background", "red", "blue", "green"]),
        ("image_mean", [0.1, 0.2, 0.3]),
    ],
)
def test_each_name_of_a_configuration_may_stand_alone(name: str, value: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "detector.json").write_text(json.dumps({name: value}))
    file = saved(model, tmp_path / "model.pth")
    loaded = load(file, task="detect", image_size=SIZE, config=tmp_path / "detector.json")
    said = loaded.provenance[name.removeprefix("image_")]
    assert said.how == "known", said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"score_tresh": 0.3}, "says nothing that is known here"),
        ({"min_size": 64, "score_tresh": 0.3}, "unknown name 'score_tresh'"),
        ({"score_tresh": 0.3, "nms_thresh": 0.5}, "unknown name 'score_tresh'"),
        ({"anchor_sizes": [[32], [64], [128]]}, "5 levels"),
        ({"anchor_sizes": [[8], [16], [32], [64], [128]]}, "say anchor_sizes and aspect_ratios"),
        ({"anchor_sizes": 32}, "5 levels, and the anchor_sizes are of 32"),
        ({"anchor_sizes": [[8]] * 5, "aspect_ratios": [[1.0]] * 4}, "5 levels, and the aspect_ratios are of 4"),
        ({"score_thresh": 2}, "what is said of its detector"),
        ({"score_thresh": 0.5, "labels": ["red"]}, "1 label for 4 classes"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    content: dict[str, Any], reason: str, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "detector.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=reason) as raised:
        exported(
            saved(model, tmp_path / "model.pth"), tmp_path / "made", format="eager", config=tmp_path / "detector.json"
        )
    assert "\n" not in str(raised.value)


def test_maps_from_the_middle_of_a_stage_are_refused() -> None:
    """They have a stage's width, so that nothing else would tell."""
    backbone = BackboneWithFPN(body(), {"4": "0", "7": "1"}, [DIMS[2], DIMS[3]], CHANNELS)
    with pytest.raises(WeightsError, match=r"takes the map behind layer 4 of .* expected those at the end of a stage"):
        given.weights("weights", RetinaNet(backbone, CLASSES))


def test_of_two_stages_that_are_alike_none_is_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detectors, "DIMS", (32, 64, 64, 128))
    for first, levels in ((1, (1, 2, 3, 4)), (2, None)):
        file = detectors.saved(detectors.detector(first=first), tmp_path / f"{first}.pth")
        if levels is None:
            with pytest.raises(WeightsError, match="a map of 64 channels, and two stages of the ConvNeXt have as many"):
                load(file, task="detect")
        else:
            assert load(file, task="detect").model.spec.levels == levels


def test_a_state_dict_of_two_stages_says_what_is_assumed(tmp_path: Path) -> None:
    config = tmp_path / "detector.json"
    config.write_text(json.dumps({"box_detections_per_img": 5, "rpn_nms_thresh": 0.6}))
    file = saved(detector("mask_rcnn"), tmp_path / "model.pth")
    loaded = load(file, task="detect", image_size=SIZE, config=config)
    (assumed,) = (line for line in provenance.lines(loaded.provenance) if line.startswith("assumed"))
    for name in ("anchor_sizes", "box_score_thresh 0.05", "rpn_pre_nms_top_n_test 1000", "sampling_ratio 2"):
        assert name in assumed
    assert loaded.provenance["rpn_nms_thresh"].how == "known"
    loaded.model.puts_out_detections = True
    with torch.inference_mode():
        outputs = loaded.model.eval()(torch.zeros(1, 3, *SIZE))
    assert [output.shape[1:] for output in outputs] == [(5, 4), (5,), (5,), (5, 28, 28)]


def test_other_detectors_and_other_files_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    state, two = model.state_dict(), detector("mask_rcnn").state_dict()
    for changed, reason in (
        (two | {"roi_heads.keypoint_head.0.weight": torch.zeros(1)}, "is a Keypoint R-CNN"),
        (two | {"roi_heads.box_head.0.0.weight": torch.zeros(1)}, "FastRCNNConvFCHead"),
        (two | {"roi_heads.mask_head.0.1.weight": torch.zeros(1)}, "norms in its mask head"),
        (two | {"roi_heads.box_head.fc6.weight": torch.zeros(1024, 100)}, "no square of places"),
        (two | {"roi_heads.box_predictor.cls_score.weight": torch.zeros(1, 128)}, "1 class, which is the background"),
        ({name: value for name, value in two.items() if "box_predictor" not in name}, "lacks a 2-dimensional"),
        ({name: value for name, value in state.items() if ".fpn." not in name}, "BackboneWithFPN"),
        (state | {"head.classification_head.conv.0.1.running_mean": torch.zeros(1)}, "of a norm"),
    ):
        with pytest.raises(WeightsError, match=reason) as raised:
            exported(changed, tmp_path / "made", format="eager")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "name"), [("mask_rcnn", "score_thresh"), ("retinanet", "box_score_thresh"), ("fcos", "sampling_ratio")]
)
def test_a_name_of_another_kind_of_detector_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    """It would be left out without a word, and the threshold would be another than was asked for."""
    (tmp_path / "detector.json").write_text(json.dumps({name: 0.3}))
    file = saved(detector(kind), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=f"{name} is no name of a {kind}; expected some of anchor_sizes"):
        load(file, task="detect", config=tmp_path / "detector.json")


def test_regions_that_are_cut_out_in_another_way_are_refused() -> None:
    model = detector("mask_rcnn")
    for cutter, name, value, reason in (
        (model.roi_heads.box_roi_pool, "canonical_scale", 112, "canonical_scale 112, expected 224"),
        (model.roi_heads.mask_roi_pool, "sampling_ratio", 4, "sampling_ratio 4, expected 2"),
        (
            model.roi_heads.box_roi_pool,
            "featmap_names",
            list("012"),
            r"\['0', '1', '2'\], expected \['0', '1', '2', '3'\]",
        ),
        (model.roi_heads.mask_roi_pool, "featmap_names", [*"0123", "pool"], r"'3', 'pool'\], expected .*, '3'\]"),
        (model.roi_heads.mask_roi_pool, "output_size", (7, 7), "output_size 7 for masks, expected 14"),
    ):
        before = getattr(cutter, name)
        setattr(cutter, name, value)
        with pytest.raises(WeightsError, match=reason):
            given.weights("weights", model)
        setattr(cutter, name, before)


@pytest.mark.parametrize(
    ("wrapped", "note"),
    [
        (  # torchvision's own training script
            lambda state: {"model": state, "optimizer": {}, "epoch": 25, "args": argparse.Namespace(lr=0.02)},
            "",
        ),
        (lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}}, ""),  # Lightning
        (
            lambda state: {
                "model": {f"module._orig_mod.{key}": torch.zeros_like(value) for key, value in state.items()},
                "model_ema": {"n_averaged": torch.tensor(5)} | {f"module.{key}": state[key] for key in state},
            },
            "taking model_ema",
        ),
    ],
)
def test_a_detector_in_the_wrappers_of_training_is_the_detector(wrapped: Any, note: str, tmp_path: Path) -> None:
    model = detector("mask_rcnn")
    torch.save(wrapped(model.state_dict()), tmp_path / "checkpoint.pth")
    plain, loaded = (
        load(source, task="detect", image_size=SIZE)
        for source in (saved(model, tmp_path / "plain.pth"), str(tmp_path / "checkpoint.pth"))
    )
    assert loaded.weights.tensors_sha256 == plain.weights.tensors_sha256
    assert loaded.model.spec == plain.model.spec
    assert note in (loaded.note or "")


@pytest.mark.parametrize(
    ("kind", "thresholds", "why"),
    [
        ("retinanet", {"score_thresh": 0.999}, "score_thresh 0.999"),
        ("faster_rcnn", {"box_score_thresh": 0.999}, "box_score_thresh 0.999"),  # and not a logit of the first stage
        ("faster_rcnn", {"rpn_score_thresh": 0.99999}, "its first stage proposes no region, rpn_score_thresh 0.99999"),
    ],
)
def test_nothing_to_find_is_refused_before_the_build(
    kind: str, thresholds: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """An artifact that finds nothing either would prove nothing."""
    model = detector(kind, **thresholds)
    with pytest.raises(DataError, match="detects nothing on the 4 images") as raised:
        exported(model, tmp_path / "made", format="eager")
    assert why in str(raised.value)
    assert "--verify-data" in str(raised.value)
    score = re.search(r"highest score ([\d.e+-]+),", str(raised.value))
    if score is not None:
        least: dict[str, Any] = dict.fromkeys(thresholds, 0.0)
        images = preprocess.probe_images(3, SIZE, 4)
        highest = max(float(one["scores"].max()) for one in found_by(detector(kind, **least), images))
        assert float(score[1]) == pytest.approx(highest, rel=1e-2)


@pytest.mark.parametrize("format", ["native", "torchscript", "pt2", "aotinductor"])
def test_formats_that_were_not_tried_refuse_in_one_line(format: str, model: Any, tmp_path: Path) -> None:
    assert "detect" not in get(format).tasks
    with pytest.raises(UsageError, match="does not take --task detect") as raised:
        exported(model, tmp_path / "made", format=format)
    assert "onnx" in str(raised.value)
    assert "\n" not in str(raised.value)


# What is done with an artifact ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(model, tmp_path_factory.mktemp("eager") / "made", format="eager")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return drawn(tmp_path_factory.mktemp("drawn"), 7)


def test_predict_gives_boxes_in_the_pixels_of_each_image(
    eager: Any, labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    """The pixels that a box is in are those of the file, whatever the image was resized to."""
    from PIL import Image

    result = api.predict(eager.path, str(labelled[0]), top=3, out=tmp_path / "found.csv")
    assert result.problem == "detection"
    with Image.open(labelled[0] / "001.png") as image:
        facts = eager.manifest.preprocessing
        boxes, scores, labels = run(eager, preprocess.transform(facts, SIZE, 3)(image)[None])
        sides = (image.height, image.width)
    resized = preprocess.fitted_sides(sides, SIZE)
    assert resized[1] < SIZE[1]  # the rest is filled up
    for index, box in enumerate(result.predictions[1].boxes):
        assert box.number == labels[0, index]
        assert box.score == pytest.approx(scores[0, index], abs=1e-6)
        scale = np.array([sides[1] / resized[1], sides[0] / resized[0]] * 2)
        wanted = np.clip(boxes[0, index] * scale, 0, [sides[1], sides[0]] * 2)
        assert (box.left, box.top, box.right, box.bottom) == pytest.approx(wanted.tolist(), abs=1e-3)
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert lines[0] == "image,rank,number,name,score,left,top,right,bottom"
    assert len(lines) == 1 + 3 * 7


@pytest.mark.parametrize("sides", [(61, 89), (480, 640), (500, 333), (20, 30)])
def test_images_are_resized_as_torchvision_resizes_them(sides: tuple[int, int], model: Any) -> None:
    """But for the rounding to whole numbers of a byte."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3)).astype(np.uint8)
    facts = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="fit")
    found = preprocess.transform(facts, SIZE, 3)(Image.fromarray(pixels))
    scale = min(np.float32(SIZE[0]) / np.float32(sides[0]), np.float32(SIZE[1]) / np.float32(sides[1]))
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
        scale_factor=float(scale),
        mode="bilinear",
        recompute_scale_factor=True,
        align_corners=False,
    )[0].numpy()
    height, width = wanted.shape[1:]
    assert preprocess.fitted_sides(sides, SIZE) == (height, width)
    assert np.abs(found[:, :height, :width] - wanted).max() <= 0.502
    rest = np.array([124, 116, 104])[:, None]
    assert (found[:, height:].reshape(3, -1) == rest).all()
    assert (found[:, :, width:].reshape(3, -1) == rest).all()


def test_eval_gives_cocos_average_precision_and_resumes(
    eager: Any, labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools")
    images, file = labelled
    result = api.evaluate(eager.path, str(images), annotations=file, out=tmp_path / "result")
    assert isinstance(result, ScoreResult)
    assert result.problem == "detection"
    assert result.images == 7
    assert result.average_precision_50 is not None
    assert 0 <= result.score <= result.average_precision_50 <= 1
    again = api.gate(baseline=tmp_path / "result.json", candidate=tmp_path / "result.json", limits={"max_drop": 5})
    assert again.baseline_score == again.candidate_score  # type: ignore[union-attr]


def test_eval_says_what_a_detector_needs(eager: Any, labelled: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="is a detector; give --annotations FILE"):
        api.evaluate(eager.path, str(labelled[0]))
    with pytest.raises(UsageError, match="the model is a detector"):
        api.evaluate(eager.path, str(labelled[0]), annotations=labelled[1], problem="multi-label")


@pytest.fixture(scope="module")
def with_masks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(detector("mask_rcnn"), tmp_path_factory.mktemp("masks") / "made", format="eager")


def test_predict_gives_masks_as_run_lengths(with_masks: Any, labelled: tuple[Path, Path], tmp_path: Path) -> None:
    result = api.predict(with_masks.path, str(labelled[0] / "001.png"), top=3, out=tmp_path / "result.json")
    again = json.loads((tmp_path / "result.json").read_text())["predictions"][0]["boxes"]
    inside = 0
    for box, kept in zip(result.predictions[0].boxes, again, strict=True):
        assert box.mask is not None
        assert kept["mask"]["counts"] == list(box.mask.counts)
        height, width = box.mask.size
        counts = kept["mask"]["counts"]
        decoded = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T  # column after column
        assert decoded.shape == (61, 89)
        inside += int(decoded.sum())
        rows, columns = np.nonzero(decoded)
        for values, low, high in ((columns, box.left, box.right), (rows, box.top, box.bottom)):
            assert not len(values) or (low - 3 <= values.min() and values.max() <= high + 3)
    assert inside


def test_eval_gives_cocos_average_precision_of_masks_and_gate_judges_it(
    with_masks: Any, labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools")
    images, file = labelled
    result = api.evaluate(with_masks.path, str(images), annotations=file, out=tmp_path / "result")
    assert isinstance(result, ScoreResult)
    assert result.mask_average_precision is not None
    verdict = api.gate(baseline=tmp_path / "result.json", candidate=tmp_path / "result.json", limits={"max_drop": 5})
    assert [check.name for check in verdict.checks] == ["map_drop", "mask_map_drop"]
    bare = json.loads(file.read_text())
    for one in bare["annotations"]:
        del one["segmentation"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    boxes_alone = api.evaluate(with_masks.path, str(images), annotations=tmp_path / "bare.json")
    assert boxes_alone.mask_average_precision is None  # type: ignore[union-attr]
    assert boxes_alone.score == result.score  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_an_artifact_keeps_what_a_server_proves_it_with(kind: str, eager: Any, with_masks: Any) -> None:
    """The same detections pass, and those of an artifact that was damaged do not."""
    made = eager if kind == "retinanet" else with_masks
    assert (made.path / canary.FILE).stat().st_size < 2**20
    with convnext_deploy.load(made.path) as session:
        record = canary.compared(session, made.manifest, made.path)
        assert not isinstance(record, str)
        assert not record.failures
        assert record.top1_agreement == 1

        class Damaged:
            manifest = made.manifest

            def run(self, images: Any) -> Any:
                boxes, *others = session.run(images)
                return (boxes + 1, *others)

        damaged = canary.compared(cast("Session", Damaged()), made.manifest, made.path)
        assert not isinstance(damaged, str)
        assert damaged.failures
