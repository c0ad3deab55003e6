"""How much mAP a detector keeps on each format and type: a small one, trained here from a seed on drawn shapes.

    python benchmarks/bench_detector_drop.py --folder build/detector-drop --kind fcos

The scenes are circles, squares and triangles of any colour on crops of the photographs that come with this package, up
to five on each. Training and validation have different halves of the photographs. The detector is torchvision's, with
a BackboneWithFPN on a ConvNeXt of 1.7 million parameters.

Before export, torchvision itself finds the objects, and pycocotools gives its mAP: that row shares no code with this
package. Then the checkpoint goes the way of every checkpoint: export, eval and gate, each format and type beside ONNX
in fp32. --steps 0 takes the model that is in the folder.
"""

import argparse
import contextlib
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from convnext_deploy import api, data
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.records.accuracy import ScoreResult, ScoreVerdict
from convnext_deploy.records.base import Precision

CLASSES = ("background", "circle", "square", "triangle")
BEHIND = ("astronaut", "camera", "coffee", "gravel", "hubble", "retina", "rocket")
SIDES = (128, 160)  # height and width of the largest scene, pixels
SCENES = {"train": 2000, "validation": 400}
FINER = 4  # times the pixels in which a shape is drawn, so that its edge is soft
DIMS, DEPTHS, CHANNELS = (32, 64, 128, 256), (2, 2, 4, 2), 64
BATCH, RATE = 8, 1e-3
KINDS = {"fcos": FCOS, "retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
ROWS: tuple[tuple[str, Precision], ...] = (
    ("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "bf16"),
    ("eager", "fp32"), ("eager", "fp16"), ("eager", "bf16"),
)  # fmt: skip

Pixels = NDArray[np.uint8]


# The scenes -----------------------------------------------------------------------------------------------------------


def outline(number: int, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners (x, y) of a shape; a circle is drawn with 40."""
    corners = {1: 40, 2: 4, 3: 3}[number]
    angles = [turn + 2 * math.pi * index / corners for index in range(corners)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def scene(photo: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """(an image, its objects as COCO has them, each with the number of its class)."""
    height, width = (int(rng.integers(3 * side // 4, side + 1)) for side in SIDES)
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.3, 1.0)
    left, top = (rng.uniform(0, side - scale * own) for side, own in zip(photo.size, (width, height), strict=True))
    box = (left, top, left + scale * width, top + scale * height)
    image = photo.resize((width * FINER, height * FINER), Image.Resampling.BICUBIC, box=box)
    draw, objects = ImageDraw.Draw(image), list[dict[str, Any]]()
    for _ in range(int(rng.integers(1, 6))):
        number, radius = int(rng.integers(1, 4)), float(rng.uniform(6, 26))
        centre = (float(rng.uniform(0, width)), float(rng.uniform(0, height)))
        corners = outline(number, centre, radius, float(rng.uniform(0, 2 * math.pi)))
        x, y = (
            [min(max(corner[axis], 0.0), float(end)) for corner in corners] for axis, end in ((0, width), (1, height))
        )
        low, sides = (min(x), min(y)), (max(x) - min(x), max(y) - min(y))
        before = [one["bbox"] for one in objects]
        if min(sides) < 8 or any(_overlap([*low, *sides], one) > 0.1 for one in before):
            continue
        draw.polygon([(a * FINER, b * FINER) for a, b in corners], fill=tuple(map(int, rng.integers(0, 256, 3))))
        polygon = [round(value, 2) for pair in zip(x, y, strict=True) for value in pair]
        objects.append(
            {
                "category_id": number,
                "bbox": [*low, *sides],
                "area": sides[0] * sides[1],
                "iscrowd": 0,
                "segmentation": [polygon],
            }
        )
    return image.resize((width, height), Image.Resampling.BOX), objects


def _overlap(one: list[float], other: list[float]) -> float:
    """Of two boxes (left, top, width, height), how much of the smaller is in both."""
    both = [
        max(0.0, min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    return both[0] * both[1] / min(one[2] * one[3], other[2] * other[3])


def drawn(folder: Path) -> None:
    """`SPLIT/` with the images and `SPLIT.json` below the folder, unless they are there."""
    photographs = [Image.open(Path(data.__file__).parent / f"images/{name}.jpg").convert("RGB") for name in BEHIND]
    for seed, (split, count) in enumerate(SCENES.items()):
        if (folder / f"{split}.json").is_file():
            continue
        rng = np.random.default_rng(seed)
        halves = [photo.crop(_half(photo.size, split == "validation")) for photo in photographs]
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, objects = list[dict[str, Any]](), list[dict[str, Any]]()
        for number in range(count):
            image, own = scene(halves[rng.integers(len(halves))], rng)
            name = f"{number:04}.png"
            image.save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
            objects += [{"id": len(objects) + index + 1, "image_id": number, **one} for index, one in enumerate(own)]
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES) if number]
        content = {"images": images, "annotations": objects, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
        print(f"{split}: {count} scenes, {len(objects)} objects", flush=True)


def _half(size: tuple[int, int], right: bool) -> tuple[int, int, int, int]:
    width, height = size
    return (width // 2 * right, 0, width // 2 * (1 + right), height)


# The detector ---------------------------------------------------------------------------------------------------------


def network(kind: str) -> Any:
    """torchvision's detector on a ConvNeXt, whose pyramid has the strides 8, 16, 32 and 64."""
    stages = [CNBlockConfig(*stage) for stage in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)]
    body: Any = ConvNeXt(stages, layer_scale=0.1, num_classes=2).features
    backbone = BackboneWithFPN(body, {"3": "0", "5": "1", "7": "2"}, list(DIMS[1:]), CHANNELS)
    sides: dict[str, Any] = {"min_size": min(SIDES), "max_size": max(SIDES)}
    if kind == "fcos":
        return FCOS(backbone, len(CLASSES), anchor_generator=_anchors(1.0), score_thresh=0.05, **sides)
    if kind == "retinanet":
        return RetinaNet(backbone, len(CLASSES), anchor_generator=_anchors(2.0, (0.5, 1.0, 2.0)), **sides)
    pools: dict[str, Any] = {"box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, 2)}
    if kind == "mask_rcnn":
        pools["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 14, 2)
    return KINDS[kind](
        backbone, len(CLASSES), rpn_anchor_generator=_anchors(2.0, (0.5, 1.0, 2.0)), rpn_post_nms_top_n_test=100,
        rpn_post_nms_top_n_train=200, box_batch_size_per_image=64, **pools, **sides,
    )  # fmt: skip


def _anchors(strides: float, ratios: tuple[float, ...] = (1.0,)) -> Any:
    """Of so many strides of their level."""
    sizes = tuple((int(strides * stride),) for stride in (8, 16, 32, 64))
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


def targets(folder: Path, split: str) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Images (3, H, W), uint8, and their objects as torchvision takes them."""
    content = json.loads((folder / f"{split}.json").read_text())
    by_image: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        by_image[one["image_id"]].append(one)
    for image in content["images"]:
        own = by_image[image["id"]]
        pixels = torch.from_numpy(np.asarray(Image.open(folder / split / image["file_name"])).copy()).permute(2, 0, 1)
        boxes = torch.tensor([one["bbox"] for one in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(own), *pixels.shape[1:]), np.uint8)
        for mask, one in zip(masks, own, strict=True):
            picture = Image.new("L", (image["width"], image["height"]))
            ImageDraw.Draw(picture).polygon(one["segmentation"][0], fill=1)
            mask[:] = np.asarray(picture)
        labels = torch.tensor([one["category_id"] for one in own], dtype=torch.int64)
        yield pixels, {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}


def trained(folder: Path, kind: str, steps: int) -> tuple[Any, float]:
    """(the detector, the CPU seconds that training took), from the folder where there are no steps."""
    torch.manual_seed(0)
    model, file = network(kind), folder / f"{kind}.pth"
    if not steps:
        kept = torch.load(file)
        model.load_state_dict(kept["model"])
        return model.eval(), kept["seconds"]
    model.train()
    samples = [sample for sample in targets(folder, "train") if len(sample[1]["labels"])]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    rng, began = np.random.default_rng(0), time.process_time()
    for step in range(steps):
        batch = [samples[index] for index in rng.choice(len(samples), BATCH, replace=False)]
        losses = model([pixels.float() / 255 for pixels, _ in batch], [dict(own) for _, own in batch])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        falling.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.process_time() - began
            print(f"step {step} of {steps}, {seconds:.0f} s: loss {loss.item():.3f}", flush=True)
    seconds = time.process_time() - began
    torch.save({"model": model.state_dict(), "seconds": seconds}, file)
    return model.eval(), seconds


# The scores -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def before_export(folder: Path, model: Any) -> dict[str, float]:
    """mAP of torchvision's own detections, by pycocotools alone."""
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes, masks = list[dict[str, Any]](), list[dict[str, Any]]()
    for image, (pixels, _) in enumerate(targets(folder, "validation")):
        (found,) = model([pixels.float() / 255])
        for index, (box, score, label) in enumerate(
            zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        ):
            one = {"image_id": image, "category_id": label, "score": score}
            boxes.append(one | {"bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]})
            if "masks" in found:
                inside = np.asfortranarray((found["masks"][index, 0] > 0.5).numpy().astype(np.uint8))
                masks.append(one | {"segmentation": run_lengths.encode(inside)})
    scores: dict[str, float] = {}
    for name, kind, detections in (("map", "bbox", boxes), ("mask_map", "segm", masks)):
        if detections:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(str(folder / "validation.json"))
                evaluation = COCOeval(truth, truth.loadRes(detections), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            scores |= {name: float(evaluation.stats[0]), f"{name}_50": float(evaluation.stats[1])}
    return scores


def judged(folder: Path, kind: str, model: Any, seconds: float, file_name: str) -> None:
    """A line for what torchvision finds, and one for each format and type: mAP, and the drop from ONNX in fp32."""
    common = {"benchmark": "detector-drop", "detector": kind, "training_cpu_s": seconds}
    records.append(common | {"format": "torchvision", "type": "fp32", **before_export(folder, model)}, file_name)
    labels = folder / "labels.txt"
    labels.write_text("\n".join(CLASSES) + "\n")
    for format, precision in ROWS:
        name = folder / f"{kind}-{format}-{precision}"
        row: dict[str, Any] = common | {"format": format, "type": precision}
        try:
            artifact = api.export(
                model, task="detect", format=format, precision=precision, image_size=SIDES, batch=(1, 4, 8),
                labels=labels, verify_data=str(folder / "validation"), out=name, force=True,
            )  # fmt: skip
        except ConvNextDeployError as error:
            records.append(row | {"refused": str(error).replace(str(folder), "FOLDER")}, file_name)
            continue
        result = name.with_name(f"{name.name}-eval")
        found = api.evaluate(
            name, str(folder / "validation"), annotations=folder / "validation.json", out=result, force=True
        )
        assert isinstance(found, ScoreResult)
        paths = (folder / f"{kind}-onnx-fp32-eval.json", result.with_name(f"{result.name}.json"))
        verdict = api.gate(*paths, limits={"max_drop": 1.0})
        assert isinstance(verdict, ScoreVerdict)
        facts = artifact.manifest
        row |= {
            "executed": dict(facts.precision.executed or {}),
            "note": facts.precision.note,
            "images": found.images,
            "map": found.score,
            "map_50": found.average_precision_50,
            "mask_map": found.mask_average_precision,
            "per_class": {one.name: one.score for one in found.per_output},
            "relative_error": [parity.relative_error for parity in facts.parity],
            "near_ties": [parity.near_ties for parity in facts.parity],
            "checks": {
                check.name: {"drop": check.value, "lower": check.lower, "upper": check.upper, "limit": check.limit}
                for check in verdict.checks
            },
            "decision": verdict.decision,
            "tensors_sha256": facts.weights.tensors_sha256,
        }
        records.append(row, file_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/detector-drop"))
    parser.add_argument("--kind", choices=KINDS, default="fcos")
    parser.add_argument("--steps", type=int, default=800, help="of training; 0: judge the model that is there")
    parser.add_argument("--file-name", default="detector-drop", help="of the results, behind the date")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    drawn(args.folder)
    model, seconds = trained(args.folder, args.kind, args.steps)
    judged(args.folder, args.kind, model, seconds, args.file_name)


if __name__ == "__main__":
    main()
