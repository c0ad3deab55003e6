"""The ladder of quantization: accuracy and speed of 8-bit artifacts beside those of onnxruntime, NNCF and ModelOpt.

    python scripts/make_demo_data.py train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz build/fashion-train.parquet
    python benchmarks/bench_quantize.py --what build    --nncf-python PYTHON --modelopt-python PYTHON
    python benchmarks/bench_quantize.py --what accuracy
    python benchmarks/bench_quantize.py --what speed --subjects convnext-tiny --rows 'onnx *' --batches 1

Artifacts are built once, below --folder; accuracy and speed are measured on the same files, each pass by itself:
accuracy can be measured on a busy machine. Everybody calibrates on the same number of images that nobody is tested
on. Peers are given two graphs: timm's own export, as their users would, and this project's folded one.

The twins compute the same functions as the models that they are twins of, in numbers that are hard to quantize
(tests/reparametrize.py). Small models say nothing about speed: that is what `convnext-tiny` is for, with random
weights at 224 pixels.
"""

import argparse
import fnmatch
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import peers
from numpy.typing import NDArray
from records import append, median_and_spread

from convnext_deploy import api, formats
from convnext_deploy.accuracy.statistics import drop_bounds
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.session import RunOptions, Session, run_in_batches
from convnext_deploy.data import preprocess, sources
from convnext_deploy.env import usable_cores
from convnext_deploy.errors import CheckFailed
from convnext_deploy.formats.onnx import OnnxSession
from convnext_deploy.formats.openvino import OpenVinoSession
from convnext_deploy.models import checkpoint as weights
from convnext_deploy.models import passes
from convnext_deploy.quantization import plan as plans
from convnext_deploy.quantization.calibrate import calibrate
from convnext_deploy.quantization.distance import outputs, pixels_of
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import Manifest
from convnext_deploy.records.plan import RangeMethod, Target
from convnext_deploy.timing import measure

ROOT = Path(__file__).resolve().parent.parent
FASHION = ROOT / "examples" / "fashion-mnist"
METHODS: tuple[RangeMethod, ...] = ("minmax", "moving_average", "percentile", "entropy", "mse")
CALIBRATION_IMAGES = 256
BATCH = 8  # of the accuracy pass; dynamic scales depend on it
ALPHA = 0.05  # of each bound of a drop


@dataclass(frozen=True)
class Subject:
    """What is quantized. Without a checkpoint, random weights; without labelled images, speed only."""

    name: str
    checkpoint: Path | None
    image_size: tuple[int, int]
    labelled: Path | None
    calibration: Path
    twin: bool = False


@dataclass(frozen=True)
class Row:
    """One artifact of each subject. `make` writes it into a folder."""

    name: str
    runtime: Target
    source: str  # of the graph: "timm", "folded" (ours, as peers are given it) or "ours"
    make: "Callable[[Row, Workplace, Path], None]"
    rest: Precision = "fp32"
    timed: bool = True  # False: another row's graph with other numbers

    @property
    def folder(self) -> str:
        return f"{self.runtime} {self.name}, {self.source}" + (f", {self.rest}" if self.rest != "fp32" else "")


class Workplace:
    """A subject's folder, and what its rows are made from; everything is made once."""

    def __init__(self, subject: Subject, folder: Path, pythons: dict[str, str]) -> None:
        self.subject, self.folder, self.pythons = subject, folder, pythons
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path | None:
        if not self.subject.twin or self.subject.checkpoint is None:
            return self.subject.checkpoint
        path = self.folder / "twin.safetensors"
        if not path.exists():
            sys.path.append(str(ROOT / "tests"))
            from reparametrize import write_twin

            write_twin(self.subject.checkpoint, path)
        return path

    @property
    def source(self) -> dict[str, Any]:
        """Which model: arguments of `api.export`, and of `weights.load`."""
        variant = None if self.checkpoint else "tiny"
        return {"weights": str(self.checkpoint or "random"), "variant": variant, "image_size": self.subject.image_size}

    def facts(self) -> Manifest:
        """Of the fp32 artifact: what a peer's file takes and gives too."""
        return manifest.read(self.folder / REFERENCE.folder).manifest

    def graph(self, source: str) -> Path:
        """The ONNX file that a peer starts from."""
        if source == "folded":
            return self.folder / REFERENCE.folder / "model.onnx"
        path = self.folder / "timm.onnx"
        if not path.exists():
            peers.export_timm(self.checkpoint, self.facts().model, path)
        return path

    def calibration(self) -> sources.ImageSource:
        return sources.subset(sources.open_source(str(self.subject.calibration)), CALIBRATION_IMAGES)

    def images(self) -> Path:
        """The calibration images as peers take them."""
        path = self.folder / "calibration.npz"
        if not path.exists():
            source = self.calibration()
            np.savez(path, images=as_input(source, self.facts()), labels=cast(Any, source.labels))
        return path


