"""manifest.json: what an artifact is, how it was made, and how it was verified."""

from typing import Annotated, Literal

import msgspec

from .base import (
    SCHEMA,
    BatchSize,
    Channels,
    Device,
    Epsilon,
    Fraction,
    InputKind,
    PlanType,
    Positive,
    Precision,
    Problem,
    Record,
    SchemaVersion,
    Sha256,
    Side,
    Task,
)
from .plan import QuantizationRecord

Stem = Literal["patch", "overlap", "overlap_tiered", "overlap_act"]
Norm = Literal["layernorm", "rmsnorm", "simplenorm"]
Activation = Literal["gelu", "gelu_tanh", "silu"]
HeadActivation = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh", "none"]
Head = Literal["pool_norm", "norm_pool"]
Level = Annotated[int, msgspec.Meta(ge=1, le=4)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=1024)]  # blocks of a stage, or convolutions of a branch
StageDepth = Annotated[int, msgspec.Meta(ge=0, le=1024)]  # 0: of a backbone that ends before this stage
StageWidth = Annotated[int, msgspec.Meta(ge=0, le=65_536)]  # likewise
KernelSize = Annotated[int, msgspec.Meta(ge=1, le=255)]  # pixels
PoolScale = Annotated[int, msgspec.Meta(ge=1, le=256)]


class Segmentation(Record, frozen=True, kw_only=True):
    """The UPerNet head of the task segment, and how the masks of its training are numbered."""

    channels: Channels = 512  # of every convolution but the last
    pool_scales: Annotated[tuple[PoolScale, ...], msgspec.Meta(min_length=1, max_length=16)] = (1, 2, 3, 6)
    ignored: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)] = 255  # in a mask: a pixel that counts nowhere
    reduce_labels: bool = False  # masks count from 1, and 0 is a pixel that counts nowhere


Sizes = Annotated[
    tuple[Annotated[float, msgspec.Meta(ge=1e-3, le=1e5)], ...], msgspec.Meta(min_length=1, max_length=64)
]
Levels = Annotated[tuple[Sizes, ...], msgspec.Meta(max_length=16)]
Most = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Places = Annotated[int, msgspec.Meta(ge=1, le=256)]  # of a side of what is cut out of the pyramid
BoxWeight = Annotated[float, msgspec.Meta(gt=0, le=1e5)]


class MaskHead(Record, frozen=True, kw_only=True):
    """What makes a mask of each detection of a Mask R-CNN: convolutions, and one that doubles the sides."""

    channels: Annotated[tuple[Channels, ...], msgspec.Meta(min_length=1, max_length=64)] = (256, 256, 256, 256)
    upsampled: Channels = 256  # channels of the map with twice the sides
    size: Places = 14  # places of a side of what is cut out of the pyramid; a mask has twice as many


class Regions(Record, frozen=True, kw_only=True):
    """The second stage of a Faster or Mask R-CNN: which proposals it takes, and what it computes of each."""

    most_proposals: Most = 1000  # of an image
    nms_threshold: Fraction = 0.7  # of two proposals of a level with more overlap, the one with the lower score goes
    score_threshold: Fraction = 0.0  # a proposal has at least this score
    size: Places = 7  # places of a side of what is cut out of the pyramid
    samples: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2  # at each place, along each side; 0: by the region's size
    hidden: Channels = 1024  # width of the two linears
    box_weights: tuple[BoxWeight, BoxWeight, BoxWeight, BoxWeight] = (
        10.0,
        10.0,
        5.0,
        5.0,
    )  # what a box's four numbers are divided by
    masks: MaskHead | None = None


class Detection(Record, frozen=True, kw_only=True):
    """The pyramid and the heads of the task detect, as torchvision builds them, and how detections are chosen.

    Of a Faster or Mask R-CNN, anchors, convolutions and `most_candidates` are the first stage's, and the thresholds
    and `most_detections` the second's.
    """

    kind: Literal["retinanet", "fcos", "faster_rcnn", "mask_rcnn"]
    channels: Channels = 256  # of every map of the pyramid
    convolutions: Depth = 4  # of each branch of the head, before its last
    group_norm: bool = False  # behind each of them
    # The levels after those of the backbone: every second pixel of the last, or two convolutions (P6 and P7).
    extra: Literal["pool", "p6p7"] = "pool"
    extra_of_map: bool = False  # P6 is made of the backbone's last map, and not of the pyramid's
    # Of each level: sizes in pixels, and height / width. A place of a map has an anchor for each pair of them.
    anchor_sizes: Levels
    aspect_ratios: Levels
    score_threshold: Fraction = 0.05  # what is not above it is no detection
    nms_threshold: Fraction = 0.5  # of two boxes of a class with more overlap, the one with the lower score goes
    most_candidates: Most = 1000  # of each level, before boxes suppress each other
    most_detections: Most = 300  # of an image
    min_side: Side = 800  # pixels: an image is resized to this side,
    max_side: Side = 1333  # unless its other side would exceed that
    regions: Regions | None = None  # of a detector of two stages

    @property
    def mask_side(self) -> int:
        """Places of a side of each detection's mask; 0 of a detector without masks."""
        return 0 if self.regions is None or self.regions.masks is None else 2 * self.regions.masks.size

    @property
    def anchors(self) -> tuple[int, ...]:
        """At each place of each level's map."""
        return tuple(len(s) * len(r) for s, r in zip(self.anchor_sizes, self.aspect_ratios, strict=True))


