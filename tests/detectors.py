"""Small detectors of torchvision on a ConvNeXt, as people build and save them, and images with objects to find."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from references import DEPTHS, DIMS, randomize_
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

CLASSES, CHANNELS = 4, 64
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
LAYERS = {"1": "0", "3": "1", "5": "2", "7": "3"}  # of `features`, where each stage ends


def body() -> nn.Module:
    stages = [CNBlockConfig(*stage) for stage in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)]
    features: nn.Module = ConvNeXt(stages, num_classes=2).features
    return features


def detector(kind: str = "retinanet", first: int = 1, extra: Any = None, **arguments: Any) -> Any:
    """With weights at which every parameter matters and many places are taken for objects.

    Args:
        first: the first stage whose map the pyramid takes, 1 to 4.
    """
    layers = {name: str(index) for index, name in enumerate(list(LAYERS)[first - 1 :])}
    backbone = BackboneWithFPN(body(), layers, list(DIMS[first - 1 :]), CHANNELS, extra)
    made = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[kind]
    classes: int | None = CLASSES
    if kind in TWO_STAGE:  # heads of an eighth of torchvision's widths, which take most of the time otherwise
        classes = None  # they know it
        heads = {"box_head": TwoMLPHead(CHANNELS * 7**2, 128), "box_predictor": FastRCNNPredictor(128, CLASSES)}
        if kind == "mask_rcnn":
            heads["mask_head"] = MaskRCNNHeads(CHANNELS, (32, 32, 32, 32), 1)
            heads["mask_predictor"] = MaskRCNNPredictor(32, 32, CLASSES)
        arguments = {"box_detections_per_img": 30, "rpn_post_nms_top_n_test": 100} | heads | arguments
    model: Any = randomize_(made(backbone, classes, **{"min_size": 64, "max_size": 96} | arguments))
    if kind in TWO_STAGE:  # or nearly every region would be cut off at the image
        with torch.no_grad():
            model.rpn.head.bbox_pred.weight *= 0.1
            model.roi_heads.box_predictor.bbox_pred.weight *= 0.1
    return model


class TimmBackbone(nn.Module):
    """timm's ConvNeXt with torchvision's pyramid, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("convnext_atto", features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), CHANNELS, LastLevelMaxPool())
        self.out_channels = CHANNELS

    def forward(self, images: torch.Tensor) -> Any:
        maps = OrderedDict((str(index), x) for index, x in enumerate(self.body(images)))
        return self.fpn(maps)


def on_timm() -> Any:
    return randomize_(RetinaNet(TimmBackbone(), CLASSES, min_size=64, max_size=96))


def saved(model: nn.Module, file: Path) -> str:
    torch.save(model.state_dict(), file)
    return str(file)


@torch.inference_mode()
def found_by(model: Any, pixels: Any) -> list[dict[str, torch.Tensor]]:
    """What torchvision finds on uint8 images (N, C, H, W)."""
    found: list[dict[str, torch.Tensor]] = model([torch.from_numpy(one).float() / 255 for one in pixels])
    return found


def drawn(folder: Path, images: int, seed: int = 0, sides: tuple[int, int] = (60, 90)) -> tuple[Path, Path]:
    """(a folder of images with rectangles of two colours, the COCO file of these)."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    listed: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(images):
        height, width = sides[0] + number % 3, sides[1] - number % 4
        pixels = generator.integers(90, 130, (height, width, 3)).astype(np.uint8)
        for _ in range(int(generator.integers(1, 4))):
            category = int(generator.integers(1, 3))
            w, h = (int(side) for side in generator.integers(12, 30, 2))
            x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
            pixels[y : y + h, x : x + w] = (220, 40, 40) if category == 1 else (40, 40, 220)
            box = {"image_id": number, "category_id": category, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            box["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            objects.append({"id": len(objects) + 1, **box})
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        listed.append({"id": number, "file_name": name, "width": width, "height": height})
    file = folder / "instances.json"
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    file.write_text(json.dumps({"images": listed, "annotations": objects, "categories": categories}))
    return folder / "images", file
