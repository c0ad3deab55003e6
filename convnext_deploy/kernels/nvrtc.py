"""Kernels in CUDA C++: compiled by NVRTC when they are first needed, and launched through the driver.

PyTorch for CUDA brings both along (`cuda-bindings` and NVRTC), so that no compiler has to be installed. Compiling needs
no GPU and takes one to four seconds a kernel; `prebuild` does it side by side, before the first step.
"""

import ctypes
import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BuildError
from .launch import processors
from .operation import Launch, recorded

FOLDER = Path(__file__).parent / "cuda"
TYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.int8: "UINT8"}  # of int8 the bytes are moved


@dataclass(frozen=True)
class Kernel:
    """A source file of `kernels/cuda`, its entry, the constants in front of it, and how it is launched.

    common: what it shares with others.
    architecture: as NVRTC names it.
    threads: of a program; shared_bytes: of shared memory that it asks for.
    insert: the text that stands for a line WGMMA.
    programs: that share a multiprocessor.
    """

    file: str
    entry: str
    constants: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int
    insert: str = ""
    common: str = "sm90.cuh"
    architecture: str = "sm_90a"
    programs: int = 1

    @property
    def cost(self) -> int:
        """Of compiling, as of `prebuild.Variant`."""
        return 0

    def source(self) -> str:
        """CUDA C++, whole."""
        lines = [f"#define {name} {value}" for name, value in self.constants]
        own = (FOLDER / self.file).read_text(encoding="utf-8").replace("\nWGMMA\n", f"\n{self.insert}\n")
        return "\n".join((*lines, (FOLDER / self.common).read_text(encoding="utf-8"), own))


@dataclass(frozen=True)
class Boxes:
    """A contiguous tensor, of which the copy engine brings or takes boxes, with zeros beyond its ends.

    size: of each axis, as the tensor's are ordered.
    swizzle: bytes of a row of the box, over which its 16-byte pieces change places; 0: they stay.
    """

    tensor: Tensor
    size: tuple[int, ...]
    swizzle: int = 128

    def described(self) -> Any:
        """The driver's description, which is an argument of a launch."""
        from cuda.bindings import driver as cu

        tensor = self.tensor
        sizes, strides = tensor.shape[::-1], tensor.stride()[::-1]
        swizzle = f"{self.swizzle}B" if self.swizzle else "NONE"
        answer = cu.cuTensorMapEncodeTiled(
            getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{TYPES[tensor.dtype]}"), tensor.dim(),
            tensor.data_ptr(), [cu.cuuint64_t(size) for size in sizes],
            [cu.cuuint64_t(stride * tensor.element_size()) for stride in strides[1:]],
            [cu.cuuint32_t(size) for size in reversed(self.size)], [cu.cuuint32_t(1)] * tensor.dim(),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(cu.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        return checked(answer, "describing a tensor to the copy engine")


@functools.cache
def available() -> bool:
    """Whether what compiles and launches is installed; PyTorch's builds for the CPU come without it."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def checked(answer: tuple[Any, ...], doing: str) -> Any:
    """What a call of cuda-bindings gave, less its status.

    Raises:
        BuildError: it failed.
    """
    status, *values = answer
    if int(status) != 0:
        raise BuildError(f"{doing} failed: {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else values


@functools.cache
def cubin(kernel: Kernel) -> bytes:
    """Its machine code. No GPU is needed.

    Raises:
        BuildError: with what the compiler says.
    """
    from cuda.bindings import nvrtc

    name = kernel.file.encode()
    program = checked(nvrtc.nvrtcCreateProgram(kernel.source().encode(), name, 0, [], []), "NVRTC's start")
    options = [f"--gpu-architecture={kernel.architecture}".encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC's log")
        checked(nvrtc.nvrtcGetProgramLog(program, log), "NVRTC's log")
        first = log.decode().strip("\0 \n").partition("\n")[0]
        raise BuildError(f"NVRTC does not compile {kernel.file} for {kernel.architecture}: {first[:300]}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC's code")
    checked(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC's code")
    return code


@functools.cache
def _function(kernel: Kernel, device: int) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # so that PyTorch has made the device's context
        module = checked(driver.cuModuleLoadData(cubin(kernel)), f"loading {kernel.file}")
        function = checked(driver.cuModuleGetFunction(module, kernel.entry.encode()), f"finding {kernel.entry}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes), "asking for shared memory")
    return function


def start(kernel: Kernel, like: Tensor, tiles: int, *arguments: Boxes | Tensor | float | None) -> None:
    """Launch programs that share so many tiles, at most `kernel.programs` a multiprocessor, on the current stream.

    Within `operation.recording` it is recorded instead.

    Args:
        like: a tensor on the GPU.
        arguments: of the kernel; None is a null pointer, and an int or float is passed as a C int or float.
    """
    launches = recorded()
    if launches is not None:
        launches.append(Launch(kernel, (), {}))
        return
    from cuda.bindings import driver

    values: list[Any] = []
    types: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
        elif isinstance(argument, Boxes):
            values.append(argument.described())
            types.append(None)
        else:
            values.append(argument)
            types.append(ctypes.c_int if isinstance(argument, int) else ctypes.c_float)
    device = like.device.index or 0
    answer = driver.cuLaunchKernel(
        _function(kernel, device), min(tiles, kernel.programs * processors(like)), 1, 1, kernel.threads, 1, 1,
        kernel.shared_bytes, torch.cuda.current_stream(device).cuda_stream, (tuple(values), tuple(types)), 0,
    )  # fmt: skip
    checked(answer, f"launching {kernel.entry}")
