"""Quantization: the plan, its calibration report, and half precision's report."""

from collections.abc import Collection
from typing import Annotated, Literal

import msgspec

from .base import (
    SCHEMA,
    Fraction,
    HandWritten,
    InputKind,
    PlanType,
    Positive,
    Precision,
    Record,
    SchemaVersion,
    Sha256,
    Side,
)

# Calibration
Scheme = Literal["u8_asymmetric", "s8_symmetric", "fp8_e4m3"]
RangeMethod = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]


class TensorRange(Record, frozen=True, kw_only=True):
    """The range one tensor is quantized over, and what to know about its values before trusting it."""

    name: str  # of the module whose input it is
    method: RangeMethod
    low: float  # zero or less
    high: float
    min: float  # of the values themselves
    max: float
    clip_rate: Fraction  # share of the values that move by more than rounding
    outlier_channels: tuple[tuple[int, float], ...]  # channel, its largest magnitude in those of the median channel
    halves_difference: float  # between the ranges that the even and the odd images give, relative to the range


class CalibrationReport(Record, frozen=True, kw_only=True):
    """The ranges of a model's tensors, and the images they come from."""

    schema_version: SchemaVersion = SCHEMA
    data: str
    data_sha256: Sha256  # of the encoded images themselves
    images: Positive
    random: bool  # noise, which was asked for by name
    method: RangeMethod
    percentile: float | None  # None with other methods
    scheme: Scheme
    image_size: tuple[Positive, Positive]
    tensors: tuple[TensorRange, ...]


Target = str  # a format's name, of those that compute in 8 bits (`Format.eight_bits`)
# u8s8: unsigned activations with a zero point, signed weights; s8s8: both signed, no zero points; fp8: both E4M3.
# fp32: kept from the plan's rest type, because half precision would overflow there.
OperationType = Literal["u8s8", "s8s8", "fp8", "fp32"]
WeightBits = Literal[7, 8]  # of int8 weights: codes of at most 64, or 127, in magnitude (see `saturation`)


def eight_bits(types: Collection[str]) -> PlanType | None:
    """What operations of these types compute in, in the word that asks for it; None where none is in 8 bits."""
    return "int8" if {"u8s8", "s8s8"} & set(types) else "fp8" if "fp8" in types else None


class OperationPlan(HandWritten, frozen=True, kw_only=True):
    """How one operation runs. `scale` and `zero_point` are those of its product's input; weights follow a channel."""

    type: OperationType
    scale: Annotated[float, msgspec.Meta(gt=0.0)] | None = None  # None for fp32
    zero_point: int = 0
    shift: float = 0.0  # subtracted from the input before it is quantized; its product is part of the bias


class InputStatistics(Record, frozen=True, kw_only=True):
    """What images looked like, and what the float model said of them: the reference for those that come later.

    An image has a mean and a standard deviation of each channel, white being 1; here are their means over the images,
    and their spread: the standard deviation over the images.
    """

    images: Positive
    mean: tuple[float, ...]  # (channels,), as all of these
    mean_spread: tuple[float, ...]
    std: tuple[float, ...]
    std_spread: tuple[float, ...]
    classes: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()  # images by the likeliest class; none without classes


class CalibrationRecord(Record, frozen=True, kw_only=True):
    """The images that the scales were chosen from."""

    data: str
    data_sha256: Sha256  # of the encoded images
    images: Positive
    random: bool  # noise in place of images, because it was asked for by name
    method: str
    inputs: InputStatistics | None = None  # None in plans of versions that did not keep them


class CorrectionRecord(Record, frozen=True, kw_only=True):
    """One accuracy correction that was tried: mean KL of the quantized from the float outputs without and with it."""

    name: str
    applied: bool
    kl_without: float
    kl_with: float
    images: Positive  # held out: not among those that it was computed from


