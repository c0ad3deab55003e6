"""`export`: the only place that knows the order of its steps."""

import datetime
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import arguments, env, formats
from ..accuracy import probes
from ..artifact import manifest, readback, trust, verify
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions, Session
from ..data import preprocess
from ..errors import ParityError, PrecisionError, UsageError
from ..quantization import saturation
from ..records.base import Device, InputKind, KernelChoice, Precision, Task
from ..records.manifest import (
    BatchRange,
    ExportSpec,
    Manifest,
    ModelSpec,
    OracleRecord,
    PrecisionTruth,
    ReadBack,
    TensorRtSpec,
)
from ..records.plan import Plan, QuantizationRecord

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..models.checkpoint import Loaded
    from ..quantization.plan import LoadedPlan

Pixels = NDArray[np.uint8]  # (N, C, H, W)
Say = Callable[[str], None]

PROBE_IMAGES = probes.IMAGES
BUILD_SPACE = 3  # times the fp32 weights: the artifact, and what converters write beside it


def silent(_: str) -> None:
    """Default for `say`."""


def export(
    weights: arguments.Location | None = None,
    *,
    variant: str | None = None,
    format: str = "onnx",
    out: arguments.Location | None = None,
    precision: Precision | None = None,
    input: InputKind = "float32",
    batch: arguments.Batch | None = None,
    image_size: arguments.ImageSize | None = None,
    dynamic_image_size: bool = False,
    task: Task = "classify",
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    verify_data: arguments.Location | None = None,
    device: Device | None = None,
    force: bool = False,
    say: Say = silent,
    tensorrt: TensorRtSpec | None = None,
    trt: str = "auto",
    refit_from: arguments.Location | None = None,
    plan: "arguments.Location | LoadedPlan | None" = None,
    kernels: KernelChoice = "none",
) -> Artifact:
    """Turn a checkpoint into a verified artifact.

    Args:
        weights: file, folder, timm name, `hf-hub:owner/name`, or "random"; None takes `variant`'s published ones.
        variant: which ConvNeXt; None infers it from the tensors.
        format: one of `formats.names()`, or "trt": TensorRT or TensorRT-RTX, as `trt` says.
        out: the artifact's folder; None: `build/<architecture>-<format>-<precision>`.
        precision: None: fp32, or with a plan what it says of the operations that it does not name.
        input: "float32" takes normalized (N, C, H, W); "uint8" raw (N, H, W, C), with the normalization folded in.
        batch: sizes the artifact takes, one, (min, tuned for, max) or a `BatchRange`; None: (1, 8, 256).
        image_size: one number or (height, width), in pixels, multiples of 32; None: what the checkpoint says, else 224.
        dynamic_image_size: take any multiple of 32.
        preprocessing: fields of `records.manifest.Preprocessing` (mean, std, interpolation, crop_pct, crop_mode) that
            override what stands beside the checkpoint; a plain state dict says nothing about them. One number for
            `mean` or `std` is for every channel.
        verify_data: more images to verify on (anything `data.sources.open_source` reads), beside the bundled ones.
        device: where the artifact is built for and verified on; None: the CPU, or CUDA where the format needs it.
        force: replace an artifact that exists.
        say: told what is being done, a line a step.
        tensorrt: what only TensorRT and TensorRT-RTX are told.
        trt: with format "trt": "tensorrt", "rtx", or "auto".
        refit_from: an engine that gets these weights, instead of building one (see `refit`).
        plan: a plan of `quantize` for this checkpoint and format.
        kernels: this package's fused CUDA kernels: "measured" takes them where `kernels/measured.json` says that they
            are faster on the GPU here, "all" wherever they can run.

    Raises:
        UsageError: anything that can be refused before the work.
        CheckFailed: the artifact was built and is wrong; it lies in `<out>.rejected`.
    """
    arguments.check(
        variant=variant,
        format=format,
        precision=precision,
        input=input,
        image_size=image_size,
        dynamic_image_size=dynamic_image_size,
        task=task,
        num_classes=num_classes,
        in_chans=in_chans,
        weights_key=weights_key,
        preprocessing=preprocessing,
        device=device,
        force=force,
        say=say,
        tensorrt=tensorrt,
        trt=trt,
        kernels=kernels,
    )
    weights = arguments.maybe(arguments.weights, "weights", weights)
    out = arguments.maybe(arguments.path, "out", out)
    sizes = arguments.maybe(arguments.batch_range, "batch", batch) or BatchRange()
    image_size = arguments.maybe(arguments.image_size, "image_size", image_size)
    preprocessing = arguments.maybe(arguments.preprocessing, "preprocessing", preprocessing)
    verify_data = arguments.maybe(arguments.images, "verify_data", verify_data)
    refit_from = arguments.maybe(arguments.path, "refit_from", refit_from)
    from ..models import checkpoint as checkpoints

    if format == "trt":
        from ..runtimes.tensorrt import build

        format, why = build.choose(trt)
        say(why)
        tensorrt = msgspec.structs.replace(tensorrt or TensorRtSpec(), chosen=why)
    elif trt != "auto":
        raise UsageError(f"--trt {trt} is for --format trt, not for --format {format}")
    fmt = formats.get(format)
    chosen = _plan(plan, fmt, precision)
    precision = chosen.plan.rest if chosen else precision or "fp32"
    device = device or ("cpu" if "cpu" in fmt.devices else "cuda")
    spec = ExportSpec(
        format=format,
        precision=precision,
        input=input,
        batch=sizes,
        dynamic_image_size=dynamic_image_size,
        device=device,
        tensorrt=tensorrt,
        quantization=_quantization(chosen),
    )
    _refuse_early(fmt, spec, out, force)
    _refuse_kernels(fmt, spec, kernels, chosen)
    say("loading the checkpoint")
    reload = functools.partial(
        checkpoints.load,
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        num_classes=num_classes,
        in_chans=in_chans,
        weights_key=weights_key,
        preprocessing=preprocessing,
    )
    loaded = reload()
    if loaded.note:
        say(loaded.note)
    model = loaded.model.spec
    if chosen is not None:
        from ..quantization.apply import check

        check(chosen, loaded.model, loaded.weights.tensors_sha256, input)
        spec = msgspec.structs.replace(spec, quantization=_quantization(chosen, model))
    target = out or Path("build") / f"{model.architecture}-{format}-{spec.eight_bits or spec.precision}"
    manifest.check_target(target, force)
    _refuse_without_space(target, sum(p.numel() for p in loaded.model.parameters()) * 4)
    say("computing the reference in fp32")
    sets = probes.of_source(loaded, spec, verify_data)
    judge = _oracle(loaded, sets[0], say)
    with manifest.staged(target, say) as folder:
        found, opened, sets = _build(fmt, spec, loaded, sets, folder, say, refit_from, chosen, kernels)
        del loaded  # the source's weights; the runtime brings its own copy
        say("verifying")
        session = opened(found)
        parity, truth = probes.judged(session, found, sets, reload), session.precision()
        record = msgspec.structs.replace(
            found, parity=parity, precision=truth, oracle=judge, files=manifest.file_records(folder)
        )
        _judge(record, fmt, folder, target)
        (folder / manifest.MANIFEST_NAME).write_bytes(manifest.encode(record))
    made = manifest.read(target)
    unrecorded = trust.remember(made.sha256) if fmt.runs_code else None
    if unrecorded is not None:
        say(f"not recorded as built by you, so that opening it needs --trust: {unrecorded}")
    return made


