"""Kernels compiled in processes before the first step: which, and that a launch then finds them. Without a GPU."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import BuildError
from convnext_deploy.kernels import launch
from convnext_deploy.kernels.use import parts, use_kernels
from convnext_deploy.models import passes, registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.runtimes import torch_weights

triton = pytest.importorskip("triton")

from convnext_deploy.kernels import prebuild as pb  # noqa: E402 - which needs triton

HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "capability", lambda x: HOPPER)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def fused(variant: str, side: int = 224) -> ConvNeXt:
    model = ConvNeXt(registry.spec(variant, image_size=(side, side))).eval().requires_grad_(False).half()
    for fold in (passes.fold_norm_affine, passes.fold_layer_scale, passes.fold_grn_bias):
        fold(model)
    use_kernels(model, parts(model))
    return model


def named(found: Iterable[Any]) -> list[str]:
    return sorted({variant.kernel.partition(":")[2] for variant in found})


def test_the_variants_of_a_model_are_its_kernels_each_once() -> None:
    model = fused("convnext_tiny")
    found: Any = pb.variants(model, torch.empty(256, 3, 224, 224, dtype=torch.float16))
    assert named(found) == ["downsample_kernel", "dwconv_moments_kernel", "expand_kernel", "pool_norm_kernel",
                            "project_kernel", "stem_kernel"]  # fmt: skip
    assert len(found) == 3 + 4 + 4 + 1 + 4 + 1  # a stage's blocks share theirs
    assert found[0].kernel.endswith("dwconv_moments_kernel")  # what takes longest begins
    assert json.loads(json.dumps(pb._plain(found[0])))[0] == found[0].kernel


def test_a_small_batch_and_grn_have_kernels_of_their_own() -> None:
    tiny = pb.variants(fused("convnext_tiny"), torch.empty(1, 3, 224, 224, dtype=torch.float16))
    assert "add_parts_kernel" in named(tiny)
    v2 = pb.variants(fused("convnextv2_atto", 64), torch.empty(2, 3, 64, 64, dtype=torch.float16))
    assert "grn_factor_kernel" in named(v2)


def test_listing_launches_nothing_and_leaves_the_model_as_it_was() -> None:
    model = fused("test_convnext", 64).float()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        before = model(images)
        pb.variants(model, images)
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.slow
def test_a_launch_finds_what_another_process_has_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch is of tensors, and its key in Triton's cache must be the one that was made from types alone."""
    from triton.runtime import driver

    variant: Any = next(
        found
        for found in pb.variants(fused("test_convnext", 64), torch.empty(2, 3, 64, 64, dtype=torch.float16))
        if isinstance(found, pb.Variant) and found.kernel.endswith("pool_norm_kernel")
    )
    said: list[str] = []
    assert pb.prebuild([variant], HOPPER, said.append) == {"cached": 0, "compiled": 1}
    assert said[0] == "compiling 1 kernels in 1 processes; they stay in Triton's cache"
    assert said[1] == "compiled 1 of 1 kernels: pool_norm_kernel"
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
    assert len(files) == 1
    kernel = variant.loaded()
    monkeypatch.setattr(driver, "_active", pb._AbsentGpu(HOPPER))
    monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    tensors = [torch.empty(1000, dtype=getattr(torch, a[6:])) if isinstance(a, str) else a for a in variant.arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
        kernel.warmup(*tensors, grid=(1,), **dict(variant.options))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")} == files
    assert pb.prebuild([variant], HOPPER) == {"cached": 1, "compiled": 0}


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_named_and_costs_no_other(cache: Path) -> None:
    (good,) = (
        found
        for found in pb.variants(fused("test_convnext", 64), torch.empty(2, 3, 64, 64, dtype=torch.float16))
        if isinstance(found, pb.Variant) and found.kernel.endswith("pool_norm_kernel")
    )
    bad = pb.Variant(good.kernel, good.arguments, (*good.options[:-1], ("no_such_option", 1)))
    with pytest.raises(BuildError, match=r"1 of 2 kernels do not compile; first .*pool_norm_kernel: "):
        pb.prebuild([bad, good], HOPPER)
    assert pb.prebuild([good], HOPPER) == {"cached": 1, "compiled": 0}


def test_a_session_compiles_for_a_new_shape_when_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []
    monkeypatch.setattr(torch_weights, "_prebuild", lambda module, images: asked.append(images.shape))
    manifest: Any = SimpleNamespace(export=SimpleNamespace(kernels=("stem",), precision="fp16"))
    session = torch_weights.WeightsSession(torch.nn.Identity(), manifest, RunOptions())
    for batch in (2, 2, 5, 2):
        session._bind(np.zeros((batch, 3, 32, 32), np.float32))
    assert [shape[0] for shape in asked] == [2, 5]
