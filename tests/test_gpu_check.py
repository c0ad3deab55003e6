"""The runner of the first measurements on a GPU: steps as data, one failure costs no other. Without a GPU."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import env

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def check() -> Any:
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    location = importlib.util.spec_from_loader("gpu_check", loader)
    assert location is not None
    module = importlib.util.module_from_spec(location)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def step(check: Any, name: str, code: str, limit_s: int = 20, **options: Any) -> Any:
    return check.Step(name, limit_s, ("-c", code), rehearsed=(), **options)


def ran(check: Any, path: Path, *steps: Any, budget_s: float = 60, resume: bool = False) -> tuple[bool, dict[str, Any]]:
    log = check.Log(path, resume)
    well = check.run(steps, log, budget_s, True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.records
    return well, {record["step"]: record for record in log.records if "ended" in record}


GOOD = "print('{\"found\": 1}')"


def test_every_step_is_well_formed(check: Any) -> None:
    names = [step.name for step in check.STEPS]
    assert len(set(names)) == len(names)
    for step in check.STEPS:
        assert step.limit_s <= check.BUDGET_S
        assert step.command[0] == "-m" or (ROOT / step.command[0]).exists(), step.name
        assert step.limit_s > check.SMALLEST_S
    assert names.index("compile") < names.index("kernels")  # which launches what that compiles
    assert names[-1] == "rtx"
    run = {part for step in check.STEPS for part in step.command}
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    assert {str(path.relative_to(ROOT)) for path in marked if path.name != Path(__file__).name} <= run


def test_a_step_that_fails_in_any_way_is_recorded_and_costs_no_other(check: Any, tmp_path: Path) -> None:
    well, ended = ran(
        check, tmp_path / "r.jsonl",
        step(check, "raises", "print('{\"found\": 1}'); raise ValueError('why')"),
        step(check, "says", "print('{\"error\": \"no\"}')"),
        step(check, "silent", "pass"),
        step(check, "hangs", f"import time; {GOOD}; time.sleep(60)", limit_s=2),
        step(check, "good", GOOD),
    )  # fmt: skip
    assert not well
    assert {name: record["ended"] for name, record in ended.items()} == {
        "raises": "failed", "says": "failed", "silent": "failed", "hangs": "failed", "good": "well"
    }  # fmt: skip
    assert "ValueError: why" in ended["raises"]["tail"]
    assert ended["says"]["reason"] == "1 of 1 records are errors"
    assert ended["silent"]["reason"] == "nothing was measured"
    assert ended["hangs"]["reason"] == "stopped after 2 s"


def test_a_step_beside_another_is_waited_for_before_the_one_after(check: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    slow = step(check, "slow", f"import time; time.sleep(1); {GOOD}", beside=True)
    well, _ = ran(check, path, slow, step(check, "quick", GOOD), step(check, "after", GOOD))
    order = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert well
    assert order.index("quick") < order.index("slow") < order.index("after")


def test_a_resumed_run_skips_what_ended_well(check: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert not ran(check, path, step(check, "one", GOOD), step(check, "two", "raise SystemExit(3)"))[0]
    well, _ = ran(check, path, step(check, "one", "raise SystemExit(3)"), step(check, "two", GOOD), resume=True)
    assert well
    ended = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["ended"]) for r in ended if "ended" in r] == [
        ("one", "well"), ("two", "failed"), ("two", "well"),
    ]  # fmt: skip


def test_the_budget_cuts_a_step_short_and_leaves_out_the_rest(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SMALLEST_S", 1)
    hangs = step(check, "hangs", "import time; time.sleep(60)")
    well, ended = ran(check, tmp_path / "r.jsonl", hangs, step(check, "late", GOOD), budget_s=2)
    assert not well
    assert ended["hangs"]["reason"] == "stopped after 2 s"
    assert ended["late"]["reason"] == "the budget was used up"


def test_a_step_whose_package_is_absent_is_left_out_and_no_failure(check: Any, tmp_path: Path) -> None:
    well, ended = ran(check, tmp_path / "r.jsonl", step(check, "rtx", GOOD, needs="no_such_package"))
    assert well
    assert ended["rtx"] == {"step": "rtx", "ended": "left out", "reason": "no package no_such_package"}


@pytest.mark.skipif(bool(env.nvidia_gpus()), reason="there is a GPU, so that it would run")
def test_a_machine_without_a_gpu_is_refused_and_a_dry_run_is_not(tmp_path: Path) -> None:
    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = said("--out", str(tmp_path / "out.jsonl"))
    assert refused.returncode == 1
    assert "there is no NVIDIA GPU here" in refused.stderr
    assert not list(tmp_path.iterdir())
    assert said("--dry-run", "--only", "compile", "--only", "compiled-*").stdout.splitlines() == [
        "compile        at most 200 s beside the next",
        "compiled-tiny  at most 120 s",
        "compiled-base  at most 120 s",
    ]
    assert "no step is called nothing" in said("--dry-run", "--only", "nothing").stderr


def test_the_cheap_steps_can_be_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_steps

    place = gpu_steps.Place("cpu", 2)
    (listed,) = gpu_steps.compile_kernels(place)
    assert listed["variants"] > 20
    for name in ("facts", "libraries", "kernels"):
        found = list(gpu_steps.STEPS[name](place))
        assert found
        assert not [record for record in found if "error" in record]
