"""The native engine's file: a network's description as arrays, written as records and packed tensors.

The layout, and what each field means, is in `csrc/format.h`; the reader in `csrc/model.cpp` checks all of it.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import writing
from ..records.base import InputKind
from ..records.manifest import Activation, HeadActivation, Norm

Floats = NDArray[np.float32]
ProductType = Literal["fp32", "bf16", "int8"]

TYPES: tuple[ProductType, ...] = ("fp32", "bf16", "int8")  # a type's number in the file is its place here
KINDS = ("stem_patch", "stem_conv", "block", "downsample", "features", "head")
NORMS = (None, "layernorm", "rmsnorm", "simplenorm")
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu", "tanh")
INPUTS = ("float32", "uint8")
MAGIC, VERSION, ALIGNMENT, BLOCK = b"CNXTPACK", 1, 64, 16
HEADER = struct.Struct("<8sIIQII32x")
PRODUCT = struct.Struct("<IIIiffQQQQ")
OPERATION = struct.Struct("<IIIIIIffQQQQQQQ")
RECORD_BYTES = OPERATION.size + 2 * PRODUCT.size
MOST_OPERATIONS = 4096


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product. `weight` is (out, in); a convolution's rows are in the order (kernel row, kernel column, in).

    int8: `weight` contains codes, y = scale * weight_scale * (W (q - zero_point)) + bias with
    q = round((x - shift) / scale) + zero_point, saturated to 0..255. Otherwise the weight is float32, rounded here.
    """

    weight: NDArray[Any]
    bias: Floats  # (out,)
    type: ProductType = "fp32"
    weight_scale: Floats | None = None  # (out,)
    scale: float = 1.0
    zero_point: int = 0
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ChannelNorm:
    kind: Norm
    eps: float
    weight: Floats | None = None  # (C,); None: folded into what follows
    bias: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Stem:
    """One 4x4 convolution of stride 4, or two 3x3 of stride 2 with a padding of 1 and `activation` between them."""

    convs: tuple[Product, ...]
    norm: ChannelNorm
    activation: Activation | None = None
    input_mean: Floats | None = None  # (in_chans,), subtracted before the padding; two convolutions only


@dataclass(frozen=True, kw_only=True)
class Block:
    dw_weight: Floats  # (C, k, k)
    dw_bias: Floats  # (C,)
    norm: ChannelNorm
    expand: Product
    activation: Activation
    project: Product  # with the layer scale folded in
    grn_weight: Floats | None = None  # (4C,)
    grn_bias: Floats | None = None
    grn_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Downsample:
    norm: ChannelNorm
    conv: Product  # (C', 2 * 2 * C)


@dataclass(frozen=True, kw_only=True)
class Features:
    """A stage's map as an output, through a norm where there is one."""

    channels: int
    norm: ChannelNorm | None = None


@dataclass(frozen=True, kw_only=True)
class Head:
    norm: ChannelNorm
    norm_first: bool  # normalize, then pool
    hidden: Product | None = None  # followed by the activation
    activation: HeadActivation = "gelu"
    classifier: Product | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A ConvNeXt with everything folded that can be. Its outputs are the head's vector, or the maps of some stages."""

    input: InputKind
    in_chans: int
    stem: Stem
    stages: tuple[tuple[Block, ...], ...]  # four; fewer where the last map is that of an earlier one
    downsamples: tuple[Downsample, ...]  # one fewer
    head: Head | None
    features: tuple[Features | None, ...] = ()  # of each stage; None: its map is no output


def names(kinds: Iterable[str]) -> tuple[str, ...]:
    """The names of operations of these kinds, in order: `stem`, `stages.2.0`, `downsamples.1`, `features.3`, `head`."""
    names_so_far, stage, block, conv = [], 0, 0, 0
    for kind in kinds:
        if kind == "block":
            names_so_far.append(f"stages.{stage}.{block}")
            block += 1
        elif kind == "downsample":
            names_so_far.append(f"downsamples.{stage}")
            stage, block = stage + 1, 0
        elif kind == "stem_conv":
            names_so_far.append(f"stem.{conv}")
            conv += 1
        else:
            names_so_far.append({"stem_patch": "stem", "features": f"features.{stage}"}.get(kind, kind))
    return tuple(names_so_far)


