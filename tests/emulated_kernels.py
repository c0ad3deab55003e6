"""Kernels for Hopper, run on the host: `emulated_sm90.hpp` says what is checked on the way."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnext_deploy.kernels import hopper_dwconv, nvrtc

HEADER = Path(__file__).with_name("emulated_sm90.hpp")


class Map(ctypes.Structure):
    """`TensorMap`, as `nvrtc.Boxes` describes a tensor."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int), ("swizzle", ctypes.c_int),
                ("sizes", ctypes.c_int * 4), ("box", ctypes.c_int * 4)]  # fmt: skip


def described(boxes: nvrtc.Boxes) -> Map:
    def axes(sizes: Sequence[int]) -> Any:
        return (ctypes.c_int * 4)(*reversed(sizes), *[1] * (4 - len(sizes)))

    tensor = boxes.tensor
    return Map(tensor.data_ptr(), tensor.element_size(), boxes.swizzle, axes(tensor.shape), axes(boxes.size))


def built(
    kernel: nvrtc.Kernel, entry: str, folder: Path, text: str | None = None, *, races: bool = False, multiply: str = ""
) -> Any:
    """The function `run` of a library made of the kernel's source, or of `text` in its place, and an entry."""
    own = (nvrtc.FOLDER / kernel.file).read_text(encoding="utf-8") if text is None else text
    defines = "".join(f"#define {name} {value}\n" for name, value in (*kernel.constants, ("RACES", int(races))))
    common = (nvrtc.FOLDER / kernel.common).read_text(encoding="utf-8")
    whole = "\n".join((defines, f'#include "{HEADER}"', common, own.replace("\nWGMMA\n", f"\n{multiply}\n"), entry))
    source, library = folder / "kernel.cpp", folder / f"kernel.{abs(hash(whole))}.so"
    source.write_text(whole, encoding="utf-8")
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


OF_DWCONV = """
extern "C" const char* run(const TensorMap* x, const u16* weight, const u16* bias, u16* y, float2* moments, int images,
                           int programs) {
  return launch(programs, THREADS, [=] { dwconv_moments(*x, weight, bias, y, moments, images); });
}
"""


def dwconv_moments(
    x: Tensor, taps: Tensor, bias: Tensor, chunk: int, folder: Path, programs: int = 2, text: str | None = None
) -> tuple[Tensor, Tensor]:
    """`hopper_dwconv.dwconv_moments` of CPU tensors, by so many programs; the results that it does not write are NaN.

    Args:
        folder: for the build.
        text: of the kernel, in the place of the package's.

    Raises:
        AssertionError: a race, a bank conflict, a deadlock or an address that is wrong.
    """
    images, height, width, channels = x.shape
    kernel = hopper_dwconv.kernel(height, width, channels, chunk, x.dtype)
    tiling = hopper_dwconv.tiling(height, width, chunk)
    run = built(kernel, OF_DWCONV, folder, text, races=True)
    y = torch.full_like(x, torch.nan)
    moments = torch.full((images, height, width, -(-channels // chunk), 2), torch.nan)
    box = (tiling.images, tiling.height, tiling.width, hopper_dwconv.STEP_CHANNELS)
    pointers = [pointer(tensor) for tensor in (taps, bias, y, moments)]
    problem = run(ctypes.byref(described(nvrtc.Boxes(x, box, 64))), *pointers, images, programs)
    assert not problem, problem.decode()
    return y, moments


OF_PRODUCT = """
extern "C" const char* run(const TensorMap* x, const TensorMap* w, const TensorMap* out, const TensorMap* residual,
                           const u32* bias, const float2* of_columns, const float2* moments, const float* out_scale,
                           int M, int N, int K, int chunk, int chunks, float eps, int programs) {
  return launch(programs, 128 + GROUPS * 128, [=] {
    product(*x, *w, *out, *residual, bias, of_columns, moments, out_scale, M, N, K, chunk, chunks, eps);
  });
}
"""


def product(kernel: nvrtc.Kernel, folder: Path, programs: int, *arguments: Any) -> None:
    """`hopper.launch_product`'s launch of CPU tensors: what it gives `nvrtc.start` behind the number of tiles.

    Raises:
        AssertionError: a bank conflict of matrices, a deadlock, or an address or a copy that is wrong.
    """
    constants = dict(kernel.constants)
    count, element = constants["BN"] // 2, "signed char" if constants["INT8"] else "u16"
    multiply = f"""inline void multiply(Sum (&sums)[{count}], u64 x, u64 w, int add) {{
      multiply_groups<{element}>(sums, x, w, add);
    }}"""
    run = built(kernel, OF_PRODUCT, folder, multiply=multiply)
    given = [ctypes.byref(described(each)) if isinstance(each, nvrtc.Boxes)
             else ctypes.c_float(each) if isinstance(each, float) else each if isinstance(each, int) else pointer(each)
             for each in arguments]  # fmt: skip
    problem = run(*given, programs)
    assert not problem, problem.decode()
