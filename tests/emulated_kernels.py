"""The convolution on Hopper's matrix units, run on the host: `emulated_sm90.hpp` says what is checked on the way."""

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from convnext_deploy.kernels import hopper_dwconv, nvrtc

HEADER = Path(__file__).with_name("emulated_sm90.hpp")
ENTRY = """
extern "C" const char* run(const u16* x, const int* sizes, const int* box, const u16* weight, const u16* bias, u16* y,
                           float2* moments, int images, int programs) {
  TensorMap map{x, {}, {}};
  std::copy(sizes, sizes + 4, map.sizes);
  std::copy(box, box + 4, map.box);
  return launch(programs, THREADS, [=] { dwconv_moments(map, weight, bias, y, moments, images); });
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
    kernel, tiling = (
        hopper_dwconv.kernel(height, width, channels, chunk, x.dtype),
        hopper_dwconv.tiling(height, width, chunk),
    )
    defines = "".join(f"#define {name} {value}\n" for name, value in kernel.constants)
    text = (nvrtc.FOLDER / kernel.file).read_text(encoding="utf-8") if text is None else text
    source, library = folder / "kernel.cpp", folder / f"kernel.{abs(hash((kernel, text)))}.so"
    source.write_text(f'{defines}#include "{HEADER}"\n{text}\n{ENTRY}', encoding="utf-8")
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    y = torch.full_like(x, torch.nan)
    moments = torch.full((images, height, width, -(-channels // chunk), 2), torch.nan)
    axes = ctypes.c_int * 4
    box = (tiling.images, tiling.height, tiling.width, hopper_dwconv.STEP_CHANNELS)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (taps, bias, y, moments)]
    problem = run(
        ctypes.c_void_p(x.data_ptr()), axes(*reversed(x.shape)), axes(*reversed(box)), *pointers, images, programs
    )
    assert not problem, problem.decode()
    return y, moments
