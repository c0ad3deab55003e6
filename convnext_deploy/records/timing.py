"""Benchmarks, profiles and rooflines."""

from typing import Annotated, Literal

import msgspec

from .base import (
    SCHEMA,
    Above0,
    BatchSize,
    Device,
    Fraction,
    PlanType,
    Positive,
    Precision,
    Record,
    SchemaVersion,
    Sha256,
    Task,
)


class Timing(Record, frozen=True, kw_only=True):
    """Latency of `Session.step` on one bound batch; every sample is kept."""

    artifact: str
    batch: BatchSize
    threads: int
    samples_ms: tuple[float, ...]
    median_ms: float
    images_per_s: float
    steady: bool = True  # False: the warm-up reached its time limit before its medians agreed


LayerKind = Literal[
    "GEMM", "depthwise", "convolution", "norm", "activation", "layout", "quantize", "elementwise", "other"
]  # fmt: skip
Limit = Literal["matrix", "vector", "memory"]


class LayerTime(Record, frozen=True, kw_only=True):
    """One layer of one inference, as the runtime's own profiler names and times it."""

    name: str
    op: str  # the runtime's own word for what it ran
    kind: LayerKind
    type: str  # what it computes in: "fp32" ...; "" where the profiler does not tell
    ms: float


class ProfileResult(Record, frozen=True, kw_only=True, tag_field="record", tag="profile"):
    """Where one artifact spends its time: `layers` add up to `layers_ms`, which is part of `wall_ms`."""

    schema_version: SchemaVersion = SCHEMA
    time: str  # ISO 8601, UTC
    artifact: str  # its folder's name
    artifact_sha256: Sha256  # of manifest.json
    format: str
    precision: Precision
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
    model: str
    image_size: tuple[Positive, Positive]
    batch: BatchSize
    threads: Positive
    device: Device
    steps: Positive
    profiler: str
    layers: tuple[LayerTime, ...]  # slowest first
    layers_ms: float
    wall_ms: float  # of the profiled inferences, whose layers these are
    plain_ms: float  # median of the same inference without the profiler
    note: str | None  # what the profiler cannot see
    machine: dict[str, str | int]
    versions: dict[str, str]


# What one sample times: the step alone; with the copy in and out; with resizing and normalizing; from JPEG bytes.
Scope = Literal["compute", "transfer", "preprocess", "jpeg"]
Scenario = Literal["single-stream", "multi-stream", "offline", "server"]
Status = Literal["valid", "not steady", "invalid", "partial", "failed"]  # partial: Ctrl-C before all its turns
Verdicts = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE"]


class Quantile(Record, frozen=True, kw_only=True):
    """A latency quantile and its 95 % interval, from order statistics; no values where the samples are too few."""

    fraction: Fraction  # 0.5 is the median, 0.99 the p99
    value_ms: float | None  # None: INSUFFICIENT, fewer than `needs` samples
    low_ms: float | None
    high_ms: float | None
    needs: Positive  # samples


class GpuReading(Record, frozen=True, kw_only=True):
    """One NVIDIA GPU over the timed turns, as NVML tells."""

    name: str
    driver: str
    sm_clock_mhz: tuple[int, ...]  # before, after each turn
    memory_clock_mhz: int
    temperature_c: tuple[int, ...]
    power_w: tuple[float, ...]
    power_limit_w: float
    throttle_reasons: tuple[str, ...]  # those that slow the clocks down and were seen at least once
    other_processes: int  # the most that were seen on it beside those of this run


class Conditions(Record, frozen=True, kw_only=True):
    """What the machine did over the timed turns; `problems` is what makes a result invalid."""

    wall_s: float  # of the timed turns
    own_cores: float  # cores' worth of CPU time that the measured process took
    others_cores: float | None  # that everybody else took on the cores this process may use; None: not Linux
    stolen_cores: float | None  # that the hypervisor took
    load_average: float | None  # one minute, before
    frequency_mhz: tuple[float, ...]  # mean over the cores, before and after each turn; empty where nothing tells
    governor: str | None
    throttle_events: int | None  # of the processor's own thermal protection; None where it is not told
    quota_events: int | None  # times that a container's CPU quota stopped the process
    energy_j: float | None  # of processor packages (RAPL) or the GPU (NVML) over the timed turns
    energy_source: str | None
    gpu: GpuReading | None = None
    problems: tuple[str, ...] = ()


class ServerTrial(Record, frozen=True, kw_only=True):
    """One run of Poisson arrivals against the session."""

    queries_per_s: float  # asked for
    queries: Positive
    latency: Quantile  # from arrival to answer
    mean_batch: float
    passed: bool


class ServerLoad(Record, frozen=True, kw_only=True):
    """The highest arrival rate that keeps the latency quantile under the limit, with dynamic batching."""

    slo_ms: float
    fraction: Fraction
    max_batch: BatchSize
    seed: int
    queries_per_s: float | None  # None: no rate that was tried passed
    trials: tuple[ServerTrial, ...]


