"""What the public functions take, and that whatever they do not take is refused in one line before any work."""

import contextlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import convnext_deploy
from convnext_deploy import api, arguments
from convnext_deploy.errors import ConvNextDeployError, UsageError
from convnext_deploy.models import checkpoint as weights
from convnext_deploy.records.accuracy import Limits
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.workflows.bench import Plan


class WorkBegins(Exception):
    """The arguments were taken."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: Any, **options: Any) -> None:
        raise WorkBegins

    monkeypatch.setattr(weights, "load", work)
    monkeypatch.setattr("convnext_deploy.api.timings._rows", work)
    monkeypatch.setattr("convnext_deploy.timing.roofline.measure", work)
    for workflow in ("quantize", "half"):
        monkeypatch.setattr(f"convnext_deploy.workflows.{workflow}.open_images", work)


# What each function is called with beside the argument that is tried: right in itself, and of files that are not there.
CALLS: dict[str, dict[str, Any]] = {
    "export": {"weights": "random", "variant": "atto", "format": "eager"},
    "quantize": {"weights": "random", "variant": "atto", "out": "plan.json", "calibration": "random", "target": "onnx"},
    "half": {"weights": "random", "variant": "atto", "out": "plan.json", "data": "nowhere"},
    "load": {"path": "nowhere"},
    "refit": {"path": "nowhere", "weights": "random", "out": "out"},
    "evaluate": {"path": "nowhere", "data": "nowhere"},
    "gate": {"baseline": "nowhere", "candidate": "nowhere", "limits": {"max_drop": 1}},
    "optimize": {"weights": "random", "variant": "atto", "data": "nowhere", "out": "out"},
    "serve": {"artifacts": "nowhere", "port": 0},
    "asgi": {"artifacts": "nowhere"},
    "package": {"path": "nowhere", "target": "kserve", "out": "out", "image": "registry.example/m:1"},
    "predict": {"model": "nowhere", "images": "nowhere.png"},
    "profile": {"path": "nowhere"},
    "roofline": {"variant": "atto", "device": "h100", "precision": "fp16"},
    "report": {"results": ["nowhere.jsonl"], "out": "out.html"},
    "bench": {},
}
PARAMETERS = [(name, parameter) for name in CALLS for parameter in inspect.signature(getattr(api, name)).parameters]
CALLBACKS = ("say", "progress", "watch", "ready")
DATASET = TensorDataset(torch.zeros(2, 3, 32, 32))
OBJECTS: list[Any] = [object(), nn.Linear(2, 2), DATASET, DataLoader(DATASET)]
STRANGE: list[Any] = [
    *OBJECTS, torch.zeros(2), np.zeros(3), b"bytes", 1.5, float("nan"), -1, 0, 10**30, True, [], {}, (), {"a": 1},
    [object()], "", "\0", "nonsense", "x" * 5000, "x/" * 3000, "\ud800", lambda: None, int, None,
]  # fmt: skip


def test_every_public_function_is_tried() -> None:
    assert set(CALLS) == set(api.__all__)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_whatever_is_given_is_taken_or_refused_in_one_line(
    name: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = []
    for value in STRANGE:
        if callable(value) and not inspect.isfunction(value) and parameter in CALLBACKS:
            continue  # what it does is the caller's
        try:
            getattr(api, name)(**(CALLS[name] | {parameter: value}))
        except WorkBegins:
            continue
        except ConvNextDeployError as error:
            lines.append(str(error))
    assert all("\n" not in line and len(line) < 400 for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([p for p in PARAMETERS if p not in (("serve", "host"), ("serve", "admin"))]),  # names are looked up
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    ),
)
def test_no_value_of_any_kind_ends_in_an_error_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: tuple[str, str], value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(WorkBegins, ConvNextDeployError):
        getattr(api, which[0])(**(CALLS[which[0]] | {which[1]: value}))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_an_object_of_another_library_is_refused_by_name(name: str, parameter: str) -> None:
    for value in OBJECTS:
        if callable(value) and parameter in CALLBACKS:
            continue  # a module can be called
        if isinstance(value, nn.Module) and parameter == "weights" and name != "refit":
            continue  # it is a checkpoint, and another architecture is refused when it is read
        with pytest.raises(UsageError, match=rf"^{parameter}\b"):
            getattr(api, name)(**(CALLS[name] | {parameter: value}))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("function", [lambda: None, lambda a, b, c, d, e: None, lambda *, line: None])
@pytest.mark.parametrize(("name", "parameter"), [p for p in PARAMETERS if p[1] in CALLBACKS])
def test_a_function_of_other_arguments_is_refused_before_the_work(
    name: str, parameter: str, function: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were called in the middle of the work, and ended in a TypeError of Python's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"^{parameter} is a function of \(.*; expected a function that takes \d arg"):
        getattr(api, name)(**(CALLS[name] | {parameter: function}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("kind", [int, dict, Decimal])
@pytest.mark.parametrize(("name", "parameter"), [p for p in PARAMETERS if p[1] in CALLBACKS])
def test_a_class_is_no_function_that_is_told_something(name: str, parameter: str, kind: type) -> None:
    """`progress=int` was taken, and ended in a ValueError of Python's in the middle of the work."""
    with pytest.raises(
        UsageError, match=rf"^{parameter} of type builtins\.type; expected a function that takes \d arg"
    ):
        getattr(api, name)(**(CALLS[name] | {parameter: kind}))


