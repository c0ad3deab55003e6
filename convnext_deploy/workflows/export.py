"""`export`: the only place that knows the order of its steps."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import arguments, formats
from ..accuracy import probes, targets
from ..artifact import licences, manifest
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions
from ..data import preprocess
from ..data.image_source import ImageSource
from ..errors import UsageError
from ..models import provenance
from ..models.source import Source
from ..records.base import STRIDE, KernelChoice, Precision, Task
from ..records.manifest import (
    ExportRequest,
    ExportSpec,
    ModelSpec,
    OracleRecord,
    Provenance,
)
from ..records.plan import Plan, QuantizationRecord

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..models.checkpoint import Loaded
    from ..quantization.plan import LoadedPlan
    from . import build
    from .evaluate import Images

Pixels = NDArray[np.uint8]  # (N, C, H, W)
Say = Callable[[str], None]

# How long the steps take beside each other, about; of building each format says it.
STEPS = {"loading the checkpoint": 1.0, "computing the reference in fp32": 1.0, "folding": 0.5, "verifying": 1.0}
NEARLY = 95  # percent that a splice has behind it where its ConvNeXt is exported
BUILD_SPACE = 3  # times the fp32 weights: the artifact, and what converters write beside it


def silent(_: str) -> None:
    """Default for `say`."""


class Steps:
    """Says each step as it begins, and tells `progress` how much of the whole is behind it, in percent."""

    def __init__(self, fmt: "Format", say: Say, progress: arguments.Progress | None) -> None:
        self._fmt, self._say, self._progress = fmt, say, progress
        self._whole, self._done, self._at = sum(STEPS.values()) + fmt.builds_in, 0.0, 0.0

    def begin(self, step: str) -> None:
        self._say(step)
        self._done += self._at
        self._at = STEPS[step]
        self._tell(step)

    def build(self) -> None:
        """Likewise, of what the build itself says."""
        self._done += self._at
        self._at = self._fmt.builds_in
        self._tell(f"building {self._fmt.name}")

    def _tell(self, step: str) -> None:
        if self._progress is not None:
            self._progress(round(100 * self._done / self._whole), 100, step)


def export(
    source: Source,
    request: ExportRequest,
    *,
    plan: "LoadedPlan | None" = None,
    kernels: KernelChoice = "none",
    out: Path | None = None,
    force: bool = False,
    verify_data: str | ImageSource | None = None,
    checked_on: "Images | None" = None,
    class_names: Path | None = None,
    refit_from: Path | None = None,
    say: Say = silent,
    progress: arguments.Progress | None = None,
) -> Artifact:
    """The steps of `api.export`, on arguments that are checked.

    Args:
        plan: whose `rest` is the request's precision.
        checked_on: labelled images that tell whether what is assumed, or given, of the checkpoint's images fits.
        class_names: file of the model's class names, which go into the artifact.

    Raises:
        UsageError: anything that can be refused before the work.
        CheckFailed: the artifact was built and is wrong; it is in `<out>.rejected`.
    """
    fmt = formats.get(request.format)
    _refuse_early(fmt, request, source.task, plan, kernels)
    if out is not None:
        manifest.check_target(out, force)
    steps = Steps(fmt, say, progress)
    steps.begin("loading the checkpoint")
    loaded = source.load()
    if class_names is not None:
        loaded = _named(loaded, class_names)
    if loaded.weights.licence:
        say(f"licence of the weights: {licences.words(loaded.weights.licence)}")
    if loaded.note:
        say(loaded.note)
    for line in provenance.lines(loaded.provenance):
        say(line)
    model = loaded.model.spec
    if request.argmax and model.num_classes == 1:
        raise UsageError(f"--argmax: {targets.ONE_CLASS}")
    if model.detection is not None and request.input == "uint8":
        _refuse_filling(model, request.dynamic_image_size)
    if plan is not None:
        from ..quantization.apply import check

        check(plan, loaded.model, loaded.weights.tensors_sha256, request.input)
    name = (plan.plan.eight_bits if plan else None) or request.precision
    target = out or Path("build") / f"{model.architecture}-{fmt.name}-{name}"
    manifest.check_target(target, force)
    _refuse_without_space(target, sum(p.numel() for p in loaded.model.parameters()) * 4)
    if checked_on is not None:
        from . import assumptions

        judged = assumptions.check(loaded, checked_on, say, progress)
        loaded = replace(loaded, provenance=loaded.provenance | judged)
    from . import build

    steps.begin("computing the reference in fp32")
    sets = probes.of_source(loaded, request.dynamic_image_size, verify_data)
    judge = _oracle(loaded, sets[0], say)
    with manifest.staged(target, say) as folder:
        steps.begin("folding")
        prepared = _prepared(fmt, request, loaded, sets, judge, plan, kernels, refit_from, say)
        steps.build()
        made = build.built(fmt, prepared, folder)
        del loaded, prepared  # the source's weights; the runtime brings its own copy
        steps.begin("verifying")
        record = build.verified(fmt, made, folder, target, reload=source.load)
        (folder / manifest.MANIFEST_NAME).write_bytes(manifest.encode(record))
    build.remember(fmt, target, manifest.MANIFEST_NAME, say)
    return manifest.read(target)


def _named(loaded: "Loaded", file: Path) -> "Loaded":
    """With the class names of a file, in the order of the outputs.

    Raises:
        UsageError: no classifier, or names of other outputs than the model has.
    """
    from ..data import numbering

    model = loaded.model.spec
    if model.task not in ("classify", "segment", "detect"):
        raise UsageError(f"--labels {file} names classes, and the task is {model.task}; leave it out")
    count = 2 if model.problem == "binary" else model.num_classes
    labels = numbering.names_of(file, count)
    said = {"labels": Provenance(value=f"{len(labels)} names", how="given", source="--labels")}
    return replace(loaded, labels=labels, provenance=loaded.provenance | said)


def _refuse_early(
    fmt: "Format", request: ExportRequest, task: Task, plan: "LoadedPlan | None", kernels: KernelChoice
) -> None:
    """Everything that can be refused before any work."""
    if task not in fmt.tasks:
        able = formats.having(lambda other: task in other.tasks)
        raise UsageError(
            f"format {fmt.name} does not take --task {task}: {NOT_TAKEN[task]}; "
            f"take {able}, or export the maps before the head with --task features"
        )
    if request.argmax and task != "segment":
        raise UsageError(f"--argmax is for the pixels of --task segment, not for --task {task}; leave it out")
    if task == "detect" and plan is not None:
        raise UsageError("--plan: a detector's head takes no plan yet; export it in fp32, fp16 or bf16")
    if request.precision not in fmt.precisions:
        raise UsageError(f"format {fmt.name} has no {request.precision}; it has {', '.join(sorted(fmt.precisions))}")
    formats.refuse_device(fmt, request.device)
    if request.tensorrt is not None and not fmt.ahead_of_time:
        raise UsageError(f"format {fmt.name} takes no TensorRT options; use --format trt")
    formats.require(fmt, build=True)
    if fmt.refuse is not None:
        fmt.refuse(request, plan.plan if plan else None)
    if request.device != "cpu" and not fmt.ahead_of_time:
        from ..runtimes.torch_session import check_device

        check_device(RunOptions(device=request.device))
    _refuse_kernels(fmt, request, kernels, plan)


# Why a format does not take a task with a head.
NOT_TAKEN: dict[Task, str] = {
    "segment": "it has no engine for the head's 3x3 convolutions and resizing that was tried",
    "detect": "it has no operator in which boxes suppress each other that was tried",
}


def _refuse_filling(model: ModelSpec, dynamic_image_size: bool) -> None:
    """Refuse raw pixels where images have to be filled up: with the mean, which is no whole number.

    Raises:
        UsageError: sides that are no multiples of 32.
    """
    height, width = model.image_size
    if dynamic_image_size or height % STRIDE or width % STRIDE:
        size = "any size" if dynamic_image_size else f"{height}x{width}"
        raise UsageError(
            f"--input uint8 with images of {size}: a detector fills up sides to multiples of {STRIDE}; expected such "
            f"sides, as with --image-size {-(-height // STRIDE) * STRIDE}x{-(-width // STRIDE) * STRIDE}, or float32"
        )


def _refuse_kernels(fmt: "Format", request: ExportRequest, kernels: KernelChoice, plan: "LoadedPlan | None") -> None:
    if kernels == "none":
        if fmt.kernels and plan is not None and plan.plan.eight_bits is not None:
            raise UsageError(f"format {fmt.name} computes in 8 bits in the fused kernels only; add --kernels all")
        return
    if not fmt.kernels:
        able = formats.having(lambda other: other.kernels)
        raise UsageError(f"format {fmt.name} cannot run the fused kernels; these can: {able}")
    from ..kernels import choice

    choice.refuse(request, kernels, plan.plan if plan else None)


def plan_for(
    fmt: "Format", plan: "arguments.Location | LoadedPlan | None", precision: Precision | None
) -> "LoadedPlan | None":
    """The plan as read, if it is for this format and precision.

    Raises:
        UsageError: it is for another, or is no plan.
    """
    if plan is None:
        return None
    from ..quantization.plan import LoadedPlan, read

    loaded = plan if isinstance(plan, LoadedPlan) else read(arguments.path("plan", plan, "a plan of `quantize`"))
    target, rest, format = loaded.plan.target, loaded.plan.rest, fmt.name
    how = None if loaded.plan.eight_bits is None else formats.eight_bits_of(target)
    same = format == target or (fmt.eight_bits is not None and fmt.eight_bits.computes_as(how))
    if how is not None and not same:
        raise UsageError(f"the plan is for {target}, not for {format}; run quantize with --target {format}")
    if rest != "fp32" and _kept(loaded.plan) and not fmt.typed_graph:
        raise UsageError(
            f"the plan keeps operations in fp32 and format {format} chooses one float type for the whole model; "
            "take a format with a typed graph, such as onnx, or --precision fp32"
        )
    if precision not in (None, rest):
        raise UsageError(f"--precision {precision}, but the plan leaves the rest in {rest}; leave --precision out")
    return replace(loaded, eight_bits=how)


def _quantization(fmt: "Format", loaded: "LoadedPlan | None", model: ModelSpec) -> QuantizationRecord | None:
    """What the manifest says of a plan."""
    if loaded is None:
        return None
    from ..models.costs import share_of

    plan = loaded.plan
    types = [operation.type for operation in plan.operations.values()]
    return QuantizationRecord(
        plan_sha256=loaded.sha256,
        target=plan.target,
        operations={name: types.count(name) for name in plan.types},
        kept_share=share_of(model, _kept(plan)),
        weight_bits=plan.weight_bits,
        calibration=plan.calibration,
        saturation=None if fmt.own_network else plan.saturation,  # whose engine is exact everywhere
    )


def _kept(plan: Plan) -> list[str]:
    """The operations that a plan keeps in fp32."""
    return [name for name, operation in plan.operations.items() if operation.type == "fp32"]


def _refuse_without_space(target: Path, weight_bytes: int) -> None:
    folder = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < BUILD_SPACE * weight_bytes:
        raise UsageError(
            f"{folder} has {free / 1e6:.0f} MB free; building needs up to {BUILD_SPACE * weight_bytes / 1e6:.0f} MB"
        )


def _oracle(loaded: "Loaded", probe: probes.Probe, say: Say) -> OracleRecord:
    """What the source's own library says of the loaded module, on the first images."""
    from ..accuracy import oracle

    images = preprocess.as_input(probe.pixels[: probes.CHUNK], loaded.preprocessing, "float32").astype(np.float32)
    outputs = tuple(output[: probes.CHUNK] for output in probe.expected)
    from . import onnx_oracle

    judge = onnx_oracle.judge if onnx_oracle.knows(loaded) else oracle.judge
    record = judge(loaded, images, outputs)
    say(f"compared with {record.name}" + (f": {record.why}" if record.why else ""))
    return record


