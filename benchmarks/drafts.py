"""A plan to measure speed with: ranges from a few images, no corrections."""

from collections.abc import Collection
from pathlib import Path

from convnext_deploy import formats
from convnext_deploy.data import sources
from convnext_deploy.models import checkpoint as weights
from convnext_deploy.models import passes
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import calibrate
from convnext_deploy.quantization.distance import outputs, pixels_of
from convnext_deploy.quantization.images import open_images
from convnext_deploy.records.base import Precision
from convnext_deploy.records.plan import OperationType, Target, WeightBits

IMAGES = 16  # a speed does not depend on the scales; with random weights the accuracy does not either


def draft(
    checkpoint: str,
    variant: str,
    target: Target,
    path: Path,
    calibration: str,
    kinds: Collection[str],
    *,
    type: OperationType | None = None,
    rest: Precision = "fp32",
    weight_bits: WeightBits = 8,
) -> None:
    """Write `path`: the operations of these kinds in 8 bits.

    Args:
        checkpoint: as `api.export` takes it; "random" too.
        calibration: images, or "random" for noise.
        type: None: the target's int8.
    """
    loaded = weights.load(checkpoint, variant=variant)
    facts = loaded.preprocessing
    size = loaded.model.spec.image_size
    source = sources.subset(open_images(calibration, None, images=IMAGES, image_size=size), IMAGES)
    probe = pixels_of(sources.subset(source, 4), facts, loaded.model)
    passes.fold(loaded.model, None, lambda model: outputs(model, probe, facts))
    paths = plans.products(loaded.model)
    names = [name for name in paths if plans.kind_of(name) in kinds]
    found = calibrate(loaded.model, tuple(paths.values()), source, preprocessing=facts, images=IMAGES)
    how = formats.eight_bits_of(target)
    plan = plans.draft(
        loaded.model, found, names, type=type or how.int8, target=target, eight_bits=how, method="mse",
        input="float32", rest=rest, weights_sha256=loaded.weights.tensors_sha256, weight_bits=weight_bits,
    )  # fmt: skip
    plans.write(path, plan, {})