@pytest.mark.parametrize("function", [print, [].append, lambda *words: None, lambda line, end="": None])
def test_a_function_that_takes_what_it_is_told_is_taken(function: Any) -> None:
    assert arguments.called("say", function, ("a line",)) is function


def test_what_progress_of_quantize_returns_is_refused_when_it_can_be_told_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    begun: list[str] = []
    calls: list[tuple[Any, str]] = [
        (begun.append, r"^what progress returns None; expected a function that takes 2 arguments: steps done, steps"),
        (lambda what: lambda: None, r"^what progress returns is a function of \(\); expected"),
    ]
    for progress, line in calls:
        with pytest.raises(UsageError, match=line):
            api.quantize(
                checkpoint, out=tmp_path / "p.json", calibration="random", target="onnx", image_size=64, images=32,
                progress=progress,
            )  # fmt: skip
    assert begun
    assert not (tmp_path / "p.json").exists()


# What is taken -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (8, (8, 8, 8)),
        ("8", (8, 8, 8)),
        ((1, 8, 32), (1, 8, 32)),
        ([1, 8, 32], (1, 8, 32)),
        ("1:8:32", (1, 8, 32)),
        (np.int64(4), (4, 4, 4)),
        (BatchRange(min=2, opt=3, max=4), (2, 3, 4)),
    ],
)
def test_batches_are_taken_in_every_plain_form(given: Any, sizes: tuple[int, int, int]) -> None:
    found = arguments.batch_range("batch", given)
    assert (found.min, found.opt, found.max) == sizes


@pytest.mark.parametrize("given", [64, "64", (64, 64), [64, 64], (64,), "64x64", np.int32(64), np.array([64, 64])])
def test_image_sizes_are_taken_in_every_plain_form(given: Any) -> None:
    assert arguments.image_size("image_size", given) == (64, 64)


def test_a_path_and_plain_numbers_are_taken_by_export(checkpoint: Path, tmp_path: Path) -> None:
    given = {"mean": 0.5, "std": 0.25}
    artifact = api.export(checkpoint, format="eager", image_size=64, batch=2, preprocessing=given, out=tmp_path / "a")
    found = artifact.manifest
    assert found.model.image_size == (64, 64)
    assert found.export.batch == BatchRange(min=2, opt=2, max=2)
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "given", [{"max_drop": 0.5}, Limits(max_drop=0.5), "limits.toml", Path("limits.toml")], ids=repr
)
def test_limits_are_taken_as_a_dictionary_a_record_or_a_file(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "limits.toml").write_text("max_drop = 0.5\n")
    assert api.accuracy._limits(given) == Limits(max_drop=0.5)