class ModelSpec(Record, frozen=True, kw_only=True):
    """All that is needed to build the module without its weights. `image_size` is (height, width) in pixels."""

    architecture: str  # timm's name, or "custom" for widths and depths that no published variant has
    depths: tuple[StageDepth, StageDepth, StageDepth, StageDepth]
    dims: tuple[StageWidth, StageWidth, StageWidth, StageWidth]
    kernel_sizes: tuple[KernelSize, KernelSize, KernelSize, KernelSize] = (7, 7, 7, 7)
    stem: Stem = "patch"
    norm: Norm = "layernorm"
    norm_eps: Epsilon = 1e-6
    head_norm_eps: Epsilon = 1e-6  # transformers' checkpoints use 1e-12 here and 1e-6 everywhere else
    activation: Activation = "gelu"
    layer_scale: bool = True
    grn: bool = False
    head: Head = "pool_norm"
    head_hidden: Channels | None = None
    head_activation: HeadActivation = "gelu"  # behind the hidden linear
    num_classes: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 1000  # 0: no classifier
    in_chans: Channels = 3
    task: Task = "classify"
    problem: Problem | None = None  # of the task classify; None: nobody has said it
    image_size: tuple[Side, Side] = (224, 224)
    # Of the maps of the task features, ascending: strides 4, 8, 16 and 32.
    levels: Annotated[tuple[Level, ...], msgspec.Meta(min_length=1, max_length=4)] = (1, 2, 3, 4)
    patch_tokens: bool = False  # of the task embed: also the last map's pixels, each with the norm of the pooled vector
    level_norms: tuple[Level, ...] = ()  # the levels whose maps have a norm of their own (backbones of detectors)
    segmentation: Segmentation | None = None  # of the task segment: the head that takes the maps
    detection: Detection | None = None  # of the task detect, likewise

    def __post_init__(self) -> None:
        for name, values in (("depths", self.depths), ("dims", self.dims)):
            if 0 in values[: self.stages]:
                raise ValueError(f"{name} {values}, and stage {self.stages} is asked for; expected more than 0")

    @property
    def has_maps(self) -> bool:
        """Whether the network is used for its maps, and not for one pooled vector."""
        return self.task in ("features", "segment", "detect")

    @property
    def stages(self) -> int:
        """How many stages are computed: those up to the last map that is asked for."""
        return max(self.levels) if self.has_maps else 4

    def map_sides(self, side: int) -> tuple[int, int, int, int]:
        """One side of the four stages' maps for images of that side, in pixels.

        Rows and columns that a stride leaves over at the end are dropped, as timm, transformers and torchvision do;
        the two convolutions of an overlapping stem are padded, so there the first map is rounded up.
        """
        first = side // 4 if self.stem == "patch" else -(-side // 4)
        return first, first // 2, first // 4, first // 8

    def map_sizes(self, image_size: tuple[int, int] | None = None) -> tuple[tuple[int, int], ...]:
        """(height, width) of the four maps, for `image_size` or the model's own."""
        height, width = image_size or self.image_size
        return tuple(zip(self.map_sides(height), self.map_sides(width), strict=True))


class Preprocessing(Record, frozen=True, kw_only=True):
    """Resize, centre crop and normalization, as timm's evaluation transform does them."""

    mean: tuple[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)], ...]
    std: tuple[Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)], ...]
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    crop_pct: Annotated[float, msgspec.Meta(ge=0.01, le=1.0)] = 0.875
    # fit: the whole image with its ratio of sides, resized as PyTorch resizes, at the top left; the rest is the mean. A
    # model of any size has no rest: its images get the sides that its detector says.
    crop_mode: Literal["center", "squash", "border", "fit"] = "center"
    exif_orientation: bool = False  # turn images as EXIF says; the loaders of training scripts do not
    # What neither the user nor anything beside the checkpoint said: fields above, `image_size`, `global_pool`.
    assumed: tuple[str, ...] = ()


