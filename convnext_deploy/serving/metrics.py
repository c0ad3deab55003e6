"""What Prometheus reads: requests, batches, queues and answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFIX = "convnext_deploy"


class Metrics:
    """The measurements of one server, in a registry of its own: several may run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": PREFIX}
        self.requests = Counter(
            "requests", "Requests by what they asked for and the status of the answer.", ["path", "status"], **kept
        )
        self.seconds = Histogram(
            "request_seconds", "From the head of a request to its answer.", ["path"], buckets=SECONDS, **kept
        )
        self.refused = Counter("refused", "Requests that were not taken, by the reason.", ["reason"], **kept)
        self.batch = Histogram("batch_images", "Images of a batch.", ["model"], buckets=SIZES, **kept)
        self.run = Histogram("batch_seconds", "Time of running a batch.", ["model"], buckets=SECONDS, **kept)
        self.wait = Histogram(
            "wait_seconds", "From a request's place in the queue to its batch.", ["model"], buckets=SECONDS, **kept
        )
        self.answers = Counter("answers", "Images by the most probable class.", ["model", "number", "name"], **kept)
        self.waiting = Gauge("waiting_images", "Images that wait for a session.", ["model"], **kept)
        self.admitted = Gauge("admitted_images", "Images of requests that are not answered.", ["model"], **kept)
        self.connections = Gauge("connections", "Open connections.", **kept)
        self.ready = Gauge("ready", "1 where requests are taken.", **kept)
        self.model = Gauge(
            "model_info", "1 for each artifact that is served.", ["model", "format", "precision", "sha256"], **kept
        )
        self.reloads = Counter("reloads", "Reloads by their outcome.", ["outcome"], **kept)

    def collect(self, read: Callable[[], Iterable[Metric]]) -> None:
        """From now on ask this as well."""
        self.registry.register(_Collected(read))

    def batches(self, model: str) -> Callable[[int, Sequence[float], float], None]:
        """What a queue tells of each batch."""
        sizes, seconds, waits = self.batch.labels(model), self.run.labels(model), self.wait.labels(model)

        def observe(images: int, waited: Sequence[float], ran_s: float) -> None:
            sizes.observe(images)
            seconds.observe(ran_s)
            for wait in waited:
                waits.observe(wait)

        return observe

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Collected(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()
