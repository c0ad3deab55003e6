"""The kernels compiled for GPUs that are not here: registers, spills, and what the instructions are.

Limits are a tenth above what Triton 3.9 gives, so that a regression of ours or of a new Triton shows without a GPU.
None of them is a speed.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sass import Code, compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

GENERATIONS = (80, 90, 100, 120)
MATRIX = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCIMMA"), 120: ("HMMA", "IMMA")}


def conv(sm: int, type: str, *, side: int = 14, channels: int = 512, rows: int = 7, packed: bool = False) -> Code:
    from convnext_deploy.kernels.dwconv_norm_triton import dwconv_moments_kernel

    half = f"*{type}"
    types = {"x": half, "weight": half, "bias": half, "y": half, "moments": "*fp32"}
    return compiled(
        dwconv_moments_kernel, types, sm=sm, num_warps=4, H=side, W=side, C=channels, K=7, ROWS=rows, BW=4, BC=64,
        PACKED=packed,
    )  # fmt: skip


def per_product(code: Code, rows: int) -> float:
    """Instructions a thread executes for each of its multiply-accumulates: 2 channels a thread, 49 taps."""
    return code.instructions / (49 * rows * 2)


@pytest.mark.parametrize("sm", GENERATIONS)
def test_dwconv_in_fp16_multiplies_pairs_and_does_not_spill(sm: int) -> None:
    code = conv(sm, "fp16", packed=True)
    assert code.stack_bytes == 0
    assert code.registers <= 168  # three programs a multiprocessor
    assert per_product(code, 7) <= 2.25
    assert code.opcodes["HFMA2"] >= 7 * 42  # every tap of a row but the first, which is a product


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_dwconv_in_bf16_is_mostly_fmas_and_does_not_spill(sm: int) -> None:
    code = conv(sm, "bf16")
    assert code.stack_bytes == 0
    assert code.registers <= 168
    assert per_product(code, 7) <= 2.9
    assert code.opcodes["FFMA"] + code.opcodes["FHFMA"] >= 0.9 * 7 * 98  # Blackwell multiplies bf16 into fp32


def expand(sm: int, type: str, channels: int, *, m: int, n: int, k: int, warps: int, **flags: Any) -> Code:
    from convnext_deploy.kernels.product_triton import expand_kernel

    eight = type in ("i8", "fp8e4nv")
    half = "*fp16" if eight else f"*{type}"
    types = {
        "x": f"*{type}", "weight": f"*{type}", "bias": half, "moments": "*fp32", "row_sums": "*fp32",
        "scales": "*fp32", "out_scale": "*fp32", "out": f"*{type}", "squares": "*fp32",
        "ROWS": "i32", "TILES": "i32", "TILES_M": "i32",
    }  # fmt: skip
    chunks = -(-channels // 64)
    constants = {"SQUARES": False, "SCALED": eight, "QUANTIZE": eight, "PRECISION": "ieee"} | flags
    return compiled(
        expand_kernel, types, sm=sm, num_warps=warps, num_stages=3, N=4 * channels, K=channels, BC=64, CHUNKS=chunks,
        WIDE=1 << (chunks - 1).bit_length(), EPS=1e-6, NORM="layernorm", ACTIVATION="gelu", BM=m, BN=n, BK=k, GROUP=8,
        **constants,
    )  # fmt: skip


def project(sm: int, type: str, channels: int, *, m: int, n: int, k: int, warps: int, prologue: str = "none") -> Code:
    from convnext_deploy.kernels.product_triton import project_kernel

    eight = type in ("i8", "fp8e4nv")
    half = "*fp16" if eight else f"*{type}"
    types = {
        "hidden": f"*{type}", "weight": f"*{type}", "bias": half, "residual": half, "factor": "*fp32",
        "scales": "*fp32", "hidden_scale": "*fp32", "out": half, "ROWS": "i32", "TILES": "i32", "TILES_M": "i32",
    }  # fmt: skip
    return compiled(
        project_kernel, types, sm=sm, num_warps=warps, num_stages=3, N=channels, K=4 * channels, PROLOGUE=prologue,
        SCALED=eight, PRECISION="ieee", BM=m, BN=n, BK=k, GROUP=8,
    )  # fmt: skip


MANY = 256 * 56 * 56  # rows


def mlp(sm: int, type: str, channels: int, *, rows: int, precision: str = "ieee") -> Code:
    """With the launch that so many rows have there."""
    import torch

    from convnext_deploy.kernels import launch as launches
    from convnext_deploy.kernels.mlp import head_and_rest
    from convnext_deploy.kernels.mlp_triton import mlp_kernel

    names = ("x", "weight", "bias", "back_weight", "back_bias", "residual", "out")
    types = dict.fromkeys(names, f"*{type}") | {"moments": "*fp32", "M": "i32"}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[type]
    with mock.patch.object(launches, "capability", return_value=divmod(sm, 10)):
        launch = launches.mlp_launch(torch.empty(0, channels, dtype=dtype), rows, 4 * channels)
    head, rest = head_and_rest(channels)
    chunk = launches.conv_launch(dtype, 56, 56, channels, 7).channels
    chunks = -(-channels // chunk)
    return compiled(
        mlp_kernel, types, sm=sm, num_warps=launch.warps, num_stages=launch.stages, C=channels, HIDDEN=4 * channels,
        BC=chunk, CHUNKS=chunks, WIDE=1 << (chunks - 1).bit_length(), EPS=1e-6, NORM="layernorm", ACTIVATION="gelu",
        PRECISION=precision, BM=launch.m, BH=launch.hidden, HEAD=head, REST=rest,
    )  # fmt: skip


def uses_the_matrix_units(code: Code, sm: int) -> bool:
    return any(opcode.startswith(MATRIX[sm]) for opcode in code.opcodes)


@pytest.mark.parametrize("sm", GENERATIONS)
@pytest.mark.parametrize("type", ["fp16", "bf16"])
def test_products_use_the_matrix_units_and_do_not_spill(type: str, sm: int) -> None:
    k = 64 if sm >= 90 else 32
    for code in (
        expand(sm, type, 384, m=128, n=128, k=k, warps=8, SQUARES=True),
        project(sm, type, 384, m=128, n=128, k=k, warps=8, prologue="factor"),
    ):
        assert uses_the_matrix_units(code, sm)
        assert code.stack_bytes == 0
        assert code.shared_bytes <= (100 << 10)  # two programs on the smallest, sm_90 and sm_100; one on sm_120


@pytest.mark.parametrize("sm", GENERATIONS)
@pytest.mark.parametrize("channels", [24, 40, 80, 96, 128])
def test_a_whole_mlp_uses_the_matrix_units_and_does_not_spill(channels: int, sm: int) -> None:
    for code in (mlp(sm, "fp16", channels, rows=rows) for rows in (MANY, 1)):
        assert uses_the_matrix_units(code, sm)
        assert code.stack_bytes == 0
        assert code.shared_bytes <= (99 << 10)  # two programs on sm_90 and sm_100; one on sm_120
        assert code.registers <= {256: 206, 128: 255}[code.threads]  # one program a multiprocessor, or two


@pytest.mark.parametrize("sm", GENERATIONS)
@pytest.mark.parametrize(("type", "precision"), [("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")])
def test_a_whole_mlp_in_other_types_does_not_spill(type: str, precision: str, sm: int) -> None:
    for channels in (96, 128):
        code = mlp(sm, type, channels, rows=MANY, precision=precision)
        assert code.stack_bytes == 0
        assert code.shared_bytes <= (99 << 10)
        if (type, precision) != ("fp32", "ieee"):
            assert uses_the_matrix_units(code, sm)


@pytest.mark.parametrize("sm", GENERATIONS)
@pytest.mark.parametrize("channels", [96, 128])
def test_a_whole_mlp_does_its_activation_in_few_instructions(channels: int, sm: int) -> None:
    """Of the whole kernel, a result of one hidden chunk; 16 to 20 are in the loop, whose body sm_100 has twice."""
    code = mlp(sm, "fp16", channels, rows=MANY)
    results = 128 * 64
    assert code.instructions * code.threads / results <= {80: 51, 90: 47.5, 100: 73.5, 120: 50.5}[sm]
    assert code.opcodes["MUFU"] * code.threads / results <= (4.4 if sm == 100 else 2.2)


@pytest.mark.parametrize("sm", GENERATIONS)
def test_expand_does_its_activation_in_few_instructions(sm: int) -> None:
    """Of the whole kernel, a result: Triton's erf takes 33 for the activation alone."""
    code = expand(sm, "fp16", 384, m=128, n=128, k=64 if sm >= 90 else 32, warps=8)
    assert code.instructions * code.threads / (128 * 128) <= {80: 24.5, 90: 27, 100: 29, 120: 32}[sm]
    assert code.opcodes["MUFU"] * code.threads / (128 * 128) <= 2.2  # an exponential and a reciprocal