class BenchResult(Record, frozen=True, kw_only=True):
    """One model on one runtime in one setting, timed in a process of its own; every sample is kept."""

    schema_version: SchemaVersion = SCHEMA
    created: str  # ISO 8601, UTC
    run: str  # rows with the same value and batch were measured turn by turn with each other
    subject: str  # what the tables call it: "convnext_tiny onnx fp32"
    model: str  # timm's name, or "custom"
    runtime: str  # a format's name; "torch" and "torch.compile": timm's own module
    precision: Precision
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
    task: Task
    image_size: tuple[Positive, Positive]  # pixels
    device: Device
    threads: Positive  # of each stream
    streams: Positive = 1  # sessions that run side by side in the process
    batch: BatchSize  # images of one step
    scenario: Scenario
    scope: Scope
    artifact: str | None  # folder; None where there is none
    artifact_sha256: Sha256 | None  # of manifest.json
    artifact_bytes: int | None
    random_weights: bool
    parity: float | None = None  # relative error against the fp32 source; None where it was not compared
    status: Status
    reason: str | None = None  # why it is not valid
    samples_ms: tuple[Above0, ...]  # of one step each, in the order they were taken
    turns: tuple[Positive, ...]  # how many samples each turn gave; competitors took the turns in between
    turn_images_per_s: tuple[Above0, ...]  # images by wall time of each turn, all streams together
    yardstick_ms: tuple[Above0, ...]  # of the same fixed work before each turn: how fast the machine itself was
    device_ms: float | None = None  # median by CUDA events, where PyTorch runs on a GPU
    median_ms: Above0 | None
    images_per_s: Above0 | None  # of the median; scenario offline and multi-stream: of the turns' wall time
    quantiles: tuple[Quantile, ...]
    server: ServerLoad | None = None
    warmup_s: float | None  # None: it failed before
    steady: bool | None
    load_s: float | None
    first_inference_ms: float | None  # of the process; contains what a runtime compiles at its first call
    peak_memory_bytes: int | None  # resident, of the process with its imports
    device_memory_bytes: int | None = None
    energy_j_per_image: float | None = None
    tflops: float | None = None  # of a ConvNeXt: twice the multiply-accumulates, by second
    percent_of_bound: float | None = None  # of the shortest time, at ceilings measured in the same run
    top1: Fraction | None = None
    conditions: Conditions | None
    machine: dict[str, str | int]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        """What is read from a file is as consistent as what was measured.

        Raises:
            ValueError: the turns are not those of the samples.
        """
        if sum(self.turns) != len(self.samples_ms):
            raise ValueError(f"turns of {sum(self.turns)} samples, and {len(self.samples_ms)} samples")
        for name in ("turn_images_per_s", "yardstick_ms"):
            if len(getattr(self, name)) != len(self.turns):
                raise ValueError(f"{len(self.turns)} turns, and {len(getattr(self, name))} {name}")


class Comparison(Record, frozen=True, kw_only=True):
    """One row beside its counterpart of an earlier run. The ratio is of times: above 1 is slower."""

    subject: str
    setting: str
    verdict: Verdicts
    ratio: float | None  # new / old
    low: float | None  # of the 95 % interval
    high: float | None
    reason: str | None = None


class Ceilings(Record, frozen=True, kw_only=True):
    """What a device can do at best. 1 TFLOP/s = 1e12 multiplications and additions; 1 GB/s = 1e9 bytes."""

    name: str
    source: str  # a data sheet, or how and when it was measured
    matrix_tflops: dict[str, float]  # of matrix products, by precision
    vector_tflops: float  # fp32, outside the matrix units
    copy_gb_s: float  # bytes read plus bytes written


class RooflineRow(Record, frozen=True, kw_only=True):
    """`count` equal operations of one stage, all images of the batch together."""

    stage: str
    operation: str
    count: Positive
    gflop: float
    mb: float  # moved at least: inputs, weights and outputs once each
    ms: float  # at least
    limit: Limit


class RooflineResult(Record, frozen=True, kw_only=True, tag_field="record", tag="roofline"):
    """The shortest time a device can take for one batch, by the architecture and the device's ceilings alone."""

    schema_version: SchemaVersion = SCHEMA
    time: str  # ISO 8601, UTC
    model: str
    task: Task
    image_size: tuple[Positive, Positive]
    precision: str
    batch: BatchSize
    ceilings: Ceilings
    rows: tuple[RooflineRow, ...]
    gflop: float
    mb: float
    ms: float
    images_per_s: float
    machine: dict[str, str | int] | None  # where the ceilings were measured; None for a data sheet's
    versions: dict[str, str]


class KernelMeasurement(Record, frozen=True, kw_only=True):
    """How the fused kernels of one part of a model compare with compiled PyTorch on one GPU."""

    part: Literal["stem", "stages", "mlp", "downsamples", "head"]  # mlp: a stage as `stages.0.mlp` runs it
    channels: Positive  # of its input; of a stem's output
    grn: bool = False  # whether its blocks have GRN, as those of V2, which costs a kernel more
    precision: Precision
    batch: BatchSize
    speedup: Annotated[float, msgspec.Meta(gt=0.0)]  # compiled PyTorch's time over theirs, medians of one run
