"""The Triton kernels in Triton's interpreter, beside float64. `test_kernels.py` runs this file in a process of its own:
TRITON_INTERPRET has to be set before triton is imported, and nothing else that uses Triton runs under it.

An error is measured as that of PyTorch in the same type: norm of the difference from float64 over the norm.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_deploy.kernels import dwconv_norm as dw
from convnext_deploy.kernels import expand as ex
from convnext_deploy.kernels import mlp as ml
from convnext_deploy.kernels import patches as pa
from convnext_deploy.kernels import project as pr
from convnext_deploy.kernels import quantized as q8
from convnext_deploy.kernels.launch import ConvLaunch, MlpLaunch, ProductLaunch, conv_launch
from convnext_deploy.kernels.triton_blocks import activated
from convnext_deploy.models.registry import VARIANTS

TORCH_TYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _converted_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter truncates to bf16 and carries wrongly into fp8's exponent, where GPUs round to nearest;
    it multiplies the bits of bf16 as integers; it does not round the operands of a tf32 product, as GPUs do; and the
    order in which NumPy's BLAS adds up a product depends on the product's shape and on the CPU."""
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
        from_type, to_type = TORCH_TYPES[source.name], TORCH_TYPES[target.name]
        values = torch.from_numpy(np.array(data, copy=True, order="C").view(np.uint8)).view(from_type).to(to_type)
        found = values.view(torch.uint8).numpy().view(bits[to_type.itemsize])
        return found.reshape(data.shape)

    def operand(handle: Any, precision: Any) -> Any:
        if handle.dtype.is_int():
            return handle.data
        bits = convert(handle.data, handle.dtype, tl.float32, None)
        return (bits & 0xFFFFE000 if precision == ir.INPUT_PRECISION.TF32 else bits).view(np.float32)

    def dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        # (M, K) by (K, N), added in the order of K: a BLAS takes another order for another shape, a GPU does not.
        rows, columns = operand(a, precision), operand(b, precision)
        product = np.zeros(total.data.shape, total.data.dtype)
        for k in range(rows.shape[1]):
            product += np.multiply(rows[:, k, None], columns[k], dtype=product.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels.py")

HALF = (torch.float16, torch.bfloat16)
TYPES = (*HALF, torch.float32)
CHANNELS = sorted({width for fields in VARIANTS.values() for width in fields["dims"]})
SMALL = ProductLaunch(m=32, n=32, k=32, warps=4, stages=2)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def conv_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel_size: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    channels = shape[-1]
    weight = random(channels, 1, kernel_size, kernel_size, dtype=dtype, scale=1 / kernel_size)
    return random(*shape, dtype=dtype), weight, random(channels, dtype=dtype, seed=1)


def strips(x: Tensor, weight: Tensor) -> ConvLaunch:
    """As high as they are at large batches; `dw.launch_of` has lower ones for maps as small as these."""
    _, height, _, channels = x.shape
    return conv_launch(x.dtype, height, channels, weight.shape[-1])


# dwconv_norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel_size"),
    [
        ((3, 3, 2, 40), 7),  # channels that no chunk divides, a map smaller than the kernel
        ((1, 2, 9, 64), 7),  # more columns than a program takes
        ((1, 9, 1, 33), 7),  # an odd number of channels; two strips for wide types
        ((1, 2, 2, 96), 5),
        ((2, 3, 2, 64), 3),
        ((1, 1, 1, 7), 7),
    ],
)
def test_dwconv_norm_equals_float64_to_the_rounding_of_its_type(
    shape: tuple[int, int, int, int], kernel_size: int, dtype: torch.dtype
) -> None:
    x, weight, bias = conv_inputs(shape, dtype, kernel_size)
    exact = dw.dwconv_norm_reference(x.double(), weight.double(), bias.double(), "layernorm", 1e-6)
    eager = dw.dwconv_norm_reference(x, weight, bias, "layernorm", 1e-6)
    found = dw.launch_norm(x, weight, bias, "layernorm", 1e-6, strips(x, weight))
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 2, 40), (1, 2, 9, 64), (1, 9, 1, 33)])
def test_dwconv_moments_equals_float64_to_the_rounding_of_its_type(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, weight, bias = conv_inputs(shape, dtype)
    exact, exact_moments = dw.dwconv_moments_reference(x.double(), weight.double(), bias.double())
    eager = dw.conv_reference(x, weight, bias)
    y, moments = dw.launch_moments(x, weight, bias, strips(x, weight))
    assert relative_error(y, exact) <= 2 * relative_error(eager, exact) + 1e-7
    limit = 1e-3 if strips(x, weight).packed else 1e-5  # fp32 sums of exact products, or of rows added in fp16
    torch.testing.assert_close(moments.double(), exact_moments, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_lower_strips_give_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias = conv_inputs((1, 7, 3, 40), dtype)

    def results(launch: ConvLaunch) -> tuple[Tensor, ...]:
        norm = dw.launch_norm(x, weight, bias, "layernorm", 1e-6, launch)
        return *dw.launch_moments(x, weight, bias, launch), norm

    launch = strips(x, weight)
    high = results(launch)
    for rows in (1, 2, 4):
        assert all(map(torch.equal, results(replace(launch, rows=rows)), high))


def alike(channels: int) -> tuple[object, ...]:
    """Widths of which this is the same have the same strips, and the same of their channels in the last chunk."""
    launch = conv_launch(torch.float16, 1, channels, 7)
    return launch, channels % launch.channels, channels > launch.channels


WIDTHS = list({alike(channels): channels for channels in reversed(CHANNELS)}.values())


@pytest.mark.parametrize("channels", WIDTHS)
def test_dwconv_moments_takes_every_width_of_the_family(channels: int) -> None:
    x, weight, bias = conv_inputs((1, 1, 1, channels), torch.float16)
    exact, _ = dw.dwconv_moments_reference(x.double(), weight.double(), bias.double())
    found, _ = dw.launch_moments(x, weight, bias, strips(x, weight))
    assert relative_error(found, exact) < 1e-3


def test_dwconv_of_a_strided_input_equals_that_of_its_copy() -> None:
    x, weight, bias = conv_inputs((1, 4, 4, 32), torch.float16)
    launch = strips(x[:, ::2], weight)
    for strided in (x[:, ::2], x.permute(0, 2, 1, 3)[:, ::2]):
        first, moments = dw.launch_moments(strided, weight, bias, launch)
        second, same = dw.launch_moments(strided.contiguous(), weight, bias, launch)
        assert torch.equal(first, second)
        assert torch.equal(moments, same)


def test_dwconv_norm_of_a_map_with_a_huge_mean_is_as_exact_as_eager() -> None:
    x, weight, bias = conv_inputs((1, 2, 3, 64), torch.float16)
    bias = bias + 3000
    exact = dw.dwconv_norm_reference(x.double(), weight.double(), bias.double(), "layernorm", 1e-6)
    eager = dw.dwconv_norm_reference(x, weight, bias, "layernorm", 1e-6)
    found = dw.launch_norm(x, weight, bias, "layernorm", 1e-6, strips(x, weight))
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact)


# activations ---------------------------------------------------------------------------------------------------------


@triton.jit
def activation_kernel(x, y, SIZE: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's language
    at = tl.arange(0, SIZE)
    tl.store(y + at, activated(tl.load(x + at), KIND, EXACT))


@pytest.mark.parametrize(
    ("kind", "exact", "limit"),
    [("gelu", False, 2.6e-5), ("gelu", True, 1e-6), ("gelu_tanh", False, 5e-6), ("silu", False, 5e-6)],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the sigmoid is zero there, as on a GPU
def test_activations_are_as_near_to_float64_as_they_say(kind: str, exact: bool, limit: float) -> None:
    x = torch.linspace(-40, 40, 1 << 17)
    found = torch.empty_like(x)
    activation_kernel[(1,)](x, found, SIZE=len(x), KIND=kind, EXACT=exact)
    assert (found.double() - ex.activated(x.double(), kind)).abs().max().item() < limit


# expand --------------------------------------------------------------------------------------------------------------


def moments_of(x: Tensor, chunk: int) -> Tensor:
    """(..., chunks, 2) fp32, as `dwconv_moments` gives them."""
    parts = []
    for part in x.double().split(chunk, -1):
        mean = part.mean(-1, keepdim=True)
        parts.append(torch.cat((mean, (part - mean).square().sum(-1, keepdim=True)), -1))
    return torch.stack(parts, -2).float()


def product_inputs(x: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    weight = random(outputs, x.shape[-1], dtype=x.dtype, scale=x.shape[-1] ** -0.5)
    return weight, random(outputs, dtype=x.dtype, seed=1)


def expanded(x: Tensor, weight: Tensor, bias: Tensor, norm: str, activation: str, **options: Any) -> Tensor:
    row_sums = weight.double().sum(1).float()
    return ex.launch_expand(
        x, weight, bias, moments_of(x, 32), row_sums, norm, 1e-6, activation, SMALL, chunk=32, **options
    )[0]


def expand_is_exact(x: Tensor, outputs: int, norm: str = "layernorm", activation: str = "gelu") -> None:
    weight, bias = product_inputs(x, outputs)
    exact = ex.expand_reference(x.double(), weight.double(), bias.double(), norm, 1e-6, activation)
    eager = ex.expand_reference(x, weight, bias, norm, 1e-6, activation)
    found = expanded(x, weight, bias, norm, activation)
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((3, 3, 5, 40), 160),  # nothing divides the tile
        ((1, 4, 8, 96), 64),  # everything does
        ((1, 1, 1, 33), 7),
    ],
)
def test_expand_equals_float64_to_the_rounding_of_its_type(
    shape: tuple[int, int, int, int], outputs: int, dtype: torch.dtype
) -> None:
    expand_is_exact(random(*shape, dtype=dtype), outputs)


@pytest.mark.parametrize("norm", ["rmsnorm", "simplenorm"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "none"])
def test_expand_has_every_norm_and_activation(norm: str, activation: str) -> None:
    expand_is_exact(random(1, 3, 5, 40, dtype=torch.float16) + 1, 40, norm, activation)


@pytest.mark.parametrize("channels", CHANNELS)
def test_expand_takes_every_width_of_the_family(channels: int) -> None:
    expand_is_exact(random(1, 1, 3, channels, dtype=torch.float16), 32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [30.0, 3000.0])
def test_expand_of_rows_with_a_large_mean_is_as_exact_as_eager(mean: float, dtype: torch.dtype) -> None:
    expand_is_exact((random(1, 3, 5, 96, dtype=torch.float32) + mean).to(dtype), 64)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_expand_behind_dwconv_moments_is_as_exact_as_eager(offset: float, dtype: torch.dtype) -> None:
    """The two kernels together: the moments are of the exact sums, and what they normalize has been rounded."""
    x, weight, bias = conv_inputs((1, 2, 3, 96), dtype)
    bias = bias + offset
    wide, wide_bias = product_inputs(x, 64)

    def reference(to: torch.dtype) -> Tensor:
        y = dw.conv_reference(x.to(to), weight.to(to), bias.to(to))
        return ex.expand_reference(y, wide.to(to), wide_bias.to(to), "layernorm", 1e-6, "gelu")

    launch = strips(x, weight)
    y, moments = dw.launch_moments(x, weight, bias, launch)
    row_sums = wide.double().sum(1).float()
    found, _ = ex.launch_expand(
        y, wide, wide_bias, moments, row_sums, "layernorm", 1e-6, "gelu", SMALL, chunk=launch.channels
    )
    exact = reference(torch.float64)
    assert relative_error(found, exact) <= 2 * relative_error(reference(dtype), exact) + 1e-7


def test_dwconv_of_values_near_the_end_of_fp16_is_finite_and_exact() -> None:
    x, weight, bias = conv_inputs((1, 2, 3, 32), torch.float16)
    x, weight = (x * 8000).clamp(-65504, 65504), weight / 4
    exact, _ = dw.dwconv_moments_reference(x.double(), weight.double(), bias.double())
    eager = dw.conv_reference(x, weight, bias)
    found, moments = dw.launch_moments(x, weight, bias, strips(x, weight))
    assert moments.isfinite().all()
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact)


def test_expand_of_values_near_the_end_of_fp16_is_finite_and_exact() -> None:
    expand_is_exact(random(1, 3, 5, 64, dtype=torch.float32, scale=15000.0).clamp(-65504, 65504).half(), 64)


def test_expand_of_a_strided_input_equals_that_of_its_copy() -> None:
    x = random(1, 4, 6, 96, dtype=torch.float16)[:, :, ::2, ::2]
    weight, bias = product_inputs(x, 64)
    assert torch.equal(
        expanded(x, weight, bias, "layernorm", "gelu"), expanded(x.contiguous(), weight, bias, "layernorm", "gelu")
    )


def test_expand_in_tf32_normalizes_before_it_rounds() -> None:
    x = random(1, 3, 5, 96, dtype=torch.float32) + 100
    weight, bias = product_inputs(x, 64)
    exact = ex.expand_reference(x.double(), weight.double(), bias.double(), "layernorm", 1e-6, "gelu")
    assert relative_error(expanded(x, weight, bias, "layernorm", "gelu", tf32=True), exact) < 1e-3  # 2^-11 an operand


# grn -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3, 5, 40), (2, 6, 6, 32)])  # a tile and less an image; two of them
def test_grn_between_expand_and_project_equals_float64(shape: tuple[int, int, int, int]) -> None:
    x, residual = random(*shape, dtype=torch.float16), random(*shape, dtype=torch.float16, seed=1)
    channels = shape[-1]
    weight, bias = product_inputs(x, 4 * channels)
    gain = random(4 * channels, dtype=torch.float16, seed=2)
    last, last_bias = random(channels, 4 * channels, dtype=torch.float16, scale=0.1), bias[:channels].clone()

    def reference(dtype: torch.dtype) -> Tensor:
        hidden = ex.expand_reference(x.to(dtype), weight.to(dtype), bias.to(dtype), "layernorm", 1e-6, "gelu")
        factor = pr.grn_factor_reference(ex.squares_reference(hidden), gain.to(dtype), 1e-6)
        return pr.project_reference(hidden, last.to(dtype), last_bias.to(dtype), residual.to(dtype), factor)

    hidden, squares = ex.launch_expand(
        x, weight, bias, moments_of(x, 32), weight.double().sum(1).float(), "layernorm", 1e-6, "gelu", SMALL,
        squares=True, chunk=32,
    )  # fmt: skip
    factor = pr.launch_grn_factor(squares, gain, 1e-6)
    found = pr.launch_project(hidden, last, last_bias, residual, factor, SMALL)
    exact = reference(torch.float64)
    assert relative_error(found, exact) <= 2 * relative_error(reference(torch.float16), exact)


def test_grn_factor_adds_tiles_in_order_and_ignores_none() -> None:
    squares, weight = random(2, 5, 33, dtype=torch.float32).square(), random(33, dtype=torch.float32)
    exact = pr.grn_factor_reference(squares.double(), weight.double(), 1e-6)
    assert relative_error(pr.launch_grn_factor(squares, weight, 1e-6), exact) < 1e-6


# project -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((3, 3, 5, 40), 160), ((1, 4, 8, 64), 96), ((1, 1, 1, 7), 33), ((1, 1, 3, 24), 3072)],
)
def test_project_equals_float64_to_the_rounding_of_its_type(
    shape: tuple[int, int, int, int], inputs: int, dtype: torch.dtype
) -> None:
    hidden, residual = random(*shape[:-1], inputs, dtype=dtype), random(*shape, dtype=dtype)
    weight, bias = product_inputs(hidden, shape[-1])
    exact = pr.project_reference(hidden.double(), weight.double(), bias.double(), residual.double())
    eager = pr.project_reference(hidden, weight, bias, residual)
    found = pr.launch_project(hidden, weight, bias, residual, None, SMALL)
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


