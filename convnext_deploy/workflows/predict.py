"""What a model says of images that nobody has labelled."""

import csv
import functools
import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import arguments
from ..accuracy.boxes import placed
from ..accuracy.targets import problem_of
from ..artifact import instance_masks
from ..artifact.manifest import Artifact, check_file, write_file
from ..artifact.session import Session, run_in_batches
from ..data import decoding, numbering, preprocess, remote, sources
from ..data.class_folders import IMAGE_SUFFIXES
from ..data.readers import MAX_FILE_BYTES, file_content, refuse_large
from ..errors import CheckFailed, DataError, UsageError, counted, plain, printable
from ..records.base import Goal, Problem
from ..records.manifest import Manifest
from ..records.prediction import Box, ClassProbability, Mask, NamesFrom, Prediction, PredictResult
from . import predicted_masks

LEMMAS = "imagenet_synset_to_lemma.txt"  # timm's names of the synsets
TIMEOUT_S = 30  # of a server that does not answer
SUFFIXES = (".csv", ".json", ".npz")

Named = tuple[str, Callable[[], Image.Image]]  # an image's name, and what decodes it
Given = str | os.PathLike[str] | Image.Image | IO[bytes]


def predict(
    session: Session,
    images: Sequence[Named],
    *,
    artifact: Artifact | None = None,
    batch: int,
    top: int = 5,
    labels: Path | None = None,
    problem: Problem | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PredictResult:
    """The most probable classes of each image, a segmenter's mask, a detector's boxes; else the outputs, in `out`.

    Args:
        images: name and what reads it (`listed`).
        artifact: what the session is of, where it is known.
        batch: images a call of the session.
        top: so many classes an image.
        problem: what the outputs mean, where the model does not say it.
        labels: file of class names; None: the artifact's, or ImageNet-1k's where it has 1000 outputs.
        out: .csv (a line an image and class, or box), .json (the result), or .npz (`images`, and the outputs `output0`,
            `output1`, ... float32, an image each). Of a segmenter also .png for one mask, or a folder of them.
        progress: told (images done, images in all).
        say: told what is assumed.

    Raises:
        UsageError: a name of `out` that tells no format, or a model without classes and no .npz.
        DataError: not one readable image.
        CheckFailed: outputs that are not finite.
    """
    manifest, where = session.manifest, artifact.path if artifact else "the model"
    classes = manifest.model.num_classes if manifest.model.task in ("classify", "segment", "detect") else 0
    keeps = out is not None and out.suffix == ".npz"
    # A file of raw outputs needs nobody to say what one output is.
    silent_one = classes == 1 and keeps and problem is None and manifest.model.problem is None
    goal = problem_of(manifest.model, problem) if classes and not silent_one else None
    if top < 1:
        raise UsageError(f"top {top}; expected at least 1 class")
    masks: list[Path] | None = None
    if out is not None and out.suffix not in SUFFIXES:
        if goal != "segmentation" or not (out.suffix.lower() in (".png", "") or out.is_dir()):
            more = ", .png or a folder of masks" if goal == "segmentation" else ""
            raise UsageError(f"--out {out} ends in {out.suffix!r}; expected one of {', '.join(SUFFIXES)}{more}")
        masks = predicted_masks.places(out, [name for name, _ in images])
    if out is not None and masks is None:
        check_file(out)
    if not classes and not keeps:
        what = f"no classes: its task is {manifest.model.task}"
        raise UsageError(f"{where} has {what}; keep its outputs with --out NAME.npz")
    names, names_from = class_names(manifest, labels, goal)
    notes = []
    if goal in ("single-label", "multi-label", "segmentation", "detection") and names_from in ("imagenet", "none"):
        notes.append(
            f"the artifact has no labels; its {classes} outputs are taken for ImageNet-1k's, give --labels otherwise"
            if names_from == "imagenet"
            else f"nothing names the {counted(classes, 'output')}; give --labels FILE with a name a line"
        )
    for note in notes:
        (say or (lambda line: None))(note)
    predictions: list[Prediction] = []
    unreadable: list[str] = []
    outputs: list[tuple[NDArray[np.float32], ...]] = []
    report = progress or (lambda done, total: None)
    report(0, len(images))
    turned: list[str] = []
    for done, read, failed, its_turned, sides, maps in _batches(session, images, batch):
        unreadable += failed
        turned += its_turned
        if read and not all(np.isfinite(one).all() for one in maps):
            raise CheckFailed(f"{where} gives outputs that are not finite for an image from {images[read[0]][0]} on")
        if keeps and read:
            outputs.append(maps)
        for row, (index, size, logits) in enumerate(zip(read, sides, maps[0] if maps else (), strict=True)):
            if goal == "detection":
                boxes, scores, numbers = (output[row] for output in maps[:3])
                own = placed(boxes, scores, numbers, size, manifest.model.image_size)[:top]
                places = maps[3][row][numbers >= 0][:top] if len(maps) > 3 else None
                predictions.append(
                    Prediction(image=images[index][0], classes=(), boxes=_boxes(own, names, places, size))
                )
                continue
            if goal == "segmentation":
                place = None if masks is None else masks[index]
                predictions.append(
                    predicted_masks.predicted(images[index][0], logits, size, manifest, names, top, place)
                )
                continue
            best = probable(logits, goal, top, names)
            values = tuple(map(float, logits)) if goal == "regression" else ()
            predictions.append(Prediction(image=images[index][0], classes=best, values=values))
        report(done, len(images))
    if not predictions and len(unreadable) == 1:
        raise DataError(unreadable[0])
    if not predictions:
        raise DataError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    said = preprocess.turned_words(len(turned), turned[0] if turned else "", manifest.preprocessing)
    if said is not None:
        (say or (lambda line: None))(said)
        notes.append(said)
    result = PredictResult(
        artifact=printable(artifact.path.resolve().name) if artifact else manifest.model.architecture,
        artifact_sha256=artifact.sha256 if artifact else None,
        names_from=names_from if classes else "none",
        problem=goal,
        predictions=tuple(predictions),
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )
    if out is not None and masks is None:
        write_file(out, _encoded(result, out.suffix, outputs))
    return result


def _boxes(
    own: NDArray[np.float32],
    names: Sequence[str] | None,
    places: NDArray[np.float32] | None,
    sides: tuple[int, int],
) -> tuple[Box, ...]:
    return tuple(
        Box(
            number=int(number),
            name=None if names is None else names[int(number)],
            score=score,
            left=left,
            top=top,
            right=right,
            bottom=bottom,
            mask=None if places is None else _mask(places[index], own[index, :4], sides),
        )
        for index, (left, top, right, bottom, score, number) in enumerate(own.tolist())
    )


def _mask(places: NDArray[np.float32], box: NDArray[np.float32], sides: tuple[int, int]) -> Mask:
    (whole,) = instance_masks.pasted(places[None], box[None], sides)
    return Mask(size=sides, counts=tuple(instance_masks.run_lengths(whole > instance_masks.INSIDE)))


def probable(
    logits: NDArray[np.float32], problem: Goal | None, top: int, names: Sequence[str] | None
) -> tuple[ClassProbability, ...]:
    """What an image's logits (classes,) say of its classes, the most probable first; of a regression nothing."""
    if problem == "single-label":
        return most_probable(logits, top, names)
    if problem == "binary":
        return most_probable(np.array([0, logits[0]], np.float32), top, names if len(names or ()) == 2 else None)
    if problem != "multi-label":
        return ()
    wide = logits.astype(np.float64)
    probabilities = np.where(wide >= 0, 1, np.exp(np.minimum(wide, 0))) / (1 + np.exp(-np.abs(wide)))
    return _first(wide, probabilities, top, names)


def most_probable(logits: NDArray[np.float32], top: int, names: Sequence[str] | None) -> tuple[ClassProbability, ...]:
    """Logits (classes,) to the `top` largest softmax probabilities; of equal ones the smaller number is first."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max())
    return _first(wide, powers / powers.sum(), top, names)


def _first(
    logits: NDArray[np.float64], probabilities: NDArray[np.float64], top: int, names: Sequence[str] | None
) -> tuple[ClassProbability, ...]:
    return tuple(
        ClassProbability(
            number=int(number), name=None if names is None else names[number], probability=float(probabilities[number])
        )
        for number in np.argsort(-logits, kind="stable")[:top]
    )


def class_names(
    manifest: Manifest, labels: Path | None, problem: Goal | None = None
) -> tuple[tuple[str, ...] | None, NamesFrom]:
    """Names of a classifier's outputs in their order, and where they come from; of a binary one, of both classes.

    Raises:
        UsageError: the file names other outputs than the model has.
    """
    model = manifest.model
    count = 2 if problem == "binary" else model.num_classes
    if labels is not None:
        return numbering.names_of(labels, count), "file"
    if manifest.labels:
        return manifest.labels, "artifact"
    if model.task == "classify" and model.num_classes == numbering.IMAGENET_CLASSES:
        names = _imagenet()
        return names, "imagenet" if names else "none"
    return None, "none"


def _imagenet() -> tuple[str, ...] | None:
    """ImageNet-1k's class names from timm's lists."""
    synsets, lemmas = numbering.of_timm(numbering.SYNSETS), numbering.of_timm(LEMMAS)
    if synsets is None or lemmas is None:
        return None
    lines = (line.partition("\t") for line in lemmas.splitlines())
    names = {synset: name for synset, _, name in lines}
    return tuple(names[synset] for synset in synsets.split())


def _batches(
    session: Session, images: Sequence[Named], batch: int
) -> Iterator[tuple[int, list[int], list[str], list[str], list[tuple[int, int]], tuple[NDArray[np.float32], ...]]]:
    """Images done; of this batch those read, those not read with the reason, those turned; sides and outputs."""
    manifest = session.manifest
    upright = manifest.preprocessing.exif_orientation
    to_pixels = preprocess.transform(manifest.preprocessing, manifest.model.image_size, manifest.model.in_chans)

    with preprocess.decoders() as pool:
        read = lambda index: images[index][1]()  # noqa: E731 - what opens the image of an index
        decoded = preprocess.decoded_batches(pool, read, to_pixels, range(len(images)), batch, upright)
        for these in decoded:
            maps: tuple[NDArray[np.float32], ...] = ()
            if these.read:
                batch_of = preprocess.as_input(np.stack(these.pixels), manifest.preprocessing, manifest.export.input)
                maps = run_in_batches(session, batch_of, size=len(batch_of))
            yield (
                these.indices.stop,
                these.read,
                [f"{images[index][0]}: {line}" for index, line in these.failed],
                [images[index][0] for index in these.turned],
                these.sides,
                maps,
            )


def _encoded(result: PredictResult, suffix: str, outputs: list[tuple[NDArray[np.float32], ...]]) -> bytes:
    if suffix == ".json":
        return msgspec.json.format(msgspec.json.encode(result)) + b"\n"
    if suffix == ".npz":
        kept = io.BytesIO()
        maps: dict[str, NDArray[Any]] = {
            f"output{index}": np.concatenate(parts) for index, parts in enumerate(zip(*outputs, strict=True))
        }
        maps["images"] = np.array([one.image for one in result.predictions])
        np.savez(kept, **maps)  # type: ignore[arg-type]  # the stub takes a name for an option
        return kept.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    last = {"regression": "value", "segmentation": "share", "detection": "score"}
    sides = ("left", "top", "right", "bottom") if result.problem == "detection" else ()
    writer.writerow(("image", "rank", "number", "name", last.get(result.problem or "", "probability"), *sides))
    for one in result.predictions:
        for rank, best in enumerate(one.classes, 1):
            writer.writerow((one.image, rank, best.number, best.name or "", f"{best.probability:.6g}"))
        for rank, area in enumerate(one.areas, 1):
            writer.writerow((one.image, rank, area.number, area.name or "", f"{area.share:.6g}"))
        for rank, box in enumerate(one.boxes, 1):
            place = (f"{side:.2f}" for side in (box.left, box.top, box.right, box.bottom))
            writer.writerow((one.image, rank, box.number, box.name or "", f"{box.score:.6g}", *place))
        for number, value in enumerate(one.values):
            writer.writerow((one.image, "", number, "", f"{value:.6g}"))
    return text.getvalue().encode()


def check(given: object) -> None:
    """Refuse what `listed` could not read, before anything is opened.

    Raises:
        UsageError: naming the type.
    """
    for one in given if isinstance(given, (list, tuple)) else (given,):
        if not (isinstance(one, (str, os.PathLike, Image.Image)) or hasattr(one, "read")):
            cure = ""
            if hasattr(one, "__array__"):
                cure = "; Pillow's Image.fromarray makes one of an array (H, W, 3), red first (OpenCV has blue first)"
            elif isinstance(one, (bytes, bytearray, memoryview)):
                cure = "; give io.BytesIO of an encoded image's bytes"
            raise UsageError(
                f"images of type {type(one).__name__}; expected a path, an address, an open file, an image of "
                f"Pillow's, or a list of them{cure}"
            )


def listed(given: Given | Sequence[Given], split: str | None = None) -> list[Named]:
    """Name and reader of each image of a file, folder, tar or Parquet file, address, open file, or list of such.

    Args:
        split: of a source that has several.

    Raises:
        DataError: nothing is there, or no images are.
    """
    if isinstance(given, (list, tuple)):
        images = [image for one in given for image in listed(one, split)]
        if not images:
            raise DataError("images []; expected at least one")
        return images
    if isinstance(given, Image.Image):
        return [(getattr(given, "filename", "") or "an image of Pillow's", lambda: given)]
    if isinstance(given, (str, os.PathLike)):
        return _at(os.fspath(given), split)
    file = cast("IO[bytes]", given)
    name = str(getattr(file, "name", "an open file"))
    try:
        content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed, or open as text
        raise DataError(f"{name} cannot be read: {plain(error)}; expected an open file of bytes") from None
    if not isinstance(content, bytes):
        raise UsageError(f"{name} gives {type(content).__name__}; expected an open file of bytes, as open(path, 'rb')")
    return [(name, lambda: decoding.decoded(_within(content)))]


def _at(place: str, split: str | None) -> list[Named]:
    path = Path(place)
    if place.startswith(("http://", "https://")):
        return [(place, lambda: decoding.decoded(_fetched(place)))]
    if os.path.isfile(place) and path.suffix.lower() in (*IMAGE_SUFFIXES, ".gif", ".jp2"):
        return [(place, lambda: decoding.decoded(file_content(path)))]
    if not (os.path.lexists(place) or place.startswith("hfds:") or remote.is_address(place)):
        raise DataError(
            f"{arguments.shown(place)} does not exist; expected an image, a folder, tar, Parquet file or list of "
            "images, an http(s) address, a store's such as s3://bucket/val-*.tar, hfds:NAME, or on the command line - "
            "for standard input"
        )
    source = sources.open_source(place, split)
    return [(name, functools.partial(source.read, index)) for index, name in enumerate(source.names)]


def _within(content: bytes) -> bytes:
    refuse_large(len(content))
    return content


def _fetched(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "convnext-deploy"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_FILE_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the answer, whose connection is open
        reason = getattr(error, "reason", None)
        said = plain(reason if isinstance(reason, BaseException) else error)
        raise decoding.UnreadableImage(f"the address cannot be read: {said}") from None
    return _within(content)
