"""`export`: the only place that knows the order of its steps."""

import datetime
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import env, formats, manifest, preprocess, verify
from .errors import DataError, ParityError, PrecisionError, UsageError, WeightsError
from .manifest import Artifact
from .session import RunOptions, Session, run_in_batches
from .types import (
    BatchRange,
    Device,
    ExportSpec,
    InputKind,
    KernelChoice,
    Manifest,
    ModelSpec,
    Parity,
    Plan,
    Precision,
    PrecisionTruth,
    QuantizationRecord,
    Task,
    TensorRtSpec,
)

if TYPE_CHECKING:
    import torch

    from .formats.base import Format
    from .models.convnext import ConvNeXt
    from .models.weights import Loaded
    from .quantize.plan import LoadedPlan

Pixels = NDArray[np.uint8]  # (N, C, H, W)
Say = Callable[[str], None]

PROBE_IMAGES = 16
PROBE_CHUNK = 4  # images at once where the source computes its reference; bounds the memory of large variants
BUILD_SPACE = 3  # times the fp32 weights: the artifact, and what converters write beside it


def silent(_: str) -> None:
    """Default for `say`."""


def export(
    weights: str | None = None,
    *,
    variant: str | None = None,
    format: str = "onnx",
    out: str | Path | None = None,
    precision: Precision | None = None,
    input: InputKind = "float32",
    batch: BatchRange | None = None,
    image_size: tuple[int, int] | None = None,
    dynamic_image_size: bool = False,
    task: Task = "classify",
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    verify_data: str | None = None,
    device: Device | None = None,
    force: bool = False,
    say: Say = silent,
    tensorrt: TensorRtSpec | None = None,
    trt: str = "auto",
    refit_from: Path | None = None,
    plan: "Path | LoadedPlan | None" = None,
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
        batch: sizes the artifact takes; None: 1 to 256, tuned for 8.
        image_size: (height, width) in pixels, multiples of 32; None: what the checkpoint was trained at.
        dynamic_image_size: take any multiple of 32.
        preprocessing: fields of `types.Preprocessing` (mean, std, interpolation, crop_pct, crop_mode) that override
            what stands beside the checkpoint; a plain state dict says nothing about them.
        verify_data: more images to verify on (anything `data.open_source` reads), beside the bundled ones.
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
    from .models import weights as checkpoints

    if format == "trt":
        from .lower import nvinfer

        format, why = nvinfer.choose(trt)
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
        batch=batch or BatchRange(),
        dynamic_image_size=dynamic_image_size,
        device=device,
        tensorrt=tensorrt,
        quantization=_quantization(chosen),
    )
    _refuse_early(fmt, spec, Path(out) if out else None, force)
    _refuse_kernels(fmt, spec, kernels, chosen)
    say("loading the checkpoint")
    loaded = checkpoints.load(
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        num_classes=num_classes,
        in_chans=in_chans,
        weights_key=weights_key,
        preprocessing=preprocessing,
    )
    model = loaded.model.spec
    if chosen is not None:
        from .quantize.apply import check

        check(chosen, loaded.model, loaded.weights.tensors_sha256, input)
        spec = msgspec.structs.replace(spec, quantization=_quantization(chosen, model))
    target = Path(out) if out else Path("build") / f"{model.architecture}-{format}-{spec.eight_bits or spec.precision}"
    manifest.check_target(target, force)
    _refuse_without_space(target, sum(p.numel() for p in loaded.model.parameters()) * 4)
    sets = _probe_sets(loaded, verify_data)

    say("computing the reference in fp32")
    expected = {name: _reference(loaded, pixels) for name, pixels in sets.items()}
    with manifest.staged(target) as folder:
        found, opened, simulated = _build(fmt, spec, loaded, sets, folder, say, refit_from, chosen, kernels)
        del loaded  # the source's weights; the runtime brings its own copy
        say("verifying")
        parity, truth = _verified(opened(found), found, sets, expected, simulated)
        record = msgspec.structs.replace(found, parity=parity, precision=truth, files=manifest.file_records(folder))
        _judge(record, fmt, folder, target)
        (folder / manifest.MANIFEST_NAME).write_bytes(manifest.encode(record))
    return manifest.read(target)


