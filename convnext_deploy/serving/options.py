"""How a server serves, and the limits of what it takes."""

import math
from dataclasses import dataclass

from ..arguments import shown
from ..artifact.session import RunOptions
from ..data.decoding import MAX_PIXELS
from ..env import usable_cores
from ..errors import UsageError
from ..records.base import Device
from ..records.manifest import BatchRange

# Of a session, by default; one where an image takes less than a millisecond. One session of more threads answers a
# single request sooner, and about as many of them as several of one thread. More than a few threads wait for one
# another in a small batch.
THREADS = 4
# More than one worker is for small models. On two cores (Zen 5), with clients on the same ones, two of them answered
# 1194 requests/s within 50 ms where one answered 652 (int8, 28 pixels, 0.12 ms an image), and 37 where one answered 41
# (ConvNeXt-T fp32, within 250 ms).
LARGEST_BATCH = 8  # by default: more images at once are hardly faster on a CPU, and the last one waits for all


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a server is told.

    Args:
        workers: processes, which share the cores.
        sessions: batches that run at once; None: the cores by `threads`, and one on a GPU.
        threads: CPU threads of each; None: the cores by `sessions`, or `THREADS`.
        max_batch: images of a batch; None: `LARGEST_BATCH`, or the most that the artifact takes.
        max_wait_ms: that the first image of a batch waits for others.
        slo_ms: the time from a request to its answer, if it is to be kept: a request that would take longer is refused.
        deadline_ms: after which a request is given up, if the client names no time of its own.
        room: images on their way at once; more are refused. Workers have equal parts of it.
        max_body_bytes: of a request, before and after decompression.
        max_pixels: of an image before it is resized.
        body_s: that a client may take to send a request's body.
        idle_s: that a connection may be open without a whole request head.
        drain_s: that requests under way may take at the end.
        token: that every request but health checks has to bring, as `Authorization: Bearer TOKEN`.
    """

    device: Device = "cpu"
    workers: int = 1
    sessions: int | None = None
    threads: int | None = None
    max_batch: int | None = None
    max_wait_ms: float = 0.0
    slo_ms: float | None = None
    deadline_ms: float = 30_000.0
    room: int = 1024
    max_body_bytes: int = 2**25
    max_pixels: int = MAX_PIXELS
    body_s: float = 30.0
    idle_s: float = 15.0
    drain_s: float = 30.0
    token: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "sessions", "threads", "max_batch", "room", "max_body_bytes", "max_pixels"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} {shown(value)}; expected a whole number of at least 1")
        for name in ("slo_ms", "deadline_ms", "body_s", "idle_s", "drain_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"{name} {shown(value)}; expected a number above 0")
        if not (isinstance(self.max_wait_ms, int | float) and 0 <= self.max_wait_ms < math.inf):
            raise UsageError(f"max_wait_ms {shown(self.max_wait_ms)}; expected milliseconds, at least 0")
        if self.slo_ms is not None and self.slo_ms > self.deadline_ms:
            raise UsageError(
                f"slo_ms {self.slo_ms:g} is more than deadline_ms {self.deadline_ms:g}, after which a request is given "
                "up; give less, or a longer deadline"
            )
        if self.slo_ms is not None and self.max_wait_ms >= self.slo_ms:
            raise UsageError(f"max_wait_ms {self.max_wait_ms:g} leaves nothing of slo_ms {self.slo_ms:g}")
        if self.workers > usable_cores():
            raise UsageError(f"workers {self.workers}; there are {usable_cores()} cores here, and one each is the most")
        if self.max_pixels > MAX_PIXELS:
            raise UsageError(f"max_pixels {self.max_pixels}; at most {MAX_PIXELS} are decoded")
        if self.token is not None and (
            not isinstance(self.token, str) or not self.token.isascii() or not self.token.strip() or "\n" in self.token
        ):
            raise UsageError("token is empty or not one line of ASCII; expected something like `openssl rand -hex 32`")

    @property
    def cores(self) -> int:
        """How many cores this process has, of those that the workers share."""
        return max(1, usable_cores() // self.workers)

    @property
    def chooses_threads(self) -> bool:
        """Whether nobody has said how many threads a session has."""
        return self.device == "cpu" and self.threads is None and self.sessions is None

    @property
    def run(self) -> RunOptions:
        """How the session runs."""
        if self.device != "cpu":
            return RunOptions(device=self.device, threads=self.threads)
        cores = self.cores
        threads = self.threads or (max(1, cores // self.sessions) if self.sessions else min(cores, THREADS))
        return RunOptions(device=self.device, threads=threads)

    def largest(self, batch: BatchRange) -> int:
        """Images of a batch.

        Raises:
            UsageError: the artifact takes fewer.
        """
        if self.max_batch is None:
            return max(batch.min, min(LARGEST_BATCH, batch.max))
        if not batch.min <= self.max_batch <= batch.max:
            raise UsageError(
                f"max_batch {self.max_batch}; this artifact takes {batch.min} to {batch.max} images at once"
            )
        return self.max_batch
