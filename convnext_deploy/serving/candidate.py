"""The process in which a candidate runs: what it does there, `timing.worker` calls by name.

It has a process of its own, so that neither a crash nor its memory is the server's, and it gives way to everything
else on the machine.
"""

import base64
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..accuracy import canary
from ..artifact import manifest
from ..artifact.session import RunOptions, Session, run_in_batches
from ..errors import ParityError, counted
from ..records.base import Device

NICE = 19  # the least urgent


def opened(path: str, device: Device, trust: bool) -> str:
    """Open the artifact, and say how it compares with its export.

    Raises:
        ParityError: it computes something else here.
    """
    os.nice(NICE)
    session = _session(path, device, trust)
    comparison = canary.compared(session, session.manifest, Path(path))
    if isinstance(comparison, str):
        return comparison
    if comparison.failures:
        raise ParityError(
            f"{path} computes something else here than where it was exported: {'; '.join(comparison.failures)}"
        )
    return f"{counted(comparison.samples, 'output')} compared with the export's {comparison.reference}"


def answered(path: str, device: Device, trust: bool, images: str, dtype: str, shape: list[int]) -> list[Any]:
    """The outputs of images, whose bytes come in base 64; None in the place of an output that is not finite."""
    given = np.frombuffer(base64.b64decode(images), dtype).reshape(shape)
    outputs = run_in_batches(_session(path, device, trust), given)
    return [output.tolist() if np.isfinite(output).all() else None for output in outputs]


@cache
def _session(path: str, device: Device, trust: bool) -> Session:
    options = RunOptions(device=device, threads=1 if device == "cpu" else None)
    return formats.opened(manifest.verified(Path(path)), options, trust)
