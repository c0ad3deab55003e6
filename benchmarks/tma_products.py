"""Drafts: the two products of a block with tensor descriptors and a persistent grid. Never run on a GPU."""

import torch
import triton
import triton.language as tl
from kernel_bench import Case, Subject, normal
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from convnext_deploy.kernels.triton_blocks import activated

# Tile of BM x BN; what ahead-of-time compilation for sm_90 found to fit.
VARIANTS = {"128x256": (128, 256, 3), "128x128": (128, 128, 2)}  # columns, stages
BK, GROUP = 64, 8


@triton.jit
def product_kernel(a_desc, b_desc, out_desc, residual_desc, rstd, mean, sums, bias, M, N: tl.constexpr,
                   K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                   PROGRAMS: tl.constexpr, EXPAND: tl.constexpr):  # fmt: skip
    """a (M, K) b (N, K)^T: with EXPAND the deferred norm, bias and GELU, else bias and residual."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        first = tile // (GROUP * tiles_n) * GROUP
        in_group = tl.minimum(tiles_m - first, GROUP)
        inside = tile % (GROUP * tiles_n)
        m, n = (first + inside % in_group) * BM, inside // in_group * BN
        total = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, K, BK):
            total = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, total)
        columns = n + tl.arange(0, BN)
        shift = tl.load(bias + columns).to(tl.float32)[None, :]
        if EXPAND:
            rows = m + tl.arange(0, BM)
            scale = tl.load(rstd + rows, mask=rows < M, other=0.0)[:, None]
            centre = tl.load(mean + rows, mask=rows < M, other=0.0)[:, None]
            total = scale * (total - centre * tl.load(sums + columns)[None, :]) + shift
            total = activated(total, "gelu", False)
        else:
            total += shift + residual_desc.load([m, n]).to(tl.float32)
        out_desc.store([m, n], total.to(tl.float16))


def subject(kind: str, case: Case) -> Subject:
    """The drafts in one stage's shape, on its rows; kind: "expand" or "project"."""
    wide, expand = 4 * case.channels, kind == "expand"
    n, k = (wide, case.channels) if expand else (case.channels, wide)

    def inputs() -> tuple[Tensor, ...]:
        def fresh(*shape: int, scale: float = 1.0) -> Tensor:
            return normal(*shape, like=case, device="cuda", scale=scale)

        weight = fresh(n, k, scale=k**-0.5)
        rstd, mean = torch.rand(case.pixels, device="cuda") + 0.5, torch.randn(case.pixels, device="cuda")
        return fresh(case.pixels, k), weight, fresh(n), fresh(case.pixels, n), rstd, mean, weight.float().sum(1)

    def exact(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
        y = a @ weight.t()
        if not expand:
            return y + bias + residual
        rstd, mean, sums = norm
        return torch.nn.functional.gelu(rstd[:, None] * (y - mean[:, None] * sums) + bias)

    def variant(columns: int, stages: int, per_processor: int):  # type: ignore[no-untyped-def]
        def call(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, rstd: Tensor, mean: Tensor, sums: Tensor):  # type: ignore[no-untyped-def]
            out = torch.empty_like(residual)
            programs = torch.cuda.get_device_properties(a.device).multi_processor_count * per_processor
            programs = min(programs, triton.cdiv(len(a), 128) * triton.cdiv(n, columns))
            descriptors = (
                TensorDescriptor.from_tensor(a, [128, BK]), TensorDescriptor.from_tensor(weight, [columns, BK]),
                TensorDescriptor.from_tensor(out, [128, columns]),
                TensorDescriptor.from_tensor(residual, [128, columns]),
            )  # fmt: skip
            product_kernel[(programs,)](
                *descriptors, rstd, mean, sums, bias, len(a), N=n, K=k, BM=128, BN=columns, BK=BK, GROUP=GROUP,
                PROGRAMS=programs, EXPAND=expand, num_warps=8, num_stages=stages,
            )  # fmt: skip
            return out

        return call

    fitting = {name: row for name, row in VARIANTS.items() if n % row[1] == 0}
    if not fitting:
        raise ValueError(f"no draft has tiles that divide {n} columns")
    return Subject(
        inputs=inputs,
        exact=exact,
        contenders={
            name: variant(columns, stages, 1 if columns > 128 else 2) for name, (_, columns, stages) in fitting.items()
        },
        bytes=(5 if expand else 6) * case.pixels * case.channels * 2,
        matrix_flop=2 * case.pixels * n * k,
    )
