"""Every record that is written to disk, and the closed sets of words they use.

Records are frozen and refuse unknown fields, so that a misspelled key in a hand-edited file is an error and not
a setting that does nothing. They hold plain facts; nothing here imports a framework.
"""

from typing import Annotated, Literal

import msgspec

SCHEMA_VERSION = 1

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
Task = Literal["classify", "embed", "features"]
InputKind = Literal["float32", "uint8"]
Device = Literal["cpu", "cuda"]
Stem = Literal["patch", "overlap", "overlap_tiered", "overlap_act"]
Norm = Literal["layernorm", "rmsnorm", "simplenorm"]
Activation = Literal["gelu", "gelu_tanh", "silu"]
Head = Literal["pool_norm", "norm_pool"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

STRIDE = 32  # input pixels per pixel of the last feature map, in every architecture of the family


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything on disk."""


class ModelSpec(Record, frozen=True, kw_only=True):
    """All that is needed to build the module without its weights. `image_size` is (height, width) in pixels."""

    architecture: str  # timm's name, or "custom" for widths and depths that no published variant has
    depths: tuple[Positive, Positive, Positive, Positive]
    dims: tuple[Positive, Positive, Positive, Positive]
    kernel_sizes: tuple[Positive, Positive, Positive, Positive] = (7, 7, 7, 7)
    stem: Stem = "patch"
    norm: Norm = "layernorm"
    norm_eps: float = 1e-6
    head_norm_eps: float = 1e-6  # transformers' checkpoints use 1e-12 here and 1e-6 everywhere else
    activation: Activation = "gelu"
    layer_scale: bool = True
    grn: bool = False
    head: Head = "pool_norm"
    head_hidden: Positive | None = None
    num_classes: Annotated[int, msgspec.Meta(ge=0)] = 1000  # 0: no classifier
    in_chans: Positive = 3
    task: Task = "classify"
    image_size: tuple[Positive, Positive] = (224, 224)


class Preprocessing(Record, frozen=True, kw_only=True):
    """Resize, centre crop and normalization, as timm's evaluation transform does them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    crop_pct: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    assumed: tuple[str, ...] = ()  # the fields above that neither the user nor anything beside the checkpoint said


class WeightsRecord(Record, frozen=True, kw_only=True):
    source: str  # a timm name, `hf-hub:` id, file name, or "random"
    layout: str  # which of models.layouts recognised it
    random: bool
    tensors_sha256: Sha256  # of the converted tensors in name order, whatever file held them
    file_sha256: Sha256 | None = None
    licence: str | None = None


class BatchRange(Record, frozen=True, kw_only=True):
    """The batch sizes an artifact takes; `opt` is the one it is tuned for."""

    min: Positive = 1
    opt: Positive = 8
    max: Positive = 256


class TensorRtSpec(Record, frozen=True, kw_only=True):
    """What only TensorRT and TensorRT-RTX are told."""

    chosen: str | None = None  # why this one of the two, where the user left it open
    targets: tuple[str, ...] = ()  # "sm80" ...; none: the GPU here (TensorRT), every GPU from Ampere on (RTX)
    profiles: tuple[BatchRange, ...] = ()  # more ranges to tune for, inside `ExportSpec.batch`
    sides: tuple[Positive, Positive, Positive] | None = None  # pixels, smallest, tuned for, largest; dynamic size only
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None  # None: the builder's own, 3
    workspace_mb: Positive | None = None  # None: all of the GPU's memory
    hardware_compatible: bool = False  # TensorRT: any GPU from Ampere on
    version_compatible: bool = False  # TensorRT: any later version of the same major
    refit: Literal["none", "refit", "strip"] = "none"  # strip: without weights, which `refit` puts in


class EngineRecord(Record, frozen=True, kw_only=True):
    """`build.json` of an engine: how it was built. The manifest holds its hash."""

    module: str  # import name: tensorrt or tensorrt_rtx
    version: str
    targets: tuple[str, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], ...]  # min, opt, max
    layers: dict[str, int]  # of the parsed network: "<kind> <type>" to how many
    products: dict[str, tuple[str, float]]  # convolution or matrix product: its type, multiply-accumulates at `opt`
    build_s: float
    engine_bytes: int
    peak_memory_mb: float  # of this process, since it started
    timing_cache: str | None  # "<file>: <bytes before> -> <bytes after>"; None where the module has none


class ExportSpec(Record, frozen=True, kw_only=True):
    format: str
    precision: Precision = "fp32"
    input: InputKind = "float32"
    batch: BatchRange = BatchRange()
    dynamic_image_size: bool = False
    device: Device = "cpu"
    tensorrt: TensorRtSpec | None = None


class PassRecord(Record, frozen=True, kw_only=True):
    name: str
    relative_change: float  # of the probe's outputs, worst sample, computed in float64


class TensorRecord(Record, frozen=True, kw_only=True):
    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a string names a dynamic axis


