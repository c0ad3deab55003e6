"""The native engine's inner loops by themselves: the structs of `csrc/kernels.h`, filled from numpy arrays."""

import ctypes
from ctypes import c_bool, c_float, c_int32, c_size_t, c_uint32, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnext_deploy.native import library, packed

Array = NDArray[Any]
TYPES: tuple[packed.ProductType, ...] = ("fp32", "bf16", "int8")


class Epilogue(ctypes.Structure):
    _fields_ = (
        ("kind", c_uint32), ("type", c_uint32), ("activation", c_uint32), ("exact", c_bool), ("out", c_void_p),
        ("stride", c_size_t), ("pixels", c_void_p), ("residual", c_void_p), ("inverse_step", c_float),
        ("step", c_float), ("shift", c_float), ("zero_point", c_int32),
    )  # fmt: skip


class Gemm(ctypes.Structure):
    _fields_ = (
        ("type", c_uint32), ("rows", c_uint32), ("steps", c_uint32), ("first", c_uint32), ("last", c_uint32),
        ("a", c_void_p), ("a_stride", c_size_t), ("weights", c_void_p), ("bias", c_void_p), ("scale", c_void_p),
        ("offset", c_void_p), ("order", c_void_p), ("next", c_void_p), ("epilogue", Epilogue),
    )  # fmt: skip


class Depthwise(ctypes.Structure):
    _fields_ = (
        ("in_", c_void_p), ("plane", c_size_t), ("blocks", c_uint32), ("height", c_uint32), ("width", c_uint32),
        ("pitch", c_uint32), ("kernel", c_uint32), ("weight", c_void_p), ("bias", c_void_p), ("first", c_size_t),
        ("last", c_size_t), ("out", c_void_p), ("out_stride", c_size_t),
    )  # fmt: skip


class Normalize(ctypes.Structure):
    _fields_ = (
        ("norm", c_uint32), ("channels", c_uint32), ("rows", c_uint32), ("type", c_uint32), ("eps", c_float),
        ("weight", c_void_p), ("bias", c_void_p), ("in_", c_void_p), ("in_stride", c_size_t), ("out", c_void_p),
        ("out_stride", c_size_t), ("inverse_step", c_float), ("shift", c_float), ("zero_point", c_int32),
    )  # fmt: skip


def at(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def call(isa: str, kernel: str, arguments: ctypes.Structure, columns: int = 0) -> None:
    function = library.load(isa).cnxt_test_kernel
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, c_void_p, c_uint32]
    assert function(isa.encode(), kernel.encode(), ctypes.byref(arguments), columns) == 0


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


DTYPES = {"fp32": np.float32, "bf16": np.uint16, "int8": np.uint8}


def gemm(
    isa: str, type: packed.ProductType, a: Array, w: Array, bias: Array, *, scale: Array | None = None,
    offset: Array | None = None, out: packed.ProductType = "fp32", activation: str | None = None, exact: bool = True,
    step: float = 1.0, shift: float = 0.0, zero_point: int = 0,
) -> Array:  # fmt: skip
    """`a` (rows, K) and `w` (N, K) as they are multiplied: floats, bf16 bits, or codes. (rows, N) in `out`'s type."""
    rows, n = len(a), len(w)
    result = np.zeros((rows, n), DTYPES[out])
    weights = np.ascontiguousarray(packed.packed(w))
    epilogue = Epilogue(
        0, packed.TYPES.index(out), packed.ACTIVATIONS.index(activation), exact, at(result), result.strides[0], None,
        None, np.float32(1) / np.float32(step), step, shift, zero_point,
    )  # fmt: skip
    arguments = Gemm(
        packed.TYPES.index(type), rows, a.shape[1] * a.itemsize // 4, 0, n // 16, at(a), a.strides[0], at(weights),
        at(bias), at(scale), at(offset), None, None, epilogue,
    )  # fmt: skip
    call(isa, "gemm", arguments)
    return result


