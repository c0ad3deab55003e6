"""From a folded module and images to a plan for all that can run in 8 bits, with the corrections that help."""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from ..data import sources
from ..models.convnext import ConvNeXt
from ..models.parameters import tensors_sha256
from ..records.base import InputKind, Precision
from ..records.manifest import Preprocessing
from ..records.plan import CorrectionRecord, OperationType, RangeMethod, Target, WeightBits
from . import corrections, saturation_loss
from .apply import apply, rebalance
from .calibrate import calibrate
from .counting import Runner
from .distance import Distances, Pixels, classifies, distances, outputs, pixels_of
from .eight_bits import EightBits
from .plan import LoadedPlan, draft, products

STATISTICS = "calibration"  # how the names of files of statistics begin
CORRECTION_IMAGES = 64  # of the calibration's, that biases and roundings are computed from
HELPED = 2.0  # standard errors of the paired difference by which a correction has to lower the mean distance


def prepare(
    model: ConvNeXt,
    source: sources.ImageSource,
    held_out: Pixels,
    names: Collection[str],
    *,
    preprocessing: Preprocessing,
    target: Target,
    eight_bits: EightBits,
    type: OperationType,
    method: RangeMethod,
    input: InputKind,
    rest: Precision,
    weights_sha256: str,
    weight_bits: WeightBits,
    images: int,
    rounding: bool,
    folder: Path | None,
    runner: Runner | None = None,
    say: Callable[[str], None],
    progress: Callable[[str], Callable[[int, int], None]],
) -> LoadedPlan:
    """Calibrate, draft, and try each correction on images that it was not computed from.

    Args:
        model: folded, fp32; left as it was.
        source: calibration images.
        held_out: what corrections are judged on.
        names: the operations to run in 8 bits.
        eight_bits: how the target computes.
        rounding: try GPTQ too, which takes minutes for a large model.
        folder: keeps the calibration's statistics, and those of the balanced module.
        runner: runs the images of a calibration; None: this process.
        progress: told what begins; returns what is told (steps done, steps in all) of it.
    """
    paths = products(model)
    classify = classifies(model)

    def calibrated(module: ConvNeXt, name: str, doing: str) -> LoadedPlan:
        statistics = calibrate(
            module,
            tuple(paths.values()),
            source,
            preprocessing=preprocessing,
            images=images,
            resume=None if folder is None else folder / f"{name}.safetensors",
            runner=runner,
            progress=progress(doing),
        )
        plan = draft(
            module,
            statistics,
            names,
            type=type,
            target=target,
            eight_bits=eight_bits,
            method=method,
            input=input,
            rest=rest,
            weights_sha256=weights_sha256,
            weight_bits=weight_bits,
        )
        return LoadedPlan(plan, {}, statistics, eight_bits)

    say(f"calibrating on {images} images of {source.name}")
    current = calibrated(model, STATISTICS, "calibrating")
    pixels = pixels_of(sources.subset(source, min(images, CORRECTION_IMAGES)), preprocessing, model)
    expected = outputs(model, held_out, preprocessing)

    def measured(candidate: LoadedPlan) -> Distances:
        changed = copy.deepcopy(model)
        apply(changed, candidate)
        return distances(outputs(changed, held_out, preprocessing), expected, classify)

    def balanced(plan: LoadedPlan) -> LoadedPlan:
        assert plan.calibration is not None
        factors = corrections.balance_factors(model, plan.calibration, tuple(plan.plan.operations))
        changed = copy.deepcopy(model)
        for name, values in factors.items():
            rebalance(changed, name.partition("/")[2], values)
        file = f"{STATISTICS}-{tensors_sha256(changed.state_dict())[:12]}"
        again = calibrated(changed, file, "trying the correction balance")
        return replace(again, tensors=factors)

    def shifted(plan: LoadedPlan) -> LoadedPlan:
        assert plan.calibration is not None
        return replace(plan, plan=corrections.shifted(plan, plan.calibration, model))

    def with_tensors(name: str, make: Callable[..., dict[str, Tensor]]) -> Callable[[LoadedPlan], LoadedPlan]:
        def attempt(plan: LoadedPlan) -> LoadedPlan:
            tell = progress(f"trying the correction {name}")
            return replace(plan, tensors={**plan.tensors, **make(model, plan, pixels, preprocessing, tell)})

        return attempt

    attempts: list[tuple[str, Callable[[LoadedPlan], LoadedPlan]]] = [("balance", balanced)]
    if type == "s8s8":
        attempts.append(("shift", shifted))
    if rounding:
        attempts.append(("rounding", with_tensors("rounding", corrections.rounded_weights)))
    attempts.append(("bias", with_tensors("bias", corrections.bias_corrections)))
    records = []
    before = measured(current)
    for name, attempt in attempts:
        say(f"trying the correction {name}")
        candidate = attempt(current)
        after = measured(candidate)
        change = after - before
        applied = bool(change.mean() + HELPED * change.std(ddof=1) / np.sqrt(len(change)) < 0)
        records.append(
            CorrectionRecord(
                name=name,
                applied=applied,
                kl_without=float(before.mean()),
                kl_with=float(after.mean()),
                images=len(change),
            )
        )
        if applied:
            current, before = candidate, after
    plan = msgspec.structs.replace(
        current.plan,
        corrections=tuple(records),
        saturation=saturation_loss.measure(model, current, held_out, preprocessing),
    )
    return replace(current, plan=plan)
