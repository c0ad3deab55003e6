"""Does a built file hold what the module held? Its tensors bit for bit, its epsilons, its activations.

Outputs cannot tell a flipped bit in fp16 from rounding; the file can. A reader (`Format.read_back`) returns what a file
contains in the order in which it is computed with, and `differences` looks for each of the module's tensors in it. What
a converter may do to a tensor without changing a number is known here: another shape, (out, in) as (in, out), a
convolution's weight as (out, kH, kW, in), half floats written as float32, and nothing else.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import counted
from ..records.manifest import ReadBack

SHOWN = 3  # differences in a message
RELATIVE = 1e-6  # of an epsilon, or of a quantizer's range: files hold them in float32
HALF = 2.0**-10  # of a quantizer's range in float16
CODES = ("int8", "uint8", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Tensor:
    """`values` are numpy's; types that numpy lacks are the unsigned integers of their bits, and named in `type`."""

    name: str
    type: str  # float32, float16, bfloat16, int8, ...
    values: NDArray[Any]
    product: NDArray[np.float32] | None = None  # of a weight's scales and the input's, which engines hold instead
    subtracted: bool = False  # files may contain its negative, to be added


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A tensor's 8-bit grid. `name` is its operation's; files that hold limits instead of a scale are read into both.

    The lowest and the highest value are `(code - zero point) * scale` of the type's lowest and highest code.
    """

    name: str
    low: float
    high: float
    levels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a file contains, in the order in which it is computed with."""

    tensors: Sequence[Tensor]
    named: bool = False  # tensors are found by their names when the file is loaded, and not by their order
    scalars: Sequence[float] | None = ()  # epsilons among them; None where the file does not hold them
    activations: Sequence[str] | None = ()
    unread: str = ""  # what of the file is not compared, in words
    quantizers: Sequence[Quantizer] | None = None  # by their limits; None where their scales are among the tensors
    shifts: Mapping[str, float] | None = None  # of quantized products, by name; None where they are among the scalars


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the module contains. `groups` counts the operations, so that their order can be compared."""

    tensors: Sequence[Tensor]
    groups: Sequence[int]  # of each tensor
    epsilons: Sequence[float]
    activations: Sequence[str]
    constants: frozenset[float]  # other scalars that a graph may contain
    checksums: Sequence[int]  # of each tensor, before the build
    quantizers: Sequence[tuple[Quantizer, frozenset[str]]] = ()  # with the names of their scales among the tensors
    shifts: Mapping[str, float] = field(default_factory=dict)  # subtracted before quantizing; those that are not 0
    halved: bool = False  # the file may contain float32 tensors rounded to float16 (OpenVINO's compression)
    branches: frozenset[int] = frozenset()  # operations beside the chain of the others, at any place in the order
    repeated: bool = False  # operations run several times, on maps of several sizes: a tensor may stand there often
    tables: Sequence[NDArray[Any]] = ()  # made from the image size alone, which converters may keep ready


def differences(contents: Contents, expected: Expected) -> ReadBack:
    """Every tensor and scalar of the module looked for in the file."""
    if expected.repeated:
        once = {tensor.name: tensor for tensor in contents.tensors}
        unread = "; ".join(filter(None, (contents.unread, REPEATED)))
        contents = replace(contents, tensors=tuple(once.values()), scalars=None, activations=None, unread=unread)
    failures = [*_changed(expected), *_tensors(contents, expected), *_quantizers(contents, expected)]
    if contents.shifts is not None and {k: v for k, v in contents.shifts.items() if v} != dict(expected.shifts):
        failures.append(f"the built file shifts inputs by {dict(contents.shifts)}, expected {dict(expected.shifts)}")
    scalars = contents.scalars
    if scalars is not None:
        failures += _scalars(scalars, expected)
    in_order: Callable[[Sequence[str]], Sequence[str]] = sorted if expected.branches else tuple
    held, wanting = in_order(contents.activations or ()), in_order(expected.activations)
    if (
        contents.quantizers is not None
    ):  # a quantizer from 0 on cuts off what ReLU does, so that converters leave ReLU out
        left = min(wanting.count("relu") - held.count("relu"), sum(one.low == 0 for one in contents.quantizers))
        wanting = _without(wanting, "relu", left)
    if contents.activations is not None and [*held] != [*wanting]:
        pairs = zip((*held, "none"), (*wanting, "none"), strict=False)
        got, reference = next((a, b) for a, b in pairs if a != b)
        failures.append(f"an activation is {got}, expected {reference}")
    return ReadBack(
        tensors=len(expected.tensors),
        epsilons=None if scalars is None else len(expected.epsilons),
        activations=None if contents.activations is None else len(expected.activations),
        failures=tuple(failures),
        unread=contents.unread or None,
    )


def _without(words: Sequence[str], word: str, times: int) -> Sequence[str]:
    """The words without the first so many of one."""
    kept = list(words)
    for _ in range(times):
        kept.remove(word)
    return kept


REPEATED = "epsilons and activations, of operations that run on several maps"


def checksum(values: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _changed(expected: Expected) -> Iterator[str]:
    """A builder is to leave the module as it is: a file that agrees with a changed one proves nothing."""
    pairs = zip(expected.tensors, expected.checksums, strict=True)
    changed = [tensor.name for tensor, before in pairs if checksum(tensor.values) != before]
    if changed:
        yield f"the build changed {len(changed)} of the module's tensors: {_few(changed)}"


def _tensors(contents: Contents, expected: Expected) -> Iterator[str]:
    waiting: dict[int, list[int]] = {}
    elsewhere = (
        frozenset[str]() if contents.quantizers is None else frozenset().union(*(n for _, n in expected.quantizers))
    )
    for index, tensor in enumerate(expected.tensors):
        if tensor.name in elsewhere:
            continue
        waiting.setdefault(tensor.values.size, []).append(index)
    strange, order = [], []
    for stored in contents.tensors:
        candidates = waiting.get(stored.values.size, [])
        for index in candidates:
            reference = expected.tensors[index]
            if (not contents.named or reference.name == stored.name) and _same(stored, reference, expected.halved):
                candidates.remove(index)
                if expected.groups[index] not in expected.branches and not _neutral(reference):
                    order.append(expected.groups[index])
                break
        else:
            # One number that is no code is among the scalars.
            if (
                (stored.values.size > 1 or stored.type in CODES)
                and not _neutral(stored)
                and not _is_table(stored, expected)
                and not (expected.repeated and any(_same(stored, t, expected.halved) for t in expected.tensors))
            ):
                strange.append(stored.name)
    # What adds zeros or multiplies by ones need not be in a file, and of equal tensors an exporter keeps one. A model
    # that was never trained has many such.
    left = (expected.tensors[index] for indices in waiting.values() for index in indices)
    missing = [tensor.name for tensor in left if not _neutral(tensor)]
    if missing:
        yield (
            f"{len(missing)} of {len(expected.tensors)} tensors are not in the built file as the module had them: "
            + _few(missing)
        )
    if strange:
        yield f"the built file has {counted(len(strange), 'tensor')} that the module had not: {_few(strange)}"
    if not contents.named and order != sorted(order):
        yield "the built file uses the module's tensors in another order"


def _quantizers(contents: Contents, expected: Expected) -> Iterator[str]:
    """Limits in the order of use. Files hold them in float32, made from a scale in one rounding."""
    if contents.quantizers is None:
        return
    quantizers = [quantizer for quantizer, _ in expected.quantizers]
    if len(contents.quantizers) != len(quantizers):
        yield f"the built file has {len(contents.quantizers)} quantizers, expected {len(quantizers)}"
        return
    pairs = [*contents.quantizers], quantizers
    if expected.branches:  # beside the chain of the others, at any place in the order
        pairs = tuple(sorted(side, key=lambda one: (one.low, one.high, one.levels)) for side in pairs)  # type: ignore[assignment]  # mypy takes it for one of any length
    for a, b in zip(*pairs, strict=True):
        room = (HALF if expected.halved else RELATIVE) * (b.high - b.low)
        if a.levels != b.levels or not (abs(a.low - b.low) <= room and abs(a.high - b.high) <= room):
            yield (
                f"the built file quantizes {b.name}'s input to {a.levels} levels from {a.low:g} to {a.high:g}, "
                f"expected {b.levels} from {b.low:g} to {b.high:g}"
            )
            return


def _is_table(stored: Tensor, expected: Expected) -> bool:
    return any(
        stored.values.size == table.size
        and stored.values.dtype.kind == "f"
        and any(np.allclose(np.ravel(stored.values), np.ravel(one), rtol=RELATIVE, atol=0) for one in (table, table.T))
        for table in expected.tables
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _same(stored: Tensor, reference: Tensor, halved: bool) -> bool:
    for values in _types(reference, stored.type, halved):
        if reference.subtracted and values.dtype.kind == "f" and _equal(np.ravel(stored.values), -values):
            return True
        flat = np.ascontiguousarray(stored.values).reshape(-1)
        if any(_equal(flat, layout) for layout in _layouts(values)):
            return True
    return False


def _types(reference: Tensor, stored: str, halved: bool) -> Iterator[NDArray[Any]]:
    """The module's values in the type that the file has, if no number is lost on the way."""
    if reference.product is not None and stored == "float32":
        yield reference.product
    if reference.type == stored:
        yield reference.values
    elif stored == "float32" and reference.type == "float16":
        yield reference.values.astype(np.float32)
    elif stored == "float32" and reference.type == "bfloat16":
        yield (reference.values.astype(np.uint32) << 16).view(np.float32)
    elif halved and (stored, reference.type) == ("float16", "float32"):
        yield reference.values.astype(np.float16)


