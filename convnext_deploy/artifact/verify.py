"""Does an artifact compute what its PyTorch source computes? Tiers that can fail."""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ..records.base import Precision
from ..records.manifest import Manifest, Parity, PrecisionTruth
from . import deviation, label_maps

Outputs = tuple[NDArray[np.float32], ...]
Reference = Literal["source", "simulation", "type"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of the worst sample: relative error at most, cosine at least, as `deviation` defines them."""

    relative_error: float
    cosine: float
    rms_error: float | None = None  # root mean square of the relative errors of all samples, at most


# The reference is the fp32 module before any rewrite. One rounding is 2^-24, 2^-11, 2^-8 relative; it happens a few
# times in each of 12 to 40 residual blocks, whose errors add up like a random walk in a sum that itself grows. The
# worst measured with random weights, every format, was 1.5e-6 / 1.2e-3 / 1.2e-2 (docs/design/verification.md); the
# limits lie a factor of 6 to 8 above. In fp32 that catches GELU's other form (1.6e-4) and an epsilon of 1e-5 for 1e-6
# (V1 1.7e-5, V2 4e-5); a missing residual, swapped sides or channels (above 0.8) fail in every precision
# (tests/formats/test_formats.py).
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(relative_error=1e-5, cosine=1 - 1e-8),
    # Products of inputs rounded to 11 bits, as fp16's, but sums and storage in fp32: fp16's limits hold with room.
    "tf32": Tolerance(relative_error=1e-2, cosine=1 - 1e-4),
    "fp16": Tolerance(relative_error=1e-2, cosine=1 - 1e-4),
    "bf16": Tolerance(relative_error=8e-2, cosine=1 - 4e-3),
}

# Few outputs that cancel, as of a small network at a small image size, can be so near zero beside what they are summed
# from that the source's own float32 is 1e-5 from float64. There the artifact is compared with float64, so that only its
# own rounding counts: adding in another order, it may be SOURCE_ROUNDING times as far away as the source (measured: 0.7
# to 1.5). Never more than LOOSEST_FP32, which is below what GELU's other form moves (1.6e-4).
SOURCE_ROUNDING = 2.0
LOOSEST_FP32 = 1e-4

# A cast module in PyTorch differs from its own weights with float32 arithmetic by the rounding of activations in that
# type, on this model and these images. A runtime rounds at other places, or in fewer: it is to be as near to one of the
# two as SAME_TYPE times their distance. Measured: at most 1.14 (OpenVINO in bf16), 0 for PyTorch's own formats
# (docs/design/verification.md). The distance is at least one rounding, so that a model without any is not held to zero.
SAME_TYPE = 2.0
ROUNDING: dict[Precision, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8}

# Two logits may change places when they lie closer than the error that the tolerance allows each of them, with a
# factor of 2 for the pair and 2 because errors are not spread evenly over the classes.
NEAR_TIE_FACTOR = 4


# How far a quantized artifact may be from its source before it is no approximation of it any more. Accuracy is not
# judged here but by `gate`, on labelled images: naive INT8 of healthy models moves outputs by up to 0.1.
QUANTIZED = Tolerance(relative_error=0.5, cosine=0.9)


def rounding_tolerance(expected: Outputs, exact: Outputs) -> tuple[Tolerance, float]:
    """(how far an artifact in fp32 may be from float64, the source's own distance from it).

    Args:
        exact: what the source computes in float64 on the same images.
    """
    table = TOLERANCES["fp32"]
    rounding = float(deviation.worst(expected, exact).max())
    error = min(max(table.relative_error, SOURCE_ROUNDING * rounding), LOOSEST_FP32)
    return Tolerance(relative_error=error, cosine=table.cosine), rounding


RMS_SAMPLES = 16  # of fewer, a root mean square of errors varies too much from set to set


def simulation_tolerance(
    simulated: Outputs, expected: Outputs, precision: Precision, typed: Outputs | None = None
) -> Tolerance:
    """How far an artifact may be from the simulation of its plan.

    Both round the same values to the same 8-bit grids, but values that lie within float rounding of the middle between
    two steps fall to either side, and each such step changes later ones: after a few blocks, the two have rounding
    errors of the same size that are partly independent. So each may be as far from the source as the plan moves its
    worst sample, and they differ by up to twice that (measured: 1.5 times, with a large offset in the residual stream,
    which makes its float rounding coarse), and by the tolerance of the type that the rest runs in. A wrong bias or
    weight scale moves them further (tests/quantization/test_quantize_export.py).

    That is one sample at its worst, its two errors pointing in opposite directions. Over all samples, the squares of
    independent errors add up, and the two have the weights' rounding in common: in the root mean square they are at
    most sqrt(2) times as far apart as the simulation is from the source. Measured: at most 1.06, and 1.7 to 16 where
    8-bit products saturate (docs/verification.md). Half precision in the rest is one more independent error.

    Args:
        simulated: in fp32.
        expected: the source's.
        precision: of the rest.
        typed: the simulation with the rest in that type; None in fp32, and where PyTorch has no such type (tf32).
    """
    rest = TOLERANCES[precision]
    errors = deviation.worst(simulated, expected)
    error = 2 * float(errors.max()) + rest.relative_error
    if typed is None:
        rms = math.sqrt(2) * _rms(errors) + rest.relative_error
    else:
        rounding = max(_rms(deviation.worst(typed, simulated)), ROUNDING[precision])
        rms = math.sqrt(2) * math.hypot(_rms(errors), rounding)
    return Tolerance(
        relative_error=error,
        cosine=1 - error**2,  # 1 - cosine is at most about half the square
        rms_error=rms if len(errors) >= RMS_SAMPLES else None,
    )


def _rms(errors: deviation.Distances) -> float:
    return math.sqrt(float((errors**2).mean()))


def compare(
    outputs: Outputs,
    expected: Outputs,
    limit: Tolerance,
    images: str,
    classify: bool,
    reference: Reference = "source",
) -> Parity:
    """All tiers on one set of images.

    Args:
        outputs: the artifact's outputs, each (N, ...).
        expected: the reference's, same shapes.
        limit: of the worst sample.
        images: how to call the set in the record.
        classify: the one output is logits, (N, K) or of each pixel (N, K, H, W), so that top-1 can be compared. An
            artifact may put out each pixel's class in their place, which is compared alone.
        reference: what `expected` is.
    """
    failures = []
    what = {"source": "", "simulation": " from the simulation", "type": " from the same type in PyTorch"}[reference]
    if classify and outputs[0].dtype.kind == "i":
        return _compare_classes(cast("NDArray[np.integer[Any]]", outputs[0]), expected, limit, images, reference)
    shapes = [tuple(a.shape) for a in outputs], [tuple(b.shape) for b in expected]
    if shapes[0] != shapes[1]:
        return _parity(images, reference, expected, (f"output shapes {shapes[0]}, expected {shapes[1]}",))
    if not all(np.isfinite(a).all() for a in outputs):
        count = sum(int(np.count_nonzero(~np.isfinite(a))) for a in outputs)
        return _parity(images, reference, expected, (f"{count} of the outputs' values are NaN or infinite",))
    errors = deviation.worst(outputs, expected)
    cosines = np.min([deviation.cosines(a, b) for a, b in zip(outputs, expected, strict=True)], axis=0)
    worst, lowest = float(errors.max()), float(cosines.min())
    if not worst <= limit.relative_error:
        failures.append(
            f"relative error {worst:.3g}{what} on sample {int(errors.argmax())}, above {limit.relative_error:.3g}"
        )
    if limit.rms_error is not None and not _rms(errors) <= limit.rms_error:
        failures.append(
            f"root mean square of the relative errors {_rms(errors):.3g}{what}, above {limit.rms_error:.3g}"
        )
    if not lowest >= limit.cosine:
        failures.append(f"cosine {lowest:.8f} on sample {int(cosines.argmin())}, below {limit.cosine:.8f}")
    agreement, near_ties = None, 0
    if classify and expected[0].shape[1] > 1:  # of one output it would be 100 % whatever the logits are
        agreement, near_ties = top1_agreement(_rows(outputs[0]), _rows(expected[0]), limit)
        if agreement < 1.0:
            failures.append(f"top-1 agrees on {agreement:.2%} of the samples that are not near-ties, expected all")
    return Parity(
        images=images,
        reference=reference,
        samples=len(expected[0]),
        relative_error=worst,
        cosine=lowest,
        top1_agreement=agreement,
        near_ties=near_ties,
        failures=tuple(failures),
    )


def _rows(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits, a row a sample: (N, K), or (N, K, H, W) of each pixel as (N * H * W, K)."""
    return logits if logits.ndim == 2 else np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def _compare_classes(
    outputs: NDArray[np.integer[Any]], expected: Outputs, limit: Tolerance, images: str, reference: Reference
) -> Parity:
    """Classes of pixels (N, H, W) beside the reference's logits (N, K, h, w), resized to them."""
    sides = (outputs.shape[1], outputs.shape[2]) if outputs.ndim == 3 else (0, 0)
    if outputs.ndim != 3 or len(outputs) != len(expected[0]):
        failure = f"classes of shape {outputs.shape} for {len(expected[0])} images; expected (N, H, W)"
        return _parity(images, reference, expected, (failure,))
    outside = int(np.count_nonzero((outputs < 0) | (outputs >= expected[0].shape[1])))
    if outside:
        return _parity(images, reference, expected, (f"{outside} pixels have a class that the model has not",))
    agreeing = counted = near_ties = 0
    for one, logits in zip(outputs, expected[0], strict=True):
        rows = _rows(label_maps.resized(logits, sides)[None])
        near, unequal = _near_ties(one.reshape(-1).astype(np.int64), rows, limit)
        near_ties += int(near.sum())
        counted += int((~near).sum())
        agreeing += int((~near & ~unequal).sum())
    agreement = agreeing / counted if counted else 1.0
    failures: tuple[str, ...] = ()
    if agreement < 1.0:
        failures = (f"the classes of {counted - agreeing} of {counted} pixels that are no near-ties differ",)
    return Parity(
        images=images,
        reference=reference,
        samples=len(outputs),
        relative_error=None,
        cosine=None,
        top1_agreement=agreement,
        near_ties=near_ties,
        failures=failures,
    )


def compare_type(
    outputs: Outputs, same: Outputs, wide: Outputs, precision: Precision, images: str, classify: bool
) -> Parity:
    """The tiers beside the nearer of two simulations of the same type, at a limit that the two give.

    Args:
        same: the cast module's outputs, computed in its type.
        wide: those of its weights with float32 arithmetic.
    """
    error = type_error(same, wide, precision)
    limit = Tolerance(relative_error=error, cosine=1 - error**2)
    judged = [compare(outputs, reference, limit, images, classify, "type") for reference in (same, wide)]
    return min(judged, key=lambda parity: (len(parity.failures), parity.relative_error or 0.0))


def type_error(same: Outputs, wide: Outputs, precision: Precision) -> float:
    """How far an artifact may be from the nearer of the two simulations of `compare_type`, relative."""
    return SAME_TYPE * max(float(deviation.worst(same, wide).max()), ROUNDING[precision])


def top1_agreement(outputs: NDArray[np.float32], expected: NDArray[np.float32], limit: Tolerance) -> tuple[float, int]:
    """(share of equal top-1 among samples without a near-tie, number of near-ties among the unequal ones).

    A sample whose top-1 changed is a near-tie where the source itself put the two classes closer together than
    `NEAR_TIE_FACTOR` times the tolerated error of one logit.
    """
    near, unequal = _near_ties(outputs.argmax(1), expected, limit)
    counted = int((~near).sum())
    return (float((~unequal)[~near].mean()) if counted else 1.0), int(near.sum())


def _near_ties(
    a: NDArray[np.int64], expected: NDArray[np.float32], limit: Tolerance
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of classes `a` (N,) beside logits (N, K): which differ and are near-ties, and which differ."""
    b = expected.argmax(1)
    rows = np.arange(len(b))
    margin = expected[rows, b].astype(np.float64) - expected[rows, a]
    tolerated = limit.relative_error * deviation.sizes(expected) / np.sqrt(expected.shape[1])
    return (a != b) & (margin <= NEAR_TIE_FACTOR * tolerated), a != b


def precision_failures(
    truth: PrecisionTruth, manifest: Manifest, typed_graph: bool, engine: bool = False
) -> tuple[str, ...]:
    """Asked-for precision that was not delivered, in words; empty where it was.

    Args:
        truth: what was read back.
        manifest: says what was asked for.
        typed_graph: precision is a property of the built graph (ONNX, PyTorch's), not of the runtime (OpenVINO).
        engine: the artifact is compiled for one device (TensorRT), so that what it executes counts too, where the
            runtime names it. An ONNX file is not: another provider may run the same file in the asked type.
    """
    precision, plan = manifest.export.precision, manifest.export.quantization
    graphs = [("built graph", truth.graph)] if typed_graph else [("executed graph", truth.executed or {})]
    if engine and truth.executed is not None:
        # The inspector does not tell tf32 from fp32, nor name every layer: only another known type is a failure.
        same = {precision, "unknown", *(("fp32",) if precision == "tf32" else ())}
        executed = {name: share for name, share in truth.executed.items() if name not in same}
        graphs.append(("engine", {precision: 1 - sum(executed.values()), **executed}))
    failures = []
    if plan is not None:
        planned = sum(count for name, count in plan.operations.items() if name != "fp32")
        if precision != "fp32" and typed_graph and truth.graph.get("fp32", 0.0) < plan.kept_share - 0.01:
            failures.append(
                f"the plan keeps {plan.kept_share:.0%} of the multiply-accumulates in fp32, but the built graph has "
                f"{truth.graph.get('fp32', 0.0):.0%}"
            )
        kinds = {"fp8" if name == "fp8" else "int8" for name in plan.operations if name != "fp32"}
        graphs = [(where, _as_planned(actual, precision, plan.kept_share, kinds)) for where, actual in graphs]
        if (truth.quantized or 0) != planned:
            failures.append(
                f"{truth.quantized or 0} products run in 8 bits where the plan has {planned}" + _because(truth.note)
            )
    for where, actual in graphs:
        if actual.get(precision, 0.0) < 0.99:
            got = ", ".join(f"{value:.0%} {name}" for name, value in actual.items()) or "unknown"
            failures.append(
                f"{precision} was asked for, but the {where} has {got} of the multiply-accumulates"
                + _because(truth.note)
            )
    return tuple(failures)


def _as_planned(counts: dict[str, float], asked: str, kept_share: float, kinds: set[str]) -> dict[str, float]:
    """The shares with what a plan asks for counted as asked for: 8 bits, and as much fp32 as it keeps."""
    others = {name: share for name, share in counts.items() if name not in {*kinds, asked}}
    if "fp32" in others:
        others["fp32"] = max(0.0, others["fp32"] - kept_share)
    others = {name: share for name, share in others.items() if share}
    return {asked: 1 - sum(others.values()), **others}


def _because(note: str | None) -> str:
    return f" ({note})" if note else ""


def _parity(images: str, reference: Reference, expected: Outputs, failures: tuple[str, ...]) -> Parity:
    """The record of outputs that cannot even be compared."""
    return Parity(
        images=images,
        reference=reference,
        samples=len(expected[0]),
        relative_error=None,
        cosine=None,
        top1_agreement=None,
        near_ties=0,
        failures=failures,
    )
