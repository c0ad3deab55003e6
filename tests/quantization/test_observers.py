"""Histograms beside the raw values, ranges beside closed forms, scipy's integrals and brute force in float64."""

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from convnext_deploy.errors import CheckFailed, UsageError
from convnext_deploy.quantization import observers, ranges
from convnext_deploy.quantization.observers import BINS, Histogram, from_arrays, histogram, merged, to_arrays
from convnext_deploy.quantization.ranges import clip_rate, levels, range_of, scale_and_zero_point, weight_scales
from convnext_deploy.records.plan import RangeMethod, Scheme

SCHEMES: tuple[Scheme, ...] = ("u8_asymmetric", "s8_symmetric", "fp8_e4m3")
METHODS: tuple[RangeMethod, ...] = ("minmax", "moving_average", "percentile", "entropy", "mse")
PAIRS = [(method, scheme) for method in METHODS for scheme in SCHEMES if (method, scheme) != ("entropy", "fp8_e4m3")]
COUNT = 1 << 18

SAMPLES: dict[str, Callable[[], Tensor]] = {
    "uniform": lambda: torch.rand(8, COUNT // 8, 1, generator=seeded()) * 2 - 1,
    "normal": lambda: torch.randn(8, COUNT // 8, 1, generator=seeded()),
    "after GELU": lambda: F.gelu(torch.randn(8, COUNT // 8, 1, generator=seeded()) * 2 - 2),
    "all positive": lambda: torch.rand(8, COUNT // 8, 1, generator=seeded()) + 3,
    "all negative": lambda: torch.rand(8, COUNT // 8, 1, generator=seeded()) - 3,
    "far outliers": lambda: torch.randn(8, COUNT // 8, 1, generator=seeded()).index_fill_(1, torch.tensor([5]), 200),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quantized(values: NDArray[np.float64], low: float, high: float, scheme: Scheme) -> NDArray[np.float64]:
    """Quantized and back in float64, independently of the module: rounding by numpy, e4m3 by ml_dtypes."""
    found_scale, found_zero_point = scale_and_zero_point(np.array(low), np.array(high), scheme)
    scale, zero_point = float(found_scale), int(found_zero_point)
    if scheme == "u8_asymmetric":
        return (np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point) * scale
    if scheme == "s8_symmetric":
        return np.clip(np.rint(values / scale), -128, 127) * scale
    codes = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return codes * scale


def squared_error(values: Tensor, low: float, high: float, scheme: Scheme) -> float:
    raw = values.double().numpy().ravel()
    return float(((quantized(raw, low, high, scheme) - raw) ** 2).mean())


def ends(statistics: Histogram, method: RangeMethod, scheme: Scheme, **options: Any) -> tuple[float, float]:
    low, high = range_of(statistics, method, scheme, **options)
    return float(low[0]), float(high[0])


def assert_same(a: Histogram, b: Histogram) -> None:
    for (field, left), right in zip(to_arrays(a).items(), to_arrays(b).values(), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=field)


# Histograms -----------------------------------------------------------------------------------------------------------

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)  # subnormals and 3e38 among them


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channels"])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_histograms_of_two_sets_merge_to_that_of_their_union(per_channel: bool, data: st.DataObject) -> None:
    shape = [data.draw(st.integers(2, 5)), 3, 2]
    values = torch.tensor(data.draw(st.lists(FLOATS, min_size=shape[0] * 6, max_size=shape[0] * 6))).reshape(shape)
    cut = data.draw(st.integers(1, shape[0] - 1))
    parts = [histogram(part, "x", per_channel=per_channel) for part in (values[:cut], values[cut:])]
    assert_same(merged(*parts), histogram(values, "x", per_channel=per_channel))
    assert_same(merged(*reversed(parts)), histogram(values, "x", per_channel=per_channel))


def test_the_mean_of_extremes_is_exact_in_whichever_order_shards_come() -> None:
    """Float64 loses the small ones beside 1e150, and each order another part of them."""
    extremes = [1e150, 0.1, -1e150, 3e-310, 7.0, 0.3]
    images = [histogram(torch.tensor([[[value]]], dtype=torch.float64), "x") for value in extremes]
    exact = float(sum(map(Fraction, extremes)) / len(extremes))
    for order in itertools.permutations(images):
        whole = functools.reduce(merged, order)
        low, high = range_of(whole, "moving_average", "u8_asymmetric")
        assert (low[0], high[0]) == (0.0, exact)
        assert_same(whole, functools.reduce(merged, images))


def test_a_radius_that_doubles_keeps_every_count() -> None:
    small = torch.randn(4, 500, 1, generator=seeded())
    statistics = histogram(small, "x")
    for factor in (3.0, 1e3, 1e9):
        statistics = merged(statistics, histogram(small * factor, "x"))
    every = torch.cat([small * factor for factor in (1.0, 3.0, 1e3, 1e9)]).double().numpy()
    radius = 2.0 ** int(statistics.exponent[0])
    expected, _ = np.histogram(every, BINS, (-radius, radius))
    assert radius / 2 <= np.abs(every).max() < radius
    np.testing.assert_array_equal(statistics.counts[0].numpy(), expected)


def test_a_histogram_of_channels_is_a_histogram_of_each_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_CHUNK", 64)  # so that a chunk ends inside an image
    values = torch.randn(3, 7, 5, 4, generator=seeded()) * torch.tensor([0.01, 1.0, 30.0, 0.0])
    statistics = histogram(values, "x", per_channel=True)
    for channel in range(4):
        alone = histogram(values[..., channel, None], "x", per_channel=True)
        np.testing.assert_array_equal(statistics.counts[channel], alone.counts[0])
        assert statistics.exponent[channel] == alone.exponent[0]
        assert statistics.low[channel] == alone.low[0]


def test_extremes_are_exact_and_of_each_channel() -> None:
    values = torch.randn(3, 20, 6, generator=seeded())
    statistics = histogram(values, "x")
    assert torch.equal(statistics.low, values.amin((0, 1)).double())
    assert torch.equal(statistics.high, values.amax((0, 1)).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_of_any_type_are_counted_and_left_as_they_are(dtype: torch.dtype) -> None:
    values = torch.randn(2, 50, 3, generator=seeded()).to(dtype)
    before = values.clone()
    statistics = histogram(values, "x")
    assert torch.equal(values, before)
    assert_same(statistics, histogram(before.double(), "x"))


def test_the_memory_does_not_grow_with_the_images() -> None:
    statistics = histogram(torch.randn(1, 10, 3), "x")
    size = sum(array.nbytes for array in to_arrays(statistics).values())
    for _ in range(20):
        statistics = merged(statistics, histogram(torch.randn(4, 10, 3) * 50, "x"))
    assert sum(array.nbytes for array in to_arrays(statistics).values()) == size
    assert statistics.images == 81


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(bad: float) -> None:
    values = torch.zeros(2, 3, 4)
    values[1, 2, 3] = bad
    with pytest.raises(CheckFailed, match=r"stages\.0\.0\.expand\.linear contains NaN or infinite"):
        histogram(values, "stages.0.0.expand.linear")


def test_a_histogram_survives_being_saved() -> None:
    statistics = histogram(torch.randn(3, 9, 5), "x", per_channel=True)
    assert_same(from_arrays(to_arrays(statistics), torch.device("cpu")), statistics)


# Scales ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.sampled_from(SCHEMES))
def test_zero_is_a_level_of_every_range(low: float, high: float, scheme: Scheme) -> None:
    grid = levels(np.array([low]), np.array([high]), scheme)[0]
    assert 0.0 in grid
    scale, zero_point = scale_and_zero_point(np.array(low), np.array(high), scheme)
    assert scale.dtype == np.float32
    assert np.isfinite(scale)
    assert scale > 0
    assert 0 <= zero_point <= 255
    assert scheme == "u8_asymmetric" or zero_point == 0


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e6, -1e-3), st.floats(1e-3, 1e6), st.sampled_from(SCHEMES))
def test_a_range_ends_within_half_a_level_of_its_levels(low: float, high: float, scheme: Scheme) -> None:
    grid = levels(np.array([low]), np.array([high]), scheme)[0]
    for end, beyond, gap in ((low, grid[0] - low, grid[1] - grid[0]), (high, high - grid[-1], grid[-1] - grid[-2])):
        assert beyond <= gap * 0.5001, end


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels_are_what_an_independent_quantizer_gives(scheme: Scheme) -> None:
    values = np.linspace(-5, 5, 20_001)
    grid = levels(np.array([-3.0]), np.array([4.0]), scheme)[0]
    nearest = grid[np.abs(values[:, None] - grid).argmin(1)]
    found = quantized(values, -3.0, 4.0, scheme)
    assert set(found) <= set(grid)
    np.testing.assert_allclose(np.abs(found - values), np.abs(nearest - values), rtol=0, atol=1e-12)


def test_the_levels_of_e4m3_are_those_of_ml_dtypes_and_of_a_cast_by_torch() -> None:
    grid = levels(np.array([-448.0]), np.array([448.0]), "fp8_e4m3")[0]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(grid, np.unique(every[np.isfinite(every)]))
    assert torch.equal(torch.from_numpy(grid).float().to(torch.float8_e4m3fn).double(), torch.from_numpy(grid))


@pytest.mark.parametrize(("method", "scheme"), PAIRS)
def test_a_tensor_of_zeros_gets_a_scale_that_keeps_it_zero(method: RangeMethod, scheme: Scheme) -> None:
    low, high = range_of(histogram(torch.zeros(2, 8, 3), "x"), method, scheme)
    assert low == high == 0
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    assert (scale[0], zero_point[0]) == (1, 0)


def test_a_subnormal_range_gets_a_scale_that_is_no_subnormal() -> None:
    scale, _ = scale_and_zero_point(np.array(0.0), np.array(1e-40), "u8_asymmetric")
    assert scale == 1


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(("method", "scheme"), PAIRS)
def test_a_range_holds_zero_and_is_symmetric_where_the_scheme_is(
    method: RangeMethod, scheme: Scheme, sample: str
) -> None:
    values = SAMPLES[sample]()
    low, high = ends(histogram(values, "x"), method, scheme)
    assert low <= 0 <= high
    assert scheme == "u8_asymmetric" or low == -high
    reach = 2 if (method, scheme) == ("mse", "fp8_e4m3") else 1
    assert max(-low, high) <= reach * float(values.abs().max())


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=40)
@given(st.lists(FLOATS, min_size=12, max_size=12), st.sampled_from(SCHEMES[:2]))
@example([0.0] * 11 + [2.0**-149], "u8_asymmetric")  # a range whose scale would be zero
@example([0.0] * 11 + [2.0**-64], "s8_symmetric")  # the least that the bins are used for
def test_any_values_get_a_range_inside_theirs_that_holds_zero(
    method: RangeMethod, values: list[float], scheme: Scheme
) -> None:
    low, high = ends(histogram(torch.tensor(values).reshape(2, 2, 3), "x"), method, scheme)
    assert low <= 0 <= high
    reach = max(map(abs, values))
    assert max(-low, high) <= reach * (1 + 1e-12)


def test_minmax_is_the_values_own_range() -> None:
    values = torch.tensor([-1.0, 0.25, 3.0]).reshape(1, 3, 1)
    statistics = histogram(values, "x")
    assert ends(statistics, "minmax", "u8_asymmetric") == (-1, 3)
    assert ends(statistics, "minmax", "s8_symmetric") == (-3, 3)
    assert ends(histogram(values + 2, "x"), "minmax", "u8_asymmetric") == (0, 5)


def test_the_moving_average_is_the_mean_of_the_images_extremes() -> None:
    values = torch.randn(6, 40, 3, generator=seeded()) * torch.arange(1, 7)[:, None, None]
    statistics = merged(histogram(values[:4], "x"), histogram(values[4:], "x"))
    low, high = ends(statistics, "moving_average", "u8_asymmetric")
    assert low == pytest.approx(float(values.amin((1, 2)).double().mean()), rel=1e-12)
    assert high == pytest.approx(float(values.amax((1, 2)).double().mean()), rel=1e-12)


# One of the values; numpy's default is between two, which in the tail are bins apart.
ORDER: Literal["inverted_cdf"] = "inverted_cdf"


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
def test_a_percentile_is_that_of_the_raw_values_to_a_bins_width(percentile: float) -> None:
    values = torch.randn(8, COUNT // 8, 1, generator=seeded())
    statistics, raw = histogram(values, "x"), values.double().numpy()
    width = 2.0 ** int(statistics.exponent[0]) / (BINS / 2)
    low, high = ends(statistics, "percentile", "u8_asymmetric", percentile=percentile)
    assert low == pytest.approx(np.percentile(raw, 100 - percentile, method=ORDER), abs=width)
    assert high == pytest.approx(np.percentile(raw, percentile, method=ORDER), abs=width)
    _, both = ends(statistics, "percentile", "s8_symmetric", percentile=percentile)
    assert both == pytest.approx(np.percentile(np.abs(raw), percentile, method=ORDER), abs=width)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(50.5, 100), min_size=2, max_size=2), st.sampled_from(sorted(SAMPLES)))
def test_a_higher_percentile_never_clips_more(percentiles: list[float], sample: str) -> None:
    statistics = histogram(SAMPLES[sample]()[:, :500], "x")
    (low, high), (wider_low, wider_high) = (
        ends(statistics, "percentile", "u8_asymmetric", percentile=percentile) for percentile in sorted(percentiles)
    )
    assert wider_low <= low
    assert high <= wider_high


@pytest.mark.parametrize("percentile", [0.0, 50.0, 100.1])
def test_a_percentile_that_is_none_is_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="expected above 50"):
        range_of(histogram(torch.zeros(1, 1, 1), "x"), "percentile", "s8_symmetric", percentile=percentile)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_read_off_the_histogram_is_that_of_the_raw_values(scheme: Scheme, sample: str) -> None:
    values = SAMPLES[sample]()
    statistics = histogram(values, "x")
    (row,) = ranges._rows(statistics)
    for shrink in (1.0, 0.6):
        low, high = (shrink * end for end in ends(statistics, "minmax", scheme))
        found = row.squared_errors(levels(np.array([low]), np.array([high]), scheme))[0] / values.numel()
        # The floor of GELU is a density without a bound, and outliers leave few bins to all other values.
        tolerance = {"after GELU": 0.02, "far outliers": 0.05}.get(sample, 0.005)
        assert found == pytest.approx(squared_error(values, low, high, scheme), rel=tolerance)


def test_the_moments_below_a_point_are_the_integrals_of_a_density_that_is_uniform_in_each_bin() -> None:
    counts, edges = np.random.default_rng(0).integers(0, 9, 8).astype(float), np.linspace(-2, 2, 9)
    row = ranges._Row(counts, 2.0, -2.0, 2.0, (0.0, 0.0))
    for point in (-3.0, -1.3, 0.0, 0.2, 0.75, 1.9, 5.0):
        for power, found in enumerate(row.moments(point)):
            parts = [
                scipy.integrate.quad(lambda x, c=count, k=power: c / 0.5 * x**k, start, min(end, point))[0]
                for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
                if start < point
            ]
            assert found == pytest.approx(sum(parts), abs=1e-9), (point, power)


def test_uniform_values_are_not_clipped_by_mse() -> None:
    statistics = histogram(SAMPLES["uniform"](), "x")
    for scheme in SCHEMES[:2]:
        assert ends(statistics, "mse", scheme) == pytest.approx(ends(statistics, "minmax", scheme), rel=0.005)


def test_laplace_values_are_clipped_where_the_integral_of_the_error_is_least() -> None:
    """The error of 8 bits over [-R, R] is step^2 / 12 inside, and the distance to R beyond."""

    def error(reach: float) -> float:
        step = reach / 127
        beyond, _ = scipy.integrate.quad(lambda x: (x - reach) ** 2 * np.exp(-x), reach, reach + 60)
        return step**2 / 12 * (1 - np.exp(-reach)) + float(beyond)

    expected = scipy.optimize.minimize_scalar(error, bounds=(2, 20), method="bounded").x
    values = torch.distributions.Laplace(0.0, 1.0).icdf((torch.arange(4_000_000).double() + 0.5) / 4_000_000)
    statistics = histogram(values.reshape(8, -1, 1), "x")
    assert expected == pytest.approx(9.89, abs=0.02)  # about 9.9, as the literature has it
    for scheme in SCHEMES[:2]:
        assert ends(statistics, "mse", scheme)[1] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_range_that_brute_force_finds_on_the_raw_values_is_much_better_than_mse(scheme: Scheme, sample: str) -> None:
    values = SAMPLES[sample]()[:, ::16].contiguous()
    statistics = histogram(values, "x")
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    widest = 2.0 if scheme == "fp8_e4m3" else 1.0
    shares = np.geomspace(widest, 0.02, 60)
    if scheme == "u8_asymmetric":
        lows = np.unique(low * np.geomspace(1, 0.02, 15))
        candidates = [(float(a), float(high * b)) for a in lows for b in np.geomspace(1, 0.02, 40)]
    else:
        candidates = [(-share * max(-low, high), share * max(-low, high)) for share in shares.tolist()]
    best = min(squared_error(values, *candidate, scheme) for candidate in candidates)
    found = squared_error(values, *ends(statistics, "mse", scheme), scheme)
    assert found <= best * 1.02
    assert found <= squared_error(values, *ends(statistics, "minmax", scheme), scheme) * 1.001


def test_fp8_by_minmax_scales_the_largest_magnitude_to_448() -> None:
    statistics = histogram(SAMPLES["normal"](), "x")
    scale, zero_point = scale_and_zero_point(*range_of(statistics, "minmax", "fp8_e4m3"), "fp8_e4m3")
    assert scale[0] == np.float32(float(SAMPLES["normal"]().abs().max()) / 448)
    assert zero_point[0] == 0


GELUS = [(-1.0, 1.0), (-2.0, 2.0), (-3.0, 1.5), (-3.0, 2.0), (-4.0, 2.0), (-6.0, 3.0)]  # mean and deviation before GELU


@pytest.mark.parametrize("scheme", SCHEMES[:2])
@pytest.mark.parametrize(("mean", "deviation"), GELUS)
def test_entropy_keeps_values_after_gelu(mean: float, deviation: float, scheme: Scheme) -> None:
    values = F.gelu(torch.randn(8, COUNT, 1, generator=seeded()) * deviation + mean)
    _, high = ends(histogram(values, "x"), "entropy", scheme)
    assert high >= 0.4 * float(values.max())


@pytest.mark.parametrize(("mean", "deviation"), [(-3.0, 1.5), (-2.0, 2.0)])
def test_entropy_that_counts_the_spike_at_zero_does_not_keep_them(
    mean: float, deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_without_spike", lambda counts, width: counts)
    values = F.gelu(torch.randn(8, COUNT, 1, generator=seeded()) * deviation + mean)
    _, high = ends(histogram(values, "x"), "entropy", "s8_symmetric")
    assert high < 0.4 * float(values.max())


def test_entropy_clips_outliers_that_nothing_else_comes_near() -> None:
    values = SAMPLES["far outliers"]()
    for scheme in SCHEMES[:2]:
        _, high = ends(histogram(values, "x"), "entropy", scheme)
        assert 4 < high < 100


def test_entropy_is_refused_for_fp8() -> None:
    with pytest.raises(UsageError, match="for fp8_e4m3 use mse"):
        range_of(histogram(torch.ones(1, 1, 1), "x"), "entropy", "fp8_e4m3")


@pytest.mark.parametrize(("method", "scheme"), PAIRS)
def test_the_ranges_of_channels_are_those_of_each_channel_alone(method: RangeMethod, scheme: Scheme) -> None:
    values = torch.randn(4, 300, 3, generator=seeded()) * torch.tensor([0.01, 1.0, 40.0]) + torch.tensor([0, 0.5, -9])
    lows, highs = range_of(histogram(values, "x", per_channel=True), method, scheme)
    for channel in range(3):
        alone = range_of(histogram(values[..., channel, None], "x", per_channel=True), method, scheme)
        assert (lows[channel], highs[channel]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_clip_rate_is_the_share_of_values_that_move_by_more_than_rounding(scheme: Scheme) -> None:
    values = SAMPLES["normal"]()
    statistics, raw = histogram(values, "x"), values.double().numpy().ravel()
    low, high = np.array([-1.0]), np.array([1.0 if scheme != "u8_asymmetric" else 1.5])
    grid = levels(low, high, scheme)[0]
    beyond = (raw > grid[-1] + (grid[-1] - grid[-2]) / 2) | (raw < grid[0] - (grid[1] - grid[0]) / 2)
    assert clip_rate(statistics, low, high, scheme)[0] == pytest.approx(beyond.mean(), abs=2e-4)
    assert clip_rate(statistics, *range_of(statistics, "minmax", scheme), scheme)[0] == 0


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s8_symmetric", "fp8_e4m3"])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_the_scales_of_weights_are_those_of_each_channel_alone(scheme: Scheme, method: RangeMethod) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=seeded()) * torch.logspace(-3, 2, 6)[:, None, None, None]
    scales = weight_scales(weight, scheme, method)
    assert scales.dtype == torch.float32
    for channel in range(6):
        assert scales[channel] == weight_scales(weight[channel, None], scheme, method)[0]


def test_weights_by_minmax_reach_the_outermost_code() -> None:
    weight = torch.randn(5, 64, generator=seeded())
    largest = weight.abs().amax(1)
    assert torch.equal(weight_scales(weight, "s8_symmetric", "minmax"), largest / 127)
    assert torch.equal(weight_scales(weight, "fp8_e4m3", "minmax"), largest / 448)


@pytest.mark.parametrize("scheme", ["s8_symmetric", "fp8_e4m3"])
def test_weights_by_mse_get_the_best_of_32_scales_an_octave(scheme: Scheme) -> None:
    weight = torch.randn(8, 384, generator=seeded())
    weight[0, 0] = 9.0  # a row with an outlier
    largest = {"s8_symmetric": 127, "fp8_e4m3": 448}[scheme]
    for row, scale in zip(weight, weight_scales(weight, scheme, "mse").double().tolist(), strict=True):
        reach = float(row.abs().max())
        wide = 0 if scheme == "s8_symmetric" else 32
        errors = [
            squared_error(row, -reach * 2 ** (step / 32), reach * 2 ** (step / 32), scheme)
            for step in range(-32, wide + 1)
        ]
        found = squared_error(row, -scale * largest, scale * largest, scheme)
        assert found == pytest.approx(min(errors), rel=1e-3)
        assert found <= errors[32]  # that of minmax


def test_a_channel_of_zeros_gets_the_scale_one() -> None:
    weight = torch.zeros(2, 5)
    weight[1] = 3.0
    for method in ("minmax", "mse"):
        assert weight_scales(weight, "s8_symmetric", method)[0] == 1


def test_weights_are_refused_in_asymmetric_and_by_methods_for_activations() -> None:
    with pytest.raises(UsageError, match="expected s8_symmetric or fp8_e4m3"):
        weight_scales(torch.ones(1, 1), "u8_asymmetric", "minmax")
    with pytest.raises(UsageError, match="by minmax or mse"):
        weight_scales(torch.ones(1, 1), "s8_symmetric", "entropy")
