"""What a model says of images that nobody has labelled."""

import csv
import functools
import io
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact.manifest import Artifact, write_file
from ..artifact.session import Session, run_in_batches
from ..data import decoding, numbering, preprocess, sources
from ..data.class_folders import IMAGE_SUFFIXES
from ..data.image_source import MAX_FILE_BYTES, refuse_large
from ..errors import CheckFailed, DataError, UsageError
from ..records.manifest import Manifest
from ..records.prediction import ClassProbability, NamesFrom, Prediction, PredictResult

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
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PredictResult:
    """The most probable classes of each image; of a model without classes its outputs, which `out` keeps.

    Args:
        images: name and what reads it (`listed`).
        artifact: what the session is of, where it is known.
        batch: images a call of the session.
        top: so many classes an image.
        labels: file of class names; None: the artifact's, or ImageNet-1k's where it has 1000 outputs.
        out: .csv (a line an image and class), .json (the result), or .npz (`images`, and the outputs `output0`,
            `output1`, ... float32, an image each).
        progress: told (images done, images in all).
        say: told what is assumed.

    Raises:
        UsageError: a name of `out` that tells no format, or a model without classes and no .npz.
        DataError: not one readable image.
        CheckFailed: outputs that are not finite.
    """
    manifest, where = session.manifest, artifact.path if artifact else "the model"
    classes = manifest.model.num_classes if manifest.model.task == "classify" else 0
    if top < 1:
        raise UsageError(f"top {top}; expected at least 1 class")
    if out is not None and out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out} ends in {out.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if classes < 2 and (out is None or out.suffix != ".npz"):
        what = "one output, which is no class" if classes else f"no classes: its task is {manifest.model.task}"
        raise UsageError(f"{where} has {what}; keep its outputs with --out NAME.npz")
    names, names_from = class_names(manifest, labels)
    notes = []
    if classes > 1 and names_from in ("imagenet", "none"):
        notes.append(
            f"the artifact has no labels; its {classes} outputs are taken for ImageNet-1k's, give --labels otherwise"
            if names_from == "imagenet"
            else f"nothing names the {classes} outputs; give --labels FILE with a name a line"
        )
    for note in notes:
        (say or (lambda line: None))(note)
    found: list[Prediction] = []
    unreadable: list[str] = []
    outputs: list[tuple[NDArray[np.float32], ...]] = []
    keeps = out is not None and out.suffix == ".npz"
    report = progress or (lambda done, total: None)
    report(0, len(images))
    for done, read, failed, maps in _batches(session, images, batch):
        unreadable += failed
        if read and not all(np.isfinite(one).all() for one in maps):
            raise CheckFailed(f"{where} gives outputs that are not finite for an image from {read[0]} on")
        if keeps and read:
            outputs.append(maps)
        for name, logits in zip(read, maps[0] if maps else (), strict=True):
            best = most_probable(logits, top, names) if classes > 1 else ()
            found.append(Prediction(image=name, classes=best))
        report(done, len(images))
    if not found:
        raise DataError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    result = PredictResult(
        artifact=artifact.path.resolve().name if artifact else manifest.model.architecture,
        artifact_sha256=artifact.sha256 if artifact else None,
        names_from=names_from if classes > 1 else "none",
        predictions=tuple(found),
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )
    if out is not None:
        write_file(out, _encoded(result, out.suffix, outputs))
    return result


def most_probable(logits: NDArray[np.float32], top: int, names: Sequence[str] | None) -> tuple[ClassProbability, ...]:
    """Logits (classes,) to the `top` largest softmax probabilities; of equal ones the smaller number is first."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max())
    probabilities = powers / powers.sum()
    return tuple(
        ClassProbability(
            number=int(number), name=None if names is None else names[number], probability=float(probabilities[number])
        )
        for number in np.argsort(-wide, kind="stable")[:top]
    )


def class_names(manifest: Manifest, labels: Path | None) -> tuple[tuple[str, ...] | None, NamesFrom]:
    """Names of a classifier's outputs in their order, and where they come from.

    Raises:
        UsageError: the file names other outputs than the model has.
    """
    model = manifest.model
    if labels is not None:
        numbers = numbering.class_map(labels)
        by_number = {number: name for name, number in reversed(numbers.items())}  # of two names the first
        if set(by_number) != set(range(model.num_classes)):
            raise UsageError(
                f"--labels {labels} names {len(by_number)} outputs, up to number {max(by_number)}; the model has "
                f"{model.num_classes} (0..{model.num_classes - 1})"
            )
        return tuple(by_number[number] for number in range(model.num_classes)), "file"
    if manifest.labels:
        return manifest.labels, "artifact"
    if model.task == "classify" and model.num_classes == numbering.IMAGENET_CLASSES:
        found = _imagenet()
        return found, "imagenet" if found else "none"
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
) -> Iterator[tuple[int, list[str], list[str], tuple[NDArray[np.float32], ...]]]:
    """Images done, names of those read in this batch, those not read with the reason, and the outputs."""
    manifest = session.manifest
    to_pixels = preprocess.transform(manifest.preprocessing, manifest.model.image_size, manifest.model.in_chans)

    with preprocess.decoders() as pool:
        read = lambda index: images[index][1]()  # noqa: E731 - what opens the image of an index
        decoded = preprocess.decoded_batches(pool, read, to_pixels, range(len(images)), batch)
        for indices, good, pixels, failed in decoded:
            maps: tuple[NDArray[np.float32], ...] = ()
            if good:
                batch_of = preprocess.as_input(np.stack(pixels), manifest.preprocessing, manifest.export.input)
                maps = run_in_batches(session, batch_of, size=len(batch_of))
            lines = [f"{images[index][0]}: {line}" for index, line in failed]
            yield indices.stop, [images[index][0] for index in good], lines, maps


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
    writer.writerow(("image", "rank", "number", "name", "probability"))
    for one in result.predictions:
        for rank, best in enumerate(one.classes, 1):
            writer.writerow((one.image, rank, best.number, best.name or "", f"{best.probability:.6g}"))
    return text.getvalue().encode()


def check(given: object) -> None:
    """Refuse what `listed` could not read, before anything is opened.

    Raises:
        UsageError: naming the type.
    """
    for one in given if isinstance(given, (list, tuple)) else (given,):
        if not (isinstance(one, (str, os.PathLike, Image.Image)) or hasattr(one, "read")):
            raise UsageError(
                f"images of type {type(one).__name__}; expected a path, an address, an open file, an image of "
                "Pillow's, or a list of them"
            )


def listed(given: Given | Sequence[Given]) -> list[Named]:
    """Name and reader of each image of a file, folder, tar or Parquet file, address, open file, or list of such.

    Raises:
        DataError: nothing is there, or no images are.
    """
    if isinstance(given, (list, tuple)):
        found = [image for one in given for image in listed(one)]
        if not found:
            raise DataError("images []; expected at least one")
        return found
    if isinstance(given, Image.Image):
        return [(getattr(given, "filename", "") or "an image of Pillow's", lambda: given)]
    if isinstance(given, (str, os.PathLike)):
        return _at(os.fspath(given))
    file = cast("IO[bytes]", given)
    content = file.read(MAX_FILE_BYTES + 1)
    return [(str(getattr(file, "name", "an open file")), lambda: decoding.decoded(_within(content)))]


def _at(place: str) -> list[Named]:
    path = Path(place)
    if place.startswith(("http://", "https://")):
        return [(place, lambda: decoding.decoded(_fetched(place)))]
    if path.is_file() and path.suffix.lower() in (*IMAGE_SUFFIXES, ".avif", ".gif", ".jp2"):
        return [(place, lambda: decoding.decoded(_content(path)))]
    source = sources.open_source(place)
    return [(name, functools.partial(source.read, index)) for index, name in enumerate(source.names)]


def _within(content: bytes) -> bytes:
    refuse_large(len(content))
    return content


def _content(path: Path) -> bytes:
    refuse_large(path.stat().st_size)
    return path.read_bytes()


def _fetched(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "convnext-deploy"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_FILE_BYTES + 1)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise decoding.UnreadableImage(f"the address cannot be read: {reason}") from None
    return _within(content)
