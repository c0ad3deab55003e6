"""A parsed network read back: its layers, and its products with their types and multiply-accumulates."""

import math
from collections import Counter
from typing import Any

from ...records.manifest import EngineRecord

TYPE_NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8", "INT4": "int4",
              "FP4": "fp4"}  # fmt: skip


def layer_census(network: Any) -> dict[str, int]:
    """Number of layers by "<kind> <type of the first output>", most frequent first."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    counts = Counter(f"{layer.type.name.lower()} {_type_name(layer.get_output(0))}" for layer in layers)
    return dict(counts.most_common())


def products_of_network(
    trt: Any, network: Any, input_shape: tuple[int, ...], tf32: bool
) -> dict[str, tuple[str, float]]:
    """Every convolution and matrix product of a parsed network: its type and its multiply-accumulates.

    A product computes in 8 bits where both of its operands come straight from a DequantizeLinear; otherwise in the
    type of its operands, which strong typing makes the type it runs in.

    Args:
        input_shape: a concrete shape of the one input, to infer all others from.
        tf32: products of fp32 may run as TF32, and count as such.
    """
    source = network.get_input(0)
    dynamic = tuple(source.shape)
    source.shape = input_shape  # the network infers all shapes anew
    try:
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        producers = {
            layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs) if layer.get_output(i)
        }
        products = {}
        for layer in layers:
            if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
                continue
            operands = [layer.get_input(i) for i in range(layer.num_inputs) if layer.get_input(i) is not None]
            kinds = {_operand_type(trt, operand, producers) for operand in operands[:2]}
            plain = _type_name(operands[0])
            kind = kinds.pop() if len(kinds) == 1 and len(operands) > 1 else plain
            products[layer.name] = ("tf32" if tf32 and kind == "fp32" else kind, _macs(trt, layer, operands))
        return products
    finally:
        source.shape = dynamic


def _macs(trt: Any, layer: Any, operands: list[Any]) -> float:
    output = math.prod(layer.get_output(0).shape)
    if layer.type == trt.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = trt.IMatrixMultiplyLayer  # layers come as ILayer; this is the documented downcast
        transposed = layer.op0 == trt.MatrixOperation.TRANSPOSE
        return output * operands[0].shape[-2 if transposed else -1]
    layer.__class__ = trt.IConvolutionLayer
    return output * math.prod(layer.kernel_size_nd) * operands[0].shape[1] / layer.num_groups


def _operand_type(trt: Any, tensor: Any, producers: dict[str, Any]) -> str:
    """Type of the values an operand contains: 8 bits where nothing but reshapes is between it and a dequantization."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in (trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY):
        layer = producers.get(layer.get_input(0).name)
    if layer is not None and layer.type == trt.LayerType.DEQUANTIZE:
        return _type_name(layer.get_input(0))
    return _type_name(tensor)


def _type_name(tensor: Any) -> str:
    return TYPE_NAMES.get(tensor.dtype.name, tensor.dtype.name.lower())


def quantized_products(record: EngineRecord) -> int:
    """Products of the parsed network that compute in 8 bits."""
    return sum(kind in ("int8", "fp8") for kind, _ in record.products.values())
