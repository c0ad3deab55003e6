"""The native CPU engine as a whole: networks against PyTorch, on every path of this CPU."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomized
from native_networks import network_of, quantize_

from convnext_deploy import passes
from convnext_deploy.kernels import library, packed
from convnext_deploy.kernels.engine import Engine
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.types import ModelSpec, Preprocessing

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)
ISAS = library.isas() if any(map(shutil.which, library.COMPILERS)) else ()
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SIZE = (64, 96)  # pixels: the last map is 2x3


def folded(spec: ModelSpec, uint8: bool = False) -> ConvNeXt:
    model = randomized(ConvNeXt(spec))
    assert isinstance(model, ConvNeXt)
    passes.fold_norm_affine(model)
    if spec.layer_scale:
        passes.fold_layer_scale(model)
    if spec.grn:
        passes.fold_grn_bias(model)
    if uint8:
        passes.fold_preprocessing(model, IMAGENET)
    return model


def images_for(model: ConvNeXt, batch: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.takes_uint8:
        return torch.randint(0, 256, (batch, *size, model.spec.in_chans), dtype=torch.uint8, generator=generator)
    return torch.randn((batch, model.spec.in_chans, *size), generator=generator)


def outputs_of(model: ConvNeXt, images: torch.Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    """In float64."""
    with torch.no_grad():
        result = copy.deepcopy(model).double()(images if model.takes_uint8 else images.double())
    return tuple(t.numpy() for t in (result if isinstance(result, tuple) else (result,)))


def run(path: Path, images: torch.Tensor, threads: int = 1, isa: str | None = None) -> tuple[np.ndarray[Any, Any], ...]:
    batch, *sides = images.shape
    height, width = sides[:2] if images.dtype == torch.uint8 else sides[1:]
    engine = Engine(path, batch, height, width, threads, isa=isa)
    engine.bind(images.numpy())
    engine.run()
    outputs = tuple(output.copy() for output in engine.outputs)
    engine.close()
    return outputs


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


Written = Callable[..., tuple[ConvNeXt, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(spec, uint8 input, precision) to the folded module and its packed file, made once."""
    made: dict[Any, tuple[ConvNeXt, Path]] = {}

    def write(spec: ModelSpec, uint8: bool = False, precision: str = "fp32") -> tuple[ConvNeXt, Path]:
        key = (spec, uint8, precision)
        if key not in made:
            model = folded(spec, uint8)
            if precision == "int8":
                quantize_(model, images_for(model, 4, spec.image_size, seed=1))
            path = tmp_path_factory.mktemp("packed") / "network.cnxt"
            packed.write(network_of(model, "bf16" if precision == "bf16" else "fp32"), path)
            made[key] = model, path
        return made[key]

    return write


# Every part in which the 31 architectures differ, in the smallest of them that has it.
VARIED = (
    "test_convnext",  # widths that do not fill a block of 16 channels, GELU's tanh form
    "test_convnext3",  # kernels of 7, 5, 5 and 3, SiLU
    "convnext_zepto_rms",  # SimpleNorm
    "convnext_zepto_rms_ols",  # two convolutions in the stem, activation between them
    "convnext_atto",
    "convnext_atto_rms",  # RMSNorm
    "convnext_atto_ols",  # the tiered stem
    "convnextv2_atto",  # GRN
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", VARIED)
def test_float_outputs_are_those_of_pytorch_to_rounding(name: str, isa: str, written: Written) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10))
    images = images_for(model, 2)
    (found,), (expected,) = run(path, images, 2, isa), outputs_of(model, images)
    assert distance(found, expected) < 2e-6
