"""A model that is in memory already, as the files that every reader of a checkpoint takes."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .. import arguments
from .torchvision_detectors import module_facts

_written: ContextVar[ExitStack | None] = ContextVar("_written", default=None)


@contextmanager
def written() -> Iterator[None]:
    """At the end of this, the outermost of its kind, what `weights` wrote within it is removed."""
    if _written.get() is not None:
        yield
        return
    with ExitStack() as stack:
        token = _written.set(stack)
        try:
            yield
        finally:
            _written.reset(token)


def weights(name: str, value: Any) -> str:
    """Where a checkpoint is; a module or a state dict is written to a folder of the system's temporary files.

    That goes with the end of `written`, or of the process where there is none.

    What a library says beside its module (preprocessing, labels, epsilon) is written as that library itself writes it:
    transformers by `save_pretrained`, timm by `save_for_hf`, and in its form for `features_only`. torchvision's
    detectors say it in their attributes; its classifiers and plain modules say nothing.

    Raises:
        UsageError: it is none of these.
    """
    if hasattr(value, "state_dict") and hasattr(value, "named_modules") and not isinstance(value, type):
        folder = _folder()
        if hasattr(value, "save_pretrained"):
            value.save_pretrained(folder)
            return str(folder)
        facts = getattr(value, "pretrained_cfg", None)
        if isinstance(facts, Mapping) and hasattr(value, "num_classes"):
            from timm.models import save_for_hf

            save_for_hf(value, str(folder), safe_serialization=True)
            return str(folder)
        if isinstance(facts, Mapping):  # of `features_only`, which `save_for_hf` does not take
            config = {"architecture": facts.get("architecture"), "pretrained_cfg": dict(facts)}
            (folder / "config.json").write_text(json.dumps(config, default=str))
            _saved(folder, value.state_dict(), "pytorch_model.bin")
            return str(folder)
        detector = module_facts(value)
        if detector is not None:
            (folder / "config.json").write_text(json.dumps({"detector": detector}))
            _saved(folder, value.state_dict(), "pytorch_model.bin")
            return str(folder)
        return _saved(folder, value.state_dict())
    if isinstance(value, Mapping) and value and all(hasattr(tensor, "untyped_storage") for tensor in value.values()):
        return _saved(_folder(), dict(value))
    return arguments.weights(name, value)


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="convnext-deploy-"))
    stack = _written.get()
    remove = atexit.register if stack is None else stack.callback
    remove(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _saved(folder: Path, state: Mapping[str, Any], name: str = "state_dict.pth") -> str:
    import torch

    path = folder / name
    torch.save(dict(state), path)
    return str(path)
