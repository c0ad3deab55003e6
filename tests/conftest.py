"""What test files share: one checkpoint, and one artifact a format and set of options, built once for all workers."""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import gc
import hashlib
import importlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import collector
import hypothesis
import light_tests
import pytest
import safetensors.torch
import timm
import torch
from references import randomize_
from torch import nn

from convnext_deploy import api, formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import MissingPackageError
from convnext_deploy.records.manifest import BatchRange

# Where the environment variable CI is set, these have to be there: a skip would hide that they do not work.
REQUIRED_FORMATS = {"eager", "onnx", "openvino", "torchscript", "pt2", "aotinductor", "native"}
# GNU readline, which pytest imports, tells child processes of a terminal of 80 columns, and so xdist's workers. Tests
# have none.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
# What a shell without job control starts in the background ignores SIGINT, and so would children that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
CLASSES = 10
BATCH = BatchRange(min=1, opt=2, max=4)


def pytest_collection_finish() -> None:
    # Hypothesis asks at its first test who refers to its generator, and the collector does not tell of what it leaves.
    hypothesis.given(hypothesis.strategies.none())(lambda _: None)()
    collector.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """From its fixtures to their end: what one of them puts in a hidden package's place is there when the test runs."""
    collections = collector.full_collections()
    with light_tests.without(*light_tests.HIDDEN) if light_tests.is_light(item) else contextlib.nullcontext():
        result = yield
    collector.keep_what_stays(collections)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except pytest.skip.Exception as skipped:
        if "halted; None in sys.modules" not in str(skipped):
            raise
        pytest.fail(f"{skipped}: it was hidden; name the test in light_tests.NEED_MORE", pytrace=False)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries complain of what is not released at the end


def lacking(format: str) -> str | None:
    """What this machine lacks to build a format; None where it lacks nothing."""
    try:
        formats.state(formats.get(format))
    except MissingPackageError as error:
        return f"{format}: {error}"
    return None


@pytest.fixture(scope="session")
def need_format() -> Callable[[str], None]:
    """Skips where a format cannot be built, and fails in CI where it has to be."""

    def check(format: str) -> None:
        reason = lacking(format)
        if reason is None:
            return
        if os.environ.get("CI") and format in REQUIRED_FORMATS:
            pytest.fail(f"CI requires {reason}", pytrace=False)
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest, the same in all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def _own_state(shared_folder: Path) -> Iterator[None]:
    """What the tests build is not recorded as built by the user who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(shared_folder / "state"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _onnx_operators_once() -> Iterator[None]:
    """PyTorch makes a table of all ONNX functions for each export, most of a second; here it is copied."""
    made: dict[object, Any] = {}
    export = torch.onnx.export

    @functools.wraps(export)
    def exported(*arguments: Any, **named: Any) -> Any:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        make = registry.from_torchlib

        def copied(opset_version: int) -> Any:
            if opset_version not in made:
                made[opset_version] = make(opset_version)
            table = copy.copy(made[opset_version])
            table.functions = {name: list(functions) for name, functions in table.functions.items()}
            return table

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "from_torchlib", staticmethod(copied))
            return export(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", exported)
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of Hugging Face's hub: an empty one, and no network."""
    import huggingface_hub.constants

    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def timm_reference() -> Callable[..., nn.Module]:
    """(timm's name, further arguments of `create_model`) to timm's own module with random parameters, made once."""
    made: dict[tuple[Any, ...], nn.Module] = {}

    def reference(name: str = "test_convnext", **arguments: Any) -> nn.Module:
        key = (name, *sorted(arguments.items()))
        if key not in made:
            made[key] = randomize_(timm.create_model(name, **({"num_classes": CLASSES} | arguments)))
        return made[key]

    return reference


@pytest.fixture(scope="session")
def checkpoint_of(
    timm_reference: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The same module's state dict as a file."""
    made: dict[tuple[Any, ...], Path] = {}

    def checkpoint(name: str = "test_convnext", **arguments: Any) -> Path:
        key = (name, *sorted(arguments.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / f"{name}.safetensors"
            safetensors.torch.save_file(timm_reference(name, **arguments).state_dict(), made[key])
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[..., Path]) -> Path:
    """A small one, of `test_convnext` with 10 classes."""
    return checkpoint_of()


@pytest.fixture(scope="session")
def artifact_of(
    checkpoint_of: Callable[..., Path], need_format: Callable[[str], None], shared_folder: Path
) -> Callable[..., Artifact]:
    """(format, options of `api.export`) to an artifact, built once a run of pytest: leave its files as they are.

    `source` are the arguments of `checkpoint_of`. Unless the options say otherwise: `test_convnext`, 64x64 pixels,
    batch 1 to 4.
    """
    made: dict[str, Artifact] = {}

    def artifact(format: str, source: dict[str, Any] | None = None, **options: Any) -> Artifact:
        need_format(format)
        key = repr((format, source, sorted(options.items())))
        if key not in made:
            folder = shared_folder / "artifacts" / hashlib.sha256(key.encode()).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:  # another worker may be building the same one
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (folder / format).exists():
                    sizes: dict[str, Any] = {"image_size": (64, 64), "batch": BATCH}
                    weights = str(checkpoint_of(**(source or {})))
                    api.export(weights, format=format, out=folder / format, **sizes | options)
            made[key] = manifest.read(folder / format)
        return made[key]

    return artifact


@pytest.fixture
def replaced_format(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(format, fields of Format) for the length of a test: how a defect gets into `build` or `load`."""

    def replace(format: str, **fields: Any) -> None:
        module = importlib.import_module(f"convnext_deploy.formats.{format}")
        monkeypatch.setattr(module, "FORMAT", dataclasses.replace(module.FORMAT, **fields))

    return replace
