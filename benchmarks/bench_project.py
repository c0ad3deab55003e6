"""Linear from 4C and residual on a GPU, and with GRN before it: our kernels beside PyTorch, eager and compiled.

    python benchmarks/bench_project.py [--precision fp16] [--batches 1 32 256] [--without-compile]

At small batches also with K whole, with tiles as wide as at large ones, and with each kernel begun when the one before
has ended.
"""

import torch.nn.functional as F
from kernel_bench import (
    IN_TURN,
    OF_TRITON,
    SMALL_BATCH,
    WHOLE_K,
    WIDE_TILES,
    Case,
    Subject,
    compiled,
    main,
    normal,
    under,
)  # fmt: skip
from torch import Tensor

from convnext_deploy.kernels.project import project, project_reference


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor) -> Tensor:
    return residual + F.linear(hidden, weight, bias)


def eager_grn(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor) -> Tensor:
    return residual + F.linear(hidden * factor[:, None, None].to(hidden.dtype), weight, bias)


def kernel(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, factor: Tensor) -> Tensor:
    return project(hidden, weight, bias, residual)


def subject(case: Case, device: str) -> Subject:
    channels, side = case.channels, case.side

    def inputs() -> tuple[Tensor, ...]:
        return (
            normal(case.batch, side, side, 4 * channels, like=case, device=device),
            normal(channels, 4 * channels, like=case, device=device, scale=0.5 * channels**-0.5),
            normal(channels, like=case, device=device),
            normal(case.batch, side, side, channels, like=case, device=device),
            normal(case.batch, 4 * channels, like=case, device=device).float().abs(),
        )

    small = {"whole K": WHOLE_K, "wide tiles": WIDE_TILES, "in turn": IN_TURN} if case.batch <= SMALL_BATCH else {}
    return Subject(
        inputs=inputs,
        exact=lambda hidden, weight, bias, residual, factor: project_reference(hidden, weight, bias, residual),
        contenders={
            "kernel": kernel, "kernel, Triton": under(kernel, OF_TRITON), "eager": eager, "compiled": compiled(eager),
            "kernel, GRN": project, "eager, GRN": eager_grn, "compiled, GRN": compiled(eager_grn),
            **{f"kernel, {name}": under(kernel, settings) for name, settings in small.items()},
        },
        bytes=(6 * case.pixels * channels + 4 * channels * channels) * case.dtype.itemsize,
        matrix_flop=8 * case.pixels * channels * channels,
        finish={"kernel, GRN": None, "eager, GRN": None, "compiled, GRN": None},  # another function
    )  # fmt: skip


if __name__ == "__main__":
    main("project", __doc__, subject)
