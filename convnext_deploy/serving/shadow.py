"""A candidate beside the model that answers: does it give the same classes, on a share of what clients ask?

Nobody waits for it. An image is copied behind its answer and waits in a small queue, which drops what it has no room
for; the candidate runs in a process of its own. What it says there is compared with what the client was told.
"""

import hashlib
import math
import queue
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..accuracy import sequential
from ..accuracy.sequential import Standing
from ..artifact import manifest
from ..artifact.batches import Images
from ..data import preprocess
from ..errors import CheckFailed, UsageError, WorkerError, counted
from ..records.base import Decision, Problem
from ..records.manifest import Manifest
from ..timing.worker import Worker
from . import candidate
from .batching import Job, Outputs
from .log import Say
from .metrics import PREFIX
from .model import Model

WAITING = 64  # images that wait for the candidate; more are dropped
REMEMBERED = 2**16  # images that were compared, which do not count again


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowOptions:
    """Args:
    path: the candidate's folder.
    share: of the requests; one image of each is compared.
    limit: of the share of images that get another answer.
    workers: processes of the server, one of which compares; it takes more of its own requests then.
    """

    path: Path
    share: float = 0.1
    limit: float = 0.01
    workers: int = 1

    def __post_init__(self) -> None:
        for name, value, most in (("share", self.share, 1.0), ("limit", self.limit, 0.5)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise UsageError(f"shadow_{name} {value!r}; expected a share above 0 and at most {most:g}")

    @property
    def own_share(self) -> float:
        """The share of the requests that reach the process that compares."""
        return min(1.0, self.share * self.workers)


class Shadow:
    """A candidate's process, and what is known of it. Ends when it is decided.

    Args:
        baseline: what answers.
        say: told of the decision.

    Raises:
        UsageError, ArtifactError: it takes other inputs than the baseline, has other classes, or cannot be opened.
        CheckFailed: it computes wrong outputs here.
    """

    def __init__(self, baseline: Model, options: ShadowOptions, *, trust: bool = False, say: Say) -> None:
        self.options, self.baseline = options, baseline
        artifact = manifest.verified(options.path)
        self.sha256, self._manifest = artifact.sha256, artifact.manifest
        _refuse_unlike(baseline, artifact.manifest, options.path)
        self._problem = baseline.problem
        self._say, self._deadline_s = say, baseline.options.deadline_ms / 1e3
        self._arguments: dict[str, Any] = {
            "path": str(options.path), "device": baseline.options.device, "trust": trust
        }  # fmt: skip
        self._worker = Worker(f"the candidate {options.path}")
        try:
            self._call(candidate.opened)
        except WorkerError as error:
            self._worker.close()
            raise CheckFailed(str(error)) from None
        self._guard = threading.Lock()  # of what follows
        self._images = self._differed = self._dropped = self._repeated = 0
        self._compared: dict[bytes, None] = {}
        self._decision: Decision = "INCONCLUSIVE"
        self._died: str | None = None
        self._over = threading.Event()
        self._queue: queue.Queue[tuple[Images, Outputs] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def look(self, jobs: Sequence[Job]) -> None:
        """Jobs of a batch that were answered: some of them are taken. Never waits."""
        for job in jobs:
            if self._over.is_set():
                return
            if job.images is None or job.outputs is None or random.random() >= self.options.own_share:
                continue
            place = random.randrange(job.count)
            try:
                self._queue.put_nowait(
                    (
                        job.images[place : place + 1].copy(),  # a view would hold the whole request
                        tuple(output[place : place + 1].copy() for output in job.outputs),
                    )
                )
            except queue.Full:
                with self._guard:
                    self._dropped += 1

    def state(self) -> dict[str, Any]:
        """What is known, for people and programs."""
        with self._guard:
            standing, decision = self._standing(), self._decision
            counts = {"dropped": self._dropped, "repeated": self._repeated, "died": self._died}
        more = standing.more_images if decision == "INCONCLUSIVE" else 0
        return {
            "baseline": self.baseline.name, "baseline_sha256": self.baseline.sha256,
            "candidate": str(self.options.path), "candidate_sha256": self.sha256,
            "decision": decision, "images": standing.images, "other_answers": standing.hits, "share": standing.share,
            "lower": standing.lower, "upper": standing.upper, "limit": standing.limit, "alpha": standing.alpha,
            "more_images": more,
            "more_requests": None if more is None else math.ceil(more * self.options.workers / self.options.own_share),
            **counts,
        }  # fmt: skip

    def metrics(self) -> Iterable[Metric]:
        state = self.state()
        images = CounterMetricFamily(
            f"{PREFIX}_shadow_images", "Images that the candidate was asked, by what came of it.", labels=["outcome"]
        )
        others = state["other_answers"]
        counts = {"same": state["images"] - others, "other": others}
        for outcome, count in {**counts, "dropped": state["dropped"], "repeated": state["repeated"]}.items():
            images.add_metric([outcome], count)
        yield images
        share = GaugeMetricFamily(
            f"{PREFIX}_shadow_share", "Share of the images that get another answer, and its bounds.", labels=["of"]
        )
        for of in ("share", "lower", "upper", "limit"):
            share.add_metric([of], state[of])
        yield share
        decision = GaugeMetricFamily(f"{PREFIX}_shadow_decision", "1 for what is known.", labels=["decision"])
        for one in ("PASS", "FAIL", "INCONCLUSIVE"):
            decision.add_metric([one], float(state["decision"] == one))
        yield decision

    def close(self) -> None:
        """End the candidate's process. Returns at once."""
        self._end()
        self._worker.kill()

    def _end(self) -> None:
        self._over.set()
        try:
            self._queue.put_nowait(None)  # the thread may wait for an image
        except queue.Full:
            return  # it does not

    def _standing(self) -> Standing:
        return sequential.standing(self._differed, self._images, self.options.limit)

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        name = f"{function.__module__}:{function.__name__}"
        return self._worker.call("call", function=name, arguments={**self._arguments, **arguments})

    def _work(self) -> None:
        try:
            while not self._over.is_set() and (taken := self._queue.get()) is not None:
                self._compare(*taken)
        except WorkerError as error:
            if not self._over.is_set():  # it was not `close` that ended it
                with self._guard:
                    self._died, self._decision = str(error), "FAIL"
                self._say(f"shadow: FAIL, {error}")
        finally:
            self._over.set()
            self._worker.close()

    def _compare(self, images: Images, told: Outputs) -> None:
        digest = hashlib.blake2b(images.tobytes(), digest_size=16).digest()
        if digest in self._compared:
            with self._guard:
                self._repeated += 1
            return
        self._compared[digest] = None
        if len(self._compared) > REMEMBERED:
            del self._compared[next(iter(self._compared))]
        given = self._as_taken(images)
        late = threading.Timer(self._deadline_s, self._worker.kill)
        late.start()
        try:
            answer = self._call(
                candidate.answered, images=given.tobytes(), dtype=str(given.dtype), shape=list(given.shape)
            )
        finally:
            late.cancel()
        logits = answer[0]
        differs = logits is None or _differ(told[0], np.array(logits, np.float32), self._problem)
        with self._guard:
            self._images += 1
            self._differed += differs
            standing = self._standing()
            if standing.decision == "INCONCLUSIVE":
                return
            self._decision = standing.decision
        self._over.set()
        self._say(f"shadow: {_words(standing, self.options)}")

    def _as_taken(self, images: Images) -> Images:
        """The same image in the layout and type that the candidate takes."""
        if images.dtype == np.dtype(self._manifest.export.input):
            return images
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return preprocess.as_input(pixels, self._manifest.preprocessing, "float32")


def _words(standing: Standing, options: ShadowOptions) -> str:
    bound = f"at most {standing.upper:.2%}" if standing.decision == "PASS" else f"at least {standing.lower:.2%}"
    return (
        f"{standing.decision} after {counted(standing.images, 'image')}: {options.path} answers {standing.hits} "
        f"otherwise, {bound} of all "
        f"(limit {options.limit:.2%}; wrong with probability {standing.alpha:g} at most, however often it is looked at)"
    )


def _differ(told: "np.ndarray[Any, Any]", outputs: "np.ndarray[Any, Any]", problem: Problem | None) -> bool:
    """Whether two logits of an image (1, outputs) say another class, or another set of labels."""
    if problem in ("binary", "multi-label"):
        return bool(((told > 0) != (outputs > 0)).any())
    return int(told.argmax()) != int(outputs.argmax())


def _refuse_unlike(baseline: Model, other: Manifest, path: Path) -> None:
    """Refuse a candidate that cannot be compared.

    Raises:
        UsageError: with what differs.
    """
    if not baseline.has_classes:
        raise UsageError(f"--shadow {path}: {baseline.name} has no classes to be compared")
    one = baseline.manifest
    facts: list[tuple[str, Any, Any]] = [
        ("task", one.model.task, other.model.task),
        ("classes", one.model.num_classes, other.model.num_classes),
        ("channels", one.model.in_chans, other.model.in_chans),
        ("image size", one.model.image_size, other.model.image_size),
        ("dynamic image size", one.export.dynamic_image_size, other.export.dynamic_image_size),
        *(
            (name, getattr(one.preprocessing, name), getattr(other.preprocessing, name))
            for name in one.preprocessing.__struct_fields__
            if name != "assumed"
        ),
    ]
    if one.model.problem is not None and other.model.problem is not None:
        facts.append(("problem", one.model.problem, other.model.problem))
    if one.labels is not None and other.labels is not None:
        facts.append(("labels", one.labels, other.labels))
    if one.export.input == "float32" and other.export.input == "uint8":
        facts.append(("input", "float32", "uint8"))
    for name, ours, theirs in facts:
        if ours != theirs:
            said = f" ({ours}, and the candidate {theirs})" if name != "labels" else ""
            raise UsageError(
                f"--shadow {path} has another {name} than {baseline.artifact.path}{said}; both are asked the same "
                "images, and have to give the same classes"
            )
