"""A checkpoint and images to a plan: `quantize`, drafted at once or searched for under an accuracy budget; `half`."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from .. import arguments, env, formats
from ..artifact import manifest
from ..artifact.manifest import Artifact, write_file
from ..artifact.trust import built_here
from ..data import numbering, preprocess, sources
from ..errors import CheckFailed, DataError, UsageError
from ..models import passes
from ..quantization import plan as plans
from ..quantization import saturation
from ..quantization.apply import apply
from ..quantization.calibrate import open_images, report
from ..quantization.distance import outputs, pixels_of
from ..quantization.draft import prepare
from ..quantization.half import half_plan
from ..quantization.plan import LoadedPlan
from ..records.base import InputKind, PlanType, Precision, Task
from ..records.manifest import BatchRange, TensorRtSpec
from ..records.plan import (
    HalfPrecision,
    HalfReport,
    OperationType,
    Plan,
    RangeMethod,
    SearchResult,
    Target,
    WeightBits,
)
from ..reports import plots
from .export import Say, export, silent
from .search import Budget, Workbench, search

IMAGES = 512  # to calibrate on, where so many are there
HELD_OUT = 128  # images that corrections are judged on, where no labelled ones are given
LEAST_IMAGES = 32  # of all that a calibration needs: to calibrate on and to hold out
LEAST_HELD_OUT = 8  # with fewer the error of a mean difference says nothing
SELECTION = 2000  # images of labelled data that a search selects on; at most a third of them
PROBE = 4  # images that folding is checked on
KINDS = ("expand", "project")  # what runs in 8 bits where nothing is searched for

Progress = Callable[[str], Callable[[int, int], None]]


def no_progress(_: str) -> Callable[[int, int], None]:
    return lambda done, total: None


@env.missing_named()
def quantize(
    weights: arguments.Location | None = None,
    *,
    out: arguments.Location,
    calibration: arguments.Location,
    target: Target,
    variant: str | None = None,
    type: PlanType = "int8",
    method: RangeMethod = "mse",
    images: int | None = None,
    split: str | None = None,
    rest: Precision | None = None,
    input: InputKind = "float32",
    image_size: arguments.ImageSize | None = None,
    task: Task = "classify",
    preprocessing: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    rounding: bool = False,
    weight_bits: WeightBits | None = None,
    data: arguments.Location | None = None,
    labels: arguments.Location | None = None,
    max_drop: float | None = None,
    alpha: float = 0.05,
    batch: int = 1,
    threads: int | None = None,
    tensorrt: TensorRtSpec | None = None,
    force: bool = False,
    say: Say = silent,
    progress: Progress = no_progress,
) -> tuple[Plan, SearchResult | None]:
    """Write the plan that `export(plan=...)` builds 8-bit artifacts from.

    Without `max_drop`: the linears of all blocks in 8 bits. With it: the fastest plan whose top-1 drop on labelled
    `data` is below it, as measured on this machine and runtime (see `search`).

    Args:
        weights, variant, image_size, task, preprocessing, weights_key, input: as for `export`.
        out: `<name>.json`; tensors go to `<name>.safetensors`, ranges, clip rates and outliers of every tensor to
            `<name>.calibration.json`, what a search measured to `<name>.search.json` and, drawn, `<name>.search.svg`.
        calibration: real images, labels not needed; "random" is noise, and is marked as such.
        target: the format that the plan is for.
        method: how ranges are chosen (`records.plan.RangeMethod`).
        images: how many are calibrated on; None: 512, or four fifths of a source with fewer than 640 (at least 32).
        rest: the type of everything else; None: fp32, on GPUs fp16.
        rounding: try GPTQ for the weights.
        weight_bits: 7 keeps u8 by s8 products from saturating on x86 without VNNI; None: what `target` multiplies
            exactly on this machine (see `saturation`).
        data: labelled images that a search judges on, as for `evaluate`.
        labels: the model's class names, as for `evaluate`.
        max_drop: percentage points of top-1.
        batch: the batch whose latency counts.
        tensorrt: for a search with `target` tensorrt or tensorrt_rtx.

    Raises:
        UsageError: what can be refused before the work.
        CheckFailed: a search found no plan that is faster and passes; its `<name>.search.json` says why.
    """
    arguments.check(
        target=target,
        variant=variant,
        type=type,
        method=method,
        images=images,
        split=split,
        rest=rest,
        input=input,
        image_size=image_size,
        task=task,
        preprocessing=preprocessing,
        weights_key=weights_key,
        rounding=rounding,
        weight_bits=weight_bits,
        max_drop=max_drop,
        alpha=alpha,
        threads=threads,
        tensorrt=tensorrt,
        force=force,
        say=say,
        progress=progress,
    )
    weights = arguments.maybe(arguments.weights, "weights", weights)
    out = arguments.path("out", out)
    calibration = arguments.images("calibration", calibration)
    data = arguments.maybe(arguments.images, "data", data)
    labels = arguments.maybe(arguments.path, "labels", labels)
    size = arguments.maybe(arguments.image_size, "image_size", image_size)
    batch = arguments.whole("batch", batch)
    preprocessing = arguments.maybe(arguments.preprocessing, "preprocessing", preprocessing)
    from ..models import checkpoint as checkpoints

    if labels is not None and data is None:
        raise UsageError(f"labels {labels} are those of labelled images; give data too, or leave labels out")
    classes = numbering.class_map(labels) if labels is not None else None
    kind = _refuse_early(out, target, type, max_drop, data, alpha, batch, force, tensorrt)
    bits = _weight_bits(weight_bits, target, kind, searching=max_drop is not None)
    rest = rest or ("fp16" if target in plans.GPU_TARGETS else "fp32")
    say("loading the checkpoint")
    loaded = checkpoints.load(
        weights,
        variant=variant,
        task=task,
        image_size=size,
        weights_key=weights_key,
        preprocessing=preprocessing,
    )
    if loaded.note:
        say(loaded.note)
    model, facts = loaded.model, loaded.preprocessing
    folder = out.with_suffix(".search") if max_drop is not None else None
    whole = None
    if data is not None:
        whole = numbering.numbered(sources.open_source(data), model.spec.num_classes, loaded.labels, classes)
    source, held_out, selection, final = _sets(calibration, split, images, data, whole, model.spec.image_size)
    images = len(source)
    say(f"{images} images to calibrate on, {len(held_out)} held out to judge corrections on")
    if folder is not None:
        chosen = (calibration, split, data, target, type, method, images, input, rest, rounding, batch, bits)
        _check_identity(folder, loaded.weights.tensors_sha256, *chosen)

    say("folding")
    pixels = pixels_of(held_out, facts, model)
    passes.fold(model, facts if input == "uint8" else None, lambda m: outputs(m, pixels[:PROBE], facts))
    drafted = prepare(
        model,
        source,
        pixels,
        [name for name in plans.products(model) if folder is not None or plans.kind_of(name) in KINDS],
        preprocessing=facts,
        target=target,
        type=kind,
        method=method,
        input=input,
        rest=rest,
        weights_sha256=loaded.weights.tensors_sha256,
        weight_bits=bits,
        images=images,
        rounding=rounding,
        resume=None if folder is None else folder / "calibration.safetensors",
        say=say,
        progress=progress("calibrating"),
    )
    assert drafted.calibration is not None
    ranges = report(drafted.calibration, method, plans.SCHEMES[kind])
    write_file(out.with_suffix(".calibration.json"), manifest.encode(ranges))
    if folder is None or max_drop is None or selection is None or final is None:
        return plans.write(out, drafted.plan, drafted.tensors), None

    def build(path: Path, plan: LoadedPlan | None, precision: Precision | None) -> Artifact:
        if (path / manifest.MANIFEST_NAME).exists():
            found = manifest.verified(path)
            recorded = found.manifest.export.quantization
            ours = not formats.get(target).runs_code or built_here(found.sha256)
            if ours and (recorded.plan_sha256 if recorded else None) == (plan.sha256 if plan else None):
                return found
        return export(
            weights,
            variant=variant,
            format=target,
            out=path,
            precision=precision,
            plan=plan,
            input=input,
            batch=BatchRange(min=1, opt=batch, max=max(batch, 32)),
            image_size=size,
            task=task,
            preprocessing=preprocessing,
            weights_key=weights_key,
            tensorrt=tensorrt,
            force=True,
        )

    def simulated(plan: LoadedPlan | None) -> Any:
        changed = copy.deepcopy(model)
        if plan is not None:
            apply(changed, plan)
        return changed

    runs_here = not formats.get(target).ahead_of_time or bool(env.nvidia_gpus())
    bench = Workbench(
        folder=folder,
        build=build,
        simulation=None if runs_here else simulated,
        preprocessing=facts,
        selection=selection,
        final=final,
        threads=threads,
        say=say,
        progress=progress,
    )
    sizes = {"calibration": images, "selection": len(selection), "final": len(final)}
    budget = Budget(max_drop=max_drop, alpha=alpha, batch=batch)
    result, best = search(bench, model, drafted, pixels, budget, sizes)
    write_file(out.with_suffix(".search.json"), manifest.encode(result))
    if not env.missing(("matplotlib",)):  # of the extra `report`; the numbers are in the JSON
        drawn = plots.search(result)
        if drawn is not None:
            write_file(out.with_suffix(".search.svg"), drawn.encode())
    if best is None:
        raise CheckFailed(f"{result.why} (see {out.with_suffix('.search.json')})")
    return plans.write(out, best.plan, best.tensors), result


@env.missing_named()
def half(
    weights: arguments.Location | None = None,
    *,
    out: arguments.Location,
    data: arguments.Location,
    variant: str | None = None,
    precision: Literal["fp16", "bf16"] = "fp16",
    images: int = 64,
    split: str | None = None,
    input: InputKind = "float32",
    image_size: arguments.ImageSize | None = None,
    task: Task = "classify",
    preprocessing: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    force: bool = False,
    say: Say = silent,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Plan, HalfReport]:
    """Which operations overflow or lose their values in half precision, and the plan that keeps these in fp32.

    Args:
        weights, variant, image_size, task, preprocessing, weights_key, input: as for `export`.
        out: `<name>.json`, for `export(plan=...)`; `<name>.half.json` says why each operation is kept.
        data: real images, labels not needed.
        images: how many are looked at.

    Raises:
        UsageError: what can be refused before the work.
    """
    arguments.one_of("precision", precision, HalfPrecision)
    arguments.check(
        variant=variant,
        images=images,
        split=split,
        input=input,
        image_size=image_size,
        task=task,
        preprocessing=preprocessing,
        weights_key=weights_key,
        force=force,
        say=say,
        progress=progress,
    )
    weights = arguments.maybe(arguments.weights, "weights", weights)
    out = arguments.path("out", out)
    data = arguments.images("data", data)
    image_size = arguments.maybe(arguments.image_size, "image_size", image_size)
    preprocessing = arguments.maybe(arguments.preprocessing, "preprocessing", preprocessing)
    from ..models import checkpoint as checkpoints

    _refuse_target(out, force)
    source = open_images(data, split, images=images, image_size=image_size or (224, 224))
    say("loading the checkpoint")
    loaded = checkpoints.load(
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        weights_key=weights_key,
        preprocessing=preprocessing,
    )
    model, facts = loaded.model, loaded.preprocessing
    say("folding")
    pixels = preprocess.probe_images(model.spec.in_chans, model.spec.image_size, PROBE)
    passes.fold(model, facts if input == "uint8" else None, lambda m: outputs(m, pixels, facts))
    say(f"looking at {images} images of {source.name}")
    plan, found = half_plan(
        model,
        source,
        preprocessing=facts,
        weights_sha256=loaded.weights.tensors_sha256,
        rest=precision,
        images=images,
        progress=progress,
    )
    write_file(out.with_suffix(".half.json"), manifest.encode(found))
    return plans.write(out, plan, {}), found


def _refuse_target(out: Path, force: bool) -> None:
    """Refuse a plan's name that is taken, cannot be written, or would replace something else than a plan."""
    manifest.refuse_name(out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}; expected a name that ends in .json")
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another --out or give --force to replace it")
    manifest.check_file(out)
    plans.refuse_foreign(out)


