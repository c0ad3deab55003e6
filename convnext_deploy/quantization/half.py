"""Which operations half precision would break, from the values that they take on real images.

Two things can go wrong. A value may lie beyond the type's largest number (65504 in fp16): the output is then infinite
or NaN. Or rounding may take more than the type's usual share: small values below fp16's normal range lose bits or
become zero, and a large offset leaves few bits for what varies.

The folded fp32 module runs over the images, and every tensor that half precision would round is looked at. Rounding is
judged by what it does to the result of a product (convolution or linear): the product is computed again from rounded
operands, and its error is compared with what is left of the result further down:

    where a LayerNorm follows (depthwise convolution, stem)   the result minus its mean over the channels
    project                                                   the residual sum, minus its mean over the channels
    otherwise                                                 the result itself

So a tiny branch that vanishes beside the residual stream is harmless, and a shift that hides the signal is not.
"""

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import preprocess, sources
from ..errors import CheckFailed, DataError, UsageError, counted
from ..models.convnext import DTYPES, ConvNeXt, Downsample, DwconvNorm, Grn, Project, Stem, nhwc
from ..models.costs import share_of
from ..models.parameters import tensors_sha256
from ..records.base import InputKind
from ..records.manifest import ModelSpec, Norm, Preprocessing
from ..records.plan import HalfOperation, HalfPrecision, HalfReport, HalfTensor, OperationPlan, Plan, Target
from .distance import pixels_of
from .images import RANDOM, content_sha256
from .plan import kind_of, operations

_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]

# Images of the analysis are a sample; others reach further. No tensor of the bundled model reaches 1.6 times as far on
# 2000 images as on 64; this leaves two bits of the range free. Weights need none: all are known.
MARGIN = 4.0
# Rounding a normal number moves it by at most u = eps / 2 (2^-11 in fp16), by 0.4 u in root mean square. A product has
# three roundings (input, weight, result): 0.7 u where nothing cancels. Beyond 4 u, more than two bits are lost.
BAR = 4.0  # u


@dataclass
class _Sums:
    """Sums over all images so far, of one tensor."""

    largest: float = 0.0
    values: int = 0
    overflow: int = 0
    lost: int = 0
    error: float | None = None  # sum of squares; None: not judged by itself
    reference: float = 0.0  # sum of squares of what is left


@dataclass
class _Watch:
    """Everything seen so far, by operation and tensor name, in the order of the first sight."""

    dtype: torch.dtype
    sums: dict[str, dict[str, _Sums]] = field(default_factory=dict)

    def of(self, operation: str, name: str) -> _Sums:
        return self.sums.setdefault(operation, {}).setdefault(name, _Sums())

    def see(self, operation: str, name: str, x: Tensor) -> _Sums:
        """Count a tensor.

        Raises:
            CheckFailed: it contains NaN or infinite values in fp32.
        """
        magnitude = x.abs()
        largest = magnitude.max().item()
        if not largest < float("inf"):
            raise CheckFailed(
                f"{name} contains NaN or infinite values in fp32 already; no precision can hold the model"
            )
        record = self.of(operation, name)
        record.largest = max(record.largest, largest)
        record.values += x.numel()
        limits = torch.finfo(self.dtype)
        if largest > limits.max:
            record.overflow += int(torch.count_nonzero(magnitude > limits.max))
        vanishing = limits.smallest_normal * limits.eps / 2  # half the smallest subnormal number, which rounds to even
        record.lost += int(torch.count_nonzero(magnitude <= vanishing) - torch.count_nonzero(magnitude == 0))
        return record

    def judge(self, counts: _Sums, error: Tensor | None, left: Tensor | None) -> None:
        """Add an error and what it is compared with; None where the other hook of the operation adds it."""
        if error is not None:
            counts.error = (counts.error or 0.0) + _sum_of_squares(error)
        if left is not None:
            counts.reference += _sum_of_squares(left)

    def rounded(self, x: Tensor) -> Tensor:
        """To half precision and back; what would overflow is the largest number, as overflow is counted apart."""
        limit = torch.finfo(self.dtype).max
        return x.clamp(-limit, limit).to(self.dtype).to(x.dtype)