# split products ------------------------------------------------------------------------------------------------------


SPLIT = pytest.mark.parametrize(
    ("shape", "inputs", "split"),
    [
        ((3, 3, 5, 40), 160, 2),  # rows and columns that do not fill a tile; 5 trips of 32 for 2 parts
        ((1, 4, 8, 64), 256, 8),  # everything does
        ((1, 1, 3, 24), 200, 3),  # K that no part divides
        ((1, 1, 1, 7), 33, 5),  # more parts than trips: some have nothing to add
    ],
)


@SPLIT
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("with_factor", [False, True])
def test_a_split_project_equals_float64_to_the_rounding_of_its_type(
    shape: tuple[int, int, int, int], inputs: int, split: int, dtype: torch.dtype, with_factor: bool
) -> None:
    hidden, residual = random(*shape[:-1], inputs, dtype=dtype), random(*shape, dtype=dtype)
    factor = 1 + random(shape[0], inputs, dtype=torch.float32).abs() if with_factor else None
    weight, bias = product_inputs(hidden, shape[-1])
    wide = None if factor is None else factor.double()
    exact = pr.project_reference(hidden.double(), weight.double(), bias.double(), residual.double(), wide)
    eager = pr.project_reference(hidden, weight, bias, residual, factor)
    found = pr.launch_project(hidden, weight, bias, residual, factor, replace(SMALL, split=split))
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


