"""AOTInductor: compiled ahead of time into a package that C++ or Python loads without this project's code."""

import contextlib
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from ..artifact.session import RunOptions
from ..errors import BuildError, MissingPackageError
from ..graph.capture import DeployGraph
from ..graph.onnx_read import shares
from ..models.costs import multiply_accumulates
from ..quantization.eight_bits import EightBits
from ..records.manifest import Manifest, PrecisionTruth
from ..runtimes.torch_files import copy_changed, without_folders
from ..runtimes.torch_session import TorchSession, opening, whole_float32
from .base import Format

TYPE_NAMES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "float8_e4m3fn": "fp8",
}  # fmt: skip


def build(graph: DeployGraph, folder: Path) -> None:
    from torch._inductor.exc import InductorError

    whole = folder / f"whole{FORMAT.suffix}"  # Inductor takes no other ending
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


class AotInductorSession(TorchSession):
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


def ready() -> str:
    """Inductor's C++ needs a compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise MissingPackageError("no C++ compiler on PATH; install g++ or clang")
    return "ready"


def load(folder: Path, manifest: Manifest, options: RunOptions) -> AotInductorSession:
    return AotInductorSession(folder / FILE, manifest, options)


FILE = "model.pt2"
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
