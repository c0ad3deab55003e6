"""Norm, linear to 4C and GELU on a GPU: our kernel, which takes the norm deferred, beside PyTorch, eager and compiled.

    python benchmarks/bench_expand.py [--precision fp16] [--batches 1 32 256] [--without-compile]

`compiled, tanh` is the same with GELU's tanh form, which the matrix library has as an epilogue; its error is 4.7e-4.
`linear` is the matrix product alone.
"""

import torch.nn.functional as F
from kernel_bench import OF_TRITON, Case, Subject, compiled, main, moments_of, normal, under
from torch import Tensor

from convnext_deploy.kernels.expand import expand, expand_reference
from convnext_deploy.kernels.launch import conv_launch


def eager(x: Tensor, weight: Tensor, bias: Tensor, *deferred: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6), weight, bias))


def tanh(x: Tensor, weight: Tensor, bias: Tensor, *deferred: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6), weight, bias), approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor, *deferred: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def subject(case: Case, device: str) -> Subject:
    channels, side = case.channels, case.side
    chunk = conv_launch(case.dtype, side, channels, 7).channels

    def inputs() -> tuple[Tensor, ...]:
        x = normal(case.batch, side, side, channels, like=case, device=device)
        weight = normal(4 * channels, channels, like=case, device=device, scale=channels**-0.5)
        bias = normal(4 * channels, like=case, device=device)
        return x, weight, bias, moments_of(x, chunk), weight.double().sum(1).float()

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, row_sums: Tensor) -> Tensor:
        return expand(x, weight, bias, "layernorm", 1e-6, "gelu", moments, row_sums, chunk)

    return Subject(
        inputs=inputs,
        exact=lambda x, weight, bias, *deferred: expand_reference(x, weight, bias, "layernorm", 1e-6, "gelu"),
        contenders={
            "kernel": kernel, "kernel, Triton": under(kernel, OF_TRITON), "eager": eager,
            "compiled": compiled(eager), "compiled, tanh": compiled(tanh),
            "linear": linear,
        },
        bytes=(5 * case.pixels * channels + 4 * channels * channels) * case.dtype.itemsize,
        matrix_flop=8 * case.pixels * channels * channels,
        finish={"linear": None},
    )  # fmt: skip


if __name__ == "__main__":
    main("expand", __doc__, subject)
