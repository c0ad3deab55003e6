"""Whole detectors on timm's backbones, with random weights: what a Mask R-CNN on our ConvNeXt is compared with.

Pyramid and heads are those of `models.detectors`, whose convolutions are torchvision's. So two rows of a benchmark
differ in nothing but the backbone.
"""

from typing import cast

from torch import Tensor, nn

from ..records.manifest import ModelSpec
from . import detectors, torchvision_detectors


class BaselineDetector(nn.Module):
    """Images (N, 3, H, W) to detections; `candidates` returns what these are chosen of."""

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone, self.widths = backbone, spec.dims
        self.detector = detectors.made(spec)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.detector.detections(*self._maps(images))

    def candidates(self, images: Tensor) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", self.detector(*self._maps(images)))

    def _maps(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int], tuple[int, int]]:
        x = detectors.padded(images)
        maps = [in_channels_first(x, width) for x, width in zip(self.backbone(x), self.widths, strict=True)]
        return maps, (images.shape[2], images.shape[3]), (x.shape[2], x.shape[3])


def in_channels_first(x: Tensor, width: int) -> Tensor:
    """A map as necks take it, (N, C, H, W): Swin's are (N, H, W, C)."""
    return (x if x.shape[1] == width else x.permute(0, 3, 1, 2)).contiguous()


def created(
    name: str, backbone: nn.Module, widths: tuple[int, int, int, int], image_size: tuple[int, int]
) -> tuple[nn.Module, ModelSpec]:
    """The module, in the state of the random generator of PyTorch, and what sessions and formats ask for.

    Args:
        backbone: returns maps at the strides 4, 8, 16 and 32.
        widths: channels of each.
    """
    spec = torchvision_detectors.random_spec(
        ModelSpec(
            architecture=name,
            depths=(1, 1, 1, 1),
            dims=widths,
            num_classes=torchvision_detectors.CLASSES,
            task="detect",
            image_size=image_size,
        )
    )
    module = BaselineDetector(backbone, spec)
    for name_, parameter in module.detector.named_parameters():
        if name_.endswith(("cls_score.weight", "cls_logits.weight")):  # or nothing would be taken for an object
            nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    return module, spec
