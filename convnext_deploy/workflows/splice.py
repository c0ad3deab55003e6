"""`export --into`: a graph of the user's with this package's ConvNeXt in the place of its own, proven equal.

The ConvNeXt is read from the graph itself, so that nothing can be another than it was. It goes the way of every
checkpoint to a verified ONNX artifact. Its nodes then replace those between the cuts, and both graphs run on the same
images: the tensors at the cuts have to agree as an export's outputs have to, and what the whole graphs put out is
compared where that says something.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import arguments, formats
from ..accuracy import probes
from ..artifact import deviation, licences, manifest, verify
from ..artifact.manifest import Artifact
from ..data import preprocess
from ..data.image_source import ImageSource
from ..errors import BuildError, ParityError, UsageError, WeightsError
from ..graph import onnx_splice
from ..models import onnx_convnext, onnx_graph
from ..models.source import Source
from ..records.manifest import BatchRange, EndRecord, ExportRequest, Splice, TensorRecord
from ..runtimes import openvino_graphs
from ..runtimes.onnx_graphs import OnnxRun, weight_bytes
from . import export as exports

if TYPE_CHECKING:
    import onnx

    from ..models.checkpoint import Loaded
    from ..models.onnx_blocks import OnnxConvNeXt
    from ..quantization.plan import LoadedPlan

Array = NDArray[Any]
Say = Callable[[str], None]
FILE, IR = "model.onnx", "model.xml"
ROUNDS = 5  # of timing, each graph once a round
EMBEDDED_BELOW = 2_000_000_000  # bytes; a larger model has its weights beside it
# Operators that choose: behind them, outputs are equal or in another order, whatever the distance before.
CHOOSING = frozenset({
    "NonMaxSuppression", "TopK", "NonZero", "ArgMax", "ArgMin", "Unique", "Round", "Floor", "Ceil", "Sign", "Greater",
    "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "RoiAlign", "If", "Loop", "Scan", "Compress", "Hardmax",
})  # fmt: skip


def splice(
    into: Path,
    request: ExportRequest,
    *,
    at: Sequence[str] = (),
    source: Source,
    plan: LoadedPlan | None = None,
    out: Path | None = None,
    force: bool = False,
    verify_data: str | ImageSource | None = None,
    say: Say = exports.silent,
    progress: arguments.Progress | None = None,
) -> Artifact:
    """Replace the ConvNeXt of a graph.

    Args:
        into: the graph, an ONNX file.
        request: what the ConvNeXt in it is to be; its batch where the graph takes any.
        at: the tensor that the stem reads, and the maps behind it, the first stage's first; none: found.
        source: what is said of the graph's images; with weights of its own, which have to be the graph's.

    Raises:
        UsageError: no ConvNeXt, names that are not at its ends, or a graph that a session cannot take.
        CheckFailed: the tensors at the cuts are not the graph's.
    """
    _refuse_early(request)
    fmt = formats.get(request.format)
    formats.require(fmt, build=True)
    target = out or Path("build") / f"{into.stem}-{request.format}"
    manifest.check_target(target, force)
    if not into.is_file():
        raise UsageError(f"--into {into}: no such file; expected a model in ONNX")
    say(f"looking for the ConvNeXt in {into.name}")
    user = onnx_graph.load(into)
    network = onnx_convnext.find(onnx_graph.OnnxGraph(user, into.name), at)
    say(f"found a ConvNeXt: --at {network.input},{','.join(cut.tensor for cut in network.cuts)}")
    taken = _taken(user, into.name, source, request)
    inside = Source(
        weights=str(into),
        weights_key=",".join(at) or None,
        task="features",
        image_size=source.image_size if network.sides or taken.dynamic_image_size else taken.image_size,
        preprocessing=source.preprocessing,
    )
    loaded = inside.load()
    if source.weights is not None or source.variant is not None:
        levels = tuple(cut.level for cut in network.cuts)
        _refuse_other_weights(loaded, replace(source, task="features", levels=levels).load(), into.name, network.half)
    with tempfile.TemporaryDirectory() as folder:
        whole = msgspec.structs.replace(request, dynamic_image_size=True)
        alone = exports.export(inside, whole, plan=plan, out=Path(folder) / "convnext", say=say, progress=progress)
        made = (_OpenVino if request.format == "openvino" else _Onnx)(into, user, alone.path, network)
    say("comparing the whole graphs")
    if progress is not None:
        progress(exports.NEARLY, 100, "comparing the whole graphs")
    sets = {"bundled": preprocess.probe_images(loaded.model.spec.in_chans, taken.image_size, probes.CHUNK)}
    if verify_data is not None:
        sets[str(verify_data)] = probes.pixels_of(loaded, verify_data)
    limit = verify.QUANTIZED if plan is not None else verify.TOLERANCES["fp16" if network.half else request.precision]
    parity, ends = [], _Ends(user, network, limit)
    pairs = _Pairs(user, made, network, taken)
    for name, pixels in sets.items():
        images = preprocess.as_input(pixels, loaded.preprocessing, "float32")
        before, after = pairs.run(images)
        count = len(network.cuts)
        parity.append(
            verify.compare(_joined(after, count), _joined(before, count), limit, f"{name} at the cuts", False)
        )
        for one, other in zip(before, after, strict=True):
            ends.add(one[count:], other[count:])
    wrong = [f"on {one.images}: {failure}" for one in parity for failure in one.failures] + ends.wrong()
    if wrong:
        raise ParityError(f"{into.name} computes something else with the ConvNeXt that was read from it: {wrong[0]}")
    before_ms, after_ms = pairs.timed(images[:1])
    record = msgspec.structs.replace(
        alone.manifest,
        model=msgspec.structs.replace(alone.manifest.model, image_size=taken.image_size),
        export=msgspec.structs.replace(
            alone.manifest.export, batch=taken.batch, dynamic_image_size=taken.dynamic_image_size
        ),
        inputs=(taken.input,),
        outputs=tuple(_tensor(value) for value in user.graph.output),
        parity=(*alone.manifest.parity, *parity),
        splice=Splice(
            graph=into.name,
            graph_sha256=manifest.sha256_of(into),
            input=network.input,
            cuts=tuple(cut.tensor for cut in network.cuts),
            opset=onnx_splice.opset(user),
            nodes=made.nodes,
            ends=ends.records(),
            not_run=pairs.not_run,
            before_ms=before_ms,
            after_ms=after_ms,
        ),
    )
    with manifest.staged(target, say) as staged:
        made.save(staged)
        licences.write(record.weights.licence, staged)
        record = msgspec.structs.replace(record, files=manifest.file_records(staged))
        (staged / manifest.MANIFEST_NAME).write_bytes(manifest.encode(record))
    return manifest.read(target)


def _refuse_early(request: ExportRequest) -> None:
    """What a graph of somebody else cannot be made into."""
    if request.format not in ("onnx", "openvino"):
        raise UsageError(
            f"--into makes a graph of ONNX or OpenVINO, not --format {request.format}; leave --format out, or take "
            "openvino"
        )
    if request.format == "openvino" and request.precision != "fp32":
        raise UsageError(
            f"--precision {request.precision} would be OpenVINO's type for all of the graph, and --into leaves the "
            "rest of it as it is; leave --precision out"
        )
    for option, given in (
        ("--input uint8", request.input == "uint8"),
        ("--argmax", request.argmax),
        ("--dynamic-image-size", request.dynamic_image_size),
    ):
        if given:
            raise UsageError(f"{option} changes what the graph takes or gives, and --into leaves that as it is")


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a session may give to the graph."""

    input: TensorRecord
    image_size: tuple[int, int]
    dynamic_image_size: bool
    batch: BatchRange

    def batches(self, images: Array) -> Iterator[Array]:
        """Images (N, C, H, W) as the graph takes them."""
        size = self.batch.min
        kind = np.dtype(self.input.dtype)
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            chunk = images[rows].astype(kind)
            yield chunk if len(self.input.shape) == 4 else chunk[0]