def _refuse_early(fmt: "Format", spec: ExportSpec, out: Path | None, force: bool) -> None:
    """Everything that can be refused before any work."""
    if spec.precision not in fmt.precisions:
        raise UsageError(f"format {fmt.name} has no {spec.precision}; it has {', '.join(sorted(fmt.precisions))}")
    formats.refuse_device(fmt, spec.device)
    if not 1 <= spec.batch.min <= spec.batch.opt <= spec.batch.max:
        raise UsageError(f"batch {spec.batch.min}:{spec.batch.opt}:{spec.batch.max}; expected 1 <= min <= opt <= max")
    if spec.tensorrt is not None and not fmt.ahead_of_time:
        raise UsageError(f"format {fmt.name} takes no TensorRT options; use --format trt")
    formats.require(fmt)
    if fmt.refuse is not None:
        fmt.refuse(spec)
    if spec.device != "cpu" and not fmt.ahead_of_time:
        from .lower.torch_session import check_device

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
    from .kernels import choice

    choice.refuse(spec, kernels, chosen.plan if chosen else None)


def _plan(plan: "Path | LoadedPlan | None", fmt: "Format", precision: Precision | None) -> "LoadedPlan | None":
    """The plan as read, if it is for this format and precision."""
    if plan is None:
        return None
    from .quantize.plan import ALIKE, quantized, read

    chosen = read(plan) if isinstance(plan, Path) else plan
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
    from .models.convnext import share_of

    plan = chosen.plan
    types = [operation.type for operation in plan.operations.values()]
    return QuantizationRecord(
        plan_sha256=chosen.sha256,
        target=plan.target,
        operations={name: types.count(name) for name in dict.fromkeys(types)},
        kept_share=share_of(model, _kept(plan)) if model else 0.0,
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


def _probe_sets(loaded: "Loaded", verify_data: str | None) -> dict[str, Pixels]:
    """Name of each image set to its raw pixels (N, C, H, W)."""
    model = loaded.model.spec
    sets = {"bundled": preprocess.probe_images(model.in_chans, model.image_size, PROBE_IMAGES)}
    if verify_data is not None:
        from . import data

        source = data.open_source(verify_data)
        to_pixels = preprocess.transform(loaded.preprocessing, model.image_size, model.in_chans)
        chosen = data.subset(source, PROBE_IMAGES)
        try:
            sets[verify_data] = np.stack([to_pixels(chosen.read(index)) for index in range(len(chosen))])
        except OSError as error:
            raise DataError(f"--verify-data {verify_data} holds an image that cannot be read: {error}") from None
    return sets


def _reference(loaded: "Loaded", pixels: Pixels) -> verify.Outputs:
    """The source's outputs in fp32, before any rewrite.

    Raises:
        WeightsError: they are not finite.
    """
    outputs = tuple(output.numpy() for output in _outputs(loaded, loaded.model, pixels))
    wrong = sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs)
    if wrong:
        raise WeightsError(
            f"{wrong} of the outputs of {loaded.weights.source} are NaN or infinite before any rewrite; "
            "expected finite weights that float32 can compute with"
        )
    return outputs


def _outputs(loaded: "Loaded", model: "ConvNeXt", pixels: Pixels) -> "tuple[torch.Tensor, ...]":
    import torch

    chunks = []
    with torch.inference_mode():
        for start in range(0, len(pixels), PROBE_CHUNK):
            outputs = model(torch.from_numpy(_as_input(loaded, model.takes_uint8, pixels[start : start + PROBE_CHUNK])))
            chunks.append((outputs,) if isinstance(outputs, torch.Tensor) else outputs)
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def _as_input(loaded: "Loaded", uint8: bool, pixels: Pixels) -> NDArray[np.float32] | Pixels:
    return preprocess.as_input(pixels, loaded.preprocessing, "uint8" if uint8 else "float32")


