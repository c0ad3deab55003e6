"""A whole UPerNet at 512x512 pixels on every runtime of a CPU, beside transformers' own, eager and compiled.

    python benchmarks/bench_segmenter.py --calibration photographs.parquet --build-only
    python benchmarks/bench_segmenter.py --rows torch,onnx-fp32,openvino-fp32 --seconds 5
    python benchmarks/bench_segmenter.py --next

Random weights and the 150 classes of ADE20K. Everything below --folder is built once. 8 bits have ranges from a few
photographs, and no corrections: a speed does not depend on them. Rows of one call take turns, a process
each, as in `convnext-deploy bench`. The error is the artifact's own, beside its fp32 source on two of the bundled
photographs.

--next times one row beside the first of --rows, in about a minute, and ends: the one that --out has no valid result of,
and that was tried least. It takes those that --build-only built, and tries each five times at most. Call it again until
it says that nothing is left. So a machine that is undisturbed for a minute at a time is enough.
"""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from convnext_deploy import api, formats
from convnext_deploy.accuracy import probes
from convnext_deploy.artifact import manifest
from convnext_deploy.data import sources
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.models import checkpoint, passes, registry
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization import saturation
from convnext_deploy.quantization.calibrate import calibrate
from convnext_deploy.quantization.distance import outputs, pixels_of
from convnext_deploy.records.plan import Target
from convnext_deploy.timing import compare
from convnext_deploy.workflows import contenders
from convnext_deploy.workflows.bench import Plan, bench
from convnext_deploy.workflows.contenders import Contender, Wanted

ROWS = (
    "torch", "torch.compile", "onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-bf16", "openvino-int8",
    "torchscript-fp32", "aotinductor-fp32",
)  # fmt: skip
SIDE = 512  # pixels
IMAGES = 2  # of calibration
TRIES = 5  # of --next, a row: what is never valid would be timed for ever
PHOTOGRAPHS = 2  # that each artifact is verified on: one takes a second or more, several times over


def draft(variant: str, target: Target, path: Path, calibration: str) -> None:
    """Write a plan with every operation that can run in 8 bits, from a few images."""
    loaded = checkpoint.load("random", variant=variant, task="segment", image_size=(SIDE, SIDE))
    source = sources.subset(sources.open_source(calibration), IMAGES)
    probe = pixels_of(source, loaded.preprocessing, loaded.model)
    passes.fold(loaded.model, None, lambda model: outputs(model, probe, loaded.preprocessing))
    paths = plans.products(loaded.model)
    ranges = calibrate(loaded.model, tuple(paths.values()), source, preprocessing=loaded.preprocessing, images=IMAGES)
    how = formats.eight_bits_of(target)
    plan = plans.draft(
        loaded.model, ranges, list(paths), type=how.int8, target=target, eight_bits=how, method="mse",
        input="float32", rest="fp32", weights_sha256=loaded.weights.tensors_sha256,
        weight_bits=saturation.bits_for(how.int8, saturation.saturates()),
    )  # fmt: skip
    plans.write(path, plan, {})


def contender(row: str, variant: str, folder: Path, calibration: str | None) -> Contender | None:
    """What a row's name says, built now where it is not there; nothing where it cannot be, with the reason printed."""
    if row in contenders.TORCH:
        architecture, _ = registry.resolve(variant)
        want = Wanted(
            model=architecture, runtime=row, precision="fp32", task="segment", image_size=(SIDE, SIDE), device="cpu"
        )
        return contenders.built([want], print)[0]
    out, (format, _, type) = folder / f"{variant}-{row}", row.partition("-")
    if not is_ready(row, variant, folder):
        print("building", out, flush=True)
        given: dict[str, Any] = {"precision": type}
        try:
            if type == "int8":
                if calibration is None:
                    raise SystemExit(f"{row} is not there; give --calibration")
                given = {"plan": folder / f"{variant}-{format}.json"}
                draft(variant, format, given["plan"], calibration)
            api.export(
                "random", variant=variant, task="segment", image_size=SIDE, format=format, batch=1, out=out, **given
            )
        except ConvNextDeployError as error:
            print(f"{row} is left out: {error}", flush=True)
            return None
    found = contenders.of_artifact(out, "cpu", trust=True)
    return msgspec.structs.replace(found, artifact=out.name)


def is_ready(row: str, variant: str, folder: Path) -> bool:
    """Whether a row's artifact is there, or it needs none."""
    return row in contenders.TORCH or (folder / f"{variant}-{row}" / manifest.MANIFEST_NAME).is_file()


def next_rows(rows: list[str], variant: str, folder: Path, out: Path) -> list[str]:
    """The first row that is ready and the one to be timed beside it; nothing where no row is left.

    A row is left that is ready, has no valid result, and was tried less than `TRIES` times.
    """
    architecture, _ = registry.resolve(variant)
    # A call that was stopped before its first result leaves an empty file.
    results = compare.read_results(out) if out.is_file() and out.stat().st_size else ()
    ready = [row for row in rows if is_ready(row, variant, folder)]
    left = []
    for row in ready[1:]:
        format, _, type = row.partition("-")
        tries = [one.status for one in results if one.subject == f"{architecture} {format} {type or 'fp32'}"]
        if "valid" not in tries and len(tries) < TRIES:
            left.append((len(tries), row))
    return [ready[0], min(left, key=lambda one: one[0])[1]] if left else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--calibration", help="photographs, as `quantize --calibration` takes them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, a row")
    parser.add_argument("--warmup", type=float, default=20.0, help="at most so many seconds of warm-up, a row")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--next", action="store_true", help="time one row that is not there yet, beside the first")
    parser.add_argument("--folder", type=Path, default=Path("build") / "bench-segmenter")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "segmenter.jsonl")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    probes.IMAGES = PHOTOGRAPHS
    rows = args.rows.split(",")
    if args.next:
        absent = [row for row in rows if not is_ready(row, args.variant, args.folder)]
        if absent:
            print(f"{', '.join(absent)} left out: not built below {args.folder}; call with --build-only first")
        rows = next_rows(rows, args.variant, args.folder, args.out)
        if not rows:
            print("nothing is left to be timed")
            return
    made = [contender(row, args.variant, args.folder, args.calibration) for row in rows]
    if not args.build_only:
        plan = Plan(batches=(1,), seconds=args.seconds, threads=args.threads, warmup_limit_s=args.warmup)
        with args.out.open("ab") as file:
            for row in bench([one for one in made if one is not None], plan, progress=say):
                time = "–" if row.median_ms is None else f"{row.median_ms:.0f} ms"
                print(row.subject, time, f"error {row.parity}", row.status, row.reason or "", flush=True)
                file.write(compare.encode_results([row]))


def say(done: int, total: int, what: str) -> None:
    print(f"{done}/{total} {what}", flush=True)


if __name__ == "__main__":
    main()
