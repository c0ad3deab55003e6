"""The images that an export is verified on, with the outputs of every reference, and an artifact's outputs on them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..artifact import matching, verify
from ..artifact.session import Session, run_in_batches
from ..data import preprocess
from ..data.image_source import ImageSource
from ..errors import DataError, WeightsError, plain
from ..records.manifest import ExportSpec, Manifest, ModelSpec, Parity

if TYPE_CHECKING:
    import torch

    from ..models.checkpoint import Loaded
    from ..models.convnext import ConvNeXt
    from ..models.two_stage import Places

Pixels = NDArray[np.uint8]  # (N, C, H, W)

IMAGES = 16
CHUNK = 4  # images at once where the source computes its reference; bounds the memory of large variants
# Beside its own size, a model of any size is verified at the smallest, and at one that is not square, has rows and
# columns left over at every stride, and is so large that every tap of the last 7x7 kernels meets more than padding.
SIZES = ((32, 32), (191, 255))
LARGEST_BYTES = 1 << 30  # of a batch's widest map, which bounds the largest batch that is verified


@dataclass(frozen=True, slots=True)
class Probe:
    """A set of images. `typed`: the cast module in its own type, and its weights with float32 arithmetic.

    `simulated` is the plan with the rest in fp32, `simulated_typed` with the rest in half precision.
    """

    name: str
    pixels: Pixels
    expected: verify.Outputs
    simulated: verify.Outputs | None = None
    simulated_typed: verify.Outputs | None = None
    typed: tuple[verify.Outputs, verify.Outputs] | None = None  # on the first CHUNK images

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[3]


def of_source(loaded: "Loaded", dynamic_image_size: bool, verify_data: str | ImageSource | None) -> tuple[Probe, ...]:
    """All sets with the source's outputs in fp32, before any rewrite.

    Raises:
        WeightsError: the source's outputs are not finite.
    """
    model = loaded.model.spec
    count = CHUNK if model.detection is not None else IMAGES
    sets = [("bundled", preprocess.probe_images(model.in_chans, model.image_size, count))]
    if dynamic_image_size:
        for size in SIZES:
            if size != model.image_size:
                name = f"bundled, {size[0]}x{size[1]}"
                sets.append((name, preprocess.probe_images(model.in_chans, size, CHUNK)))
    if verify_data is not None:
        sets.append((str(verify_data), pixels_of(loaded, verify_data)))
    probes = tuple(Probe(name, pixels, _finite(loaded, outputs(loaded, loaded.model, pixels))) for name, pixels in sets)
    if model.detection is not None:
        _refuse_nothing_found(loaded, probes)
    return probes


def _refuse_nothing_found(loaded: "Loaded", probes: tuple[Probe, ...]) -> None:
    """Refuse images on which a detector finds nothing: that an artifact finds nothing there proves little.

    Raises:
        DataError: with how sure it was.
    """
    model = loaded.model.spec
    if any(matching.detections_in(probe.expected, model, probe.image_size) for probe in probes):
        return
    facts = model.detection
    assert facts is not None
    best = [matching.highest_score(probe.expected, model, probe.image_size) for probe in probes]
    scores = [score for score in best if score is not None]
    if scores:
        name = "score_thresh" if facts.regions is None else "box_score_thresh"
        why = f"highest score {max(scores):.3g}, {name} {facts.score_threshold:g}"
    else:
        assert facts.regions is not None
        why = f"its first stage proposes no region, rpn_score_thresh {facts.regions.score_threshold:g}"
    raise DataError(
        f"{loaded.weights.source} detects nothing on the {sum(len(probe.pixels) for probe in probes)} images to verify "
        f"on ({why}); expected detections to compare: give --verify-data FOLDER with images of what it detects"
    )


def pixels_of(loaded: "Loaded", verify_data: str | ImageSource) -> Pixels:
    """The images of --verify-data, resized and cropped, uint8 (N, C, H, W)."""
    from ..data import sources

    model = loaded.model.spec
    source = sources.open_whole("--verify-data", verify_data)
    to_pixels = preprocess.transform(loaded.preprocessing, model.image_size, model.in_chans)
    sample = sources.subset(source, IMAGES)
    try:
        return np.stack([to_pixels(sample.read(index)) for index in range(len(sample))])
    except OSError as error:
        raise DataError(f"--verify-data {verify_data} contains an image that cannot be read: {plain(error)}") from None


def _finite(loaded: "Loaded", outputs: verify.Outputs) -> verify.Outputs:
    wrong = sum(int(np.count_nonzero(~np.isfinite(output))) for output in outputs)
    if wrong:
        raise WeightsError(
            f"{wrong} of the outputs of {loaded.weights.source} are NaN or infinite before any rewrite; "
            "expected finite weights that float32 can compute with"
        )
    return outputs


def outputs(
    loaded: "Loaded", model: "ConvNeXt", pixels: Pixels, beside: verify.Outputs | None = None
) -> verify.Outputs:
    return tuple(output.numpy() for output in tensors(loaded, model, pixels, beside))


def tensors(
    loaded: "Loaded", model: "ConvNeXt", pixels: Pixels, beside: verify.Outputs | None = None
) -> "tuple[torch.Tensor, ...]":
    """What the module puts out for all images, joined.

    Args:
        beside: outputs that these are to be compared with. A detector of two stages follows the same candidates.
    """
    import torch

    chunks = []
    with torch.inference_mode():
        for start in range(0, len(pixels), CHUNK):
            rows = slice(start, start + CHUNK)
            places = None if beside is None else places_of(model.spec, beside, rows)
            images = torch.from_numpy(as_input(loaded, model, pixels[rows]))
            tensor = model(images) if places is None else model(images, places)
            chunks.append((tensor,) if isinstance(tensor, torch.Tensor) else tensor)
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def places_of(model: ModelSpec, outputs: verify.Outputs, rows: slice) -> "Places | None":
    """Which candidates a detector of two stages followed, on some of the images; None of other models."""
    if model.detection is None or model.detection.regions is None:
        return None
    import torch

    from ..models.two_stage import Places

    return Places(*(torch.from_numpy(output[rows]) for output in outputs[-len(Places._fields) :]))


def as_input(loaded: "Loaded", model: "ConvNeXt", pixels: Pixels) -> NDArray[np.float32] | Pixels:
    return preprocess.as_input(pixels, loaded.preprocessing, "uint8" if model.takes_uint8 else "float32")


def with_simulation(loaded: "Loaded", model: "ConvNeXt", sets: tuple[Probe, ...]) -> tuple[Probe, ...]:
    """With the outputs of the module as a plan has rewritten it."""
    return tuple(replace(probe, simulated=outputs(loaded, model, probe.pixels)) for probe in sets)


def with_type(
    loaded: "Loaded", model: "ConvNeXt", sets: tuple[Probe, ...], spec: ExportSpec, typed_graph: bool
) -> tuple[Probe, ...]:
    """With the outputs of the module in the asked type, on the first images of the first set.

    Of a module in 8 bits, those with the rest in the asked type, on every set whose root mean square is judged.

    Args:
        model: cast, or in fp32 where the runtime chooses the type (then a copy is cast).
    """
    from ..models import passes  # which needs torch; opening an artifact does not

    if spec.precision not in verify.ROUNDING:
        return sets
    cast = model
    if not typed_graph:
        cast = copy.deepcopy(model)
        passes.cast_parameters(cast, spec.precision)
    if sets[0].simulated is not None:
        return tuple(
            probe
            if len(probe.pixels) < verify.RMS_SAMPLES
            else replace(probe, simulated_typed=outputs(loaded, cast, probe.pixels))
            for probe in sets
        )
    if spec.quantization is not None:  # a plan that keeps operations in fp32 and quantizes none
        return sets
    pixels = sets[0].pixels[:CHUNK]
    beside = tuple(output[:CHUNK] for output in sets[0].expected)
    same = outputs(loaded, cast, pixels, beside)
    wide = outputs(loaded, copy.deepcopy(cast).float(), pixels, beside)
    return (replace(sets[0], typed=(same, wide)), *sets[1:])


Reload = Callable[[], "Loaded"]


def _at_its_rounding(
    failed: Parity, built: verify.Outputs, rows: NDArray[np.int64], probe: Probe, classify: bool, reload: Reload
) -> Parity:
    """A failure in fp32 once more, beside float64, at the limit that the source's own distance from it sets."""
    if failed.relative_error is None or not failed.relative_error <= verify.LOOSEST_FP32:
        return failed
    source = reload()
    exact = outputs(source, source.model.double(), probe.pixels)
    limit, rounding = verify.rounding_tolerance(probe.expected, exact)
    again = verify.compare(built, tuple(output[rows] for output in exact), limit, probe.name, classify)
    return msgspec.structs.replace(again, source_rounding=rounding)


