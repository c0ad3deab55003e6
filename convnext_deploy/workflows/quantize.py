"""A checkpoint and images to a plan: `quantize`, drafted at once or searched for under an accuracy budget."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .. import env, formats
from ..artifact import manifest
from ..artifact.manifest import Artifact, write_file
from ..artifact.trust import built_here
from ..data import numbering, sources
from ..data.image_source import with_one_label
from ..errors import CheckFailed, DataError, UsageError
from ..formats.base import Format
from ..models import passes
from ..models.source import Source
from ..quantization import plan as plans
from ..quantization import saturation
from ..quantization.apply import apply
from ..quantization.calibrate import open_images, report
from ..quantization.distance import outputs, pixels_of
from ..quantization.draft import prepare
from ..quantization.eight_bits import EightBits
from ..quantization.plan import LoadedPlan
from ..records.base import InputKind, PlanType, Precision
from ..records.manifest import BatchRange, ExportRequest, TensorRtSpec
from ..records.plan import (
    OperationType,
    Plan,
    RangeMethod,
    SearchResult,
    Target,
    WeightBits,
)
from ..reports import plots
from .evaluate import Images
from .export import Say, export
from .search import Budget, Workbench, search

IMAGES = 512  # to calibrate on, where so many are there
HELD_OUT = 128  # images that corrections are judged on, where no labelled ones are given
LEAST_IMAGES = 32  # of all that a calibration needs: to calibrate on and to hold out
LEAST_HELD_OUT = 8  # with fewer the error of a mean difference says nothing
SELECTION = 2000  # images of labelled data that a search selects on; at most a third of them
PROBE = 4  # images that folding is checked on
KINDS = ("expand", "project")  # what runs in 8 bits where nothing is searched for

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a plan is drafted for, from which images and how; each as in `api.quantize`."""

    calibration: str
    split: str | None
    images: int | None
    target: Target
    type: PlanType
    method: RangeMethod
    rest: Precision | None
    input: InputKind
    rounding: bool
    weight_bits: WeightBits | None
    tensorrt: TensorRtSpec | None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a search is to reach, and what it is measured on; each as in `api.quantize`."""

    images: Images
    max_drop: float  # percentage points of top-1
    alpha: float
    batch: int
    threads: int | None


def quantize(
    source: Source,
    recipe: Recipe,
    goal: Goal | None,
    *,
    out: Path,
    force: bool,
    say: Say,
    progress: Progress,
) -> tuple[Plan, SearchResult | None]:
    """The steps of `api.quantize`, on arguments that are checked.

    Args:
        goal: None: the linears of all blocks in 8 bits, without a search.

    Raises:
        UsageError: what can be refused before the work.
        CheckFailed: a search found no plan that is faster and passes; its `<name>.search.json` says why.
    """
    target, input = recipe.target, recipe.input
    fmt, how = formats.get(target), formats.eight_bits_of(target)
    kind = _refuse_early(fmt, how, out, recipe, goal, force)
    bits = _weight_bits(recipe.weight_bits, target, how, kind, searching=goal is not None)
    rest = recipe.rest or how.rest
    labelled, classes = (None, None) if goal is None else goal.images.opened()
    say("loading the checkpoint")
    loaded = source.load()
    if loaded.note:
        say(loaded.note)
    model, facts = loaded.model, loaded.preprocessing
    folder = None if goal is None else out.with_suffix(".search")
    whole = None
    if labelled is not None:
        if model.spec.problem not in (None, "single-label"):
            raise UsageError(
                f"a search judges top-1, and the model is {model.spec.problem}; leave --data and --max-drop out, and "
                "hold the artifact against its baseline with `gate`"
            )
        one_each = with_one_label(labelled)
        if one_each.labels is None:
            raise DataError(
                f"{labelled.name} has no labels; expected class folders, a column label, a list, or --annotations"
            )
        whole = numbering.numbered(one_each, model.spec.num_classes, loaded.labels, classes)
    calibrated, held_out, selection, final = _sets(
        recipe.calibration,
        recipe.split,
        recipe.images,
        goal.images.data if goal else None,
        whole,
        model.spec.image_size,
    )
    images = len(calibrated)
    say(f"{images} images to calibrate on, {len(held_out)} held out to judge corrections on")
    if goal is not None and folder is not None:
        _check_identity(
            folder, loaded.weights.tensors_sha256, recipe.calibration, recipe.split,
            whole.sha256 if whole else None, target, recipe.type,
            recipe.method, images, input, rest, recipe.rounding, goal.batch, bits,
        )  # fmt: skip

    say("folding")
    pixels = pixels_of(held_out, facts, model)
    passes.fold(model, facts if input == "uint8" else None, lambda m: outputs(m, pixels[:PROBE], facts))
    drafted = prepare(
        model,
        calibrated,
        pixels,
        [name for name in plans.products(model) if folder is not None or plans.kind_of(name) in KINDS],
        preprocessing=facts,
        target=target,
        eight_bits=how,
        type=kind,
        method=recipe.method,
        input=input,
        rest=rest,
        weights_sha256=loaded.weights.tensors_sha256,
        weight_bits=bits,
        images=images,
        rounding=recipe.rounding,
        resume=None if folder is None else folder / "calibration.safetensors",
        say=say,
        progress=progress("calibrating"),
    )
    assert drafted.calibration is not None
    ranges = report(drafted.calibration, recipe.method, plans.SCHEMES[kind])
    write_file(out.with_suffix(".calibration.json"), manifest.encode(ranges))
    if goal is None or folder is None or selection is None or final is None:
        return plans.write(out, drafted.plan, drafted.tensors), None

    def build(path: Path, plan: LoadedPlan | None, precision: Precision | None) -> Artifact:
        if (path / manifest.MANIFEST_NAME).exists():
            found = manifest.verified(path)
            recorded = found.manifest.export.quantization
            ours = not fmt.runs_code or built_here(found.sha256)
            if ours and (recorded.plan_sha256 if recorded else None) == (plan.sha256 if plan else None):
                return found
        request = ExportRequest(
            format=target,
            precision=plan.plan.rest if plan else precision or "fp32",
            input=input,
            batch=BatchRange(min=1, opt=goal.batch, max=max(goal.batch, 32)),
            device="cpu" if "cpu" in fmt.devices else "cuda",
            tensorrt=recipe.tensorrt,
        )
        return export(source, request, plan=plan, out=path, force=True)

    def simulated(plan: LoadedPlan | None) -> Any:
        changed = copy.deepcopy(model)
        if plan is not None:
            apply(changed, plan)
        return changed

    runs_here = not fmt.ahead_of_time or bool(env.nvidia_gpus())
    bench = Workbench(
        folder=folder,
        build=build,
        simulation=None if runs_here else simulated,
        preprocessing=facts,
        selection=selection,
        final=final,
        threads=goal.threads,
        say=say,
        progress=progress,
    )
    sizes = {"calibration": images, "selection": len(selection), "final": len(final)}
    budget = Budget(max_drop=goal.max_drop, alpha=goal.alpha, batch=goal.batch)
    result, best = search(bench, model, drafted, pixels, budget, sizes)
    write_file(out.with_suffix(".search.json"), manifest.encode(result))
    if not env.missing(("matplotlib",)):  # of the extra `report`; the numbers are in the JSON
        drawn = plots.search(result)
        if drawn is not None:
            write_file(out.with_suffix(".search.svg"), drawn.encode())
    if best is None:
        raise CheckFailed(f"{result.why} (see {out.with_suffix('.search.json')})")
    return plans.write(out, best.plan, best.tensors), result


def _refuse_early(
    fmt: Format, how: EightBits, out: Path, recipe: Recipe, goal: Goal | None, force: bool
) -> OperationType:
    """The operations' type; everything that can be refused before any work."""
    target = recipe.target
    plans.check_target(out, force)
    if recipe.type == "fp8" and not how.fp8:
        raise UsageError(f"--type fp8 is for NVIDIA GPUs; {target} computes int8 in 8 bits")
    if goal is not None and fmt.kernels:
        raise UsageError(
            f"--max-drop chooses single operations, and {target} runs both linears of a block in 8 bits or none; "
            "leave --max-drop out, and hold the artifact against fp32 with gate"
        )
    if recipe.tensorrt is not None and not fmt.ahead_of_time:
        raise UsageError(f"--target-gpu is for TensorRT, not for {target}")
    formats.require(fmt, build=True)
    return "fp8" if recipe.type == "fp8" else how.int8


