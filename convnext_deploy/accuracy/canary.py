"""Export's own comparison, kept in the artifact so that it can be made again on any machine that opens it.

The file contains the reference's outputs on the first bundled images, and the limits that export's verification set. A
machine whose processor, driver or runtime computes something else is found by it before the first answer.
"""

import hashlib
import io
import math
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..artifact import detections, matching, verify
from ..artifact.session import Session, run_in_batches
from ..artifact.verify import Tolerance
from ..data import preprocess
from ..errors import ArtifactError, plain
from ..records.manifest import Manifest, Parity
from .probes import Probe

FILE = "canary.npz"
MOST_BYTES = 2**20  # of outputs; feature maps of one image may be more
FAR = 0.5  # of the least score of a detection: candidates below it are none, whatever is rounded
MOST_IMAGES = verify.RMS_SAMPLES


def recorded(manifest: Manifest, probe: Probe) -> bytes:
    """The file's content.

    Args:
        manifest: with the comparisons that the artifact passed.
        probe: the bundled images, with the outputs of every reference.
    """
    if manifest.model.detection is not None:
        return _of_detector(manifest, probe)
    expected = probe.expected if probe.simulated is None else probe.simulated
    image_bytes = sum(output[0].nbytes for output in expected)
    count = min(len(probe.pixels), MOST_IMAGES, max(1, MOST_BYTES // image_bytes))
    limit = _limit(manifest, probe)
    kept: dict[str, Any] = {f"output{index}": output[:count] for index, output in enumerate(expected)}
    rms = math.nan if limit.rms_error is None or count < verify.RMS_SAMPLES else limit.rms_error
    kept["limit"] = np.array([limit.relative_error, limit.cosine, rms])
    kept["reference"] = np.array("source" if probe.simulated is None else "simulation")
    kept["pixels_sha256"] = np.array(_sha256(probe.pixels[:count]))
    content = io.BytesIO()
    np.savez(content, **kept)
    return content.getvalue()


def _of_detector(manifest: Manifest, probe: Probe) -> bytes:
    """The candidates of one image, without scores and boxes of what is far from being a detection.

    Those scores are one number, whose logit is the root mean square of theirs: the limits follow from it. It is of
    those scores that the limits are taken from, and the boxes of these have an area yet, or they would be left out.
    """
    model = manifest.model
    facts, error = model.detection, verify.TOLERANCES[manifest.export.precision].relative_error
    assert facts is not None
    arrays = [output[:1].copy() for output in probe.expected]
    scores, boxes = arrays[:2] if facts.regions is None else arrays[2:4]
    far = scores < FAR * facts.score_threshold
    judged = far & (matching.candidates_of(probe.expected, 0, model, model.image_size, error).scores > 0)
    if judged.any():
        logits = detections.logits_of(scores[judged].astype(np.float64))
        scores[far] = 1 / (1 + math.exp(float(np.sqrt((logits**2).mean()))))
    if facts.regions is None:
        boxes[far.all(axis=-1)] = 0
    else:
        boxes[judged] = (0, 0, 1, 1)
        boxes[..., 0, :] = 0  # the background
    kept: dict[str, Any] = {f"output{index}": output for index, output in enumerate(arrays)}
    kept["limit"] = np.array([error, math.nan, math.nan])
    kept["reference"] = np.array("source")
    kept["pixels_sha256"] = np.array(_sha256(probe.pixels[:1]))
    content = io.BytesIO()
    np.savez_compressed(content, **kept)
    return content.getvalue()


def _limit(manifest: Manifest, probe: Probe) -> Tolerance:
    """The limit that the artifact was held to; the source's rounding comes on top where that was beside float64."""
    if probe.simulated is not None:
        return verify.simulation_tolerance(
            probe.simulated, probe.expected, manifest.export.precision, probe.simulated_typed
        )
    limit = verify.TOLERANCES[manifest.export.precision]
    rounding = next((one.source_rounding for one in manifest.parity if one.source_rounding is not None), None)
    if rounding is None:
        return limit
    error = min(max(limit.relative_error, verify.SOURCE_ROUNDING * rounding), verify.LOOSEST_FP32) + rounding
    return Tolerance(relative_error=error, cosine=limit.cosine)


def compared(session: Session, manifest: Manifest, folder: Path) -> Parity | str:
    """The artifact's outputs on this machine beside the reference's.

    Returns:
        The comparison, whose `failures` say what is wrong; or in words why there is none.

    Raises:
        ArtifactError: the file is damaged.
    """
    if manifest.splice is not None:
        return "a graph of somebody else keeps no outputs to compare with"
    if not any(file.path == FILE for file in manifest.files):
        return "the artifact keeps no outputs to compare with; export it again"
    try:
        with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as kept:
            expected = tuple(kept[f"output{index}"] for index in range(_arrays(manifest)))
            error, cosine, rms = (float(value) for value in kept["limit"])
            reference, sha256 = str(kept["reference"]), str(kept["pixels_sha256"])
    except (OSError, ValueError, KeyError, BadZipFile) as problem:
        raise ArtifactError(f"{folder / FILE} cannot be read: {plain(problem)}; export the model again") from None
    pixels = preprocess.probe_images(manifest.model.in_chans, manifest.model.image_size, len(expected[0]))
    if _sha256(pixels) != sha256:
        return "Pillow's JPEG decoder gives other pixels here than where the model was exported"
    images = preprocess.as_input(pixels, manifest.preprocessing, manifest.export.input)
    if manifest.model.detection is not None:
        answers = run_in_batches(session, images)
        return matching.compare(answers, expected, manifest.model, manifest.model.image_size, error, "bundled")
    return verify.compare(
        run_in_batches(session, images),
        expected,
        Tolerance(relative_error=error, cosine=cosine, rms_error=None if math.isnan(rms) else rms),
        "bundled",
        manifest.model.task in ("classify", "segment"),
        "simulation" if reference == "simulation" else "source",
    )


def _arrays(manifest: Manifest) -> int:
    """How many the file has: the outputs, or a detector's candidates."""
    facts = manifest.model.detection
    if facts is None:
        return len(manifest.outputs)
    return 2 if facts.regions is None else 8 + bool(facts.mask_side)


def _sha256(pixels: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