def judged(
    session: Session, manifest: Manifest, sets: tuple[Probe, ...], reload: Reload | None = None
) -> tuple[Parity, ...]:
    """Every comparison of the artifact's outputs that can fail.

    Args:
        reload: reads the source again, as it is before any rewrite; asked only where fp32's own limit is missed.
    """
    records = []
    classify = manifest.model.task in ("classify", "segment")
    limit = verify.TOLERANCES[manifest.export.precision]
    if manifest.model.detection is not None:
        return tuple(one for probe in sets for one in _detections_judged(session, manifest, probe, probe is sets[0]))
    for index, probe in enumerate(sets):
        images = preprocess.as_input(probe.pixels, manifest.preprocessing, manifest.export.input)
        sizes = batches(manifest.model, manifest.export, probe) if index == 0 else (manifest.export.batch.opt,)
        rows, outputs = _run(session, images, sizes)
        expected = tuple(output[rows] for output in probe.expected)
        if probe.simulated is not None:
            simulated = tuple(output[rows] for output in probe.simulated)
            half = probe.simulated_typed and tuple(output[rows] for output in probe.simulated_typed)
            tolerance = verify.simulation_tolerance(simulated, expected, manifest.export.precision, half)
            records.append(verify.compare(outputs, simulated, tolerance, probe.name, classify, reference="simulation"))
        source_limit = limit if probe.simulated is None else verify.QUANTIZED
        record = verify.compare(outputs, expected, source_limit, probe.name, classify)
        if record.failures and reload is not None and probe.simulated is None and manifest.export.precision == "fp32":
            record = _at_its_rounding(record, outputs, rows, probe, classify, reload)
        records.append(record)
        if probe.typed is not None:
            first = tuple(output[rows < CHUNK] for output in outputs)
            typed = tuple(tuple(output[rows[rows < CHUNK]] for output in kind) for kind in probe.typed)
            records.append(
                verify.compare_type(first, typed[0], typed[1], manifest.export.precision, probe.name, classify)
            )
        records = [
            record
            if record.batches
            else msgspec.structs.replace(
                record,
                samples=min(record.samples, len(images)),
                batches=sizes,
                image_size=probe.image_size,
                stand_in=session.stands_in,
            )
            for record in records
        ]
    return tuple(records)


