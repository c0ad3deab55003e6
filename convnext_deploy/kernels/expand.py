"""The linear that widens a block, with the norm before it and the activation behind it.

The norm was deferred by `dwconv_moments`; here it is applied to the product's result. For ConvNeXt V2 the same kernel
adds up the squares that GRN needs, a tile of rows at a time, so that no sum depends on the order of programs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hopper
from .dwconv_norm import norm_reference, wide
from .launch import ProductLaunch, dependent, fitted_launch
from .operation import operation, shaped, sum_type, wrap_triton

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")


def activated(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def expand_reference(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str) -> Tensor:
    """(..., C), (O, C), (O,) -> (..., O): norm without scale and shift, linear, activation, each in x's type."""
    return activated(F.linear(norm_reference(wide(x), norm, eps).to(x.dtype), weight, bias), activation)


def squares_reference(hidden: Tensor) -> Tensor:
    """(N, H, W, O) -> (N, 1, O): sums of squares over each image, in fp32 at least."""
    return wide(hidden).square().sum((1, 2))[:, None]


def launch_expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    moments: Tensor | None,
    row_sums: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    launch: ProductLaunch,
    *,
    squares: bool = False,
    tf32: bool = False,
    chunk: int = 1,
    scales: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel; arguments that a variant does not have are None.

    Args:
        chunk: channels that one entry of `moments` stands for.
        squares: with them every image has tiles of its own; without, all rows are one image.
        dtype: of the result.

    Returns:
        (..., O), and sums of squares (N, tiles, O) or nothing (0,).
    """
    from .product_triton import expand_kernel

    x = x.contiguous()
    outputs, channels = weight.shape
    images, rows = (x.shape[0], x.shape[1] * x.shape[2]) if squares else (1, x.numel() // channels)
    tiles = -(-rows // launch.m)
    out = torch.empty((*x.shape[:-1], outputs), dtype=dtype or x.dtype, device=x.device)
    sums = torch.empty((images, tiles, outputs) if squares else (0,), dtype=torch.float32, device=x.device)
    chunks = 1 if moments is None else moments.shape[-2]
    wrap_triton(expand_kernel)[(images * tiles * -(-outputs // launch.n),)](
        x, weight.contiguous(), bias, *(bias if t is None else t for t in (moments, row_sums, scales, out_scale)),
        out, sums if squares else bias, rows, tiles, images * tiles,  # what a variant does not read: any pointer
        N=outputs, K=channels, BC=chunk, CHUNKS=chunks, WIDE=1 << (chunks - 1).bit_length(),
        EPS=eps, NORM=norm, ACTIVATION=activation, SQUARES=squares, SCALED=scales is not None,
        QUANTIZE=out_scale is not None, PRECISION="tf32" if tf32 else "ieee",
        BM=launch.m, BN=launch.n, BK=launch.k, GROUP=launch.group,
        num_warps=launch.warps, num_stages=launch.stages, **dependent(launch.pdl),
    )  # fmt: skip
    return out, sums


def expand_launch(x: Tensor, weight: Tensor, squares: bool = False) -> ProductLaunch:
    if squares:
        return fitted_launch(weight, x.shape[1] * x.shape[2], images=x.shape[0])
    return fitted_launch(weight, x.numel() // x.shape[-1])


def tiles_of(x: Tensor, weight: Tensor) -> int:
    """Tiles of rows in one image (N, H, W, C)."""
    return -(-x.shape[1] * x.shape[2] // expand_launch(x, weight, squares=True).m)


def _expand(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, row_sums: Tensor,
    chunk: int, tf32: bool = False,
) -> Tensor:  # fmt: skip
    if hopper.takes_product(x, x.numel() // x.shape[-1], weight):
        return hopper.expand(x, weight, bias, norm, eps, activation, moments, row_sums, chunk)
    launch = expand_launch(x, weight)
    return launch_expand(
        x, weight, bias, moments, row_sums, norm, eps, activation, launch, tf32=tf32, chunk=chunk
    )[0]  # fmt: skip


def _expand_squares(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, row_sums: Tensor,
    chunk: int, tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = expand_launch(x, weight, squares=True)
    return launch_expand(
        x, weight, bias, moments, row_sums, norm, eps, activation, launch, squares=True, tf32=tf32, chunk=chunk
    )


def _expand_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, *deferred: object
) -> Tensor:
    return expand_reference(x, weight, bias, norm, eps, activation)


def _expand_squares_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, *deferred: object
) -> tuple[Tensor, Tensor]:
    hidden = expand_reference(x, weight, bias, norm, eps, activation)
    tiles = tiles_of(x, weight)
    return hidden, squares_reference(hidden).expand(-1, tiles, -1) / tiles  # of each tile: only their sum has a meaning


def _empty_hidden(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return shaped(x, (*x.shape[:-1], len(weight)))


def _empty_hidden_squares(x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _empty_hidden(x, weight), shaped(x, (x.shape[0], tiles_of(x, weight), len(weight)), sum_type(x))


expand = operation("expand", _expand, _expand_cpu, _empty_hidden)
"""Deferred norm, linear, activation: (..., C) -> (..., O).

Args:
    x: (..., C), fp16, bf16 or fp32: what `dwconv_moments` gave.
    weight: (O, C); bias: (O,).
    norm, eps: as of `dwconv_norm`.
    activation: one of `ACTIVATIONS`.
    moments: (..., ceil(C / chunk), 2) fp32, of the same.
    row_sums: (O,) fp32, the sums of the weight's rows.
    chunk: channels that one of the moments stands for.
    tf32: fp32 operands are multiplied as tf32.
"""

expand_squares = operation("expand_squares", _expand_squares, _expand_squares_cpu, _empty_hidden_squares)
"""`expand` of x (N, H, W, C), and sums of squares of its result (N, tiles, O) in fp32 for `grn_factor`."""
