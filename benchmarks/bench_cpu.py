"""The native CPU engine beside OpenVINO, ONNX Runtime and torch.compile: one model, every type, interleaved.

    python benchmarks/bench_cpu.py --calibration photographs.parquet --variants tiny,small,base --batches 1,8

Random weights, expand, project and downsamples in 8 bits with ranges from the photographs and no corrections,
everything below --folder built once (--build-only does nothing else); what this machine cannot build is left out, with
the reason. A process each and turns that rotate, as in `convnext-deploy bench`. Beside every time stands the relative
error of the outputs against the fp32 source on the bundled photographs, from the artifact's manifest; for NNCF's, which
the interpreter of --nncf-python makes from this project's fp32 graph, it is measured here. The share of the peak is the
time of the multiply-accumulates alone, at rates that the same run measures (`doctor --peaks`), over the time measured.

--isa avx2 makes a newer CPU compute as one without AVX-512 and VNNI, and --isa avx_vnni as one without AVX-512: native
takes that path and OpenVINO's oneDNN is limited to it (ONEDNN_MAX_CPU_ISA). ONNX Runtime has no such switch and is left
out.
"""

import argparse
import itertools
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from drafts import IMAGES, draft

from convnext_deploy import api, env
from convnext_deploy.artifact import manifest, verify
from convnext_deploy.artifact.session import RunOptions, Session, run_in_batches
from convnext_deploy.data import preprocess, sources
from convnext_deploy.errors import CheckFailed, MissingPackageError
from convnext_deploy.models import registry
from convnext_deploy.native import library, peak
from convnext_deploy.native.packed import TYPES, ProductType
from convnext_deploy.quantization import saturation
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.records.plan import Target, WeightBits
from convnext_deploy.records.timing import BenchResult
from convnext_deploy.timing import compare, roofline
from convnext_deploy.workflows import contenders
from convnext_deploy.workflows.bench import Plan, bench
from convnext_deploy.workflows.contenders import Contender, Wanted

FLOATS: tuple[tuple[str, Precision], ...] = (
    ("native", "fp32"), ("openvino", "fp32"), ("onnx", "fp32"), ("native", "bf16"), ("openvino", "bf16"),
)  # fmt: skip
QUANTIZED: tuple[Target, ...] = ("native", "openvino", "onnx")
KINDS = ("expand", "project", "downsample")  # what runs in 8 bits
LIMITS = {"avx2": "AVX2", "avx_vnni": "AVX2_VNNI"}  # oneDNN's names of this engine's paths
RANGE = BatchRange(min=1, opt=8, max=64)


def artifacts(
    variant: str, folder: Path, calibration: str, bits: WeightBits, engines: Collection[str], types: Collection[str]
) -> Iterator[Path]:
    """Build what is not there yet, and give every folder; what this machine cannot build is left out with its reason.

    OpenVINO's bf16 is one on a machine without such products, and 8 bits may be another.
    """
    for format, precision in FLOATS:
        if format not in engines or precision not in types:
            continue

        def as_float(out: Path, format: str = format, precision: Precision = precision) -> None:
            api.export("random", variant=variant, format=format, precision=precision, batch=RANGE, out=out, force=True)

        yield from _built(folder / f"{variant}-{format}-{precision}", as_float)
    for target in QUANTIZED if "int8" in types else ():
        if target not in engines:
            continue

        def as_int8(out: Path, target: Target = target) -> None:
            plan = folder / f"{variant}-{target}-w{bits}.json"
            draft("random", variant, target, plan, calibration, KINDS, weight_bits=bits)
            api.export("random", variant=variant, format=target, plan=plan, batch=RANGE, out=out, force=True)

        yield from _built(folder / f"{variant}-{target}-w{bits}-int8", as_int8)


def _built(out: Path, build: Callable[[Path], None]) -> Iterator[Path]:
    """The folder, built now where it is not there; nothing where it cannot be."""
    if not (out / manifest.MANIFEST_NAME).exists():
        print("building", out, flush=True)
        try:
            build(out)
        except (CheckFailed, MissingPackageError) as error:
            print(f"{out.name} is left out: {error}", flush=True)
            return
    yield out


def compiled(variant: str, precision: Precision) -> Contender:
    """timm's own module through torch.compile."""
    architecture, _ = registry.resolve(variant)
    want = Wanted(
        model=architecture, runtime="torch.compile", precision=precision, task="classify", image_size=(224, 224),
        device="cpu",
    )  # fmt: skip
    return contenders.built([want], print)[0]


def nncf(python: str, mode: str, variant: str, folder: Path, calibration: str, batch: int) -> Contender:
    """NNCF's quantization of this project's fp32 graph, for one batch size: OpenVINO runs its open ones wrongly."""
    source, path = folder / f"{variant}-onnx-fp32", folder / f"{variant}-{mode}-{batch}.xml"
    like = manifest.read(folder / f"{variant}-openvino-fp32")
    if not path.exists():
        print("building", path, flush=True)
        images = folder / f"{variant}-calibration.npz"
        model = like.manifest.model
        to_pixels = preprocess.transform(like.manifest.preprocessing, model.image_size, model.in_chans)
        chosen = sources.subset(sources.open_source(calibration), IMAGES)
        pixels = np.stack([to_pixels(chosen.read(index)) for index in range(len(chosen))])
        normalized = preprocess.as_input(pixels, like.manifest.preprocessing, "float32")
        np.savez(images, images=normalized, labels=np.zeros(len(pixels), np.int64))
        script = Path(__file__).with_name("foreign.py")
        subprocess.run([python, script, mode, source / "model.onnx", images, path, str(batch)], check=True)
    found = contenders.of_artifact(like.path, "cpu")
    opener = {"path": str(path), "like": str(like.path), "batch": batch}
    return msgspec.structs.replace(
        found, opener="bench_cpu:open_ir", arguments=opener, artifact=None, artifact_sha256=None, artifact_bytes=None,
        batch=BatchRange(min=batch, opt=batch, max=batch), eight_bits="int8", label=mode,
        parity=_distance(opener, source),
    )  # fmt: skip


