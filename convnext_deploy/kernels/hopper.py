"""The operations of a block in CUDA C++ for Hopper (H100, H200), where Triton falls short of the hardware.

Triton's products reach 45 to 70 % of cuBLAS's rate on an H200 (T, batch 256), because nothing overlaps the arithmetic
behind a product with the next product. Here warp groups take turns: one multiplies while another ends its tile. Both
kernels of an operation take and give the same, so the choice is made launch by launch: `takes_*` say where these are
used. torch.compile and AOTInductor trace the Triton kernels, which they can compile into their own code.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import launch
from .nvrtc import Boxes, Kernel, available, start
from .operation import recorded

SHARED_BYTES = 227 << 10  # that a program may have
NORMS = ("layernorm", "rmsnorm", "simplenorm", "none")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
HALVES = (torch.float16, torch.bfloat16)


def here(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a tensor of one of these types is on a Hopper GPU, and a kernel may be launched or recorded for it."""
    real = recorded() is not None or not is_fake(x)
    return x.is_cuda and real and x.dtype in dtypes and launch.capability(x) == launch.CUDA_CPP and available()


def wgmma(name: str, width: int, dtype: torch.dtype, registers: bool = False) -> str:
    """CUDA C++ of `name(sums, x, w, add)`: 64 rows times `width` columns, 32 bytes of K, on Hopper's matrix units.

    Args:
        registers: x is four registers of each thread, instead of a descriptor of shared memory.
    """
    count, many, codes = width // 2, 4 if registers else 1, dtype == torch.int8
    shape, kind = f"m64n{width}k{32 // dtype.itemsize}", {torch.bfloat16: "bf16", torch.int8: "s8"}.get(dtype, "f16")
    sum_type, sum_kind, letter = ("int", "s32", "r") if codes else ("float", "f32", "f")
    sums = ", ".join(f"%{index}" for index in range(count))
    sums_given = ", ".join(f'"+{letter}"(sums[{index}])' for index in range(count))
    x = "{" + ", ".join(f"%{count + index}" for index in range(4)) + "}" if registers else f"%{count}"
    x_given = ", ".join(f'"r"(x[{index}])' for index in range(4)) if registers else '"l"(x)'
    x_type = "const u32 (&x)[4]" if registers else "u64 x"
    rest = "" if codes else ", 1, 1, 0" if registers else ", 1, 1, 0, 0"  # signs, and that nothing is transposed
    return f"""__device__ __forceinline__ void {name}({sum_type} (&sums)[{count}], {x_type}, u64 w, int add) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + many + 1}, 0;\\n"
      "wgmma.mma_async.sync.aligned.{shape}.{sum_kind}.{kind}.{kind} {{{sums}}}, "
      "{x}, %{count + many}, add{rest};\\n}}" : {sums_given} : {x_given}, "l"(w), "r"(add));
}}"""


# Products -------------------------------------------------------------------------------------------------------------

ROWS, STEP_BYTES = 128, 128  # of a tile, and of K that comes at a time
CHUNK_BYTES = {"expand": 64, "project": 128}  # of a row of results that leave at a time
COPY_ROWS = 16
WIDTHS = (192, 160, 128, 64)
PROJECT_WIDTHS = (192, 128, 64)
DEEP = 512  # inputs of a product from which on its tiles are wide
GROUPS = 2  # of warps that multiply, beside one that brings what they need
THREADS = (1 + GROUPS) * 128
ALIGNMENT, BARRIERS = 1024, 256  # bytes


def tile_width(outputs: int, inputs: int, activated: bool) -> int:
    """Columns of an expand's tile. Measured on an H200, fp16, batch 256, for the widths of T and B.

    Behind an activation a narrow product is fastest with 128 (C = 256: 259 us; 192: 324), since the end of a wide tile
    takes longer than the next one's product, and a deep one with 160 or 192 (C = 1024: 217 us; 128: 229), whichever
    computes less beyond the outputs. For bare products 192 suffices.
    """
    if activated and inputs >= DEEP:
        return min((192, 160), key=lambda width: computed(outputs, width))
    return fitting(outputs, (128, 192, 64) if activated else WIDTHS)


def project_width(outputs: int) -> int:
    """The same with a residual: 128 where it divides the outputs (C = 512: 154 us; 192: 182; 64: 186)."""
    return 128 if outputs % 128 == 0 else fitting(outputs, PROJECT_WIDTHS)


