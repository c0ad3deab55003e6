"""AOTInductor's packages: compiled, loaded, and asked for the types of their constants."""

import contextlib
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from ..artifact.session import RunOptions
from ..errors import BuildError
from ..graph.capture import DeployGraph
from ..graph.onnx_read import shares
from ..models.costs import multiply_accumulates
from ..records.manifest import Manifest, PrecisionTruth
from .torch_files import copy_changed, without_folders
from .torch_session import TorchSession, opening, whole_float32

FILE = "model.pt2"
TYPE_NAMES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "float8_e4m3fn": "fp8",
}  # fmt: skip


def build(graph: DeployGraph, folder: Path) -> None:
    from torch._inductor.exc import InductorError

    whole = folder / "whole.pt2"  # Inductor takes no other ending
    with whole_float32(graph.export.precision, graph.export.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor warns about its own internals
        try:
            torch._inductor.aoti_compile_and_package(
                graph.program, package_path=str(whole), inductor_configs=_without_line_tables()
            )
        except (InductorError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BuildError(f"AOTInductor cannot compile the model: {reason}; is a C++ compiler installed?") from error
    folders = _folders()
    copy_changed(whole, folder / FILE, lambda _, record: without_folders(record, folders))
    whole.unlink()


def _without_line_tables() -> dict[str, bool]:
    """They name lines of generated code that nobody has, in half of the library's bytes; older releases write none."""
    known = hasattr(torch._inductor.config.aot_inductor, "enable_line_tables")
    return {"aot_inductor.enable_line_tables": False} if known else {}


def _folders() -> set[Path]:
    """What the compiler reads and writes of this machine, and would name in the library."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folders = {Path(torch.__file__).parents[1], Path(sys.prefix), Path(sys.base_prefix), Path(cache_dir())}
    with contextlib.suppress(RuntimeError):  # no $HOME, and no entry of this user in the password database
        folders.add(Path.home())
    folders |= {folder.resolve() for folder in folders}
    # A system's own folders tell nothing of whose machine it is.
    return {folder for folder in folders if len(folder.parts) > 1 and str(folder) not in ("/usr", "/usr/local")}


class CompiledSession(TorchSession):
    def __init__(self, path: Path, manifest: Manifest, options: RunOptions) -> None:
        # Otherwise each run asks an event whether earlier ones have ended, which a stream that is captured forbids
        # (pytorch/pytorch issue 148601).
        with opening(path, options):
            package = torch._inductor.aoti_load_package(str(path), run_single_threaded=options.cuda_graph)
        super().__init__(package, manifest, options)
        self._path = path

    def _precision(self) -> PrecisionTruth:
        """From the generated code's table of constants: its calls bypass PyTorch's dispatcher, so none can be seen."""
        counts = multiply_accumulates(self.manifest.model)
        types = constant_types(self._path)
        # The fused kernels hold some weights under other names; without them, one that is not there is not known.
        named = [name for name in counts if name in types or not self.manifest.export.kernels]
        macs = [
            (TYPE_NAMES.get(types[name], types[name]) if name in types else "unknown", counts[name]) for name in named
        ]
        return PrecisionTruth(graph=shares(macs), quantized=sum(name in ("int8", "fp8") for name, _ in macs))


def constant_types(package: Path) -> dict[str, str]:
    """Parameter name to PyTorch's type name, of every constant compiled into an AOTInductor package."""
    with zipfile.ZipFile(package) as files:
        sources = [files.read(name).decode() for name in files.namelist() if name.endswith(".wrapper.cpp")]
    code = "\n".join(sources)
    dtypes = dict(re.findall(r"constants_info_\[(\d+)\]\.dtype = .*?cached_torch_dtype_(\w+)", code))
    names = dict(re.findall(r'constants_info_\[(\d+)\]\.original_fqn = "([^"]+)"', code))
    return {names[index]: dtype for index, dtype in dtypes.items() if index in names}


def load(folder: Path, manifest: Manifest, options: RunOptions) -> CompiledSession:
    return CompiledSession(folder / FILE, manifest, options)
