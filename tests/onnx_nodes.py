"""What an ONNX file consists of, as ONNX itself reads it."""

from collections import Counter
from pathlib import Path

import onnx


def operators(path: Path) -> Counter[str]:
    """Number of nodes by operator."""
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
