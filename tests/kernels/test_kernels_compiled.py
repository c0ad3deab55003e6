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

from convnext_deploy import formats
from convnext_deploy.kernels.launch import waits_are_operations
from convnext_deploy.records.plan import OperationPlan, Plan

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

GENERATIONS = (80, 90, 100, 120)
KNOWN_WAITS = pytest.mark.skipif(not waits_are_operations(), reason="this Triton's waits are inline assembly")
PDL = {sm: sm >= 90 and waits_are_operations() for sm in GENERATIONS}
MATRIX = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCIMMA"), 120: ("HMMA", "IMMA")}


def conv(sm: int, type: str, *, side: int = 14, channels: int = 512, rows: int = 7, packed: bool = False) -> Code:
    from convnext_deploy.kernels.dwconv_norm_triton import dwconv_moments_kernel

    half = f"*{type}"
    types = {"x": half, "weight": half, "bias": half, "y": half, "moments": "*fp32"}
    return compiled(
        dwconv_moments_kernel, types, sm=sm, num_warps=4, H=side, W=side, C=channels, K=7, ROWS=rows, BW=4, BC=64,
        PACKED=packed, PDL=PDL[sm],
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


def expand(sm: int, type: str, channels: int, *, m: int, n: int, k: int, warps: int, stages: int = 3,
           **flags: Any) -> Code:  # fmt: skip
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
        expand_kernel, types, sm=sm, num_warps=warps, num_stages=stages, N=4 * channels, K=channels, BC=64,
        CHUNKS=chunks, WIDE=1 << (chunks - 1).bit_length(), EPS=1e-6, NORM="layernorm", ACTIVATION="gelu", BM=m, BN=n,
        BK=k, GROUP=8, PDL=PDL[sm], **constants,
    )  # fmt: skip