def _prepared(
    fmt: "Format",
    request: ExportRequest,
    loaded: "Loaded",
    sets: tuple[probes.Probe, ...],
    judge: OracleRecord,
    plan: "LoadedPlan | None",
    kernels: KernelChoice,
    refit_from: Path | None,
    say: Say,
) -> "build.Prepared":
    """The module rewritten to its final form, in the order that every later step relies on."""
    import torch

    from ..graph.capture import DeployGraph
    from ..graph.module_contents import expected_of
    from ..models import passes
    from . import build

    model = loaded.model
    probe = sets[0].pixels[: probes.CHUNK]
    uint8 = loaded.preprocessing if request.input == "uint8" else None
    beside = sets[0].expected
    records = passes.fold(model, uint8, lambda m: probes.tensors(loaded, m, probe, beside))
    kept: list[str] = []
    if plan is not None:
        from ..quantization.apply import apply

        say("quantizing")
        apply(model, plan)
        kept = _kept(plan.plan)
        if len(kept) < len(plan.plan.operations):
            sets = probes.with_simulation(loaded, model, sets)
    passes.cast_parameters(model, request.precision if fmt.typed_graph else "fp32", kept)
    parts: tuple[str, ...] = ()
    if kernels != "none":
        from ..kernels import choice

        parts = choice.chosen(model, request, kernels, say)
    spec = ExportSpec(
        **msgspec.structs.asdict(request), quantization=_quantization(fmt, plan, model.spec), kernels=parts
    )
    sets = probes.with_type(loaded, model, sets, spec, fmt.typed_graph)
    # A batch of 1 would make torch.export take a dynamic batch for a constant. Kernels get the tiles of the traced one.
    traced = spec.batch.opt if spec.kernels else spec.batch.min
    size = spec.batch.opt if spec.batch.min == spec.batch.max else max(2, traced)
    repeated = probe[np.arange(size) % len(probe)]
    example = torch.from_numpy(probes.as_input(loaded, model, repeated))
    place = "cpu" if fmt.ahead_of_time else spec.device
    model.to(place)
    reference = None
    if fmt.read_back is not None:
        reference = expected_of(model, halved=not fmt.typed_graph and spec.precision == "fp16")
    if spec.kernels:
        from ..kernels.use import use_kernels  # which looks for triton

        use_kernels(model, spec.kernels)
    if spec.argmax:
        passes.put_out_classes(model)
    if model.detector is not None:
        passes.put_out_detections(model)
    module = model if fmt.rewrite is None else fmt.rewrite(model)
    return build.Prepared(
        graph=DeployGraph(module=module, export=spec, example=example.to(place), say=say, refit_from=refit_from),
        sets=sets,
        weights=loaded.weights,
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        provenance=loaded.provenance,
        passes=records,
        oracle=judge,
        held=reference,
    )
