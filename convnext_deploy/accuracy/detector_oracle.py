"""torchvision's own detector, filled from the file: its candidates, and the detections that it chooses of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import detections, matching, verify
from ..errors import ParityError
from ..records.manifest import Detection
from .library_models import Built, State

if TYPE_CHECKING:
    from ..models.checkpoint import Loaded
    from ..models.convnext import ConvNeXt

Builder = Callable[[State, Mapping[str, Any], "Loaded"], Built]
Maps = Callable[[Tensor], Sequence[Tensor]]


class _Backbone(nn.Module):
    """Another library's ConvNeXt with torchvision's pyramid behind it."""

    def __init__(self, maps: Maps, pyramid: nn.Module, channels: int) -> None:
        super().__init__()
        self.maps, self.fpn, self.out_channels = maps, pyramid, channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        named = OrderedDict((str(index), x) for index, x in enumerate(self.maps(images)))
        pyramid: dict[str, Tensor] = self.fpn(named)
        return pyramid


def of_torchvision(
    state: State, body: tuple[Builder, State, Mapping[str, Any]], loaded: "Loaded", outputs: verify.Outputs
) -> Built:
    """torchvision's detector, and what returns its candidates.

    Args:
        state: as the file has it.
        body: what builds the ConvNeXt of the file's own library, with its arguments.
        outputs: this package's candidates, which say which of them are followed.
    """
    build, bare, config = body
    spec = msgspec.structs.replace(loaded.model.spec, task="features")
    network = cast("ConvNeXt", SimpleNamespace(spec=spec))
    convnext, call = build(bare, config, replace(loaded, model=network))
    convnext.eval()
    model = detector(state, loaded, lambda images: call(convnext, images))
    if loaded.model.spec.detection is not None and loaded.model.spec.detection.regions is not None:
        return model, lambda model, images: of_two_stages(model, images, loaded, outputs)
    return model, lambda model, images: candidates(model, images, loaded)


def detector(state: dict[str, Tensor], loaded: "Loaded", maps: Maps) -> nn.Module:
    """torchvision's detector of these tensors.

    Args:
        state: as the file has it.
        maps: the ConvNeXt of the same file, as its own library computes it.

    Raises:
        RuntimeError: torchvision's detector has not these tensors.
    """
    from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

    spec = loaded.model.spec
    facts = spec.detection
    assert facts is not None
    anchor = "backbone.fpn.inner_blocks.0."
    root = next(name for name in state if anchor in name).partition(anchor)[0]
    state = {name.removeprefix(root): value for name, value in state.items() if name.startswith(root)}
    widths = [spec.dims[level - 1] for level in spec.levels]
    extra: Any = LastLevelMaxPool()
    if facts.extra == "p6p7":
        extra = LastLevelP6P7(state["backbone.fpn.extra_blocks.p6.weight"].shape[1], facts.channels)
    backbone = _Backbone(maps, FeaturePyramidNetwork(widths, facts.channels, extra), facts.channels)
    anchors = AnchorGenerator(facts.anchor_sizes, facts.aspect_ratios)
    common = {
        "anchor_generator": anchors,
        "score_thresh": facts.score_threshold, "nms_thresh": facts.nms_threshold,
        "detections_per_img": facts.most_detections, "topk_candidates": facts.most_candidates,
    }  # fmt: skip
    model: nn.Module
    if facts.regions is not None:
        regions, masks = facts.regions, facts.regions.masks
        cut = partial(MultiScaleRoIAlign, [str(index) for index in range(len(widths))])
        both: dict[str, Any] = {
            "num_classes": spec.num_classes,
            "rpn_anchor_generator": anchors,
            "rpn_head": RPNHead(facts.channels, facts.anchors[0], facts.convolutions),
            "rpn_pre_nms_top_n_test": facts.most_candidates, "rpn_post_nms_top_n_test": regions.most_proposals,
            "rpn_nms_thresh": regions.nms_threshold, "rpn_score_thresh": regions.score_threshold,
            "box_roi_pool": cut(regions.size, regions.samples),
            "box_head": TwoMLPHead(facts.channels * regions.size**2, regions.hidden),
            "box_score_thresh": facts.score_threshold, "box_nms_thresh": facts.nms_threshold,
            "box_detections_per_img": facts.most_detections, "bbox_reg_weights": regions.box_weights,
        }  # fmt: skip
        if masks is None:
            model = FasterRCNN(backbone, **_with_predictor(both, regions.hidden))
        else:
            model = MaskRCNN(
                backbone,
                **_with_predictor(both, regions.hidden),
                mask_roi_pool=cut(masks.size, regions.samples),
                mask_head=MaskRCNNHeads(facts.channels, masks.channels, 1),
                mask_predictor=MaskRCNNPredictor(masks.channels[-1], masks.upsampled, spec.num_classes),
            )
    elif facts.kind == "fcos":
        model = FCOS(backbone, spec.num_classes, **common)
    else:
        head = RetinaNetHead(facts.channels, facts.anchors[0], spec.num_classes, norm_layer=_norm(facts))
        model = RetinaNet(backbone, spec.num_classes, head=head, **common)
    parts = ("backbone.fpn.", "head.", "rpn.", "roi_heads.")
    own = {name: value for name, value in state.items() if name.startswith(parts)}
    model.load_state_dict(own, strict=True)
    return model


def _with_predictor(arguments: dict[str, Any], hidden: int) -> dict[str, Any]:
    """With the last linears, which torchvision takes in the place of the number of classes."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return arguments | {"num_classes": None, "box_predictor": FastRCNNPredictor(hidden, arguments["num_classes"])}


