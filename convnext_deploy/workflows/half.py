"""A checkpoint and images to a plan that keeps in fp32 what half precision would break: `half`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..artifact import manifest
from ..artifact.manifest import write_file
from ..data import preprocess
from ..data.image_source import ImageSource
from ..errors import counted
from ..models import passes, provenance
from ..models.source import Source
from ..quantization import plan as plans
from ..quantization.distance import outputs
from ..quantization.half import half_plan
from ..quantization.images import open_images
from ..records.base import InputKind
from ..records.plan import HalfReport, Plan
from .export import Say

PROBE = 4  # images that folding is checked on


def half(
    source: Source,
    data: str | ImageSource,
    *,
    out: Path,
    precision: Literal["fp16", "bf16"],
    images: int,
    split: str | None,
    input: InputKind,
    force: bool,
    say: Say,
    progress: Callable[[int, int], None] | None,
) -> tuple[Plan, HalfReport]:
    """The steps of `api.half`, on arguments that are checked.

    Raises:
        UsageError: what can be refused before the work.
    """
    plans.check_target(out, force)
    source_images = open_images(data, split, images=images, image_size=source.image_size or (224, 224))
    say("loading the checkpoint")
    loaded = source.load()
    for line in provenance.contradictions(loaded.provenance):
        say(line)
    model, facts = loaded.model, loaded.preprocessing
    say("folding")
    pixels = preprocess.probe_images(model.spec.in_chans, model.spec.image_size, PROBE)
    passes.fold(model, facts if input == "uint8" else None, lambda m: outputs(m, pixels, facts))
    say(f"looking at {counted(images, 'image')} of {source_images.name}")
    plan, decisions = half_plan(
        model,
        source_images,
        preprocessing=facts,
        weights_sha256=loaded.weights.tensors_sha256,
        rest=precision,
        images=images,
        progress=progress,
    )
    write_file(out.with_suffix(".half.json"), manifest.encode(decisions))
    return plans.write(out, plan, {}), decisions