def test_a_split_project_in_tf32_is_as_exact_as_a_whole_one() -> None:
    hidden, residual = random(1, 3, 5, 256, dtype=torch.float32), random(1, 3, 5, 40, dtype=torch.float32)
    weight, bias = product_inputs(hidden, 40)
    exact = pr.project_reference(hidden.double(), weight.double(), bias.double(), residual.double())
    whole, parts = (
        pr.launch_project(hidden, weight, bias, residual, None, replace(SMALL, split=split), tf32=True)
        for split in (1, 3)
    )
    assert relative_error(parts, exact) < 1e-3  # 2^-11 an operand
    assert relative_error(parts, whole.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int8, q8.E4M3], ids=str)
@pytest.mark.parametrize("with_factor", [False, True])
def test_a_split_project_in_8_bits_equals_a_whole_one(with_factor: bool, dtype: torch.dtype) -> None:
    """int32 sums are the same in any order."""
    weight = codes(40, 200, dtype=dtype, seed=1)
    bias, residual = random(40, dtype=torch.float16), random(2, 3, 5, 40, dtype=torch.float16)
    scales = random(40, dtype=torch.float32, seed=1).abs() / 5000
    hidden, factor, scale = codes(2, 3, 5, 200, dtype=dtype), None, None
    if with_factor:
        hidden, scale = random(2, 3, 5, 200, dtype=torch.float16), torch.tensor([0.02, 0.3])
        factor = 1 + random(2, 200, dtype=torch.float32).abs()
    exact = q8.project_quantized_reference(hidden, weight, bias, residual.double(), scales, factor, scale)
    whole, parts = (
        pr.launch_project(
            hidden, weight, bias, residual, factor, replace(SMALL, split=split), scales=scales, hidden_scale=scale
        )
        for split in (1, 3)
    )
    assert relative_error(parts, exact) < 1e-3
    assert relative_error(parts, whole.double()) <= (0 if dtype == torch.int8 else 1e-4)


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_split_downsample_equals_float64(dtype: torch.dtype, split: int) -> None:
    x = random(3, 6, 2, 40, dtype=dtype) + 1
    weight = random(72, 40, 2, 2, dtype=dtype, scale=0.1)
    bias = random(72, dtype=dtype, seed=1)
    exact = pa.downsample_reference(x.double(), weight.double(), bias.double(), "layernorm", 1e-6)
    eager = pa.downsample_reference(x, weight, bias, "layernorm", 1e-6)
    found = pa.launch_downsample(x, weight, bias, "layernorm", 1e-6, replace(SMALL, split=split))
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


