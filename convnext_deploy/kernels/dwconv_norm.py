"""Depthwise convolution and norm, NHWC: whole, or with the norm deferred into the product that follows.

Deferred, the convolution is written as it is, in its own type, beside the moments of each pixel: the mean of every
chunk of channels, and the sum of squares around it. `expand` makes the norm of them. So a program needs no more than a
chunk of channels, and nothing is read twice. The moments are of the fp32 sums, before they are rounded; on Hopper's
matrix units of the rounded results, as in the reference.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hopper, hopper_dwconv
from .launch import ConvLaunch, conv_launch, dependent, overlaps, spread_strips
from .operation import operation, shaped, sum_type, wrap_triton


def norm_reference(x: Tensor, norm: str, eps: float) -> Tensor:
    """A norm without scale and shift over the last axis, as `models.convnext.ChannelNorm` defines each."""
    centred = x - x.mean(-1, keepdim=True)
    if norm == "layernorm":
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if norm == "rmsnorm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    channels = x.shape[-1]
    return x * torch.rsqrt(centred.square().mean(-1, keepdim=True) * (channels / (channels - 1)) + eps)


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, H, W, C), (C, 1, K, K), (C,) -> (N, H, W, C), in x's type."""
    padding = weight.shape[-1] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight))
    return y.permute(0, 2, 3, 1).contiguous()


def wide(x: Tensor) -> Tensor:
    """In the type that sums of it are in."""
    return x.to(sum_type(x))


def launch_of(x: Tensor, weight: Tensor, whole: bool = False) -> ConvLaunch:
    """The record for an input (N, H, W, C) and a weight (C, 1, K, K); `whole`: of the kernel that ends the norm."""
    _, height, _, channels = x.shape
    launch = spread_strips(conv_launch(x.dtype, height, channels, weight.shape[-1]), x, whole)
    return replace(launch, pdl=overlaps(x))


def dwconv_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
    """(N, H, W, C) -> (N, H, W, C), normalized without scale and shift. The norm's statistics are in fp32 at least."""
    return norm_reference(wide(conv_reference(x, weight, bias)), norm, eps).to(x.dtype)


def dwconv_moments_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, W, C) -> the convolution (N, H, W, C), and moments (N, H, W, chunks, 2) in fp32 at least."""
    y = conv_reference(x, weight, bias)
    moments = []
    for chunk in torch.split(wide(y), launch_of(x, weight).channels, -1):
        mean = chunk.mean(-1, keepdim=True)
        moments.append(torch.cat((mean, (chunk - mean).square().sum(-1, keepdim=True)), -1))
    return y, torch.stack(moments, -2)


def taps(weight: Tensor) -> Tensor:
    """(C, 1, K, K) -> (K * K, C), contiguous: a view where `use._lay_out` has laid the weight out so."""
    return weight.permute(2, 3, 0, 1).contiguous().reshape(-1, len(weight))


def _grid(x: Tensor, launch: ConvLaunch) -> int:
    """Programs over images, strips and columns."""
    images, height, width, _ = x.shape
    return images * -(-height // launch.rows) * -(-width // launch.columns)


def launch_moments(x: Tensor, weight: Tensor, bias: Tensor, launch: ConvLaunch) -> tuple[Tensor, Tensor]:
    """`dwconv_moments` by Triton, on any device that it runs on (its interpreter takes CPU tensors)."""
    from .dwconv_norm_triton import dwconv_moments_kernel

    x = x.contiguous()
    images, height, width, channels = x.shape
    chunks = -(-channels // launch.channels)
    y = torch.empty_like(x)
    moments = torch.empty((images, height, width, chunks, 2), dtype=torch.float32, device=x.device)
    wrap_triton(dwconv_moments_kernel)[(_grid(x, launch), chunks)](
        x, taps(weight), bias, y, moments, H=height, W=width, C=channels, K=weight.shape[-1],
        ROWS=launch.rows, BW=launch.columns, BC=launch.channels, PACKED=launch.packed, num_warps=launch.warps,
        **dependent(launch.pdl),
    )  # fmt: skip
    return y, moments


def launch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, launch: ConvLaunch, scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`dwconv_norm`, or with a scale `dwconv_norm_quantized`, by Triton."""
    from .dwconv_norm_triton import dwconv_norm_kernel

    x = x.contiguous()
    _, height, width, channels = x.shape
    y = torch.empty_like(x)
    out = None if scale is None else torch.empty_like(x, dtype=dtype)
    wrap_triton(dwconv_norm_kernel)[(_grid(x, launch),)](
        x, taps(weight), bias, y, *(bias if t is None else t for t in (out, scale)),  # what is not read: any pointer
        H=height, W=width, C=channels, K=weight.shape[-1],
        ROWS=launch.rows, BW=launch.columns, BC=launch.channels, PACKED=launch.packed,
        EPS=eps, NORM=norm, QUANTIZE=scale is not None, num_warps=launch.warps, **dependent(launch.pdl),
    )  # fmt: skip
    return y if out is None else out


def launch_codes(
    y: Tensor, moments: Tensor, chunk: int, norm: str, eps: float, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`dwconv_norm_quantized` of what `dwconv_moments` gave, with moments of `chunk` channels, by Triton."""
    from .dwconv_norm_triton import norm_codes_kernel

    channels, chunks, rows = y.shape[-1], moments.shape[-2], 32
    out = torch.empty_like(y, dtype=dtype)
    wrap_triton(norm_codes_kernel)[(-(-y.numel() // channels // rows),)](
        y, moments, scale, out, y.numel() // channels, C=channels, CHUNK=chunk, CHUNKS=chunks,
        WIDE=1 << (chunks - 1).bit_length(), BM=rows, BC=64 if channels % 64 == 0 else 32, EPS=eps, NORM=norm,
        num_warps=4, **dependent(overlaps(y)),
    )  # fmt: skip
    return out


def _dwconv_norm(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
    return launch_norm(x, weight, bias, norm, eps, launch_of(x, weight, whole=True))


def _dwconv_moments(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    launch = launch_of(x, weight)
    if hopper.takes_dwconv(x, weight):
        return hopper_dwconv.dwconv_moments(x, taps(weight), bias, launch.channels)
    return launch_moments(x, weight, bias, launch)


def _empty_moments(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    chunks = -(-x.shape[3] // launch_of(x, weight).channels)
    return shaped(x, x.shape), shaped(x, (*x.shape[:3], chunks, 2), sum_type(x))


dwconv_norm = operation(
    "dwconv_norm", _dwconv_norm, dwconv_norm_reference, lambda x, weight, bias, norm, eps: shaped(x, x.shape)
)
"""Depthwise convolution, bias, norm.

Args:
    x: (N, H, W, C), fp16, bf16 or fp32.
    weight: (C, 1, K, K), x's type; K odd, padded by K // 2.
    bias: (C,).
    norm: "layernorm", "rmsnorm" or "simplenorm", over C, without scale and shift.
"""

dwconv_moments = operation("dwconv_moments", _dwconv_moments, dwconv_moments_reference, _empty_moments)
"""Depthwise convolution and bias of the same arguments, and what a norm of it needs: see the module's text.

Returns:
    (N, H, W, C) in x's type, and (N, H, W, chunks, 2) in fp32, with chunks of `launch_of(x, weight).channels`.
"""
