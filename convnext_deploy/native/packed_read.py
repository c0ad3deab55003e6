"""The native engine's file read back into tensors: the reverse of `packed.write`, written from `csrc/format.h`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..artifact.readback import Contents, Tensor
from .packed import ACTIVATIONS, BLOCK, HEADER, KINDS, NORMS, OPERATION, PRODUCT, RECORD_BYTES, names, padded

TYPES = (("float32", np.float32), ("bfloat16", np.uint16), ("int8", np.int8))  # by a type's number in the file


def contents(path: Path) -> Contents:
    """Every tensor of a packed file, operation after operation, without the zeros that fill it up."""
    file = np.memmap(path, np.uint8, "r")
    operations = HEADER.unpack(file[: HEADER.size].tobytes())[2]
    starts = [HEADER.size + index * RECORD_BYTES for index in range(operations)]
    records = [file[start : start + RECORD_BYTES].tobytes() for start in starts]
    kinds = [KINDS[OPERATION.unpack_from(record)[0]] for record in records]
    tensors: list[Tensor] = []
    scalars: list[float] = []
    activations: list[str] = []
    for name, kind, record in zip(names(kinds), kinds, records, strict=True):
        _, channels, kernel, norm, activation, _, eps, grn_eps, *places = OPERATION.unpack_from(record)
        dw_weight, dw_bias, norm_weight, norm_bias, grn_weight, grn_bias, mean = places
        a, b = (PRODUCT.unpack_from(record, OPERATION.size + index * PRODUCT.size) for index in range(2))
        outputs = b[2] if kind == "head" else a[2]
        width = outputs if kind.startswith("stem") else channels
        if mean:
            tensors.append(Tensor(f"{name} mean", "float32", _vector(file, mean, channels)))
        if dw_weight:
            size = padded(channels) * kernel**2
            taps = file[dw_weight : dw_weight + 4 * size].view(np.float32).reshape(-1, kernel**2, BLOCK)
            # (C / 16, k * k, 16) -> (C, k * k)
            flat = taps.transpose(0, 2, 1).reshape(-1, kernel**2)[:channels]
            tensors.append(Tensor(f"{name} depthwise", "float32", flat))
            tensors.append(Tensor(f"{name} depthwise bias", "float32", _vector(file, dw_bias, channels)))
        norms = [
            Tensor(f"{name} norm", "float32", _vector(file, place, width))
            for place in (norm_weight, norm_bias)
            if place
        ]
        kernel_taps, columns = (4, channels) if kind == "downsample" else (1, channels)
        if kind.startswith("stem"):
            columns = kernel**2 * channels
        first = [*_product(file, a, f"{name} a", kernel_taps, columns)]
        tensors += [*first, *norms] if kind.startswith("stem") else [*norms, *first]
        tensors += [
            Tensor(f"{name} grn", "float32", _vector(file, place, 4 * channels))
            for place in (grn_weight, grn_bias)
            if place
        ]
        tensors += _product(file, b, f"{name} b", 1, (a[2] or channels) if kind == "head" else 4 * channels)
        if NORMS[norm] is not None:
            scalars.append(eps)
        if grn_weight:
            scalars.append(grn_eps)
        form = ACTIVATIONS[activation]
        if form is not None:
            activations.append(form)
    return Contents(tensors=tensors, scalars=scalars, activations=activations)


def _vector(file: NDArray[np.uint8], place: int, length: int) -> NDArray[np.float32]:
    return np.asarray(file[place : place + 4 * length].view(np.float32))


def _product(file: NDArray[np.uint8], record: tuple[int, ...], name: str, taps: int, channels: int) -> Iterator[Tensor]:
    kind, inputs, outputs, zero_point, step, _, weights, bias, scale, _ = record
    if not outputs:
        return
    label, dtype = TYPES[kind]
    w = 4 // np.dtype(dtype).itemsize
    wide = padded(outputs)
    packed = file[weights : weights + wide * inputs * np.dtype(dtype).itemsize].view(dtype)
    # (N / 16, steps, 16, w) -> (N, K)
    rows = packed.reshape(wide // BLOCK, inputs // w, BLOCK, w).transpose(0, 2, 1, 3).reshape(wide, inputs)[:outputs]
    rows = rows.reshape(outputs, taps, -1)[:, :, :channels].reshape(outputs, -1)
    yield Tensor(f"{name} weight", label, rows)
    if scale:
        yield Tensor(f"{name} weight scale", "float32", _vector(file, scale, outputs))
        yield Tensor(f"{name} scale", "float32", np.array([step], np.float32))
        yield Tensor(f"{name} zero point", "uint8", np.array([zero_point], np.uint8))
    yield Tensor(f"{name} bias", "float32", _vector(file, bias, outputs))
