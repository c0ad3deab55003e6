"""Both linears of a narrow block in one kernel: norm, linear, activation, linear, residual.

The hidden map, four times as wide as the others, stays in the program that makes it: 3 maps are moved for the 11 of
`expand` and `project`. A program has whole rows, so the norm is not deferred to a product's result but applied to
the rows, in all types: a quarter of the arithmetic, no row sums, and rounded as eager PyTorch rounds it.
"""

import torch
from torch import Tensor

from . import hopper
from .expand import expand_reference
from .launch import MlpLaunch, dependent, mlp_launch
from .operation import operation, shaped, wrap_triton
from .project import project_reference

WIDEST = 128  # channels; the sums of a wider block do not fit into a program's registers beside its hidden columns


def mlp_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, back_weight: Tensor,
    back_bias: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """(..., C), (O, C), (O,), (C, O), (C,), (..., C) -> (..., C), each step rounded to x's type."""
    hidden = expand_reference(x, weight, bias, norm, eps, activation)
    return project_reference(hidden, back_weight, back_bias, residual)


def head_and_rest(channels: int) -> tuple[int, int]:
    """Channels as two widths that products have, powers of two from 16 on; the second is 0 where it would save nothing.

    96 is 64 and 32, where 128 would waste a quarter; 40 is 32 and 16, of which 8 are padding; 24 is 32.
    """
    whole = max(16, 1 << (channels - 1).bit_length())
    head = whole // 2
    rest = max(16, 1 << (channels - head - 1).bit_length()) if channels > head else 0
    return (whole, 0) if head < 16 or head + rest >= whole else (head, rest)


def launch_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    activation: str,
    moments: Tensor,
    chunk: int,
    back_weight: Tensor,
    back_bias: Tensor,
    residual: Tensor,
    launch: MlpLaunch,
    *,
    tf32: bool = False,
) -> Tensor:
    """`mlp` by Triton, on any device that it runs on (its interpreter takes CPU tensors)."""
    from .mlp_triton import mlp_kernel

    hidden, channels = weight.shape
    rows = x.numel() // channels
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    head, rest = head_and_rest(channels)
    chunks = moments.shape[-2]
    wrap_triton(mlp_kernel)[(-(-rows // launch.m),)](
        x.contiguous(), weight.contiguous(), bias, moments, back_weight.contiguous(), back_bias, residual.contiguous(),
        out, rows, C=channels, HIDDEN=hidden, BC=chunk, CHUNKS=chunks, WIDE=1 << (chunks - 1).bit_length(),
        EPS=eps, NORM=norm, ACTIVATION=activation, PRECISION="tf32" if tf32 else "ieee",
        BM=launch.m, BH=launch.hidden, HEAD=head, REST=rest, num_warps=launch.warps, num_stages=launch.stages,
        **dependent(launch.pdl),
    )  # fmt: skip
    return out


def _mlp(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, chunk: int,
    back_weight: Tensor, back_bias: Tensor, residual: Tensor, tf32: bool = False,
) -> Tensor:  # fmt: skip
    if hopper.takes_mlp(x, weight):
        return hopper.mlp(x, weight, bias, norm, eps, activation, moments, chunk, back_weight, back_bias, residual)
    return launch_mlp(
        x, weight, bias, norm, eps, activation, moments, chunk, back_weight, back_bias, residual,
        mlp_launch(x, x.numel() // x.shape[-1], len(weight)), tf32=tf32,
    )  # fmt: skip


def _mlp_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, chunk: int,
    back_weight: Tensor, back_bias: Tensor, residual: Tensor, *tf32: bool,
) -> Tensor:  # fmt: skip
    return mlp_reference(x, weight, bias, norm, eps, activation, back_weight, back_bias, residual)


mlp = operation("mlp", _mlp, _mlp_cpu, lambda x, *rest: shaped(x, x.shape))
"""Norm, linear, activation, linear, residual: (..., C) -> (..., C), for C up to `WIDEST`.

Args:
    x: (..., C), fp16, bf16 or fp32: what `dwconv_moments` gave.
    weight: (O, C); bias: (O,).
    norm, eps: as of `dwconv_norm`.
    activation: one of `expand.ACTIVATIONS`.
    moments: (..., ceil(C / chunk), 2) fp32, of the same.
    chunk: channels that one of the moments stands for.
    back_weight: (C, O); back_bias: (C,).
    residual: (..., C).
    tf32: fp32 operands are multiplied as tf32.
"""
