"""UPerNet's head, which makes of a ConvNeXt's maps the classes of all pixels. NCHW, as its convolutions are.

Paper: arXiv:1807.10221. Conventions as transformers' `UperNetForSemanticSegmentation` (5.23) and mmsegmentation's
`UPerHead`: every convolution but the last is followed by batch normalization and ReLU, and every resize is bilinear
between the centres of pixels (`align_corners=False`).
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..records.manifest import ModelSpec

EPS = 1e-5  # of PyTorch's BatchNorm2d, which neither library changes


class BatchNorm(nn.Module):
    """Batch normalization with the statistics of training, (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, eps=EPS)


class ConvNormRelu(nn.Module):
    """Convolution, batch normalization, ReLU: (N, C, H, W) -> (N, C', H, W).

    `norm` is None once `passes.fold_batch_norm` has moved it into the convolution, which had no bias before.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        self.norm: BatchNorm | None = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        x = self.conv(x.to(self.conv.bias.dtype))
        return F.relu(x if self.norm is None else self.norm(x))


class UperNet(nn.Module):
    """Maps of `spec.levels`, (N, C, H, W) each, to logits of the first map's size, (N, num_classes, H, W), in fp32.

    Pooling and resizing are in the maps' type, fp32 at least.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.segmentation is not None
        channels, scales = spec.segmentation.channels, spec.segmentation.pool_scales
        dims = [spec.dims[level - 1] for level in spec.levels]
        self.pool_scales = scales
        self.pyramid = nn.ModuleList(ConvNormRelu(dims[-1], channels, 1) for _ in scales)
        self.bottleneck = ConvNormRelu(dims[-1] + len(scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormRelu(width, channels, 1) for width in dims[:-1])
        self.smooths = nn.ModuleList(ConvNormRelu(channels, channels, 3) for _ in dims[:-1])
        self.fusion = ConvNormRelu(len(dims) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, spec.num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [
            resized(conv(pool(last, scale)), last) for scale, conv in zip(self.pool_scales, self.pyramid, strict=True)
        ]
        top = self.bottleneck(torch.cat([last, *(x.to(last.dtype) for x in pooled)], 1))
        ways = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        ways.append(top)
        for index in range(len(ways) - 1, 0, -1):
            ways[index - 1] = ways[index - 1] + resized(ways[index], ways[index - 1])
        outs = [smooth(x) for smooth, x in zip(self.smooths, ways[:-1], strict=True)]
        outs.append(ways[-1])
        x = self.fusion(torch.cat([outs[0], *(resized(x, outs[0]) for x in outs[1:])], 1))
        assert self.classifier.bias is not None
        logits = self.classifier(x.to(self.classifier.bias.dtype))
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def units(self) -> Iterator[tuple[str, ConvNormRelu]]:
        """Every convolution with a norm behind it, in the order of `forward`."""
        for index, unit in enumerate(self.pyramid):
            yield f"pyramid.{index}", cast(ConvNormRelu, unit)
        yield "bottleneck", self.bottleneck
        for name, units in (("laterals", self.laterals), ("smooths", self.smooths)):
            for index, unit in enumerate(units):
                yield f"{name}.{index}", cast(ConvNormRelu, unit)
        yield "fusion", self.fusion


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the sides of `like`."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def pool(x: Tensor, bins: int) -> Tensor:
    """PyTorch's adaptive average pooling to bins x bins, (N, C, H, W) -> (N, C, bins, bins), as two matrix products.

    ONNX has no such operation, and a window of one size is the same only where the bins divide the sides.
    """
    height, width = x.shape[2:]
    across = x @ shares(width, bins, x)  # (N, C, H, bins)
    return (across.mT @ shares(height, bins, x)).mT


def shares(side: int, bins: int, like: Tensor) -> Tensor:
    """How much of each pixel of a side is in each bin, (side, bins): bin i has those from i/bins to (i+1)/bins of it.

    A pixel that two bins share is in both, as in PyTorch. The comparisons are PyTorch's floor and ceiling without a
    division, so that they hold for a side that is known only when the graph runs.
    """
    pixel = torch.arange(side, device=like.device)[:, None]
    bin = torch.arange(bins, device=like.device)[None, :]
    inside = ((pixel + 1) * bins > bin * side) & (pixel * bins < (bin + 1) * side)
    weights = inside.to(like.dtype)
    return weights / weights.sum(0, keepdim=True)


def positions(spec: ModelSpec, name: str) -> int:
    """At how many pixels of an image of `spec.image_size` a convolution of this head is computed."""
    sizes = spec.map_sizes()
    part, _, index = name.partition(".")
    if part == "pyramid":
        assert spec.segmentation is not None
        return spec.segmentation.pool_scales[int(index.partition(".")[0])] ** 2
    level = spec.levels[-1 if part == "bottleneck" else 0]
    if part in ("laterals", "smooths"):
        level = spec.levels[int(index.partition(".")[0])]
    height, width = sizes[level - 1]
    return height * width
