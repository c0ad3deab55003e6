"""The Python interface: one function a verb. Each reads its arguments in any form and hands them on as records."""

from .accuracy import evaluate, gate
from .artifacts import export, load, refit
from .plans import half, quantize
from .predictions import predict
from .serving import asgi, serve
from .timings import bench, profile, report, roofline

__all__ = [
    "asgi", "bench", "evaluate", "export", "gate", "half", "load", "predict", "profile", "quantize", "refit",
    "report", "roofline", "serve",
]  # fmt: skip
