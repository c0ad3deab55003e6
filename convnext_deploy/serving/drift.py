"""Whether what a model is asked is like what it was calibrated on, for Prometheus."""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

from prometheus_client.core import GaugeMetricFamily, Metric

from ..accuracy.drift import Recent, Shift
from ..data import description
from ..records.base import Problem
from ..records.manifest import Manifest
from ..records.plan import CalibrationRecord
from .batching import Job
from .metrics import PREFIX

PAUSE_S = 0.01  # at least, from one image that is looked at to the next


class Drift:
    """The latest images of one model. One image of a batch is looked at, of a hundred batches a second at most.

    Args:
        problem: what the outputs mean; None, or a regression: nothing is told of classes.
    """

    def __init__(self, manifest: Manifest, problem: Problem | None) -> None:
        record = _record(manifest)
        assert record is not None
        assert record.inputs is not None
        reference = record.inputs
        self._manifest = manifest
        self._has_classes = problem not in (None, "regression") and len(reference.classes) >= 2
        self._recent, self._guard = Recent(reference), Lock()
        self._next = 0.0  # when an image is looked at again

    def look(self, jobs: Sequence[Job]) -> None:
        """Jobs of a batch that were answered; some of so many batches that nobody has to wait for it."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PAUSE_S
        job = random.choice(jobs)
        if job.images is None or job.outputs is None:
            return
        place = random.randrange(job.count)
        images, answer = job.images[place : place + 1], 0
        if self._has_classes:
            answer = int(description.answered(job.outputs[0][place : place + 1])[0])
        mean, std = description.described_input(images, self._manifest.preprocessing, self._manifest.export.input)
        with self._guard:
            self._recent.add(mean[0], std[0], answer)

    def shift(self) -> Shift | None:
        """None for too few images."""
        with self._guard:
            return self._recent.shift()

    @property
    def has_classes(self) -> bool:
        """Whether answers are compared too."""
        return self._has_classes


def metrics(watched: Mapping[str, Drift]) -> Iterable[Metric]:
    """What Prometheus reads of models by name."""
    images = GaugeMetricFamily(f"{PREFIX}_drift_images", "The latest images that are compared.", labels=["model"])
    inputs = GaugeMetricFamily(
        f"{PREFIX}_drift_input",
        "By how many standard deviations between images a channel's mean or std is off the calibration's.",
        labels=["model", "channel", "of"],
    )
    classes = GaugeMetricFamily(
        f"{PREFIX}_drift_classes",
        "Share of the answers that would have to be others to be spread over the classes as the calibration's.",
        labels=["model"],
    )
    chance = GaugeMetricFamily(
        f"{PREFIX}_drift_chance", "What chance alone stays below, 99 times of 100.", labels=["model", "of"]
    )
    for model, drift in watched.items():
        shift = drift.shift()
        if shift is None:
            continue
        images.add_metric([model], shift.images)
        for of, values in (("mean", shift.mean), ("std", shift.std)):
            for channel, value in enumerate(values):
                inputs.add_metric([model, str(channel), of], value)
        chance.add_metric([model, "input"], shift.chance)
        if drift.has_classes and shift.classes is not None and shift.classes_chance is not None:
            classes.add_metric([model], shift.classes)
            chance.add_metric([model, "classes"], shift.classes_chance)
    return images, inputs, classes, chance


def reference_words(manifest: Manifest) -> tuple[bool, str]:
    """Whether there is a reference, and a line that says which, or why there is none."""
    record = _record(manifest)
    if record is not None and record.inputs is not None:
        return True, f"drift is measured from the {record.images} calibration images of {record.data}"
    why = "it was not calibrated"
    if record is not None:
        why = "it was calibrated on noise" if record.random else "its plan is of a version that kept none"
    return False, f"no drift is measured: the artifact has no statistics of images to compare with ({why})"


def _record(manifest: Manifest) -> CalibrationRecord | None:
    return manifest.export.quantization.calibration if manifest.export.quantization else None
