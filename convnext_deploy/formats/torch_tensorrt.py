"""Torch-TensorRT: the captured program with TensorRT engines inside, saved as a torch.export program.

Never run: importing torch_tensorrt needs an NVIDIA driver (docs/reference/tensorrt.md lists what is unproven).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.session import RunOptions, Session
from ..records.manifest import Manifest
from .base import Format

if TYPE_CHECKING:  # it needs torch, and `list` does not
    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..runtimes import torch_engines

    torch_engines.build(graph, folder)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    from ..runtimes import torch_engines

    return torch_engines.load(folder, manifest, options)


FORMAT = Format(
    name="torch_tensorrt",
    summary="torch.export program with TensorRT engines inside",
    suffix=".pt2",
    runtime="torch_tensorrt",
    requires=("torch_tensorrt", "torch", "safetensors"),
    build_requires=("timm",),
    extra="torch-tensorrt",
    runs_code=True,
    precisions=frozenset({"fp32", "tf32", "fp16", "bf16"}),
    devices=frozenset({"cuda"}),
    builds_in=30.0,
    optimized=frozenset({"cuda"}),
    typed_graph=True,
    build=build,
    load=load,
)