@pytest.mark.parametrize(("sm", "type"), [(80, "i8"), (90, "i8"), (90, "fp8e4nv"), (120, "fp8e4nv")])
def test_products_in_8_bits_use_the_matrix_units_and_do_not_spill(sm: int, type: str) -> None:
    matrix = {"i8": ("IMMA", "IGMMA"), "fp8e4nv": ("QGMMA", "QMMA")}[type]
    k = 128 if sm >= 90 else 64
    for code in (
        expand(sm, type, 384, m=128, n=128, k=k, warps=8), project(sm, type, 384, m=128, n=128, k=k, warps=8),
    ):  # fmt: skip
        assert any(opcode.startswith(matrix) for opcode in code.opcodes)
        assert code.stack_bytes == 0


def final_norm(sm: int, out: str) -> Code:
    from convnext_deploy.kernels.dwconv_norm_triton import dwconv_norm_kernel

    types = dict.fromkeys(("x", "weight", "bias", "y"), "*fp16") | {"out": f"*{out}", "out_scale": "*fp32"}
    return compiled(
        dwconv_norm_kernel, types, sm=sm, num_warps=4, H=14, W=14, C=384, K=7, ROWS=7, BW=4, BC=64, PACKED=True,
        EPS=1e-6, NORM="layernorm", QUANTIZE=out != "fp16",
    )  # fmt: skip