def project(
    sm: int, type: str, channels: int, *, m: int, n: int, k: int, warps: int, prologue: str = "none", split: int = 1,
    stages: int = 3,
) -> Code:  # fmt: skip
    from convnext_deploy.kernels.product_triton import project_kernel

    eight = type in ("i8", "fp8e4nv")
    half = "*fp16" if eight else f"*{type}"
    types = {
        "hidden": f"*{type}", "weight": f"*{type}", "bias": half, "residual": half, "factor": "*fp32",
        "scales": "*fp32", "hidden_scale": "*fp32", "out": half, "ROWS": "i32", "TILES": "i32", "TILES_M": "i32",
    }  # fmt: skip
    if split > 1:
        types["out"] = "*i32" if type == "i8" else "*fp32"
    return compiled(
        project_kernel, types, sm=sm, num_warps=warps, num_stages=stages, N=channels, K=4 * channels,
        PROLOGUE=prologue, SCALED=eight, PRECISION="ieee", BM=m, BN=n, BK=k, GROUP=8, SPLIT=split, PDL=PDL[sm],
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
    chunk = launches.conv_launch(dtype, 56, channels, 7).channels
    chunks = -(-channels // chunk)
    return compiled(
        mlp_kernel, types, sm=sm, num_warps=launch.warps, num_stages=launch.stages, C=channels, HIDDEN=4 * channels,
        BC=chunk, CHUNKS=chunks, WIDE=1 << (chunks - 1).bit_length(), EPS=1e-6, NORM="layernorm", ACTIVATION="gelu",
        PRECISION=precision, BM=launch.m, BH=launch.hidden, HEAD=head, REST=rest, PDL=PDL[sm],
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


def test_hoppers_sums_of_e4m3_products_go_to_fp32_at_every_trip() -> None:
    """They have 14 bits in the matrix unit. 64 results a thread: each is added up, and meets a bias and a residual."""
    code = project(90, "fp8e4nv", 384, m=128, n=128, k=128, warps=8)
    assert code.stack_bytes == 0
    assert code.opcodes["FADD"] >= 2 * 64  # the bias is an FFMA's


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
        EPS=1e-6, NORM="layernorm", QUANTIZE=out != "fp16", PDL=PDL[sm],
    )  # fmt: skip


def norm_in_codes(sm: int) -> Code:
    from convnext_deploy.kernels.dwconv_norm_triton import norm_codes_kernel

    types = {"y": "*fp16", "moments": "*fp32", "out_scale": "*fp32", "out": "*i8", "M": "i32"}
    return compiled(
        norm_codes_kernel, types, sm=sm, num_warps=4, C=384, CHUNK=64, CHUNKS=6, WIDE=8, BM=32, BC=64, EPS=1e-6,
        NORM="layernorm", PDL=PDL[sm],
    )  # fmt: skip


def stem(sm: int) -> Code:
    from convnext_deploy.kernels.patches_triton import stem_kernel

    types = {"x": "*u8"} | dict.fromkeys(("weight", "bias", "gain", "offset", "out"), "*fp16") | {"M": "i32"}
    types |= dict.fromkeys(("BATCH_STRIDE", "ROW_STRIDE", "COLUMN_STRIDE", "CHANNEL_STRIDE"), "i32")
    return compiled(
        stem_kernel, types, sm=sm, num_warps=8, H=56, W=56, C=3, N=192, K=4, EPS=1e-6, NORM="layernorm", OFFSET=True,
        PRECISION="ieee", BM=64, BN=256, BK=64, PDL=PDL[sm],
    )  # fmt: skip


def downsample(sm: int, *, m: int = 128, n: int = 128, warps: int = 8, stages: int = 3, split: int = 1) -> Code:
    from convnext_deploy.kernels.patches_triton import downsample_kernel

    types = dict.fromkeys(("x", "weight", "bias"), "*fp16") | {"M": "i32"}
    types["out"] = "*fp32" if split > 1 else "*fp16"
    return compiled(
        downsample_kernel, types, sm=sm, num_warps=warps, num_stages=stages, H=28, W=28, C=192, N=384, EPS=1e-6,
        NORM="layernorm", PRECISION="ieee", BM=m, BN=n, BK=64 if sm >= 90 else 32, GROUP=8, SPLIT=split, PDL=PDL[sm],
    )  # fmt: skip


def pool_norm(sm: int) -> Code:
    from convnext_deploy.kernels.patches_triton import pool_norm_kernel

    types = {"x": "*fp16", "out": "*fp32", "PIXELS": "i32"}
    return compiled(
        pool_norm_kernel, types, sm=sm, num_warps=8, C=768, WIDE=1024, BP=8, EPS=1e-6, NORM="layernorm",
        PDL=PDL[sm],
    )  # fmt: skip


def add_parts(sm: int, type: str = "fp32") -> Code:
    from convnext_deploy.kernels.product_triton import add_parts_kernel

    types = {"parts": f"*{type}", "scales": "*fp32", "M": "i32"}
    types |= dict.fromkeys(("bias", "residual", "out"), "*fp16")
    return compiled(
        add_parts_kernel, types, sm=sm, num_warps=4, N=768, SPLIT=5, SCALED=type == "i32", RESIDUAL=True, BLOCK=512,
        PDL=PDL[sm],
    )  # fmt: skip


def grn_factor(sm: int) -> Code:
    from convnext_deploy.kernels.product_triton import grn_factor_kernel

    types = {"squares": "*fp32", "weight": "*fp16", "factor": "*fp32", "TILES": "i32"}
    return compiled(grn_factor_kernel, types, sm=sm, num_warps=8, C=1536, WIDE=2048, EPS=1e-6, PDL=PDL[sm])


def few_rows(sm: int, type: str) -> list[Code]:
    """Products as `launch.spread` gives them at batch 1."""
    shape: dict[str, Any] = {"m": 64, "k": 64, "warps": 4}
    return [
        *(expand(sm, type, 768, n=n, stages=stages, **shape) for n, stages in ((64, 5), (32, 6))),
        *(project(sm, type, 768, n=n, stages=6, split=split, **shape) for n, split in ((16, 1), (32, 5))),
    ]


@pytest.mark.parametrize(
    ("sm", "type"), [*((sm, type) for sm in GENERATIONS for type in ("fp16", "bf16")), (80, "i8"), (90, "i8")]
)
def test_products_of_few_rows_use_the_matrix_units_and_do_not_spill(sm: int, type: str) -> None:
    for code in few_rows(sm, type):
        assert any(opcode.startswith((*MATRIX[sm], "HGMMA")) for opcode in code.opcodes)
        assert code.stack_bytes == 0
        assert code.registers <= 168  # three programs a multiprocessor
        assert code.shared_bytes <= (99 << 10)  # all that a program has on sm_86, sm_89 and sm_120


@pytest.mark.parametrize("sm", GENERATIONS)
def test_a_split_project_after_grn_and_a_split_downsample_hardly_spill(sm: int) -> None:
    shape: Any = {"m": 64, "n": 32, "warps": 4, "stages": 6, "split": 2}
    for code in (project(sm, "fp16", 768, k=64, prologue="factor", **shape), downsample(sm, **shape)):
        assert uses_the_matrix_units(code, sm)
        assert code.stack_bytes <= (8 if sm == 80 else 0)  # of the downsample, one number, though 80 registers do


@pytest.mark.parametrize("type", ["fp32", "i32"])
@pytest.mark.parametrize("sm", GENERATIONS)
def test_adding_parts_takes_few_registers(sm: int, type: str) -> None:
    code = add_parts(sm, type)
    assert code.stack_bytes == 0
    assert code.registers <= 40
    assert code.opcodes["STG"] == 1  # four results a thread, in one store


EVERY_KERNEL: dict[str, Callable[[int], Code]] = {
    "dwconv_moments": lambda sm: conv(sm, "fp16", packed=True),
    "dwconv_norm": lambda sm: final_norm(sm, "fp16"),
    "norm_codes": norm_in_codes,
    "expand": lambda sm: expand(sm, "fp16", 384, m=128, n=128, k=64, warps=8),
    "expand, narrow": lambda sm: expand(sm, "fp16", 768, m=64, n=32, k=64, warps=4, SQUARES=True),
    "grn_factor": grn_factor,
    "project": lambda sm: project(sm, "fp16", 384, m=128, n=128, k=64, warps=8, prologue="factor"),
    "project, split": lambda sm: project(sm, "fp16", 768, m=64, n=32, k=64, warps=4, split=5, stages=6),
    "add_parts": add_parts,
    "stem": stem,
    "downsample": downsample,
    "pool_norm": pool_norm,
    "mlp": lambda sm: mlp(sm, "fp16", 96, rows=1 << 20),
}
MEMORY = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP", "CCTL")
NOT_GLOBAL = {"LDC", "LDCU", "LDS", "STS", "ATOMS"}  # constants and shared memory


@KNOWN_WAITS
@pytest.mark.parametrize("sm", [90, 100, 120])
@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_a_kernel_waits_before_it_touches_global_memory(name: str, sm: int) -> None:
    """And no branch leads past the wait, so that what stands behind it in memory comes after it in time."""
    code = EVERY_KERNEL[name](sm)
    wait = code.first("ACQBULK")
    before = {opcode for opcode in code.order[:wait] if opcode.startswith(MEMORY)}
    assert before <= NOT_GLOBAL
    assert wait < code.first("PREEXIT") < len(code.order)  # and then its dependents may be launched
    assert wait < code.first("BRX", "JMP", "CALL", "RET", "EXIT")
    assert all(end <= wait for start, end in code.jumps if start < wait)


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_before_sm_90_nothing_waits(name: str) -> None:
    code = EVERY_KERNEL[name](80)
    assert not {"ACQBULK", "PREEXIT"} & set(code.opcodes)


def test_dwconv_with_the_whole_norm_does_not_spill() -> None:
    assert final_norm(90, "fp16").stack_bytes == 0
    assert final_norm(90, "i8").stack_bytes == 0
    assert norm_in_codes(90).stack_bytes == 0


@pytest.mark.parametrize("sm", GENERATIONS)
def test_the_other_kernels_do_not_spill(sm: int) -> None:
    assert pool_norm(sm).stack_bytes == 0
    for code in (stem(sm), downsample(sm)):
        assert uses_the_matrix_units(code, sm)
        assert code.stack_bytes == 0


def plan_of_blocks(model: Any) -> Plan:
    """Every block in int8, with scales of no meaning."""
    operations = {
        f"{name}.{kind}": OperationPlan(type="s8s8", scale=0.05, shift=0.5 if kind == "project" else 0.0)
        for name, _ in model.named_modules()
        if name.startswith("stages.") and name.count(".") == 2
        for kind in ("expand", "project")
    }
    return Plan(
        target="aotinductor", architecture=model.spec.architecture, weights_sha256="0" * 64, input="float32",
        image_size=model.spec.image_size, rest="fp16", operations=operations, calibration=None,
    )  # fmt: skip


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("generation", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_inductor_sees_every_kernel_and_what_each_writes(
    name: str, generation: tuple[int, int], eight_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with tensors of a GPU that is not there. A kernel whose writes were not understood would have its inputs
    copied first, and so would one that is handed the same memory twice."""
    import torch
    import triton
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    from convnext_deploy.kernels import launch
    from convnext_deploy.kernels.use import MLP, alternatives, parts, use_kernels
    from convnext_deploy.models import passes
    from convnext_deploy.models.convnext import ConvNeXt
    from convnext_deploy.models.registry import spec
    from convnext_deploy.quantization.apply import apply
    from convnext_deploy.quantization.plan import LoadedPlan

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(launch, "capability", lambda x: generation)
    monkeypatch.setattr(launch, "SAVED_TRIPS", 1)  # so that a product as small as these is split
    model = ConvNeXt(spec(name, depths=(1, 1, 1, 1), task="features", image_size=(64, 64))).eval().requires_grad_(False)
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    if eight_bits:
        apply(model, LoadedPlan(plan_of_blocks(model), {}, eight_bits=formats.eight_bits_of("eager")))
    passes.cast_parameters(model, "fp16")
    others = alternatives(model)
    use_kernels(model, [*others, *(part for part in parts(model) if part + MLP not in others)])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
        images = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.float16)
        graph: Any = aot_export_module(model.to("cuda"), [images], trace_joint=False)[0]
    written: dict[str, set[str]] = {}
    for node in graph.graph.nodes:
        assert "clone" not in str(node.target)
        if "triton_kernel_wrapper" in str(node.target):
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            options = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"]) | node.kwargs["kwargs"]
            early = generation >= launch.PDL_FROM and launch.waits_are_operations()
            assert (options["PDL"], options.get("launch_pdl", False)) == (early, early)
            assert ("launch_pdl" in node.kwargs.get("launch_kwargs", ())) == early  # what Inductor launches it with
            written.setdefault(getattr(kernel, "fn", kernel).__name__, set()).update(node.kwargs["tensors_to_clone"])
    expected = {
        "stem_kernel": {"out"}, "downsample_kernel": {"out"}, "dwconv_moments_kernel": {"y", "moments"},
        "expand_kernel": {"out"}, "project_kernel": {"out"}, "add_parts_kernel": {"out"},
    }  # fmt: skip
    if eight_bits:
        del expected["dwconv_moments_kernel"]
        expected["dwconv_norm_kernel"] = {"y", "out"}
    if "v2" in name:
        expected |= {"expand_kernel": {"out", "squares"}, "grn_factor_kernel": {"factor"}}
    elif not eight_bits:
        expected |= {"mlp_kernel": {"out"}}  # of the two narrow stages
    assert written == expected


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_a_graph_for_any_batch_is_not_tied_to_the_one_that_was_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard on the batch would be an export that refuses every other. `len` of a tensor sets one."""
    import torch
    import triton
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    from triton.backends.compiler import GPUTarget

    from convnext_deploy.kernels import launch
    from convnext_deploy.kernels.use import parts, use_kernels
    from convnext_deploy.models import passes
    from convnext_deploy.models.convnext import ConvNeXt
    from convnext_deploy.models.registry import spec

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(launch, "capability", lambda x: (9, 0))
    model = ConvNeXt(spec(name, depths=(1, 1, 1, 1), task="features", image_size=(64, 64))).eval().requires_grad_(False)
    passes.fold_norm_affine(model)
    passes.fold_layer_scale(model)
    passes.fold_grn_bias(model)
    model = model.half()
    use_kernels(model, parts(model))
    shapes = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    any_batch: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    images = mode.from_tensor(torch.empty(3, 3, 64, 64, dtype=torch.float16), symbolic_context=any_batch)
    with mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
        graph: Any = aot_export_module(model.to("cuda"), [images.to("cuda")], trace_joint=False)[0]
    assert any("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes)
    assert not shapes.guards


@KNOWN_WAITS
def test_aotinductor_launches_as_we_ask_it_to() -> None:
    """Of a launch's arguments it keeps Triton's own options, and its C++ turns this one into the driver's attribute."""
    from torch._inductor.codegen.cpp_wrapper_gpu import _launch_pdl_cpp_literal as literal
    from torch._inductor.runtime.triton_helpers import try_filter_backend_options_for_target as options
    from triton.backends.compiler import GPUTarget

    from convnext_deploy.kernels.launch import dependent

    for early, expected in ((True, "true"), (False, "false")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
            kept = options(GPUTarget("cuda", 90, 32), {**dependent(early), "N": 96}, ("PDL", "N"))
        assert literal({"backend_options": kept}) == expected


@pytest.mark.parametrize(
    ("module", "name", "compile"),
    [
        ("product_triton", "expand_kernel", lambda: expand(90, "fp16", 96, m=64, n=64, k=32, warps=4, SQUARES=True)),
        ("product_triton", "add_parts_kernel", lambda: add_parts(90)),
        ("product_triton", "grn_factor_kernel", lambda: grn_factor(90)),
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
    assert compile().instructions >= 90
