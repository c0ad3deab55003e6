"""The native engine's operations one by one, on every path of this CPU, against float64."""

import shutil
from typing import Any

import hypothesis
import native_kernels as native
import numpy as np
import pytest
from hypothesis import strategies as st
from native_kernels import TYPES, bf16_values, check_product
from scipy.ndimage import correlate
from scipy.special import erf, expit

from convnext_deploy.models import registry
from convnext_deploy.native import library, packed

HAS_COMPILER = any(map(shutil.which, library.COMPILERS))
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="the native engine needs a C++ compiler")
ISAS = library.isas() if HAS_COMPILER else ()
every_isa = pytest.mark.parametrize("isa", ISAS)
WIDTHS = sorted({width for name in registry.VARIANTS for width in registry.spec(name).dims})

ACTIVATIONS: dict[Any, Any] = {
    None: lambda x: x,
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x * expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * expit(x),
}
# An emulated CPU may take seconds to draw an example.
few = hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])


@every_isa
@pytest.mark.parametrize("type", TYPES)
@few
@hypothesis.given(
    rows=st.integers(1, 40), k=st.integers(1, 20), n=st.integers(1, 5), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_a_product_is_that_of_float64(isa: str, type: packed.ProductType, rows: int, k: int, n: int, seed: int) -> None:
    check_product(isa, type, rows, 16 * k, 16 * n, seed)


@every_isa
@pytest.mark.parametrize("type", TYPES)
def test_products_of_every_width_of_the_family_are_right(isa: str, type: packed.ProductType) -> None:
    for width in WIDTHS:
        check_product(isa, type, 3, packed.padded(width), 48)
        check_product(isa, type, 3, packed.padded(4 * width), 16)
        check_product(isa, type, 2, 16, packed.padded(4 * width))


def exact_sums(isa: str, w: Any, a: Any) -> None:
    """Sums are those of int64, rounded once to float32."""
    n = len(w)
    zero, one = np.zeros(n, np.float32), np.ones(n, np.float32)
    found = native.gemm(isa, "int8", a, w, zero, scale=one, offset=np.zeros(n, np.int32))
    np.testing.assert_array_equal(found, (a.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32))


@every_isa
@pytest.mark.parametrize("largest", [16, 32, 33, 64, 65, 127, 128])
def test_products_of_codes_are_exact_whatever_range_the_weights_have(isa: str, largest: int) -> None:
    """Two steps' products are added in 16 bits where no input can make them saturate: up to 32, and often up to 64."""
    random = np.random.default_rng(largest)
    for rows, k, n in ((1, 16, 16), (9, 48, 32), (31, 384, 48)):
        w = random.integers(-largest, min(largest, 127) + 1, (n, k)).astype(np.int8)
        few = random.random(w.shape) < 0.3
        w[few] = np.where(random.random(few.sum()) < 0.5, -largest, min(largest, 127))
        for a in (random.integers(0, 256, (rows, k), np.uint8), np.full((rows, k), 255, np.uint8)):
            exact_sums(isa, w, a)


@every_isa
@pytest.mark.parametrize("total", [127, 128, 129])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("weights", [2, 4])
def test_products_of_codes_are_exact_where_the_last_weight_decides_the_width(
    isa: str, weights: int, sign: int, total: int
) -> None:
    """One lane alone, of 16 outputs and 3 pairs of steps, contains weights that come to the most that 16 bits take."""
    for lane in range(2):
        w = np.zeros((16, 24 + 8), np.int8)
        places = [8 + 2 * lane, 8 + 2 * lane + 1, 8 + 2 * lane + 4, 8 + 2 * lane + 5][:weights]
        share = [total // weights + (i < total % weights) for i in range(weights)]
        w[11, places] = [sign * part for part in share]
        exact_sums(isa, w, np.full((5, 32), 255, np.uint8))


@every_isa
def test_sums_of_the_largest_codes_do_not_saturate(isa: str) -> None:
    a, w = np.full((3, 8192), 255, np.uint8), np.full((16, 8192), -127, np.int8)
    w[1::2] = 127
    one = np.ones(16, np.float32)
    found = native.gemm(isa, "int8", a, w, one * 0, scale=one, offset=np.zeros(16, np.int32))
    np.testing.assert_array_equal(found[:, :2], [[-127 * 255 * 8192, 127 * 255 * 8192]] * 3)


def dense(limit: float, points: int) -> Any:
    """Points between -limit and limit, some at a hundred times that, as rows of 16."""
    x = np.linspace(-limit, limit, points - 16)
    return np.concatenate([x, 100 * limit * np.linspace(-1, 1, 16)]).astype(np.float32).reshape(-1, 16)


IDENTITY, NOTHING = np.eye(16, dtype=np.float32), np.zeros(16, np.float32)


@every_isa
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_activations_are_exact_to_single_precision(isa: str, activation: str | None) -> None:
    x = dense(12, 400_000)
    found = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation=activation)
    expected = ACTIVATIONS[activation](x.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=4e-7, atol=8e-7)


@every_isa
def test_gelu_before_bf16_is_off_by_less_than_bf16_rounds(isa: str) -> None:
    x = dense(8, 400_000)
    found = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation="gelu", exact=False)
    np.testing.assert_allclose(found, ACTIVATIONS["gelu"](x.astype(np.float64)), rtol=2e-6, atol=8.3e-5)