def _distance(opener: dict[str, object], source: Path) -> float:
    """The worst relative error on the bundled photographs, as a manifest has it."""
    session = open_ir(**opener, threads=None)  # type: ignore[arg-type]
    model = session.manifest.model
    pixels = preprocess.probe_images(model.in_chans, model.image_size, 16)
    images = preprocess.as_input(pixels, session.manifest.preprocessing, "float32")
    expected = run_in_batches(api.load(source), images)
    limit = verify.TOLERANCES["fp32"]
    error = verify.compare(run_in_batches(session, images), expected, limit, "bundled", True).relative_error
    assert error is not None
    return error


def open_ir(path: str, like: str, batch: int, threads: int | None) -> Session:
    """Called in the worker: an IR that others made, opened as this project's own of the same model."""
    from convnext_deploy.formats.openvino import OpenVinoSession

    found = manifest.read(Path(like)).manifest
    fixed = msgspec.structs.replace(found.export, batch=BatchRange(min=batch, opt=batch, max=batch))
    return OpenVinoSession(Path(path), msgspec.structs.replace(found, export=fixed), RunOptions(threads=threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="photographs, as `quantize --calibration` takes them")
    parser.add_argument("--variants", default="tiny")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", default=f"1,{env.usable_cores()}", help="one number or several; each is a run")
    parser.add_argument("--weight-bits", type=int, choices=(7, 8), help="of the plans; left out: what this CPU wants")
    parser.add_argument("--isa", choices=tuple(LIMITS), help="a lesser path than this CPU's best")
    parser.add_argument("--engines", default="native,openvino,onnx")
    parser.add_argument("--types", default="fp32,bf16,int8")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, a row")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which compiles for minutes")
    parser.add_argument("--nncf-python", help="an interpreter that has nncf and openvino")
    parser.add_argument("--folder", type=Path, default=Path("build") / "bench-cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "cpu.jsonl")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    engines, bits = (
        set(args.engines.split(",")),
        args.weight_bits or saturation.bits_for("u8s8", saturation.saturates()),
    )
    if args.isa:
        os.environ |= {library.ISA_VARIABLE: args.isa, "ONEDNN_MAX_CPU_ISA": LIMITS[args.isa]}
        engines -= {"onnx"}
        bits = args.weight_bits or (7 if args.isa == "avx2" else 8)
    for variant, threads in itertools.product(args.variants.split(","), map(int, args.threads.split(","))):
        paths = list(artifacts(variant, args.folder, args.calibration, bits, engines, args.types.split(",")))
        if args.build_only:
            continue
        for batch in map(int, args.batches.split(",")):
            found = [contenders.of_artifact(path, "cpu") for path in paths]
            if args.compile:
                found += [compiled(variant, precision) for precision in PRECISIONS]
            for mode in ("nncf", "nncf-transformer") if args.nncf_python else ():
                found.append(nncf(args.nncf_python, mode, variant, args.folder, args.calibration, batch))
            measure(found, Plan(batches=(batch,), seconds=args.seconds, threads=threads), args.out)


def measure(found: Sequence[Contender], plan: Plan, out: Path) -> None:
    """Time them, print a line each, and append the results. The peaks are the best of before and after."""
    named = [c if c.artifact is None else msgspec.structs.replace(c, label=Path(c.artifact).name) for c in found]
    before = peaks(plan)
    rows = list(bench(named, plan, progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True)))
    after = peaks(plan)
    rates = {type: max(before[type], after[type]) for type in TYPES}
    print("GMAC/s at most:", {type: round(rate) for type, rate in rates.items()}, flush=True)
    with out.open("ab") as file:
        for row in (with_share(row, rates) for row in rows):
            share = "" if row.percent_of_bound is None else f"{row.percent_of_bound:.0f} % of the peak"
            time = "–" if row.median_ms is None else f"{row.median_ms:.2f} ms"
            error = "" if row.parity is None else f"error {row.parity:.2g}"
            print(row.subject, f"batch {row.batch}", time, share, error, row.status, row.reason or "", flush=True)
            file.write(compare.encode_results([row]))


def peaks(plan: Plan) -> dict[ProductType, float]:
    """GMAC/s of each type on the threads that are measured."""
    threads = plan.threads or env.usable_cores()
    return {type: max(peak.gmacs_per_s(type, threads, 0.05) for _ in range(5)) for type in TYPES}


def with_share(row: BenchResult, rates: Mapping[ProductType, float]) -> BenchResult:
    """With the percentage that the multiply-accumulates alone would take of the measured time.

    Args:
        rates: GMAC/s of each type.
    """
    if row.median_ms is None:
        return row
    spec = registry.spec(row.model, image_size=row.image_size)
    ms = 0.0
    for operation in roofline.operations(spec):
        float_type: ProductType = "bf16" if row.precision == "bf16" else "fp32"
        type = "int8" if row.eight_bits and operation.name in KINDS else float_type
        ms += operation.count * operation.matrix_macs / rates[type] / 1e6
        ms += operation.count * operation.vector_macs / rates["fp32"] / 1e6
    return msgspec.structs.replace(row, percent_of_bound=100 * row.batch * ms / row.median_ms)


PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

if __name__ == "__main__":
    main()
