"""Where ONNX Runtime's products of codes are wrong, and the package refuses to run them."""

import onnxruntime
import pytest

from convnext_deploy import env
from convnext_deploy.formats.onnx import EXACT_ON_TILES

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

# Python 3.10 has no newer one. `test_saturation.py` has the refusal itself.
needs_exact_products = pytest.mark.skipif(
    VERSION < EXACT_ON_TILES and "amx_int8" in env.cpu_features(),
    reason=f"onnxruntime {onnxruntime.__version__} computes 8-bit products wrongly on CPUs with AMX",
)
