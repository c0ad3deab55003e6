"""The kernels in CUDA C++ for Hopper without a GPU: where they are used, what they compile to, products on the host.

That they compute right on a GPU is a matter of `test_kernels_gpu.py`.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated_kernels
import pytest
import torch
import torch.nn.functional as F
from sass import Code, of_cubin
from torch import Tensor

pytest.importorskip("triton")
from torch._subclasses.fake_tensor import FakeTensorMode

from convnext_deploy.errors import BuildError
from convnext_deploy.kernels import expand as ex
from convnext_deploy.kernels import hopper, launch, nvrtc
from convnext_deploy.kernels import quantized as q8
from convnext_deploy.kernels.operation import Launch, recording

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="this PyTorch came without cuda-bindings")

FP16, BF16 = torch.float16, torch.bfloat16


def products() -> Iterator[nvrtc.Kernel]:
    for width in hopper.WIDTHS:
        if width in hopper.PROJECT_WIDTHS:
            yield hopper.product_kernel(width, "project", FP16)
        yield hopper.product_kernel(width, "expand", FP16)
        yield hopper.product_kernel(width, "expand", FP16, "layernorm", "gelu")
    yield hopper.product_kernel(128, "project", BF16)
    yield hopper.product_kernel(128, "expand", BF16, "rmsnorm", "silu")
    for width in hopper.CODE_WIDTHS:
        yield hopper.product_kernel(width, "expand", torch.int8, activation="gelu", half=FP16)
        yield hopper.product_kernel(width, "project", torch.int8, half=BF16)


def mlps() -> Iterator[nvrtc.Kernel]:
    for channels in hopper.MLP_BLOCK:
        yield hopper.mlp_kernel(channels, 4 * channels, FP16, "layernorm", "gelu")


def named(kernel: nvrtc.Kernel) -> str:
    return "-".join((kernel.entry, *(str(value) for _, value in kernel.constants)))


def taken_apart(kernel: nvrtc.Kernel) -> Code:
    return of_cubin(nvrtc.cubin(kernel), shared_bytes=kernel.shared_bytes, threads=kernel.threads)


@pytest.fixture
def an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: (9, 0))


@pytest.mark.parametrize("kernel", [*products(), *mlps()], ids=named)
def test_a_kernel_fits_a_multiprocessor(kernel: nvrtc.Kernel) -> None:
    assert kernel.shared_bytes + 5120 <= hopper.SHARED_BYTES or kernel.entry != "mlp"  # and its own columns and norms
    assert kernel.shared_bytes <= hopper.SHARED_BYTES
    assert kernel.threads <= 512
    assert kernel.threads % 32 == 0


def test_at_least_two_steps_of_a_product_are_under_way_behind_the_one_that_is_multiplied() -> None:
    assert min(dict(kernel.constants)["STAGES"] for kernel in products()) >= 3


@pytest.mark.parametrize(
    ("outputs", "inputs", "bare", "activated", "with_residual"),
    [(96, 24, 128, 128, 128), (128, 32, 128, 128, 128), (192, 48, 192, 192, 192), (384, 96, 192, 128, 128),
     (512, 128, 192, 128, 128), (768, 192, 192, 128, 128), (1536, 384, 192, 128, 128), (2048, 512, 192, 160, 128),
     (3072, 768, 192, 192, 128), (4096, 1024, 192, 160, 128), (320, 80, 160, 64, 64), (40, 10, 64, 64, 64)],
)  # fmt: skip
def test_tiles_are_as_wide_as_measured_to_be_fastest(
    outputs: int, inputs: int, bare: int, activated: int, with_residual: int
) -> None:
    assert hopper.tile_width(outputs, inputs, activated=False) == bare
    assert hopper.tile_width(outputs, inputs, activated=True) == activated
    assert hopper.project_width(outputs) == with_residual


@pytest.mark.slow
@pytest.mark.parametrize("kernel", list(products()), ids=named)
def test_a_product_is_made_of_warp_group_products_and_bulk_copies(kernel: nvrtc.Kernel) -> None:
    code = taken_apart(kernel)
    # Beside tiles of 192 the warps that bring what others need have 24 registers, and put some aside.
    assert code.stack_bytes <= (64 if dict(kernel.constants)["BN"] > 160 else 8)
    multiplied = code.opcodes["IGMMA" if dict(kernel.constants)["INT8"] else "HGMMA"]
    assert multiplied % 8 == 0  # 128 bytes of K, of two times 64 rows; the compiler may unroll the loop
    assert multiplied > 0
    assert {"UTMALDG", "UTMASTG", "USETMAXREG"} <= set(code.opcodes)
    assert code.opcodes["MUFU"] <= (
        dict(kernel.constants)["BN"] + 20 if kernel.constants[-1][1] else 12
    )  # one a result


@pytest.mark.slow
@pytest.mark.parametrize("kernel", list(mlps()), ids=named)
def test_an_mlp_keeps_its_hidden_columns_in_registers(kernel: nvrtc.Kernel) -> None:
    code, c = taken_apart(kernel), dict(kernel.constants)
    assert code.stack_bytes == 0
    assert code.opcodes["HGMMA"] == c["C"] // 16 + c["BLOCK"] // 16


def test_what_nvrtc_says_reaches_the_user() -> None:
    kernel = hopper.product_kernel(128, "project", FP16)
    broken = nvrtc.Kernel(kernel.file, kernel.entry, kernel.constants[1:], kernel.threads, 0, kernel.insert)
    with pytest.raises(BuildError, match=r"NVRTC does not compile product_sm90\.cu for sm_90a: .*BN"):
        nvrtc.cubin(broken)


def recorded_for(call: Callable[..., object], *shapes: tuple[int, ...]) -> list[object]:
    launches: list[Launch] = []
    with FakeTensorMode(), recording(launches):
        call(*(torch.empty(shape, dtype=FP16, device="cuda") for shape in shapes))
    return [launch.kernel for launch in launches]


@pytest.mark.usefixtures("an_h200")
def test_a_block_at_a_large_batch_records_these_kernels_and_at_batch_1_those_of_triton() -> None:
    from convnext_deploy.kernels.dwconv_norm import _dwconv_moments
    from convnext_deploy.kernels.project import _project

    for batch, own in ((256, True), (1, False)):
        found = [
            *recorded_for(_dwconv_moments, (batch, 14, 14, 384), (384, 1, 7, 7), (384,)),
            *recorded_for(_project, (batch, 14, 14, 1536), (384, 1536), (384,), (batch, 14, 14, 384)),
        ]
        assert all(isinstance(kernel, nvrtc.Kernel) == own for kernel in found)


@pytest.mark.usefixtures("an_h200")
def test_what_is_traced_for_a_compiler_is_not_taken() -> None:
    with FakeTensorMode():
        x, weight = torch.empty((256 * 196, 384), dtype=FP16, device="cuda"), torch.empty(1536, 384, device="cuda")
        assert not hopper.takes_product(x, len(x), weight)


@pytest.mark.usefixtures("an_h200")
def test_other_types_and_generations_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), recording([]):
        weight = torch.empty(1536, 384, device="cuda")
        fp32, fp16 = (torch.empty((256 * 196, 384), dtype=dtype, device="cuda") for dtype in (torch.float32, FP16))
        assert not hopper.takes_product(fp32, len(fp32), weight)
        assert hopper.takes_product(fp16, len(fp16), weight)
        monkeypatch.setattr(launch, "capability", lambda x: (10, 0))
        assert not hopper.takes_product(fp16, len(fp16), weight)


# On the host, where `emulated_sm90.hpp` does what the instructions do -------------------------------------------------

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launches are of two programs, so that each takes several tiles."""

    def start(kernel: nvrtc.Kernel, like: Tensor, tiles: int, *arguments: Any) -> None:
        emulated_kernels.product(kernel, tmp_path, min(tiles, 2), *arguments)

    monkeypatch.setattr(hopper, "start", start)


