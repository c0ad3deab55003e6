"""Kernels in CUDA C++ for one generation, Hopper: compiled by NVRTC on first use, launched through the driver.

PyTorch brings both along (`cuda-bindings`, NVRTC), so that neither a compiler nor a build step is needed. They take
what the Triton kernels of the same operations take; where they are faster, `expand` and `project` run in them.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..errors import BuildError
from .operation import Launch, recorded

FOLDER = Path(__file__).parent
ARCHITECTURE = "sm_90a"
GENERATION = (9, 0)
SHARED_BYTES = 227 << 10  # that a program may have
STEP = 64  # elements that the copy engine brings of a row
NORMS = ("layernorm", "rmsnorm", "simplenorm", "none")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Kernel:
    """A source file, its entry, and the constants in front of it."""

    file: str
    entry: str
    constants: tuple[tuple[str, int | str], ...]
    threads: int
    shared_bytes: int
    insert: str = ""  # what stands for the line WGMMA

    def source(self) -> str:
        lines = [f"#define {name} {value}" for name, value in self.constants]
        return "\n".join((*lines, (FOLDER / "sm90.cuh").read_text(), (FOLDER / self.file).read_text().replace("\nWGMMA\n", f"\n{self.insert}\n")))


def wgmma(name: str, width: int, dtype: torch.dtype, registers: bool = False) -> str:
    """`name(sums, x, w, add)`: 64 rows times `width` columns, 16 elements of K, onto what a thread has of the sums.

    Args:
        registers: x is four registers of the thread instead of a descriptor.
    """
    count, kind = width // 2, "bf16" if dtype == torch.bfloat16 else "f16"
    named = ", ".join(f"%{index}" for index in range(count))
    given = ", ".join(f'"+f"(sums[{index}])' for index in range(count))
    many = 4 if registers else 1
    x = ", ".join(f"%{count + index}" for index in range(many))
    x_given = ", ".join(f'"r"(x[{index}])' for index in range(4)) if registers else '"l"(x)'
    return (
        f"__device__ __forceinline__ void {name}(float (&sums)[{count}], {'const u32 (&x)[4]' if registers else 'u64 x'},"
        f" u64 w, int add) {{\n"
        f'  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + many + 1}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{named}}}, "\n'
        f'      "{f"{{{x}}}" if registers else x}, %{count + many}, add, 1, 1, {"" if registers else "0, "}0;\\n}}"'
        f' : {given} : {x_given}, "l"(w), "r"(add));\n}}'
    )


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
    """Machine code; no GPU is needed for it.

    Raises:
        BuildError: with what the compiler says.
    """
    from cuda.bindings import nvrtc

    program = checked(
        nvrtc.nvrtcCreateProgram(kernel.source().encode(), kernel.file.encode(), 0, [], []), "NVRTC's start"
    )
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC's log")
        checked(nvrtc.nvrtcGetProgramLog(program, log), "NVRTC's log")
        raise BuildError(f"NVRTC does not compile {kernel.file}: {log.decode().strip(chr(0)).strip()[:400]}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC's code")
    checked(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC's code")
    return code


@functools.cache
def _function(kernel: Kernel, device: int) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the device's context is there
        module = checked(driver.cuModuleLoadData(cubin(kernel)), "loading a kernel")
        function = checked(driver.cuModuleGetFunction(module, kernel.entry.encode()), "finding a kernel")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes), "asking for shared memory")
    return function


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
        from cuda.bindings import driver as cu

        tensor, kinds = self.tensor, {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
        sizes, strides = tensor.shape[::-1], tensor.stride()[::-1]
        swizzle = f"{self.swizzle}B" if self.swizzle else "NONE"
        answer = cu.cuTensorMapEncodeTiled(
            getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kinds[tensor.dtype]}"), tensor.dim(),
            tensor.data_ptr(), [cu.cuuint64_t(size) for size in sizes],
            [cu.cuuint64_t(stride * tensor.element_size()) for stride in strides[1:]],
            [cu.cuuint32_t(size) for size in reversed(self.size)], [cu.cuuint32_t(1)] * tensor.dim(),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(cu.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        return checked(answer, "describing a tensor to the copy engine")


Argument = Boxes | Tensor | int | float | None


def start(kernel: Kernel, device: torch.device, tiles: int, *arguments: Argument) -> None:
    """Launch programs that share `tiles` tiles, one on each multiprocessor, on the current stream."""
    launches = recorded()
    if launches is not None:
        launches.append(Launch(kernel, (), {}))
        return
    from cuda.bindings import driver

    values, kinds = [], []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            values.append(0 if argument is None else argument.data_ptr())
            kinds.append(ctypes.c_void_p)
        elif isinstance(argument, Boxes):
            values.append(argument.described())
            kinds.append(None)
        else:
            values.append(argument)
            kinds.append(ctypes.c_int if isinstance(argument, int) else ctypes.c_float)
    programs = min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    stream = torch.cuda.current_stream(device).cuda_stream
    answer = driver.cuLaunchKernel(
        _function(kernel, device.index or 0), programs, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream,
        (tuple(values), tuple(kinds)), 0,
    )  # fmt: skip
    checked(answer, "launching a kernel")


USED = {"product", "mlp", "dwconv"}  # what experiments turn off
EXTRA: list[tuple[str, int]] = []


def _here(x: Tensor) -> bool:
    return (
        x.is_cuda and (recorded() is not None or not is_fake(x)) and x.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device) == GENERATION
    )  # fmt: skip


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


# Products -------------------------------------------------------------------------------------------------------------

ROWS = 128  # of a tile


def product_kernel(
    width: int, kind: str, dtype: torch.dtype, norm: str = "none", activation: str = "none", *extra: tuple[str, int]
) -> Kernel:
    """Args:
    width: columns of a tile, a multiple of 64 up to 192.
    kind: "expand" (norm, bias, activation) or "project" (bias, residual).
    """
    fixed = 1024 + 128 + (0 if norm == "none" else 2 * ROWS * 8) + 2 * ROWS * width * 2
    stage = (ROWS + width) * STEP * 2
    stages = min(6, (SHARED_BYTES - fixed) // stage)
    constants = (
        ("BN", width), ("STAGES", stages), ("PROJECT", int(kind == "project")), ("BF16", int(dtype == torch.bfloat16)),
        ("NORM", NORMS.index(norm)), ("ACTIVATION", ACTIVATIONS.index(activation)), *extra,
    )  # fmt: skip
    return Kernel("product_sm90.cu", "product", constants, 384, fixed + stages * stage, wgmma("multiply", width, dtype))


def product(
    kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None,
    row_sums: Tensor | None = None, moments: Tensor | None = None, chunk: int = 1, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """(M, K), (N, K), (N,) -> (M, N); K and N multiples of 8, all contiguous and on a Hopper GPU."""
    (rows, inputs), outputs, width = x.shape, len(weight), int(dict(kernel.constants)["BN"])
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    tile = (ROWS, STEP)
    start(
        kernel, x.device, -(-rows // ROWS) * -(-outputs // width), Boxes(x, tile), Boxes(weight, (width, STEP)),
        Boxes(out, tile), Boxes(out if residual is None else residual, tile), bias, row_sums, moments, rows, outputs,
        inputs, chunk, 1 if moments is None else moments.shape[-2], eps,
    )  # fmt: skip
    return out


def takes_product(x: Tensor, rows: int, outputs: int, inputs: int) -> bool:
    """Whether a product of so many rows runs here: where its tiles give every multiprocessor work."""
    return (
        "product" in USED and _here(x) and inputs % 8 == 0 and outputs % 8 == 0
        and -(-rows // ROWS) * -(-outputs // tile_width(outputs)) >= _processors(x)
    )  # fmt: skip


def tile_width(outputs: int) -> int:
    """The widest tile of which no more than an eighth is beyond the last column, or else the one that wastes least."""

    def computed(width: int) -> int:
        return -(-outputs // width) * width

    return min((192, 128, 64), key=lambda width: (computed(width) if computed(width) > 1.13 * outputs else 0, -width))


def expand(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor,
    row_sums: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    kernel = product_kernel(tile_width(len(weight)), "expand", x.dtype, norm, activation, *EXTRA)
    out = product(
        kernel, x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), bias, row_sums=row_sums, moments=moments,
        chunk=chunk, eps=eps,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], len(weight))


def project(hidden: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    kernel = product_kernel(tile_width(len(weight)), "project", hidden.dtype)
    rows, channels = hidden.reshape(-1, hidden.shape[-1]).contiguous(), len(weight)
    out = product(kernel, rows, weight.contiguous(), bias, residual=residual.reshape(-1, channels).contiguous())
    return out.reshape(residual.shape)


def downsample(patches: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    kernel = product_kernel(tile_width(len(weight)), "expand", x.dtype)
    out = product(kernel, patches, weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous(), bias)
    return out.reshape(images, height // 2, width // 2, len(weight))


# The depthwise convolution --------------------------------------------------------------------------------------------


def dwconv_kernel(height: int, width: int, channels: int, chunk: int, chain: int = 1) -> Kernel:
    """For maps of this size; `chunk` channels, 64 or 32, have moments of their own."""
    columns = 4 if width > 14 else 2
    most = 448 // chunk  # groups across that 14 warps have in two strips
    groups = -(-width // columns)
    across = -(-groups // -(-groups // most))
    strips = 2 if chunk == 32 or height > 7 else 1
    images = max(1, min(4, 15 * 64 // chunk // (across * strips))) if height <= 7 else 1
    threads = across * strips * images * chunk // 2 + 32
    wide = across * columns + 6
    wide += chunk == 32 and wide % 2 == 0
    constants = (
        ("CHUNK", chunk), ("COLUMNS", columns), ("ACROSS", across), ("STRIPS", strips), ("IMAGES", images),
        ("CHAIN", chain), ("H", height), ("W", width), ("C", channels),
    )  # fmt: skip
    return Kernel(
        "dwconv_sm90.cu", "dwconv_moments", constants, threads, 128 + 2 * images * (strips * 7 + 6) * wide * chunk * 2
    )


def dwconv_moments(kernel: Kernel, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, W, C), (49, C), (C,) -> (N, H, W, C), and moments (N, H, W, chunks, 2); float16, contiguous."""
    images, height, width, channels = x.shape
    c = dict(kernel.constants)
    chunk, across, rows, many = (
        int(c["CHUNK"]), int(c["ACROSS"]) * int(c["COLUMNS"]), int(c["STRIPS"]) * 7, int(c["IMAGES"])
    )  # fmt: skip
    chunks = -(-channels // chunk)
    y = torch.empty_like(x)
    moments = torch.empty((images, height, width, chunks, 2), dtype=torch.float32, device=x.device)
    wide = across + 6
    wide += chunk == 32 and wide % 2 == 0
    tiles = chunks * -(-images // many) * -(-height // rows) * -(-width // across)
    start(kernel, x.device, tiles, Boxes(x, (many, rows + 6, wide, chunk), 0), taps, bias, y, moments, images)
    return y, moments


def takes_dwconv(x: Tensor, weight: Tensor, chunk: int) -> bool:
    images, height, width, channels = x.shape
    return (
        "dwconv" in USED and _here(x) and x.dtype == torch.float16 and weight.shape[-1] == 7 and channels % 8 == 0
        and images * -(-height // 14) * -(-width // 28) * -(-channels // chunk) >= _processors(x)
    )  # fmt: skip


def dwconv(x: Tensor, taps: Tensor, bias: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    return dwconv_moments(dwconv_kernel(*x.shape[1:], chunk), x.contiguous(), taps, bias)


# Both linears of a narrow block ---------------------------------------------------------------------------------------

MLP_ROWS, MLP_GROUPS = 64, 3


def mlp_kernel(
    channels: int, hidden: int, dtype: torch.dtype, norm: str, activation: str, block: int = 96, *extra: tuple[str, int]
) -> Kernel:
    """For channels that are a multiple of 32, as many as leave room for both weights in shared memory."""
    constants = (
        ("C", channels), ("HIDDEN", hidden), ("BLOCK", block), ("BF16", int(dtype == torch.bfloat16)),
        ("NORM", NORMS.index(norm)), ("ACTIVATION", ACTIVATIONS.index(activation)), *extra,
    )  # fmt: skip
    insert = wgmma("widen", block, dtype) + "\n" + wgmma("narrow", channels, dtype, registers=True)
    size = 1024 + 2 * 2 * hidden * channels + 2 * MLP_GROUPS * MLP_ROWS * channels * 2
    return Kernel("mlp_sm90.cu", "mlp", constants, MLP_GROUPS * 128, size, insert)


def mlp(
    kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor, eps: float, moments: Tensor, chunk: int,
    back_weight: Tensor, back_bias: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """(M, C), (O, C), (O,), (M, chunks, 2), (C, O), (C,), (M, C) -> (M, C); contiguous, on a Hopper GPU."""
    (rows, channels), hidden = x.shape, len(weight)
    out = torch.empty_like(x)
    box, piece = (MLP_ROWS, 32), hidden if hidden <= 256 else hidden // 2
    start(
        kernel, x.device, -(-rows // (MLP_ROWS * MLP_GROUPS)), Boxes(x, box, 64), Boxes(weight, (piece, 32), 64),
        Boxes(back_weight, (channels, 64)), Boxes(residual, box, 64), Boxes(out, box, 64), bias, back_bias, moments,
        rows, chunk, moments.shape[-2], eps,
    )  # fmt: skip
    return out


def takes_mlp(x: Tensor, weight: Tensor) -> bool:
    hidden, channels = weight.shape
    return (
        "mlp" in USED and _here(x) and channels in (64, 96) and hidden == 4 * channels
        and x.numel() // channels >= MLP_ROWS * MLP_GROUPS * _processors(x)
    )  # fmt: skip


def mlp_of(
    x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float, activation: str, moments: Tensor, chunk: int,
    back_weight: Tensor, back_bias: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    channels = x.shape[-1]
    kernel = mlp_kernel(channels, len(weight), x.dtype, norm, activation, 96 if channels == 96 else 64, *EXTRA)
    out = mlp(
        kernel, x.reshape(-1, channels).contiguous(), weight.contiguous(), bias, eps, moments, chunk,
        back_weight.contiguous(), back_bias, residual.reshape(-1, channels).contiguous(),
    )  # fmt: skip
    return out.reshape(x.shape)
