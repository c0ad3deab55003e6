"""Damaged records: whatever is in a file, what comes out is a record or one line of our own."""

import json
from pathlib import Path
from typing import Any

import fuzz
import msgspec
import pytest
from fuzz_readers import readers
from sample_records import bench_row, evaluation, noisy, optimize_result, profile

from convnext_deploy import cli
from convnext_deploy.cli import terminal
from convnext_deploy.errors import DataError
from convnext_deploy.records.manifest import Parity
from convnext_deploy.reports import html, results
from convnext_deploy.timing import compare


@pytest.mark.parametrize("name", readers(Path()))
def test_a_damaged_record_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    contents, damage, reader = readers(tmp_path)[name]
    for content in contents:
        reader(content)  # before, it is taken
    assert fuzz.tracebacks(damage(contents, fuzz.THINNED), reader) == {}


def test_damages_are_the_same_in_every_run_and_of_many_kinds() -> None:
    contents = [json.dumps({"a": [1, 2, 3], "b": {"c": "text"}}).encode()]
    for damage in (fuzz.damaged, fuzz.records):
        found = list(damage(contents, 1000))
        assert found[:50] == list(damage(contents, 50))
        assert len(set(found)) > 400


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}",  # not UTF-8
        b'{"record": "profile", "note": "\xff"}',
        b"[" * 100_000,  # deeper than Python goes
        b'{"record": ["profile"]}',  # of a type that cannot be looked up
        b'{"benchmark": "a\\nb"}',
    ],
)
def test_a_file_that_no_decoder_takes_is_no_result(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        results.read([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": [5, 5]}, "turns of 10 samples, and 160 samples"),
        ({"yardstick_ms": [4.0]}, "8 turns, and 1 yardstick_ms"),
        ({"turns": [0] * 8}, "Expected `int` >= 1"),
        ({"samples_ms": [-1.0]}, "Expected `float` >= 1e-12"),
    ],
)
def test_a_result_whose_numbers_contradict_each_other_is_refused(
    change: dict[str, list[float]], message: str, tmp_path: Path
) -> None:
    document = msgspec.to_builtins(bench_row(noisy(0, turns=8))) | change
    (tmp_path / "r").write_bytes(json.dumps(document).encode())
    with pytest.raises(DataError, match=message):
        compare.read_results(tmp_path / "r")


@pytest.mark.parametrize("name", ["calibration", "selection", "final"])
def test_a_result_of_optimize_without_one_of_its_sets_of_images_is_refused(name: str, tmp_path: Path) -> None:
    document = msgspec.to_builtins(optimize_result())
    document["images"]["other"] = document["images"].pop(name)
    (tmp_path / "r").write_bytes(json.dumps(document).encode())
    with pytest.raises(DataError, match=f"images has no {name}"):
        results.read([tmp_path / "r"])


def test_a_profile_without_time_and_a_roofline_without_bytes_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(msgspec.json.encode(profile(layers_ms=0.0, wall_ms=0.0)))
    assert "Time by kind" in html.page(results.read([path]), "t")
    assert cli.run(["report", str(path), "--out", str(tmp_path / "r.md")]) == 0


def test_outputs_that_could_not_be_compared_are_unknown_and_no_traceback() -> None:
    from artifact_files import PROBE

    lost = Parity(
        images="i", samples=1, relative_error=None, cosine=None, top1_agreement=None, near_ties=0, failures=("x",)
    )
    text = terminal.details(Path("a"), msgspec.structs.replace(PROBE, parity=(lost,)), 1)
    assert "relative error unknown, cosine unknown" in text


def test_a_number_beyond_64_bits_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """A batch of 2^64 images ended in matplotlib's TypeError."""
    path = tmp_path / "r"
    row: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(bench_row([[5.0] * 3] * 2)))
    for place in ({"batch": 2**64}, {"artifact_bytes": -(2**64)}, {"machine": {"cpu": "a", "cores": [10**400]}}):
        path.write_text(json.dumps(row | place))
        with pytest.raises(DataError, match=r"contains a whole number of (65|1329) bits; those .* have at most 63"):
            results.read([path])
    path.write_bytes(msgspec.json.encode(row | {"batch": 2**63 - 1}))
    with pytest.raises(DataError, match=r"Expected `int` <= 65536 - at `\$\.batch`"):
        results.read([path])


@pytest.mark.slow  # draws every plot
def test_a_damaged_record_draws_a_page_or_none(tmp_path: Path) -> None:
    path = tmp_path / "r"
    contents = [
        msgspec.json.encode(r) for r in (bench_row([[5.0] * 3] * 2), profile(), evaluation(), optimize_result())
    ]

    def shown(content: bytes) -> object:
        path.write_bytes(content)
        return html.page(results.read([path]), "t")

    assert fuzz.tracebacks(fuzz.records(contents, fuzz.THINNED // 8), shown) == {}
