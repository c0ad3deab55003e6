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
Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]
CheckName = Literal["top1_drop", "class_drop", "agreement", "latency_ratio", "size_ratio"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Images = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Above0 = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]  # a time or a rate; ratios beyond would overflow
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
    # What neither the user nor anything beside the checkpoint said: fields above, `image_size`, `global_pool`.
    assumed: tuple[str, ...] = ()


class WeightsRecord(Record, frozen=True, kw_only=True):
    source: str  # a timm name, `hf-hub:` id, file name, or "random"
    layout: str  # which of models.layouts recognised it
    random: bool
    tensors_sha256: Sha256  # of the converted tensors in name order, whatever file held them
    file_sha256: Sha256 | None = None
    revision: str | None = None  # of a hub's repository: the commit that the files are of
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
    quantization: "QuantizationRecord | None" = None
    kernels: tuple[str, ...] = ()  # run in `convnext_deploy.kernels`: "stem", "stages.0" or "stages.0.mlp" ...

    @property
    def eight_bits(self) -> "PlanType | None":
        """What its plan's products are in, beside `precision`; None where no plan quantizes."""
        types = self.quantization.operations if self.quantization else {}
        return "int8" if {"u8s8", "s8s8"} & set(types) else "fp8" if "fp8" in types else None


class PassRecord(Record, frozen=True, kw_only=True):
    name: str
    relative_change: float  # of the probe's outputs, worst sample, computed in float64


class TensorRecord(Record, frozen=True, kw_only=True):
    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a string names a dynamic axis


class Parity(Record, frozen=True, kw_only=True):
    """One artifact's outputs beside those of its reference on the same images.

    The reference is the fp32 PyTorch source. A quantized artifact is compared with its simulation too: the source
    rewritten to the same plan. One in half precision is compared with the module in the same type.
    """

    images: str
    reference: Literal["source", "simulation", "type"] = "source"
    samples: int
    relative_error: float | None  # worst sample (see `deviation`); None where the outputs cannot be compared
    cosine: float | None  # worst sample
    top1_agreement: Fraction | None  # share of samples without a near-tie; None where there are no classes
    near_ties: int
    failures: tuple[str, ...]  # empty when every tier passed
    stand_in: str | None = None  # what ran in the artifact's place, where the artifact itself did not run
    batches: tuple[int, ...] = ()  # the sizes that were run; empty in artifacts of versions that did not record them
    image_size: tuple[int, int] | None = None  # pixels (height, width)


class PrecisionTruth(Record, frozen=True, kw_only=True):
    """Share of the multiply-accumulates by type: in the built graph, and as the runtime executed them here."""

    graph: dict[str, float]
    executed: dict[str, float] | None = None  # None where the runtime does not tell
    note: str | None = None
    quantized: int | None = None  # products that ran in 8 bits; where the runtime does not tell, those in the graph


class ReadBack(Record, frozen=True, kw_only=True):
    """The built file's contents beside the module's, bit for bit: how many were compared, and what differs."""

    tensors: int
    epsilons: int | None  # None where the file does not hold them
    activations: int | None
    failures: tuple[str, ...] = ()
    unread: str | None = None  # what of the file was not compared, in words


class OracleRecord(Record, frozen=True, kw_only=True):
    """Who judged whether the checkpoint was loaded as what it is."""

    name: str  # the source's own library and its version, or "self": nothing but this package's own reading
    relative_error: float | None = None  # of the outputs in fp32, before any rewrite
    preprocessing: str | None = None  # whose preprocessing was compared with as well
    why: str | None = None  # for "self"


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
    oracle: OracleRecord | None = None  # None in artifacts of versions that asked none
    read_back: ReadBack | None = None  # None in artifacts of versions that did not read them


class ClassAccuracy(Record, frozen=True, kw_only=True):
    label: Annotated[int, msgspec.Meta(ge=0)]
    name: str
    images: Positive
    top1: Fraction