def computed(outputs: int, width: int) -> int:
    return -(-outputs // width) * width


def fitting(outputs: int, widths: tuple[int, ...]) -> int:
    """The first that computes at most an eighth more, else the one that computes least."""
    good = [width for width in widths if computed(outputs, width) <= 1.13 * outputs]
    return good[0] if good else min(widths, key=lambda width: computed(outputs, width))


def product_kernel(
    width: int,
    kind: str,
    dtype: torch.dtype,
    norm: str = "none",
    activation: str = "none",
    *,
    half: torch.dtype | None = None,
) -> Kernel:
    """Args:
    width: columns of a tile, one of `WIDTHS`; of int8 not 160.
    kind: "expand" (norm, bias, activation) or "project" (bias, residual).
    dtype: of the operands; half: of bias and residual, which is dtype but for int8.
    """
    codes = dtype == torch.int8
    results = ROWS * (CHUNK_BYTES["project"] * width // 64 if kind == "project" else 2 * CHUNK_BYTES["expand"])
    of_a_group = (
        results + width // 2 * (8 if norm == "none" and not codes else 16) + (0 if norm == "none" else ROWS * 8)
    )
    fixed = ALIGNMENT + BARRIERS + GROUPS * of_a_group
    stage = (ROWS + width) * STEP_BYTES
    stages = min(6, (SHARED_BYTES - fixed) // stage)
    constants = (
        ("BN", width), ("STAGES", stages), ("PROJECT", int(kind == "project")),
        ("BF16", int((half or dtype) == torch.bfloat16)), ("INT8", int(codes)), ("NORM", NORMS.index(norm)),
        ("ACTIVATION", ACTIVATIONS.index(activation)),
    )  # fmt: skip
    insert = wgmma("multiply", width, dtype)
    return Kernel("product_sm90.cu", "product", constants, THREADS, fixed + stages * stage, insert)


def launch_product(
    kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None,
    of_columns: Tensor | None = None, moments: Tensor | None = None, out_scale: Tensor | None = None, chunk: int = 1,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """(..., K), (N, K), (N,) -> (..., N).

    Args:
        kernel: K and N are multiples of 8; for int8 of 16, except N with a residual.
        of_columns: (N,) fp32, the sums of the weight's rows for a norm, or the scales of int8.
        out_scale: (2,) fp32, with int8 and no residual: scale and shift of the results, which are int8 too.
    """
    constants, (outputs, inputs) = dict(kernel.constants), weight.shape
    flat, step = x.reshape(-1, inputs).contiguous(), STEP_BYTES // x.element_size()
    row_bytes = CHUNK_BYTES["project" if constants["PROJECT"] else "expand"]
    out = torch.empty((len(flat), outputs), dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    start(
        kernel, x, -(-len(flat) // ROWS) * -(-outputs // constants["BN"]), Boxes(flat, (ROWS, step)),
        Boxes(weight.contiguous(), (constants["BN"], step)),
        Boxes(out, (COPY_ROWS, row_bytes // out.element_size()), row_bytes),
        Boxes(out if residual is None else residual.reshape(-1, outputs).contiguous(), (ROWS, 64)), bias, of_columns,
        moments, out_scale, len(flat), outputs, inputs, chunk, 1 if moments is None else moments.shape[-2], eps,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], outputs)


def takes_product(x: Tensor, rows: int, weight: Tensor) -> bool:
    """Whether the product of so many rows with a weight (N, ...) runs here: where there is work for the whole GPU."""
    outputs, inputs = len(weight), weight[0].numel()
    return (
        here(x, *HALVES) and inputs % 8 == 0 and outputs % 8 == 0
        and -(-rows // ROWS) * -(-outputs // WIDTHS[0]) >= launch.processors(x)
    )  # fmt: skip


def expand(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor,
    row_sums: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    """`expand.expand`."""
    outputs, inputs = weight.shape
    width = tile_width(outputs, inputs, activation != "none")
    kernel = product_kernel(width, "expand", x.dtype, norm, activation)
    return launch_product(kernel, x, weight, bias, of_columns=row_sums, moments=moments, chunk=chunk, eps=eps)


def project(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """`project.project` without GRN's factor."""
    return launch_product(
        product_kernel(project_width(len(weight)), "project", hidden.dtype), hidden, weight, bias, residual=residual
    )


def downsample(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, H, W, 4 * C), of normalized pixels, (O, C, 2, 2), (O,) -> (N, H, W, O)."""
    kernel = product_kernel(tile_width(len(weight), weight[0].numel(), False), "expand", patches.dtype)
    return launch_product(kernel, patches, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)


CODE_WIDTHS = (128, 192, 64)  # of tiles of int8: what is reasoned, none has been timed


def takes_codes(x: Tensor, rows: int, weight: Tensor, half: torch.dtype) -> bool:
    """Whether the product of int8 codes runs here, as `takes_product` says."""
    outputs, inputs = weight.shape
    return (
        launch.INT8_IN_CUDA_CPP and here(x, torch.int8) and half in HALVES and inputs % 16 == 0 and outputs % 16 == 0
        and -(-rows // ROWS) * -(-outputs // WIDTHS[0]) >= launch.processors(x)
    )  # fmt: skip


def expand_codes(x: Tensor, weight: Tensor, bias: Tensor, activation: str, scales: Tensor, out_scale: Tensor) -> Tensor:
    """`quantized.expand_quantized` of int8."""
    width = fitting(len(weight), CODE_WIDTHS)
    kernel = product_kernel(width, "expand", x.dtype, activation=activation, half=bias.dtype)
    return launch_product(kernel, x, weight, bias, of_columns=scales, out_scale=out_scale)


def project_codes(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scales: Tensor) -> Tensor:
    """`quantized.project_quantized` of int8 without GRN's factor."""
    kernel = product_kernel(project_width(len(weight)), "project", hidden.dtype, half=residual.dtype)
    return launch_product(kernel, hidden, weight, bias, residual=residual, of_columns=scales)


# The depthwise convolution --------------------------------------------------------------------------------------------


def takes_dwconv(x: Tensor, weight: Tensor) -> bool:
    """Whether `dwconv_moments` of x (N, H, W, C) and a weight (C, 1, K, K) runs in `hopper_dwconv`."""
    images, height, width, channels = x.shape
    return (
        here(x, *HALVES) and weight.shape[-1] == 7 and channels % 8 == 0
        and images * -(-height // 14) * -(-width // 28) * -(-channels // 64) >= launch.processors(x)
    )  # fmt: skip


# Both linears of a narrow block ---------------------------------------------------------------------------------------

MLP_ROWS, MLP_GROUPS = 64, 3
MLP_BLOCK = {64: 64, 96: 96}  # hidden columns at a time, by channels: both weights have room in shared memory


def mlp_kernel(channels: int, hidden: int, dtype: torch.dtype, norm: str, activation: str) -> Kernel:
    block = MLP_BLOCK[channels]
    constants = (
        ("C", channels), ("HIDDEN", hidden), ("BLOCK", block), ("BF16", int(dtype == torch.bfloat16)),
        ("NORM", NORMS.index(norm)), ("ACTIVATION", ACTIVATIONS.index(activation)),
    )  # fmt: skip
    insert = wgmma("widen", block, dtype) + "\n" + wgmma("narrow", channels, dtype, registers=True)
    size = ALIGNMENT + 2 * 2 * hidden * channels + 2 * MLP_GROUPS * MLP_ROWS * channels * 2
    return Kernel("mlp_sm90.cu", "mlp", constants, MLP_GROUPS * 128, size, insert)


def takes_mlp(x: Tensor, weight: Tensor) -> bool:
    """Whether `mlp` of x (..., C) and a first weight (O, C) runs here."""
    hidden, channels = weight.shape
    return (
        here(x, *HALVES) and channels in MLP_BLOCK and hidden == 4 * channels
        and x.numel() // channels >= MLP_ROWS * MLP_GROUPS * launch.processors(x)
    )  # fmt: skip


def mlp(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, chunk: int,
    back_weight: Tensor, back_bias: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """`mlp.mlp`."""
    hidden, channels = weight.shape
    kernel, box = mlp_kernel(channels, hidden, x.dtype, norm, activation), (MLP_ROWS, 32)
    flat, old = (tensor.reshape(-1, channels).contiguous() for tensor in (x, residual))
    out = torch.empty_like(flat)
    piece = hidden if hidden <= 256 else hidden // 2  # what one copy brings
    start(
        kernel, x, -(-len(flat) // (MLP_ROWS * MLP_GROUPS)), Boxes(flat, box, 64),
        Boxes(weight.contiguous(), (piece, 32), 64), Boxes(back_weight.contiguous(), (channels, 64)),
        Boxes(old, box, 64), Boxes(out, box, 64), bias, back_bias, moments, len(flat), chunk, moments.shape[-2], eps,
    )  # fmt: skip
    return out.reshape(x.shape)