@every_isa
@pytest.mark.parametrize("step", [0.002, 16 * 5.8e-4, 0.05])
def test_gelu_before_codes_is_off_by_less_than_a_sixteenth_of_a_step(isa: str, step: float) -> None:
    x = dense(230 * step, 200_000)
    codes = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation="gelu", out="int8", step=step, zero_point=9)
    expected = np.clip(ACTIVATIONS["gelu"](x.astype(np.float64)) / np.float32(step) + 9, 0, 255)
    assert np.abs(codes - expected).max() <= 0.5 + 1 / 16


@every_isa
def test_gelu_of_the_largest_numbers_is_themselves_or_nothing(isa: str) -> None:
    """Where it is computed in pieces, their numbers are the first and the last."""
    largest = np.float32(3e38)
    x = np.concatenate([np.diag(np.full(16, sign * largest)) for sign in (1, -1)]).astype(np.float32)
    near = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation="gelu", exact=False)
    np.testing.assert_allclose(near, np.maximum(x, 0), rtol=2e-6, atol=8.3e-5)
    codes = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation="gelu", out="int8", step=0.05, zero_point=9)
    np.testing.assert_array_equal(codes, np.where(x > 0, 255, 9))


@every_isa
@pytest.mark.parametrize("out", ["bf16", "int8"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", None])
def test_every_activation_is_rounded_to_what_follows(isa: str, activation: str | None, out: Any) -> None:
    x = dense(6, 20_000)
    found = native.gemm(isa, "fp32", x, IDENTITY, NOTHING, activation=activation, out=out, step=0.05, zero_point=9)
    expected = ACTIVATIONS[activation](x.astype(np.float64))
    if out == "bf16":
        np.testing.assert_allclose(bf16_values(found), expected, rtol=2**-8, atol=1e-4)
    else:
        assert np.abs(found - np.clip(expected / np.float32(0.05) + 9, 0, 255)).max() <= 0.501


@every_isa
def test_codes_are_rounded_half_to_even_and_saturated(isa: str) -> None:
    x = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 300, -300, 1e30, -1e30, np.inf, -np.inf, 254.5, 255.5, 0, 3.49, 7], np.float32
    )
    for zero_point in (0, 3, 128, 255):
        found = native.normalize(isa, None, x[None], out="int8", zero_point=zero_point)[0]
        np.testing.assert_array_equal(found, np.clip(np.rint(x) + zero_point, 0, 255).astype(np.uint8))


@every_isa
def test_a_shift_is_subtracted_before_rounding(isa: str) -> None:
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 32)
    found = native.normalize(isa, None, x, out="int8", step=0.03, shift=0.7, zero_point=120)
    expected = np.clip(np.rint((x.astype(np.float64) - np.float32(0.7)) / np.float32(0.03)) + 120, 0, 255)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.05  # products of rounded reciprocals, at ties