class EvalResult(Record, frozen=True, kw_only=True):
    """Accuracy of one artifact over one labelled image source; every prediction lies in `predictions`."""

    artifact: str
    artifact_sha256: Sha256  # of manifest.json
    data: str
    data_sha256: Sha256  # of the sample names and labels
    images: Images
    corrupt: tuple[str, ...]
    top1: Fraction
    top5: Fraction
    per_class: tuple[ClassAccuracy, ...]
    images_per_s: float  # whole pipeline: reading, decoding, resizing, inference
    predictions: str | None  # file name beside this result
    notes: tuple[str, ...] = ()  # what was left out, what was assumed about the classes, an accuracy at chance


class Timing(Record, frozen=True, kw_only=True):
    """Latency of `Session.step` on one bound batch; every sample is kept."""

    artifact: str
    batch: Positive
    threads: int
    samples_ms: tuple[float, ...]
    median_ms: float
    images_per_s: float
    steady: bool = True  # False: the warm-up reached its time limit before its medians agreed


# Calibration
Scheme = Literal["u8_asymmetric", "s8_symmetric", "fp8_e4m3"]
RangeMethod = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]


class TensorRange(Record, frozen=True, kw_only=True):
    """The range one tensor is quantized over, and what to know about its values before trusting it."""

    name: str  # of the module whose input it is
    method: RangeMethod
    low: float  # zero or less
    high: float
    min: float  # of the values themselves
    max: float
    clip_rate: Fraction  # share of the values that move by more than rounding
    outlier_channels: tuple[tuple[int, float], ...]  # channel, its largest magnitude in those of the median channel
    halves_difference: float  # between the ranges that the even and the odd images give, relative to the range


class CalibrationReport(Record, frozen=True, kw_only=True):
    """The ranges of a model's tensors, and the images they come from."""

    data: str
    data_sha256: Sha256  # of the encoded images themselves
    images: Positive
    random: bool  # noise, which was asked for by name
    method: RangeMethod
    percentile: float | None  # None with other methods
    scheme: Scheme
    image_size: tuple[Positive, Positive]
    tensors: tuple[TensorRange, ...]


# Quantization --------------------------------------------------------------------------------------------------------

# Formats that compute in 8 bits; eager and aotinductor do so in the fused kernels only.
Target = Literal["onnx", "openvino", "native", "tensorrt", "tensorrt_rtx", "eager", "aotinductor"]
# u8s8: unsigned activations with a zero point, signed weights; s8s8: both signed, no zero points; fp8: both E4M3.
# fp32: kept from the plan's rest type, because half precision would overflow there.
PlanType = Literal["int8", "fp8"]
OperationType = Literal["u8s8", "s8s8", "fp8", "fp32"]
WeightBits = Literal[7, 8]  # of int8 weights: codes of at most 64, or 127, in magnitude (see `saturation`)


class OperationPlan(Record, frozen=True, kw_only=True):
    """How one operation runs. `scale` and `zero_point` are those of its product's input; weights follow a channel."""

    type: OperationType
    scale: Annotated[float, msgspec.Meta(gt=0.0)] | None = None  # None for fp32
    zero_point: int = 0
    shift: float = 0.0  # subtracted from the input before it is quantized; its product is part of the bias


class CalibrationRecord(Record, frozen=True, kw_only=True):
    """The images that the scales were chosen from."""

    data: str
    data_sha256: Sha256  # of the encoded images
    images: Positive
    random: bool  # noise in place of images, because it was asked for by name
    method: str


class CorrectionRecord(Record, frozen=True, kw_only=True):
    """One accuracy correction that was tried: mean KL of the quantized from the float outputs without and with it."""

    name: str
    applied: bool
    kl_without: float
    kl_with: float
    images: Positive  # held out: not among those that it was computed from


class Plan(Record, frozen=True, kw_only=True):
    """`<plan>.json`: which operations of one checkpoint run in 8 bits, with which scales, for one target.

    Operations that are not named run in `rest`. Balancing factors, corrected biases and rounded weights, where there
    are any, lie in `<plan>.safetensors`.
    """

    schema_version: Literal[1] = 1
    target: Target
    architecture: str
    weights_sha256: Sha256  # `WeightsRecord.tensors_sha256` of the checkpoint
    input: InputKind  # a uint8 input needs no scale to be found: raw pixels are 8 bits
    image_size: tuple[Positive, Positive]
    rest: Precision
    weight_ranges: Literal["minmax", "mse"] = "minmax"
    weight_bits: WeightBits = 8
    calibration: CalibrationRecord | None  # None: nothing is quantized
    operations: dict[str, OperationPlan]
    corrections: tuple[CorrectionRecord, ...] = ()
    tensors_sha256: Sha256 | None = None  # of `<plan>.safetensors`