class Provenance(Record, frozen=True, kw_only=True):
    """How one fact that tensors do not show came to be what it is."""

    value: str  # as it is printed
    how: Literal["known", "given", "assumed"]
    source: str | None = None  # known: the file or code that says it; given: the option
    contradicts: str | None = None  # given: what stands beside the checkpoint, where that says another
    fits_better: str | None = None  # given: the value that labelled images prefer, and by how much


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

    min: BatchSize = 1
    opt: BatchSize = 8
    max: BatchSize = 256


class TensorRtSpec(Record, frozen=True, kw_only=True):
    """What only TensorRT and TensorRT-RTX are told."""

    chosen: str | None = None  # why this one of the two, where the user left it open
    targets: tuple[str, ...] = ()  # "sm80" ...; none: the GPU here (TensorRT), every GPU from Ampere on (RTX)
    profiles: tuple[BatchRange, ...] = ()  # more ranges to tune for, inside `ExportSpec.batch`
    sides: tuple[Side, Side, Side] | None = None  # pixels, smallest, tuned for, largest; dynamic size only
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None  # None: the builder's own, 3
    workspace_mb: Positive | None = None  # None: all of the GPU's memory
    hardware_compatible: bool = False  # TensorRT: any GPU from Ampere on
    version_compatible: bool = False  # TensorRT: any later version of the same major
    refit: Literal["none", "refit", "strip"] = "none"  # strip: without weights, which `refit` puts in


class EngineRecord(Record, frozen=True, kw_only=True):
    """`build.json` of an engine: how it was built. The manifest contains its hash."""

    schema_version: SchemaVersion = SCHEMA
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


class ExportRequest(Record, frozen=True, kw_only=True):
    """What an artifact is to be, as far as it is known before the checkpoint is read."""

    format: str
    precision: Precision = "fp32"
    input: InputKind = "float32"
    batch: BatchRange = BatchRange()
    dynamic_image_size: bool = False
    device: Device = "cpu"
    argmax: bool = False  # of the task segment: each pixel's class is put out, at the size of the image
    tensorrt: TensorRtSpec | None = None


class ExportSpec(ExportRequest, frozen=True, kw_only=True):
    """What an artifact is: the request, and what came of it for this model."""

    quantization: QuantizationRecord | None = None
    kernels: tuple[str, ...] = ()  # run in `convnext_deploy.kernels`: "stem", "stages.0" or "stages.0.mlp" ...

    @property
    def eight_bits(self) -> PlanType | None:
        """What its plan's products are in, beside `precision`; None where no plan quantizes."""
        return self.quantization.eight_bits if self.quantization else None


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
    # Where fp32's own limit was missed: the source's distance from float64, with which the artifact was then compared.
    source_rounding: float | None = None


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


class EndRecord(Record, frozen=True, kw_only=True):
    """One output of a spliced graph beside the same output of the graph as it was."""

    output: str
    relative_error: float | None  # worst image; None where they cannot be compared
    note: str | None = None  # why not, or what makes the error say little


class Splice(Record, frozen=True, kw_only=True):
    """Somebody's graph in which this package's ConvNeXt stands in the place of its own."""

    graph: str  # the file's name
    graph_sha256: Sha256
    input: str  # the tensor that the ConvNeXt reads
    cuts: tuple[str, ...]  # the tensors that it outputs, ascending levels
    opset: Positive  # the graph's, in which the ConvNeXt is written too
    nodes: tuple[Positive, Positive]  # how many were taken out, and put in
    ends: tuple[EndRecord, ...]
    not_run: str | None = None  # why the whole graph was not run, only its part up to the cuts
    before_ms: tuple[float, ...] = ()  # one image through the whole graph as it was, and as it is, in turns
    after_ms: tuple[float, ...] = ()


class Manifest(Record, frozen=True, kw_only=True):
    """`manifest.json`: everything an artifact folder says about itself."""

    schema_version: SchemaVersion
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
    # Of image size, preprocessing, activation, epsilon, pooling, output stride and labels; empty in earlier versions'.
    provenance: dict[str, Provenance] = msgspec.field(default_factory=dict)
    splice: Splice | None = None  # then inputs and outputs are the graph's, and all else is said of the ConvNeXt in it
