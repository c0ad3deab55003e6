"""Whole networks on a GPU: artifacts with and without the fused kernels, TensorRT-RTX, timm eager and compiled, Swin.

    python benchmarks/bench_engine.py [--variants tiny base] [--precision fp16] [--batches 1 32 256] [--without-compile]

At small batches also with each kernel begun when the one before has ended, and with tiles as wide as at large ones; in
int8 also with products in CUDA C++. All take turns on the same images, already on the GPU; a sample is one `step` and
`sync`. Artifacts replay a CUDA graph, torch.compile has its own (max-autotune). The artifacts' errors and top-1
agreement stand beside their speeds. With --precision int8 or fp8 the blocks of artifacts with kernels and of
TensorRT-RTX's are in 8 bits, with ranges from noise; what has no 8 bits is in fp16.
"""

import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from drafts import draft
from kernel_bench import IN_CUDA_CPP, IN_TURN, SMALL_BATCH, WIDE_TILES, arguments, refuse_without_gpu, under
from records import append

from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.data import preprocess
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import DTYPES
from convnext_deploy.records.base import Device
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.records.plan import OperationType, Target
from convnext_deploy.runtimes.torch_session import TorchSession
from convnext_deploy.timing import measure

SWIN = {"convnext_tiny": "swin_tiny_patch4_window7_224", "convnext_base": "swin_base_patch4_window7_224"}
EIGHT_BITS: dict[str, OperationType] = {"int8": "s8s8", "fp8": "fp8"}
CONTENDERS: tuple[tuple[Target, str], ...] = (
    ("eager", "none"), ("eager", "all"), ("aotinductor", "none"), ("aotinductor", "all"), ("tensorrt_rtx", "none"),
)  # fmt: skip


def artifacts(
    checkpoint: str, variant: str, precision: str, batch: BatchRange, device: Device, folder: Path,
    formats: Collection[str] = (),
) -> Iterator[tuple[str, Artifact]]:  # fmt: skip
    """Name and artifact, of these formats only where any are named; what cannot be built is said on standard error."""
    for format, kernels in (each for each in CONTENDERS if not formats or each[0] in formats):
        name = f"{format}, kernels {kernels}"
        options: dict[str, Any] = {"format": format, "kernels": kernels, "precision": precision}
        if precision in EIGHT_BITS:
            options["precision"] = "fp16"
            if kernels == "all" or format == "tensorrt_rtx":
                plan = folder / f"{format}-{kernels}.json"
                kinds, type = ("expand", "project"), EIGHT_BITS[precision]
                draft(checkpoint, variant, format, plan, "random", kinds, type=type, rest="fp16")
                options["plan"], name = plan, f"{name}, {precision}"
        place: Device = "cuda" if format == "tensorrt_rtx" else device
        try:
            made = api.export(
                checkpoint, variant=variant, device=place, batch=batch, out=folder / f"{format}-{kernels}", **options
            )  # fmt: skip
        except ConvNextDeployError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        yield name, made


def timm_session(name: str, precision: str, mode: str | None, like: Session) -> TorchSession:
    dtype = DTYPES["fp16" if precision in EIGHT_BITS else precision]  # type: ignore[index]  # a choice of the parser
    model = timm.create_model(name).eval().requires_grad_(False).to("cuda", dtype)
    model = model.to(memory_format=torch.channels_last)
    call = model if mode is None else torch.compile(model, mode=mode)
    return TorchSession(
        lambda x: call(x.to(dtype, memory_format=torch.channels_last)).float(),
        like.manifest,
        RunOptions(device="cuda", cuda_graph=mode is None),
    )


def main() -> None:
    parser = arguments(__doc__, *EIGHT_BITS)
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--formats", nargs="+", default=[], help="eager must be among them; all where left out")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each contender and batch")
    args = parser.parse_args()
    refuse_without_gpu()
    float_type = "fp16" if args.precision in EIGHT_BITS else args.precision
    torch.backends.cudnn.benchmark = True
    torch._inductor.config.freezing = True
    for variant in args.variants:
        name, _ = registry.resolve(variant)
        for batch in args.batches:
            with tempfile.TemporaryDirectory() as folder:
                sessions: dict[str, Session] = {}
                fused = ""
                errors, types = {}, {}
                fixed = BatchRange(min=batch, opt=batch, max=batch)
                for key, made in artifacts(
                    "random", variant, args.precision, fixed, "cuda", Path(folder), args.formats
                ):
                    try:
                        sessions[key] = api.load(made.path, device="cuda", cuda_graph=True)
                    except ConvNextDeployError as refusal:  # an engine for other GPUs than this one
                        print(f"{key} left out: {refusal}", file=sys.stderr)
                        continue
                    parity = made.manifest.parity[-1]  # beside the source, on the bundled images
                    errors[key] = (parity.relative_error, parity.top1_agreement)
                    types[key] = made.manifest.export.eight_bits or made.manifest.export.precision
                    fused = key if key.startswith("eager, kernels all") else fused
                if "eager, kernels none" not in sessions:
                    sys.exit(
                        "error: eager PyTorch without kernels could not be exported; it is what all are held against"
                    )
                like = sessions["eager, kernels none"]
                sessions["timm eager"] = timm_session(name, args.precision, None, like)
                if name in SWIN:
                    sessions["Swin eager"] = timm_session(SWIN[name], args.precision, None, like)
                if not args.without_compile:
                    sessions["timm compiled"] = timm_session(name, args.precision, "max-autotune", like)
                    if name in SWIN:
                        sessions["Swin compiled"] = timm_session(SWIN[name], args.precision, "max-autotune", like)
                others = {"in turn": IN_TURN, "wide tiles": WIDE_TILES} if batch <= SMALL_BATCH else {}
                others |= {"products in CUDA C++": IN_CUDA_CPP} if args.precision == "int8" else {}
                pixels = preprocess.probe_images(3, like.manifest.model.image_size, batch)
                images = preprocess.as_input(pixels, like.manifest.preprocessing, "float32")
                for word, settings in others.items() if fused else ():
                    session = api.load(Path(folder) / "eager-all", device="cuda", cuda_graph=True)
                    under(session.run, settings)(images)  # the first run captures what is replayed
                    sessions[f"{fused}, {word}"] = session
                    types[f"{fused}, {word}"] = types[fused]
                timings = measure.interleaved(sessions, dict.fromkeys(sessions, images), args.seconds)
            for timing in timings:
                error, agreement = errors.get(timing.artifact, (None, None))
                append(
                    {
                        "benchmark": "engine", "variant": name, "runtime": timing.artifact, "batch": batch,
                        "precision": types.get(timing.artifact, float_type), "unit": "ms",
                        "scope": "step and sync, images on the GPU",
                        "samples": timing.samples_ms, "median": timing.median_ms,
                        "images_per_s": timing.images_per_s, "relative_error": error, "top1_agreement": agreement,
                        "gpu": torch.cuda.get_device_name(),
                    },
                    "gpu-engine",
                )  # fmt: skip


if __name__ == "__main__":
    main()
