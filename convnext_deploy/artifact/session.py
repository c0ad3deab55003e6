"""What a loaded artifact can do, whatever runtime is behind it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..env import usable_cores
from ..errors import UsageError, counted
from ..records.base import Device
from ..records.manifest import Manifest, PrecisionTruth
from ..records.prediction import PredictResult
from ..records.timing import LayerTime
from .batches import Images, check_images

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a session runs. `threads` None leaves the runtime's own default, which is every core."""

    device: Device = "cpu"
    threads: int | None = None
    cuda_graph: bool = False  # on a GPU: replay a captured CUDA graph


@dataclass(frozen=True, slots=True)
class Profile:
    """What a runtime's own profiler saw: milliseconds of wall time, and the layers, of each step.

    A step is one inference, or the mean of all of them where the profiler reports means only.
    """

    profiler: str
    steps: tuple[tuple[float, tuple[LayerTime, ...]], ...]
    note: str | None = None  # what it cannot see


class Session(ABC):
    """A loaded artifact. Timing calls `bind` once and `step`, `sync` in a loop; evaluation calls `run`.

    `predict` takes image files and names classes; calling the session is `run`. `close`, or the end of a `with` block,
    lets go of what the runtime has allocated.

    Arrays at the boundary are numpy's: images in the layout and type that the manifest's input says, outputs
    float32. A format implements `_bind`, `_step`, `_fetch`, `_precision`, `_unshare`, and `_sync` where `_step`
    returns early.

    Threads: any number of them may call `run` at any time. As many runs go on at once as `at_once` says, each in
    buffers of its own over the one network; others wait for their turn. `bind`, `step`, `sync` and `fetch` work on the
    one bound batch of the session, which belongs to the thread that bound it (or ran) last: another thread gets a
    UsageError. A `run` leaves the batch that another thread has bound as it is. `precision` and `profile` wait for
    runs that are going on, and runs wait for them.
    """

    stands_in: str | None = None  # what runs in the artifact's place, where the artifact itself cannot run here

    def __init__(self, manifest: Manifest, options: RunOptions) -> None:
        self.predictor: Callable[..., PredictResult] | None = None  # `api.predict`, which `load` gives to what it opens
        self.manifest = manifest
        self.options = options
        self._working = threading.RLock()  # held while the bound batch is worked on
        self._owner: threading.Thread | None = None  # of the bound batch
        self._owner_id = 0
        self._running = False  # `run` is at work in the place of the bound batch
        self._keeps = False  # the owner called `bind` and may `step` again: a `run` of others leaves the batch alone
        self._changed = threading.Condition()  # guards what follows; told when a turn ends
        self._waiting = 0  # threads in `run`
        self._spares: list[Session] = []
        self._lent = 0  # spares that run
        self._alone = False  # `precision` or `profile` is at work
        self._closed = False
        self._kept = frozenset(vars(self))  # all but what a format adds, which `close` lets go of

    @property
    def at_once(self) -> int:
        """How many runs go on at once: what the cores allow where each takes `options.threads`; one on a GPU."""
        if self.options.device != "cpu":
            return 1
        return max(1, usable_cores() // (self.options.threads or usable_cores()))

    def __repr__(self) -> str:
        export, images = self.manifest.export, self.manifest.inputs[0]
        sizes = ", ".join(map(str, images.shape))
        given = ", ".join(f"{out.name} ({', '.join(map(str, out.shape))})" for out in self.manifest.outputs)
        what = f"{self.manifest.model.architecture} as {export.format} {export.eight_bits or export.precision}"
        state = ", closed" if self._closed else ""
        return f"<session of {what} on {self.options.device}: {images.dtype} ({sizes}) to {given}{state}>"

    def __reduce__(self) -> NoReturn:
        raise UsageError(f"{self!r} cannot be copied or sent to another process; load its artifact again there")

    def __enter__(self) -> "Self":
        self._refuse_closed()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, images: Images) -> tuple[NDArray[np.float32], ...]:
        """`run`."""
        return self.run(images)

    def predict(self, images: Any, **options: Any) -> PredictResult:
        """The most probable classes of images: `convnext_deploy.predict` of this session, with the same options.

        Raises:
            UsageError: one line, also where another function than `convnext_deploy.load` opened the session.
        """
        self._refuse_closed()
        if self.predictor is None:
            raise UsageError(f"{self!r} was not opened by convnext_deploy.load; call convnext_deploy.predict with it")
        return self.predictor(self, images, **options)

    def close(self) -> None:
        """Let go of the network and its buffers once the runs that are going on are done; later calls are refused.

        To close what is closed does nothing.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()  # who waits for a turn is refused
            self._changed.wait_for(lambda: not self._alone and not self._lent)
            self._spares.clear()
        with self._working:
            for name in set(vars(self)) - self._kept:
                delattr(self, name)

    def bind(self, images: Images) -> None:
        """Place a batch. It may be referenced rather than copied: leave it unchanged until the next `bind`.

        The batch that another thread has bound is given up: that thread's next `step` or `fetch` is refused.

        Raises:
            InputError: the batch is not what the artifact takes.
        """
        check_images(images, self.manifest)
        self._working.acquire()
        try:
            if not self._running:
                self._refuse_closed()
            self._own()
            self._keeps = not self._running
            self._bind(_plain(images))
        finally:
            self._leave()

    def step(self) -> None:
        """Start one inference of the bound batch; may return before it is done.

        Raises:
            UsageError: the batch belongs to another thread.
        """
        self._enter()
        try:
            self._step()
        finally:
            self._leave()

    def fetch(self) -> tuple[NDArray[np.float32], ...]:
        """Wait for the last step; its outputs, the caller's to keep.

        Raises:
            UsageError: the batch belongs to another thread.
        """
        self._enter()
        try:
            return self._fetch()
        finally:
            self._leave()

    def sync(self) -> None:
        """Wait for every step so far.

        Raises:
            UsageError: the batch belongs to another thread.
        """
        self._enter()
        try:
            self._sync()
        finally:
            self._leave()

    def run(self, images: Images) -> tuple[NDArray[np.float32], ...]:
        """`bind`, `step`, `fetch`; from any number of threads.

        Raises:
            InputError: the batch is not what the artifact takes.
        """
        self._refuse_closed()
        if self._working.acquire(blocking=False):
            if self._is_mine():
                return self._run_here(images)
            self._leave()
        check_images(images, self.manifest)
        lane = self._turn()
        if lane is self:
            return self._run_here(images)
        try:
            lane._bind(_plain(images))
            lane._step()
            return lane._fetch()
        finally:
            self._return(lane)

    def precision(self) -> PrecisionTruth:
        """Read back in which types the bound batch is computed: in the built graph, and as executed here.

        Raises:
            UsageError: the batch belongs to another thread.
        """
        with self._by_itself():
            return self._precision()

    def profile(self, steps: int, warmup: int) -> Profile:
        """Run the bound batch that many times under the runtime's own profiler, after `warmup` that do not count.

        Raises:
            UsageError: this runtime has none that could be read, or the batch belongs to another thread.
        """
        with self._by_itself():
            return self._profile(steps, warmup)

    # What a format implements

    @abstractmethod
    def _bind(self, images: Images) -> None: ...

    @abstractmethod
    def _step(self) -> None: ...

    @abstractmethod
    def _fetch(self) -> tuple[NDArray[np.float32], ...]: ...

    def _sync(self) -> None:  # noqa: B027 - most runtimes finish inside `_step`, so nothing is left to wait for
        """Wait for every step so far."""

    @abstractmethod
    def _precision(self) -> PrecisionTruth: ...

    def _profile(self, steps: int, warmup: int) -> Profile:
        raise UsageError(f"{type(self).__name__} has no profiler to read, so it cannot tell where its time goes")

    @abstractmethod
    def _unshare(self) -> None:
        """Called on a shallow copy of a session: replace what two threads cannot use at once; nothing is bound then."""

    # Whose turn it is

    def _own(self) -> None:
        me = threading.get_ident()
        if self._owner_id != me:
            self._owner, self._owner_id = threading.current_thread(), me

    def _is_mine(self) -> bool:
        """Whether the calling thread may replace the bound batch by its own without asking."""
        owner = self._owner
        return not self._keeps or self._owner_id == threading.get_ident() or owner is None or not owner.is_alive()

    def _enter(self) -> None:
        """Start to work on the bound batch; what a thread that has ended left behind is whoever comes first's."""
        self._working.acquire()
        if self._closed and not self._running:  # a run that began before the end goes on
            self._leave()
            self._refuse_closed()
        if self._owner_id != threading.get_ident():
            owner = self._owner
            if owner is not None and owner.is_alive():
                self._leave()
                self._refuse()
            self._own()

    def _refuse(self) -> NoReturn:
        me, owner = threading.current_thread().name, self._owner.name if self._owner else "another"
        raise UsageError(
            f"thread {me!r} has no batch bound in this session, thread {owner!r} bound its own last; call bind in the "
            "same thread, or call run, which any number of threads may"
        )

    def _leave(self) -> None:
        self._working.release()
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def _run_here(self, images: Images) -> tuple[NDArray[np.float32], ...]:
        """In the place of the bound batch, which is entered already."""
        self._running, self._keeps = True, False
        try:
            self.bind(images)
            self.step()
            return self.fetch()
        finally:
            self._running = False
            self._leave()

    def _turn(self) -> "Session":
        """Wait for a place to run in: this session, entered, or a spare."""
        with self._changed:
            self._waiting += 1  # before looking, so that who leaves after the look tells us
            try:
                while (lane := self._lane()) is None:
                    self._changed.wait()
            finally:
                self._waiting -= 1
        return lane

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError(f"{self!r} takes no more calls; open the artifact again with convnext_deploy.load")

    def _lane(self) -> "Session | None":
        self._refuse_closed()
        if self._alone:
            return None
        if self._working.acquire(blocking=False):
            if self._is_mine():
                return self
            self._working.release()
        beside = self.at_once - 1 or int(self._keeps)  # a batch that is kept bound holds nobody up
        if self._lent >= beside:
            return None
        if self._spares:
            spare = self._spares.pop()
        else:
            spare = type(self).__new__(type(self))
            vars(spare).update(vars(self))
            spare._unshare()
        self._lent += 1
        return spare

    def _return(self, spare: "Session") -> None:
        with self._changed:
            self._lent -= 1
            self._spares.append(spare)
            self._changed.notify_all()

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """With no run beside it: spares hold what `precision` and `profile` may load anew, so they are let go."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._lent)
            self._refuse_closed()
            self._alone = True
            self._spares.clear()
        try:
            self._working.acquire()
            try:
                if not self._is_mine():
                    self._refuse()
                self._own()
                yield
            finally:
                self._leave()
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def _plain(images: Images) -> Images:
    """The images, or a copy of those that lie in memory in another way than every runtime takes.

    The bytes of a request are read-only, which OpenVINO refuses, and may begin anywhere.
    """
    return images if images.flags.carray else images.copy(order="C")


def run_in_batches(session: Session, images: Images, size: int | None = None) -> tuple[NDArray[np.float32], ...]:
    """Run any number of images, in batches that the artifact takes; too few are filled up with the last one.

    Args:
        size: images at once; None: what the artifact is tuned for.

    Returns:
        The outputs of exactly `images`, joined along the first axis.

    Raises:
        UsageError: an output has not a row for each image, as those of a graph around a spliced ConvNeXt may have not.
    """
    batch = session.manifest.export.batch
    size = batch.opt if size is None else size
    parts = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        filled = chunk[np.minimum(np.arange(max(len(chunk), batch.min)), len(chunk) - 1)]
        outputs = session.run(filled)
        for index, output in enumerate(outputs):
            if output.shape[:1] != (len(filled),):
                name = session.manifest.outputs[index].name
                raise UsageError(
                    f"the output {name} has the shape {output.shape} for {counted(len(filled), 'image')}, not a "
                    "row for "
                    "each; call `run` of the session that `load` returns, and read it as the graph means it"
                )
        parts.append(tuple(output[: len(chunk)] for output in outputs))
    return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))
