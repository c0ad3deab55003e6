"""Timing of sessions: one bound batch, `step` and `sync` in a loop, competitors interleaved."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from .env import usable_cores
from .session import Images, Session
from .types import Timing

WARMUP_S = 0.5  # per session; long enough for allocators, thread pools and just-in-time code paths
ROUND_S = 0.2  # one session's turn before the next one's


def interleaved(sessions: Mapping[str, Session], images: Mapping[str, Images], seconds: float) -> tuple[Timing, ...]:
    """Latency of several sessions, measured turn by turn so that a change of the machine meets all of them.

    Args:
        sessions: name to session; the order rotates from round to round.
        images: the batch of each session.
        seconds: time to spend on each session after its warm-up.
    """
    for name, session in sessions.items():
        session.bind(images[name])
        _turn(session, WARMUP_S)
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(max(1, round(seconds / ROUND_S))):
        for name in order:
            samples[name] += _turn(sessions[name], ROUND_S)
        order.append(order.pop(0))
    return tuple(_timing(name, samples[name], sessions[name], len(images[name])) for name in sessions)


def _turn(session: Session, seconds: float) -> Sequence[float]:
    """Milliseconds of each step in about that many seconds; at least one step."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        start = time.perf_counter_ns()
        session.step()
        session.sync()
        samples.append((time.perf_counter_ns() - start) / 1e6)
    return samples


def _timing(name: str, samples: Sequence[float], session: Session, batch: int) -> Timing:
    median = float(np.median(samples))
    return Timing(
        artifact=name,
        batch=batch,
        threads=session.options.threads or usable_cores(),
        samples_ms=tuple(samples),
        median_ms=median,
        images_per_s=batch / median * 1e3,
    )
