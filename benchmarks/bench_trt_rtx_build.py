"""Build time, engine size and peak memory of TensorRT-RTX engines, and the nodes of the graphs they are built from.

    python benchmarks/bench_trt_rtx_build.py --variants tiny,base --precisions fp32,fp16 --repeats 3

Needs no GPU. One JSON line a variant and precision is appended to benchmarks/results/trt_rtx_build.jsonl, every
sample kept. Each ONNX is made in one process and each build runs in another, so that its peak memory is its own; what
that process has before it builds (PyTorch is imported) is `baseline_mb`. Weights are random: they do not matter here.
`nodes_raw` is the census of timm's model as torch.onnx exports it, `nodes` that of the graph we build from.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal, cast

from convnext_deploy.records.base import Precision

Asked = Precision | Literal["int8"]

RESULTS = Path(__file__).parent / "results" / "trt_rtx_build.jsonl"
VARIANTS = "tiny,small,base,large,xlarge"


def operators(path: Path) -> dict[str, int]:
    """Number of nodes by operator."""
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def make_onnx(variant: str, precision: Asked, path: Path, batch: tuple[int, int, int]) -> dict[str, object]:
    """The folded graph of a variant, as `export` makes it, with random weights."""
    import torch

    from convnext_deploy import formats
    from convnext_deploy.graph.capture import DeployGraph
    from convnext_deploy.graph.onnx_write import save_onnx
    from convnext_deploy.models import passes, registry
    from convnext_deploy.models.convnext import ConvNeXt
    from convnext_deploy.quantization import plan as plans
    from convnext_deploy.quantization.apply import apply
    from convnext_deploy.records.manifest import BatchRange, ExportSpec
    from convnext_deploy.records.plan import OperationPlan, Plan

    spec = registry.spec(variant)
    torch.manual_seed(0)
    model = ConvNeXt(spec).eval().requires_grad_(False)
    for fold in (passes.fold_norm_affine, passes.fold_layer_scale, passes.fold_grn_bias):
        fold(model)
    rest: Precision = "fp16" if precision == "int8" else precision
    if precision == "int8":  # the linears, the rest in fp16; any scale serves here
        names = [name for name in plans.products(model) if plans.kind_of(name) in ("expand", "project")]
        plan = Plan(
            target="tensorrt_rtx", architecture=variant, weights_sha256="0" * 64, input="float32",
            image_size=spec.image_size, rest=rest, calibration=None,
            operations={name: OperationPlan(type="s8s8", scale=0.05) for name in names},
        )  # fmt: skip
        apply(model, plans.LoadedPlan(plan, {}, eight_bits=formats.eight_bits_of("tensorrt_rtx")))
    passes.cast_parameters(model, rest)
    export = ExportSpec(
        format="tensorrt_rtx", precision=rest, batch=BatchRange(min=batch[0], opt=batch[1], max=batch[2])
    )
    start = time.monotonic()
    save_onnx(DeployGraph(module=model, export=export, example=torch.zeros(2, 3, *spec.image_size)), path)
    return {"onnx_s": time.monotonic() - start, "onnx_bytes": path.stat().st_size, "nodes": operators(path)}


def raw_census(variant: str) -> dict[str, int]:
    """Nodes of timm's own model of that name, exported by torch.onnx as it comes."""
    import timm
    import torch

    from convnext_deploy.graph.onnx_write import OPSET

    model = timm.create_model(variant, pretrained=False).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own internals
        path = Path(folder) / "raw.onnx"
        shapes = ({0: torch.export.Dim("batch", min=1, max=256)},)
        program = torch.onnx.export(
            model, (torch.zeros(2, 3, 224, 224),), dynamo=True, opset_version=OPSET, dynamic_shapes=shapes,
            verbose=False,
        )  # fmt: skip
        assert program is not None  # with dynamo=True there is one
        program.save(str(path))
        return operators(path)


def build(path: Path, precision: str, targets: tuple[str, ...], batch: tuple[int, int, int]) -> dict[str, object]:
    """One build, and the memory of this process before and at its peak."""
    from convnext_deploy.records.manifest import TensorRtSpec
    from convnext_deploy.runtimes.tensorrt import build as nvinfer

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    smallest, tuned, largest = ((size, 3, 224, 224) for size in batch)
    with tempfile.TemporaryDirectory() as folder:
        record = nvinfer.build_engine(
            "tensorrt_rtx", path, Path(folder) / "engine", ((smallest, tuned, largest),), TensorRtSpec(targets=targets),
            tf32=precision == "tf32",
        )  # fmt: skip
    return {
        "build_s": record.build_s, "engine_bytes": record.engine_bytes, "baseline_mb": round(baseline, 1),
        "peak_memory_mb": record.peak_memory_mb, "version": record.version,
        "types": nvinfer_types(record.products),
    }  # fmt: skip


def nvinfer_types(products: dict[str, tuple[str, float]]) -> dict[str, float]:
    from convnext_deploy.graph.onnx_read import shares

    return shares(products.values())


def child(*arguments: object) -> dict[str, object]:
    """Run one step of this script in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--step", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed: {done.stderr.strip()[-600:]}")
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def step(arguments: list[str]) -> object:
    kind, *rest = arguments
    if kind == "raw":
        return raw_census(rest[0])
    low, tuned, high = map(int, rest[-1].split(":"))
    batch = (low, tuned, high)
    if kind == "onnx":
        return make_onnx(rest[0], cast(Asked, rest[1]), Path(rest[2]), batch)
    return build(Path(rest[0]), rest[1], tuple(filter(None, rest[2].split(","))), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--precisions", default="fp32,fp16,bf16,int8")
    parser.add_argument("--targets", default="sm80", help="comma-separated; empty: every GPU from Ampere on")
    parser.add_argument("--batch", default="1:32:256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-raw", action="store_true", help="leave out the census of timm's exported graph")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step)))
        return

    from convnext_deploy import env
    from convnext_deploy.models import registry

    args.out.parent.mkdir(parents=True, exist_ok=True)
    for word in args.variants.split(","):
        variant, _ = registry.resolve(word)
        raw = None if args.no_raw else child("raw", variant)
        for precision in args.precisions.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                made = child("onnx", variant, precision, path, args.batch)
                samples = [
                    child("build", path, precision, args.targets or ",", args.batch) for _ in range(args.repeats)
                ]
            line = {
                "what": "trt_rtx_build", "created": datetime.datetime.now(datetime.timezone.utc).isoformat(),
                "variant": variant, "precision": precision, "targets": args.targets, "batch": args.batch,
                "image_size": [224, 224], **made, "nodes_raw": raw,
                "build_s": [sample["build_s"] for sample in samples],
                "engine_bytes": samples[0]["engine_bytes"],
                "peak_memory_mb": [sample["peak_memory_mb"] for sample in samples],
                "baseline_mb": [sample["baseline_mb"] for sample in samples],
                "types": samples[0]["types"],
                "load_average_1min": os.getloadavg()[0],  # above the number of cores: times are too long
                "machine": env.machine(), "versions": env.versions(),
            }  # fmt: skip
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            seconds = sorted(line["build_s"])[len(samples) // 2]
            print(
                f"{variant} {precision}: {seconds:.2f} s (median of {len(samples)}), {line['engine_bytes'] / 1e6:.1f} "
                f"MB, peak {max(line['peak_memory_mb']):.0f} MB over {min(line['baseline_mb']):.0f} MB"
            )


if __name__ == "__main__":
    main()
