"""Export time and peak memory of each format, each export in a process of its own.

    python benchmarks/bench_export.py [--variants tiny base] [--formats onnx openvino ...]

Memory is the growth of the peak resident size over what the imports alone take, in units of the fp32 weights;
compilers that an export starts are counted on their own. Weights are random: sizes do not depend on values.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from records import append

from convnext_deploy import formats

CHILD = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, timm, onnx, onnxscript, onnxruntime, openvino, torch.onnx, torch._inductor
from convnext_deploy import api, formats; from convnext_deploy.models import passes
from convnext_deploy.graph import capture, onnx_write as onnx_graph
from convnext_deploy.models import checkpoint as weights, registry
from convnext_deploy.models import parameters
variant, fmt, precision, out = sys.argv[1:]
formats.get(fmt)
peak = lambda who: resource.getrusage(who).ru_maxrss * 1024
before = peak(resource.RUSAGE_SELF)
start = time.perf_counter()
artifact = api.export("random", variant=variant, format=fmt, precision=precision, out=out)
seconds = time.perf_counter() - start
weight_bytes = 4 * sum(p.numel() for p in torch.nn.Module.parameters(parameters.random_model(artifact.manifest.model)))
print(json.dumps({
    "seconds": seconds, "weight_bytes": weight_bytes, "artifact_bytes": artifact.bytes,
    "peak_growth_bytes": peak(resource.RUSAGE_SELF) - before, "compiler_peak_bytes": peak(resource.RUSAGE_CHILDREN),
    "relative_error": artifact.manifest.parity[0].relative_error,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["tiny", "base"])
    parser.add_argument("--formats", nargs="+", default=list(formats.names()))
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    for variant in args.variants:
        for fmt in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", CHILD, variant, fmt, args.precision, f"{folder}/artifact"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{variant} {fmt}: {done.stderr.strip().splitlines()[-1]}")
            measured = json.loads(done.stdout.splitlines()[-1])
            growth = measured["peak_growth_bytes"] / measured["weight_bytes"]
            append(
                {
                    "benchmark": "export", "variant": variant, "format": fmt, "precision": args.precision,
                    **measured, "peak_growth_in_weights": growth,
                }
            )  # fmt: skip


if __name__ == "__main__":
    main()
