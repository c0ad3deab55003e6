"""Torch-TensorRT's programs: compiled with engines inside, loaded, and asked for the types of what is outside.

Never run: importing torch_tensorrt needs an NVIDIA driver (docs/reference/tensorrt.md lists what is unproven).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ..artifact.session import RunOptions
from ..env import needs
from ..errors import BuildError, InputError, plain
from ..graph.capture import DeployGraph
from ..graph.onnx_read import shares
from ..records.manifest import Manifest, PrecisionTruth
from .torch_session import MacCounter, TorchSession

FILE = "model.pt2"


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """The import raises OSError or RuntimeError, not ImportError, where the driver or libnvinfer is missing."""
    if not torch.cuda.is_available():
        raise InputError("format torch_tensorrt needs an NVIDIA GPU, and PyTorch finds none here")
    try:
        with needs("torch_tensorrt"):
            yield
    except (OSError, RuntimeError, ImportError) as error:
        reason = plain(error)
        raise InputError(
            f"torch_tensorrt cannot be imported: {reason}; its TensorRT and CUDA must fit torch's"
        ) from None


def build(graph: DeployGraph, folder: Path) -> None:
    with _library():
        import torch_tensorrt
    try:
        compiled = torch_tensorrt.dynamo.compile(
            graph.program,
            inputs=[graph.example],
            use_explicit_typing=True,  # precision is the program's
            disable_tf32=graph.export.precision != "tf32",
            min_block_size=1,
            require_full_compilation=True,
        )
        torch_tensorrt.save(compiled, str(folder / FILE), output_format="exported_program", inputs=[graph.example])
    except Exception as error:  # its converters raise types that share no base below Exception
        raise BuildError(f"torch_tensorrt cannot compile the model: {' '.join(str(error).split())[:400]}") from error


class EnginesSession(TorchSession):
    def _precision(self) -> PrecisionTruth:
        """Of the products that PyTorch dispatches; those inside engines are not seen, and nothing is said of them.

        With `require_full_compilation` all of them are inside, so that the check refuses: what cannot be read back is
        not delivered.
        """
        with MacCounter() as counter:
            self._step()
        note = "Torch-TensorRT's engines name no types, so what they compute in is not known; use --format tensorrt"
        return PrecisionTruth(graph=shares(counter.macs) if counter.macs else {}, note=note)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> EnginesSession:
    with _library():
        import torch_tensorrt  # noqa: F401 - registers the classes that the file contains
    return EnginesSession(torch.export.load(folder / FILE).module(), manifest, options)