def test_parts_are_added_in_order_whatever_wrote_them_first() -> None:
    """1e8 swallows what is added after it, and not what was added before."""
    parts = torch.tensor([1.0, 1e8, -1e8, 3.0]).reshape(4, 1, 1).expand(4, 700, 3).contiguous()
    out = torch.empty(700, 3)
    zero = torch.zeros(3)
    pr.launch_add_parts(parts, zero, None, None, out, replace(SMALL, split=4))
    assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("columns", [16, 32])
def test_narrow_tiles_give_the_same_result(columns: int) -> None:
    x = random(1, 3, 5, 96, dtype=torch.float16)
    weight, bias = product_inputs(x, 88)
    sums = weight.double().sum(1).float()
    narrow, wide = (
        ex.launch_expand(x, weight, bias, moments_of(x, 32), sums, "layernorm", 1e-6, "gelu", launch, chunk=32)[0]
        for launch in (replace(SMALL, n=columns), replace(SMALL, n=64))
    )
    assert torch.equal(narrow, wide)


# mlp -----------------------------------------------------------------------------------------------------------------

NARROW = [width for width in CHANNELS if width <= ml.WIDEST]


def fused(
    x: Tensor, norm: str = "layernorm", activation: str = "gelu", *, hidden: int | None = None, rows: int = 16,
    tf32: bool = False, conv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel's result, eager PyTorch's in the same type, and float64's. `conv`: what x is without its rounding."""
    channels = x.shape[-1]
    weight, bias = product_inputs(x, 4 * channels if hidden is None else hidden)
    back, back_bias = product_inputs(random(*x.shape[:-1], len(weight), dtype=x.dtype), channels)
    residual = random(*x.shape, dtype=x.dtype, seed=2)

    def reference(source: Tensor, to: torch.dtype) -> Tensor:
        tensors = (t.to(to) for t in (back, back_bias, residual))
        return ml.mlp_reference(source.to(to), weight.to(to), bias.to(to), norm, 1e-6, activation, *tensors)

    found = ml.launch_mlp(
        x, weight, bias, norm, 1e-6, activation, moments_of(x if conv is None else conv, 32), 32, back, back_bias,
        residual, MlpLaunch(m=rows, hidden=32, warps=4, stages=2), tf32=tf32,
    )  # fmt: skip
    return found, reference(x, x.dtype), reference(x if conv is None else conv, torch.float64)


def mlp_is_exact(x: Tensor, *options: Any, **more: Any) -> None:
    found, eager, exact = fused(x, *options, **more)
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("channels", [*NARROW, 7, 33, 112])  # less than a product's least; two odd parts; one part
def test_mlp_of_every_width_equals_float64_to_the_rounding_of_its_type(channels: int, dtype: torch.dtype) -> None:
    mlp_is_exact(random(1, 2, 3, channels, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((3, 3, 5, 40), 160),  # 45 rows are two tiles and a part of one
        ((1, 4, 8, 96), 384),  # whole tiles
        ((2, 1, 7, 48), 40),  # hidden columns that are no whole chunk
        ((1, 1, 1, 64), 7),
    ],
)
def test_mlp_of_parts_of_tiles_equals_float64(
    shape: tuple[int, int, int, int], hidden: int, dtype: torch.dtype
) -> None:
    mlp_is_exact(random(*shape, dtype=dtype), hidden=hidden)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplenorm"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "none"])
def test_mlp_has_every_norm_and_activation(norm: str, activation: str) -> None:
    mlp_is_exact(random(1, 3, 5, 40, dtype=torch.float16) + 1, norm, activation)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mean", [30.0, 3000.0])
def test_mlp_of_rows_with_a_large_mean_is_as_exact_as_eager(mean: float, dtype: torch.dtype) -> None:
    mlp_is_exact((random(1, 3, 5, 96, dtype=torch.float32) + mean).to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [0.0, 500.0])
def test_mlp_behind_a_convolution_that_was_rounded_is_as_exact_as_eager(mean: float, dtype: torch.dtype) -> None:
    """The moments are of the exact sums, and what they normalize has been rounded."""
    exact = random(1, 2, 5, 96, dtype=torch.float32) + mean
    mlp_is_exact(exact.to(dtype), conv=exact)


def test_mlp_of_values_near_the_end_of_fp16_is_finite_and_exact() -> None:
    mlp_is_exact(random(1, 3, 5, 64, dtype=torch.float32, scale=15000.0).clamp(-65504, 65504).half())


def test_mlp_of_a_strided_input_equals_that_of_its_copy() -> None:
    x = random(1, 4, 6, 40, dtype=torch.float16)[:, :, ::2, ::2]
    x = x[..., :20]
    assert torch.equal(fused(x)[0], fused(x.contiguous())[0])


def test_mlp_in_tf32_normalizes_before_it_rounds() -> None:
    found, _, exact = fused(random(1, 3, 5, 96, dtype=torch.float32) + 100, tf32=True)
    assert relative_error(found, exact) < 1e-3  # 2^-11 an operand


def test_mlp_reads_a_strided_residual_and_weights() -> None:
    x = random(1, 2, 6, 32, dtype=torch.float16)
    weight, bias = product_inputs(x, 64)
    back, residual = random(64, 32, dtype=torch.float16, scale=0.1).t(), random(1, 6, 2, 32, dtype=torch.float16)
    launch = MlpLaunch(m=16, hidden=32, warps=4, stages=2)

    def run(weight: Tensor, back: Tensor, residual: Tensor) -> Tensor:
        return ml.launch_mlp(
            x, weight, bias, "layernorm", 1e-6, "gelu", moments_of(x, 32), 32, back, bias[:32].clone(), residual, launch
        )

    turned = residual.permute(0, 2, 1, 3)
    strided = run(weight.t().contiguous().t(), back, turned)
    assert torch.equal(strided, run(weight, back.contiguous(), turned.contiguous()))
    assert strided.is_contiguous()


# stem, downsample, pool_norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("outputs", "norm"), [(40, "layernorm"), (32, "rmsnorm"), (192, "layernorm")])
def test_stem_of_uint8_images_equals_float64(outputs: int, norm: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 13, 22, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    weight = random(outputs, 3, 4, 4, dtype=dtype, scale=0.01)
    bias, gain, offset = (random(outputs, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    shift = offset if norm == "layernorm" else None

    def reference(to: torch.dtype) -> Tensor:
        moved = None if shift is None else shift.to(to)
        return pa.stem_reference(images, weight.to(to), bias.to(to), gain.to(to), moved, norm, 1e-6)

    exact = reference(torch.float64)
    found = pa.launch_stem(images, weight, bias, gain, shift, norm, 1e-6, pixels=16)
    assert relative_error(found, exact) <= 2 * relative_error(reference(dtype), exact) + 1e-7


def test_stem_of_float_images_in_either_layout_is_the_same() -> None:
    images = random(2, 1, 8, 12, dtype=torch.float32)  # one channel: 16 products
    weight = random(24, 1, 4, 4, dtype=torch.float16)
    bias, gain = random(24, dtype=torch.float16), random(24, dtype=torch.float16, seed=1)
    first, second = (
        pa.launch_stem(x, weight, bias, gain, None, "layernorm", 1e-6, pixels=16)
        for x in (images, images.contiguous(memory_format=torch.channels_last))
    )
    exact = pa.stem_reference(images.double(), weight.double(), bias.double(), gain.double(), None, "layernorm", 1e-6)
    assert torch.equal(first, second)
    assert relative_error(first, exact) < 1e-3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 6, 2, 40), (1, 4, 8, 64), (1, 2, 2, 33), (2, 7, 5, 40)],  # the last row and column are dropped
)
def test_downsample_equals_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype) + 1
    outputs = 2 * shape[-1]
    weight = random(outputs, shape[-1], 2, 2, dtype=dtype, scale=0.5 * shape[-1] ** -0.5)
    bias = random(outputs, dtype=dtype, seed=1)
    exact = pa.downsample_reference(x.double(), weight.double(), bias.double(), "layernorm", 1e-6)
    eager = pa.downsample_reference(x, weight, bias, "layernorm", 1e-6)
    found = pa.launch_downsample(x, weight, bias, "layernorm", 1e-6, SMALL)
    assert relative_error(found, exact) <= 2 * relative_error(eager, exact) + 1e-7


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplenorm"])
@pytest.mark.parametrize("shape", [(3, 7, 7, 40), (1, 1, 3, 3072)])
def test_pool_norm_equals_float64(shape: tuple[int, int, int, int], norm: str) -> None:
    x = random(*shape, dtype=torch.float16) + 2
    assert relative_error(pa.launch_pool_norm(x, norm, 1e-6), pa.pool_norm_reference(x.double(), norm, 1e-6)) < 3e-6


