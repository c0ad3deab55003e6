"""The linear that ends a block, with GRN's factor before it (V2) and the residual behind it; layer scale is folded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hopper
from .launch import ProductLaunch, dependent, fitted_launch, overlaps
from .operation import operation, shaped, wrap_triton

PARTS = range(1, 17)  # into how many K may be split


def grn_factor_reference(squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(N, tiles, C) sums of squares, (C,) -> (N, C): what GRN multiplies each channel with."""
    norm = squares.sum(1).sqrt()
    return 1 + weight.to(norm.dtype) * norm / (norm.mean(-1, keepdim=True) + eps)


def project_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor | None = None
) -> Tensor:
    """(N, H, W, K), (C, K), (C,), (N, H, W, C), (N, K) -> (N, H, W, C), each step rounded to hidden's type."""
    if factor is not None:
        hidden = hidden * factor[:, None, None].to(hidden.dtype)
    return residual + F.linear(hidden, weight, bias)


def launch_grn_factor(squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .product_triton import grn_factor_kernel

    images, tiles, channels = squares.shape
    factor = torch.empty((images, channels), dtype=torch.float32, device=squares.device)
    width = 1 << (channels - 1).bit_length()
    wrap_triton(grn_factor_kernel)[(images,)](
        squares.contiguous(), weight, factor, tiles, C=channels, WIDE=width, EPS=eps, num_warps=8,
        **dependent(overlaps(squares)),
    )  # fmt: skip
    return factor


def empty_parts(out: Tensor, weight: Tensor, launch: ProductLaunch) -> Tensor:
    """Where a product's kernel writes to: `out`, or with a split the sums of each part, (split, *out.shape)."""
    if launch.split == 1:
        return out
    wide = torch.int32 if weight.dtype == torch.int8 else torch.float32
    return torch.empty((launch.split, *out.shape), dtype=wide, device=out.device)


def launch_add_parts(
    parts: Tensor, bias: Tensor, residual: Tensor | None, scales: Tensor | None, out: Tensor, launch: ProductLaunch
) -> None:
    """Write to `out` what a split product comes to.

    The last program of a tile could have done it in the same kernel, behind a counter. But counters have to be zeroed
    before each call, which is a kernel or a memory that outlives the call and that a graph of PyTorch's must be told
    of; and that program adds up alone while the GPU waits.
    """
    from .product_triton import add_parts_kernel

    block, channels = 512, out.shape[-1]
    wrap_triton(add_parts_kernel)[(-(-out.numel() // block),)](
        parts, bias, *(bias if t is None else t for t in (residual, scales)), out, out.numel() // channels, N=channels,
        SPLIT=launch.split, SCALED=scales is not None, RESIDUAL=residual is not None, BLOCK=block, num_warps=4,
        **dependent(launch.pdl),
    )  # fmt: skip


def launch_project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    factor: Tensor | None,
    launch: ProductLaunch,
    *,
    tf32: bool = False,
    scales: Tensor | None = None,
    hidden_scale: Tensor | None = None,
) -> Tensor:
    """The Triton kernel; arguments that a variant does not have are None."""
    from .product_triton import project_kernel

    hidden = hidden.contiguous()
    channels, inputs = weight.shape
    rows = hidden.numel() // inputs if factor is None else hidden.shape[1] * hidden.shape[2]
    images = 1 if factor is None else hidden.shape[0]
    tiles = -(-rows // launch.m)
    residual = residual.contiguous()
    out = torch.empty_like(residual)
    parts = empty_parts(out, weight, launch)
    prologue = "none" if factor is None else "factor" if hidden_scale is None else "factor_quantized"
    wrap_triton(project_kernel)[(images * tiles * -(-channels // launch.n) * launch.split,)](
        hidden, weight.contiguous(), bias, residual,
        *(bias if t is None else t for t in (factor, scales, hidden_scale)),  # what is not read: any pointer
        parts, rows, tiles, images * tiles, N=channels, K=inputs, PROLOGUE=prologue, SCALED=scales is not None,
        PRECISION="tf32" if tf32 else "ieee", BM=launch.m, BN=launch.n, BK=launch.k, GROUP=launch.group,
        SPLIT=launch.split, num_warps=launch.warps, num_stages=launch.stages, **dependent(launch.pdl),
    )  # fmt: skip
    if launch.split > 1:
        launch_add_parts(parts, bias, residual, scales, out, launch)
    return out


def project_launch(weight: Tensor, residual: Tensor, factor: Tensor | None) -> ProductLaunch:
    """For a product with weight (C, K); with a factor the tiles hold rows of one image each."""
    if factor is None:
        return fitted_launch(weight, residual.numel() // residual.shape[-1], parts=PARTS)
    return fitted_launch(weight, residual.shape[1] * residual.shape[2], images=residual.shape[0], parts=PARTS)


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor | None = None, tf32: bool = False
) -> Tensor:
    if factor is None and hopper.takes_product(hidden, residual.numel() // residual.shape[-1], weight):
        return hopper.project(hidden, weight, bias, residual)
    launch = project_launch(weight, residual, factor)
    return launch_project(hidden, weight, bias, residual, factor, launch, tf32=tf32)


def _project_cpu(
    hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor | None = None, *tf32: bool
) -> Tensor:
    return project_reference(hidden, weight, bias, residual, factor)


grn_factor = operation(
    "grn_factor",
    launch_grn_factor,
    grn_factor_reference,
    lambda squares, weight, eps: shaped(squares, (squares.shape[0], squares.shape[2])),
)
"""What GRN multiplies each channel of an image with, fp32 (N, C).

Args:
    squares: (N, tiles, C) fp32, of `expand_squares`.
    weight: (C,).
    eps: is added to the mean norm.
"""

project = operation(
    "project", _project, _project_cpu, lambda hidden, weight, bias, residual, *rest: shaped(residual, residual.shape)
)
"""Linear and residual: (N, H, W, K) -> (N, H, W, C).

Args:
    hidden: (N, H, W, K), fp16, bf16 or fp32.
    weight: (C, K); bias: (C,).
    residual: (N, H, W, C).
    factor: (N, K) fp32, multiplied with each image's hidden channels first; or None.
    tf32: fp32 operands are multiplied as tf32.
"""
