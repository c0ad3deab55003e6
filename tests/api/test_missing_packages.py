"""The Python interface where a package is not installed: every verb does without it, or names it in one line."""

import importlib
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import light_tests
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import convnext_deploy
from convnext_deploy import api, env
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import ConvNextDeployError, MissingPackageError
from convnext_deploy.workflows.bench import Plan

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "2026-11-23-native.jsonl"
# Each verb, with what makes it import as much as it ever does. `inputs` has the paths.
VERBS = {
    "import": "convnext_deploy.export",
    "export": "c.export(i['weights'], format='onnx', out='onnx', image_size=64, batch=1)",
    "export eager": "c.export(i['weights'], format='eager', out='eager', image_size=64, batch=1)",
    "export openvino": "c.export(i['weights'], format='openvino', out='openvino', image_size=64, batch=1)",
    "load": "c.load(i['onnx'])",
    "load eager": "c.load(i['eager'])",
    "evaluate": "c.evaluate(i['onnx'], i['images'])",
    "evaluate parquet": "c.evaluate(i['onnx'], i['table'], out='evaluation')",
    "evaluate hfds": "c.evaluate(i['onnx'], 'hfds:nobody/nothing', split='test')",
    "serve": "c.serve(i['onnx'], port=0, ready=lambda server: server.stop())",
    "gate": "c.gate(i['onnx'], i['onnx'], data=i['images'], limits={'max_drop': 50})",
    "bench": "list(c.bench(i['onnx'], Plan(seconds=0.1, warmup_limit_s=0.1, batches=1)))",
    "profile": "c.profile(i['onnx'], steps=2)",
    "roofline": "c.roofline('atto', device='h100', precision='fp16')",
    "roofline this": "c.roofline('atto', threads=1)",
    "report": "c.report(i['results'], out='report.html')",
    "refit": "c.refit(i['onnx'], i['weights'], out='refit')",
    "quantize": "c.quantize(i['weights'], calibration=i['images'], target='onnx', out='plan.json', image_size=64)",
    "half": "c.half(i['weights'], data=i['images'], images=32, out='half.json', image_size=64)",
}
# Packages that every import of ours, or PyTorch's own, would bring: a process of its own is without them.
FIRST = ("numpy", "msgspec", "torch")
SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
hidden, i, verbs = sys.argv[1], *map(json.loads, sys.argv[2:])
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == hidden else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import convnext_deploy
import convnext_deploy as c
from convnext_deploy.errors import ConvNextDeployError
def Plan(**fields):
    c.api
    from convnext_deploy.workflows.bench import Plan
    return Plan(**fields)