# 8 bits --------------------------------------------------------------------------------------------------------------


def codes(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A quarter of int8's range and a hundredth of E4M3's."""
    return q8.codes_reference(random(*shape, dtype=torch.float32, seed=seed), torch.tensor(1 / 32), dtype)


def steps_apart(found: Tensor, exact: Tensor) -> tuple[float, int]:
    """Share of codes that differ, and by how many codes at most: the order of E4M3's bytes is that of its values."""
    assert found.dtype == exact.dtype
    ranks = []
    for tensor in (found, exact):
        byte = tensor.view(torch.int8).int()
        ranks.append(byte if tensor.dtype == torch.int8 else torch.where(byte < 0, -(byte & 127), byte))
    distance = (ranks[0] - ranks[1]).abs()
    return (distance > 0).double().mean().item(), int(distance.max())


EIGHT = pytest.mark.parametrize("dtype", [torch.int8, q8.E4M3], ids=str)


@EIGHT
def test_dwconv_norm_in_codes_is_at_most_one_code_from_float64(dtype: torch.dtype) -> None:
    x, weight, bias = conv_inputs((2, 3, 2, 40), torch.float32)
    scale = torch.linspace(0.01, 0.03, 40)  # saturates int8 at 1.3 to 3.8 deviations
    exact = q8.dwconv_norm_quantized_reference(
        x.double(), weight.double(), bias.double(), "layernorm", 1e-6, scale, dtype == q8.E4M3
    )
    found = dw.launch_norm(x, weight, bias, "layernorm", 1e-6, strips(x, weight), scale, dtype)
    share, most = steps_apart(found, exact)
    assert share < 0.002
    assert most <= 1


@EIGHT
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplenorm"])
def test_the_norm_alone_in_codes_is_at_most_one_code_from_float64(norm: str, dtype: torch.dtype) -> None:
    """Of moments by chunks, the last of which is not whole, and rows that are no multiple of a program's."""
    y, chunk, scale = random(3, 5, 7, 168, dtype=torch.float32) + 1.5, 64, torch.linspace(0.01, 0.03, 168)
    parts = y.double().split(chunk, -1)
    moments = torch.stack(
        [torch.stack((part.mean(-1), part.var(-1, unbiased=False) * part.shape[-1]), -1) for part in parts], -2
    )
    found = dw.launch_codes(y, moments.float().contiguous(), chunk, norm, 1e-6, scale, dtype)
    share, most = steps_apart(found, q8.codes_reference(dw.norm_reference(y.double(), norm, 1e-6), scale, dtype))
    assert share < 0.002
    assert most <= 1


@EIGHT
def test_expand_from_codes_to_codes_is_at_most_one_code_from_float64(dtype: torch.dtype) -> None:
    x, weight = codes(1, 3, 5, 40, dtype=dtype), codes(96, 40, dtype=dtype, seed=1)
    bias, scales = random(96, dtype=torch.float16), random(96, dtype=torch.float32, seed=1).abs() / 5000
    out_scale = torch.tensor([0.01, 1.1])  # as of a plan: the middle of GELU's results
    exact = q8.expand_quantized_reference(x, weight, bias, "gelu", scales, out_scale)
    found, _ = ex.launch_expand(
        x, weight, bias, None, None, "layernorm", 0.0, "gelu", SMALL, scales=scales, out_scale=out_scale
    )
    share, most = steps_apart(found, exact)
    assert share < 0.02  # the fitted GELU is 2.5e-5 off, a four-hundredth of a step
    assert most <= 1


@EIGHT
def test_project_from_codes_equals_float64(dtype: torch.dtype) -> None:
    hidden, weight = codes(1, 3, 5, 160, dtype=dtype), codes(40, 160, dtype=dtype, seed=1)
    bias, residual = random(40, dtype=torch.float16), random(1, 3, 5, 40, dtype=torch.float16)
    scales = random(40, dtype=torch.float32, seed=1).abs() / 5000
    exact = q8.project_quantized_reference(hidden, weight, bias, residual.double(), scales)
    found = pr.launch_project(hidden, weight, bias, residual, None, SMALL, scales=scales)
    assert relative_error(found, exact) < 3e-4  # fp16's rounding


@EIGHT
def test_grn_in_8_bits_makes_the_codes_while_it_reads(dtype: torch.dtype) -> None:
    x, weight = codes(2, 3, 5, 40, dtype=dtype), codes(64, 40, dtype=dtype, seed=1)
    bias, scales = random(64, dtype=torch.float16), random(64, dtype=torch.float32, seed=1).abs() / 5000
    hidden, squares = ex.launch_expand(
        x, weight, bias, None, None, "layernorm", 0.0, "gelu", SMALL, squares=True, scales=scales, dtype=torch.float16
    )
    exact = q8.activated(q8.linear_reference(x, weight, bias, scales), "gelu")
    assert relative_error(hidden, exact) < 4e-4
    assert relative_error(squares.sum(1), exact.square().sum((1, 2))) < 1e-4
    factor = 1 + random(2, 64, dtype=torch.float32).abs()
    last, residual = codes(40, 64, dtype=dtype, seed=2), random(2, 3, 5, 40, dtype=torch.float16)
    arguments = (hidden, last, bias[:40].clone(), residual)
    hidden_scale, last_scales = torch.tensor([0.02, 0.5]), scales[:40] / 10
    expected = q8.project_quantized_reference(*arguments, last_scales, factor, hidden_scale)
    found = pr.launch_project(*arguments, factor, SMALL, scales=last_scales, hidden_scale=hidden_scale)
    assert relative_error(found, expected.double()) < 1e-3
