"""Whole networks on a GPU: artifacts with and without the fused kernels, beside timm, eager and compiled, and Swin.

    python benchmarks/bench_engine.py [--variants tiny base] [--precision fp16] [--batches 1 32 256] [--without-compile]

At small batches also with each kernel begun when the one before has ended, and with tiles as wide as at large ones.
All take turns on the same images, already on the GPU; a sample is one `step` and `sync`. Artifacts replay a CUDA graph,
torch.compile has its own (max-autotune). The artifacts' errors and top-1 agreement stand beside their speeds.
"""

import tempfile
from pathlib import Path

import timm
import torch
from kernel_bench import IN_TURN, SMALL_BATCH, WIDE_TILES, arguments, refuse_without_gpu, under
from records import append

from convnext_deploy import api, measure, preprocess
from convnext_deploy.lower.torch_session import TorchSession
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import DTYPES
from convnext_deploy.session import RunOptions, Session
from convnext_deploy.types import BatchRange

SWIN = {"convnext_tiny": "swin_tiny_patch4_window7_224", "convnext_base": "swin_base_patch4_window7_224"}


def timm_session(name: str, precision: str, mode: str | None, like: Session) -> TorchSession:
    model = timm.create_model(name).eval().requires_grad_(False).to("cuda", DTYPES[precision])
    model = model.to(memory_format=torch.channels_last)
    call = model if mode is None else torch.compile(model, mode=mode)
    return TorchSession(
        lambda x: call(x.to(DTYPES[precision], memory_format=torch.channels_last)).float(),
        like.manifest,
        RunOptions(device="cuda", cuda_graph=mode is None),
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each contender and batch")
    args = parser.parse_args()
    refuse_without_gpu()
    torch.backends.cudnn.benchmark = True
    torch._inductor.config.freezing = True
    for variant in args.variants:
        name, _ = registry.resolve(variant)
        for batch in args.batches:
            with tempfile.TemporaryDirectory() as folder:
                sessions: dict[str, Session] = {}
                errors = {}
                for format in ("eager", "aotinductor"):
                    for kernels in ("none", "all"):
                        key = f"{format}, kernels {kernels}"
                        made = api.export(
                            "random", variant=variant, format=format, precision=args.precision, device="cuda",
                            kernels=kernels, batch=BatchRange(min=batch, opt=batch, max=batch),
                            out=Path(folder) / f"{format}-{kernels}",
                        )  # fmt: skip
                        (parity,) = made.manifest.parity
                        errors[key] = (parity.relative_error, parity.top1_agreement)
                        sessions[key] = api.load(made.path, device="cuda", cuda_graph=True)
                like = sessions["eager, kernels none"]
                sessions["timm eager"] = timm_session(name, args.precision, None, like)
                if name in SWIN:
                    sessions["Swin eager"] = timm_session(SWIN[name], args.precision, None, like)
                if not args.without_compile:
                    sessions["timm compiled"] = timm_session(name, args.precision, "max-autotune", like)
                    if name in SWIN:
                        sessions["Swin compiled"] = timm_session(SWIN[name], args.precision, "max-autotune", like)
                small = {"in turn": IN_TURN, "wide tiles": WIDE_TILES} if batch <= SMALL_BATCH else {}
                pixels = preprocess.probe_images(3, like.manifest.model.image_size, batch)
                images = preprocess.as_input(pixels, like.manifest.preprocessing, "float32")
                for word, settings in small.items():  # as the second run captures it
                    session = api.load(Path(folder) / "eager-all", device="cuda", cuda_graph=True)
                    for _ in range(2):
                        under(session.run, settings)(images)
                    sessions[f"eager, kernels all, {word}"] = session
                timings = measure.interleaved(sessions, dict.fromkeys(sessions, images), args.seconds)
            for timing in timings:
                error, agreement = errors.get(timing.artifact, (None, None))
                append(
                    {
                        "benchmark": "engine", "variant": name, "runtime": timing.artifact, "batch": batch,
                        "precision": args.precision, "unit": "ms", "scope": "step and sync, images on the GPU",
                        "samples": timing.samples_ms, "median": timing.median_ms,
                        "images_per_s": timing.images_per_s, "relative_error": error, "top1_agreement": agreement,
                        "gpu": torch.cuda.get_device_name(),
                    },
                    "gpu-engine",
                )  # fmt: skip


if __name__ == "__main__":
    main()
