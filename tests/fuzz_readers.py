"""Every reader of a record that a user's file can be, with files it takes: what `fuzz` damages."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fuzz
import msgspec
from artifact_files import PROBE
from sample_records import bench_row, evaluation, noisy, optimize_result, profile, verdict

from convnext_deploy.accuracy import gate
from convnext_deploy.accuracy.evaluation import read_result
from convnext_deploy.artifact import manifest as manifests
from convnext_deploy.cli import terminal
from convnext_deploy.quantization import plan as plans
from convnext_deploy.records.manifest import EngineRecord, Parity, Preprocessing
from convnext_deploy.records.plan import CalibrationRecord, OperationPlan, Plan
from convnext_deploy.records.timing import Ceilings, RooflineResult, RooflineRow
from convnext_deploy.reports import comparisons, results
from convnext_deploy.reports.markdown import page
from convnext_deploy.runtimes.tensorrt import files, preflight
from convnext_deploy.timing import compare

Reader = tuple[Sequence[bytes], Callable[[Sequence[bytes], int], Iterator[bytes]], Callable[[bytes], object]]
LIMITS = b"""max_drop = 0.3  # points
alpha = 0.05
min_agreement = 99.5
max_class_drop = 5
max_latency_ratio = 1.0
max_size_ratio = 0.5
"""


def plan() -> Plan:
    return Plan(
        target="native", architecture="convnext_atto", weights_sha256="0" * 64, input="float32", image_size=(64, 64),
        rest="fp32",
        calibration=CalibrationRecord(data="d", data_sha256="1" * 64, images=8, random=False, method="mse"),
        operations={
            "stem": OperationPlan(type="u8s8", scale=0.5, zero_point=3),
            "head": OperationPlan(type="fp32"),
        },
    )  # fmt: skip


def roofline() -> RooflineResult:
    row = RooflineRow(stage="stem", operation="conv", count=1, gflop=1.0, mb=2.0, ms=0.1, limit="matrix")
    ceilings = Ceilings(name="c", source="s", matrix_tflops={"fp32": 1.0}, vector_tflops=0.5, copy_gb_s=10.0)
    return RooflineResult(
        time="t", model="convnext_tiny", task="classify", image_size=(64, 64), precision="fp32", batch=1,
        ceilings=ceilings, rows=(row,), gflop=1.0, mb=2.0, ms=0.1, images_per_s=1e4,
        machine={"cpu": "a", "cores": 2}, versions={"torch": "2"},
    )  # fmt: skip


def engine() -> EngineRecord:
    return EngineRecord(
        module="tensorrt_rtx", version="1.7.1", targets=("sm86",), profiles=({"images": ((1, 3), (8, 3), (8, 3))},),
        layers={"convolution fp16": 5}, products={"stem": ("fp16", 1e6)}, build_s=1.0, engine_bytes=32,
        peak_memory_mb=100.0, timing_cache=None,
    )  # fmt: skip


def readers(folder: Path) -> dict[str, Reader]:
    """Name to files, how they are damaged, and what reads and shows one."""
    path = folder / "x.json"

    def from_file(reader: Callable[[Path], Any]) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            path.write_bytes(content)
            return reader(path)

        return read

    def shown(content: bytes) -> object:
        path.write_bytes(content)
        return page(results.read([path]), "t")

    def compared(content: bytes) -> object:
        path.write_bytes(content)
        rows = compare.read_results(path)
        verdicts = compare.compare(old, rows, 0.05)
        return comparisons.junit(verdicts), comparisons.markdown(verdicts)

    def limited(content: bytes) -> object:
        return gate.limits_from(gate.limits_from_toml(content.decode("utf-8", "replace"), "l.toml"))

    def inspected(content: bytes) -> object:
        found = manifests.decode(content, "m")
        return terminal.details(folder, found, 1)

    def loadable(content: bytes) -> object:
        # As far as it is read before it is loaded.
        header = files.HEADER.pack(b"ptrt", files.HEADER.size, 1, 7, 1, 0, b"ptrt", 0x40)
        (folder / files.ENGINE_FILE).write_bytes(header)
        (folder / files.RECORD_FILE).write_bytes(content)
        return preflight.inspected(folder, PROBE)

    def lines(*records: Any) -> bytes:
        return b"\n".join(map(msgspec.json.encode, records))

    parity = Parity(
        images="bundled", samples=4, relative_error=1e-6, cosine=1.0, top1_agreement=1.0, near_ties=0, failures=()
    )
    with_parity = msgspec.structs.replace(
        PROBE, parity=(parity,), preprocessing=Preprocessing(mean=(0.5,), std=(0.5,), assumed=("mean", "std"))
    )
    old = [bench_row(noisy(0))]
    offline = {"scenario": "offline", "streams": 2}
    old.append(bench_row(noisy(0), **offline))
    measured = lines(bench_row(noisy(0, turns=2)), bench_row([[50.0]] * 8, **offline))
    every = [lines(bench_row([[5.0] * 3] * 2)), lines(profile()), lines(roofline(), profile()), lines(evaluation()),
             lines(verdict()), lines(optimize_result())]  # fmt: skip
    return {
        "report": (every, fuzz.records, shown),
        "bench": ([measured], fuzz.records, compared),
        "evaluation": ([lines(evaluation())], fuzz.records, from_file(read_result)),
        "plan": ([lines(plan())], fuzz.records, from_file(plans.read)),
        "limits": ([LIMITS], fuzz.damaged, limited),
        "engine": ([lines(engine())], fuzz.records, loadable),
        "manifest": ([lines(PROBE), lines(with_parity)], fuzz.records, inspected),
    }