def as_input(source: sources.ImageSource, facts: Manifest) -> NDArray[np.float32]:
    to_pixels = preprocess.transform(facts.preprocessing, facts.model.image_size, facts.model.in_chans)
    pixels = np.stack([to_pixels(source.read(index)) for index in range(len(source))])
    return cast(NDArray[np.float32], preprocess.as_input(pixels, facts.preprocessing, "float32"))


def model_file(row: Row, folder: Path) -> Path:
    """Named as our formats name theirs, so that our sessions open it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("model.onnx" if row.runtime == "onnx" else "model.xml")


# Rows -----------------------------------------------------------------------------------------------------------------


def exported(row: Row, place: Workplace, out: Path) -> None:
    api.export(**place.source, format=row.runtime, precision=row.rest, out=out, force=True)


def timm_export(row: Row, place: Workplace, out: Path) -> None:
    model_file(row, out).write_bytes(place.graph("timm").read_bytes())


def static(linears: bool) -> Callable[[Row, Workplace, Path], None]:
    def make(row: Row, place: Workplace, out: Path) -> None:
        with np.load(place.images()) as file:
            peers.quantize_static(place.graph(row.source), file["images"], model_file(row, out), linears)

    return make


def dynamic(row: Row, place: Workplace, out: Path) -> None:
    peers.quantize_dynamic(place.graph(row.source), model_file(row, out))


def foreign(row: Row, place: Workplace, out: Path) -> None:
    """By a tool that another interpreter has.

    OpenVINO 2026.4.1's CPU plugin computes what NNCF makes of timm's export rightly with a fixed batch and wrongly with
    an open one (the bundled model: 95 and 63 % of the calibration images, from one and the same file). So these rows
    have the accuracy pass's batch. With the folded graph both are the same.
    """
    python = place.pythons[row.name.partition("-")[0]]
    script, file = ROOT / "benchmarks" / "foreign.py", model_file(row, out)
    batch = str(BATCH if row.source == "timm" else -1)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source.onnx"
        shutil.copyfile(place.graph(row.source), source)  # ModelOpt rewrites the file that it is given
        subprocess.run([python, script, row.name, source, place.images(), file, batch], check=True, capture_output=True)


def drafted(method: RangeMethod, *kinds: str) -> Callable[[Row, Workplace, Path], None]:
    """Some kinds of operations in 8 bits, with no corrections."""

    def make(row: Row, place: Workplace, out: Path) -> None:
        loaded = weights.load(**place.source)
        facts = loaded.preprocessing
        probe = pixels_of(sources.subset(place.calibration(), 4), facts, loaded.model)
        passes.fold(loaded.model, None, lambda model: outputs(model, probe, facts))
        paths = plans.products(loaded.model)
        names = [name for name in paths if plans.kind_of(name) in kinds]
        statistics = calibrate(
            loaded.model, tuple(paths.values()), place.calibration(), preprocessing=facts, images=CALIBRATION_IMAGES,
            resume=place.folder / "calibration.safetensors",
        )  # fmt: skip
        how = formats.eight_bits_of(row.runtime)
        plan = plans.draft(
            loaded.model, statistics, names, type=how.int8, target=row.runtime, eight_bits=how, method=method,
            input="float32", rest=row.rest, weights_sha256=loaded.weights.tensors_sha256,
        )  # fmt: skip
        plans.write(out.with_suffix(".json"), plan, {})
        api.export(**place.source, format=row.runtime, plan=out.with_suffix(".json"), out=out, force=True)

    return make


def quantized(rounding: bool) -> Callable[[Row, Workplace, Path], None]:
    """`quantize` as a user calls it: the linears, with the corrections that help."""

    def make(row: Row, place: Workplace, out: Path) -> None:
        path = out.with_suffix(".json")
        api.quantize(
            **place.source, out=path, calibration=str(place.subject.calibration), target=row.runtime,
            images=CALIBRATION_IMAGES, rest=row.rest, rounding=rounding, force=True,
        )  # fmt: skip
        api.export(**place.source, format=row.runtime, plan=path, out=out, force=True)

    return make


def planned(plan: Path) -> Callable[[Row, Workplace, Path], None]:
    def make(row: Row, place: Workplace, out: Path) -> None:
        api.export(**place.source, format=row.runtime, plan=plan, out=out, force=True)

    return make


LINEARS = ("expand", "project")
REFERENCE = Row("fp32", "onnx", "ours", exported)
_PEERS: tuple[tuple[str, Target, Callable[[Row, Workplace, Path], None]], ...] = (
    ("quantize_static", "onnx", static(linears=False)),
    ("quantize_static linears", "onnx", static(linears=True)),
    ("quantize_dynamic", "onnx", dynamic),
    ("modelopt", "onnx", foreign),
    ("nncf", "openvino", foreign),
    ("nncf-transformer", "openvino", foreign),
    ("nncf-accuracy", "openvino", foreign),
)
_RUNTIMES: tuple[Target, ...] = ("onnx", "openvino")
ROWS = (
    REFERENCE,
    Row("fp32", "onnx", "timm", timm_export),
    Row("fp32", "openvino", "ours", exported),
    Row("bf16", "openvino", "ours", exported, "bf16"),
    *(
        Row(name, runtime, source, make, timed=source == "folded")
        for name, runtime, make in _PEERS
        for source in ("timm", "folded")
    ),
    *(
        Row(f"linears {method}", runtime, "ours", drafted(method, *LINEARS), timed=method == "mse")
        for runtime in _RUNTIMES
        for method in METHODS
    ),
    *(
        Row("linears, downsamples mse", runtime, "ours", drafted("mse", *LINEARS, "downsample"))
        for runtime in _RUNTIMES
    ),
    Row("linears mse", "openvino", "ours", drafted("mse", *LINEARS), "bf16"),
    *(
        Row(name, runtime, "ours", quantized(rounding), timed=False)
        for runtime in _RUNTIMES
        for name, rounding in (("corrected", False), ("corrected, rounding", True))
    ),
)


def build(row: Row, place: Workplace) -> None:
    """Make what is not there yet. One that fails says why and does not end the others."""
    out = place.folder / row.folder
    if out.exists():
        return
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    begin = time.perf_counter()
    try:
        row.make(row, place, part)
    except subprocess.CalledProcessError as error:
        said = f"failed: {error.stderr.decode().strip().rpartition(chr(10))[2]}"
    except CheckFailed as error:
        said = f"rejected: {error}"
    else:
        part.rename(out)
        said = f"built in {time.perf_counter() - begin:.0f} s"
    print(f"{place.subject.name}, {row.folder}: {said}", flush=True)


def opened(row: Row, place: Workplace) -> Session:
    """An artifact of ours, or a peer's file in the place of one."""
    folder = place.folder / row.folder
    if (folder / manifest.MANIFEST_NAME).exists():
        return api.load(folder, threads=usable_cores())
    session = OnnxSession if row.runtime == "onnx" else OpenVinoSession
    return session(model_file(row, folder), place.facts(), RunOptions(threads=usable_cores()))