class Parity(Record, frozen=True, kw_only=True):
    """One artifact's outputs beside the fp32 PyTorch source's on the same images."""

    images: str
    samples: int
    relative_error: float | None  # worst sample: ||a - b|| / ||b||; None where the outputs cannot be compared
    cosine: float | None  # worst sample
    top1_agreement: Fraction | None  # share of samples without a near-tie; None where there are no classes
    near_ties: int
    failures: tuple[str, ...]  # empty when every tier passed
    stand_in: str | None = None  # what ran in the artifact's place, where the artifact itself did not run


class PrecisionTruth(Record, frozen=True, kw_only=True):
    """Share of the multiply-accumulates by type: in the built graph, and as the runtime executed them here."""

    graph: dict[str, float]
    executed: dict[str, float] | None = None  # None where the runtime does not tell
    note: str | None = None


class FileRecord(Record, frozen=True, kw_only=True):
    path: str
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256


class Manifest(Record, frozen=True, kw_only=True):
    """`manifest.json`: everything an artifact folder says about itself."""

    schema_version: Literal[1]
    created: str  # ISO 8601, UTC
    tool: str
    model: ModelSpec
    weights: WeightsRecord
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    export: ExportSpec
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    passes: tuple[PassRecord, ...]
    parity: tuple[Parity, ...]
    precision: PrecisionTruth
    versions: dict[str, str]
    machine: dict[str, str | int]
    files: tuple[FileRecord, ...]


class ClassAccuracy(Record, frozen=True, kw_only=True):
    label: int
    name: str
    images: int
    top1: Fraction


class EvalResult(Record, frozen=True, kw_only=True):
    """Accuracy of one artifact over one labelled image source; every prediction lies in `predictions`."""

    artifact: str
    artifact_sha256: Sha256  # of manifest.json
    data: str
    data_sha256: Sha256  # of the sample names and labels
    images: int
    corrupt: tuple[str, ...]
    top1: Fraction
    top5: Fraction
    per_class: tuple[ClassAccuracy, ...]
    images_per_s: float  # whole pipeline: reading, decoding, resizing, inference
    predictions: str | None  # file name beside this result


class Timing(Record, frozen=True, kw_only=True):
    """Latency of `Session.step` on one bound batch; every sample is kept."""

    artifact: str
    batch: Positive
    threads: int
    samples_ms: tuple[float, ...]
    median_ms: float
    images_per_s: float
    steady: bool = True  # False: the warm-up reached its time limit before its medians agreed


# Benchmarks: a results file is JSON Lines, one BenchResult a line -----------------------------------------------------

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
    max_batch: Positive
    seed: int
    queries_per_s: float | None  # None: no rate that was tried passed
    trials: tuple[ServerTrial, ...]


class BenchResult(Record, frozen=True, kw_only=True):
    """One model on one runtime in one setting, timed in a process of its own; every sample is kept."""

    schema_version: Literal[1] = 1
    created: str  # ISO 8601, UTC
    run: str  # rows with the same value and batch were measured turn by turn with each other
    subject: str  # what the tables call it: "convnext_tiny onnx fp32"
    model: str  # timm's name, or "custom"
    runtime: str  # a format's name; "torch" and "torch.compile": timm's own module
    precision: Precision
    task: Task
    image_size: tuple[Positive, Positive]  # pixels
    device: Device
    threads: Positive  # of each stream
    streams: Positive = 1  # sessions that run side by side in the process
    batch: Positive  # images of one step
    scenario: Scenario
    scope: Scope
    artifact: str | None  # folder; None where there is none
    artifact_sha256: Sha256 | None  # of manifest.json
    artifact_bytes: int | None
    random_weights: bool
    parity: float | None = None  # relative error against the fp32 source; None where it was not compared
    status: Status
    reason: str | None = None  # why it is not valid
    samples_ms: tuple[float, ...]  # of one step each, in the order they were taken
    turns: tuple[int, ...]  # how many samples each turn gave; competitors took the turns in between
    turn_images_per_s: tuple[float, ...]  # images by wall time of each turn, all streams together
    yardstick_ms: tuple[float, ...]  # of the same fixed work before each turn: how fast the machine itself was
    device_ms: float | None = None  # median by CUDA events, where PyTorch runs on a GPU
    median_ms: float | None
    images_per_s: float | None  # of the median; scenario offline and multi-stream: of the turns' wall time
    quantiles: tuple[Quantile, ...]
    server: ServerLoad | None = None
    warmup_s: float | None  # None: it failed before
    steady: bool | None
    load_s: float | None
    first_inference_ms: float | None  # of the process; holds what a runtime compiles at its first call
    peak_memory_bytes: int | None  # resident, of the process with its imports
    device_memory_bytes: int | None = None
    energy_j_per_image: float | None = None
    tflops: float | None = None  # filled by whoever knows the operations: twice the multiply-accumulates, by second
    percent_of_bound: float | None = None
    top1: Fraction | None = None
    conditions: Conditions | None
    machine: dict[str, str | int]
    versions: dict[str, str]


class Comparison(Record, frozen=True, kw_only=True):
    """One row beside its counterpart of an earlier run. The ratio is of times: above 1 is slower."""

    subject: str
    setting: str
    verdict: Verdicts
    ratio: float | None  # new / old
    low: float | None  # of the 95 % interval
    high: float | None
    reason: str | None = None
