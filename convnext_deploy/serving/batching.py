"""The queue between requests and sessions: what waits becomes batches, and what cannot be served in time is refused."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.batches import Images

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PLANNED = 8  # sizes of batches: a runtime that plans its memory for a size keeps about so many plans
MEMORY = 0.1  # weight of the latest measurement in the running means

Outputs = tuple[NDArray[np.float32], ...]


class Refused(Exception):
    """The queue takes no more work now."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class Closed(Exception):
    """The queue has ended: its model was replaced, or the server stops."""


@dataclass(slots=True, eq=False)
class Job:
    """Images of one request on their way. `deliver` is called once, in another thread, unless the job is cancelled."""

    count: int  # images
    owner: Any = None  # whoever waits for it
    images: Images | None = None
    outputs: Outputs | None = None
    error: Exception | None = None
    over: bool = False  # answered, failed or cancelled
    arrived: float = field(default_factory=time.monotonic)


def batch_sizes(largest: int) -> tuple[int, ...]:
    """The sizes that batches are made of, ascending: at most `PLANNED`, the last one `largest`."""
    smaller = [size for size in SIZES if size < largest]
    keep = PLANNED - 1
    if len(smaller) > keep:  # coarser steps
        smaller = sorted({smaller[round(i * (len(smaller) - 1) / (keep - 1))] for i in range(keep)})
    return (*smaller, largest)