def _norm(facts: Detection) -> Any:
    return (lambda channels: nn.GroupNorm(32, channels)) if facts.group_norm else None


def candidates(model: Any, images: Tensor, loaded: "Loaded") -> tuple[Tensor, ...]:
    """The scores and boxes of all anchors, and a check that this package would choose the same detections.

    Raises:
        ParityError: it would choose others.
    """
    from torchvision.models.detection.image_list import ImageList

    height, width = images.shape[2:]
    padded: Tensor = model.transform.batch_images(list(images), 32)
    features = list(model.backbone(padded).values())
    outputs = model.head(features)
    sizes = [(height, width)] * len(images)
    anchors: list[Tensor] = model.anchor_generator(ImageList(padded, sizes), features)
    scores = torch.sigmoid(outputs["cls_logits"])
    if "bbox_ctrness" in outputs:
        scores = torch.sqrt(scores * torch.sigmoid(outputs["bbox_ctrness"]))
        boxes = torch.stack([model.box_coder.decode(x, anchors[0]) for x in outputs["bbox_regression"]])
    else:
        boxes = torch.stack([model.box_coder.decode_single(x, anchors[0]) for x in outputs["bbox_regression"]])
    boxes = torch.stack((boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)), dim=-1).flatten(2)
    spec = loaded.model.spec
    counts = detections.anchor_counts(spec, (height, width))
    split = {name: list(torch.split(value, counts, dim=1)) for name, value in outputs.items()}
    selection = model.postprocess_detections(split, [list(torch.split(one, counts)) for one in anchors], sizes)
    rows = filled(selection, spec.detection.most_detections if spec.detection else 0)
    _refuse_other_choice(rows, (scores.numpy(), boxes.numpy()), loaded, (height, width))
    return scores, boxes