def _build(
    fmt: "Format",
    spec: ExportSpec,
    loaded: "Loaded",
    sets: dict[str, Pixels],
    folder: Path,
    say: Say,
    refit_from: Path | None = None,
    chosen: "LoadedPlan | None" = None,
    kernels: KernelChoice = "none",
) -> tuple[Manifest, Callable[[Manifest], Session], dict[str, verify.Outputs]]:
    """Rewrite, capture and build.

    Returns:
        The manifest so far, what opens the result (or its stand-in) for verification, and the simulation's outputs
        on each set of images, if there is a plan that quantizes.
    """
    import torch

    from . import passes
    from .lower.capture import DeployGraph, input_record, output_records

    model = loaded.model
    say("folding")
    probe = next(iter(sets.values()))[:PROBE_CHUNK]
    uint8 = loaded.preprocessing if spec.input == "uint8" else None
    records = passes.fold(model, uint8, lambda m: _outputs(loaded, m, probe))
    simulated: dict[str, verify.Outputs] = {}
    kept: list[str] = []
    if chosen is not None:
        from .quantize.apply import apply

        say("quantizing")
        apply(model, chosen)
        kept = _kept(chosen.plan)
        if len(kept) < len(chosen.plan.operations):
            simulated = {
                name: tuple(output.numpy() for output in _outputs(loaded, model, pixels))
                for name, pixels in sets.items()
            }
    passes.cast_parameters(model, spec.precision if fmt.typed_graph else "fp32", kept)
    if kernels != "none":
        from .kernels import choice

        spec = msgspec.structs.replace(spec, kernels=choice.chosen(model, spec, kernels, say))
    # A batch of 1 would make torch.export take a dynamic batch for a constant. Kernels get the tiles of the traced one.
    traced = spec.batch.opt if spec.kernels else spec.batch.min
    size = spec.batch.opt if spec.batch.min == spec.batch.max else max(2, traced)
    repeated = probe[np.arange(size) % len(probe)]
    example = torch.from_numpy(_as_input(loaded, model.takes_uint8, repeated))
    place = "cpu" if fmt.ahead_of_time else spec.device
    graph = DeployGraph(module=model.to(place), export=spec, example=example.to(place), say=say, refit_from=refit_from)
    say(f"building {fmt.name}")
    stand_in = fmt.build(graph, folder)
    found = Manifest(
        schema_version=1,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool=f"convnext-deploy {importlib.metadata.version('convnext-deploy')}",
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
    )
    opened = stand_in or (lambda manifest: fmt.load(folder, manifest, RunOptions(device=spec.device)))
    return found, opened, simulated


def _verified(
    session: Session,
    found: Manifest,
    sets: dict[str, Pixels],
    expected: dict[str, verify.Outputs],
    simulated: dict[str, verify.Outputs],
) -> tuple[tuple[Parity, ...], PrecisionTruth]:
    parity = []
    classify = found.model.task == "classify"
    limit = verify.TOLERANCES[found.export.precision]
    for name, pixels in sets.items():
        images = preprocess.as_input(pixels, found.preprocessing, found.export.input)
        outputs = run_in_batches(session, images)
        source_limit = limit
        if simulated:
            source_limit = verify.QUANTIZED
            tiers = verify.compare(
                outputs,
                simulated[name],
                verify.simulation_tolerance(simulated[name], expected[name], limit),
                name,
                classify,
                reference="simulation",
            )
            parity.append(msgspec.structs.replace(tiers, stand_in=session.stands_in))
        tiers = verify.compare(outputs, expected[name], source_limit, name, classify)
        parity.append(msgspec.structs.replace(tiers, stand_in=session.stands_in))
    return tuple(parity), session.precision()


def _judge(record: Manifest, fmt: "Format", folder: Path, target: Path) -> None:
    """Keep a wrong artifact aside, with its report, and raise."""
    wrong = [f"on {parity.images}: {failure}" for parity in record.parity for failure in parity.failures]
    imprecise = verify.precision_failures(record.precision, record, fmt.typed_graph, engine=fmt.ahead_of_time)
    if not wrong and not imprecise:
        return
    rejected = target.absolute().with_name(target.name + ".rejected")
    # Not called manifest.json: a rejected folder is no artifact, and nothing loads it by mistake.
    (folder / "rejected.json").write_bytes(manifest.encode(record))
    manifest.replace(folder, rejected)
    # The tolerances are those of the precision that was asked for: where another ran, the outputs are its consequence.
    error = PrecisionError if imprecise else ParityError
    raise error(f"{'; '.join((*imprecise, *wrong))}; kept aside in {rejected}")
