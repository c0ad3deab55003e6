"""What ConvNeXt is compared with: any of timm's models, with random weights, in the shape that formats build from.

Of the task segment it is transformers' UPerNet (`baseline_segmenters`), of detect a Mask R-CNN (`baseline_detectors`).
"""

import difflib
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from ..artifact.detections import padded_sides
from ..errors import UsageError
from ..records.base import STRIDE, Precision, Task
from ..records.manifest import ModelSpec, Preprocessing
from . import baseline_detectors, baseline_segmenters, registry
from .convnext import DTYPES
from .facts import IMAGENET_MEAN, IMAGENET_STD

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")

# Who is set beside which ConvNeXt: as the ConvNeXt paper does (arXiv:2201.03545, table 1) for Swin; by their number of
# operations for the others.
FAMILIES: dict[str, dict[str, str]] = {
    "swin": {
        "tiny": "swin_tiny_patch4_window7_224",
        "small": "swin_small_patch4_window7_224",
        "base": "swin_base_patch4_window7_224",
        "large": "swin_large_patch4_window7_224",
    },
    "deit": {"tiny": "deit_small_patch16_224", "base": "deit_base_patch16_224", "large": "deit3_large_patch16_224"},
    "resnet": {"tiny": "resnet50", "small": "resnet101", "base": "resnet152"},
}
WINDOW_12 = {
    "swin_base_patch4_window7_224": "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224": "swin_large_patch4_window12_384",
}  # at 384 pixels, as the paper has it


def counterpart(word: str, architecture: str, image_size: tuple[int, int]) -> str:
    """The timm model that `word` sets beside a ConvNeXt: a family of `FAMILIES`, or one of timm's names.

    Raises:
        UsageError: neither, or the family has none of that size.
    """
    if word in FAMILIES:
        sizes = FAMILIES[word]
        size = architecture.partition("_")[2].partition("_")[0]
        if size not in sizes:
            raise UsageError(
                f"{word} has no counterpart of {architecture}; it has {', '.join(sizes)}; name a timm model"
            )
        name = sizes[size]
        return WINDOW_12.get(name, name) if image_size == (384, 384) else name
    name = word.strip().lower()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, (*FAMILIES, *timm.list_models()), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"--compare {word}: neither one of {', '.join(FAMILIES)} nor a model of timm{hint}")
    return name


class Baseline(nn.Module):
    """A library's own module with random weights: float32 (N, 3, H, W) in, logits, embedding, maps or detections out.

    `spec` contains what sessions and formats ask for. Depths, and outside of the task features widths, are ConvNeXt's
    words and mean nothing here.
    """

    takes_uint8 = False

    def __init__(self, name: str, image_size: tuple[int, int], task: Task, precision: Precision = "fp32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UsageError(f"timm's modules have no {precision} here; they have {', '.join(PRECISIONS)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.spec = (
                baseline_segmenters.created(name, image_size) if task == "segment" else _created(name, image_size, task)
            )
        self.body.to(DTYPES[precision])
        self.dtype = DTYPES[precision]
        self.widths = self.spec.dims if task == "features" else None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.body(images.to(self.dtype))
        if self.spec.task == "detect":
            return cast("tuple[Tensor, ...]", outputs)
        if self.widths is None:
            return outputs.float()
        maps = zip(outputs, self.widths, strict=True)
        return tuple(baseline_detectors.in_channels_first(x, width).float() for x, width in maps)


def _created(name: str, image_size: tuple[int, int], task: Task) -> tuple[nn.Module, ModelSpec]:
    """timm's module, and its spec: four widths of maps at the strides 4, 8, 16 and 32, or of the pooled features."""
    module, widths = _of_timm(name, padded_sides(image_size) if task == "detect" else image_size, task)
    if task == "detect":
        return baseline_detectors.created(name, module, widths, image_size)  # type: ignore[arg-type]  # as below
    spec = ModelSpec(
        architecture=name,
        depths=(1, 1, 1, 1),
        dims=widths,  # type: ignore[arg-type]  # four of them: `_of_timm`
        num_classes=1000 if task == "classify" else 0,
        task=task,
        image_size=image_size,
    )
    return module, spec


def _of_timm(name: str, image_size: tuple[int, int], task: Task) -> tuple[nn.Module, tuple[int, ...]]:
    pretrained = timm.models.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if pretrained is not None and pretrained.fixed_input_size and tuple(pretrained.input_size[1:]) != image_size:
        options["img_size"] = image_size  # else a transformer refuses every other size
    if task not in ("features", "detect"):
        module = timm.create_model(name, pretrained=False, num_classes=1000 if task == "classify" else 0, **options)
        return module, (module.num_features,) * 4
    strides = [STRIDE // 8, STRIDE // 4, STRIDE // 2, STRIDE]
    try:
        listed = timm.create_model(name, pretrained=False, features_only=True, **options)
        levels = [listed.feature_info.reduction().index(stride) for stride in strides]
    except (ValueError, RuntimeError):
        raise UsageError(f"{name} returns no maps at the strides {strides}; compare it with --task classify") from None
    if len(levels) != len(listed.feature_info.reduction()):
        listed = timm.create_model(name, pretrained=False, features_only=True, out_indices=levels, **options)
    return listed, tuple(listed.feature_info.channels())


def preprocessing_of(name: str) -> Preprocessing:
    """What timm says that the model was trained with."""
    pretrained = timm.models.get_pretrained_cfg(name)
    if pretrained is None:
        return Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, assumed=("mean", "std"))
    return Preprocessing(mean=tuple(pretrained.mean), std=tuple(pretrained.std), crop_pct=pretrained.crop_pct)


def is_convnext(name: str) -> bool:
    return name in registry.VARIANTS
