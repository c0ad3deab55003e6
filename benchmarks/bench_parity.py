"""Worst relative error of every format and precision against the fp32 PyTorch source, by architecture family.

    python benchmarks/bench_parity.py [--image-size 96]

Random weights in which every parameter matters, 16 samples of the bundled photographs. A rejected artifact is
recorded with its reason.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

from records import append

from convnext_deploy import api
from convnext_deploy.errors import CheckFailed
from convnext_deploy.records.base import Precision

FAMILIES = {
    "V1": ("convnext_atto", "convnext_tiny"),
    "V1, norm before pooling": ("convnext_tiny_hnf",),
    "V1, overlapping stem": ("convnext_atto_ols", "convnext_nano_ols"),
    "RMSNorm": ("convnext_atto_rms",),
    "SimpleNorm": ("convnext_zepto_rms", "convnext_zepto_rms_ols"),
    "V2": ("convnextv2_atto", "convnextv2_tiny"),
    "test_": ("test_convnext", "test_convnext2", "test_convnext3"),
}
BUILDS: tuple[tuple[str, Precision], ...] = (
    ("eager", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("eager", "fp16"), ("onnx", "fp16"), ("eager", "bf16"),
    ("openvino", "bf16"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=96)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for family, variants in FAMILIES.items():
        for variant in variants:
            for fmt, precision in BUILDS:
                found = {"family": family, "variant": variant, "format": fmt, "precision": precision}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        artifact = api.export(
                            "random", variant=variant, format=fmt, precision=precision, out=Path(folder) / "artifact",
                            image_size=(args.image_size, args.image_size),
                        )  # fmt: skip
                    except CheckFailed as error:
                        append({"benchmark": "parity", **found, "rejected": str(error).partition("; kept aside")[0]})
                        continue
                parity = artifact.manifest.parity[0]
                append(
                    {
                        "benchmark": "parity", **found, "image_size": args.image_size, "samples": parity.samples,
                        "relative_error": parity.relative_error, "cosine": parity.cosine,
                        "top1_agreement": parity.top1_agreement, "near_ties": parity.near_ties,
                    }
                )  # fmt: skip


if __name__ == "__main__":
    main()