def test_limits_of_no_text_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^limits: .*surrogates not allowed"):
        api.accuracy._limits({"max_drop": "\ud800"})


def test_one_artifact_of_bench_is_no_sequence_of_letters(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        list(api.bench(str(tmp_path / "nowhere")))
    assert "nowhere" in str(caught.value)
    assert arguments.paths("artifacts", "build/x") == arguments.paths("artifacts", ["build/x"]) == (Path("build/x"),)
    assert arguments.texts("variants", "tiny") == ("tiny",)


def test_one_number_in_a_plan_is_a_plan_of_it() -> None:
    assert Plan(batches=4).checked().batches == (4,)  # type: ignore[arg-type]


def test_a_batch_beyond_what_a_manifest_may_say_is_refused_by_every_function(tmp_path: Path) -> None:
    there = tmp_path / "a"
    calls: list[Callable[[], Any]] = [
        lambda: api.optimize("random", data=tmp_path, out=there, batch=65537),
        lambda: api.evaluate(there, tmp_path, batch=65537),
        lambda: api.predict(there, tmp_path, batch=65537),
        lambda: api.profile(there, batch=65537),
        lambda: api.roofline("tiny", device="a100", batch=65537),
        Plan(batches=(1, 65537)).checked,
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"batch 65_?,?537; expected at most 65536"):
            call()


# Closed sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "u8"}, "input u8; expected one of float32, uint8; did you mean uint8?"),
        ({"task": "classification"}, "task classification; expected one of classify, embed, features, segment, detect"),
        ({"precision": "half"}, "precision half; expected one of fp32, tf32, fp16, bf16; did you mean fp16?"),
        ({"precision": "int8"}, f"precision int8; expected one of fp32, tf32, fp16, bf16; {arguments.EIGHT_BITS}"),
        ({"device": "gpu"}, "device gpu; expected one of cpu, cuda; did you mean cuda?"),
        ({"kernels": "measure"}, "kernels measure; expected one of none, measured, all; did you mean measured?"),
        ({"format": "onxx"}, "unknown format 'onxx'; did you mean onnx?"),
        ({"preprocessing": {"means": 1}}, "preprocessing has 'means'; expected any of mean, std, interpolation"),
        ({"weights": nn.Linear}, "weights of type builtins.type; expected a file, a folder"),
        ({"weights": {"a": 1}}, "weights {'a': 1}; expected a file"),
    ],
)  # fmt: skip
def test_a_word_outside_its_set_is_refused_with_the_set_and_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        api.export(**({"weights": "random", "variant": "atto"} | options))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("word", ["int8", "fp8"])
def test_eight_bits_asked_for_as_a_precision_name_quantize(word: str) -> None:
    with pytest.raises(UsageError, match=r"quantize.*--plan"):
        arguments.one_of("--precision", word, Precision)


# The package ---------------------------------------------------------------------------------------------------------


def test_the_package_has_a_version_and_its_api_as_an_attribute() -> None:
    script = "import convnext_deploy as c; print(c.__version__, c.api.__name__, 'api' in dir(c))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [convnext_deploy.__version__, "convnext_deploy.api", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        convnext_deploy.exprot  # noqa: B018


def test_every_verb_is_a_function_of_the_package() -> None:
    for name in api.__all__:
        assert getattr(convnext_deploy, name) is getattr(api, name)
        assert name in convnext_deploy.__all__


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys; before = set(sys.modules); import convnext_deploy; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {name.split(".")[0].strip("_") for name in found.stdout.split()} <= {
        "convnext_deploy",
        "typing",
        "collections",
    }