class PlanCandidate(Record, frozen=True, kw_only=True):
    """One artifact that a search measured. A float one has no operations in 8 bits."""

    name: str
    operations: tuple[str, ...]  # in 8 bits
    predicted: float  # distance from the float outputs: the sum of its operations' sensitivities
    agreement: Fraction | None  # with the fp32 baseline, on the selection images
    top1: Fraction | None  # on the selection images
    latency: Timing | None  # None where the runtime cannot run here
    bytes: int  # 0 where it was rejected
    selection: Decision | None  # the gate on the selection images; None where it was rejected
    final: Decision | None  # and on the final ones; None: not tried
    final_drop: tuple[float, float, float] | None  # top-1 drop there and its one-sided bounds, fractions
    rejected: str | None = None  # why it could not be built, or does not compute its plan


class SearchResult(Record, frozen=True, kw_only=True):
    """`<plan>.search.json`: what a search under an accuracy budget measured, and what it chose."""

    target: Target
    max_drop: float  # percentage points
    alpha: float
    batch: Positive
    images: dict[str, Annotated[int, msgspec.Meta(ge=0, le=10**9)]]  # calibration, selection, final: disjoint
    sensitivities: dict[str, float]  # operation to mean distance when it alone is quantized
    gains_ms: dict[str, float]  # group of operations to what its 8 bits save of a batch's latency
    corrections: tuple[CorrectionRecord, ...]
    candidates: tuple[PlanCandidate, ...]
    accuracy_of: Literal["runtime", "simulation"]
    chosen: str | None
    why: str
    machine: dict[str, str | int]
    versions: dict[str, str]


class QuantizationRecord(Record, frozen=True, kw_only=True):
    """What a manifest says about the plan that its artifact was built from."""

    plan_sha256: Sha256
    target: Target
    operations: dict[str, Positive]  # type to how many
    kept_share: Fraction = 0.0  # of the multiply-accumulates, in the operations that the plan keeps in fp32
    weight_bits: WeightBits = 8
    calibration: CalibrationRecord | None


# The gate: two evaluations beside each other.


class Limits(Record, frozen=True, kw_only=True):
    """What a candidate may lose against its baseline. Written by hand, hence in percent; None is not checked."""

    max_drop: Annotated[float, msgspec.Meta(ge=0, le=100)]  # of top-1, percentage points
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.05  # chance of passing what lies at a limit
    max_class_drop: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None  # of one class's top-1, points
    min_agreement: Annotated[float, msgspec.Meta(gt=0, lt=100)] | None = None  # images with the same first class, %
    max_latency_ratio: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None  # medians, candidate / baseline
    max_size_ratio: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None  # bytes, candidate / baseline


class Check(Record, frozen=True, kw_only=True):
    """One limit held against what was measured. Drops and agreement are fractions."""

    name: CheckName
    decision: Decision
    limit: float
    value: float
    lower: float | None = None  # one-sided bounds at the limits' alpha; None where chance plays no part
    upper: float | None = None


class ClassDrop(Record, frozen=True, kw_only=True):
    """One class's images. `beyond_chance`: more were lost than gained, at the limits' alpha over all classes."""

    label: int
    name: str
    images: int
    lost: int
    gained: int
    p_value: Fraction  # one-sided exact McNemar, after Holm's adjustment for the number of classes
    beyond_chance: bool


class Flip(Record, frozen=True, kw_only=True):
    """An image whose first class changed. A margin is the log-probability of the first class less the second's."""

    name: str
    label: int
    baseline: int  # class
    candidate: int
    baseline_margin: float | None  # nats; None where a model has one class
    candidate_margin: float | None


