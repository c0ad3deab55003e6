"""Depthwise 7x7, bias and norm on a GPU: our kernels beside cuDNN and LayerNorm, eager and compiled.

    python benchmarks/bench_dwconv_norm.py [--precision fp16] [--batches 1 32 256] [--without-compile]

`kernel, deferred` writes the moments and leaves the norm to `expand`; `kernel, whole` writes the norm itself.
`cudnn` is the convolution alone: the rate that every prediction of docs/design/kernels.md hangs on.
"""

import torch.nn.functional as F
from kernel_bench import OF_TRITON, Case, Subject, compiled, main, normal, under
from torch import Tensor

from convnext_deploy.kernels.dwconv_norm import dwconv_moments, dwconv_norm, dwconv_norm_reference, norm_reference


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3, groups=len(weight)).permute(0, 2, 3, 1)
    return F.layer_norm(y, y.shape[-1:], eps=1e-6)


def cudnn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, padding=3, groups=len(weight))


def ended(made: tuple[Tensor, Tensor]) -> Tensor:
    """The convolution with the norm that `expand` would have made."""
    return norm_reference(made[0].float(), "layernorm", 1e-6)


def subject(case: Case, device: str) -> Subject:
    channels, side = case.channels, case.side

    def inputs() -> tuple[Tensor, ...]:
        weight = normal(7, 7, channels, 1, like=case, device=device, scale=1 / 7).permute(2, 3, 0, 1)
        return (
            normal(case.batch, side, side, channels, like=case, device=device), weight,
            normal(channels, like=case, device=device),
        )  # fmt: skip

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dwconv_norm(x, weight, bias, "layernorm", 1e-6)

    return Subject(
        inputs=inputs,
        exact=lambda x, weight, bias: dwconv_norm_reference(x, weight, bias, "layernorm", 1e-6),
        contenders={
            "kernel, deferred": dwconv_moments,
            "kernel, deferred, Triton": under(dwconv_moments, OF_TRITON), "kernel, whole": norm, "eager": eager,
            "compiled": compiled(eager),
            "cudnn": cudnn,
        },
        bytes=2 * case.pixels * channels * case.dtype.itemsize,
        vector_flop=2 * 49 * case.pixels * channels,
        finish={"kernel, deferred": ended, "kernel, deferred, Triton": ended, "cudnn": None},
    )  # fmt: skip


if __name__ == "__main__":
    main("dwconv_norm", __doc__, subject)