def random(*shape: int, dtype: torch.dtype = FP16, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def codes(*shape: int) -> Tensor:
    return q8.codes_reference(random(*shape, dtype=torch.float32), torch.tensor(1 / 40), torch.int8)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def shapes(*found: tuple[int, int, int]) -> Any:
    """Of rows, inputs and outputs; the first is quick enough for every run."""
    return [found[0], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in found[1:])]


@needs_a_compiler
@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("dtype", [FP16, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), shapes((300, 96, 192), (128, 72, 64), (1, 200, 328)))
def test_products_on_the_host_equal_float64(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """As they do on a GPU, where the same kernels ran: it shows that the emulation is right."""
    x, weight = random(rows, inputs, dtype=dtype) + 2, random(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    bias, residual = random(outputs, dtype=dtype), random(rows, outputs, dtype=dtype)
    wide = (x.double(), weight.double(), bias.double())
    found, exact = hopper.project(x, weight, bias, residual), residual.double() + F.linear(*wide)
    assert relative(found, exact) <= 1.05 * relative(exact.to(dtype), exact) + 1e-6
    chunks = wide[0].split(64, -1)
    means = torch.stack([part.mean(-1) for part in chunks], -1)
    powers = torch.stack([(part - part.mean(-1, keepdim=True)).square().sum(-1) for part in chunks], -1)
    moments, sums = torch.stack((means, powers), -1).float().contiguous(), wide[1].sum(1).float()
    found = hopper.expand(x, weight, bias, "layernorm", 1e-6, "gelu", moments, sums, 64)
    exact = ex.expand_reference(*wide, "layernorm", 1e-6, "gelu")
    theirs = ex.expand_reference(x, weight, bias, "layernorm", 1e-6, "gelu")
    assert relative(found, exact) <= 2 * relative(theirs, exact)


@needs_a_compiler
@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("activation", ["gelu", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), shapes((300, 384, 192), (128, 80, 64), (1, 144, 336)))
def test_products_of_codes_on_the_host_equal_float64(rows: int, inputs: int, outputs: int, activation: str) -> None:
    """A code may be one apart where a rounding decides; with a residual nothing but the last rounding differs."""
    x, weight = codes(rows, inputs), codes(outputs, inputs)
    scales = random(outputs, dtype=torch.float32).abs() / (1600 * inputs**0.5) + 1e-5
    bias, out_scale = random(outputs), torch.tensor([0.03, 0.4])
    arguments = (x, weight, bias, activation, scales, out_scale)
    found, exact = hopper.expand_codes(*arguments), q8.expand_quantized_reference(*arguments)
    apart = (found.int() - exact.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.005
    assert exact.double().std() > 20  # codes of all sizes, some of them at the ends
    residual = random(rows, outputs, dtype=BF16)
    wide = residual.double() + q8.linear_reference(x, weight, bias.bfloat16(), scales)
    projected = hopper.project_codes(x, weight, bias.bfloat16(), residual, scales)
    assert relative(projected, wide) <= 1.02 * relative(wide.to(BF16), wide)


@pytest.mark.usefixtures("an_h200")
def test_codes_are_multiplied_by_triton_until_these_kernels_have_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((256 * 196, 384), (1536, 384), (1536,), (1536,), (2,))
    types = (torch.int8, torch.int8, FP16, torch.float32, torch.float32)

    def found() -> list[Any]:
        launches: list[Launch] = []
        with FakeTensorMode(), recording(launches):
            x, weight, bias, scales, out_scale = (
                torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in zip(shapes, types, strict=True)
            )
            q8._expand_quantized(x, weight, bias, "gelu", scales, out_scale)
            hidden, back = torch.empty((256 * 196, 1536), dtype=torch.int8, device="cuda"), weight.reshape(384, 1536)
            residual = torch.empty((256 * 196, 384), dtype=FP16, device="cuda")
            q8._project_quantized(hidden, back, bias[:384], residual, scales[:384])
            taps, images = residual[:384, :49].reshape(384, 1, 7, 7), residual.reshape(256, 14, 14, 384)
            q8._dwconv_norm_quantized(images, taps, bias[:384], "layernorm", 1e-6, scales[:384], False)
        return [each.kernel for each in launches]

    of_triton = found()
    assert not [kernel for kernel in of_triton if isinstance(kernel, nvrtc.Kernel)]
    monkeypatch.setattr(launch, "INT8_IN_CUDA_CPP", True)
    widened, narrowed, convolved, normalized = found()
    assert [dict(kernel.constants)["PROJECT"] for kernel in (widened, narrowed)] == [0, 1]
    assert convolved.entry == "dwconv_moments"
    assert normalized.fn.__name__ == "norm_codes_kernel"
