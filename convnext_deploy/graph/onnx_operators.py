"""This package's PyTorch operators in ONNX's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

MOST_BOXES = 2**31 - 1  # of a class that do not suppress each other: more than there are


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` is to write for each."""
    from ..models import regions, suppression
    from ..quantization import operators  # registers them, as the others do

    assert operators is not None
    assert suppression is not None
    assert regions is not None
    registered = torch.ops.convnext_deploy
    return {
        registered.quantize.default: _quantize,
        registered.dequantize.default: _dequantize,
        registered.unsuppressed.default: _unsuppressed,
        registered.cut_out.default: _cut_out,
    }


def _quantize(x: Any, scale: Any, zero_point: Any) -> Any:
    from onnxscript import opset20 as op

    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    from onnxscript import opset20 as op

    return op.DequantizeLinear(x, scale, zero_point, axis=axis)


def _whole(*values: int) -> Any:
    import onnx_ir as ir
    from onnxscript import opset20 as op

    return op.Constant(value=ir.tensor(list(values), ir.DataType.INT64))


def _unsuppressed(boxes: Any, scores: Any, overlap: float, least: float) -> Any:
    import onnx_ir as ir
    from onnxscript import opset20 as op

    def constant(value: float) -> Any:
        return op.Constant(value=ir.tensor([value], ir.DataType.FLOAT))

    kept = op.NonMaxSuppression(
        boxes, scores, _whole(MOST_BOXES), constant(overlap), constant(least)
    )  # (kept boxes, 3): image, class, place
    count = op.Shape(kept, start=0, end=1)
    shape = op.Shape(scores)
    none = op.ConstantOfShape(shape, value=ir.tensor([0.0], ir.DataType.FLOAT))
    ones = op.ConstantOfShape(count, value=ir.tensor([1.0], ir.DataType.FLOAT))
    return op.Cast(op.ScatterND(none, kept, ones), to=ir.DataType.BOOL)


def _cut_out(maps: Sequence[Any], regions: Any, levels: Any, strides: Sequence[int], size: int, samples: int) -> Any:
    """Of each map the regions that belong to it, and all of them in their order again."""
    import onnx_ir as ir
    from onnxscript import opset20 as op

    rows, number = op.Reshape(regions, _whole(-1, 4)), op.Reshape(levels, _whole(-1))
    each = op.Shape(regions, start=1, end=2)  # regions an image
    orders, names = [], []
    for index, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        own = op.Reshape(op.NonZero(op.Equal(number, _whole(index))), _whole(-1))
        names.append(
            op.RoiAlign(
                x,
                op.Gather(rows, own),
                op.Div(own, each),
                coordinate_transformation_mode="output_half_pixel",
                mode="avg",
                output_height=size,
                output_width=size,
                sampling_ratio=samples,
                spatial_scale=1 / stride,
            )
        )
        orders.append(own)
    order = op.Concat(*orders, axis=0)
    count = op.Shape(number, start=0, end=1)
    start, step = (op.Constant(value=ir.tensor(value, ir.DataType.INT64)) for value in (0, 1))
    places = op.Range(start, op.Squeeze(count), step)
    inverse = op.ScatterElements(places, order, places)  # where each went
    return op.Gather(op.Concat(*names, axis=0), inverse)