def _detections_judged(session: Session, manifest: Manifest, probe: Probe, first: bool) -> list[Parity]:
    """A detector's comparisons on one set: with the source and, in half precision, with the module in the same type."""
    model, precision = manifest.model, manifest.export.precision
    images = preprocess.as_input(probe.pixels, manifest.preprocessing, manifest.export.input)
    sizes = batches(model, manifest.export, probe) if first else (manifest.export.batch.opt,)
    rows, outputs = _run(session, images, sizes)
    expected = tuple(output[rows] for output in probe.expected)
    limit = verify.TOLERANCES[precision].relative_error
    records = [matching.compare(outputs, expected, model, probe.image_size, limit, probe.name)]
    if probe.typed is not None:
        limit = verify.type_error(*probe.typed, precision)
        beside = [
            matching.compare(
                outputs, tuple(output[rows] for output in kind), model, probe.image_size, limit, probe.name, "type"
            )
            for kind in probe.typed
        ]
        records.append(min(beside, key=lambda parity: (len(parity.failures), parity.relative_error or 0.0)))
    return [
        msgspec.structs.replace(
            record, samples=len(images), batches=sizes, image_size=probe.image_size, stand_in=session.stands_in
        )
        for record in records
    ]


def batches(model: ModelSpec, export: ExportSpec, probe: Probe) -> tuple[int, ...]:
    """The smallest batch, the one that the artifact is tuned for, and the largest that all the images make up.

    That one is bounded by the memory of its widest map, (H / 4, W / 4, 4 dims[0]) floats an image, or what a segmenter
    makes of all its maps together.
    """
    height, width = probe.image_size
    channels = 4 * model.dims[0]
    if model.segmentation is not None:
        channels = max(channels, len(model.levels) * model.segmentation.channels)
    fits = LARGEST_BYTES // (height // 4 * (width // 4) * channels * 4)
    batch = export.batch
    largest = min(batch.max, max(batch.opt, min(len(probe.pixels), fits)))
    return tuple(sorted({batch.min, min(batch.opt, largest), largest}))


def _run(
    session: Session, images: NDArray[np.generic], sizes: tuple[int, ...]
) -> tuple[NDArray[np.int64], verify.Outputs]:
    """(rows of the images, their outputs): all of them in the largest batches, and one batch of each smaller size."""
    rows, parts = [], []
    for size in sizes:
        count = len(images) if size == sizes[-1] else min(size, len(images))
        parts.append(run_in_batches(session, images[:count], size))  # type: ignore[arg-type]  # one of the two types
        rows.append(np.arange(count))
    joined = tuple(np.concatenate(kind) for kind in zip(*parts, strict=True))
    return np.concatenate(rows), joined
