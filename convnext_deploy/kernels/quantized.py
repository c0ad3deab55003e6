"""The operations of a block in 8 bits: int8 without zero points, or E4M3, as a plan's "s8s8" and "fp8" say.

A plan has one scale for every product's input, and one an output for its weight. Their products are `scales`. A plan
that balances the channels between norm and `expand` divides each by a factor, which becomes part of that scale:
`dwconv_norm_quantized` takes one a channel. `project`'s input may have a shift too, which centres it: GELU's results
lie above -0.17, and half of all codes would be of values that do not occur.

What is between two products stays in 8 bits: `dwconv_norm_quantized` writes the codes of `expand`'s input, and
`expand_quantized` those of `project`'s. With GRN the hidden map is written in 16 bits, because its codes are known only
when all of an image has been seen; `project_quantized` makes them while it reads. The residual stream stays as it is.
"""

import torch
from torch import Tensor

from . import hopper, hopper_dwconv, launch
from .dwconv_norm import conv_reference, launch_codes, launch_norm, launch_of, norm_reference, taps, wide
from .expand import activated, expand_launch, launch_expand, squares_reference, tiles_of
from .operation import operation, shaped
from .project import launch_project, project_launch

E4M3 = torch.float8_e4m3fn


def codes_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x over a scale, rounded half to even and saturated to int8 or E4M3."""
    scaled = wide(x) / scale
    if dtype == E4M3:
        return scaled.clamp(-448, 448).to(E4M3)
    return scaled.round().clamp(-128, 127).to(torch.int8)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
    """Codes (..., K) and (O, K) -> (..., O), in float64: exact up to the scales."""
    return x.double() @ weight.double().t() * scales.double() + bias.double()


def dwconv_norm_quantized_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, scale: Tensor, e4m3: bool
) -> Tensor:
    y = norm_reference(wide(conv_reference(x, weight, bias)), norm, eps)
    return codes_reference(y, scale, E4M3 if e4m3 else torch.int8)


def expand_quantized_reference(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scales: Tensor, out_scale: Tensor
) -> Tensor:
    scale, shift = out_scale
    return codes_reference(activated(linear_reference(x, weight, bias, scales), activation) - shift, scale, x.dtype)


def project_quantized_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scales: Tensor,
    factor: Tensor | None = None,
    hidden_scale: Tensor | None = None,
) -> Tensor:
    if factor is not None:
        assert hidden_scale is not None
        scale, shift = hidden_scale
        hidden = codes_reference(wide(hidden) * factor[:, None, None] - shift, scale, weight.dtype)
    return (residual + linear_reference(hidden, weight, bias, scales)).to(residual.dtype)


def _dwconv_norm_quantized(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, scale: Tensor, e4m3: bool
) -> Tensor:
    dtype = E4M3 if e4m3 else torch.int8
    if launch.INT8_IN_CUDA_CPP and hopper.takes_dwconv(x, weight):
        chunk = launch_of(x, weight).channels
        y, moments = hopper_dwconv.dwconv_moments(x, taps(weight), bias, chunk)
        return launch_codes(y, moments, chunk, norm, eps, scale, dtype)
    return launch_norm(x, weight, bias, norm, eps, launch_of(x, weight, whole=True), scale, dtype)


def _expand_quantized(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scales: Tensor, out_scale: Tensor
) -> Tensor:
    if hopper.takes_codes(x, x.numel() // x.shape[-1], weight, bias.dtype):
        return hopper.expand_codes(x, weight, bias, activation, scales, out_scale)
    return launch_expand(
        x, weight, bias, None, None, "layernorm", 0.0, activation, expand_launch(x, weight), scales=scales,
        out_scale=out_scale,
    )[0]  # fmt: skip


def _expand_squares_quantized(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return launch_expand(
        x, weight, bias, None, None, "layernorm", 0.0, activation, expand_launch(x, weight, squares=True), squares=True,
        scales=scales, dtype=bias.dtype,
    )  # fmt: skip


def _expand_squares_quantized_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, scales: Tensor
) -> tuple[Tensor, Tensor]:
    hidden = activated(linear_reference(x, weight, bias, scales), activation).to(bias.dtype)
    tiles = tiles_of(x, weight)
    return hidden, squares_reference(hidden).expand(-1, tiles, -1) / tiles


def _project_quantized(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scales: Tensor,
    factor: Tensor | None = None,
    hidden_scale: Tensor | None = None,
) -> Tensor:
    if factor is None and hopper.takes_codes(hidden, residual.numel() // len(weight), weight, residual.dtype):
        return hopper.project_codes(hidden, weight, bias, residual, scales)
    record = project_launch(weight, residual, factor)
    return launch_project(hidden, weight, bias, residual, factor, record, scales=scales, hidden_scale=hidden_scale)


dwconv_norm_quantized = operation(
    "dwconv_norm_quantized",
    _dwconv_norm_quantized,
    dwconv_norm_quantized_reference,
    lambda x, weight, bias, norm, eps, scale, e4m3: shaped(x, x.shape, E4M3 if e4m3 else torch.int8),
)
"""`dwconv_norm` in codes: over `scale`, (C,) fp32, to E4M3 or int8."""

expand_quantized = operation(
    "expand_quantized",
    _expand_quantized,
    expand_quantized_reference,
    lambda x, weight, *rest: shaped(x, (*x.shape[:-1], len(weight))),
)
"""Linear and activation from codes to codes of the same type.

Args:
    x: (..., C) codes; weight: (O, C) codes; bias: (O,) float.
    activation: one of `expand.ACTIVATIONS`.
    scales: (O,) fp32, of x times the weight's.
    out_scale: (2,) fp32, scale and shift of the result: a code is of what is left when the shift is subtracted.
"""

expand_squares_quantized = operation(
    "expand_squares_quantized",
    _expand_squares_quantized,
    _expand_squares_quantized_cpu,
    lambda x, weight, bias, *rest: (
        shaped(x, (*x.shape[:-1], len(weight)), bias.dtype),
        shaped(x, (x.shape[0], tiles_of(x, weight), len(weight)), torch.float32),
    ),
)
"""The same for ConvNeXt V2: the activation in the bias's type, and sums of squares for `grn_factor`."""

project_quantized = operation(
    "project_quantized",
    _project_quantized,
    project_quantized_reference,
    lambda hidden, weight, bias, residual, *rest: shaped(residual, residual.shape),
)
"""Linear and residual from codes, to the residual's type.

Args:
    hidden: (N, H, W, K) codes; or floats, with `factor` (N, K) fp32 and `hidden_scale` (2,) fp32, a scale and a shift,
        of which they are made.
    weight: (C, K) codes; bias: (C,) float; residual: (N, H, W, C) float.
    scales: (C,) fp32, of the hidden map times the weight's.
"""