def stem(sm: int) -> Code:
    from convnext_deploy.kernels.patches_triton import stem_kernel

    types = {"x": "*u8"} | dict.fromkeys(("weight", "bias", "gain", "offset", "out"), "*fp16") | {"M": "i32"}
    types |= dict.fromkeys(("BATCH_STRIDE", "ROW_STRIDE", "COLUMN_STRIDE", "CHANNEL_STRIDE"), "i32")
    return compiled(
        stem_kernel, types, sm=sm, num_warps=8, H=56, W=56, C=3, N=192, K=4, EPS=1e-6, NORM="layernorm", OFFSET=True,
        PRECISION="ieee", BM=64, BN=256, BK=64,
    )  # fmt: skip


def downsample(sm: int) -> Code:
    from convnext_deploy.kernels.patches_triton import downsample_kernel

    types = dict.fromkeys(("x", "weight", "bias", "out"), "*fp16") | {"M": "i32"}
    return compiled(
        downsample_kernel, types, sm=sm, num_warps=8, H=28, W=28, C=192, N=384, EPS=1e-6, NORM="layernorm",
        PRECISION="ieee", BM=128, BN=128, BK=64 if sm >= 90 else 32, GROUP=8,
    )  # fmt: skip


def pool_norm(sm: int) -> Code:
    from convnext_deploy.kernels.patches_triton import pool_norm_kernel

    types = {"x": "*fp16", "out": "*fp32", "PIXELS": "i32"}
    return compiled(
        pool_norm_kernel, types, sm=sm, num_warps=8, C=768, WIDE=1024, BP=8, EPS=1e-6, NORM="layernorm"
    )  # fmt: skip


