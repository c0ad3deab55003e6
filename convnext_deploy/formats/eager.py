"""The folded module's weights as safetensors, run by PyTorch from this package's own code."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.readback import Contents
from ..artifact.session import RunOptions, Session
from ..quantization.eight_bits import EightBits
from ..records.manifest import Manifest
from .base import Format

if TYPE_CHECKING:  # it needs torch, and `list` does not
    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..runtimes import torch_weights

    torch_weights.build(graph, folder)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    from ..runtimes import torch_weights

    return torch_weights.load(folder, manifest, options)


def read_back(folder: Path) -> Contents:
    from ..runtimes import torch_weights

    return torch_weights.read_back(folder)


FORMAT = Format(
    name="eager",
    summary="folded weights for this package's own PyTorch module",
    suffix=".safetensors",
    runtime="torch",
    requires=("torch", "safetensors"),
    build_requires=("timm",),
    extra="export",
    runs_code=False,
    precisions=frozenset({"fp32", "fp16", "bf16"}),
    devices=frozenset({"cpu", "cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment", "detect"}),
    optimized=frozenset({"cuda"}),
    typed_graph=True,
    own_network=True,
    kernels=True,
    cuda_graphs=True,
    build=build,
    load=load,
    read_back=read_back,
    # In the fused kernels only.
    eight_bits=EightBits(int8="s8s8", fp8=True, rest="fp16", scales_in_rest=True, family="kernels"),
)
