"""ConvNeXt V1 and V2 as the toolchain sees them: NHWC, and three named operations a block.

    x ──► DwconvNorm ──► Expand ──► (Grn) ──► Project ──► + x
          depthwise 7x7  linear 4C            linear C
          norm           GELU                 layer scale, residual

This module is the intermediate representation: `passes` rewrite it, `graph.capture` freezes it, and every format is
produced from it. Parameters keep PyTorch's layouts: linear (out, in), convolution (out, in / groups, kH, kW).

In half precision the statistics of norms, GRN and pooling are computed in fp32 (float16 overflows above 65504, and
GRN's sum of squares does so on ordinary images), while convolutions and linears run in the parameters' type. Each
operation takes its input to its own type, so that operations of different types can follow one another; the residual
stream has the widest type of what was added to it.

Papers: arXiv:2201.03545 (V1), arXiv:2301.00808 (V2). Conventions of the numbers: timm 1.0.31.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact.detections import padded_sides
from ..records.base import Precision
from ..records.manifest import Activation, HeadActivation, ModelSpec, Norm
from .upernet import UperNet

if TYPE_CHECKING:
    from .detectors import Detector
    from .two_stage import Places


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}
HEAD_ACTIVATIONS: dict[HeadActivation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu, "relu": F.relu, "tanh": torch.tanh,
    "none": lambda x: x,
}  # fmt: skip


DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)


def type_of(product: nn.Module) -> torch.dtype:
    """The float type that a linear or convolution computes in: its bias's, as its weight may be quantized."""
    return product.get_parameter("bias").dtype


