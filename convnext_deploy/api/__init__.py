"""The Python interface: one function a verb. Each reads its arguments in any form and hands them on as records."""

from .accuracy import evaluate, gate
from .artifacts import export, refit
from .optimization import optimize
from .plans import half, quantize
from .predictions import load, predict
from .serving import asgi, package, serve
from .timings import bench, profile, report, roofline

__all__ = [
    "asgi", "bench", "evaluate", "export", "gate", "half", "load", "optimize", "package", "predict", "profile",
    "quantize", "refit", "report", "roofline", "serve",
]  # fmt: skip
