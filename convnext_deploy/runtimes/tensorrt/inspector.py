"""What TensorRT's engine inspector says of the layers that were built."""

import json
import re

from ...graph.onnx_read import shares

INSPECTOR_TYPES = (("fp8", "fp8"), ("int8", "int8"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("half", "fp16"),
                   ("fp16", "fp16"), ("float", "fp32"), ("fp32", "fp32"))  # fmt: skip


def precision_of_layers(text: str, products: dict[str, tuple[str, float]]) -> dict[str, float]:
    """Share of the multiply-accumulates by type, from the engine inspector's JSON.

    A built layer names the ONNX nodes it was fused from in its Metadata; it computes in its first input's type.

    Args:
        text: layer information, as of ProfilingVerbosity.DETAILED.
        products: node name to (type, multiply-accumulates), from the build.
    """
    macs, left = [], dict(products)
    for layer in json.loads(text).get("Layers", []):
        if not isinstance(layer, dict) or not layer.get("Inputs"):
            continue  # names only: built with less verbosity
        named = f"{layer.get('Metadata', '')} {layer.get('Name', '')}"
        nodes = [node for node in left if re.search(rf"(?<![\w.]){re.escape(node)}(?![\w.])", named)]
        first = layer["Inputs"][0]
        words = str(first.get("Format/Datatype", first.get("Datatype", ""))).lower()
        kind = next((name for word, name in INSPECTOR_TYPES if word in words), "unknown")
        macs += [(kind, left.pop(node)[1]) for node in nodes]
    if not macs:
        return {}
    macs += [("unknown", count) for _, count in left.values()]
    return shares(macs)