def normalize(
    isa: str, norm: str | None, x: Array, *, eps: float = 1e-6, weight: Array | None = None, bias: Array | None = None,
    out: packed.ProductType = "fp32", step: float = 1.0, shift: float = 0.0, zero_point: int = 0,
) -> Array:  # fmt: skip
    """Rows (rows, C) in float32, C any number; `None` only scales and converts. (rows, padded(C)) in `out`'s type."""
    rows, channels = x.shape
    wide = packed.padded(channels)

    def filled(v: Array | None) -> Array | None:
        return None if v is None else np.pad(v, (0, wide - channels)).astype(np.float32)

    source = np.pad(x, ((0, 0), (0, wide - channels))).astype(np.float32)
    weight, bias, result = filled(weight), filled(bias), np.zeros((rows, wide), DTYPES[out])
    arguments = Normalize(
        packed.NORMS.index(norm), channels, rows, packed.TYPES.index(out), eps, at(weight), at(bias), at(source), wide,
        at(result), result.strides[0], np.float32(1) / np.float32(step), shift, zero_point,
    )  # fmt: skip
    call(isa, "normalize" if norm else "scale_rows", arguments, wide)
    return result


def depthwise(isa: str, x: Array, weight: Array, bias: Array, first: int, last: int) -> Array:
    """`x` (N, H, W, C), `weight` (C, k, k): rows [first, last) of the result (N * H * W, C), in float32."""
    images, height, width, channels = x.shape
    kernel, wide = weight.shape[-1], packed.padded(channels)
    margin = kernel // 2
    plane = margin + images * height * (width + margin)
    blocks = wide // 16
    padded = np.zeros((images * height, width + margin, wide), np.float32)
    padded[:, :width, :channels] = x.reshape(images * height, width, channels)
    source = np.zeros((blocks, plane, 16), np.float32)
    source[:, margin:] = padded.reshape(-1, blocks, 16).transpose(1, 0, 2)
    taps = np.zeros((wide, kernel * kernel), np.float32)
    taps[:channels] = weight.reshape(channels, -1)
    taps = np.ascontiguousarray(taps.reshape(blocks, 16, -1).transpose(0, 2, 1))
    shift = np.pad(bias, (0, wide - channels)).astype(np.float32)
    result = np.zeros((last - first, wide), np.float32)
    arguments = Depthwise(
        source.ctypes.data + margin * 64, plane, blocks, height, width, width + margin, kernel, at(taps), at(shift),
        first, last, at(result), wide,
    )  # fmt: skip
    call(isa, "depthwise", arguments)
    return result[:, :channels]


def operands(type: packed.ProductType, rows: int, k: int, n: int, seed: int) -> dict[str, Any]:
    """Arguments of `native.gemm`, and the float64 result as `expected`."""
    random = np.random.default_rng(seed)
    bias = random.normal(size=n).astype(np.float32)
    if type == "int8":
        a = random.integers(0, 256, (rows, k), np.uint8)
        w = random.integers(-127, 128, (n, k), np.int8)
        zero_point = int(random.integers(0, 256))
        scale = random.uniform(0.5, 2, n).astype(np.float32) / np.float32(40 * np.sqrt(k) * 127)
        offset = (-zero_point * w.astype(np.int64).sum(1)).astype(np.int32)
        expected = (a.astype(np.float64) - zero_point) @ w.T.astype(np.float64) * scale + bias
        return {"a": a, "w": w, "bias": bias, "scale": scale, "offset": offset, "expected": expected}
    a, w = random.normal(size=(rows, k)).astype(np.float32), random.normal(size=(n, k)).astype(np.float32)
    w /= np.float32(np.sqrt(k))
    if type == "bf16":
        a, w = packed.bf16_bits(a), packed.bf16_bits(w)
        expected = bf16_values(a).astype(np.float64) @ bf16_values(w).T.astype(np.float64) + bias
    else:
        expected = a.astype(np.float64) @ w.T.astype(np.float64) + bias
    return {"a": a, "w": w, "bias": bias, "expected": expected}


def check_product(isa: str, type: packed.ProductType, rows: int, k: int, n: int, seed: int = 0) -> None:
    arguments = operands(type, rows, k, n, seed)
    expected = arguments.pop("expected")
    found = gemm(isa, type, **arguments)
    # One sum of k rounded float32 products; int8 sums are exact, then rounded once beside the bias.
    tolerance = (2e-6 + 3e-7 * np.sqrt(k)) * np.maximum(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
