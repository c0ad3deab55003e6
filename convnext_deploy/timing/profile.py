"""Where an artifact's time goes: its layers as its runtime's own profiler times them, beside the clock on the wall."""

import datetime
import time
from collections.abc import Callable, Sequence

import numpy as np

from .. import env
from ..arguments import Progress
from ..artifact.batches import Images
from ..artifact.manifest import Artifact
from ..artifact.session import Session
from ..records.timing import LayerKind, LayerTime, ProfileResult

WARMUP = 3  # profiled inferences that are thrown away: a profiled session packs its weights anew


def profile(
    session: Session, artifact: Artifact, images: Images, steps: int, progress: Progress | None = None
) -> ProfileResult:
    """Run one batch `steps` times without and `steps` times with the runtime's profiler.

    Args:
        progress: told (inferences done, inferences in all, what is being done).

    Raises:
        UsageError: this runtime has no profiler that could be read.
        InputError: the artifact does not take these images.
    """
    session.bind(images)
    tell = progress or (lambda done, total, what: None)
    once = WARMUP + steps
    plain_ms = _plain_ms(session, steps, lambda done: tell(done, 2 * once, "timing"))
    tell(once, 2 * once, "profiling")
    record = session.profile(steps, WARMUP)
    wall_ms, layers = typical(record.steps)
    manifest = artifact.manifest
    uint8 = manifest.export.input == "uint8"
    return ProfileResult(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        artifact=artifact.path.name,
        artifact_sha256=artifact.sha256,
        format=manifest.export.format,
        precision=manifest.export.precision,
        eight_bits=manifest.export.eight_bits,
        model=manifest.model.architecture,
        image_size=images.shape[1:3] if uint8 else images.shape[2:],
        batch=len(images),
        threads=session.options.threads or env.usable_cores(),
        device=session.options.device,
        steps=steps,
        profiler=record.profiler,
        layers=layers,
        layers_ms=sum(layer.ms for layer in layers),
        wall_ms=wall_ms,
        plain_ms=plain_ms,
        note=record.note,
        machine=env.machine(),
        versions=env.versions(),
    )


def _plain_ms(session: Session, steps: int, tell: Callable[[int], None]) -> float:
    samples = []
    for done in range(WARMUP + steps):
        tell(done)
        start = time.perf_counter_ns()
        session.step()
        session.sync()
        samples.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.median(samples[WARMUP:]))


def typical(steps: Sequence[tuple[float, tuple[LayerTime, ...]]]) -> tuple[float, tuple[LayerTime, ...]]:
    """Mean wall time and mean layers over the steps in the middle half by wall time; layers slowest first.

    A mean keeps the layers adding up to what they are a part of, and the slowest quarter contains the interruptions.
    """
    ordered = sorted(steps, key=lambda step: step[0])
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    sums: dict[tuple[str, str, LayerKind, str], float] = {}
    for _, layers in middle:
        for layer in layers:
            key = (layer.name, layer.op, layer.kind, layer.type)
            sums[key] = sums.get(key, 0.0) + layer.ms / len(middle)
    rows = [LayerTime(name=n, op=o, kind=k, type=t, ms=ms) for (n, o, k, t), ms in sums.items()]
    return sum(wall for wall, _ in middle) / len(middle), tuple(sorted(rows, key=lambda row: -row.ms))