def kinds_in(path_or_bytes: Path | bytes) -> tuple[str, ...]:
    """The kind of each operation of a packed file that the engine has opened: nothing is checked here."""
    if isinstance(path_or_bytes, bytes):
        content = path_or_bytes[: HEADER.size + MOST_OPERATIONS * RECORD_BYTES]
    else:
        with path_or_bytes.open("rb") as file:
            content = file.read(HEADER.size + MOST_OPERATIONS * RECORD_BYTES)
    operations = HEADER.unpack_from(content)[2]
    return tuple(
        KINDS[OPERATION.unpack_from(content, HEADER.size + index * RECORD_BYTES)[0]] for index in range(operations)
    )


def write(network: Network, path: Path) -> None:
    """Write the packed file, atomically."""
    operations = list(_operations(network))
    with writing(path) as file:
        writer = _Writer(file, network.in_chans, HEADER.size + RECORD_BYTES * len(operations))
        records = b"".join(writer.operation(part) for part in operations)
        end = writer.finish()
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, len(operations), end, INPUTS.index(network.input), network.in_chans))
        file.write(records)


def _operations(network: Network) -> Iterator[Any]:
    """What `_Writer.operation` takes: a part of the network, or a stem and its convolution's index."""
    for index in range(len(network.stem.convs)):
        yield network.stem, index
    for stage, blocks in enumerate(network.stages):
        if stage:
            yield network.downsamples[stage - 1]
        yield from blocks
        if network.head is None and network.features[stage] is not None:
            yield network.features[stage]
    if network.head is not None:
        yield network.head


