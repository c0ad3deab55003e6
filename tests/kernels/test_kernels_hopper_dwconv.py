"""The convolution on Hopper's matrix units without a GPU: its source runs on the host, and compiles for the GPU."""

import shutil
from pathlib import Path

import emulated_kernels
import pytest
import torch
import torch.nn.functional as F
from sass import of_cubin
from torch import Tensor

pytest.importorskip("triton")

from convnext_deploy.kernels import dwconv_norm as dw
from convnext_deploy.kernels import hopper_dwconv, launch, nvrtc
from convnext_deploy.models import registry

FP16, BF16 = torch.float16, torch.bfloat16
STAGES = sorted(
    {
        (56 >> stage, width)
        for name in ("tiny", "base")
        for stage, width in enumerate(registry.VARIANTS[f"convnext_{name}"]["dims"])
    }
)
OTHERS = ((96, 96, 96), (72, 72, 128), (18, 18, 384), (9, 7, 96), (17, 33, 64), (20, 18, 40), (3, 200, 1024), (1, 1, 8))
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def chunk_of(height: int, channels: int) -> int:
    return launch.conv_launch(FP16, height, channels, 7).channels


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def check_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float, folder: Path) -> None:
    generator, channels = torch.Generator().manual_seed(sum(shape)), shape[-1]
    x = (torch.randn(shape, generator=generator) + mean).to(dtype)
    weight = (torch.randn(channels, 1, 7, 7, generator=generator) / 7).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype)
    chunk = chunk_of(shape[1], shape[3])
    y, moments = emulated_kernels.dwconv_moments(x, dw.taps(weight), bias, chunk, folder)
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=3, groups=channels)
    exact = exact.permute(0, 2, 3, 1)
    assert error(y, exact) <= 1.01 * error(exact.to(dtype), exact)  # nothing but the last rounding
    for index, part in enumerate(y.double().split(chunk, -1)):  # of the results as they are rounded
        average = part.mean(-1)
        assert error(moments[..., index, 0], average) < 1e-6
        assert error(moments[..., index, 1], (part - average[..., None]).square().sum(-1)) < 1e-6


@needs_a_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "mean"),
    [((5, 7, 7, 40), BF16, 3.0),  # four images a tile, and a chunk that is not whole
     ((2, 17, 33, 64), FP16, 0.0)],  # tiles that are not whole, two steps a chunk
    ids=str,
)  # fmt: skip
def test_its_source_on_the_host_equals_float64_without_a_race(
    shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float, tmp_path: Path
) -> None:
    check_against_float64(shape, dtype, mean, tmp_path)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 56, 56, 96), FP16), ((2, 28, 28, 64), BF16), ((3, 14, 14, 384), FP16), ((9, 7, 7, 192), FP16),
     ((3, 9, 7, 96), BF16), ((2, 20, 18, 40), FP16), ((1, 75, 75, 64), BF16), ((2, 12, 12, 200), FP16),
     ((3, 9, 9, 72), BF16), ((1, 24, 24, 64), FP16), ((1, 48, 48, 32), BF16), ((1, 36, 36, 32), FP16),
     ((3, 1, 1, 64), BF16), ((1, 3, 40, 32), FP16), ((2, 40, 1, 32), BF16), ((9, 5, 8, 8), FP16)],
    ids=str,
)  # fmt: skip
def test_every_tiling_on_the_host_equals_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    check_against_float64(shape, dtype, 0.0, tmp_path)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("left_out", [1, 2, 3])  # 0: the one behind the start
def test_a_barrier_that_is_left_out_is_found(left_out: int, tmp_path: Path) -> None:
    parts = (nvrtc.FOLDER / "dwconv_sm90.cu").read_text(encoding="utf-8").split("__syncthreads();")
    text = "__syncthreads();".join(parts[: left_out + 1]) + "__syncthreads();".join(parts[left_out + 1 :])
    x, taps, bias = (torch.zeros(shape, dtype=FP16) for shape in ((3, 9, 9, 64), (49, 64), (64,)))
    with pytest.raises(AssertionError, match="race"):
        emulated_kernels.dwconv_moments(x, taps, bias, 64, tmp_path, text=text)


@pytest.mark.parametrize(("height", "width", "channels"), [*((s, s, c) for s, c in STAGES), *OTHERS])
def test_two_programs_share_a_multiprocessor(height: int, width: int, channels: int) -> None:
    kernel = hopper_dwconv.kernel(height, width, channels, chunk_of(height, channels), FP16)
    assert kernel.programs >= 2
    assert kernel.programs * (kernel.shared_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize("side", [56, 28, 14, 7])
def test_tiles_of_the_usual_maps_are_whole(side: int) -> None:
    tiling = hopper_dwconv.tiling(side, side, 64)
    assert side % tiling.tile_rows == 0
    assert side % tiling.tile_columns == 0


@pytest.mark.slow
@pytest.mark.skipif(not nvrtc.available(), reason="this PyTorch came without cuda-bindings")
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("height", "width", "channels"), [*((s, s, c) for s, c in STAGES), *OTHERS])
def test_it_multiplies_on_matrix_units_and_does_not_spill(
    height: int, width: int, channels: int, dtype: torch.dtype
) -> None:
    kernel = hopper_dwconv.kernel(height, width, channels, chunk_of(height, channels), dtype)
    code = of_cubin(nvrtc.cubin(kernel), shared_bytes=kernel.shared_bytes, threads=kernel.threads)
    assert code.stack_bytes == 0
    assert code.registers * kernel.threads * kernel.programs <= 65536
    assert code.opcodes["HMMA"] >= 7 * dict(kernel.constants)["ROWS"]  # of a channel, and sums over channels
    assert code.instructions <= 1300
    assert {"UTMALDG", "LDSM"} <= set(code.opcodes)