def of_two_stages(model: Any, images: Tensor, loaded: "Loaded", built: verify.Outputs) -> tuple[Tensor, ...]:
    """What both stages compute of the candidates that were followed, and a check of the detections, likewise.

    Args:
        built: this package's candidates on the same images.

    Raises:
        ParityError: this package would choose other detections.
    """
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import concat_box_prediction_layers
    from torchvision.ops import clip_boxes_to_image, roi_align

    from ..models.two_stage import Places

    places = Places(*(torch.from_numpy(output) for output in built[-len(Places._fields) :]))
    height, width = images.shape[2:]
    batch = ImageList(model.transform.batch_images(list(images), 32), [(height, width)] * len(images))
    features = model.backbone(batch.tensors)
    maps = list(features.values())
    heads = model.roi_heads

    def cut_out(boxes: Tensor, levels: Tensor, size: int) -> Tensor:
        rows = []
        for index, (own, of) in enumerate(zip(boxes, levels, strict=True)):
            for box, level in zip(own, of.tolist(), strict=True):
                x = maps[level][index : index + 1]
                rows.append(roi_align(x, [box[None]], size, x.shape[2] / batch.tensors.shape[2], heads_samples))
        return torch.cat(rows)

    heads_samples = heads.box_roi_pool.sampling_ratio
    logits, deltas = model.rpn.head(maps)
    anchors = model.rpn.anchor_generator(batch, maps)
    flat_logits, flat_deltas = concat_box_prediction_layers(logits, deltas)
    decoded = model.rpn.box_coder.decode(flat_deltas, anchors).view(len(images), -1, 4)
    whole = flat_logits.view(len(images), -1).gather(1, places.anchors)
    regions = clip_boxes_to_image(decoded.gather(1, places.anchors[:, :, None].expand(-1, -1, 4)), (height, width))
    x = heads.box_head(cut_out(regions, places.levels, heads.box_roi_pool.output_size[0]))
    scores, boxes = heads.box_predictor(x)
    refined = heads.box_coder.decode(boxes, list(regions))
    refined = clip_boxes_to_image(refined.view(len(images), places.anchors.shape[1], -1, 4), (height, width))
    classes = refined.shape[2]
    given = [whole, regions, torch.softmax(scores, -1).view(*refined.shape[:3]), refined]
    if heads.has_mask():
        pairs = places.pairs.clamp(min=0)
        own = refined.flatten(1, 2).gather(1, pairs[:, :, None].expand(-1, -1, 4))
        y = heads.mask_predictor(heads.mask_head(cut_out(own, places.mask_levels, heads.mask_roi_pool.output_size[0])))
        which = (pairs % classes).flatten()
        given.append(torch.sigmoid(y[torch.arange(len(y)), which]).view(len(images), -1, *y.shape[2:]))
    proposals, _ = model.rpn(batch, features)
    selection, _ = heads(features, proposals, batch.image_sizes)
    outputs = (*given, *places)
    _refuse_other_choice(
        filled(selection, places.pairs.shape[1]), tuple(one.numpy() for one in outputs), loaded, (height, width)
    )
    return outputs


def _refuse_other_choice(
    proposals: Sequence[np.ndarray[Any, Any]], expected: verify.Outputs, loaded: "Loaded", image_size: tuple[int, int]
) -> None:
    judged = matching.compare(proposals, expected, loaded.model.spec, image_size, 1e-6, "bundled")
    if judged.failures:
        raise ParityError(
            f"torchvision chooses other detections of {loaded.weights.source}'s candidates than this package: "
            f"{judged.failures[0]}; say --config with what its constructor was given, or report a bug"
        )


def filled(proposals: list[dict[str, Tensor]], most: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Each image's detections as an artifact puts them out."""
    boxes = np.zeros((len(proposals), most, 4), np.float32)
    scores, labels = np.zeros((len(proposals), most), np.float32), np.full((len(proposals), most), -1, np.int32)
    for index, one in enumerate(proposals):
        count = len(one["scores"])
        boxes[index, :count], scores[index, :count] = one["boxes"].numpy(), one["scores"].numpy()
        labels[index, :count] = one["labels"].numpy()
    if "masks" not in proposals[0]:
        return boxes, scores, labels
    masks = np.zeros((len(proposals), most, *proposals[0]["masks"].shape[2:]), np.float32)
    for index, one in enumerate(proposals):
        masks[index, : len(one["masks"])] = one["masks"][:, 0].numpy()
    return boxes, scores, labels, masks
