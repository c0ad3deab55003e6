"""Norm, both linears with GELU between them, and residual on a GPU: in one kernel, in our two, and in PyTorch's.

    python benchmarks/bench_mlp.py [--precision fp16] [--batches 1 32 256] [--without-compile]

For up to 128 channels. The GB/s count what one kernel moves, 3 maps, of every contender.
"""

import torch.nn.functional as F
from kernel_bench import OF_TRITON, Case, Subject, compiled, main, moments_of, normal, under
from torch import Tensor

from convnext_deploy.kernels.expand import expand
from convnext_deploy.kernels.launch import conv_launch
from convnext_deploy.kernels.mlp import WIDEST, mlp, mlp_reference
from convnext_deploy.kernels.project import project


def eager(
    x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor, *deferred: Tensor
) -> Tensor:
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6), weight, bias))
    return residual + F.linear(hidden, back, back_bias)


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor, *deferred: Tensor
) -> Tensor:
    return mlp_reference(x, weight, bias, "layernorm", 1e-6, "gelu", back, back_bias, residual)


def subject(case: Case, device: str) -> Subject:
    channels, side = case.channels, case.side
    chunk = conv_launch(case.dtype, side, channels, 7).channels

    def inputs() -> tuple[Tensor, ...]:
        x, residual = (normal(case.batch, side, side, channels, like=case, device=device) for _ in range(2))
        weight = normal(4 * channels, channels, like=case, device=device, scale=channels**-0.5)
        back = normal(channels, 4 * channels, like=case, device=device, scale=0.5 * channels**-0.5)
        bias, back_bias = (normal(width, like=case, device=device) for width in (4 * channels, channels))
        return x, weight, bias, back, back_bias, residual, moments_of(x, chunk), weight.double().sum(1).float()

    def one(
        x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor, moments: Tensor,
        row_sums: Tensor,
    ) -> Tensor:  # fmt: skip
        return mlp(x, weight, bias, "layernorm", 1e-6, "gelu", moments, chunk, back, back_bias, residual)

    def two(
        x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor, moments: Tensor,
        row_sums: Tensor,
    ) -> Tensor:  # fmt: skip
        hidden = expand(x, weight, bias, "layernorm", 1e-6, "gelu", moments, row_sums, chunk)
        return project(hidden, back, back_bias, residual)

    return Subject(
        inputs=inputs,
        exact=exact,
        contenders={
            "kernel": one, "kernel, Triton": under(one, OF_TRITON), "expand, project": two, "eager": eager,
            "compiled": compiled(eager),
        },
        bytes=(3 * case.pixels * channels + 8 * channels * channels) * case.dtype.itemsize,
        matrix_flop=16 * case.pixels * channels * channels,
    )  # fmt: skip


if __name__ == "__main__":
    main("mlp", __doc__, subject, widest=WIDEST)
