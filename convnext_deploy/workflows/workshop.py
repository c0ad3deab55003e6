"""Where the candidates of `optimize` are built, timed and opened: this machine, or another behind the same methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .. import formats
from ..accuracy.inference import Runner
from ..arguments import Progress
from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..artifact.session import RunOptions, Session
from ..artifact.trust import built_here
from ..errors import ArtifactError, WorkerError
from ..models.source import Source
from ..quantization import counting
from ..records.base import Device, InputKind
from ..records.manifest import BatchRange, ExportRequest
from ..records.optimize import Candidate
from ..records.timing import BenchResult
from ..timing.worker import Worker
from . import bench, contenders
from .candidates import Machine
from .contenders import Contender

Job = tuple[Candidate, Path | None]  # what is to be built, and the plan that it is built from


@dataclass(kw_only=True)
class Workshop:
    """This machine. A process of its own builds, so that a compiler that crashes ends one candidate and no more."""

    folder: Path
    source: Source
    input: InputKind
    batch: BatchRange
    device: Device
    threads: int | None
    machine: Machine
    _worker: Worker | None = field(default=None)

    def path(self, row: Candidate) -> Path:
        return self.folder / row.name

    def request(self, row: Candidate) -> ExportRequest:
        return ExportRequest(
            format=row.runtime,
            precision=row.precision,
            input=self.input,
            batch=self.batch,
            device=self.device,
        )

    def kept(self, row: Candidate, plan_sha256: str | None) -> Artifact | None:
        """What an earlier call has built, where every file of it is unchanged."""
        path = self.path(row)
        if not (path / manifest.MANIFEST_NAME).is_file():
            return None
        artifact = manifest.verified(path)
        recorded = artifact.manifest.export.quantization
        ours = not formats.get(row.runtime).runs_code or built_here(artifact.sha256)
        return artifact if ours and (recorded.plan_sha256 if recorded else None) == plan_sha256 else None

    def builds(
        self, jobs: Sequence[Job], begin: Callable[[str, int], None]
    ) -> Iterator[tuple[Candidate, Artifact | str]]:
        """Each job's artifact in `folder`, or why there is none.

        Args:
            begin: told what is being built, and how many candidates at once.
        """
        for row, plan in jobs:
            begin(f"building {row.name}", 1)
            outcome: Artifact | str
            try:
                outcome = self.built(row, plan)
            except WorkerError as error:
                outcome = reason_of(error, row.name)
            except ArtifactError as error:
                outcome = str(error)
            yield row, outcome

    def built(self, row: Candidate, plan: Path | None) -> Artifact:
        """Export it.

        Raises:
            WorkerError: why it cannot be built, or is wrong.
        """
        if self._worker is None:
            self._worker = Worker("building", ("convnext_deploy.workflows.export", "torch"))
        self._worker.name = row.name
        try:
            self._worker.call(
                "call",
                function=f"{__name__}:build",
                arguments={
                    "source": msgspec.to_builtins(self.source),
                    "request": msgspec.to_builtins(self.request(row)),
                    "plan": None if plan is None else str(plan),
                    "kernels": row.kernels,
                    "out": str(self.path(row)),
                },
            )
        except BaseException:
            self.close()  # what a failed build has left in memory goes with it
            raise
        return manifest.read(self.path(row))

    def timings(self, rows: Sequence[Candidate], plan: bench.Plan, progress: Progress) -> Iterator[BenchResult]:
        """What was built, timed beside each other."""
        places = {row.name: self.path(row) for row in rows}
        yield from bench.bench(entries(rows, places, self.device), plan, progress=progress)

    def opened(self, artifact: Artifact) -> Session | Runner:
        """What runs images through one that was built."""
        return formats.opened(artifact, RunOptions(device=self.device, threads=self.threads), True)

    def calibrates(self) -> counting.Runner | None:
        """What runs the images of a calibration; None: this process."""
        return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def entries(rows: Sequence[Candidate], places: Mapping[str, Path], device: Device) -> list[Contender]:
    """Candidates as a benchmark takes them. They were built by a `Workshop`, so they are opened without being asked."""
    contestants = []
    for row in rows:
        graphs = device == "cuda" and formats.get(row.runtime).cuda_graphs
        entry = contenders.of_artifact(places[row.name], device, graphs, trust=True)
        contestants.append(msgspec.structs.replace(entry, label=row.name))
    return contestants


def build(source: dict[str, Any], request: dict[str, Any], plan: str | None, kernels: bool, out: str) -> None:
    """Export one candidate; runs in a worker."""
    from .export import export, plan_for

    asked = msgspec.convert(request, ExportRequest)
    loaded = plan_for(formats.get(asked.format), plan, None)
    export(
        msgspec.convert(source, Source),
        asked,
        plan=loaded,
        kernels="all" if kernels else "none",
        out=Path(out),
        force=True,
    )


def reason_of(error: WorkerError, name: str) -> str:
    """A worker's words without its name in front."""
    return str(error).removeprefix(f"{name}: ")