class SaturationRecord(Record, frozen=True, kw_only=True):
    """What a plan does on x86 without VNNI, in a runtime that adds its products in 16 bits; and without saturation.

    Simulated on images that nothing was calibrated on, and compared with the float model.
    """

    images: Positive
    relative_error: float  # root mean square over the images
    relative_error_without: float
    changed: int | None  # images with another first class; None of models without classes
    changed_without: int | None


class Plan(HandWritten, frozen=True, kw_only=True):
    """`<plan>.json`: which operations of one checkpoint run in 8 bits, with which scales, for one target.

    Operations that are not named run in `rest`. Balancing factors, corrected biases and rounded weights, where there
    are any, are stored in `<plan>.safetensors`.
    """

    schema_version: SchemaVersion = SCHEMA
    target: Target
    architecture: str
    weights_sha256: Sha256  # `WeightsRecord.tensors_sha256` of the checkpoint
    input: InputKind  # a uint8 input needs no scale to be found: raw pixels are 8 bits
    image_size: tuple[Side, Side]
    rest: Precision
    weight_ranges: Literal["minmax", "mse"] = "minmax"
    weight_bits: WeightBits = 8
    calibration: CalibrationRecord | None  # None: nothing is quantized
    operations: dict[str, OperationPlan]
    corrections: tuple[CorrectionRecord, ...] = ()
    saturation: SaturationRecord | None = None  # None: nothing saturates, or nobody has looked
    tensors_sha256: Sha256 | None = None  # of `<plan>.safetensors`

    @property
    def types(self) -> tuple[OperationType, ...]:
        """The types of its operations, each once."""
        return tuple(dict.fromkeys(operation.type for operation in self.operations.values()))

    @property
    def eight_bits(self) -> PlanType | None:
        """What its products are in; None where it quantizes nothing."""
        return eight_bits(self.types)


class QuantizationRecord(Record, frozen=True, kw_only=True):
    """What a manifest says about the plan that its artifact was built from."""

    plan_sha256: Sha256
    target: Target
    operations: dict[str, Positive]  # type to how many
    kept_share: Fraction = 0.0  # of the multiply-accumulates, in the operations that the plan keeps in fp32
    weight_bits: WeightBits = 8
    calibration: CalibrationRecord | None
    saturation: SaturationRecord | None = None  # the plan's

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.operations)

    @property
    def eight_bits(self) -> PlanType | None:
        return eight_bits(self.types)


HalfPrecision = Literal["fp16", "bf16"]


class HalfTensor(Record, frozen=True, kw_only=True):
    """What one tensor of a float model would be in half precision, over some images."""

    name: str  # of a parameter, or a module and "input", "output" or "factor"
    largest: float  # magnitude
    headroom: float | None  # the type's largest number / `largest`; None where all values are zero
    margin: float  # headroom below it counts as overflow: 1 for weights, more for what other images may exceed
    overflow: Fraction  # share of the values beyond the type's largest number
    lost: Fraction  # share of the values that are not zero and become zero
    rounding: float | None = None  # relative to what is left of it downstream; None: judged with another tensor


class HalfOperation(Record, frozen=True, kw_only=True):
    """One operation in half precision, and why it stays in fp32 if it does."""

    name: str
    tensors: tuple[HalfTensor, ...]
    reasons: tuple[str, ...]  # empty: it may run in half precision


class HalfReport(Record, frozen=True, kw_only=True):
    """Which operations of a model overflow or lose their values in half precision."""

    schema_version: SchemaVersion = SCHEMA
    data: str
    data_sha256: Sha256  # of the encoded images
    images: Positive
    random: bool  # noise in place of images, because it was asked for by name
    image_size: tuple[Positive, Positive]
    weights_sha256: Sha256  # of the folded module
    input: InputKind
    precision: HalfPrecision
    bar: float  # roundings above it count as lost
    kept_share: Fraction  # of the multiply-accumulates, in the operations that stay in fp32
    operations: tuple[HalfOperation, ...]  # in the order in which they run