class Verdict(Record, frozen=True, kw_only=True):
    """Whether a candidate may take its baseline's place, and everything that this rests on."""

    decision: Decision
    limits: Limits
    baseline: str
    baseline_sha256: Sha256  # of manifest.json
    candidate: str
    candidate_sha256: Sha256
    data: str
    data_sha256: Sha256
    images: Images
    baseline_top1: Fraction
    candidate_top1: Fraction
    lost: int  # right in the baseline only
    gained: int  # right in the candidate only
    p_value: Fraction  # exact McNemar, two-sided
    images_needed: int | None  # to decide the drop, if it is what it seems; None: decided, or no number will do
    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]  # the drop first
    agreement: Fraction  # share of images with the same first class
    confident: int  # images that the baseline gives twice the probability of any other class, or more
    confident_flips: int  # of these, with another first class in the candidate
    kl_at_least: float  # nats, mean over images: divergence of the candidate from the baseline, on the classes kept
    per_class: tuple[ClassDrop, ...]
    flips: tuple[Flip, ...]
    doubts: tuple[str, ...] = ()  # why there is no PASS although every limit is kept


# Where the time goes -------------------------------------------------------------------------------------------------

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

    time: str  # ISO 8601, UTC
    artifact: str  # its folder's name
    artifact_sha256: Sha256  # of manifest.json
    format: str
    precision: Precision
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
    model: str
    image_size: tuple[Positive, Positive]
    batch: Positive
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
    eight_bits: PlanType | None = None  # products in it, the rest in `precision`
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
    first_inference_ms: float | None  # of the process; holds what a runtime compiles at its first call
    peak_memory_bytes: int | None  # resident, of the process with its imports
    device_memory_bytes: int | None = None
    energy_j_per_image: float | None = None
    tflops: float | None = None  # of a ConvNeXt: twice the multiply-accumulates, by second
    percent_of_bound: float | None = None  # of the roofline's, at ceilings measured in the same run
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

    time: str  # ISO 8601, UTC
    model: str
    task: Task
    image_size: tuple[Positive, Positive]
    precision: str
    batch: Positive
    ceilings: Ceilings
    rows: tuple[RooflineRow, ...]
    gflop: float
    mb: float
    ms: float
    images_per_s: float
    machine: dict[str, str | int] | None  # where the ceilings were measured; None for a data sheet's
    versions: dict[str, str]


# Half precision ------------------------------------------------------------------------------------------------------


HalfPrecision = Literal["fp16", "bf16"]


class HalfTensor(Record, frozen=True, kw_only=True):
    """What one tensor of a float model would be in half precision, over some images."""

    name: str  # of a parameter, or a module and "input", "output" or "factor"
    largest: float  # magnitude
    headroom: float | None  # the type's largest number / `largest`; None where all values are zero
    margin: float  # headroom below it counts as overflow: 1 for weights, more for what other images may exceed
    overflow: Fraction  # share of the values beyond the type's largest number
    lost: Fraction  # share of the values that are not zero and become zero
    rounding: float | None = None  # relative to what is left of it downstream; None: judged with another tensor


class HalfOperation(Record, frozen=True, kw_only=True):
    """One operation in half precision, and why it stays in fp32 if it does."""

    name: str
    tensors: tuple[HalfTensor, ...]
    reasons: tuple[str, ...]  # empty: it may run in half precision


class HalfReport(Record, frozen=True, kw_only=True):
    """Which operations of a model overflow or lose their values in half precision."""

    data: str
    data_sha256: Sha256  # of the encoded images
    images: Positive
    random: bool  # noise in place of images, because it was asked for by name
    image_size: tuple[Positive, Positive]
    weights_sha256: Sha256  # of the folded module
    input: InputKind
    precision: HalfPrecision
    bar: float  # roundings above it count as lost
    kept_share: Fraction  # of the multiply-accumulates, in the operations that stay in fp32
    operations: tuple[HalfOperation, ...]  # in the order in which they run


# Kernels -------------------------------------------------------------------------------------------------------------

KernelChoice = Literal["none", "measured", "all"]


class KernelMeasurement(Record, frozen=True, kw_only=True):
    """How the fused kernels of one part of a model compare with compiled PyTorch on one GPU."""

    part: Literal["stem", "stages", "mlp", "downsamples", "head"]  # mlp: a stage as `stages.0.mlp` runs it
    channels: Positive  # of its input; of a stem's output
    precision: Precision
    batch: Positive
    speedup: Annotated[float, msgspec.Meta(gt=0.0)]  # compiled PyTorch's time over theirs, medians of one run
