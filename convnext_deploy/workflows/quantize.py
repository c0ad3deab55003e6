"""A checkpoint and images to a plan: `quantize`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..artifact import manifest
from ..artifact.manifest import write_file
from ..cluster import connection
from ..data import sources
from ..errors import DataError, UsageError, counted, plain
from ..formats.base import Format
from ..models import provenance
from ..models.source import Source
from ..quantization import plan as plans
from ..quantization import saturation
from ..quantization.calibrate import report
from ..quantization.draft import STATISTICS, prepare
from ..quantization.eight_bits import EightBits
from ..quantization.images import open_images
from ..records.base import InputKind, PlanType, Precision
from ..records.plan import OperationType, Plan, RangeMethod, Target, WeightBits
from . import cluster_calibrate
from .drafts import LINEARS, Progress, folded

IMAGES = 512  # to calibrate on, where so many are there
HELD_OUT = 128  # images that corrections are judged on, where no labelled ones are given
LEAST_IMAGES = 32  # of all that a calibration needs: to calibrate on and to hold out
PARTIAL = ".partial"  # in the place of the plan's suffix: the folder of an unfinished calibration
LEAST_HELD_OUT = 8  # with fewer the error of a mean difference says nothing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a plan is drafted for, from which images and how; each as in `api.quantize`."""

    calibration: str | sources.ImageSource
    split: str | None
    images: int | None
    target: Target
    type: PlanType
    method: RangeMethod
    rest: Precision | None
    input: InputKind
    rounding: bool
    weight_bits: WeightBits | None


def quantize(
    source: Source,
    recipe: Recipe,
    *,
    out: Path,
    force: bool,
    ray: str | None,
    say: Callable[[str], None],
    progress: Progress,
) -> Plan:
    """The steps of `api.quantize`, on arguments that are checked: linears of blocks and a segmenter's head in 8 bits.

    What is counted is kept in `<name>.partial/` until the plan is written, so that the same call goes on.

    Raises:
        UsageError: what can be refused before the work.
    """
    target, input = recipe.target, recipe.input
    fmt, how = formats.get(target), formats.eight_bits_of(target)
    kind = _refuse_early(fmt, how, out, recipe, force)
    address = None if ray is None else connection.checked(ray)
    bits = _weight_bits(recipe.weight_bits, target, kind)
    say("loading the checkpoint")
    loaded = source.load()
    if loaded.note:
        say(loaded.note)
    for line in provenance.contradictions(loaded.provenance):
        say(line)
    calibrated, held_out = _sets(recipe.calibration, recipe.split, recipe.images, loaded.model.spec.image_size)
    say(f"{counted(len(calibrated), 'image')} to calibrate on, {len(held_out)} held out to judge corrections on")
    say("folding")
    pixels = folded(loaded, held_out, input)
    model = loaded.model
    folder = _made(out.with_suffix(PARTIAL))
    if any(folder.glob(f"{STATISTICS}*.safetensors")):
        say(f"going on with what was counted in {folder}")
    drafted = prepare(
        model,
        calibrated,
        pixels,
        [name for name in plans.products(model) if plans.kind_of(name) in (*LINEARS, plans.SEGMENTER)],
        preprocessing=loaded.preprocessing,
        target=target,
        eight_bits=how,
        type=kind,
        method=recipe.method,
        input=input,
        rest=recipe.rest or how.rest,
        weights_sha256=loaded.weights.tensors_sha256,
        weight_bits=bits,
        images=len(calibrated),
        rounding=recipe.rounding,
        folder=folder,
        runner=None if address is None else cluster_calibrate.runner(address, say=say),
        say=say,
        progress=progress,
    )
    assert drafted.calibration is not None
    ranges = report(drafted.calibration, recipe.method, plans.SCHEMES[kind])
    write_file(out.with_suffix(".calibration.json"), manifest.encode(ranges))
    plan = plans.write(out, drafted.plan, drafted.tensors)
    _remove(folder)
    return plan


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {plain(error)}; choose another --out") from None
    return folder


def _remove(folder: Path) -> None:
    """Remove what a calibration has put there; a folder that somebody else has put more into stays."""
    for path in folder.glob(f"{STATISTICS}*.safetensors"):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _refuse_early(fmt: Format, how: EightBits, out: Path, recipe: Recipe, force: bool) -> OperationType:
    """The operations' type; everything that can be refused before any work."""
    target = recipe.target
    plans.check_target(out, force)
    if recipe.type == "fp8" and not how.fp8:
        raise UsageError(f"--type fp8 is for NVIDIA GPUs; {target} computes int8 in 8 bits")
    formats.require(fmt, build=True)
    return "fp8" if recipe.type == "fp8" else how.int8


def _sets(
    calibration: str | sources.ImageSource, split: str | None, images: int | None, image_size: tuple[int, int]
) -> tuple[sources.ImageSource, sources.ImageSource]:
    """Disjoint images: to calibrate on, and to judge corrections on."""
    source = open_images(calibration, split, images=(images or IMAGES) + HELD_OUT, image_size=image_size)
    there = len(source)
    if images is None:
        _require(source, LEAST_IMAGES)
        held_out = min(HELD_OUT, there // 5)
        images = min(IMAGES, there - held_out)
    else:
        _require(source, images + LEAST_HELD_OUT, f" (--images {images}, and {LEAST_HELD_OUT} held out)")
        held_out = min(HELD_OUT, there - images)
    first, held_images = sources.parts(source, (images, held_out))
    return first, held_images


def _require(source: sources.ImageSource, least: int, why: str = "") -> None:
    if len(source) < least:
        raise DataError(
            f"{source.name} has {counted(len(source), 'image')}; at least {least} are needed{why}, give more"
        )


def _weight_bits(asked: WeightBits | None, target: Target, kind: OperationType) -> WeightBits:
    """The bits of the weights: as asked, or what this machine multiplies exactly and fast.

    Raises:
        UsageError: 7 bits where nothing can saturate.
    """
    if asked == 7 and kind != "u8s8":
        raise UsageError(f"--weight-bits 7 is for targets that multiply u8 by s8; {target} multiplies {kind}")
    return asked or saturation.bits_for(kind, saturation.saturates())