def _taken(user: onnx.ModelProto, name: str, source: Source, request: ExportRequest) -> _Taken:
    """
    Raises:
        UsageError: another input than one of images (N, C, H, W) or (C, H, W), or of another size than was asked for.
    """
    held = {tensor.name for tensor in user.graph.initializer}
    inputs = [_tensor(value) for value in user.graph.input if value.name not in held]
    if len(inputs) != 1 or len(inputs[0].shape) not in (3, 4) or inputs[0].dtype not in ("float32", "float16"):
        lines = "; ".join(f"{one.name} {one.dtype} ({', '.join(map(str, one.shape))})" for one in inputs)
        raise UsageError(
            f"{name} takes {lines or 'nothing'}; expected one input of float images, (N, C, H, W) or (C, H, W)"
        )
    shape = inputs[0].shape
    sides = shape[-2:]
    fixed = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
    if None not in (fixed, source.image_size) and fixed != source.image_size:
        raise UsageError(f"{name} takes images of {fixed[0]}x{fixed[1]} pixels; leave --image-size out")  # type: ignore[index]
    batch = request.batch if len(shape) == 4 else BatchRange(min=1, opt=1, max=1)
    if len(shape) == 4 and isinstance(shape[0], int):
        batch = BatchRange(min=shape[0], opt=shape[0], max=shape[0])
    return _Taken(inputs[0], fixed or source.image_size or (224, 224), fixed is None, batch)