def _refuse_early(
    out: Path,
    target: Target,
    type: PlanType,
    max_drop: float | None,
    data: str | None,
    alpha: float,
    batch: int,
    force: bool,
    tensorrt: TensorRtSpec | None,
) -> OperationType:
    """The operations' type; everything that can be refused before any work."""
    _refuse_target(out, force)
    if type == "fp8" and target not in plans.GPU_TARGETS:
        raise UsageError(f"--type fp8 is for NVIDIA GPUs; {target} computes int8 in 8 bits")
    if (max_drop is None) != (data is None):
        raise UsageError("--max-drop and --data belong together: the drop is measured on labelled images")
    if max_drop is not None and not 0 < max_drop <= 100:
        raise UsageError(f"--max-drop {max_drop}; expected percentage points above 0")
    if not 0 < alpha < 0.5 or batch < 1:
        raise UsageError(
            f"--alpha {alpha}, --batch {batch}; expected alpha between 0 and 0.5, and a batch of at least 1"
        )
    if max_drop is not None and target in plans.KERNELS:
        raise UsageError(
            f"--max-drop chooses single operations, and {target} runs both linears of a block in 8 bits or none; "
            "leave --max-drop out, and hold the artifact against fp32 with gate"
        )
    if tensorrt is not None and target not in plans.TENSORRT:
        raise UsageError(f"--target-gpu is for TensorRT, not for {target}")
    formats.require(formats.get(target), build=True)
    return "fp8" if type == "fp8" else plans.INT8[target]


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


def _weight_bits(asked: WeightBits | None, target: Target, kind: OperationType, *, searching: bool) -> WeightBits:
    """The bits of the weights: as asked, or what the target multiplies exactly here.

    Raises:
        UsageError: 7 bits where nothing can saturate, or a search with 8 bits where that does.
    """
    if asked == 7 and kind != "u8s8":
        raise UsageError(f"--weight-bits 7 is for targets that multiply u8 by s8; {target} multiplies {kind}")
    exact = saturation.bits_for(target, kind)
    if searching and asked == 8 and exact == 7:
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