@every_isa
def test_bf16_is_rounded_half_to_even(isa: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 16_000, np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = np.where(np.abs(x) > 1e-30, x, np.float32(1.00390625)).astype(
        np.float32
    )  # a tie for denormals, which are flushed
    found = native.normalize(isa, None, x[None], out="bf16")[0]
    finite = ~np.isnan(x)
    np.testing.assert_array_equal(found[finite], packed.bf16_bits(x)[finite])
    assert np.isnan(bf16_values(found[~finite])).all()


def normalized(norm: str, x: Any, eps: float) -> Any:
    x = x.astype(np.float64)
    if norm == "layernorm":
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    if norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
    return x / np.sqrt(x.var(1, ddof=1, keepdims=True) + eps)


@every_isa
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplenorm"])
@few
@hypothesis.given(
    channels=st.integers(2, 100) | st.sampled_from(WIDTHS), rows=st.integers(1, 5), mean=st.floats(-8, 8),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5]), affine=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_norms_are_those_of_float64(
    isa: str, norm: str, channels: int, rows: int, mean: float, eps: float, affine: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = (random.normal(size=(rows, channels)) + mean).astype(np.float32)
    weight, bias = (random.normal(size=channels).astype(np.float32) if affine else None for _ in range(2))
    found = native.normalize(isa, norm, x, eps=eps, weight=weight, bias=bias)[:, :channels]
    expected = normalized(norm, x, eps)
    if affine:
        expected = expected * weight + bias
    # The mean of float32 numbers near 8 is rounded by 5e-7; two channels may differ by little more than that.
    spread = 1 if norm == "rmsnorm" else x.astype(np.float64).std(1).min() / (1 + abs(mean))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 / min(1, max(spread, 1e-3)))


@every_isa
@pytest.mark.parametrize("out", TYPES)
@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm", "simplenorm"])
def test_a_row_does_not_depend_on_how_many_are_computed_together(
    isa: str, norm: str | None, affine: tuple[str, ...], out: packed.ProductType
) -> None:
    """Four rows at once go through another function than one: both have to round as often."""
    random = np.random.default_rng(0)
    for channels in (16, 24, 40):
        row = random.normal(size=channels).astype(np.float32)
        given = {name: random.normal(size=channels).astype(np.float32) for name in affine}
        found = native.normalize(
            isa, norm, np.tile(row, (5, 1)), out=out, step=0.01, zero_point=99, weight=given.get("weight"),
            bias=given.get("bias"),
        )  # fmt: skip
        np.testing.assert_array_equal(found, found[[0] * 5])


@every_isa
@few
@hypothesis.given(
    images=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 20),
    channels=st.integers(1, 40), kernel=st.sampled_from([1, 3, 5, 7, 9, 11]), data=st.data(),
)  # fmt: skip
def test_depthwise_convolutions_are_those_of_scipy(
    isa: str, images: int, height: int, width: int, channels: int, kernel: int, data: st.DataObject
) -> None:
    pixels = images * height * width
    first = data.draw(st.integers(0, pixels - 1))
    last = data.draw(st.integers(first + 1, pixels))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = random.normal(size=(images, height, width, channels)).astype(np.float32)
    weight = random.normal(size=(channels, kernel, kernel)).astype(np.float32)
    bias = random.normal(size=channels).astype(np.float32)
    found = native.depthwise(isa, x, weight, bias, first, last)
    expected = np.stack([
        np.stack([correlate(image[..., c].astype(np.float64), weight[c].astype(np.float64), mode="constant")
                  for c in range(channels)], -1)
        for image in x
    ])  # fmt: skip
    np.testing.assert_allclose(found, (expected + bias).reshape(-1, channels)[first:last], rtol=0, atol=4e-5)


@every_isa
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_convolutions_of_every_width_are_right(isa: str, kernel: int) -> None:
    random = np.random.default_rng(kernel)
    for width in WIDTHS:
        x = random.normal(size=(1, 3, 9, width)).astype(np.float32)
        weight = random.normal(size=(width, kernel, kernel)).astype(np.float32)
        found = native.depthwise(isa, x, weight, np.zeros(width, np.float32), 0, 27)
        half = kernel // 2
        padded = np.pad(x[0].astype(np.float64), ((half, half), (half, half), (0, 0)))
        places = [(i, j) for i in range(kernel) for j in range(kernel)]
        products = np.stack([padded[i : i + 3, j : j + 9] * weight[:, i, j] for i, j in places])
        expected = products.sum(0).reshape(27, width)
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-5)
