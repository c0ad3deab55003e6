"""The folder of an unfinished evaluation, `<out>.partial/`, and the files that it becomes."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..artifact.manifest import Artifact, write_file
from ..data import sources
from ..errors import DataError, UsageError, plain
from ..records.accuracy import EvalResult, ScoreResult, is_scored
from ..records.base import MAX_RESULTS_BYTES, Goal, Record, Sha256, content_of
from .prediction_files import SUFFIX, decode
from .predictions import Chunk

IDENTITY_NAME = "identity.json"


class Identity(Record, frozen=True, kw_only=True):
    """What a folder of unfinished predictions belongs to. The batch size is not part of it."""

    artifact_sha256: Sha256
    data_sha256: Sha256
    problem: Goal = "single-label"


def read_any(path: Path) -> EvalResult | ScoreResult:
    """Read the summary of an evaluation.

    Raises:
        DataError: the file cannot be read, or is not one of this version.
    """
    try:
        content = content_of(path, MAX_RESULTS_BYTES)
        kind: type[EvalResult | ScoreResult] = ScoreResult if is_scored(content) else EvalResult
        return msgspec.json.decode(content, type=kind)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {plain(error)}; expected a result of eval") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a result of eval: {plain(error)}") from None


def beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def opened(out: Path, artifact: Artifact, source: sources.ImageSource, problem: Goal, force: bool) -> Path:
    """The folder for unfinished predictions, new or of the same evaluation."""
    if not out.name:
        raise UsageError(f"--out {out} names no file; expected the first part of the result's file names")
    folder, predictions, result = (beside(out, suffix) for suffix in (".partial", SUFFIX, ".json"))
    if force:
        _remove_result(result, predictions, folder)
    for written in (result, predictions):
        # Predictions without a summary, beside a folder, are of a process that was killed between the two.
        if written.exists() and not (written == predictions and folder.is_dir()):
            raise UsageError(f"{written} exists; choose another --out, or replace it with --force")
    identity = Identity(artifact_sha256=artifact.sha256, data_sha256=source.sha256, problem=problem)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            write_file(folder / IDENTITY_NAME, msgspec.json.encode(identity))
            return folder
        existing = msgspec.json.decode(content_of(folder / IDENTITY_NAME), type=Identity)
    except FileNotFoundError:
        raise UsageError(f"{folder} has no unfinished evaluation; remove it or give another --out") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be used: {plain(error)}; choose another --out") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise UsageError(f"{folder / IDENTITY_NAME} is damaged; remove the folder or give another --out") from None
    if existing != identity:
        other = "artifact" if existing.artifact_sha256 != identity.artifact_sha256 else "set of images"
        other = "problem" if existing.problem != problem else other
        raise UsageError(f"{folder} is of another {other}; remove the folder or give another --out")
    return folder


def _remove_result(result: Path, predictions: Path, folder: Path) -> None:
    """Remove what an evaluation wrote, and nothing that it did not write."""
    if result.exists():
        read_any(result)
    if predictions.exists():
        decode(predictions)
    if folder.exists():
        strange = [path for path in folder.iterdir() if path.name != IDENTITY_NAME and path.suffix != SUFFIX]
        if strange or not (folder / IDENTITY_NAME).is_file():
            raise UsageError(f"{folder} has no unfinished evaluation; remove it or give another --out")
        remove(folder)
    for written in (result, predictions):
        written.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove what an evaluation has put there; a folder that somebody else has put more into stays."""
    for path in (folder / IDENTITY_NAME, *folder.glob(f"[0-9]*{SUFFIX}")):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def chunks_of(folder: Path) -> list[Chunk]:
    """What an interrupted evaluation has finished, in the source's order; there may be gaps between."""
    chunks = sorted((decode(path) for path in folder.glob(f"*{SUFFIX}")), key=lambda chunk: chunk.start)
    for one, other in itertools.pairwise(chunks):
        if other.start < one.stop:
            raise UsageError(f"{folder} has image {other.start:,} of the source twice; remove it or give another --out")
    return chunks


def missing(chunks: Sequence[Chunk], images: int) -> list[range]:
    """Which images of a source no chunk has; the chunks in the source's order."""
    ends = [(chunk.start, chunk.stop) for chunk in chunks]
    gaps = (range(stop, start) for (_, stop), (start, _) in itertools.pairwise([(0, 0), *ends, (images, images)]))
    return [gap for gap in gaps if len(gap)]
