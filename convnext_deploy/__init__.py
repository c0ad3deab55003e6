"""Deployment toolchain for ConvNeXt: a function a verb, as in `convnext_deploy.export(...)`; see `docs/` for the pages.

The same functions are in `convnext_deploy.api`. Nothing is imported before it is asked for.
"""

TYPE_CHECKING = False  # what type checkers take to be true, without importing `typing`: Ctrl-C is caught the sooner
if TYPE_CHECKING:
    from typing import Any

    from . import api
    from .api import (  # fmt: skip
        asgi,
        bench,
        evaluate,
        export,
        gate,
        half,
        load,
        predict,
        profile,
        quantize,
        refit,
        report,
        roofline,
        serve,
    )

    __version__: str

__all__ = [
    "__version__", "api", "asgi", "bench", "evaluate", "export", "gate", "half", "load", "predict", "profile",
    "quantize", "refit", "report", "roofline", "serve",
]  # fmt: skip


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from .env import version

        return version()
    if name in __all__:
        import importlib

        from .env import missing_named

        with missing_named():
            api = importlib.import_module(".api", __name__)
        return api if name == "api" else getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
