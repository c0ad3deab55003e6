"""The command line: parse, call `api`, print, exit code. Nothing heavy is imported before a command runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConvNextDeployError, UsageError
from .printing import Terminal, details, fits_words, progress_bar, summary

if TYPE_CHECKING:
    from .types import BatchRange, TensorRtSpec

# What the parser raises for wrong arguments: click's ClickException, which newer releases of typer carry a copy of.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="convnext-deploy",
    help="Export any ConvNeXt checkpoint to verified deployment artifacts, and measure what they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and --json's document).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of the runtime; default: all cores.")]


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code. 2: the request was wrong; 1: a check failed; 130: interrupted."""
    debug, as_json = "--debug" in arguments, "--json" in arguments
    try:
        returned = app(args=arguments or ["--help"], prog_name="convnext-deploy", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except typer.Exit as error:
        code = error.exit_code
    except CommandLineError as error:
        return _failed(error.format_message(), 2, as_json)  # type: ignore[attr-defined]
    except ConvNextDeployError as error:
        if debug:
            raise
        return _failed(str(error), error.exit_code, as_json)
    except OSError as error:  # the file system's own refusals: a name too long, a folder that cannot be read
        if debug:
            raise
        return _failed(str(error), 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # newer releases of typer turn Ctrl-C into this code and say nothing
        return _failed("interrupted", 130, as_json)
    return code


def _failed(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        import msgspec

        print(msgspec.json.encode({"error": line, "exit_code": code}).decode())
    return code


@app.command()
def export(
    variant: Annotated[
        str | None, typer.Option(help="Which ConvNeXt: base, v2-tiny, convnext_base.fb_in1k ...")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="File, folder, timm name, hf-hub:owner/name, or random. Default: published.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="See `convnext-deploy list`; trt: TensorRT or TensorRT-RTX, as --trt says.")
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Artifact folder. Default: build/ARCHITECTURE-FORMAT-PRECISION.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16 or bf16.")] = "fp32",
    input: Annotated[str, typer.Option(help="float32 (normalized NCHW) or uint8 (raw NHWC).")] = "float32",
    batch: Annotated[str, typer.Option(help="Batch sizes: N, or MIN:OPT:MAX.")] = "1:8:256",
    image_size: Annotated[str | None, typer.Option(help="Pixels: 224 or HEIGHTxWIDTH. Default: as trained.")] = None,
    dynamic_image_size: Annotated[bool, typer.Option("--dynamic-image-size", help="Take any multiple of 32.")] = False,
    task: Annotated[str, typer.Option(help="classify, embed or features.")] = "classify",
    num_classes: Annotated[
        int | None, typer.Option(help="Must agree with the checkpoint; shapes random weights.")
    ] = None,
    in_chans: Annotated[int | None, typer.Option(help="Must agree with the checkpoint; shapes random weights.")] = None,
    weights_key: Annotated[str | None, typer.Option(help="Wrapper or key prefix to load from the file.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of the training images in [0, 1]: R,G,B or one number.")] = None,
    std: Annotated[
        str | None, typer.Option(help="Likewise. Both default to what stands beside the checkpoint.")
    ] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized image that evaluation crops.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")] = None,
    verify_data: Annotated[str | None, typer.Option(help="More images to verify on: folder, tar or Parquet.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cpu, or cuda where the format needs it.")
    ] = None,
    trt: Annotated[str, typer.Option(help="With --format trt: auto, tensorrt or rtx.")] = "auto",
    target: Annotated[
        str | None, typer.Option(help="TensorRT-RTX: GPUs to build for: a100,rtx4090,sm80. Default: Ampere and later.")
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="TensorRT: one more batch range to tune for, MIN:OPT:MAX. Repeatable.")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="TensorRT: pixels MIN:OPT:MAX with --dynamic-image-size. Default: 32 to 1024.")
    ] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="TensorRT: 0 to 5; default 3.")] = None,
    workspace_mb: Annotated[int | None, typer.Option(min=1, help="TensorRT: scratch memory; default: all.")] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="TensorRT: run on any GPU from Ampere on.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: run on later versions too.")
    ] = False,
    refit: Annotated[
        str, typer.Option(help="TensorRT: none, refit, or strip (weights come in with `refit`).")
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into a verified artifact."""
    from . import types

    terminal = Terminal(json, quiet)
    wanted = {
        "precision": _one_of("--precision", precision, types.Precision),
        "input": _one_of("--input", input, types.InputKind),
        "task": _one_of("--task", task, types.Task),
        "device": None if device is None else _one_of("--device", device, types.Device),
        "tensorrt": _tensorrt(
            format,
            target,
            profile,
            sides,
            optimization_level,
            workspace_mb,
            hardware_compatible,
            version_compatible,
            refit,
        ),
        "trt": trt,
        "batch": _batch(batch),
        "image_size": _image_size(image_size),
        "preprocessing": _given(
            mean=_numbers("--mean", mean), std=_numbers("--std", std), crop_pct=crop_pct, interpolation=interpolation
        ),
    }
    from . import formats

    if format != "trt":
        formats.require(formats.get(format))  # before torch is imported, so that a typo costs nothing
    from . import api

    artifact = api.export(
        weights,
        variant=variant,
        format=format,
        out=out,
        dynamic_image_size=dynamic_image_size,
        num_classes=num_classes,
        in_chans=in_chans,
        weights_key=weights_key,
        verify_data=verify_data,
        force=force,
        say=terminal.say,
        **wanted,
    )
    found = artifact.manifest
    terminal.result({"path": str(artifact.path), "manifest": found}, summary(artifact.path, found, artifact.bytes))


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    data: Annotated[str, typer.Option(help="Folder of class folders, tar, Parquet, or hfds:NAME.")],
    split: Annotated[str | None, typer.Option(help="Which split, where the source has several.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at once; default: what the artifact is tuned for.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many images, evenly spaced.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep OUT.json and OUT.parquet; resumes when run again.")] = None,
    device: DeviceOption = "cpu",
    threads: Threads = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="TensorRT: replay a captured CUDA graph.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Top-1, top-5 and per-class accuracy over labelled images."""
    from . import api, types

    terminal = Terminal(json, quiet)
    with progress_bar(terminal) as progress:
        result = api.evaluate(
            artifact,
            data,
            split=split,
            batch=batch,
            limit=limit,
            out=out,
            device=_one_of("--device", device, types.Device),
            threads=threads,
            cuda_graph=cuda_graph,
            progress=progress,
        )
    lines = [
        f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  on {result.images} images of {result.data}",
        f"{result.images_per_s:.1f} images/s including reading and resizing",
    ]
    if result.corrupt:
        lines.append(f"{len(result.corrupt)} corrupt images left out, the first: {result.corrupt[0]}")
    worst = sorted(result.per_class, key=lambda c: c.top1)[:3]
    lines.append("lowest classes: " + ", ".join(f"{c.name} {c.top1:.1%}" for c in worst))
    if out is not None:
        lines.append(f"predictions in {result.predictions}")
    terminal.result(result, "\n".join(lines))


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What an artifact is, where it came from, whether its files are intact, and whether an engine fits this machine.

    A TensorRT engine file alone is looked at too.
    """
    from . import manifest

    terminal = Terminal(json, quiet)
    if artifact.is_file():
        from .lower import nvinfer_run

        fits = nvinfer_run.preflight(artifact)
        terminal.result({"facts": fits.facts, "problems": fits.problems}, fits_words(fits.facts, fits.problems))
        return
    opened = manifest.verified(artifact)
    text = details(artifact, opened.manifest, opened.bytes)
    if opened.manifest.export.format in ("tensorrt", "tensorrt_rtx"):
        from .lower import nvinfer_run

        fits = nvinfer_run.inspected(artifact, opened.manifest)
        text += "\n" + fits_words(fits.facts, fits.problems)
    terminal.result(opened.manifest, text)


@app.command()
def refit(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder of a refittable TensorRT engine.")],
    weights: Annotated[str, typer.Option(help="The new weights, of the same architecture.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artifact.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put other weights into a TensorRT engine, without building it again. Needs the GPU."""
    from . import api

    terminal = Terminal(json, quiet)
    made = api.refit(artifact, weights, out=out, force=force, say=terminal.say)
    found = made.manifest
    terminal.result({"path": str(made.path), "manifest": found}, summary(made.path, found, made.bytes))


@app.command("list")
def list_(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """The variants and the formats."""
    from . import env, formats
    from .models import registry

    terminal = Terminal(json, quiet)
    described = {name: registry.spec(name) for name in registry.VARIANTS}
    known = [formats.get(name) for name in formats.names()]
    if json:
        listed = [
            {
                "name": fmt.name, "summary": fmt.summary, "runtime": fmt.runtime, "suffix": fmt.suffix,
                "precisions": sorted(fmt.precisions), "devices": sorted(fmt.devices),
                "extra": fmt.extra, "missing": env.missing(fmt.requires),
            }
            for fmt in known
        ]  # fmt: skip
        terminal.result({"variants": described, "formats": listed}, "")
        return
    rows = [
        [
            name,
            "-".join(map(str, spec.depths)),
            "-".join(map(str, spec.dims)),
            ", ".join(registry.peculiarities(name)),
        ]
        for name, spec in described.items()
    ]
    terminal.table("Variants", ["name", "depths", "widths", "differs by"], rows)
    rows = []
    for fmt in known:
        absent = env.missing(fmt.requires)
        state = env.missing_line(absent[0], fmt.extra or "dev") if absent else "installed"
        rows.append([fmt.name, fmt.summary, " ".join(sorted(fmt.precisions)), fmt.runtime, state])
    terminal.table("Formats", ["name", "what", "precisions", "runtime", "state"], rows)


@app.command()
def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What this machine can build and run, and what to install for the rest."""
    import shutil

    from . import env, formats

    terminal = Terminal(json, quiet)
    states = {}
    for name in formats.names():
        fmt = formats.get(name)
        absent = env.missing(fmt.requires)
        states[name] = env.missing_line(absent[0], fmt.extra or "dev") if absent else "ready"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None and states.get("aotinductor") == "ready":
        states["aotinductor"] = "no C++ compiler on PATH; install g++ or clang"
    gpus = env.nvidia_gpus()
    document = {
        "machine": env.machine(), "gpus": gpus, "versions": env.versions(),
        "formats": states, "compiler": compiler,
    }  # fmt: skip
    if json:
        terminal.result(document, "")
        return
    terminal.table("Machine", ["what", "value"], [[k, str(v)] for k, v in env.machine().items()])
    terminal.table("NVIDIA GPUs", ["name"], [[gpu] for gpu in gpus] or [["none found"]])
    terminal.table("Versions", ["package", "version"], [[k, v] for k, v in env.versions().items()])
    terminal.table("Formats", ["name", "state"], [[k, v] for k, v in states.items()])


# Options to values ---------------------------------------------------------------------------------------------------


def _one_of(option: str, value: str, words: Any) -> Any:
    from typing import get_args

    allowed = get_args(words)
    if value not in allowed:
        raise UsageError(f"{option} {value}; expected one of {', '.join(allowed)}")
    return value


def _batch(text: str, option: str = "--batch") -> "BatchRange":
    from .types import BatchRange

    try:
        sizes = [int(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise UsageError(f"{option} {text}; expected N or MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX")
    return BatchRange(min=sizes[0], opt=sizes[1], max=sizes[2])


def _tensorrt(
    format: str,
    target: str | None,
    profile: list[str] | None,
    sides: str | None,
    optimization_level: int | None,
    workspace_mb: int | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refit: str,
) -> "TensorRtSpec | None":
    """The TensorRT options as one record; None where none was given and the format is another."""
    from .types import TensorRtSpec

    targets: tuple[str, ...] = ()
    if target is not None:
        from .lower import nvinfer

        targets = nvinfer.targets_of(target)
    if refit not in ("none", "refit", "strip"):
        raise UsageError(f"--refit {refit}; expected none, refit or strip")
    range_of_sides = None
    if sides is not None:
        r = _batch(sides, "--sides")
        range_of_sides = (r.min, r.opt, r.max)
    spec = TensorRtSpec(
        targets=targets,
        profiles=tuple(_batch(text, "--profile") for text in profile or ()),
        sides=range_of_sides,
        optimization_level=optimization_level,
        workspace_mb=workspace_mb,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        refit=refit,  # type: ignore[arg-type]  # checked above
    )
    return spec if spec != TensorRtSpec() or format in ("trt", "tensorrt", "tensorrt_rtx") else None


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise UsageError(f"--image-size {text}; expected pixels such as 224, or HEIGHTxWIDTH such as 800x1280")
    return sides[0], sides[-1]


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}; expected numbers such as 0.485,0.456,0.406") from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
