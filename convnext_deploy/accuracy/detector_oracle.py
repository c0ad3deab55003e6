"""torchvision's own detector, filled from the file: its candidates, and the detections that it chooses of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import detections
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
        found: dict[str, Tensor] = self.fpn(named)
        return found


def of_torchvision(state: State, body: tuple[Builder, State, Mapping[str, Any]], loaded: "Loaded") -> Built:
    """torchvision's detector, and what gives its candidates.

    Args:
        state: as the file has it.
        body: what builds the ConvNeXt of the file's own library, with its arguments.
    """
    build, bare, config = body
    spec = msgspec.structs.replace(loaded.model.spec, task="features")
    network = cast("ConvNeXt", SimpleNamespace(spec=spec))
    convnext, call = build(bare, config, replace(loaded, model=network))
    convnext.eval()
    model = detector(state, loaded, lambda images: call(convnext, images))
    return model, lambda model, images: candidates(model, images, loaded)


def detector(state: dict[str, Tensor], loaded: "Loaded", maps: Maps) -> nn.Module:
    """torchvision's RetinaNet or FCOS of these tensors.

    Args:
        state: as the file has it.
        maps: the ConvNeXt of the same file, as its own library computes it.

    Raises:
        RuntimeError: torchvision's detector has not these tensors.
    """
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead
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
    common = {
        "anchor_generator": AnchorGenerator(facts.anchor_sizes, facts.aspect_ratios),
        "score_thresh": facts.score_threshold, "nms_thresh": facts.nms_threshold,
        "detections_per_img": facts.most_detections, "topk_candidates": facts.most_candidates,
    }  # fmt: skip
    if facts.kind == "fcos":
        model: nn.Module = FCOS(backbone, spec.num_classes, **common)
    else:
        head = RetinaNetHead(facts.channels, facts.anchors[0], spec.num_classes, norm_layer=_norm(facts))
        model = RetinaNet(backbone, spec.num_classes, head=head, **common)
    own = {name: value for name, value in state.items() if name.startswith(("backbone.fpn.", "head."))}
    model.load_state_dict(own, strict=True)
    return model


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
    chosen = model.postprocess_detections(split, [list(torch.split(one, counts)) for one in anchors], sizes)
    found = _filled(chosen, spec.detection.most_detections if spec.detection else 0)
    judged = detections.compare(found, (scores.numpy(), boxes.numpy()), spec, (height, width), 1e-6, "bundled")
    if judged.failures:
        raise ParityError(
            f"torchvision chooses other detections of {loaded.weights.source}'s candidates than this package: "
            f"{judged.failures[0]}; say --config with what its constructor was given, or report a bug"
        )
    return scores, boxes


def _filled(chosen: list[dict[str, Tensor]], most: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Each image's detections as an artifact puts them out."""
    boxes = np.zeros((len(chosen), most, 4), np.float32)
    scores, labels = np.zeros((len(chosen), most), np.float32), np.full((len(chosen), most), -1, np.int32)
    for index, one in enumerate(chosen):
        count = len(one["scores"])
        boxes[index, :count], scores[index, :count] = one["boxes"].numpy(), one["scores"].numpy()
        labels[index, :count] = one["labels"].numpy()
    return boxes, scores, labels
