"""One session in a process of its own: a crash, an allocator or a thread pool of one does not touch the next.

Both ends are here. The parent writes one JSON line a request to a pipe and reads one line back, so only one worker
runs at a time; what the child prints goes to a file, whose end explains a crash. A request names a method of `Child`.
"""

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from ..artifact.batches import Images
from ..artifact.session import Session
from ..data.preprocess import as_input, probe_images, transform
from ..env import usable_cores
from ..errors import ConvNextDeployError, WorkerError
from ..processes import end_with, import_path, python
from ..records.base import Record
from ..records.timing import Scope, ServerTrial
from . import conditions, measure, scenarios

BATCHES = 4  # different input batches that the turns rotate among
EXPLANATION = 2000  # characters of a crashed worker's output


class Opened(Record, frozen=True, kw_only=True):
    """What opening a session took; the imports before it are not counted."""

    load_s: float
    threads: int


class Turn(Record, frozen=True, kw_only=True):
    samples_ms: tuple[float, ...]
    images_per_s: float
    yardstick_ms: float


class Ready(Record, frozen=True, kw_only=True):
    first_ms: float  # of the first inference in this setting
    warmup_s: float
    steady: bool
    step_ms: float  # in the last window of the warm-up


class Closing(Record, frozen=True, kw_only=True):
    conditions: Any  # as records.timing.Conditions
    peak_memory_bytes: int
    device_memory_bytes: int | None
    device_ms: float | None


class Worker:
    """The parent's end.

    Args:
        name: what error messages call it.
        imports: modules to import first, outside of what is timed.
    """

    def __init__(self, name: str, imports: Sequence[str] = ()) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        to_child, self._requests = os.pipe()
        self._answers, from_child = os.pipe()
        code = f"from {__name__} import Child; Child({to_child}, {from_child}).serve()"
        environment = {
            **import_path(),
            "PYTHONWARNINGS": "ignore",
            "OPENBLAS_NUM_THREADS": "1",  # numpy's, for `timing.measure.yardstick`; no runtime computes with it
        }
        self._process = subprocess.Popen(
            python(code), pass_fds=(to_child, from_child), env=environment,
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, start_new_session=True,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._reader = os.fdopen(self._answers, "rb")
        self._writer = os.fdopen(self._requests, "wb")
        self._pending = 0
        self.send("prepare", imports=list(imports))

    def send(self, method: str, **arguments: Any) -> None:
        """Start a request; its answer is read by the next `call` or `wait`."""
        with contextlib.suppress(BrokenPipeError):  # it crashed: `wait` says so
            self._writer.write(msgspec.json.encode([method, arguments]) + b"\n")
            self._writer.flush()
        self._pending += 1

    def wait(self) -> Any:
        """The answer to the last request.

        Raises:
            WorkerError: the process crashed, or the request raised an error.
        """
        answer: Any = None
        while self._pending:
            line = self._reader.readline()
            self._pending -= 1
            if not line:
                self._pending = 0
                raise WorkerError(f"{self.name}: the process {self._death()}")
            failed, answer = msgspec.json.decode(line)
            if failed:
                raise WorkerError(f"{self.name}: {answer}")
        return answer

    def call(self, method: str, **arguments: Any) -> Any:
        self.send(method, **arguments)
        return self.wait()

    def _death(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._said.seek(0)
        lines = self._said.read()[-EXPLANATION:].decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1]}" if lines else how

    def kill(self) -> None:
        """End the process and all it has started; who waits for its answer gets a WorkerError."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and free what belongs to it."""
        self.kill()
        self._process.wait()
        for stream in (self._reader, self._said):
            stream.close()
        with contextlib.suppress(BrokenPipeError):
            self._writer.close()