for name, verb in verbs.items():
    try:
        eval(verb)
        print(json.dumps([name, None, ""]))
    except ConvNextDeployError as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
    except Exception as error:
        print(json.dumps([name, "RAW " + type(error).__name__, str(error)]))
    sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def inputs(
    artifact_of: Callable[..., Artifact], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = []
    for number in range(40):
        file = folder / "images" / f"class{number % 10}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        rows.append({"image": {"bytes": file.read_bytes(), "path": file.name}, "label": number % 10})
    results = folder / "results.jsonl"  # two rows: a page of all draws each machine and model, for seconds
    results.write_text("".join(RESULTS.read_text("utf-8").splitlines(keepends=True)[:2]), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return {
        "weights": str(checkpoint), "onnx": str(artifact_of("onnx").path), "eager": str(artifact_of("eager").path),
        "images": str(folder / "images"), "table": str(folder / "table.parquet"), "results": str(results),
    }  # fmt: skip


def ends_elsewhere(hidden: str, inputs: dict[str, str], verbs: dict[str, str]) -> dict[str, tuple[str | None, str]]:
    """(class of the error, its line) of each verb, None without one, in a process that cannot import `hidden`."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, hidden, json.dumps(inputs), json.dumps(verbs)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ends = {name: (kind, line) for name, kind, line in map(json.loads, done.stdout.splitlines())}
    assert ends.keys() == verbs.keys(), done.stderr
    return ends


def ends_here(hidden: str, inputs: dict[str, str], verbs: dict[str, str]) -> dict[str, tuple[str | None, str]]:
    """The same, in this process."""
    names = {"convnext_deploy": convnext_deploy, "c": convnext_deploy, "i": inputs, "Plan": Plan}
    ends: dict[str, tuple[str | None, str]] = {}
    with light_tests.without(hidden), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, verb in verbs.items():
            ends[name] = (None, "")
            try:
                eval(verb, names)
            except ConvNextDeployError as error:
                ends[name] = (type(error).__name__, str(error))
            except Exception as error:
                ends[name] = (f"RAW {type(error).__name__}", str(error))
    return ends


WITHOUT_TORCH = ("load", "evaluate", "evaluate parquet", "gate", "profile", "report", "roofline", "serve")
ALL = tuple(VERBS)


@pytest.mark.parametrize(
    ("hidden", "used", "named"),
    [
        ("numpy", ALL, set(ALL)),
        ("msgspec", ALL, set(ALL)),
        (
            "torch", tuple(verb for verb in ALL if verb != "evaluate hfds"),
            set(ALL) - {*WITHOUT_TORCH, "import", "bench", "roofline this", "evaluate hfds"},
        ),
        ("onnxruntime", WITHOUT_TORCH, {"load", "evaluate", "evaluate parquet", "gate", "profile", "serve"}),
        ("pyarrow", WITHOUT_TORCH, {"evaluate parquet"}),
        ("scipy", WITHOUT_TORCH, set()),
        ("PIL", WITHOUT_TORCH, set(WITHOUT_TORCH)),
        ("torchvision", WITHOUT_TORCH, set()),
        ("matplotlib", WITHOUT_TORCH, {"report"}),
        ("uvicorn", ("load", "serve"), {"serve"}),
        ("starlette", ("load", "serve"), {"serve"}),
        ("prometheus_client", ("load", "serve"), {"serve"}),
        *(
            pytest.param(package, verbs, named, marks=pytest.mark.slow)  # PyTorch's import, and much of an export
            for package, verbs, named in (
                ("datasets", ("evaluate", "evaluate hfds"), {"evaluate hfds"}),
                ("timm", ("export eager", "load eager", "roofline this", "bench"), None),
                ("onnx", ("export eager", "export", "export openvino", "bench"), {"export", "export openvino"}),
                ("onnxscript", ("export eager", "export", "export openvino"), {"export", "export openvino"}),
                ("openvino", ("export openvino", "bench"), {"export openvino"}),
            )
        ),
    ],
)  # fmt: skip
def test_a_verb_does_without_a_package_or_names_it(
    hidden: str,
    used: tuple[str, ...],
    named: set[str] | None,
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ends = ends_elsewhere if hidden in FIRST else ends_here
    all_ends = ends(hidden, inputs, {name: VERBS[name] for name in used})
    found = {name: end for name, end in all_ends.items() if end[0] is not None}
    if "refit" in found and found["refit"][0] == "UsageError":
        del found["refit"]  # it is about TensorRT's engines
    lines = {name: line for name, (kind, line) in found.items()}
    assert {kind for kind, _ in found.values()} <= {"MissingPackageError"}, found
    assert all(line.endswith(env.missing_line(hidden)) and "\n" not in line for line in lines.values()), lines
    assert named is None or set(found) == named


def test_an_installed_package_of_another_version_is_not_called_missing() -> None:
    with pytest.raises(MissingPackageError) as caught, env.missing_named():
        importlib.import_module("numpy.of_another_version")
    line = "the numpy that is installed has no module numpy.of_another_version; run: pip install convnext-deploy"
    assert str(caught.value) == f"{line} --upgrade numpy"


def test_a_module_of_the_caller_is_the_callers_own_matter(inputs: dict[str, str], tmp_path: Path) -> None:
    def progress(done: int, total: int | None, what: str | None = None) -> None:
        importlib.import_module("a_module_of_the_caller")

    with pytest.raises(ModuleNotFoundError, match="a_module_of_the_caller"):
        api.evaluate(inputs["onnx"], inputs["images"], progress=progress)


def test_the_verbs_keep_their_signatures() -> None:
    for name in api.__all__:
        verb = getattr(api, name)
        assert verb.__doc__
        assert verb.__name__ == name
        assert "args" not in inspect.signature(verb).parameters