def _tensor(value: onnx.ValueInfoProto) -> TensorRecord:
    import onnx

    type = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "any" for dim in type.shape.dim]
    known = type.elem_type != onnx.TensorProto.UNDEFINED
    kind = str(onnx.helper.tensor_dtype_to_np_dtype(type.elem_type)) if known else "unknown"
    return TensorRecord(name=value.name, dtype=kind, shape=tuple(dims))


def _refuse_other_weights(inside: Loaded, given: Loaded, name: str, half: bool) -> None:
    """
    Raises:
        WeightsError: the checkpoint that was given is not what the graph contains.
    """
    one, other = inside.model.state_dict(), given.model.state_dict()
    if one.keys() != other.keys():
        strange = sorted(one.keys() ^ other.keys())
        raise WeightsError(
            f"{given.weights.source} is another network than the one in {name}: they differ in {strange[0]}"
        )
    for key, held in one.items():
        expected = other[key].half().float() if half else other[key]
        if held.shape != expected.shape or not np.allclose(held.numpy(), expected.numpy(), rtol=1e-6, atol=1e-12):
            raise WeightsError(
                f"{given.weights.source} has other weights than {name}: {key} differs; leave --weights out to take "
                "the graph's own"
            )


class _Onnx:
    """The whole graph with the new ConvNeXt, as ONNX."""

    def __init__(self, into: Path, user: onnx.ModelProto, alone: Path, region: OnnxConvNeXt) -> None:
        self._user = user
        self._result = onnx_splice.spliced(user, onnx_graph.load(alone / FILE), region)
        self.nodes = onnx_splice.exchanged(user, self._result)

    def before(self, names: Sequence[str]) -> OnnxRun:
        return OnnxRun(self._user, names)

    def after(self, names: Sequence[str]) -> OnnxRun:
        return OnnxRun(self._result, names)

    def save(self, folder: Path) -> None:
        _save_onnx(self._result, folder / FILE)


def _save_onnx(model: onnx.ModelProto, file: Path) -> None:
    """With its weights beside it where no protobuf could contain them."""
    import onnx

    outside = weight_bytes(model) >= EMBEDDED_BELOW
    onnx.save(model, str(file), save_as_external_data=outside, location=f"{file.name}.data" if outside else None)


class _OpenVino:
    """Likewise as OpenVINO's IR. The rest of it is what OpenVINO reads from the user's ONNX."""

    def __init__(self, into: Path, user: onnx.ModelProto, alone: Path, region: OnnxConvNeXt) -> None:
        onnx_splice.taken_out(user, region)  # refuses what reads the old one between the cuts
        if user.functions:  # those of another opset, which are not written out
            one = user.functions[0]
            raise UsageError(
                f"{into.name} has the function {one.domain}.{one.name} of another opset than its graph, and OpenVINO "
                "takes no functions; export it without functions, or splice it with --format onnx"
            )
        self._into, self._user = into, user
        part = openvino_graphs.read(alone / IR)
        self._result, self.nodes = openvino_graphs.spliced(self._read(), part, region)

    def _read(self) -> Any:
        """The user's file, or its functions written out, which OpenVINO 2026.4 does not take."""
        if not onnx_graph.has_functions(self._into):
            return openvino_graphs.read(self._into)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / self._into.name
            _save_onnx(self._user, file)
            return openvino_graphs.read(file)

    def before(self, names: Sequence[str]) -> openvino_graphs.OpenVinoRun:
        return openvino_graphs.OpenVinoRun(self._read(), names)

    def after(self, names: Sequence[str]) -> openvino_graphs.OpenVinoRun:
        return openvino_graphs.OpenVinoRun(self._result, names)

    def save(self, folder: Path) -> None:
        openvino_graphs.save(self._result, folder / IR)


