"""The kernels on a GPU, beside float64. First run on an H200 on 2026-11-27, not all of it: docs/design/kernels.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_deploy import api
from convnext_deploy.kernels import dwconv_norm as dw
from convnext_deploy.kernels import expand as ex
from convnext_deploy.kernels import hopper, hopper_dwconv, launch
from convnext_deploy.kernels import mlp as ml
from convnext_deploy.kernels import patches as pa
from convnext_deploy.kernels import project as pr
from convnext_deploy.kernels import quantized as q8
from convnext_deploy.kernels.launch import capability
from convnext_deploy.models.registry import VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CHANNELS = sorted({width for fields in VARIANTS.values() for width in fields["dims"]})
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def agrees(call: Callable[..., Tensor], reference: Callable[..., Tensor], *arguments: Any) -> None:
    """At most twice the error of PyTorch's own in the same type, on the same GPU."""
    exact = reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments))
    errors = [float((f(*arguments).double() - exact).norm() / exact.norm()) for f in (call, reference)]
    assert errors[0] <= 2 * errors[1] + 1e-6, errors


ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != launch.CUDA_CPP, reason="no Hopper GPU"
)


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)


@ON_HOPPER
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("width", hopper.WIDTHS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1000, 384, 1536), (20000, 192, 768), (300, 1024, 200)])
def test_products_for_hopper_equal_float64(
    rows: int, inputs: int, outputs: int, width: int, dtype: torch.dtype
) -> None:
    """Some programs have one tile and some several; tiles at the ends are not whole."""
    x, chunk = random(rows, inputs, dtype=dtype) + 2, 64
    weight, bias = random(outputs, inputs, dtype=dtype, scale=inputs**-0.5), random(outputs, dtype=dtype)
    residual, sums = random(rows, outputs, dtype=dtype), weight.double().sum(1).float()
    moments = moments_of(x.double(), chunk)

    def bare(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return hopper.launch_product(hopper.product_kernel(width, "expand", dtype), x, weight, bias)

    def project(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return hopper.launch_product(hopper.product_kernel(width, "project", dtype), x, weight, bias, residual=residual)

    def expand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = hopper.product_kernel(width, "expand", dtype, "layernorm", "gelu")
        return hopper.launch_product(
            kernel, x, weight, bias, of_columns=sums, moments=moments, chunk=chunk, eps=1e-6
        )  # fmt: skip

    agrees(bare, F.linear, x, weight, bias)
    if width in hopper.PROJECT_WIDTHS:
        agrees(
            project, lambda x, weight, bias, residual: residual + F.linear(x, weight, bias), x, weight, bias, residual
        )
    agrees(expand, lambda x, weight, bias: F.gelu(F.linear(normalized(x), weight, bias)), x, weight, bias)


@ON_HOPPER
@pytest.mark.parametrize("width", hopper.CODE_WIDTHS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1000, 384, 1536), (20000, 192, 768), (300, 1024, 208)])
def test_products_of_codes_for_hopper_equal_float64(rows: int, inputs: int, outputs: int, width: int) -> None:
    x, weight = (
        q8.codes_reference(random(*shape, dtype=torch.float32), torch.tensor(1 / 40), torch.int8)
        for shape in ((rows, inputs), (outputs, inputs))
    )
    scales = random(outputs, dtype=torch.float32).abs() / (1600 * inputs**0.5) + 1e-5
    bias, residual = random(outputs, dtype=torch.float16), random(rows, outputs, dtype=torch.float16)
    out_scale = torch.tensor([0.03, 0.4], device="cuda")
    widen = hopper.product_kernel(width, "expand", torch.int8, activation="gelu", half=torch.float16)
    found = hopper.launch_product(widen, x, weight, bias, of_columns=scales, out_scale=out_scale)
    exact = q8.expand_quantized_reference(x, weight, bias, "gelu", scales, out_scale)
    apart = (found.int() - exact.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.01
    narrow = hopper.product_kernel(width, "project", torch.int8, half=torch.float16)
    projected = hopper.launch_product(narrow, x, weight, bias, residual=residual, of_columns=scales).double()
    wide = residual.double() + q8.linear_reference(x, weight, bias, scales)
    assert (projected - wide).norm() <= 1.02 * (wide.half().double() - wide).norm()


def moments_of(x: Tensor, chunk: int) -> Tensor:
    """(..., C) -> (..., chunks, 2) fp32."""
    parts = x.split(chunk, -1)
    means = [part.mean(-1) for part in parts]
    powers = [(part - mean[..., None]).square().sum(-1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack((torch.stack(means, -1), torch.stack(powers, -1)), -1).float().contiguous()


def chunk_of(x: Tensor) -> int:
    _, height, _, channels = x.shape
    return launch.conv_launch(x.dtype, height, channels, 7).channels


def convolution_arguments(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    channels = shape[-1]
    x, weight, bias = (
        random(*size, dtype=dtype, scale=scale)
        for size, scale in ((shape, 1.0), ((channels, 1, 7, 7), 1 / 7), ((channels,), 1.0))
    )
    return x, weight, bias


def exact_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, H, W, C), in float64."""
    channels = x.shape[-1]
    exact = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=3, groups=channels)
    return exact.permute(0, 2, 3, 1)


MAPS = [(200, 56, 56, 96), (300, 28, 28, 192), (600, 14, 14, 384), (1000, 7, 7, 768), (3, 9, 7, 96),
        (3, 17, 33, 64), (2, 20, 18, 40), (2, 75, 75, 128)]  # fmt: skip


@ON_HOPPER
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [*MAPS, (40, 96, 96, 96), (40, 12, 12, 1024), (5, 9, 9, 72)], ids=str)
def test_the_convolution_for_hopper_has_no_error_but_the_last_rounding(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """And its moments are of what it wrote. Twice, since a race need not show the first time."""
    x, weight, bias = convolution_arguments(shape, dtype)
    chunk, exact = chunk_of(x), exact_convolution(x, weight, bias)
    rounding = float((exact.to(dtype).double() - exact).norm())
    for _ in range(2):
        y, moments = hopper_dwconv.dwconv_moments(x, dw.taps(weight), bias, chunk)
        assert float((y.double() - exact).norm()) <= 1.01 * rounding
        of_y = moments_of(y.double(), chunk)
        for kind in (0, 1):
            assert float((moments[..., kind] - of_y[..., kind]).norm() / of_y[..., kind].norm()) < 1e-5


@ON_HOPPER
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(64, 96), (50000, 96), (777, 64)])
def test_the_mlp_for_hopper_equals_float64(rows: int, channels: int, dtype: torch.dtype) -> None:
    hidden, chunk = 4 * channels, 32
    x, residual = random(rows, channels, dtype=dtype) + 2, random(rows, channels, dtype=dtype, seed=1)
    weight, bias = random(hidden, channels, dtype=dtype, scale=channels**-0.5), random(hidden, dtype=dtype)
    back, back_bias = random(channels, hidden, dtype=dtype, scale=hidden**-0.5), random(channels, dtype=dtype)
    moments = moments_of(x.double(), chunk)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor) -> Tensor:
        return hopper.mlp(x, weight, bias, "layernorm", 1e-6, "gelu", moments, chunk, back, back_bias, residual)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, back: Tensor, back_bias: Tensor, residual: Tensor) -> Tensor:
        return residual + F.linear(F.gelu(F.linear(normalized(x), weight, bias)), back, back_bias)

    agrees(ours, theirs, x, weight, bias, back, back_bias, residual)


@ON_HOPPER
def test_a_network_at_a_large_batch_gives_nearly_the_same_with_and_without_the_kernels_for_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from convnext_deploy.kernels.use import parts, use_kernels
    from convnext_deploy.models import passes, registry
    from convnext_deploy.models.convnext import ConvNeXt

    model = ConvNeXt(registry.spec("convnext_tiny")).eval().requires_grad_(False)
    for fold in (passes.fold_norm_affine, passes.fold_layer_scale):
        fold(model)
    images = random(64, 3, 224, 224, dtype=torch.float32)
    with torch.inference_mode():
        exact = model.cuda()(images).double()
        model = model.half()
        use_kernels(model, parts(model))
        found = model(images.half())
        monkeypatch.setattr(launch, "CUDA_CPP", (0, 0))
        of_triton = model(images.half())
    errors = [float((logits.double() - exact).norm() / exact.norm()) for logits in (found, of_triton)]
    assert errors[0] <= 1.2 * errors[1], errors


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("channels", [*CHANNELS, 33])
def test_a_block_of_every_width_equals_float64(channels: int, dtype: torch.dtype) -> None:
    x = random(3, 9, 7, channels, dtype=dtype)
    conv, bias = random(channels, 1, 7, 7, dtype=dtype, scale=1 / 7), random(channels, dtype=dtype)
    weight = random(4 * channels, channels, dtype=dtype, scale=channels**-0.5)
    back = random(channels, 4 * channels, dtype=dtype, scale=0.5 * channels**-0.5)
    gain, wide_bias = random(4 * channels, dtype=dtype, seed=1), random(4 * channels, dtype=dtype)
    agrees(dw.dwconv_norm, dw.dwconv_norm_reference, x, conv, bias, "layernorm", 1e-6)

    def fused(x: Tensor, conv: Tensor, bias: Tensor, weight: Tensor, wide_bias: Tensor, back: Tensor) -> Tensor:
        y, moments = dw.dwconv_moments(x, conv, bias)
        sums, chunk = weight.double().sum(1).float(), dw.launch_of(x, conv).channels
        return pr.project(
            ex.expand(y, weight, wide_bias, "layernorm", 1e-6, "gelu", moments, sums, chunk), back, bias, x
        )

    def narrow(x: Tensor, conv: Tensor, bias: Tensor, weight: Tensor, wide_bias: Tensor, back: Tensor) -> Tensor:
        y, moments = dw.dwconv_moments(x, conv, bias)
        chunk = dw.launch_of(x, conv).channels
        return ml.mlp(y, weight, wide_bias, "layernorm", 1e-6, "gelu", moments, chunk, back, bias, x)

    def fused_grn(
        x: Tensor, conv: Tensor, bias: Tensor, weight: Tensor, wide_bias: Tensor, back: Tensor, gain: Tensor
    ) -> Tensor:
        y, moments = dw.dwconv_moments(x, conv, bias)
        sums, chunk = weight.double().sum(1).float(), dw.launch_of(x, conv).channels
        hidden, squares = ex.expand_squares(
            y, weight, wide_bias, "layernorm", 1e-6, "gelu", moments, sums, chunk
        )  # fmt: skip
        return pr.project(hidden, back, bias, x, pr.grn_factor(squares, gain, 1e-6))

    def plain(
        x: Tensor,
        conv: Tensor,
        bias: Tensor,
        weight: Tensor,
        wide_bias: Tensor,
        back: Tensor,
        gain: Tensor | None = None,
    ) -> Tensor:
        hidden = ex.expand_reference(dw.conv_reference(x, conv, bias), weight, wide_bias, "layernorm", 1e-6, "gelu")
        factor = None if gain is None else pr.grn_factor_reference(ex.squares_reference(hidden), gain, 1e-6)
        return pr.project_reference(hidden, back, bias, x, factor)

    agrees(fused, plain, x, conv, bias, weight, wide_bias, back)
    agrees(fused_grn, plain, x, conv, bias, weight, wide_bias, back, gain)
    if channels <= ml.WIDEST:
        agrees(narrow, plain, x, conv, bias, weight, wide_bias, back)
        many = random(2, 96, 96, channels, dtype=dtype)  # the launch of many rows
        agrees(narrow, plain, many, conv, bias, weight, wide_bias, back)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("with_factor", [False, True])
def test_a_split_project_at_batch_1_equals_float64_and_itself(
    with_factor: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "processors", lambda x: launch.PROCESSORS)  # a small GPU would not split it
    hidden, residual = random(1, 7, 7, 3072, dtype=dtype), random(1, 7, 7, 768, dtype=dtype)
    weight, bias = random(768, 3072, dtype=dtype, scale=3072**-0.5), random(768, dtype=dtype)
    factor = random(1, 3072, dtype=torch.float32).abs() if with_factor else None
    assert pr.project_launch(weight, residual, factor).split > 1
    agrees(pr.project, pr.project_reference, hidden, weight, bias, residual, factor)
    first, second = (pr.project(hidden, weight, bias, residual, factor) for _ in range(2))
    assert torch.equal(first, second)


def test_a_split_project_in_8_bits_at_batch_1_equals_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda x: launch.PROCESSORS)
    codes = [
        q8.codes_reference(random(*shape, dtype=torch.float32), torch.tensor(1 / 32), torch.int8)
        for shape in ((1, 7, 7, 3072), (768, 3072))
    ]
    bias, residual = random(768, dtype=torch.float16), random(1, 7, 7, 768, dtype=torch.float16)
    arguments = (*codes, bias, residual, random(768, dtype=torch.float32).abs() / 20000)
    assert pr.project_launch(codes[1], residual, None).split > 1
    torch.testing.assert_close(
        q8.project_quantized(*arguments), q8.project_quantized_reference(*arguments), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("replayed", [False, True])
def test_kernels_that_begin_early_give_the_bits_of_those_in_turn(
    replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of 60 kernels whose buffers are handed out again and again, a hundred times; PyTorch's stand between."""
    if not launch.overlaps(torch.empty(0, device="cuda")):
        pytest.skip(
            "programmatic dependent launch needs compute capability 9.0 and a Triton whose waits are operations"
        )
    channels = 768
    conv, bias = random(channels, 1, 7, 7, dtype=torch.float16, scale=1 / 7), random(channels, dtype=torch.float16)
    weight = random(4 * channels, channels, dtype=torch.float16, scale=channels**-0.5)
    back = random(channels, 4 * channels, dtype=torch.float16, scale=0.2 * channels**-0.5)
    wide_bias, sums = random(4 * channels, dtype=torch.float16), weight.double().sum(1).float()

    def chain(x: Tensor) -> Tensor:
        for block in range(15):
            y, moments = dw.dwconv_moments(x, conv, bias)
            chunk = dw.launch_of(x, conv).channels
            hidden = ex.expand(y, weight, wide_bias, "layernorm", 1e-6, "gelu", moments, sums, chunk)
            x = pr.project(hidden, back, bias, x)
            if block % 4 == 3:
                x = x * 0.5
        return x

    images = random(1, 7, 7, channels, dtype=torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "PDL_FROM", (99, 0))
        expected = chain(images)
    found = chain(images)
    graph = torch.cuda.CUDAGraph()
    if replayed:
        with torch.cuda.graph(graph):
            found = chain(images)
    for _ in range(100):
        if replayed:
            graph.replay()
        else:
            found = chain(images)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_stem_downsample_and_pool_norm_equal_float64(dtype: torch.dtype) -> None:
    pixels = torch.randint(256, (3, 34, 67, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
    weight, bias = random(96, 3, 4, 4, dtype=dtype, scale=0.01), random(96, dtype=dtype)
    agrees(pa.stem, pa.stem_reference, pixels, weight, bias, bias + 1, bias, "layernorm", 1e-6)
    half = random(192, 96, 2, 2, dtype=dtype, scale=0.05)
    for shape in ((3, 8, 16, 96), (3, 9, 17, 96)):  # of odd sides the last row and column are dropped
        x = random(*shape, dtype=dtype)
        agrees(pa.downsample, pa.downsample_reference, x, half, random(192, dtype=dtype), "layernorm", 1e-6)
    agrees(pa.pool_norm, pa.pool_norm_reference, x, "layernorm", 1e-6)


def adding_error(x: Tensor, weight: Tensor) -> Tensor:
    """At most, of a product in E4M3: Hopper adds in 14 bits of the largest sum, and none exceeds that of all sizes."""
    return 2**-13 * F.linear(x.float().abs(), weight.float().abs())


@pytest.mark.parametrize("dtype", [torch.int8, q8.E4M3], ids=str)
def test_products_in_8_bits_equal_float64(dtype: torch.dtype) -> None:
    if dtype == q8.E4M3 and capability(torch.empty(0, device="cuda")) < (8, 9):
        pytest.skip("E4M3 needs compute capability 8.9")
    codes = q8.codes_reference(random(3, 14, 14, 96, dtype=torch.float32), torch.tensor(1 / 32), dtype)
    weight = q8.codes_reference(random(384, 96, dtype=torch.float32), torch.tensor(1 / 32), dtype)
    bias, scales = random(384, dtype=torch.float16), random(384, dtype=torch.float32).abs() / 5000
    out_scale = torch.tensor([0.01, 1.1], device="cuda")
    found, exact = (
        f(codes, weight, bias, "gelu", scales, out_scale).float()
        for f in (q8.expand_quantized, q8.expand_quantized_reference)
    )
    if dtype == torch.int8:
        assert ((found - exact).abs() > 0).double().mean().item() < 0.02
    else:  # codes near zero lie closer together than the products' 14 bits
        error = 1.13 * adding_error(codes, weight) * scales / out_scale[0]  # GELU is at most so steep
        assert ((found - exact).abs() <= error + exact.abs() / 8 + 2**-9).all()  # and one code
    hidden = q8.codes_reference(random(3, 14, 14, 384, dtype=torch.float32), torch.tensor(1 / 32), dtype)
    back, residual = weight.reshape(96, 384), random(3, 14, 14, 96, dtype=torch.float16)
    arguments = (hidden, back, bias[:96].clone(), residual, scales[:96].clone())
    found, exact = (f(*arguments).double() for f in (q8.project_quantized, q8.project_quantized_reference))
    rounding = 2**-10 * exact.abs() + 2**-10  # of the result, and of what it was before the residual
    if dtype == q8.E4M3:
        rounding += (adding_error(hidden, back) * scales[:96]).double()
    assert ((found - exact).abs() <= rounding).all()


@pytest.mark.parametrize("format", ["eager", "aotinductor"])
@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_a_plan_runs_in_kernels(format: str, type: Any, tmp_path: Path) -> None:
    """The export compares with the plan's simulation on the CPU; a replayed graph gives what a session without does."""
    if type == "fp8" and capability(torch.empty(0, device="cuda")) < (8, 9):
        pytest.skip("E4M3 needs compute capability 8.9")
    example = Path(__file__).resolve().parents[2] / "examples" / "fashion-mnist"
    weights, images = str(example / "model.safetensors"), str(example / "test-2000.parquet")
    plan = tmp_path / "plan.json"
    api.quantize(weights, out=plan, calibration=images, target="eager", type=type, images=64)
    made = api.export(
        weights, format=format, plan=plan, device="cuda", kernels="all", verify_data=images, out=tmp_path / format
    )
    assert made.manifest.precision.quantized == 20
    plain, replayed = (api.load(made.path, device="cuda", cuda_graph=graph) for graph in (False, True))
    pixels = np.random.default_rng(0).normal(size=(3, *map(int, made.manifest.inputs[0].shape[1:]))).astype(np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(replayed.run(pixels)[0], plain.run(pixels)[0])


@pytest.mark.parametrize("format", ["eager", "aotinductor"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_an_artifact_with_kernels_is_verified_and_replays_a_graph(
    format: str, precision: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """The export compares its outputs with the source's; a replayed graph gives the same ones, for each new batch."""
    made = api.export(
        str(checkpoint), format=format, precision=precision, device="cuda", kernels="all", input="uint8",
        image_size=(64, 64), out=tmp_path / format,
    )  # fmt: skip
    assert "stages.0" in made.manifest.export.kernels
    plain, replayed = (api.load(made.path, device="cuda", cuda_graph=graph) for graph in (False, True))
    generator = np.random.default_rng(0)
    for batch in (2, 2, 5):
        images = generator.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
        for _ in range(2):
            np.testing.assert_array_equal(replayed.run(images)[0], plain.run(images)[0])