class Queue:
    """Batches for some threads, each of which runs one after another.

    A free thread takes what waits, at most the largest size, at once or after the oldest image has waited `wait_s`.
    Batches have one of a few sizes, so that no image is computed for nothing and no plan for a single use is made.

    Args:
        run: images (N, ...) to outputs (N, ...); called by several threads at once.
        deliver: told of jobs that are over, in a worker's thread.
        largest: images of a batch.
        threads: that call `run`.
        room: images that may be on their way at once.
        limit_s: of the time that an image may take; None: no limit. What would take longer is refused.
        observe: told of each batch: images, seconds of each one's waiting, seconds of running.
    """

    def __init__(
        self,
        run: Callable[[Images], Outputs],
        deliver: Callable[[Sequence[Job]], None],
        *,
        largest: int,
        threads: int,
        wait_s: float = 0.0,
        room: int = 1024,
        limit_s: float | None = None,
        observe: Callable[[int, Sequence[float], float], None] = lambda images, waits, seconds: None,
    ) -> None:
        self._run, self._deliver, self._observe = run, deliver, observe
        self.sizes = batch_sizes(largest)
        self._wait_s, self._room, self._limit_s = wait_s, room, limit_s
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._waiting_images = 0
        self._admitted = 0  # images of jobs that are not over
        self._busy = 0  # threads that run a batch
        self._image_s = 0.0  # running mean: of a thread's time for one image
        self._prepare_s = 0.0  # likewise: of decoding one image, on all cores
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> int:
        """Batches that run at once."""
        return len(self._threads)

    @property
    def waiting(self) -> int:
        """Images that wait for a thread."""
        return self._waiting_images

    @property
    def admitted(self) -> int:
        """Images of requests that are not answered."""
        return self._admitted

    @property
    def has_free_thread(self) -> bool:
        """Whether a batch would be run at once."""
        return self._busy + len(self._waiting) < len(self._threads)

    def admit(self, count: int, owner: Any = None, waited_s: float = 0.0) -> Job:
        """A place for so many images, before they are decoded.

        Args:
            owner: whoever waits for them; None: `run` is called for the job.
            waited_s: that they have waited before they came here.

        Raises:
            Refused: there is no room, or they could not be answered in time.
            Closed: the queue has ended.
        """
        with self._changed:
            if self._closed:
                raise Closed
            expected_s = waited_s + self._expected_s(count)
            if self._admitted and self._admitted + count > self._room:
                raise Refused(f"{self._admitted} images are waiting; at most {self._room} do", expected_s)
            if (self._admitted or waited_s) and self._limit_s is not None and expected_s > self._limit_s:
                what = f"{self._admitted} images are" if self._admitted else "other requests were"
                raise Refused(
                    f"{what} waiting, so the answer would take {expected_s * 1e3:.0f} ms; "
                    f"the limit is {self._limit_s * 1e3:.0f} ms",
                    expected_s - self._limit_s,
                )
            self._admitted += count
        return Job(count, owner)

    def _expected_s(self, count: int) -> float:
        return (self._admitted + count) * (self._image_s / len(self._threads) + self._prepare_s) + self._wait_s

    def put(self, job: Job, images: Images, prepared_s: float = 0.0) -> None:
        """The images of an admitted job, (N, ...). Not to be changed afterwards.

        Args:
            prepared_s: what decoding them took of all cores' time.
        """
        assert len(images) == job.count
        with self._changed:
            self._prepared(job, prepared_s)
            if job.over:
                return
            job.images = images
            self._waiting.append(job)
            self._waiting_images += job.count
            self._changed.notify()

    def _prepared(self, job: Job, seconds: float) -> None:
        if seconds:
            self._prepare_s = _mean(self._prepare_s, seconds / job.count)

    def run(self, job: Job, images: Images, prepared_s: float = 0.0) -> Outputs:
        """Compute an admitted job in the calling thread, beside what the queue's own threads do.

        Raises:
            What the session raises.
        """
        with self._changed:
            self._prepared(job, prepared_s)
            self._busy += 1
        job.images = images
        try:
            self._execute([job])
        finally:
            with self._changed:
                self._busy -= 1
        if job.error is not None:
            raise job.error
        assert job.outputs is not None
        return job.outputs

    def fail(self, job: Job, error: Exception) -> None:
        """The job's images could not be prepared."""
        if self._end(job):
            job.error = bare(error)
            self._deliver([job])

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more. What is being computed is computed to its end."""
        self._end(job)

    def _end(self, job: Job) -> bool:
        """Whether it was not over before."""
        with self._changed:
            if job.over:
                return False
            job.over = True
            self._admitted -= job.count
            if job in self._waiting:
                self._waiting.remove(job)
                self._waiting_images -= job.count
            if self._closed and not self._admitted:
                self._changed.notify_all()
            return True

    def close(self) -> None:
        """End when everything admitted has been answered; new work is refused from now on. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the threads to end after `close`; whether they all have."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while jobs := self._next():
            self._execute(jobs)
            with self._changed:
                self._busy -= 1

    def _execute(self, jobs: list[Job]) -> None:
        started = time.monotonic()
        pieces = [job.images for job in jobs]
        count = sum(job.count for job in jobs)
        error, outputs = None, None
        try:
            outputs = self._run(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))  # type: ignore[arg-type]
        except Exception as failure:  # each request is told; the thread has others to serve
            error = bare(failure)
        ended = time.monotonic()
        self._observe(count, [started - job.arrived for job in jobs], ended - started)
        first = 0
        over = []
        for job in jobs:
            if self._end(job):
                job.error = error
                if outputs is not None:
                    job.outputs = tuple(output[first : first + job.count] for output in outputs)
                over.append(job)
            first += job.count
        with self._changed:
            self._image_s = _mean(self._image_s, (ended - started) / count)
        if over:
            self._deliver(over)

    def _next(self) -> list[Job]:
        """The jobs of the next batch; none when the queue has ended."""
        with self._changed:
            while True:
                if self._waiting:
                    pause = self._waiting[0].arrived + self._wait_s - time.monotonic()
                    if pause <= 0 or self._waiting_images >= self.sizes[-1] or self._closed:
                        return self._taken()
                    self._changed.wait(pause)
                elif self._closed and not self._admitted:
                    return []
                else:
                    self._changed.wait()

    def _taken(self) -> list[Job]:
        """From the oldest on, images of one shape, as many as make a batch of one of the sizes."""
        first = self._waiting.popleft()
        shape = _shape(first)
        jobs, total = [first], first.count
        alike = total
        for job in self._waiting:
            if _shape(job) != shape or alike >= self.sizes[-1]:
                break
            alike += job.count
        most = max((size for size in self.sizes if size <= alike), default=self.sizes[-1])
        while self._waiting and _shape(self._waiting[0]) == shape and total + self._waiting[0].count <= most:
            job = self._waiting.popleft()
            jobs.append(job)
            total += job.count
        self._waiting_images -= total
        self._busy += 1
        if self._waiting:
            self._changed.notify()
        return jobs


def bare(error: Exception) -> Exception:
    """The error without the frames that it came through.

    They refer to the request's images, and by its job to the error itself, so that all of it would stay in memory until
    the garbage collector comes.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _shape(job: Job) -> tuple[int, ...]:
    assert job.images is not None
    return job.images.shape[1:]


def _mean(before: float, latest: float) -> float:
    return latest if not before else before + MEMORY * (latest - before)