def analyse(
    model: ConvNeXt,
    source: sources.ImageSource,
    *,
    preprocessing: Preprocessing,
    precision: HalfPrecision = "fp16",
    images: int = 64,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> HalfReport:
    """Look at every tensor that half precision would round, and say which operations have to stay in fp32.

    It takes about four times as long as running the model; nothing is saved on the way.

    Args:
        model: in eval mode, folded, in fp32, on the device that is to run it.
        source: `images.open_images`; its labels are not looked at.
        preprocessing: leads from an image to the model's input; raw pixels go to a model that takes uint8.
        images: how many, evenly spaced over the source.
        batch: images at once.
        progress: called with (images done, images in all), first before any work.

    Raises:
        UsageError: no images, or a precision that is not half.
        DataError: the source has fewer images, or one of them cannot be read.
        CheckFailed: the model contains NaN or infinite values in fp32.
    """
    if precision not in ("fp16", "bf16"):
        raise UsageError(f"precision {precision}; expected fp16 or bf16")
    if images < 1 or batch < 1:
        raise UsageError(f"images {images}, batch {batch}; expected at least 1 of each")
    if images > len(source):
        raise DataError(
            f"{source.name} has {counted(len(source), 'image')}; {images} were asked for: ask for fewer or give more"
        )
    source = sources.subset(source, images)
    kind: InputKind = "uint8" if model.takes_uint8 else "float32"
    device = model.get_parameter("stem.convs.0.weight").device
    watch = _Watch(DTYPES[precision])
    report = progress or (lambda done, total: None)
    report(0, images)
    with torch.no_grad(), _watched(model, watch):
        for start in range(0, images, batch):
            pixels = pixels_of(source, preprocessing, model, range(start, min(start + batch, images)))
            model(torch.from_numpy(preprocess.as_input(pixels, preprocessing, kind)).to(device))
            report(min(start + batch, images), images)
    decisions = decide(_tensors(model, watch), precision)
    return HalfReport(
        data=source.name,
        data_sha256=content_sha256(source),
        images=images,
        random=source.name == RANDOM,
        image_size=model.spec.image_size,
        weights_sha256=tensors_sha256(model.state_dict()),
        input=kind,
        precision=precision,
        bar=bar(precision),
        kept_share=share_of(model.spec, {operation.name for operation in decisions if operation.reasons}),
        operations=decisions,
    )


def bar(precision: HalfPrecision) -> float:
    """The relative error above which rounding counts as a loss."""
    return BAR * torch.finfo(DTYPES[precision]).eps / 2


def decide(tensors: Mapping[str, tuple[HalfTensor, ...]], precision: HalfPrecision) -> tuple[HalfOperation, ...]:
    """Which operations stay in fp32, given the tensors of each, in the order in which they run.

    An operation does so for any of its tensors but the residual stream. The stream has the widest type of what was
    added to it: it needs fp32 where it overflows or loses too much, and has it if the stem or downsample that it
    starts with, or a project before, is in fp32. Where none is, the operation that writes it there becomes so.
    """
    decisions, wide = [], False
    for name, records in tensors.items():
        kind = kind_of(name)
        stream = f"{name} output" if kind in ("stem", "downsample", "project") else None
        wide = wide and kind not in ("stem", "downsample")
        judged = [tensor for tensor in records if not (wide and tensor.name == stream)]
        reasons = tuple(reason for tensor in judged for reason in _reasons(tensor, precision))
        wide = wide or (stream is not None and bool(reasons))
        decisions.append(HalfOperation(name=name, tensors=records, reasons=reasons))
    return tuple(decisions)


def safe_plan(report: HalfReport, *, architecture: str, weights_sha256: str, target: Target) -> Plan:
    """A plan that quantizes nothing, keeps what the report says in fp32, and runs the rest in half precision.

    Args:
        weights_sha256: of the checkpoint (`WeightsRecord.tensors_sha256`), not of the folded module.
    """
    return Plan(
        target=target,
        architecture=architecture,
        weights_sha256=weights_sha256,
        input=report.input,
        image_size=report.image_size,
        rest=report.precision,
        calibration=None,
        operations={name: OperationPlan(type="fp32") for name in kept(report)},
    )


def kept(report: HalfReport) -> tuple[str, ...]:
    """The operations that stay in fp32."""
    return tuple(operation.name for operation in report.operations if operation.reasons)


def half_plan(
    model: ConvNeXt,
    source: sources.ImageSource,
    *,
    preprocessing: Preprocessing,
    weights_sha256: str,
    target: Target = "onnx",
    rest: HalfPrecision = "fp16",
    images: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Plan, HalfReport]:
    """`analyse`, and the plan that follows from it.

    Args:
        model: in eval mode, folded, in fp32.
        weights_sha256: of the checkpoint (`WeightsRecord.tensors_sha256`).
    """
    report = analyse(model, source, preprocessing=preprocessing, precision=rest, images=images, progress=progress)
    plan = safe_plan(report, architecture=model.spec.architecture, weights_sha256=weights_sha256, target=target)
    return plan, report


# Looking -------------------------------------------------------------------------------------------------------------


def _watched(model: ConvNeXt, watch: _Watch) -> ExitStack:
    """A context in which every forward pass of the model is looked at."""
    with ExitStack() as hooks:
        for name in operations(model):
            operation = model.get_submodule(name)
            for path, product in operation.named_modules():
                if isinstance(product, nn.Linear | nn.Conv2d):
                    product_hook = _product_hook(watch, name, f"{name}.{path}", operation)
                    hooks.callback(product.register_forward_hook(product_hook).remove)
            hooks.callback(operation.register_forward_hook(_operation_hook(watch, name, model.spec)).remove)
        return hooks.pop_all()


def _product_hook(watch: _Watch, name: str, path: str, operation: nn.Module) -> _Hook:
    def observe(product: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(product, nn.Linear | nn.Conv2d)
        assert product.bias is not None
        watch.see(name, f"{path} input", inputs[0])
        record = watch.see(name, f"{path} output", output)
        x, weight, bias = map(watch.rounded, (inputs[0], product.weight, product.bias))
        if isinstance(product, nn.Linear):
            half = F.linear(x, weight, bias)
        else:
            half = F.conv2d(x, weight, bias, product.stride, product.padding, product.dilation, product.groups)
        if isinstance(operation, DwconvNorm) or (isinstance(operation, Stem) and product is operation.convs[-1]):
            left = _left(nhwc(output), operation.norm.kind, operation.norm.eps)
        elif isinstance(operation, Project):
            left = None  # of the sum, which `_operation_hook` sees
        else:
            left = output
        watch.judge(record, watch.rounded(half) - output, left)

    return observe


def _operation_hook(watch: _Watch, name: str, spec: ModelSpec) -> _Hook:
    def observe(operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        record = watch.see(name, f"{name} output", output)
        if isinstance(operation, Grn):
            watch.see(name, f"{name} input", inputs[0])
            factor = operation.factor(inputs[0])
            watch.see(name, f"{name} factor", factor)
            half = watch.rounded(watch.rounded(inputs[0]) * watch.rounded(factor))
            watch.judge(record, half - output, output)
        elif isinstance(operation, Stem | Downsample | Project):
            left = _left(output, spec.norm, spec.norm_eps)
            watch.judge(record, watch.rounded(output) - output, left)
            if isinstance(operation, Project):
                assert operation.layer_scale is None, "the model is not folded"
                watch.judge(watch.of(name, f"{name}.linear output"), None, left)

    return observe


def _sum_of_squares(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def _left(x: Tensor, norm: Norm, eps: float) -> Tensor:
    """What a norm leaves of its input, (N, H, W, C), in the input's units; epsilon drowns what is far below it."""
    varying = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    return (varying.square() + eps).sqrt()


def _tensors(model: ConvNeXt, watch: _Watch) -> dict[str, tuple[HalfTensor, ...]]:
    """Every operation's parameters and what was seen of it, in the order in which they run."""
    limit = torch.finfo(watch.dtype).max
    records = watch.sums
    weights = _Watch(watch.dtype)
    for name in operations(model):
        for path, parameter in model.get_submodule(name).named_parameters():
            weights.see(name, f"{name}.{path}", parameter)
    return {
        name: (
            *(_record(key, sums, limit, 1.0) for key, sums in weights.sums.get(name, {}).items()),
            *(_record(key, sums, limit, MARGIN) for key, sums in records[name].items()),
        )
        for name in operations(model)
    }


# Judging -------------------------------------------------------------------------------------------------------------


def _record(name: str, counts: _Sums, limit: float, margin: float) -> HalfTensor:
    rounding = None
    if counts.error is not None:
        rounding = math.sqrt(counts.error / max(counts.reference, sys.float_info.min))
    return HalfTensor(
        name=name,
        largest=counts.largest,
        headroom=limit / counts.largest if counts.largest else None,
        margin=margin,
        overflow=counts.overflow / counts.values,
        lost=counts.lost / counts.values,
        rounding=rounding,
    )


def _reasons(tensor: HalfTensor, precision: HalfPrecision) -> list[str]:
    """Why a tensor cannot be half, in words; empty where it can."""
    limit = torch.finfo(DTYPES[precision]).max
    reasons = []
    if tensor.largest > limit:
        share = f", {tensor.overflow:.2g} of the values" if tensor.margin > 1 else ""
        reasons.append(f"{tensor.name} reaches {tensor.largest:.3g}, above {precision}'s {limit:.3g}{share}")
    elif tensor.largest > limit / tensor.margin:
        reasons.append(
            f"{tensor.name} reaches {tensor.largest:.3g}, within a factor of {tensor.margin:g} of {precision}'s "
            f"{limit:.3g}"
        )
    # Beyond the limit, what is measured is the overflow.
    if tensor.rounding is not None and tensor.largest <= limit and tensor.rounding > bar(precision):
        reasons.append(
            f"{tensor.name} is off by {tensor.rounding:.2g} of what is left of it, above {bar(precision):.2g}"
        )
    return reasons
