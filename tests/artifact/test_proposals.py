"""Two stages: the reference's candidates beside torchvision's own choice, and faults that no rounding explains."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import detectors
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from convnext_deploy.accuracy import canary, detector_oracle, probes
from convnext_deploy.artifact import detections, matching, proposals
from convnext_deploy.data import preprocess
from convnext_deploy.models import given
from convnext_deploy.models.checkpoint import load
from convnext_deploy.models.two_stage import TwoStageDetector
from convnext_deploy.records.manifest import Parity

SIZE, IMAGES = (64, 96), 2


class Case:
    """A Mask R-CNN, and its candidates on two images."""

    def __init__(self) -> None:
        # Torchvision's own widths: with narrow heads classes are so near one another that half precision explains much.
        heads = {"box_head": TwoMLPHead(detectors.CHANNELS * 7**2, 1024),
                 "box_predictor": FastRCNNPredictor(1024, detectors.CLASSES)}  # fmt: skip
        self.model = detectors.detector("mask_rcnn", **heads)
        self.loaded = load(given.weights("weights", self.model), task="detect", image_size=SIZE)
        self.pixels = preprocess.probe_images(3, SIZE, IMAGES)
        self.expected = probes.outputs(self.loaded, self.loaded.model, self.pixels)

    def compared(self, found: Any, error: float = 1e-5) -> Parity:
        return matching.compare(found, self.expected, self.loaded.model.spec, SIZE, error, "images")

    @torch.inference_mode()
    def torchvisions(self) -> tuple[NDArray[Any], ...]:
        """What torchvision's own model chooses, as an artifact puts it out."""
        model, facts = self.model, self.loaded.preprocessing
        images = torch.from_numpy(preprocess.as_input(self.pixels, facts, "float32"))
        from torchvision.models.detection.image_list import ImageList

        batch = ImageList(images, [SIZE] * len(images))
        features = model.backbone(images)
        found, _ = model.roi_heads(features, model.rpn(batch, features)[0], batch.image_sizes)
        return detector_oracle.filled(found, 30)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_torchvisions_own_choice_passes(case: Case) -> None:
    record = case.compared(case.torchvisions())
    assert not record.failures
    assert (record.top1_agreement, record.near_ties) == (1.0, 0)
    assert record.relative_error is not None
    assert record.relative_error < 1e-5
    assert matching.detections_in(case.expected, case.loaded.model.spec, SIZE) == 60


def changed(case: Case, change: Callable[[Any], None], error: float = 1e-5) -> Parity:
    """A detector of two stages in which one thing is wrong, as an artifact would have it."""
    model = copy.deepcopy(case.loaded.model)
    assert isinstance(model.detector, TwoStageDetector)
    change(model.detector)
    model.puts_out_detections = True
    return case.compared(probes.outputs(case.loaded, model, case.pixels), error)


def _set(name: str, value: Any) -> Callable[[Any], None]:
    def change(detector: Any) -> None:
        import msgspec

        regions = msgspec.structs.replace(detector.regions, **{name: value})
        detector.regions = regions

    return change


def _scaled_anchors(detector: Any) -> None:
    cells = detector.anchors.cells
    detector.anchors.cells = tuple([[1.1 * side for side in cell] for cell in level] for level in cells)


def _next_class(linear: Any, step: int) -> None:
    with torch.no_grad():
        linear.weight.copy_(linear.weight.roll(step, 0))
        linear.bias.copy_(linear.bias.roll(step, 0))


def _shifted_levels(detector: Any) -> None:
    detector.strides = [2 * stride for stride in detector.strides]