class ChannelNorm(nn.Module):
    """Normalization over the last axis, (..., C) -> (..., C): LayerNorm, RMSNorm, or timm's SimpleNorm.

    `weight` and `bias` are None once `passes` has folded them into what follows. RMSNorm divides by the root mean
    square; SimpleNorm by the unbiased standard deviation without subtracting the mean.
    """

    def __init__(self, kind: Norm, channels: int, eps: float) -> None:
        super().__init__()
        self.kind, self.channels, self.eps = kind, channels, eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(channels))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(channels)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layernorm":  # PyTorch accumulates the statistics of half inputs in fp32
            # The residual stream may be wider than the parameters, or narrower; layer_norm takes one type only.
            weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x, (self.channels,), weight, bias, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "rmsnorm":
            power = wide.square().mean(-1, keepdim=True)
        else:  # written out: exporters turn `var` into a dozen shape computations
            centred = wide - wide.mean(-1, keepdim=True)
            power = centred.square().mean(-1, keepdim=True) * (self.channels / (self.channels - 1))
        y = (wide * torch.rsqrt(power + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight


class DwconvNorm(nn.Module):
    """Depthwise convolution, bias, norm: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, spec: ModelSpec, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = ChannelNorm(spec.norm, channels, spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nhwc(self.conv(nchw(x.to(type_of(self.conv))))))


class Expand(nn.Module):
    """Linear to four times the width, then the activation: (N, H, W, C) -> (N, H, W, 4C)."""

    def __init__(self, spec: ModelSpec, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 4 * channels)
        self.activation = spec.activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.linear(x.to(type_of(self.linear))))


class Grn(nn.Module):
    """Global response normalization of ConvNeXt V2: (N, H, W, 4C) -> (N, H, W, 4C).

    Each channel is scaled by its L2 norm over the image relative to the mean norm over all channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(channels))
        self.eps = 1e-6

    def factor(self, x: Tensor) -> Tensor:
        """What each channel is scaled by, (N, 1, 1, 4C), in fp32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)  # (N, 1, 1, 4C)
        response = norm / (norm.mean(-1, keepdim=True) + self.eps)
        return 1 + self.weight.to(wide.dtype) * response

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        y = x * self.factor(x).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Project(nn.Module):
    """Linear back to the width, layer scale, residual: (N, H, W, 4C), (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, spec: ModelSpec, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * channels, channels)
        self.layer_scale: nn.Parameter | None = nn.Parameter(torch.ones(channels)) if spec.layer_scale else None

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        y = self.linear(hidden.to(type_of(self.linear)))
        return residual + (y if self.layer_scale is None else y * self.layer_scale)


class Block(nn.Module):
    """One residual block, (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, spec: ModelSpec, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.dwconv_norm = DwconvNorm(spec, channels, kernel_size)
        self.expand = Expand(spec, channels)
        self.grn = Grn(4 * channels) if spec.grn else None
        self.project = Project(spec, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(self.dwconv_norm(x))
        if self.grn is not None:
            hidden = self.grn(hidden)
        return self.project(hidden, x)


class Downsample(nn.Module):
    """Norm and 2x2 convolution of stride 2: (N, H, W, C) -> (N, H // 2, W // 2, C')."""

    def __init__(self, spec: ModelSpec, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(spec.norm, channels, spec.norm_eps)
        self.conv = nn.Conv2d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return nhwc(self.conv(nchw(self.norm(x).to(type_of(self.conv)))))


class Stem(nn.Module):
    """Images to the first map: (N, C, H, W) -> (N, H // 4, W // 4, dims[0]), rounded up where the stem overlaps.

    "patch" is one 4x4 convolution of stride 4; the overlapping stems are two 3x3 convolutions of stride 2,
    "overlap_tiered" with half the width between them and "overlap_act" with the activation between them.

    `input_mean` is set by `models.passes.fold_preprocessing` for overlapping stems only: their zero padding means
    "average image", so the mean has to be subtracted before it and cannot move into the bias.
    """

    input_mean: Tensor | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.dims[0]
        self.activation = spec.activation if spec.stem == "overlap_act" else None
        if spec.stem == "patch":
            convs = [nn.Conv2d(spec.in_chans, width, 4, stride=4)]
        else:
            middle = tiered_width(width) if spec.stem == "overlap_tiered" else width
            convs = [
                nn.Conv2d(spec.in_chans, middle, 3, stride=2, padding=1),
                nn.Conv2d(middle, width, 3, stride=2, padding=1),
            ]
        self.convs = nn.ModuleList(convs)
        self.norm = ChannelNorm(spec.norm, width, spec.norm_eps)
        self.register_buffer("input_mean", None)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the images that it takes; None for any (`kernels.use`)."""
        return type_of(self.convs[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.input_mean is not None:
            x = x - self.input_mean
        for index, conv in enumerate(self.convs):
            if index == 1 and self.activation is not None:
                x = ACTIVATIONS[self.activation](x)
            x = conv(x)
        return self.norm(nhwc(x))


def tiered_width(width: int) -> int:
    """Half the width as a multiple of 8 that does not fall below 90 % of it (timm's `make_divisible`)."""
    half = width // 2
    rounded = max(8, (half + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * half else rounded


class Head(nn.Module):
    """Map to vector: (N, H, W, C) -> (N, num_classes), or the pooled features where there is no classifier.

    "pool_norm" pools first (the papers); "norm_pool" normalizes first (timm's `_hnf`). `hidden` is the extra linear
    of `convnext_large_mlp` and of fine-tunes, with its activation. Pooling and what follows it up to the first linear
    are in fp32.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.dims[3]
        eps = spec.norm_eps if spec.head == "norm_pool" else spec.head_norm_eps
        self.norm_first = spec.head == "norm_pool"
        self.norm = ChannelNorm(spec.norm, width, eps)
        self.hidden = nn.Linear(width, spec.head_hidden) if spec.head_hidden else None
        self.activation = spec.head_activation
        classify = spec.task == "classify" and spec.num_classes > 0
        self.classifier = nn.Linear(spec.head_hidden or width, spec.num_classes) if classify else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.norm_first:
            x = self.norm(x)
        return self.vector(x.to(wide).mean((1, 2)))

    def with_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled vector and each pixel, under one norm and in fp32: (N, H, W, C) -> (N, C), (N, H * W, C)."""
        pixels = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, 2)
        both = self.norm(torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1))
        return both[:, 0], both[:, 1:]

    def vector(self, x: Tensor) -> Tensor:
        """What follows the pooling: (N, C) in fp32 -> (N, num_classes)."""
        return self.products(
            x if self.norm_first else self.norm(x)
        )  # `models.passes.cast_parameters` keeps this norm in fp32

    def products(self, x: Tensor) -> Tensor:
        """What follows the norm: (N, C) in fp32 -> (N, num_classes)."""
        wide = x.dtype
        for linear in (self.hidden, self.classifier):
            if linear is not None:
                x = linear(x.to(type_of(linear)))
                if linear is self.hidden:
                    x = HEAD_ACTIVATIONS[self.activation](x)
        return x.to(wide)


class ConvNeXt(nn.Module):
    """Images to logits, embeddings or feature maps.

    Input: normalized float images (N, C, H, W) in any float type, or, once `models.passes.fold_preprocessing` has run,
    raw uint8 images (N, H, W, C). H and W are at least 32.

    Output by `spec.task`, fp32 whatever the parameters' type (float64 for float64 parameters):
        classify: logits (N, num_classes)
        embed: pooled and normalized features (N, dims[3]), or (N, head_hidden); with `spec.patch_tokens` also each
            pixel of the last map under the same norm, (N, H / 32 * W / 32, dims[3]), as DINOv3 returns its patch tokens
        features: maps (N, dims[i], H / s, W / s) of `spec.levels`, for strides s = 4, 8, 16, 32, each with its norm
            where `spec.level_norms` has it; stages after the last of them are not built
        segment: logits of the first map's size, (N, num_classes, H / 4, W / 4); once `passes.put_out_classes` has run,
            the class of each pixel of the image, int32 (N, H, W)
        detect: the candidates, in one stage of every anchor its scores (N, A, num_classes) and its box (N, A, 4); once
            `passes.put_out_detections` has run, boxes, scores and classes of the detections, and the masks of a Mask
            R-CNN (`models.one_stage`, `models.two_stage`)
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.takes_uint8 = False
        self.puts_out_classes = False
        self.puts_out_detections = False
        self.stem = Stem(spec)
        self.downsamples = nn.ModuleList(
            Downsample(spec, spec.dims[i], spec.dims[i + 1]) for i in range(spec.stages - 1)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(spec, spec.dims[i], spec.kernel_sizes[i]) for _ in range(spec.depths[i]))
            for i in range(spec.stages)
        )
        self.head = Head(spec) if not spec.has_maps else None
        self.level_norms = nn.ModuleDict(
            {
                str(level): ChannelNorm(spec.norm, spec.dims[level - 1], spec.norm_eps)
                for level in spec.level_norms
                if spec.has_maps and level in spec.levels
            }
        )
        self.segmenter = UperNet(spec) if spec.task == "segment" else None
        self.detector: Detector | None = None
        if spec.task == "detect":
            from . import detectors  # which imports torchvision

            self.detector = detectors.made(spec)

    def forward(self, images: Tensor, places: "Places | None" = None) -> Tensor | tuple[Tensor, ...]:
        # First of all: TensorRT takes uint8 into a cast, and into nothing else.
        x = self.placed(images if self.stem.dtype is None else images.to(self.stem.dtype))
        x = self.stem(x)
        maps = []
        for index, blocks in enumerate(self.stages):
            if index > 0:
                x = self.downsamples[index - 1](x)
            for block in cast(nn.ModuleList, blocks):
                x = block(x)
            if self.head is None and index + 1 in self.spec.levels:
                maps.append(nchw(self.level(index + 1, x)))
        if self.head is not None:
            return self.head.with_tokens(x) if self.spec.patch_tokens else self.head(x)
        return self.finished(maps, images, places)

    def placed(self, images: Tensor) -> Tensor:
        """Images as the stem takes them, (N, C, H, W): those of a detector have sides that are multiples of 32."""
        x = nchw(images) if self.takes_uint8 else images
        if self.detector is None:
            return x
        from .detectors import padded

        return padded(x)

    def finished(
        self, maps: Sequence[Tensor], images: Tensor, places: "Places | None" = None
    ) -> Tensor | tuple[Tensor, ...]:
        """What the maps are for: themselves, or what a head makes of them.

        Args:
            places: of a detector of two stages, which candidates are followed to the end.
        """
        if self.detector is not None:
            return self.detected(maps, images, places)
        return tuple(maps) if self.segmenter is None else self.segmented(maps, images)

    def detected(self, maps: Sequence[Tensor], images: Tensor, places: "Places | None" = None) -> tuple[Tensor, ...]:
        """The candidates, or the detections, of the images."""
        assert self.detector is not None
        sides = images.shape[1:3] if self.takes_uint8 else images.shape[2:]
        height, width = sides
        padded = padded_sides((height, width))
        if self.puts_out_detections:
            return self.detector.detections(maps, (height, width), padded)
        return cast("tuple[Tensor, ...]", self.detector(maps, (height, width), padded, places))

    def segmented(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """The maps' logits, or the classes of the images' pixels."""
        assert self.segmenter is not None
        logits: Tensor = self.segmenter(maps)
        if not self.puts_out_classes:
            return logits
        sides = images.shape[1:3] if self.takes_uint8 else images.shape[2:]
        return F.interpolate(logits, size=sides, mode="bilinear", align_corners=False).argmax(1).to(torch.int32)

    def level(self, level: int, x: Tensor) -> Tensor:
        """A stage's map as it is put out: in fp32, and normalized where the level has a norm. (N, H, W, C)"""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return cast(Tensor, self.level_norms[str(level)](x)) if str(level) in self.level_norms else x