def _refuse_early(fmt: "Format", spec: ExportSpec, out: Path | None, force: bool) -> None:
    """Everything that can be refused before any work."""
    if spec.precision not in fmt.precisions:
        raise UsageError(f"format {fmt.name} has no {spec.precision}; it has {', '.join(sorted(fmt.precisions))}")
    formats.refuse_device(fmt, spec.device)
    if spec.tensorrt is not None and not fmt.ahead_of_time:
        raise UsageError(f"format {fmt.name} takes no TensorRT options; use --format trt")
    formats.require(fmt, build=True)
    if fmt.refuse is not None:
        fmt.refuse(spec)
    if spec.device != "cpu" and not fmt.ahead_of_time:
        from ..runtimes.torch_session import check_device

        check_device(RunOptions(device=spec.device))
    if out is not None:
        manifest.check_target(out, force)


def _refuse_kernels(fmt: "Format", spec: ExportSpec, kernels: KernelChoice, chosen: "LoadedPlan | None") -> None:
    if kernels == "none":
        if fmt.kernels and spec.quantization is not None and set(spec.quantization.operations) - {"fp32"}:
            raise UsageError(f"format {fmt.name} computes in 8 bits in the fused kernels only; add --kernels all")
        return
    if not fmt.kernels:
        able = ", ".join(name for name in formats.names() if formats.get(name).kernels)
        raise UsageError(f"format {fmt.name} cannot run the fused kernels; these can: {able}")
    from ..kernels import choice

    choice.refuse(spec, kernels, chosen.plan if chosen else None)


