"""Images per second of every runtime beside timm eager and torch.compile: one process, interleaved, order rotated.

    python benchmarks/bench_runtimes.py [--variant tiny] [--batches 1 8] [--seconds 6] [--precision fp32]

All run the same random weights on the same normalized images; only `Session.step` is timed. The artifacts'
relative errors stand in their manifests.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from records import append

from convnext_deploy import api
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.data import preprocess
from convnext_deploy.errors import CheckFailed, MissingPackageError
from convnext_deploy.models import registry
from convnext_deploy.runtimes.torch_session import TorchSession
from convnext_deploy.timing import measure

ARTIFACTS = (
    ("eager", "fp32"), ("torchscript", "fp32"), ("pt2", "fp32"), ("aotinductor", "fp32"), ("onnx", "fp32"),
    ("openvino", "fp32"), ("native", "fp32"), ("openvino", "bf16"), ("native", "bf16"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each runtime and batch")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    architecture, _ = registry.resolve(args.variant)

    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for fmt, precision in ARTIFACTS:
            out = Path(folder) / f"{fmt}-{precision}"
            try:
                api.export("random", variant=args.variant, format=fmt, precision=precision, out=out)
            except (CheckFailed, MissingPackageError) as error:  # OpenVINO's bf16, where the machine has none
                print(f"{fmt} {precision} is left out: {error}", flush=True)
                continue
            sessions[f"{fmt} {precision}"] = api.load(out)
        manifest = sessions["eager fp32"].manifest
        model = timm.create_model(architecture).eval().requires_grad_(False)
        compiled = torch.compile(timm.create_model(architecture).eval().requires_grad_(False))
        channels_last = (
            timm.create_model(architecture).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        )
        sessions = {
            "timm eager": TorchSession(model, manifest, RunOptions()),
            "timm eager channels_last": TorchSession(
                lambda x: channels_last(x.contiguous(memory_format=torch.channels_last)), manifest, RunOptions()
            ),
            "timm torch.compile": TorchSession(compiled, manifest, RunOptions()),
            **sessions,
        }
        for batch in args.batches:
            pixels = preprocess.probe_images(3, manifest.model.image_size, batch)
            images = preprocess.as_input(pixels, manifest.preprocessing, "float32")
            timings = measure.interleaved(sessions, dict.fromkeys(sessions, images), args.seconds)
            baseline = timings[0].median_ms
            for timing in timings:
                append(
                    {
                        "benchmark": "runtimes", "variant": architecture, "runtime": timing.artifact, "batch": batch,
                        "scope": "compute, host to host", "unit": "ms", "samples": timing.samples_ms,
                        "median": timing.median_ms, "images_per_s": timing.images_per_s,
                        "times_timm_eager": baseline / timing.median_ms,
                    }
                )  # fmt: skip


if __name__ == "__main__":
    main()