class _Pairs:
    """The graph as it was and as it is, run on the same images.

    As it was ONNX Runtime runs it, whatever the format: it did not take part in what was made. Where it lacks an
    operator behind the cuts, both end at the cuts.
    """

    def __init__(self, user: onnx.ModelProto, made: _Onnx | _OpenVino, region: OnnxConvNeXt, taken: _Taken) -> None:
        self._taken = taken
        cuts = [cut.tensor for cut in region.cuts]
        ends = [value.name for value in user.graph.output]
        self.not_run: str | None = None
        names = [*cuts, *ends]
        try:
            judge = OnnxRun(user, names)
        except BuildError as error:
            self.not_run = str(error)
            names, judge = cuts, OnnxRun(user, cuts)
        self._judge, self._after = judge, made.after(names)
        self._before = None if self.not_run else made.before(ends)
        self._alone = None if self.not_run else made.after(ends)

    def run(self, images: Array) -> tuple[list[list[Array]], list[list[Array]]]:
        """Of each batch, the tensors at the cuts and, where it runs so far, the graph's outputs: (before, after)."""
        name = self._taken.input.name
        batches = [*self._taken.batches(images)]
        return [self._judge(name, b) for b in batches], [self._after(name, b) for b in batches]

    def timed(self, images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Milliseconds of one batch, before and after, in turns; nothing where the whole graph does not run."""
        if self._before is None or self._alone is None:
            return (), ()
        name, batch = self._taken.input.name, next(self._taken.batches(images))
        runs = (self._before, self._alone)
        rounds = [[run.timed(name, batch) for run in runs] for _ in range(ROUNDS + 1)][1:]
        return tuple(one for one, _ in rounds), tuple(other for _, other in rounds)


def _joined(batches: list[list[Array]], count: int) -> tuple[Array, ...]:
    """The tensors at the cuts, over all batches, in fp32."""
    return tuple(np.concatenate([one[index] for one in batches]).astype(np.float32) for index in range(count))


class _Ends:
    """What the whole graphs put out, on all images."""

    def __init__(self, user: onnx.ModelProto, region: OnnxConvNeXt, limit: verify.Tolerance) -> None:
        self._names = [value.name for value in user.graph.output]
        self._choosing = onnx_splice.behind(user, [cut.tensor for cut in region.cuts], CHOOSING)
        self._limit = max(limit.relative_error, verify.LOOSEST_FP32)
        self._errors: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._held: set[str] = set()  # that were not empty on every image

    def add(self, before: list[Array], after: list[Array]) -> None:
        for name, one, other in zip(self._names, before, after, strict=False):
            self._held |= {name} if one.size else set()
            if one.shape != other.shape:
                self._notes[name] = f"shapes {one.shape} and {other.shape}: something was chosen differently"
            elif one.dtype.kind != "f":
                if not np.array_equal(one, other):
                    self._notes[name] = f"{float((one != other).mean()):.2%} of its {one.dtype} values differ"
                self._errors[name] = max(self._errors.get(name, 0.0), float((one != other).mean()) if one.size else 0.0)
            else:
                error = float(deviation.relative_errors(other[None], one[None])[0]) if one.size else 0.0
                self._errors[name] = max(self._errors.get(name, 0.0), error)

    def wrong(self) -> list[str]:
        """Outputs that are too far apart though nothing on the way to them chooses."""
        return [
            f"the output {name} is {error:.3g} from what it was, above {self._limit:.3g}"
            for name, error in self._errors.items()
            if not error <= self._limit and not self._choosing[name]
        ]

    def records(self) -> tuple[EndRecord, ...]:
        records = []
        for name in self._names:
            note, error = self._notes.get(name), self._errors.get(name)
            if error is not None and name not in self._held:
                note = self._notes[name] = "empty on every image, so that nothing was compared; give --verify-data"
            if note is None and error is not None and error > self._limit:
                note = f"{', '.join(self._choosing[name])} on the way choose, so near ties change places"
            records.append(EndRecord(output=name, relative_error=None if name in self._notes else error, note=note))
        return tuple(records)