def padded(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


class _Writer:
    """Writes tensors one after another and makes the records that point to them."""

    def __init__(self, file: BinaryIO, in_chans: int, start: int) -> None:
        self.file, self.in_chans, self.end = file, in_chans, start
        file.seek(start)

    def operation(self, part: Any) -> bytes:
        if isinstance(part, Block):
            channels, kernel = len(part.dw_weight), part.dw_weight.shape[-1]
            taps = np.zeros((padded(channels), kernel * kernel), np.float32)
            taps[:channels] = part.dw_weight.reshape(channels, -1)
            return self._record(
                "block",
                channels,
                kernel=kernel,
                norm=part.norm,
                activation=part.activation,
                grn_eps=part.grn_eps,
                # (C, k * k) -> (C / 16, k * k, 16)
                dw_weight=self._put(taps.reshape(-1, BLOCK, kernel * kernel).transpose(0, 2, 1)),
                dw_bias=self._vector(part.dw_bias),
                grn_weight=self._vector(part.grn_weight),
                grn_bias=self._vector(part.grn_bias),
                a=self._product(part.expand, (1, channels)),
                b=self._product(part.project, (1, 4 * channels)),
            )
        if isinstance(part, Downsample):
            channels = part.conv.weight.shape[1] // 4
            return self._record("downsample", channels, norm=part.norm, a=self._product(part.conv, (4, channels)))
        if isinstance(part, Head):
            first = part.hidden or part.classifier
            width = first.weight.shape[1] if first is not None else 0
            return self._record(
                "head",
                width or self.channels,
                norm=part.norm,
                activation=None if part.hidden is None or part.activation == "none" else part.activation,
                flags=int(part.norm_first),
                a=self._product(part.hidden, (1, width)),
                b=self._product(part.classifier, (1, part.classifier.weight.shape[1] if part.classifier else 0)),
            )
        if isinstance(part, Features):
            return self._record("features", part.channels, norm=part.norm)
        stem, index = part
        last = index == len(stem.convs) - 1
        patch = len(stem.convs) == 1
        conv = stem.convs[index]
        channels = self.in_chans if index == 0 else len(stem.convs[0].weight)
        return self._record(
            "stem_patch" if patch else "stem_conv",
            channels,
            kernel=4 if patch else 3,
            norm=stem.norm if last else None,
            activation=None if last else stem.activation,
            input_mean=self._vector(stem.input_mean) if index == 0 else 0,
            a=self._product(conv, (1, conv.weight.shape[1])),
        )

    def _record(
        self,
        kind: str,
        channels: int,
        *,
        kernel: int = 0,
        norm: ChannelNorm | None = None,
        activation: HeadActivation | None = None,
        flags: int = 0,
        grn_eps: float = 0.0,
        dw_weight: int = 0,
        dw_bias: int = 0,
        grn_weight: int = 0,
        grn_bias: int = 0,
        input_mean: int = 0,
        a: bytes = bytes(PRODUCT.size),
        b: bytes = bytes(PRODUCT.size),
    ) -> bytes:
        weight = bias = 0
        if norm is not None:
            weight, bias = self._vector(norm.weight), self._vector(norm.bias)
        return (
            OPERATION.pack(
                KINDS.index(kind), channels, kernel, NORMS.index(norm.kind if norm else None),
                ACTIVATIONS.index(activation), flags, norm.eps if norm else 0.0, grn_eps,
                dw_weight, dw_bias, weight, bias, grn_weight, grn_bias, input_mean,
            )
            + a
            + b
        )  # fmt: skip

    def _product(self, product: Product | None, inputs: tuple[int, int]) -> bytes:
        """The record of a product whose inputs are (taps, channels); each tap's channels are padded."""
        if product is None:
            return bytes(PRODUCT.size)
        taps, channels = inputs
        outputs, wide = len(product.weight), padded(len(product.weight))
        rows = np.zeros((wide, taps, padded(channels)), product.weight.dtype)
        rows[:outputs, :, :channels] = product.weight.reshape(outputs, taps, channels)
        matrix = rows.reshape(wide, -1)
        scale = offset = 0
        if product.type == "int8":
            assert product.weight_scale is not None
            assert product.weight.dtype == np.int8
            steps = np.float64(product.scale) * product.weight_scale.astype(np.float64)
            scale = self._vector(steps.astype(np.float32))
            sums = matrix.astype(np.int64).sum(1)
            offset = self._put((-product.zero_point * sums).astype(np.int32))
        elif product.type == "bf16":
            matrix = bf16_bits(matrix)
        else:
            matrix = matrix.astype(np.float32)
        self.channels = outputs
        return PRODUCT.pack(
            TYPES.index(product.type), matrix.shape[1], outputs, product.zero_point, product.scale, product.shift,
            self._put(packed(matrix)), self._vector(product.bias), scale, offset,
        )  # fmt: skip

    def _vector(self, values: NDArray[Any] | None) -> int:
        """A float32 vector filled up with zeros to a multiple of 16; 0 for None."""
        if values is None:
            return 0
        wide = np.zeros(padded(len(values)), np.float32)
        wide[: len(values)] = values
        return self._put(wide)

    def _put(self, array: NDArray[Any]) -> int:
        """Write one tensor at the next boundary; its offset."""
        self.end = self._aligned()
        offset = self.end
        content = np.ascontiguousarray(array)
        content.tofile(self.file)
        self.end += content.nbytes
        return offset

    def _aligned(self) -> int:
        gap = -self.end % ALIGNMENT
        self.file.write(bytes(gap))
        return self.end + gap

    def finish(self) -> int:
        """The file's size."""
        return self._aligned()


def packed(matrix: NDArray[Any]) -> NDArray[Any]:
    """(out, in), both multiples of 16 -> (out / 16, steps, 16, w), a step being w = 4 bytes of inputs."""
    w = 4 // matrix.itemsize
    outputs, inputs = matrix.shape
    return matrix.reshape(outputs // BLOCK, BLOCK, inputs // w, w).transpose(0, 2, 1, 3)


def bf16_bits(values: Floats) -> NDArray[np.uint16]:
    """Rounded to bfloat16, half to even, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, even).astype(np.uint16)
