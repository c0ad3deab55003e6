"""AOTInductor: compiled ahead of time into a package that C++ or Python loads without this project's code."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.session import RunOptions, Session
from ..errors import MissingPackageError
from ..quantization.eight_bits import EightBits
from ..records.manifest import Manifest
from .base import Format

if TYPE_CHECKING:  # it needs torch, and `list` does not
    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    from ..runtimes import torch_compiled

    torch_compiled.build(graph, folder)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    from ..runtimes import torch_compiled

    return torch_compiled.load(folder, manifest, options)


def ready() -> str:
    """Inductor's C++ needs a compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise MissingPackageError("no C++ compiler on PATH; install g++ or clang")
    return "ready"


FORMAT = Format(
    name="aotinductor",
    summary="AOTInductor package, compiled for the machine it was built on",
    suffix=".pt2",
    runtime="torch",
    requires=("torch", "safetensors"),
    build_requires=("timm", "setuptools"),
    extra="export",
    runs_code=True,
    precisions=frozenset({"fp32", "fp16", "bf16"}),
    devices=frozenset({"cpu", "cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment"}),
    builds_in=30.0,
    optimized=frozenset({"cpu", "cuda"}),
    typed_graph=True,
    ready=ready,
    kernels=True,
    cuda_graphs=True,
    build=build,
    load=load,
    # In the fused kernels only.
    eight_bits=EightBits(int8="s8s8", fp8=True, rest="fp16", scales_in_rest=True, family="kernels"),
)