def _plan(
    plan: "arguments.Location | LoadedPlan | None", fmt: "Format", precision: Precision | None
) -> "LoadedPlan | None":
    """The plan as read, if it is for this format and precision."""
    if plan is None:
        return None
    from ..quantization.plan import ALIKE, LoadedPlan, quantized, read

    chosen = plan if isinstance(plan, LoadedPlan) else read(arguments.path("plan", plan, "a plan of `quantize`"))
    target, rest, format = chosen.plan.target, chosen.plan.rest, fmt.name
    same = format == target or any({format, target} <= alike for alike in ALIKE)
    if quantized(chosen.plan) and not same:
        raise UsageError(f"the plan is for {target}, not for {format}; run quantize with --target {format}")
    if rest != "fp32" and _kept(chosen.plan) and not fmt.typed_graph:
        raise UsageError(
            f"the plan keeps operations in fp32 and format {format} chooses one float type for the whole model; "
            "take a format with a typed graph, such as onnx, or --precision fp32"
        )
    if precision not in (None, rest):
        raise UsageError(f"--precision {precision}, but the plan leaves the rest in {rest}; leave --precision out")
    return chosen


def _quantization(chosen: "LoadedPlan | None", model: ModelSpec | None = None) -> QuantizationRecord | None:
    """What the manifest says of a plan; the share that stays in fp32 is known once the model is."""
    if chosen is None:
        return None
    from ..models.convnext import share_of

    plan = chosen.plan
    types = [operation.type for operation in plan.operations.values()]
    return QuantizationRecord(
        plan_sha256=chosen.sha256,
        target=plan.target,
        operations={name: types.count(name) for name in dict.fromkeys(types)},
        kept_share=share_of(model, _kept(plan)) if model else 0.0,
        weight_bits=plan.weight_bits,
        calibration=plan.calibration,
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
    record = oracle.judge(loaded, images, tuple(output[: probes.CHUNK] for output in probe.expected))
    say(f"compared with {record.name}" + (f": {record.why}" if record.why else ""))
    return record


def _build(
    fmt: "Format",
    spec: ExportSpec,
    loaded: "Loaded",
    sets: tuple[probes.Probe, ...],
    folder: Path,
    say: Say,
    refit_from: Path | None = None,
    chosen: "LoadedPlan | None" = None,
    kernels: KernelChoice = "none",
) -> tuple[Manifest, Callable[[Manifest], Session], tuple[probes.Probe, ...]]:
    """Rewrite, capture and build.

    Returns:
        The manifest so far, what opens the result (or its stand-in) for verification, and the sets of images with
        the simulations' outputs.
    """
    import torch

    from ..graph.capture import DeployGraph, input_record, output_records
    from ..graph.module_contents import expected_of
    from ..models import passes

    model = loaded.model
    say("folding")
    probe = sets[0].pixels[: probes.CHUNK]
    uint8 = loaded.preprocessing if spec.input == "uint8" else None
    records = passes.fold(model, uint8, lambda m: probes.tensors(loaded, m, probe))
    kept: list[str] = []
    if chosen is not None:
        from ..quantization.apply import apply

        say("quantizing")
        apply(model, chosen)
        kept = _kept(chosen.plan)
        if len(kept) < len(chosen.plan.operations):
            sets = probes.with_simulation(loaded, model, sets)
    passes.cast_parameters(model, spec.precision if fmt.typed_graph else "fp32", kept)
    sets = probes.with_type(loaded, model, sets, spec, fmt.typed_graph)
    if kernels != "none":
        from ..kernels import choice

        spec = msgspec.structs.replace(spec, kernels=choice.chosen(model, spec, kernels, say))
    # A batch of 1 would make torch.export take a dynamic batch for a constant. Kernels get the tiles of the traced one.
    traced = spec.batch.opt if spec.kernels else spec.batch.min
    size = spec.batch.opt if spec.batch.min == spec.batch.max else max(2, traced)
    repeated = probe[np.arange(size) % len(probe)]
    example = torch.from_numpy(probes.as_input(loaded, model, repeated))
    place = "cpu" if fmt.ahead_of_time else spec.device
    graph = DeployGraph(module=model.to(place), export=spec, example=example.to(place), say=say, refit_from=refit_from)
    say(f"building {fmt.name}")
    held = (
        None if fmt.read_back is None else expected_of(model, halved=not fmt.typed_graph and spec.precision == "fp16")
    )
    stand_in = fmt.build(graph, folder)
    found = Manifest(
        schema_version=1,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool=f"convnext-deploy {env.version()}",
        model=model.spec,
        weights=loaded.weights,
        preprocessing=loaded.preprocessing,
        labels=loaded.labels,
        export=spec,
        inputs=(input_record(model.spec, spec),),
        outputs=output_records(model.spec, spec),
        passes=records,
        parity=(),
        precision=PrecisionTruth(graph={}),
        versions=env.versions(),
        machine=env.machine(),
        files=(),
        read_back=_read_back(fmt, held, folder),
    )
    if stand_in is None:  # which may run the program
        graph.release()
    opened = stand_in or (lambda manifest: fmt.load(folder, manifest, RunOptions(device=spec.device)))
    return found, opened, sets


def _read_back(fmt: "Format", held: readback.Expected | None, folder: Path) -> ReadBack:
    """The built files beside the module that they were built from."""
    if fmt.read_back is None or held is None:
        return ReadBack(tensors=0, epsilons=None, activations=None, unread=f"{fmt.name}'s files cannot be read back")
    return readback.differences(fmt.read_back(folder), held)


def _judge(record: Manifest, fmt: "Format", folder: Path, target: Path) -> None:
    """Keep a wrong artifact aside, with its report, and raise."""
    wrong = [f"on {parity.images}: {failure}" for parity in record.parity for failure in parity.failures]
    wrong += record.read_back.failures if record.read_back else ()
    imprecise = verify.precision_failures(record.precision, record, fmt.typed_graph, engine=fmt.ahead_of_time)
    if not wrong and not imprecise:
        return
    rejected = target.absolute().with_name(target.name + ".rejected")
    (folder / manifest.REJECTED_NAME).write_bytes(manifest.encode(record))
    in_the_way = manifest.not_ours(rejected, manifest.REJECTED_NAME) if os.path.lexists(rejected) else None
    where = f"kept aside in {rejected}" if in_the_way is None else f"not kept aside: {in_the_way}"
    if in_the_way is None:
        manifest.replace(folder, rejected, manifest.REJECTED_NAME)
    # The tolerances are those of the precision that was asked for: where another ran, the outputs are its consequence.
    error = PrecisionError if imprecise else ParityError
    cause = saturation.cause(record)
    likely = () if cause is None else (cause,)
    raise error(f"{'; '.join((*likely, *imprecise, *wrong))}; {where}")
