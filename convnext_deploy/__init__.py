"""Deployment toolchain for ConvNeXt: see `convnext_deploy.api` for the functions and `docs/` for the pages."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import api

    __version__: str

__all__ = ["__version__", "api"]


def __getattr__(name: str) -> Any:  # nothing is imported before it is asked for
    if name == "__version__":
        from .env import version

        return version()
    if name == "api":
        import importlib

        return importlib.import_module(".api", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
