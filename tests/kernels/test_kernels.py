"""The fused operations: their references, and their Triton kernels in the interpreter and compiled for absent GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convnext_deploy.kernels.dwconv_norm import dwconv_moments, dwconv_norm
from convnext_deploy.kernels.expand import expand, expand_squares
from convnext_deploy.kernels.mlp import mlp
from convnext_deploy.kernels.patches import downsample, pool_norm, stem
from convnext_deploy.kernels.project import grn_factor, project
from convnext_deploy.kernels.quantized import (
    dwconv_norm_quantized,
    expand_quantized,
    expand_squares_quantized,
    project_quantized,
)

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


# Each kernel once, at small widths and in one type of two bytes.
EACH_KERNEL = (
    "(float_images_in_either_layout or strided_input or grn_between or parts_are_added or from_codes"
    " or dwconv_norm_in_codes or test_pool_norm or downsample_equals and float16) and not bfloat16"
)


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(EACH_KERNEL, id="each kernel"),
        pytest.param(f"not ({EACH_KERNEL})", id="the rest", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_float64_in_the_interpreter(selection: str) -> None:
    """Tests of `interpreted_kernels.py`, in one process."""
    pytest.importorskip("triton")
    if not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"):
        pytest.skip("this release of PyTorch wraps no interpreted kernels")
    # Without conftest.py, whose imports take as long as the tests of each kernel.
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-k", selection]
    command = [sys.executable, "-m", "pytest", *options, str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in last
    assert "skipped" not in last


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, HIDDEN = inputs(2, 4, 6, 24), inputs(2, 4, 6, 96)
WIDE, NARROW = inputs(96, 24), inputs(24, 96)
MOMENTS = inputs(2, 4, 6, 1, 2)
CODES, ONE = (8 * X).to(torch.int8), torch.ones(24)
NORMED = ("layernorm", 1e-6, "gelu", MOMENTS, WIDE.sum(1), 32)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (dwconv_norm, (X, inputs(24, 1, 7, 7), inputs(24), "layernorm", 1e-6)),
        (dwconv_moments, (X, inputs(24, 1, 7, 7), inputs(24))),
        (expand, (X, WIDE, inputs(96), *NORMED)),
        (expand_squares, (X, WIDE, inputs(96), *NORMED)),
        (grn_factor, (inputs(2, 3, 96), inputs(96), 1e-6)),
        (project, (HIDDEN, NARROW, inputs(24), X)),
        (project, (HIDDEN, NARROW, inputs(24), X, inputs(2, 96))),
        (mlp, (X, WIDE, inputs(96), "layernorm", 1e-6, "gelu", MOMENTS, 32, NARROW, inputs(24), X.clone())),
        (stem, (inputs(2, 3, 8, 12), inputs(24, 3, 4, 4), *map(inputs, (24, 24, 24)), "layernorm", 1e-6)),
        (downsample, (X, inputs(48, 24, 2, 2), inputs(48), "layernorm", 1e-6)),
        (pool_norm, (X, "layernorm", 1e-6)),
        (dwconv_norm_quantized, (X, inputs(24, 1, 7, 7), inputs(24), "layernorm", 1e-6, ONE, True)),
        (expand_quantized, (CODES, CODES[0, 0], inputs(6), "gelu", inputs(6), inputs(2).abs())),
        (expand_squares_quantized, (CODES, CODES[0, 0], inputs(6), "gelu", inputs(6))),
        (project_quantized, (CODES, CODES[0, 0], inputs(6), inputs(2, 4, 6, 6), inputs(6))),
        (project_quantized, (X, CODES[0, 0], inputs(6), inputs(2, 4, 6, 6), inputs(6), inputs(2, 24), inputs(2).abs())),
    ],
    ids=lambda value: getattr(value, "_name", ""),
)
def test_operations_are_what_pytorch_expects_of_one(operation: Any, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(
        operation, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