def described(row: Row, place: Workplace) -> dict[str, Any]:
    """What a record says about a row, beside what was measured."""
    files = [file for file in manifest.file_records(place.folder / row.folder) if file.path.startswith("model")]
    return {
        "benchmark": "quantize", "subject": place.subject.name, "runtime": row.runtime, "row": row.name,
        "source": row.source, "rest": row.rest, "bytes": sum(file.bytes for file in files),
        "files_sha256": {file.path: file.sha256 for file in files},
    }  # fmt: skip


# Measuring ------------------------------------------------------------------------------------------------------------


def accuracy(rows: Sequence[Row], place: Workplace, limit: int | None) -> None:
    assert place.subject.labelled is not None
    source = sources.open_source(str(place.subject.labelled))
    source = source if limit is None else sources.subset(source, limit)
    images, labels = as_input(source, place.facts()), source.labels
    expected = run_in_batches(opened(REFERENCE, place), images, BATCH)[0]
    right = expected.argmax(1) == labels
    for row in rows:
        session = opened(row, place)
        found = run_in_batches(session, images, BATCH)[0]
        session.bind(images[:BATCH])
        truth = session.precision()
        correct = found.argmax(1) == labels
        lost, gained = int((right & ~correct).sum()), int((correct & ~right).sum())
        low, high = drop_bounds(lost, gained, len(images), ALPHA)
        append(
            {
                **described(row, place), "what": "accuracy", "data": source.name, "images": len(images),
                "batch": BATCH, "calibration_images": CALIBRATION_IMAGES, "top1": float(correct.mean()),
                "drop": (lost - gained) / len(images), "drop_low": low, "drop_high": high, "alpha": ALPHA,
                "lost": lost, "gained": gained, "agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
                "logits_relative_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
                # Dynamic products take floats in, and onnxruntime's profile does not tell what they compute in.
                "products_in_8_bits": None if row.make is dynamic else truth.quantized,
                "executed": None if row.make is dynamic else truth.executed,
            },
            "quantize",
        )  # fmt: skip


