"""The tiers on arrays whose errors are made to measure."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sample_records
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from convnext_deploy.artifact import verify
from convnext_deploy.artifact.deviation import cosines, relative_errors, sizes, worst
from convnext_deploy.artifact.verify import NEAR_TIE_FACTOR, TOLERANCES, compare, precision_failures, top1_agreement
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import (
    BatchRange,
    ExportSpec,
    Manifest,
    Parity,
    PrecisionTruth,
)
from convnext_deploy.records.plan import QuantizationRecord
from convnext_deploy.runtimes import torch_compiled

PRECISIONS: list[Precision] = ["fp32", "fp16", "bf16"]


def reference(samples: int = 4, classes: int = 1000, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((samples, classes)).astype(np.float32)


def judged(
    found: NDArray[Any], expected: NDArray[Any], precision: Precision = "fp32", classify: bool = False
) -> Parity:
    return compare((found,), (expected,), TOLERANCES[precision], "probe", classify)


def off_by(expected: NDArray[np.floating], relative: float, sample: int) -> NDArray[Any]:
    """One sample moved by that relative error of its size, at a right angle to itself."""
    row = expected[sample].astype(np.float64)
    aside = np.random.default_rng(1).standard_normal(row.shape)
    aside -= row * (aside @ row) / (row @ row)
    found = expected.astype(np.float64)
    found[sample] += aside * relative * sizes(expected)[sample] / np.linalg.norm(aside)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_outputs_pass_with_nothing_to_report(precision: Precision) -> None:
    parity = judged(reference(), reference(), precision, classify=True)
    assert parity.failures == ()
    assert parity.relative_error == 0
    assert parity.cosine == pytest.approx(1, abs=1e-12)
    assert parity.top1_agreement == 1
    assert (parity.images, parity.samples, parity.near_ties) == ("probe", 4, 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("classify", [False, True])
def test_an_error_just_below_the_tolerance_passes(precision: Precision, classify: bool) -> None:
    limit = TOLERANCES[precision].relative_error
    parity = judged(off_by(reference(), 0.98 * limit, 2), reference(), precision, classify)
    assert parity.failures == ()
    assert parity.relative_error == pytest.approx(0.98 * limit, rel=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_error_just_above_the_tolerance_fails_and_names_the_sample(precision: Precision) -> None:
    limit = TOLERANCES[precision].relative_error
    parity = judged(off_by(reference(), 1.02 * limit, 2), reference(), precision)
    assert parity.failures[0].startswith("relative error ")
    assert "on sample 2" in parity.failures[0]
    assert f"above {limit:g}" in parity.failures[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("share", "fails"), [(0.98, False), (1.02, True)])
def test_the_cosine_has_a_limit_of_its_own(precision: Precision, share: float, fails: bool) -> None:
    """The norm is kept, only the direction turns: cosine 1 - x is an error of about sqrt(2 x)."""
    angle = np.arccos(1 - share * (1 - TOLERANCES[precision].cosine))
    expected = reference(1)
    row = expected[0].astype(np.float64)
    aside = np.random.default_rng(2).standard_normal(row.shape)
    aside -= row * (aside @ row) / (row @ row)
    aside *= np.linalg.norm(row) / np.linalg.norm(aside)
    parity = judged((np.cos(angle) * row + np.sin(angle) * aside)[None], expected, precision)
    assert any(failure.startswith("cosine ") for failure in parity.failures) == fails


def test_a_wrong_sign_fails_both_tiers() -> None:
    parity = judged(-reference(), reference())
    assert parity.relative_error == pytest.approx(2)
    assert parity.cosine is not None
    assert parity.cosine < -0.8  # the sizes have a floor
    assert len(parity.failures) == 2


def test_one_output_has_an_error_and_no_agreement_of_first_classes() -> None:
    expected = reference()[:, :1]
    parity = judged(expected, expected, classify=True)
    assert (parity.failures, parity.relative_error, parity.top1_agreement) == ((), 0, None)
    assert judged(-expected, expected, classify=True).failures


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail_whatever_else_is_right(value: float) -> None:
    found = reference()
    found[1, 3:5] = value
    parity = judged(found, reference(), classify=True)
    assert parity.failures == ("2 of the outputs' values are NaN or infinite",)
    assert parity.relative_error is parity.cosine is parity.top1_agreement is None


@pytest.mark.parametrize(
    "found",
    [
        reference()[:3],  # a sample is missing
        reference()[:, :999],
        reference()[..., None],
        reference(4, 1000).reshape(1000, 4),  # the same number of values
    ],
)
def test_another_shape_fails(found: NDArray[np.float32]) -> None:
    parity = judged(found, reference(), classify=True)
    assert len(parity.failures) == 1
    assert parity.failures[0].startswith(f"output shapes [{found.shape}], expected [(4, 1000)]")
    assert parity.relative_error is None


def test_a_missing_output_fails() -> None:
    parity = compare((reference(),), (reference(), reference()), TOLERANCES["fp32"], "probe", False)
    assert parity.failures[0].startswith("output shapes")


def test_the_worst_of_several_outputs_counts() -> None:
    maps = tuple(reference(2, size, seed=size) for size in (64, 32, 16))
    spoiled = (maps[0], off_by(maps[1], 1e-3, 1), maps[2])
    parity = compare(spoiled, maps, TOLERANCES["fp32"], "probe", classify=False)
    assert parity.relative_error == pytest.approx(1e-3, rel=1e-3)
    assert parity.top1_agreement is None
    assert "on sample 1" in parity.failures[0]


@settings(max_examples=50, deadline=None)
@given(
    size=st.floats(-9, 1),
    precision=st.sampled_from(PRECISIONS),
    sample=st.integers(0, 3),
    scale=st.sampled_from((1e-6, 1.0, 1e4)),
)
def test_pass_or_fail_follows_the_error_whatever_its_sample_and_scale(
    size: float, precision: Precision, sample: int, scale: float
) -> None:
    rows = reference().astype(np.float64)
    # Of one norm, so that each sample's size is its own.
    relative, expected = 10**size, scale * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    parity = judged(off_by(expected, relative, sample), expected, precision)
    assert parity.relative_error == pytest.approx(relative, rel=1e-4, abs=1e-12)
    cosine = 1 / np.sqrt(1 + relative**2)  # a right-angled triangle
    assert parity.cosine == pytest.approx(cosine, abs=1e-12)
    limit = TOLERANCES[precision]
    assert bool(parity.failures) == (relative > limit.relative_error or cosine < limit.cosine)


# Few outputs: each sample may lie near zero ---------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_a_sample_near_zero_is_judged_by_the_spread_of_all(outputs: int) -> None:
    expected = reference(16, outputs)
    expected[3] *= 1e-5
    found = expected.astype(np.float64)
    found[3] += 1e-3 * np.sqrt((expected**2).sum(1).mean() / outputs)  # one rounding of an ordinary sample in fp16
    found[3] *= -1  # and the sign is anyone's
    assert judged(found, expected, "fp16", classify=True).failures == ()
    found[5] += 0.05  # what is wrong on an ordinary sample is still seen
    assert judged(found, expected, "fp16", classify=True).failures


def test_outputs_that_are_all_zero_are_equal_to_themselves_and_to_nothing_else() -> None:
    zero = np.zeros((4, 10), np.float32)
    parity = judged(zero, zero, classify=True)
    assert (parity.failures, parity.relative_error, parity.cosine) == ((), 0.0, 1.0)
    assert judged(zero + 1e-6, zero).failures


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_a_constant_output_is_judged_by_its_size(outputs: int) -> None:
    constant = np.full((4, outputs), 3.0, np.float32)
    assert judged(constant * (1 + 5e-6), constant).failures == ()
    assert judged(constant * (1 + 2e-5), constant).failures


def test_ordinary_samples_are_judged_as_their_own_norm_says() -> None:
    expected = reference(1)
    found = expected + np.random.default_rng(3).standard_normal(expected.shape) * 0.1
    norms = np.linalg.norm(found), np.linalg.norm(expected)
    assert relative_errors(found, expected) == pytest.approx(np.linalg.norm(found - expected) / norms[1])
    assert cosines(found, expected) == pytest.approx((found * expected).sum() / norms[0] / norms[1])


# Top-1 ---------------------------------------------------------------------------------------------------------------


def two_leaders(margin: float) -> NDArray[Any]:
    """One sample of 1000 logits with root mean square 1, whose first two lead by 3 and lie `margin` apart."""
    row = np.full(1000, np.sqrt((1000 - 18) / 998) / 1.0)
    row[::2] *= -1
    row[0], row[1] = 3 + margin, 3.0
    return row[None] / np.sqrt((row**2).mean())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("share", "agreement", "near_ties"), [(0.9, 1.0, 1), (1.1, 0.0, 0)])
def test_leaders_closer_than_the_tolerated_error_are_a_near_tie(
    precision: Precision, share: float, agreement: float, near_ties: int
) -> None:
    limit = TOLERANCES[precision]
    expected = two_leaders(share * NEAR_TIE_FACTOR * limit.relative_error)
    found = expected.copy()
    found[0, [0, 1]] = found[0, [1, 0]]
    assert top1_agreement(found, expected, limit) == (agreement, near_ties)


def test_samples_that_agree_are_no_near_ties_however_close_their_leaders() -> None:
    expected = two_leaders(1e-9)
    assert top1_agreement(expected, expected, TOLERANCES["fp32"]) == (1.0, 0)


def test_agreement_is_the_share_of_the_samples_that_are_not_near_ties() -> None:
    limit = TOLERANCES["fp32"]
    close, apart = two_leaders(limit.relative_error)[0], two_leaders(1.0)[0]
    swapped = [1, 0, *range(2, 1000)]
    expected = np.stack([close, apart, apart, apart])
    found = np.stack([close[swapped], apart[swapped], apart, apart])
    agreement, near_ties = top1_agreement(found, expected, limit)
    assert near_ties == 1
    assert agreement == pytest.approx(2 / 3)


def test_a_changed_class_fails_though_the_error_is_tolerated() -> None:
    """One pair of logits of 1000, far enough apart to be no tie, close enough to pass the two other tiers."""
    limit = TOLERANCES["bf16"]
    expected = two_leaders(1.1 * NEAR_TIE_FACTOR * limit.relative_error).astype(np.float32)
    found = expected.copy()
    found[0, [0, 1]] = found[0, [1, 0]]
    parity = judged(found, expected, "bf16", classify=True)
    assert parity.relative_error is not None
    assert parity.relative_error < limit.relative_error
    assert parity.failures == ("top-1 agrees on 0.00% of the samples that are not near-ties, expected all",)
    assert judged(found, expected, "bf16", classify=False).failures == ()


def test_only_near_ties_are_no_disagreement() -> None:
    expected = two_leaders(TOLERANCES["fp16"].relative_error).astype(np.float32)
    found = expected.copy()
    found[0, [0, 1]] = found[0, [1, 0]]
    parity = judged(found, expected, "fp16", classify=True)
    assert (parity.failures, parity.near_ties, parity.top1_agreement) == ((), 1, 1.0)


# Precision -----------------------------------------------------------------------------------------------------------


def manifest(precision: Precision) -> Manifest:
    return sample_records.manifest(ExportSpec(format="onnx", precision=precision, batch=BatchRange()))


@pytest.mark.parametrize(
    ("graph", "executed", "typed", "passes"),
    [
        ({"fp16": 1.0}, {"fp32": 1.0}, True, True),  # the graph is fp16; this CPU runs it in fp32, and says so
        ({"fp32": 1.0}, {"fp16": 1.0}, False, True),  # the IR is fp32; the plugin runs it in fp16
        ({"fp32": 1.0}, {"bf16": 1.0}, False, False),
        ({"fp32": 1.0}, {"fp16": 1.0}, True, False),
        ({"fp16": 0.992, "fp32": 0.008}, None, True, True),
        ({"fp16": 0.985, "fp32": 0.015}, None, True, False),
        ({"fp16": 1.0}, None, False, False),  # unknown is not delivered
        ({}, None, True, False),
    ],
)
def test_precision_counts_where_the_format_decides_it(
    graph: dict[str, float], executed: dict[str, float] | None, typed: bool, passes: bool
) -> None:
    failures = precision_failures(PrecisionTruth(graph=graph, executed=executed), manifest("fp16"), typed)
    assert (failures == ()) == passes


def test_a_precision_failure_says_what_was_found_and_why() -> None:
    truth = PrecisionTruth(graph={"fp32": 1.0}, executed={"bf16": 0.75, "fp32": 0.25}, note="no such instructions")
    assert precision_failures(truth, manifest("fp16"), False) == (
        "fp16 was asked for, but the executed graph has 75% bf16, 25% fp32 of the multiply-accumulates "
        "(no such instructions)",
    )
    unknown = precision_failures(PrecisionTruth(graph={}), manifest("fp32"), False)
    assert "the executed graph has unknown of the multiply-accumulates" in unknown[0]


def test_an_engine_that_executes_another_type_than_its_graph_is_a_failure() -> None:
    half = {"fp16": 1.0}
    executed = PrecisionTruth(graph=half, executed={"fp16": 0.6, "fp32": 0.4})
    assert precision_failures(executed, manifest("fp16"), True) == ()  # a file that other runtimes may run in fp16
    (failure,) = precision_failures(executed, manifest("fp16"), True, engine=True)
    assert "the engine has 60% fp16, 40% fp32" in failure
    unnamed = PrecisionTruth(graph=half, executed={"fp16": 0.6, "unknown": 0.4})
    assert precision_failures(unnamed, manifest("fp16"), True, engine=True) == ()
    not_run = PrecisionTruth(graph=half, executed=None)
    assert precision_failures(not_run, manifest("fp16"), True, engine=True) == ()


# The source's own rounding -------------------------------------------------------------------------------------------


def test_the_limit_in_fp32_is_twice_the_sources_own_rounding_where_that_is_more() -> None:
    exact = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    table = verify.TOLERANCES["fp32"]
    for rounding, limit in ((1e-6, 1e-5), (9e-6, 1.8e-5), (1e-3, verify.LOOSEST_FP32)):
        source = exact * np.float32(1 + rounding)
        found, measured = verify.rounding_tolerance((source,), (exact,))
        assert measured == pytest.approx(rounding, rel=0.1)
        assert found.relative_error == pytest.approx(limit, rel=0.1)
        assert found.cosine == table.cosine
    # Below what the least of the planted mistakes that readers of files do not see moves outputs by.
    assert verify.LOOSEST_FP32 < 1.6e-4


# A plan's simulation --------------------------------------------------------------------------------------------------


def aside(expected: NDArray[np.floating], relative: float, seed: int) -> NDArray[Any]:
    """Every sample moved by that relative error, in a direction of its own."""
    moves = np.random.default_rng(seed).standard_normal(expected.shape)
    moves *= relative * sizes(expected)[:, None] / np.linalg.norm(moves, axis=1, keepdims=True)
    return expected + moves


@pytest.mark.parametrize(
    ("precision", "error", "passes"),
    [
        ("fp32", 0.019, True),  # as far from the source as the simulation, on another side
        ("fp32", 0.025, False),  # sqrt(0.02^2 + 0.025^2) is more than sqrt(2) * 0.02: something else is added
        ("bf16", 0.025, True),  # the rest's own rounding, 0.03
        ("bf16", 0.06, False),
    ],
)
def test_an_artifact_is_as_near_to_its_simulation_as_independent_errors_are(
    precision: Precision, error: float, passes: bool
) -> None:
    expected = reference(16)
    simulated = aside(expected, 0.02, 1)
    typed = (aside(simulated, 0.03, 2),) if precision == "bf16" else None
    limit = verify.simulation_tolerance((simulated,), (expected,), precision, typed)
    found = aside(expected, error, 3)
    parity = compare((found,), (simulated,), limit, "probe", False, "simulation")
    assert (parity.failures == ()) is passes
    if not passes:  # the worst sample alone says nothing
        assert [failure.partition(" from ")[0] for failure in parity.failures] == [
            f"root mean square of the relative errors {np.sqrt((relative_errors(found, simulated) ** 2).mean()):.3g}"
        ]


def test_few_samples_are_judged_by_the_worst_only() -> None:
    few, enough = reference(15), reference(16)
    limits = [verify.simulation_tolerance((aside(a, 0.02, 1),), (a,), "fp32") for a in (few, enough)]
    assert [limit.rms_error is None for limit in limits] == [True, False]


@pytest.mark.parametrize(("ran", "passes"), [("int8", True), ("fp8", False)])
def test_another_type_of_8_bits_than_the_plans_is_not_what_was_asked_for(ran: str, passes: bool) -> None:
    plan = QuantizationRecord(plan_sha256="0" * 64, target="native", operations={"u8s8": 3}, calibration=None)
    made = manifest("fp32")
    made = msgspec.structs.replace(made, export=msgspec.structs.replace(made.export, quantization=plan))
    truth = PrecisionTruth(graph={ran: 0.9, "fp32": 0.1}, quantized=3)
    assert (precision_failures(truth, made, True) == ()) is passes


def test_a_product_that_generated_code_does_not_name_is_not_taken_for_what_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = object.__new__(torch_compiled.CompiledSession)
    session.manifest, session._path = manifest("fp16"), Path("model.pt2")
    names = multiply_accumulates(session.manifest.model)
    for left_out, passes in (("", True), ("head.classifier.weight", True), ("stem.convs.0.weight", False)):
        types = {name: "float16" for name in names if name != left_out}
        monkeypatch.setattr(torch_compiled, "constant_types", lambda _, types=types: types)
        assert (precision_failures(session._precision(), session.manifest, True) == ()) is passes


# What mutants of the rules showed to be untested ----------------------------------------------------------------------


def test_the_tolerances_are_those_of_the_page() -> None:
    """docs/design/verification.md; a wider one is a decision."""
    found = {name: (limit.relative_error, 1 - limit.cosine) for name, limit in TOLERANCES.items()}
    table = {"fp32": (1e-5, 1e-8), "tf32": (1e-2, 1e-4), "fp16": (1e-2, 1e-4), "bf16": (8e-2, 4e-3)}
    assert found == {name: (error, pytest.approx(cosine, rel=1e-6)) for name, (error, cosine) in table.items()}
    assert (verify.QUANTIZED.relative_error, verify.QUANTIZED.cosine) == (0.5, 0.9)
    assert verify.ROUNDING == {"fp16": 2**-11, "bf16": 2**-8}
    assert (verify.SAME_TYPE, verify.NEAR_TIE_FACTOR, verify.LOOSEST_FP32) == (2, 4, 1e-4)


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_of_several_outputs_has_to_be_finite_and_to_point_where_it_should(wrong: int) -> None:
    expected = (reference(), reference(seed=1))
    spoilt = [output.copy() for output in expected]
    spoilt[wrong][2, 3] = np.nan
    assert compare(tuple(spoilt), expected, TOLERANCES["bf16"], "probe", False).failures == (
        "1 of the outputs' values are NaN or infinite",
    )
    spoilt[wrong] = expected[wrong] * np.array([[1], [1], [-1], [1]], np.float32)
    parity = compare(tuple(spoilt), expected, TOLERANCES["bf16"], "probe", False)
    assert parity.cosine is not None
    assert parity.cosine < -0.8  # the sizes have a floor
    assert "on sample 2" in parity.failures[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_same_type_has_to_be_twice_as_near_as_its_two_simulations_are_to_each_other(precision: Precision) -> None:
    wide = reference(16)
    same = off_by(wide, 0.04, 3).astype(np.float32)
    for share, passes in ((0.95, True), (1.05, False)):
        found = off_by(wide, share * 0.08, 7)
        parity = verify.compare_type((found,), (same,), (wide,), precision, "probe", False)
        assert (parity.failures == ()) is passes
        # Beside the nearer of the two: the same outputs are one's own.
        assert verify.compare_type((same,), (same,), (wide,), precision, "probe", False).relative_error == 0
        assert verify.compare_type((wide,), (same,), (wide,), precision, "probe", False).relative_error == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_without_rounding_is_held_to_two_roundings(precision: Precision) -> None:
    expected = reference(16)
    for share, passes in ((0.95, True), (1.05, False)):
        found = off_by(expected, share * 2 * verify.ROUNDING[precision], 7)
        parity = verify.compare_type((found,), (expected,), (expected,), precision, "probe", False)
        assert (parity.failures == ()) is passes


def test_a_simulation_is_met_within_twice_its_worst_sample_and_the_types_own_tolerance() -> None:
    expected = reference(16)
    limit = verify.simulation_tolerance((off_by(expected, 0.1, 5),), (expected,), "fp32")
    assert limit.relative_error == pytest.approx(2 * 0.1 + 1e-5)
    assert limit.cosine == pytest.approx(1 - limit.relative_error**2)
    assert limit.rms_error == pytest.approx(np.sqrt(2) * 0.1 / 4 + 1e-5)
    typed = (off_by(off_by(expected, 0.1, 5).astype(np.float32), 0.2, 6),)
    halved = verify.simulation_tolerance((off_by(expected, 0.1, 5).astype(np.float32),), (expected,), "fp16", typed)
    assert halved.rms_error == pytest.approx(np.sqrt(2) * np.hypot(0.1 / 4, 0.2 / 4), rel=1e-2)


def of_plan(operations: dict[str, int], precision: Precision = "fp32", kept: float = 0.0) -> Manifest:
    made = manifest(precision)
    plan = QuantizationRecord(
        plan_sha256="0" * 64, target="onnx", operations=operations, calibration=None, kept_share=kept
    )
    return msgspec.structs.replace(made, export=msgspec.structs.replace(made.export, quantization=plan))


@pytest.mark.parametrize(
    ("ran", "line"), [(3, None), (2, "2 products run"), (4, "4 products run"), (None, "0 products")]
)
def test_as_many_products_run_in_8_bits_as_the_plan_has(ran: int | None, line: str | None) -> None:
    truth = PrecisionTruth(graph={"int8": 0.9, "fp32": 0.1}, quantized=ran, note="so it says")
    failures = precision_failures(truth, of_plan({"u8s8": 3, "fp32": 1}), True)
    if line is None:
        assert failures == ()
    else:
        assert failures[0].startswith(line)
        assert failures[0].endswith("where the plan has 3 (so it says)")


@pytest.mark.parametrize(
    ("in_fp32", "passes"),
    [
        (0.3, True),  # what the plan keeps
        (0.25, False),  # less: it was to be kept
        (0.36, False),  # more than it keeps
    ],
)
def test_as_much_stays_in_fp32_as_the_plan_keeps(in_fp32: float, passes: bool) -> None:
    truth = PrecisionTruth(graph={"fp16": 1 - in_fp32, "fp32": in_fp32}, quantized=0)
    assert (precision_failures(truth, of_plan({"fp32": 4}, "fp16", kept=0.3), True) == ()) is passes


def test_8_bits_of_the_other_kind_are_no_plans() -> None:
    for type, ran in (("fp8", "int8"), ("u8s8", "fp8")):
        truth = PrecisionTruth(graph={ran: 0.9, "fp32": 0.1}, quantized=3)
        assert precision_failures(truth, of_plan({type: 3}), True)


def test_an_engine_in_tf32_may_call_it_fp32_and_one_in_fp16_may_not() -> None:
    truth = PrecisionTruth(graph={"tf32": 1.0}, executed={"fp32": 1.0})
    assert precision_failures(truth, manifest("tf32"), True, engine=True) == ()
    halved = PrecisionTruth(graph={"fp16": 1.0}, executed={"fp32": 1.0})
    assert precision_failures(halved, manifest("fp16"), True, engine=True)


def test_outputs_of_another_number_have_no_worst() -> None:
    with pytest.raises(ValueError, match="longer"):
        worst((reference(),), (reference(), reference()))