def _layouts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    yield values
    if values.ndim == 2:
        yield values.T
    elif values.ndim == 4:
        yield values.transpose(0, 2, 3, 1)  # (out, in, kH, kW) -> (out, kH, kW, in)


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Bit for bit: NaN is NaN, and 0 is not -0."""
    flat = np.ascontiguousarray(b).reshape(-1)
    bits = np.dtype(f"u{flat.itemsize}")
    return bool(np.array_equal(a.view(bits), flat.view(bits)))


def _neutral(stored: Tensor) -> bool:
    """A norm's weight that was folded away is written as ones, a bias or a zero point that is none as zeros."""
    if stored.type in CODES:
        return not stored.values.any()
    if stored.type == "bfloat16":
        return bool((stored.values == 0x3F80).all() or (stored.values == 0).all())
    return bool((stored.values == 1).all() or (stored.values == 0).all())


def _scalars(numbers: Sequence[float], expected: Expected) -> Iterator[str]:
    """The epsilons in their order; between them, constants only that the module's operations have."""
    left = list(expected.epsilons)
    for value in numbers:
        if left and _close(value, left[0], expected.halved):
            left.pop(0)
        elif not any(_close(value, constant, expected.halved) for constant in expected.constants):
            hint = f", expected the epsilon {left[0]:g}" if left else ""
            yield f"the built file has the constant {value:g}, which the module has not{hint}"
            return
    if left:
        yield f"{len(left)} of {len(expected.epsilons)} epsilons are not in the built file: {left[0]:g}"


def _close(a: float, b: float, halved: bool) -> bool:
    return abs(a - b) <= RELATIVE * abs(b) or (halved and a == float(np.float16(b)))
