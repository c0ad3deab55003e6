"""Quantize and dequantize as PyTorch operators, so that one module is both the simulation and what exporters see.

Each computes what the ONNX operator of the same name computes, in the same order and with the same rounding (half to
even); `graph.onnx_write` translates it to that operator. 8-bit floats (E4M3) saturate at 448 as they do in ONNX.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0


@torch.library.custom_op("convnext_deploy::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`round(x / scale) + zero_point`, saturated.

    Args:
        x: any float type, any shape.
        scale: (), of x's type.
        zero_point: (), uint8, int8, or float8_e4m3fn (then 0). Its type is the result's.
    """
    scaled = x / scale
    if zero_point.dtype == torch.float8_e4m3fn:
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(zero_point.dtype)
    limits = torch.iinfo(zero_point.dtype)
    shifted = scaled.round_().add_(zero_point.to(scaled.dtype))
    return shifted.clamp_(limits.min, limits.max).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("convnext_deploy::dequantize", mutates_args=())
def dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """`(x - zero_point) * scale`, in scale's type.

    Args:
        x: uint8, int8 or float8_e4m3fn, any shape.
        scale: () or, along `axis`, (x.shape[axis],).
        zero_point: scale's shape, x's type.
    """
    if scale.ndim:
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return (x.to(scale.dtype) - zero_point.to(scale.dtype)) * scale


@dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)