def _sets(
    calibration: str,
    split: str | None,
    images: int | None,
    labelled: str | None,
    whole: sources.ImageSource | None,
    image_size: tuple[int, int],
) -> tuple[sources.ImageSource, sources.ImageSource, sources.ImageSource | None, sources.ImageSource | None]:
    """Disjoint images: to calibrate on, to judge corrections on, to select on, and for the final gate.

    Args:
        labelled, whole: the labelled images' name, and these with the model's own numbers.
    """
    if whole is None:
        source = open_images(calibration, split, images=(images or IMAGES) + HELD_OUT, image_size=image_size)
        there = len(source)
        if images is None:
            _require(source, LEAST_IMAGES)
            held_out = min(HELD_OUT, there // 5)
            images = min(IMAGES, there - held_out)
        else:
            _require(source, images + LEAST_HELD_OUT, f" (--images {images}, and {LEAST_HELD_OUT} held out)")
            held_out = min(HELD_OUT, there - images)
        first, held = sources.parts(source, (images, held_out))
        return first, held, None, None
    if calibration == labelled:
        images = images or (IMAGES if len(whole) >= 2 * IMAGES else len(whole) // 2)
        selection_size = min(SELECTION, (len(whole) - images) // 3)
        _require(whole, max(LEAST_IMAGES, images + 3), f" (--images {images}, and more to search and to judge on)")
        first, selection, final = sources.parts(whole, (images, selection_size, -1))
    else:
        source = open_images(calibration, split, images=images or IMAGES, image_size=image_size)
        _require(source, images or LEAST_IMAGES)
        first = sources.parts(source, (images or min(IMAGES, len(source)),))[0]
        selection, final = sources.parts(whole, (min(SELECTION, len(whole) // 3), -1))
    return first, sources.subset(selection, HELD_OUT), selection, final


def _require(source: sources.ImageSource, least: int, why: str = "") -> None:
    if len(source) < least:
        raise DataError(f"{source.name} has {len(source)} images; at least {least} are needed{why}, give more")


def _weight_bits(
    asked: WeightBits | None, target: Target, how: EightBits, kind: OperationType, *, searching: bool
) -> WeightBits:
    """The bits of the weights: as asked, or what this machine multiplies exactly and fast.

    Raises:
        UsageError: 7 bits where nothing can saturate, or a search with 8 bits where that does.
    """
    if asked == 7 and kind != "u8s8":
        raise UsageError(f"--weight-bits 7 is for targets that multiply u8 by s8; {target} multiplies {kind}")
    exact = saturation.bits_for(kind)
    if searching and asked == 8 and exact == 7 and how.saturates:
        raise UsageError(
            f"--weight-bits 8 saturates with {target} on this CPU (x86 without VNNI), where the search runs; "
            "leave it out, or search with --target native"
        )
    return asked or exact


def _check_identity(folder: Path, *facts: object) -> None:
    """Make the folder; refuse one that holds the unfinished search of something else, or no search at all."""
    path, identity = folder / "identity.json", msgspec.json.encode(facts)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        write_file(path, identity)
    elif not path.is_file():
        raise UsageError(f"{folder} holds no search of `quantize`; remove it or choose another --out")
    elif path.read_bytes() != identity:
        raise UsageError(f"{folder} is of another search; remove it or choose another --out")