def test_dwconv_with_the_whole_norm_does_not_spill() -> None:
    assert final_norm(90, "fp16").stack_bytes == 0
    assert final_norm(90, "i8").stack_bytes == 0


@pytest.mark.parametrize("sm", GENERATIONS)
def test_the_other_kernels_do_not_spill(sm: int) -> None:
    assert pool_norm(sm).stack_bytes == 0
    for code in (stem(sm), downsample(sm)):
        assert uses_the_matrix_units(code, sm)
        assert code.stack_bytes == 0


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_inductor_sees_every_kernel_and_what_each_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with tensors of a GPU that is not there. A kernel whose writes were not understood would have its inputs
    copied first, and so would one that is handed the same memory twice."""
    import torch
    import triton
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    from convnext_deploy import passes
    from convnext_deploy.kernels.use import MLP, alternatives, parts, use_kernels
    from convnext_deploy.models.convnext import ConvNeXt
    from convnext_deploy.models.registry import spec

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    model = ConvNeXt(spec(name, depths=(1, 1, 1, 1), task="features", image_size=(64, 64))).eval().requires_grad_(False)
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    model = model.half()
    others = alternatives(model)
    use_kernels(model, [*others, *(part for part in parts(model) if part + MLP not in others)])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
        images = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.float16)
        graph, _ = aot_export_module(model.to("cuda"), [images], trace_joint=False)
    written = {}
    for node in graph.graph.nodes:
        assert "clone" not in str(node.target)
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            written.setdefault(getattr(kernel, "fn", kernel).__name__, set()).update(node.kwargs["tensors_to_clone"])
    expected = {
        "stem_kernel": {"out"}, "downsample_kernel": {"out"}, "dwconv_moments_kernel": {"y", "moments"},
        "expand_kernel": {"out"}, "project_kernel": {"out"},
    }  # fmt: skip
    if "v2" in name:
        expected |= {"expand_kernel": {"out", "squares"}, "grn_factor_kernel": {"factor"}}
    else:
        expected |= {"mlp_kernel": {"out"}}  # of the two narrow stages
    assert written == expected


@pytest.mark.parametrize(
    ("module", "name", "compile"),
    [
        ("product_triton", "expand_kernel", lambda: expand(90, "fp16", 96, m=64, n=64, k=32, warps=4, SQUARES=True)),
        ("product_triton", "project_kernel", lambda: project(90, "i8", 96, m=64, n=64, k=64, warps=4)),
        ("mlp_triton", "mlp_kernel", lambda: mlp(90, "fp16", 40, rows=1)),
        ("dwconv_norm_triton", "dwconv_moments_kernel", lambda: conv(90, "fp16", rows=2, packed=True)),
        ("patches_triton", "stem_kernel", lambda: stem(90)),
        ("patches_triton", "downsample_kernel", lambda: downsample(90)),
        ("patches_triton", "pool_norm_kernel", lambda: pool_norm(90)),
    ],
)
def test_inductor_copies_a_kernel_with_all_that_it_calls(
    module: str, name: str, compile: Callable[[], Code], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """AOTInductor compiles the source text of a kernel and of what it finds that this calls, in a file of their own."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as closure

    home = importlib.import_module(f"convnext_deploy.kernels.{module}")
    text = "import triton\nimport triton.language as tl\n\n@triton.jit\n" + closure(getattr(home, name))
    location = importlib.util.spec_from_file_location(f"copied_{name}", tmp_path / f"copied_{name}.py")
    assert location is not None
    assert location.loader is not None
    (tmp_path / f"copied_{name}.py").write_text(text)
    copied = importlib.util.module_from_spec(location)
    location.loader.exec_module(copied)
    monkeypatch.setattr(home, name, getattr(copied, name))
    assert compile().instructions > 100
