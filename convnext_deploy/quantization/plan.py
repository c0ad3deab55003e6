"""A plan: which operations run in 8 bits, with which scales. Diffable JSON; every runtime's graph follows it."""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..arguments import shown
from ..artifact.manifest import check_file, encode, refuse_name, sha256_of, write_file
from ..errors import UsageError, counted, plain
from ..models.convnext import DTYPES, Block, ConvNeXt
from ..records.base import InputKind, Precision, content_of
from ..records.plan import (
    CalibrationRecord,
    OperationPlan,
    OperationType,
    Plan,
    RangeMethod,
    Scheme,
    Target,
    WeightBits,
)
from .calibrate import Calibration, report
from .eight_bits import EightBits
from .images import RANDOM
from .ranges import scale_and_zero_point

SCHEMES: dict[OperationType, Scheme] = {"u8s8": "u8_asymmetric", "s8s8": "s8_symmetric", "fp8": "fp8_e4m3"}
SEGMENTER = "segmenter"  # of a segmenter's head: the module, and the kind of its operations
LARGEST = 1e38  # of a scale or a shift, with which float32 still computes


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and the tensors beside it, named `<what>/<operation>`."""

    plan: Plan
    tensors: Mapping[str, Tensor]
    calibration: Calibration | None = None  # that it was drafted from; not kept in files
    eight_bits: EightBits | None = None  # how its target computes; needed where it quantizes anything

    @property
    def sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self.plan)).hexdigest()  # which contains the tensors' hash


def products(model: ConvNeXt) -> dict[str, str]:
    """Every operation that can run in 8 bits: its name to the path of the linear or convolution inside it.

    Not among them: depthwise convolutions (2 % of the arithmetic, and no runtime gains from them), overlapping stems
    (at 2 % of the arithmetic as well), the hidden linear of an MLP head, and a segmenter's convolutions of pooled maps,
    which have a few pixels.
    """
    names = {}
    if model.spec.stem == "patch":
        names["stem"] = "stem.convs.0"
    for stage in range(len(model.stages)):
        if stage:
            names[f"downsamples.{stage - 1}"] = f"downsamples.{stage - 1}.conv"
        for index in range(model.spec.depths[stage]):
            block = f"stages.{stage}.{index}"
            names[f"{block}.expand"] = f"{block}.expand.linear"
            names[f"{block}.project"] = f"{block}.project.linear"
    if model.head is not None and model.head.classifier is not None:
        names["head"] = "head.classifier"
    if model.segmenter is not None:
        units = [name for name, _ in model.segmenter.units() if not name.startswith("pyramid.")]
        names |= {f"{SEGMENTER}.{name}": f"{SEGMENTER}.{name}.conv" for name in units}
        names[f"{SEGMENTER}.classifier"] = f"{SEGMENTER}.classifier"
    return names


def operations(model: ConvNeXt) -> tuple[str, ...]:
    """Every operation that a plan can name, in the order in which it runs."""
    names = ["stem"]
    for stage in range(len(model.stages)):
        if stage:
            names.append(f"downsamples.{stage - 1}")
        for index, block in enumerate(cast("nn.ModuleList", model.stages[stage])):
            assert isinstance(block, Block)
            parts = ("dwconv_norm", "expand", "project") if block.grn is None else _V2_PARTS
            names += [f"stages.{stage}.{index}.{part}" for part in parts]
    if model.segmenter is not None:
        names += [f"{SEGMENTER}.{name}" for name in (*(name for name, _ in model.segmenter.units()), "classifier")]
    return (*names, "head") if model.head is not None else tuple(names)


_V2_PARTS = ("dwconv_norm", "expand", "grn", "project")


def kind_of(operation: str) -> str:
    """`stages.2.0.expand` -> `expand`, `downsamples.1` -> `downsample`, `segmenter.fusion` -> `segmenter`, `stem`."""
    if operation.startswith(f"{SEGMENTER}."):
        return SEGMENTER
    return "downsample" if operation.startswith("downsamples.") else operation.rpartition(".")[2]


def quantized(plan: Plan) -> tuple[str, ...]:
    """The operations that run in 8 bits."""
    return tuple(name for name, operation in plan.operations.items() if operation.type != "fp32")


def draft(
    model: ConvNeXt,
    calibration: Calibration,
    names: Iterable[str],
    *,
    type: OperationType,
    target: Target,
    eight_bits: EightBits,
    method: RangeMethod,
    input: InputKind,
    rest: Precision,
    weights_sha256: str,
    weight_bits: WeightBits = 8,
) -> Plan:
    """A plan that runs the named operations in 8 bits, with the ranges that a method finds in a calibration.

    Args:
        calibration: of the inputs of `products(model)`.
        names: of operations.
        eight_bits: how the target computes.
        weights_sha256: of the checkpoint.
    """
    scheme, paths = SCHEMES[type], products(model)
    tensors = {tensor.name: tensor for tensor in report(calibration, method, scheme).tensors}
    operations = {}
    for name in names:
        if name == "stem" and input == "uint8" and type == "u8s8":
            operations[name] = OperationPlan(type=type, scale=1.0, zero_point=0)  # pixels are codes already
            continue
        tensor = tensors[paths[name]]
        scale, zero_point = scale_and_zero_point(np.float64(tensor.low), np.float64(tensor.high), scheme)
        stored = representable(torch.tensor(float(scale)), eight_bits, rest).item()
        operations[name] = OperationPlan(type=type, scale=stored, zero_point=int(zero_point))
    identity = calibration.identity
    return Plan(
        target=target,
        architecture=model.spec.architecture,
        weights_sha256=weights_sha256,
        input=input,
        image_size=model.spec.image_size,
        rest=rest,
        weight_bits=weight_bits,
        calibration=CalibrationRecord(
            data=calibration.data,
            data_sha256=identity.data_sha256,
            images=identity.images,
            random=calibration.data == RANDOM,
            method=method,
            inputs=calibration.inputs,
        ),
        operations=operations,
    )


def representable(scales: Tensor, eight_bits: EightBits, rest: Precision) -> Tensor:
    """Scales as the graph of a format stores them, float32.

    A scale below half precision's normal range becomes the smallest normal number: it belongs to a channel that a
    tiny layer scale was folded into. The weights are then off by at most 3e-5, and what 4C of them add to the residual
    stream is off by less than the rounding of that stream to half precision.
    """
    if not eight_bits.scales_in_rest or rest not in ("fp16", "bf16"):
        return scales
    dtype = DTYPES[rest]
    return scales.clamp_min(torch.finfo(dtype).smallest_normal).to(dtype).float()


def restricted(loaded: LoadedPlan, names: Collection[str]) -> LoadedPlan:
    """The same plan for these operations only."""
    operations = {name: operation for name, operation in loaded.plan.operations.items() if name in names}
    tensors = {key: tensor for key, tensor in loaded.tensors.items() if key.partition("/")[2] in operations}
    whole = loaded.plan.saturation if len(operations) == len(loaded.plan.operations) else None
    plan = msgspec.structs.replace(loaded.plan, operations=operations, saturation=whole)
    return replace(loaded, plan=plan, tensors=tensors)


def write(path: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> Plan:
    """Write `<path>` and, where there are tensors, `<path without .json>.safetensors`; the JSON last.

    Returns:
        The plan as written: with the hash of its tensors.
    """
    _check_name(path)
    beside = path.with_suffix(".safetensors")
    if tensors:
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_file(beside, content)
        plan = msgspec.structs.replace(plan, tensors_sha256=hashlib.sha256(content).hexdigest())
    else:
        beside.unlink(missing_ok=True)
    write_file(path, encode(plan))
    return plan


def check_target(out: Path, force: bool) -> None:
    """Refuse a plan's name that is taken, cannot be written, or would replace something else than a plan.

    Raises:
        UsageError: what is in the way.
    """
    refuse_name(out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}; expected a name that ends in .json")
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another --out or give --force to replace it")
    check_file(out)
    refuse_foreign(out)


def refuse_foreign(path: Path) -> None:
    """Refuse a name under which `write` would replace or remove what is no plan, or not the tensors of one.

    Raises:
        UsageError: what is in the way.
    """
    beside = path.with_suffix(".safetensors")
    tensors = None
    if os.path.lexists(path):
        try:
            tensors = msgspec.json.decode(content_of(path), type=Plan).tensors_sha256
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise UsageError(f"{path} is not a plan, so it is not replaced; choose another --out") from None
    if os.path.lexists(beside) and (tensors is None or not beside.is_file() or sha256_of(beside) != tensors):
        raise UsageError(
            f"{beside}, where the plan's tensors would go, is not of a plan, so it is not replaced; "
            "choose another --out"
        )


def read(path: Path) -> LoadedPlan:
    """Read a plan and the tensors that belong to it.

    Raises:
        UsageError: a file is missing, damaged, of another plan, or has a field or value that plans do not have.
    """
    _check_name(path)
    try:
        plan = msgspec.json.decode(content_of(path), type=Plan)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {plain(error)}; expected a plan of `quantize`") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not a plan: {plain(error)}") from None
    for name, operation in plan.operations.items():
        if (operation.scale is None) != (operation.type == "fp32"):
            raise UsageError(f"{path}: {name} has type {operation.type} and scale {operation.scale}; fp32 has none")
        largest = 255 if operation.type == "u8s8" else 0
        if not 0 <= operation.zero_point <= largest:
            raise UsageError(
                f"{path}: {shown(name)} has type {operation.type} and zero point {operation.zero_point}; expected "
                + (f"0 to {largest}" if largest else "0")
            )
        if abs(operation.shift) > LARGEST or not 1 / LARGEST < (operation.scale or 1) < LARGEST:
            raise UsageError(
                f"{path}: {shown(name)} has scale {operation.scale} and shift {operation.shift}; expected numbers that "
                "float32 has"
            )
    if plan.calibration is None and quantized(plan):
        raise UsageError(f"{path} quantizes {counted(len(quantized(plan)), 'operation')} and names no calibration")
    tensors: Mapping[str, Tensor] = {}
    if plan.tensors_sha256 is not None:
        beside = path.with_suffix(".safetensors")
        if not beside.is_file():
            raise UsageError(f"{beside} is missing; it belongs to {path.name}")
        if sha256_of(beside) != plan.tensors_sha256:
            raise UsageError(f"{beside} is not the file that {path.name} was written with; run quantize again")
        try:
            tensors = safetensors.torch.load_file(beside)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:  # and of an unknown type
            reason = plain(error)
            raise UsageError(f"{beside} cannot be read: {reason}; run quantize again") from None
    return LoadedPlan(plan, tensors)


def _check_name(path: Path) -> None:
    if path.suffix != ".json":
        raise UsageError(f"{path} does not end in .json; a plan is <name>.json and <name>.safetensors")
