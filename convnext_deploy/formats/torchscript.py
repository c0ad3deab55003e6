"""TorchScript: traced and frozen, for libtorch and older serving stacks."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.readback import Contents
from ..artifact.session import RunOptions, Session
from ..records.manifest import Manifest
from .base import Format

if TYPE_CHECKING:  # it needs torch, and `list` does not
    from ..graph.capture import DeployGraph


def build(graph: "DeployGraph", folder: Path) -> None:
    import torch

    from ..runtimes.torch_files import copy_changed, reserve

    with warnings.catch_warnings():
        # Deprecated in favour of torch.export; kept because libtorch deployments still load it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph.module, (graph.example,), check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced)
        del traced
        tensors = [*graph.module.parameters(), *graph.module.buffers()]
        whole = folder / f".{FILE}"
        reserve(whole, sum(tensor.nbytes for tensor in tensors) + BESIDE_TENSORS)
        torch.jit.save(frozen, str(whole))
    # Its debugging information names the folders of this machine, file by file.
    copy_changed(whole, folder / FILE, lambda name, record: None if name.endswith(".debug_pkl") else record)
    whole.unlink()


def load(folder: Path, manifest: Manifest, options: RunOptions) -> Session:
    import torch

    from ..runtimes.torch_session import TorchSession, opening

    with opening(folder / FILE, options), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(folder / FILE), map_location=options.device)  # type: ignore[no-untyped-call]
    return TorchSession(module, manifest, options)


def read_back(folder: Path) -> Contents:
    import torch

    from ..graph.torch_contents import contents_of_script

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return contents_of_script(torch.jit.load(str(folder / FILE)))  # type: ignore[no-untyped-call]


FILE = "model.ts"
BESIDE_TENSORS = 4 << 20  # bytes: code and its debugging information, 0.07 MB for small
FORMAT = Format(
    name="torchscript",
    summary="traced and frozen TorchScript for libtorch",
    suffix=".ts",
    runtime="torch",
    requires=("torch", "safetensors"),
    build_requires=("timm",),
    extra="export",
    runs_code=True,
    precisions=frozenset({"fp32", "fp16", "bf16"}),
    devices=frozenset({"cpu", "cuda"}),
    tasks=frozenset({"classify", "embed", "features", "segment"}),
    optimized=frozenset({"cpu", "cuda"}),
    typed_graph=True,
    build=build,
    load=load,
    read_back=read_back,
)
