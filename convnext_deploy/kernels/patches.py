"""What stands between and around the stages: the stem's patches, downsampling, and the pooling of the head.

The head's linear stays PyTorch's: a product of (N, C) by (C, classes) is what its library does best.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hopper
from .dwconv_norm import norm_reference, wide
from .launch import ProductLaunch, dependent, fitted_launch, overlaps
from .operation import operation, shaped, sum_type, wrap_triton
from .project import empty_parts, launch_add_parts


def stem_reference(
    images: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, offset: Tensor | None, norm: str, eps: float
) -> Tensor:
    """(N, C, H, W) of any type, (O, C, K, K) -> (N, H / K, W / K, O): convolution of stride K, norm."""
    y = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[-1]).permute(0, 2, 3, 1)
    y = norm_reference(wide(y), norm, eps) * wide(gain)
    return (y if offset is None else y + wide(offset)).to(weight.dtype).contiguous()


def downsample_reference(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
    """(N, H, W, C), (O, C, 2, 2) -> (N, H / 2, W / 2, O): norm without scale and shift, convolution of stride 2."""
    y = norm_reference(wide(x), norm, eps).to(x.dtype)
    return F.conv2d(y.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1).contiguous()


def pool_norm_reference(x: Tensor, norm: str, eps: float) -> Tensor:
    """(N, H, W, C) -> (N, C) in fp32 at least: mean over the map, norm without scale and shift."""
    return norm_reference(wide(x).mean((1, 2)), norm, eps)


STEM_PIXELS = 64  # a program's; 8 warps: with 4 the tile of 192 channels spills (compiled for sm_90 and sm_100)


def launch_stem(
    images: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, offset: Tensor | None, norm: str, eps: float,
    pixels: int = STEM_PIXELS,
) -> Tensor:  # fmt: skip
    from .patches_triton import stem_kernel

    outputs, channels, size, _ = weight.shape
    height, width = images.shape[2] // size, images.shape[3] // size
    rows = images.shape[0] * height * width
    out = torch.empty((images.shape[0], height, width, outputs), dtype=weight.dtype, device=images.device)
    batch_stride, channel_stride, row_stride, column_stride = images.stride()
    wrap_triton(stem_kernel)[(-(-rows // pixels),)](
        images, weight.contiguous(), bias, gain, gain if offset is None else offset, out, rows,
        batch_stride, row_stride, column_stride, channel_stride,
        H=height, W=width, C=channels, N=outputs, K=size, EPS=eps, NORM=norm, OFFSET=offset is not None,
        PRECISION="ieee", BM=pixels, BN=max(16, 1 << (outputs - 1).bit_length()),
        BK=max(16, 1 << (size * size * channels - 1).bit_length()), num_warps=8,
        **dependent(overlaps(images)),
    )  # fmt: skip
    return out


def launch_downsample(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, launch: ProductLaunch) -> Tensor:
    from .patches_triton import downsample_kernel

    images, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].contiguous()  # the kernel reads every pixel
    outputs, rows = len(weight), images * (height // 2) * (width // 2)
    tiles = -(-rows // launch.m) * -(-outputs // launch.n)
    out = torch.empty((images, height // 2, width // 2, outputs), dtype=x.dtype, device=x.device)
    parts = empty_parts(out, weight, launch)
    wrap_triton(downsample_kernel)[(tiles * launch.split,)](
        x, weight.permute(0, 2, 3, 1).contiguous(), bias, parts, rows, H=height // 2, W=width // 2, C=channels,
        N=outputs, EPS=eps, NORM=norm, PRECISION="ieee", BM=launch.m, BN=launch.n, BK=launch.k, GROUP=launch.group,
        SPLIT=launch.split, num_warps=launch.warps, num_stages=launch.stages, **dependent(launch.pdl),
    )  # fmt: skip
    if launch.split > 1:
        launch_add_parts(parts, bias, None, None, out, launch)
    return out


def launch_patches(x: Tensor, norm: str, eps: float) -> Tensor:
    """(N, H, W, C) -> (N, H / 2, W / 2, 4 * C): normalized, the pixels of each patch as they are in a weight."""
    from .patches_triton import normalized_patches_kernel

    images, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].contiguous()  # the kernel reads every pixel
    rows = images * (height // 2) * (width // 2)
    out = torch.empty((images, height // 2, width // 2, 4 * channels), dtype=x.dtype, device=x.device)
    wide_row = 1 << (channels - 1).bit_length()
    pixels = max(1, 4096 // wide_row)
    wrap_triton(normalized_patches_kernel)[(-(-rows * 4 // pixels),)](
        x, out, rows, H=height // 2, W=width // 2, C=channels, WIDE=wide_row, BP=pixels, EPS=eps, NORM=norm,
        num_warps=4, **dependent(overlaps(x)),
    )  # fmt: skip
    return out


def launch_pool_norm(x: Tensor, norm: str, eps: float) -> Tensor:
    from .patches_triton import pool_norm_kernel

    x = x.contiguous()
    images, height, width, channels = x.shape
    out = torch.empty((images, channels), dtype=torch.float32, device=x.device)
    width_of_row = 1 << (channels - 1).bit_length()
    wrap_triton(pool_norm_kernel)[(images,)](
        x, out, height * width, C=channels, WIDE=width_of_row, BP=max(1, 8192 // width_of_row), EPS=eps, NORM=norm,
        num_warps=8, **dependent(overlaps(x)),
    )  # fmt: skip
    return out


def _stem(
    images: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, offset: Tensor | None, norm: str, eps: float
) -> Tensor:
    return launch_stem(images, weight, bias, gain, offset, norm, eps)


def _empty_map(images: Tensor, weight: Tensor, *rest: object) -> Tensor:
    batch, _, height, width = images.shape
    outputs, _, size, _ = weight.shape
    return shaped(weight, (batch, height // size, width // size, outputs))


def _downsample(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
    images, height, width, _ = x.shape
    rows = images * (height // 2) * (width // 2)
    if hopper.takes_product(x, rows, weight):
        return hopper.downsample(launch_patches(x, norm, eps), weight, bias)
    launch = fitted_launch(weight, rows, parts=(1, 2, 4))
    return launch_downsample(x, weight, bias, norm, eps, launch)


def _empty_half(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    images, height, width, _ = x.shape
    return shaped(x, (images, height // 2, width // 2, len(weight)))


stem = operation("stem", _stem, stem_reference, _empty_map)
"""Patch convolution and norm: (N, C, H, W) -> (N, H / K, W / K, O).

Args:
    images: (N, C, H, W) with any strides: uint8 NHWC permuted, or floats.
    weight: (O, C, K, K), fp16, bf16 or fp32; bias: (O,).
    gain, offset: (O,), the norm's scale and shift; the shift may be None.
    norm, eps: as of `dwconv_norm`.
"""

downsample = operation("downsample", _downsample, downsample_reference, _empty_half)
"""Norm without scale and shift, 2 x 2 convolution of stride 2: (N, H, W, C) -> (N, H / 2, W / 2, O).

Args:
    x: (N, H, W, C); fp16, bf16 or fp32. An odd last row or column is dropped.
    weight: (O, C, 2, 2), in the channels_last memory format, or it is copied to it each time; bias: (O,).
"""

pool_norm = operation(
    "pool_norm",
    launch_pool_norm,
    pool_norm_reference,
    lambda x, norm, eps: shaped(x, (x.shape[0], x.shape[3]), sum_type(x)),
)
"""(N, H, W, C) -> (N, C) in fp32: mean over the map, norm without scale and shift."""
