"""The kernels in CUDA C++ for Hopper without a GPU: where they are used, that they compile, and what of.

That they compute right is a matter of `test_kernels_gpu.py`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from sass import Code, of_cubin

pytest.importorskip("triton")
from torch._subclasses.fake_tensor import FakeTensorMode

from convnext_deploy.errors import BuildError
from convnext_deploy.kernels import hopper, launch, nvrtc
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
    assert code.opcodes["HGMMA"] % 8 == 0  # 64 of K, of two times 64 rows; the compiler may unroll the loop
    assert code.opcodes["HGMMA"] > 0
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
