"""One artifact that is served: its session, its queue, its names, and what turns a file into its input."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import formats
from ..accuracy import canary
from ..accuracy.targets import problem_of
from ..artifact.batches import Images
from ..artifact.manifest import Artifact
from ..artifact.session import Session, run_in_batches
from ..data import decoding, jpeg, preprocess
from ..env import usable_cores
from ..errors import CheckFailed, ParityError, UsageError, counted
from ..records.prediction import ClassProbability, NamesFrom
from ..workflows.predict import class_names, probable
from . import drift
from .batching import Job, Outputs, Queue
from .drift import Drift
from .metrics import Metrics
from .options import ServeOptions

# A request that takes less from its bytes to its outputs is computed where it came in: handing it to other threads and
# back takes a good part of that by itself. Others in the event loop wait that long.
SHORT_S = 2e-3
SHORT_ASPECT = 4  # of its sides: a narrow image grows where its short side is resized to the model's
SHORT_BYTES = 2**17  # of a file, likewise: what is decoded of each pixel is in proportion to them
THREADLESS_S = 1e-3  # an image that takes less gains nothing from a second thread

KINDS = ("JPEG", "PNG", "WEBP")  # of image files; every other decoder is one more that strangers could attack

Watcher = Callable[[Sequence[Job]], None]


class Model:
    """An artifact, opened, checked and warmed up.

    Args:
        artifact: verified.
        name: in addresses.
        say: told how the outputs compare with those of the export.
        deliver: told of jobs that are over, in another thread.

    Raises:
        UsageError: it does not run as the options say.
        CheckFailed: it computes wrong outputs here.
    """

    def __init__(
        self,
        artifact: Artifact,
        name: str,
        options: ServeOptions,
        metrics: Metrics,
        deliver: Callable[[Sequence[Job]], None],
        *,
        labels: Path | None = None,
        trust: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.artifact, self.manifest = name, artifact, artifact.manifest
        self.options, self._cores = options, options.cores
        self.sha256 = artifact.sha256
        facts = self.manifest
        self.labels: tuple[str, ...] | None
        self.names_from: NamesFrom
        classes = facts.model.num_classes if facts.model.task == "classify" else 0
        # One output that nobody has explained may be a logit or a value.
        explained = classes > 1 or (classes == 1 and facts.model.problem is not None)
        goal = problem_of(facts.model, None) if explained else None
        self.problem = None if goal == "segmentation" or goal == "detection" else goal
        self.labels, self.names_from = class_names(facts, labels, self.problem)
        self.has_classes = self.problem not in (None, "regression")
        self._largest = options.largest(facts.export.batch)
        self._max_pixels = options.max_pixels
        self._to_pixels = None
        if facts.model.in_chans in (1, 3):
            self._to_pixels = preprocess.transform(facts.preprocessing, facts.model.image_size, facts.model.in_chans)
        self.session: Session = formats.opened(artifact, options.run, trust)
        self._alone_s = self._image_alone()
        if options.chooses_threads and options.run.threads != 1 and self._alone_s < THREADLESS_S:
            self.session.close()
            self.session = formats.opened(artifact, replace(options.run, threads=1), trust)
            self._alone_s = self._image_alone()
        threads = options.sessions or max(1, self.session.at_once // options.workers)
        if threads > self.session.at_once:
            raise UsageError(
                f"sessions {threads} of {self.session.options.threads or usable_cores()} threads each; at most "
                f"{self.session.at_once} run at once here"
            )
        measured, why = drift.reference_words(self.manifest)
        self.drift = Drift(self.manifest, self.problem) if measured else None
        self._watchers: tuple[Watcher, ...] = ()
        self.watch()
        self._deliver, self._say = deliver, say
        observe = metrics.batches(name)
        self.queue = Queue(
            self._run,
            self._delivered,
            largest=self._largest,
            threads=threads,
            wait_s=options.max_wait_ms / 1e3,
            room=max(1, options.room // options.workers),
            limit_s=None if options.slo_ms is None else options.slo_ms / 1e3,
            observe=observe,
        )
        try:
            self._warm_up(threads)
            self._refuse_limit()
            self._pixel_s = self._decoding_alone()
            self._prove(say)
            say(f"{name}: {why}")
        except BaseException:
            self.queue.close()
            raise

    @property
    def threads(self) -> int:
        """Batches that run at once."""
        return self.queue.threads

    def watch(self, *watchers: Watcher) -> None:
        """Show them, beside the measurement of drift, the jobs of each batch, when these have been answered."""
        self._watchers = watchers if self.drift is None else (self.drift.look, *watchers)

    def _delivered(self, jobs: Sequence[Job]) -> None:
        self._deliver(jobs)
        for watcher in self._watchers:
            try:
                watcher(jobs)
            except Exception as error:  # the answers are given; the thread has others to serve
                self._watchers = tuple(one for one in self._watchers if one is not watcher)
                what = f"{type(error).__name__}: {error}"
                self._say(f"{self.name}: nothing is watched any more by what failed: {' '.join(what.split())}")

    def _run(self, images: Images) -> Outputs:
        if self.manifest.export.batch.min <= len(images) <= self._largest:
            return self.session.run(images)
        return run_in_batches(self.session, images, self._largest)

    def _warm_up(self, threads: int) -> None:
        """Every size of batch, in as many threads as will run: what a runtime plans or compiles at its first call."""
        facts = self.manifest
        height, width = facts.model.image_size
        pixels = np.zeros((self._largest, facts.model.in_chans, height, width), np.uint8)
        images = preprocess.as_input(pixels, facts.preprocessing, facts.export.input)
        together = threading.Barrier(threads)

        def run(_: int) -> bool:
            together.wait()
            return all(
                bool(np.isfinite(output).all()) for size in self.queue.sizes for output in self._run(images[:size])
            )

        with ThreadPoolExecutor(threads) as pool:
            if not all(pool.map(run, range(threads))):
                raise CheckFailed(
                    f"{self.artifact.path} gives outputs that are not finite for black images; export again"
                )

    def _refuse_limit(self) -> None:
        """Refuse a limit that not even one image alone would keep.

        Raises:
            UsageError: with what one takes.
        """
        if self.options.slo_ms is None:
            return
        taken_s = self._image_alone()
        if taken_s * 1e3 > self.options.slo_ms:
            raise UsageError(
                f"slo_ms {self.options.slo_ms:g}: {self.name} takes {taken_s * 1e3:.3g} ms for one image alone "
                "here, so that nothing could be answered in time; give more, or serve a faster artifact"
            )

    def _image_alone(self) -> float:
        """Seconds of one image, of which nobody else is in the way: the least of some runs."""
        facts = self.manifest
        pixels = np.zeros((1, facts.model.in_chans, *facts.model.image_size), np.uint8)
        images = preprocess.as_input(pixels, facts.preprocessing, facts.export.input)
        return _least_s(lambda: self._run(images))

    def _decoding_alone(self) -> float:
        """Seconds for a pixel of a photograph, from its file to the model's input: likewise."""
        to_pixels = self._to_pixels
        if to_pixels is None:
            return 0.0
        content = jpeg.PHOTOGRAPH.read_bytes()
        width, height = jpeg.baseline_sides(content) or (1, 1)
        return _least_s(lambda: self._prepared(content, to_pixels, decoding.MAX_PIXELS)) / (width * height)

    def is_short(self, content: bytes) -> bool:
        """Whether a file of these bytes is computed sooner than others would miss the event loop's thread."""
        if self._to_pixels is None or len(content) > SHORT_BYTES or not self.queue.has_free_thread:
            return False
        sides = jpeg.baseline_sides(content)
        if sides is None or max(sides) > SHORT_ASPECT * min(sides):
            return False
        return sides[0] * sides[1] * self._pixel_s + self._alone_s < SHORT_S

    def are_short(self, images: Images) -> bool:
        """Whether a tensor takes so little time; of other sizes than the model's, in proportion to its pixels."""
        height, width = self.manifest.model.image_size
        if not self.queue.has_free_thread:
            return False
        return images.size * self._alone_s < SHORT_S * self.manifest.model.in_chans * height * width

    def _prove(self, say: Callable[[str], None]) -> None:
        """Make export's own comparison on this machine.

        Raises:
            ParityError: the outputs are others than where the artifact was exported.
        """
        comparison = canary.compared(self.session, self.manifest, self.artifact.path)
        if isinstance(comparison, str):
            say(f"{self.name}: outputs are not compared with the export's: {comparison}")
        elif comparison.failures:
            raise ParityError(
                f"{self.artifact.path} computes something else on this machine than where it was exported: "
                f"{'; '.join(comparison.failures)}; export it here, or take another format"
            )
        else:
            error = comparison.relative_error  # None of classes, of which none differs
            distance = "no class differs" if error is None else f"relative error {error:.2g}"
            count = counted(comparison.samples, "output")
            say(f"{self.name}: {count} compared with the export's {comparison.reference}, {distance}")

    def input_of(self, content: bytes) -> tuple[Images, float]:
        """The model's input (1, ...) from the bytes of an image file, and the seconds that it took.

        Raises:
            UnreadableImage: one line.
            UsageError: the model takes no images.
        """
        if self._to_pixels is None:
            raise UsageError(
                f"{self.name} takes {self.manifest.model.in_chans} channels, which no image file has; send tensors to "
                f"/v2/models/{self.name}/infer"
            )
        started = time.perf_counter()
        images = self._prepared(content, self._to_pixels, self._max_pixels)
        return images, (time.perf_counter() - started) / self._cores

    def _prepared(self, content: bytes, to_pixels: preprocess.ToPixels, most: int) -> Images:
        facts = self.manifest
        image: Image.Image | NDArray[np.uint8] | None = None
        if not facts.preprocessing.exif_orientation:
            image = decoding.photograph(content, most)
        if image is None:
            image = decoding.decoded(content, most, KINDS)
        try:
            pixels = to_pixels(image)
        except decoding.UnreadableImage:
            raise
        except OSError as error:
            raise decoding.UnreadableImage(" ".join(str(error).split())) from error
        return preprocess.as_input(pixels[None], facts.preprocessing, facts.export.input)

    def best(self, outputs: Outputs, top: int) -> tuple[ClassProbability, ...]:
        """The most probable classes of the first image."""
        return probable(outputs[0][0], self.problem, top, self.labels)

    def close(self) -> None:
        """Take no more work; what was taken is answered. Returns at once."""
        self.queue.close()


def _least_s(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
