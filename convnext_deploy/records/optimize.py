"""What `optimize` tried, what each candidate did, and which one it chose."""

from typing import Annotated, Literal

import msgspec

from .accuracy import Verdict
from .base import (
    SCHEMA,
    BatchSize,
    Device,
    Fraction,
    InputKind,
    PlanType,
    Positive,
    Precision,
    Record,
    SchemaVersion,
    Sha256,
)
from .manifest import Preprocessing
from .timing import BenchResult

Objective = Literal["latency", "throughput"]
# In the order in which a candidate meets them; all but the first three are ends.
State = Literal[
    "waiting", "built", "timed", "left out", "rejected", "slower", "dropped", "not tried", "not proven", "passed",
    "chosen",
]  # fmt: skip


class Candidate(Record, frozen=True, kw_only=True):
    """One runtime with one type, or one plan: what it is, how far it came, and why it went no further."""

    name: str
    runtime: str  # the format's name
    precision: Precision  # of what is not in 8 bits
    eight_bits: PlanType | None = None
    operations: tuple[str, ...] = ()  # in 8 bits
    kernels: bool = False  # runs the fused CUDA kernels
    state: State = "waiting"
    reason: str | None = None
    artifact_sha256: Sha256 | None = None  # of manifest.json
    bytes: int | None = None
    parity: float | None = None  # relative error against the fp32 source on the bundled images
    ms: float | None = None  # of a batch: median latency, or with the objective throughput 1000 batch / images/s
    interval_ms: tuple[float, float] | None = None  # 95 % of the median
    timing: str | None = None  # "valid", or what disturbed the measurement
    agreement: Fraction | None = None  # with the fp32 baseline's first class, on the selection images
    lost: int | None = None  # selection images that only the baseline gets right
    gained: int | None = None  # and that only this candidate does
    verdict: Verdict | None = None  # against the baseline on the final images

    @property
    def type(self) -> str:
        return self.eight_bits or self.precision

    @property
    def exact(self) -> bool:
        """Whether it is the source in its own type: verified, and with nothing to lose."""
        return self.precision == "fp32" and self.eight_bits is None


class OptimizeResult(Record, frozen=True, kw_only=True, tag_field="record", tag="optimize"):
    """`<out>.optimize/result.json`: everything that a run measured, and what it chose."""

    schema_version: SchemaVersion = SCHEMA
    created: str  # ISO 8601, UTC
    model: str
    weights: str
    weights_sha256: Sha256  # of the tensors
    image_size: tuple[Positive, Positive]
    input: InputKind
    preprocessing: Preprocessing
    device: Device
    threads: int | None
    objective: Objective
    batch: BatchSize
    max_drop: float  # percentage points of top-1
    alpha: float
    max_latency_ms: float | None
    data: str
    images: dict[str, Annotated[int, msgspec.Meta(ge=0, le=10**9)]]  # calibration, selection, final: disjoint
    candidates: tuple[Candidate, ...]
    baseline: str  # the fastest in fp32, which the others are judged against
    baseline_top1: Fraction | None  # on the final images; None where nothing had to be judged there
    order: tuple[str, ...]  # finalists, the one that agrees most first; the first that does not pass ends the walk
    chosen: str | None  # None: none keeps the limit of latency
    why: str
    timings: tuple[BenchResult, ...]  # of the last, interleaved measurement
    seconds: dict[str, float]  # that each part took in this call
    notes: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None  # that repeats it
    machine: dict[str, str | int]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        """What is read from a file is as complete as what was measured.

        Raises:
            ValueError: a set of images is missing.
        """
        if missing := {"calibration", "selection", "final"} - self.images.keys():
            raise ValueError(f"images has no {min(missing)}; expected calibration, selection and final")

    @property
    def fastest_exact(self) -> Candidate:
        """In fp32, by the last times; the baseline was the fastest before them."""
        timed = [row for row in self.candidates if row.exact and row.ms is not None]
        return min(timed, key=lambda row: row.ms or 0.0)
