"""torch.export's own file: the captured program with its weights."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.readback import Contents
from ..artifact.session import RunOptions, Session
from ..records.manifest import Manifest
from .base import Format

if TYPE_CHECKING:  # they need torch, and `list` does not
    from torch.export import ExportedProgram

    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    import torch

    from ..runtimes.torch_files import written

    with written(folder / FILE) as file:
        torch.export.save(graph.program, file)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    from ..runtimes.torch_session import TorchSession, opening

    with opening(folder / FILE, options):
        program = _program(folder / FILE)
    # Its guards refuse images 32 pixels high, where strides of the last maps are ambiguous and the results the same;
    # `artifact.batches.check_images` has already refused what the artifact does not take.
    module = program.module(check_guards=False)
    return TorchSession(module.to(options.device), manifest, options)


def read_back(folder: Path) -> Contents:
    from ..graph.torch_contents import contents_of_program

    return contents_of_program(_program(folder / FILE))


def _program(path: Path) -> "ExportedProgram":
    import torch

    with warnings.catch_warnings():
        # PyTorch 2.9 makes tensors of the bytes that it has just read.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(path)


FILE = "model.pt2"
FORMAT = Format(
    name="pt2",
    summary="torch.export program",
    suffix=".pt2",
    runtime="torch",
    requires=("torch", "safetensors"),
    build_requires=("timm",),
    extra="export",
    runs_code=True,
    precisions=frozenset({"fp32", "fp16", "bf16"}),
    devices=frozenset({"cpu", "cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment"}),
    typed_graph=True,
    build=build,
    load=load,
    read_back=read_back,
)