class Child:
    """The child's end: one session (or several that run side by side), opened, warmed up and timed on request."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests: BinaryIO = os.fdopen(requests, "rb")
        self._answers: BinaryIO = os.fdopen(answers, "wb")
        self._sessions: list[Session] = []
        self._works: list[measure.Work] = []
        self._batch = 0
        self._batches: dict[int, Images] = {}  # a server's, by size
        self._together = False

    def serve(self) -> None:
        """Answer requests until the parent closes its pipe, or is no more. Ctrl-C is the parent's to handle."""
        end_with(self._requests.fileno())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while line := self._requests.readline():
            method, arguments = msgspec.json.decode(line)
            try:
                answer = [False, getattr(self, method)(**arguments)]
            except ConvNextDeployError as error:
                answer = [True, str(error)]
            except Exception as error:  # a runtime's own: it becomes the reason of a row
                answer = [True, f"{type(error).__name__}: {' '.join(str(error).split())[:EXPLANATION]}"]
            self._answers.write(msgspec.json.encode(answer) + b"\n")
            self._answers.flush()

    def prepare(self, imports: list[str]) -> None:
        for name in imports:
            importlib.import_module(name)

    def call(self, function: str, arguments: dict[str, Any]) -> Any:
        """Call "module:function" and return what it returns."""
        return _named(function)(**arguments)

    def open(self, opener: str, arguments: dict[str, Any], streams: int) -> Opened:
        """Open the sessions by "module:function"."""
        start = time.perf_counter()
        self._sessions = [_named(opener)(**arguments) for _ in range(streams)]
        load_s = time.perf_counter() - start
        threads = self._sessions[0].options.threads
        if streams > 1 and "torch" in sys.modules:
            import torch

            torch.set_num_threads(threads or usable_cores())  # sessions side by side must not each set and restore it
        return Opened(load_s=load_s, threads=threads or usable_cores())

    def warm(self, batch: int, scope: Scope, together: bool, limit_s: float) -> Ready:
        """Get ready to time batches of that size: first inference, then warm-up until steady."""
        self._batch, self._together = batch, together
        self._works = [work_of(session, batch, scope) for session in self._sessions]
        start = time.perf_counter()
        for work in self._works:
            work.begin(0)
            work.step(0)
        first_ms = (time.perf_counter() - start) * 1e3
        warm_ups = [measure.warm_up(work, limit_s) for work in self._works]
        self._watch = conditions.Watch(self._sessions[0].options.device)
        return Ready(
            first_ms=first_ms,
            warmup_s=sum(warm.seconds for warm in warm_ups),
            steady=all(warm.steady for warm in warm_ups),
            step_ms=max(warm.step_ms for warm in warm_ups),
        )

    def turn(self, number: int, seconds: float, settle: bool) -> Turn:
        yardstick_ms = measure.yardstick()
        if len(self._works) == 1:
            samples = measure.turn(self._works[0], number, seconds, settle=settle, watch=self._watch)
            steps_per_s = 1e3 * len(samples) / sum(samples)
        else:
            samples, steps_per_s = measure.turn_of_streams(
                self._works, number, seconds, together=self._together, watch=self._watch
            )
        return Turn(samples_ms=tuple(samples), images_per_s=steps_per_s * self._batch, yardstick_ms=yardstick_ms)

    def arrivals(
        self, queries_per_s: float, queries: int, seed: int, sizes: list[int], slo_ms: float, fraction: float
    ) -> ServerTrial:
        """One run of arrivals (`scenarios.trial`); a batch of another size than these is filled up to the next."""
        session, batches = self._sessions[0], self._batches
        for size in sizes:
            if size not in batches:
                batches[size] = input_batches(session, size)[0]

        def run(size: int) -> None:
            session.bind(batches[min(known for known in sizes if known >= size)])
            session.step()
            session.fetch()

        with self._watch:
            return scenarios.trial(
                run, queries_per_s, queries, seed, max_batch=max(sizes), slo_ms=slo_ms, fraction=fraction
            )

    def finish(self) -> Closing:
        """What the process took, over the turns since the last `warm`."""
        cuda = self._sessions[0].options.device == "cuda"
        return Closing(
            conditions=self._watch.conditions(),
            peak_memory_bytes=peak_memory_bytes(),
            device_memory_bytes=conditions.gpu_memory_of_this_process() if cuda else None,
            device_ms=device_median_ms(self._works[0]) if cuda and "torch" in sys.modules else None,
        )


def peak_memory_bytes() -> int:
    """Resident, of this process. Linux's own ru_maxrss would begin with that of the parent which started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _named(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def device_median_ms(work: measure.Work, steps: int = 20) -> float | None:
    """Median of a step by CUDA events on PyTorch's stream; None where the step does not run there (or took no time).

    Never run so far: there was no GPU where it was written.
    """
    import torch

    times = []
    for number in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work.step(number)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times))


# What is timed --------------------------------------------------------------------------------------------------------


def input_batches(session: Session, batch: int) -> list[Images]:
    """Bundled photographs as several different batches that the session takes."""
    model, export = session.manifest.model, session.manifest.export
    pixels = probe_images(model.in_chans, model.image_size, BATCHES * batch)
    rows = np.arange(BATCHES * batch).reshape(BATCHES, batch) % len(pixels)
    return [as_input(pixels[row], session.manifest.preprocessing, export.input) for row in rows]


def work_of(session: Session, batch: int, scope: Scope) -> measure.Work:
    """What one sample is.

    Args:
        scope: "compute": the step on a bound batch. "transfer": from numpy arrays to numpy arrays. "preprocess": from
            decoded images, so with resizing and normalizing. "jpeg": from the bytes of JPEG files. The last three
            rotate among the images from sample to sample.
    """
    if scope == "compute":
        return measure.compute_only(session, input_batches(session, batch))
    if scope == "transfer":
        batches = input_batches(session, batch)
        return measure.Work(lambda _: None, lambda number: _use(session.run(batches[number % len(batches)])))
    from PIL import Image

    manifest = session.manifest
    to_pixels = transform(manifest.preprocessing, manifest.model.image_size, manifest.model.in_chans)
    files = [file.read_bytes() for file in sorted((Path(__file__).parent.parent / "data" / "images").glob("*.jpg"))]
    images = [Image.open(BytesIO(content)) for content in files]
    if scope == "preprocess":
        for image in images:
            image.load()

    def step(number: int) -> None:
        indices = [(number * batch + index) % len(files) for index in range(batch)]
        inputs = [Image.open(BytesIO(files[index])) if scope == "jpeg" else images[index] for index in indices]
        pixels = np.stack([to_pixels(image) for image in inputs])
        _use(session.run(as_input(pixels, manifest.preprocessing, manifest.export.input)))

    return measure.Work(lambda _: None, step)


def _use(outputs: object) -> None:
    """The outputs are the caller's: nothing else happens to them."""