FAULTS: dict[str, Callable[[Any], None]] = {
    "anchors that are 10 % larger": _scaled_anchors,
    "weights of the box coder": _set("box_weights", (1.0, 1.0, 1.0, 1.0)),
    "weights of the sides for those of the centre": _set("box_weights", (5.0, 5.0, 10.0, 10.0)),
    "one sample at each place": _set("samples", 1),
    "four samples at each place": _set("samples", 4),
    "a tenth of the proposals": _set("most_proposals", 10),
    "another overlap of proposals": _set("nms_threshold", 0.5),
    "a class too far": lambda detector: _next_class(detector.heads.box_predictor.cls_score, 1),
    "boxes of the class before": lambda detector: _next_class(detector.heads.box_predictor.bbox_pred, 4),
    "masks of the class before": lambda detector: _next_class(detector.heads.mask_predictor.mask_fcn_logits, 1),
    "maps of another stride": _shifted_levels,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(case: Case, fault: str) -> None:
    assert changed(case, FAULTS[fault]).failures


def test_what_is_not_changed_passes(case: Case) -> None:
    assert not changed(case, lambda detector: None).failures


def test_masks_that_are_mirrored_are_found(case: Case) -> None:
    boxes, scores, labels, masks = case.torchvisions()
    (first, second) = case.compared((boxes, scores, labels, masks[..., ::-1])).failures
    assert "30 of 30 masks on sample 0 are not those of the reference" in first
    assert "sample 1" in second
    filled = labels.copy()
    filled[0, -1] = -1
    assert case.compared((boxes, scores, filled, masks)).failures


MASKS: dict[str, Callable[[Any], Any]] = {
    "inverted": lambda masks: 1 - masks,
    "zeros": np.zeros_like,
    "ones": np.ones_like,
    "noise": lambda masks: np.random.default_rng(0).random(masks.shape).astype(np.float32),
}


def beside(case: Case, change: Callable[[Any], Any], error: float) -> proposals.MasksBeside:
    """The reference's own masks of the first image with one change, as rounding of half precision is allowed for."""
    places, pairs = case.expected[4][0], case.expected[-2][0].tolist()
    units = np.full(len(case.expected[3][0]), 32.0)[:, None]
    away = detections.box_room(case.expected[3][0].astype(np.float64), units, error, SIZE)
    found = {pair: change(mask) for pair, mask in zip(pairs, places, strict=True) if pair >= 0}
    return proposals.masks_beside(found, case.expected, 0, case.loaded.model.spec, away, error)


@pytest.mark.parametrize("error", [1e-2, 8e-2])
@pytest.mark.parametrize("fault", MASKS)
def test_masks_of_something_else_are_found_in_half_precision(case: Case, fault: str, error: float) -> None:
    own, other = beside(case, lambda masks: masks, error), beside(case, MASKS[fault], error)
    assert (own.wrong, own.alike) == (0, own.compared)
    assert other.wrong or other.alike < own.compared / 2


def test_what_half_precision_checks_of_masks_and_scores_is_reported(case: Case) -> None:
    boxes, scores, labels, masks = case.torchvisions()
    inverted = case.compared((boxes, scores, labels, 1 - masks), 8e-2).failures
    assert any("masks on sample" in failure for failure in inverted)
    assert case.compared((boxes, np.maximum(scores - 0.25, 0.051), labels, masks), 8e-2).failures


def test_a_mask_that_rounding_may_cut_out_of_another_map_is_a_near_tie(case: Case) -> None:
    """A box of 112 pixels is between the maps with strides of 4 and 8; one of 150 is not."""
    boxes = np.array([[[[0, 0, 112, 112]], [[0, 0, 150, 150]]]], np.float32)
    masks = np.full((1, 2, 28, 28), 0.9, np.float32)
    nothing = np.zeros(0, np.float32)
    expected = (nothing, nothing, nothing, boxes, masks, nothing, nothing, np.array([[0, 1]]), nothing)
    found = dict(enumerate(1 - masks[0]))
    seen = proposals.masks_beside(found, expected, 0, case.loaded.model.spec, np.full((2, 1), 1e-3), 1e-5)
    assert (seen.compared, seen.wrong, seen.near_ties) == (1, 1, 1)


@pytest.mark.parametrize("error", [1e-5, 1e-3])
def test_rounding_of_weights_is_no_fault(case: Case, error: float) -> None:
    """Weights that are off by as much as is tolerated of outputs, which changes which regions are proposed."""

    def moved(detector: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in detector.parameters():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(error / 4 * noise * tensor.square().mean().sqrt())

    record = changed(case, moved, error)
    assert not record.failures, record
    assert record.top1_agreement == 1


def test_the_canary_keeps_the_limits_of_the_export(case: Case) -> None:
    spec, error = case.loaded.model.spec, 1e-5
    facts: Any = SimpleNamespace(model=spec, export=SimpleNamespace(precision="fp32"))
    with np.load(io.BytesIO(canary.recorded(facts, probes.Probe("bundled", case.pixels, case.expected)))) as file:
        kept = [file[f"output{index}"] for index in range(len(case.expected))]
    assert (kept[2] != case.expected[2][:1]).any()
    both = [proposals.candidates_of(outputs, 0, spec, SIZE, error) for outputs in (case.expected, kept)]
    assert ((both[0].scores > 0) == (both[1].scores > 0)).all()
    exported, opened = (detections.room_of(one, error, SIZE).logits for one in both)
    assert opened == pytest.approx(exported, rel=1e-5)


def test_a_proposal_is_uncertain_where_its_score_or_overlap_is(case: Case) -> None:
    spec = case.loaded.model.spec
    exact = proposals.candidates_of(case.expected, 0, spec, SIZE, 0.0)
    wide = proposals.candidates_of(case.expected, 0, spec, SIZE, 1e-4)
    assert exact.present.sum() == 100
    assert not exact.uncertain.any()
    assert (wide.present == exact.present).all()
    assert 0 < wide.uncertain.any(1).mean() < 0.5
