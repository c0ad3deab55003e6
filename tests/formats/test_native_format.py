"""The native engine as a format: what an artifact needs to run, what it says of itself, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convnext_deploy import api
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import ArtifactError, MissingPackageError
from convnext_deploy.formats import native
from convnext_deploy.graph.native_network import network_of
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.models.passes import fold_layer_scale, fold_norm_affine
from convnext_deploy.native import library, packed
from convnext_deploy.records.manifest import ModelSpec

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)
SPEC = ModelSpec(architecture="custom", depths=(1, 1, 2, 1), dims=(8, 16, 24, 40), num_classes=10, image_size=(64, 64))


def folded(**changes: object) -> ConvNeXt:
    model = ConvNeXt(ModelSpec(**{name: getattr(SPEC, name) for name in SPEC.__struct_fields__} | changes)).eval()
    fold_norm_affine(model)
    fold_layer_scale(model)
    return model


LOADING = """
import json, sys, time
start = time.perf_counter()
from convnext_deploy import api
import numpy as np
imported = time.perf_counter()
session = api.load(sys.argv[1], threads=1)
loaded = time.perf_counter()
(logits,) = session.run(np.zeros((2, 3, 64, 64), np.float32))
heavy = sorted({"torch", "timm", "onnx", "onnxruntime", "openvino"} & set(sys.modules))
print(json.dumps({"heavy": heavy, "shape": logits.shape, "load_s": loaded - imported}))
"""


@pytest.mark.parametrize(("format", "needed"), [("native", []), ("onnx", ["onnxruntime"]), ("openvino", ["openvino"])])
def test_an_artifact_is_loaded_and_run_by_its_runtime_alone(
    format: str, needed: list[str], artifact_of: Callable[..., Artifact], need_format: Callable[[str], None]
) -> None:
    need_format(format)
    path = artifact_of(format).path
    done = subprocess.run([sys.executable, "-c", LOADING, str(path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["heavy"] == needed
    assert found["shape"] == [2, 10]


def test_outputs_depend_neither_on_the_threads_nor_on_the_batch(artifact_of: Callable[..., Artifact]) -> None:
    path = artifact_of("native").path
    images = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)
    (expected,) = api.load(path, threads=1).run(images)
    session = api.load(path, threads=3)
    assert np.array_equal(session.run(images)[0], expected)
    alone = [session.run(images[i : i + 1])[0] for i in range(4)]
    assert np.array_equal(np.concatenate(alone), expected)


def test_batches_that_alternate_are_planned_once_each_over_one_network(
    artifact_of: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server's do. Opening the file and planning takes longer than a small batch."""
    monkeypatch.setattr(native, "PLANS", 3)
    made: list[tuple[int, ...]] = []
    opened = native.Engine

    def counted(network: native.Network, batch: int, height: int, width: int, threads: int) -> native.Engine:
        made.append((batch,))
        return opened(network, batch, height, width, threads)

    session = api.load(artifact_of("native").path, threads=1)
    monkeypatch.setattr(native, "Engine", counted)
    images = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)
    (expected,) = api.load(artifact_of("native").path, threads=1).run(images)
    made.clear()
    for size in (1, 3, 1, 3, 4, 3, 1):
        np.testing.assert_array_equal(session.run(images[:size])[0], expected[:size])
    assert made == [(1,), (3,), (4,)]  # with that of the batch it is tuned for (2), one more than are kept
    session.run(images[:2])
    assert made[3:] == [(2,)]


@pytest.mark.parametrize(
    "changes", [{}, {"task": "features", "levels": (1, 3)}, {"stem": "overlap_act"}, {"kernel_sizes": (3, 5, 7, 9)}]
)
def test_the_engine_counts_the_same_multiply_accumulates_as_the_formula(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model = folded(**changes)
    packed.write(network_of(model), tmp_path / native.FILE)
    engine = native.Engine(tmp_path / native.FILE, 1, 64, 64, 1)
    counts = multiply_accumulates(model.spec)
    assert sum(engine.multiply_accumulates.values()) == sum(counts.values())
    depthwise = sum(count for name, count in counts.items() if name.endswith("dwconv_norm.conv.weight"))
    shape = engine.input_shape
    assert native.depthwise_macs(model.spec, shape, uint8=False) == depthwise


def test_a_file_that_is_not_the_engines_is_refused_in_one_line(
    artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of("native")
    shutil.copytree(artifact.path, tmp_path / "copy")
    (tmp_path / "copy" / native.FILE).write_bytes(b"ONNX" * 100)
    with pytest.raises(ArtifactError, match=r"model\.cnxt"):
        native.load(tmp_path / "copy", artifact.manifest, native.RunOptions())


def test_without_a_compiler_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingPackageError, match="needs a C\\+\\+20 compiler and none is on PATH; install"):
        api.export("random", variant="atto", format="native", out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_product_that_runs_in_another_type_than_the_rest_of_its_kind_is_not_hidden(
    artifact_of: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last of them was asked."""
    session = api.load(artifact_of("native").path)
    session.run(np.zeros((1, 3, 64, 64), np.float32))
    profile = native.Engine.profile

    def first_in_bf16(engine: native.Engine) -> object:
        parts = list(profile(engine))
        index = next(index for index, part in enumerate(parts) if part.type is not None)
        parts[index] = dataclasses.replace(parts[index], executed="bf16")
        return tuple(parts)

    monkeypatch.setattr(native.Engine, "profile", first_in_bf16)
    assert session.precision().executed == {"unknown": 1.0}