def speed(rows: Sequence[Row], place: Workplace, batch: int, seconds: float) -> None:
    facts = place.facts()
    pixels = preprocess.probe_images(facts.model.in_chans, facts.model.image_size, batch)
    images = preprocess.as_input(pixels, facts.preprocessing, "float32")
    sessions = {row.folder: opened(row, place) for row in rows}
    timings = measure.interleaved(sessions, dict.fromkeys(sessions, images), seconds)
    for row, timing in zip(rows, timings, strict=True):
        append(
            {
                **described(row, place), "what": "speed", "batch": batch, "threads": timing.threads,
                "scope": "compute, host to host", "unit": "ms", "samples": timing.samples_ms, "steady": timing.steady,
                **median_and_spread(timing.samples_ms),
                "times": {other.artifact: other.median_ms / timing.median_ms for other in timings},
            },
            "quantize",
        )  # fmt: skip


def subjects(shared: Path, fashion_train: Path) -> Iterator[Subject]:
    fashion = Subject(
        "fashion-mnist", FASHION / "model.safetensors", (64, 64), FASHION / "test-2000.parquet", fashion_train
    )
    tiny_imagenet = Subject(
        "tiny-imagenet", shared / "models" / "convnext_atto_tiny_imagenet.safetensors", (64, 64),
        shared / "data" / "tiny-imagenet-val.parquet", shared / "data" / "tiny-imagenet-calib.parquet",
    )  # fmt: skip
    for subject in (fashion, tiny_imagenet):
        yield subject
        yield replace(subject, name=f"{subject.name} twin", twin=True)
    yield Subject("convnext-tiny", None, (224, 224), None, shared / "data" / "imagenet-sample.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("build", "accuracy", "speed"), required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "ladder")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="of the development data")
    parser.add_argument("--fashion-train", type=Path, default=ROOT / "build" / "fashion-train.parquet")
    parser.add_argument("--subjects", nargs="+", help="only these")
    parser.add_argument("--rows", nargs="+", default=["*"], help="only those whose folder matches a pattern")
    parser.add_argument("--nncf-python", help="an interpreter that has nncf")
    parser.add_argument("--modelopt-python", help="an interpreter that has modelopt")
    parser.add_argument("--plan", nargs=2, action="append", default=[], metavar=("SUBJECT", "FILE"), help="of a search")
    parser.add_argument("--limit", type=int, help="images of the accuracy pass; default all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # advice of onnxruntime's quantizers
    given = {"nncf": args.nncf_python, "modelopt": args.modelopt_python}
    pythons = {tool: python for tool, python in given.items() if python}
    for subject in subjects(args.shared, args.fashion_train):
        if args.subjects and subject.name not in args.subjects:
            continue
        place = Workplace(subject, args.folder / subject.name, pythons)
        found = [file for name, file in args.plan if name == subject.name]
        searched = [Row("searched", plans.read(Path(file)).plan.target, "ours", planned(Path(file))) for file in found]
        rows = [row for row in (*ROWS, *searched) if any(fnmatch.fnmatch(row.folder, pattern) for pattern in args.rows)]
        if args.what == "build":
            for row in (REFERENCE, *rows):
                if row.make is foreign and row.name.partition("-")[0] not in pythons:
                    print(f"{subject.name}, {row.folder}: no interpreter was given, left out", flush=True)
                elif row.name != "nncf-accuracy" or subject.labelled is not None:
                    build(row, place)
            continue
        built = [row for row in rows if (place.folder / row.folder).is_dir()]
        for row in rows:
            if row not in built:
                print(f"{subject.name}, {row.folder}: not built, left out", flush=True)
        if args.what == "accuracy" and subject.labelled is not None:
            accuracy(built, place, args.limit)
        if args.what == "speed":
            for batch in args.batches:
                speed([row for row in built if row.timed], place, batch, args.seconds)


if __name__ == "__main__":
    main()
