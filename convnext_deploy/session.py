"""What a loaded artifact can do, whatever runtime is behind it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, UsageError
from .types import STRIDE, Device, LayerTime, Manifest, PrecisionTruth

Images = NDArray[np.float32] | NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a session runs. `threads` None leaves the runtime's own default, which is every core."""

    device: Device = "cpu"
    threads: int | None = None
    cuda_graph: bool = False  # on a GPU: replay a captured CUDA graph


@dataclass(frozen=True, slots=True)
class Profile:
    """What a runtime's own profiler saw: milliseconds of wall time, and the layers, of each step.

    A step is one inference, or the mean of all of them where the profiler gives means only.
    """

    profiler: str
    steps: tuple[tuple[float, tuple[LayerTime, ...]], ...]
    note: str | None = None  # what it cannot see


class Session(ABC):
    """A loaded artifact. Timing calls `bind` once and `step`, `sync` in a loop; evaluation calls `run`.

    Arrays at the boundary are numpy's: images in the layout and type that the manifest's input says, outputs
    float32. A format implements `_bind`, `step`, `fetch`, `precision`, and `sync` where `step` returns early.
    """

    stands_in: str | None = None  # what runs in the artifact's place, where the artifact itself cannot run here

    def __init__(self, manifest: Manifest, options: RunOptions) -> None:
        self.manifest = manifest
        self.options = options

    def bind(self, images: Images) -> None:
        """Place a batch. It may be referenced rather than copied: leave it unchanged until the next `bind`.

        Raises:
            InputError: the batch is not what the artifact takes.
        """
        check_images(images, self.manifest)
        self._bind(np.ascontiguousarray(images))  # type: ignore[arg-type]  # numpy's stub widens the dtype

    @abstractmethod
    def _bind(self, images: Images) -> None: ...

    @abstractmethod
    def step(self) -> None:
        """Start one inference of the bound batch; may return before it is done."""

    @abstractmethod
    def fetch(self) -> tuple[NDArray[np.float32], ...]:
        """Wait for the last step; its outputs, the caller's to keep."""

    def sync(self) -> None:  # noqa: B027 - most runtimes finish inside `step`, so nothing is left to wait for
        """Wait for every step so far."""

    def run(self, images: Images) -> tuple[NDArray[np.float32], ...]:
        """`bind`, `step`, `fetch`."""
        self.bind(images)
        self.step()
        return self.fetch()

    @abstractmethod
    def precision(self) -> PrecisionTruth:
        """Read back in which types the bound batch is computed: in the built graph, and as executed here."""

    def profile(self, steps: int, warmup: int) -> Profile:
        """Run the bound batch that many times under the runtime's own profiler, after `warmup` that do not count.

        Raises:
            UsageError: this runtime has none that could be read.
        """
        raise UsageError(f"{type(self).__name__} has no profiler to read, so it cannot tell where its time goes")


def check_images(images: Images, manifest: Manifest) -> None:
    """Refuse a batch that the artifact does not take, saying what was expected.

    Raises:
        InputError: not an array, or wrong dtype, rank, batch size, channels, image size, or a NaN or infinity.
    """
    model, export = manifest.model, manifest.export
    uint8 = export.input == "uint8"
    layout = "(N, H, W, C)" if uint8 else "(N, C, H, W)"
    if not isinstance(images, np.ndarray):
        raise InputError(f"images are {type(images).__name__}; expected a {export.input} numpy array {layout}")
    if images.dtype != np.dtype(export.input):
        hint = "raw pixels 0..255" if uint8 else "normalized with the manifest's mean and std"
        raise InputError(f"images have dtype {images.dtype}; expected {export.input} ({hint})")
    if images.ndim != 4:
        raise InputError(f"images have shape {images.shape}; expected {layout}")
    n, (h, w, c) = images.shape[0], (images.shape[1:] if uint8 else (*images.shape[2:], images.shape[1]))
    if c != model.in_chans:
        raise InputError(f"images have shape {images.shape}; expected {model.in_chans} channels in {layout}")
    if not export.batch.min <= n <= export.batch.max:
        raise InputError(f"batch {n}; this artifact takes {export.batch.min} to {export.batch.max} images at once")
    if export.dynamic_image_size:
        if h % STRIDE or w % STRIDE or not h or not w:
            raise InputError(f"images are {h}x{w} pixels; expected multiples of {STRIDE}")
    elif (h, w) != model.image_size:
        expected = "x".join(map(str, model.image_size))
        raise InputError(f"images are {h}x{w} pixels; expected {expected} (or export with --dynamic-image-size)")
    if not uint8 and not np.isfinite(images).all():
        bad = int(np.count_nonzero(~np.isfinite(images)))
        raise InputError(f"images hold {bad} NaN or infinite values; expected finite pixels")


def run_in_batches(session: Session, images: Images, size: int | None = None) -> tuple[NDArray[np.float32], ...]:
    """Run any number of images, in batches that the artifact takes; too few are filled up with the last one.

    Args:
        size: images at once; None: what the artifact is tuned for.

    Returns:
        The outputs of exactly `images`, joined along the first axis.
    """
    batch = session.manifest.export.batch
    size = batch.opt if size is None else size
    parts = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        filled = chunk[np.minimum(np.arange(max(len(chunk), batch.min)), len(chunk) - 1)]
        parts.append(tuple(output[: len(chunk)] for output in session.run(filled)))
    return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))
