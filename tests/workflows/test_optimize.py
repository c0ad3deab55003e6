"""`optimize`: the race with times and accuracies made up, and the command on the bundled model."""

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import timm
import typer

import convnext_deploy
from convnext_deploy import env, formats
from convnext_deploy.cli import app as cli
from convnext_deploy.data import sources
from convnext_deploy.errors import CheckFailed, DataError, UsageError, WorkerError
from convnext_deploy.quantization.images import random_images
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.records.optimize import Candidate, OptimizeResult
from convnext_deploy.records.plan import CalibrationRecord, OperationPlan, Plan
from convnext_deploy.workflows import candidates, optimize, race
from convnext_deploy.workflows.agenda import Agenda, View
from convnext_deploy.workflows.candidates import Goal, machine_here
from convnext_deploy.workflows.evaluate import Images
from convnext_deploy.workflows.workshop import Workshop

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "examples" / "fashion-mnist" / "model.safetensors"
IMAGES = ROOT / "examples" / "fashion-mnist" / "test-2000.parquet"
NAMES = ("stem", "stages.0.0.expand", "stages.0.0.project", "stages.1.0.expand", "stages.1.0.project", "head")
CALIBRATION = CalibrationRecord(data="x", data_sha256="0" * 64, images=8, random=False, method="mse")
AVX512 = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}


def plan_of(names: Sequence[str], target: str) -> LoadedPlan:
    plan = Plan(
        target=target, architecture="test_convnext", weights_sha256="0" * 64, input="float32", image_size=(32, 32),
        rest="fp32", calibration=CALIBRATION,
        operations={name: OperationPlan(type="u8s8", scale=1.0) for name in names},
    )  # fmt: skip
    return LoadedPlan(plan, {})


class Drafts:
    def whole(self, format: str, rest: str) -> LoadedPlan:
        return plan_of(NAMES, format)

    def linears(self, whole: LoadedPlan) -> LoadedPlan:
        return plan_of(NAMES[1:5], whole.plan.target)

    def smaller(self, whole: LoadedPlan, share: float) -> LoadedPlan:
        return plan_of(NAMES[: round(len(NAMES) * share)], whole.plan.target)


class MadeUp(race.Race):
    """A race whose artifacts exist by name only.

    Args:
        times: milliseconds by candidate; a candidate without one has 10.
        flips: images that a candidate loses of a hundred; it gains as many.
        refused: why a candidate cannot be built.
        drops: images more that it loses of a hundred, on the final images only.
    """

    def __init__(
        self, folder: Path, times: Mapping[str, float], flips: Mapping[str, float] | None = None,
        refused: Mapping[str, str] | None = None, drops: Mapping[str, float] | None = None, **goal: Any,
    ) -> None:  # fmt: skip
        self.views: list[View] = []
        self.said: list[str] = []
        self.judged: list[tuple[str, str]] = []
        self.built: list[str] = []
        self.times, self.flips, self.refused, self.drops = times, flips or {}, refused or {}, drops or {}
        given: dict[str, Any] = {
            "images": Images(data="x"), "calibration": None, "max_drop": 1.0, "alpha": 0.05, "objective": "latency",
            "batch": 1, "max_latency_ms": None, "runtimes": (), "input": "float32", "device": "cpu", "threads": None,
        }  # fmt: skip
        workshop: Any = SimpleNamespace(
            folder=folder, kept=lambda row, sha: None, built=self._made, machine=machine_here(("native",), "cpu")
        )
        workshop.builds = lambda jobs, begin: Workshop.builds(workshop, jobs, begin)
        images = random_images(1000, (32, 32))
        super().__init__(
            workshop, None, Goal(**(given | goal)), images, images, images, self.said.append,  # type: ignore[arg-type]
            Agenda(self.views.append), {},
        )  # fmt: skip
        self._drafting = Drafts()  # type: ignore[assignment]
        folder.mkdir(exist_ok=True)

    def _made(self, row: Candidate, plan: Path | None) -> Any:
        if row.name in self.refused:
            raise WorkerError(f"{row.name}: {self.refused[row.name]}")
        self.built.append(row.name)
        return SimpleNamespace(
            sha256=f"{abs(hash(row.name)):064x}"[-64:], bytes=100, manifest=SimpleNamespace(parity=())
        )

    def _time(self, kept: str, names: Sequence[str], seconds: float) -> Any:
        for name in names:
            self.least[name] = self.times.get(name, 10.0)
            self._set(self.rows[name], state="timed", ms=self.least[name], timing="valid")
        return ()

    def _side(self, name: str, kind: str) -> Any:
        return SimpleNamespace(name=name, kind=kind, result=SimpleNamespace(top1=0.9))

    def run_with(self, *names: str) -> race.Outcome:
        return self.run([formats.get(name) for name in names])


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate itself, on counts that the candidate's table says, of 1,000 images."""
    from convnext_deploy.accuracy import statistics
    from convnext_deploy.records.accuracy import Check
    from convnext_deploy.records.base import Decision

    def judged(before: Any, after: Any, limits: Any) -> Any:
        of = CURRENT[0]
        of.judged.append((after.name, after.kind))
        gained = round(10 * of.flips.get(after.name, 0.0))
        lost = gained + (round(10 * of.drops.get(after.name, 0.0)) if after.kind == "final" else 0)
        lower, upper = statistics.drop_bounds(lost, gained, 1000, limits.alpha)
        drop, limit = (lost - gained) / 1000, limits.max_drop / 100
        decision: Decision = "PASS" if upper <= limit else "FAIL" if lower > limit else "INCONCLUSIVE"
        check = Check(name="top1_drop", decision=decision, limit=limit, value=drop, lower=lower, upper=upper)
        return SimpleNamespace(
            decision=decision, agreement=1 - (lost + gained) / 1000, lost=lost, gained=gained, images=1000,
            images_needed=5000, checks=(check,),
        )  # fmt: skip

    monkeypatch.setattr(race.gate, "judge", judged)
    monkeypatch.setattr(env, "cpu_features", lambda: AVX512)
    monkeypatch.setattr(candidates.platform, "machine", lambda: "x86_64")


CURRENT: list[MadeUp] = []


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., MadeUp]:
    def make(*args: Any, **options: Any) -> MadeUp:
        CURRENT[:] = [MadeUp(tmp_path / "work", *args, **options)]
        return CURRENT[0]

    return make


TIMES = {
    "native-fp32": 4.0, "native-bf16": 2.5, "native-int8": 1.0, "native-int8-linears": 1.2,
    "onnx-fp32": 5.0, "onnx-int8": 2.0,
}  # fmt: skip
FLIPS = {"native-int8": 0.3, "native-int8-linears": 0.2, "native-bf16": 0.1, "onnx-int8": 0.3}


def test_the_fastest_that_passes_is_chosen_after_the_one_that_agrees_most(made_up: Any) -> None:
    found = made_up(TIMES, flips=FLIPS)
    outcome = found.run_with("native", "onnx")
    assert outcome.order == ("native-bf16", "native-int8-linears", "native-int8")
    assert outcome.chosen == "native-int8"
    assert [name for name, kind in found.judged if kind == "final"] == list(outcome.order)
    assert found.rows["native-int8"].state == "chosen"
    assert found.rows["native-int8"].operations == NAMES
    assert all(row.reason for row in found.rows.values() if row.state not in ("chosen", "passed"))


def test_the_walk_ends_where_one_does_not_pass_although_a_faster_one_would(made_up: Any) -> None:
    """Else the chance of choosing a bad one would be that of several tries."""
    found = made_up(TIMES, flips=FLIPS, drops={"native-int8-linears": 1.5})
    outcome = found.run_with("native", "onnx")
    assert outcome.chosen == "native-bf16"
    assert found.rows["native-int8-linears"].state == "not proven"
    assert "about 5,000 would decide" in (found.rows["native-int8-linears"].reason or "")
    assert found.rows["native-int8"].state == "not tried"


@pytest.mark.parametrize("refused", ["native-fp32", "native-int8", "native-bf16", "onnx-fp32", "native-int8-linears"])
def test_a_candidate_that_cannot_be_built_is_a_row_with_its_reason_and_never_the_end(
    refused: str, made_up: Any
) -> None:
    found = made_up(TIMES, refused={refused: "the process was killed by SIGSEGV"})
    outcome = found.run_with("native", "onnx")
    assert outcome.chosen in found.built
    row = found.rows[refused]
    assert (row.state, row.reason) == ("rejected", "the process was killed by SIGSEGV")
    assert any(refused in line and "SIGSEGV" in line for line in found.said)
    assert json.loads((found.workshop.folder / "rejected.json").read_text()) == {refused: row.reason}


def test_where_nothing_can_be_built_the_end_says_why_of_each(made_up: Any) -> None:
    found = made_up({}, refused={"native-fp32": "no compiler", "onnx-fp32": "no disk"})
    with pytest.raises(CheckFailed, match="native-fp32: no compiler; onnx-fp32: no disk"):
        found.run_with("native", "onnx")


def test_what_cannot_become_the_fastest_is_not_built(made_up: Any) -> None:
    found = made_up({"native-fp32": 4.0, "onnx-fp32": 40.0})
    found.run_with("native", "onnx")
    assert not {"onnx-int8", "onnx-fp16"} & set(found.built)
    assert "4 times as fast as fp32 at most: 40.00 ms" in (found.rows["onnx-int8"].reason or "")
    assert found.rows["onnx-fp16"].reason == "this CPU has no instructions that multiply fp16"


def test_what_is_nothing_but_slower_than_fp32_is_not_evaluated(made_up: Any) -> None:
    found = made_up({"onnx-fp32": 3.0, "onnx-int8": 3.5})
    assert found.run_with("onnx").chosen == "onnx-fp32"
    assert found.judged == []
    assert found.rows["onnx-int8"].state == "slower"


def test_a_plan_with_little_chance_is_followed_by_smaller_ones(made_up: Any) -> None:
    flips = {"native-int8": 3.0, "native-int8-linears": 2.5, "native-int8-3": 0.1, "native-bf16": 0.0}
    times = TIMES | {"native-int8-3": 2.0}
    found = made_up(times, flips=flips)
    outcome = found.run_with("native")
    assert found.rows["native-int8"].state == "dropped"
    assert "cannot be shown on 1000 final ones" in (found.rows["native-int8"].reason or "")
    assert outcome.chosen == "native-int8-3"
    assert "native-int8-2" not in found.rows  # one with a fair chance ends the descent


def test_a_limit_of_latency_takes_the_one_that_loses_least_within_it(made_up: Any) -> None:
    assert made_up(TIMES, flips=FLIPS, max_latency_ms=6.0).run_with("native").chosen == "native-fp32"
    assert made_up(TIMES, flips=FLIPS, max_latency_ms=3.0).run_with("native").chosen == "native-bf16"
    found = made_up(TIMES, flips=FLIPS, max_latency_ms=0.5).run_with("native")
    assert found.chosen is None
    assert found.why == "nothing keeps 0.5 ms: the fastest left is native-int8 at 1.00 ms"


def test_the_peak_of_a_type_follows_from_the_cpus_instructions() -> None:
    def gain(type: str, *features: str, device: Any = "cpu") -> float:
        machine = replace(machine_here(("native",), "cpu"), features=set(features))
        return candidates.peak_gain(type, device, machine)

    assert gain("int8", *AVX512) == 4
    assert gain("bf16", *AVX512) == 2
    assert gain("fp16", *AVX512) == 1
    assert gain("int8", "avx2") == 2
    assert (gain("bf16", "amx_bf16"), gain("int8", "amx_int8")) == (16, 32)
    assert gain("fp16") == math.inf  # nothing is known, so nothing is left out
    assert gain("int8", *AVX512, device="cuda") == math.inf


def test_the_time_that_is_left_falls_as_work_is_done() -> None:
    views: list[View] = []
    agenda = Agenda(views.append)
    agenda.expect(build=3)
    agenda.begin("build", "a")
    first = views[-1].left_s
    agenda.end("build")
    last = views[-1].left_s
    assert first is not None
    assert last is not None
    assert 0 < last < first
    agenda.expect(build=-5)
    assert agenda.left_s == 0


def test_a_step_that_takes_longer_than_expected_takes_no_time_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections of a plan take minutes, and `0:00:00 left` was shown meanwhile."""
    now = 0.0
    monkeypatch.setattr("convnext_deploy.workflows.agenda.time.perf_counter", lambda: now)
    agenda = Agenda(lambda view: None)

    def left_s() -> float | None:
        return agenda.left_s

    agenda.expect(draft=1, evaluate=1000)
    agenda.begin("draft", "choosing scales")
    assert left_s() == 40  # 30 and 1,000 times 0.01, as nothing was measured yet
    now = 29.0
    assert left_s() == 11
    now = 300.0
    assert left_s() is None
    agenda.end("draft")
    assert left_s() == 10
    agenda.begin("build", "a")
    agenda.expect(build=-1, evaluate=-1000)  # what turns out not to be needed
    now += 1
    assert left_s() == 0


def test_the_three_sets_are_disjoint_and_the_final_one_is_the_largest() -> None:
    whole = sources.open_source(str(IMAGES))
    first, selection, final = optimize._sets(whole, None)
    assert (len(first), len(selection), len(final)) == (250, 250, 1500)
    assert not set(first.names) & set(selection.names)
    assert not set(final.names) & {*first.names, *selection.names}
    _, selection, final = optimize._sets(whole, str(IMAGES))
    assert (len(selection), len(final)) == (250, 1750)
    with pytest.raises(DataError, match="60 images; at least 64"):
        optimize._sets(sources.subset(whole, 60), None)


def test_work_of_something_else_is_neither_used_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "best.optimize"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"best\.optimize contains no work of `optimize`"):
        optimize._check_identity(folder, weights="a")
    assert not optimize._check_identity(tmp_path / "new", weights="a")
    assert optimize._check_identity(tmp_path / "new", weights="a")
    (tmp_path / "new" / optimize.IDENTITY).write_text('["of an earlier version"]')
    with pytest.raises(UsageError, match="a call with other options, images or versions; remove it"):
        optimize._check_identity(tmp_path / "new", weights="a")


def test_work_with_other_options_is_refused_with_their_names(tmp_path: Path) -> None:
    first = {"max_drop": 0.5, "batch": 1, "images": {"data": "val", "split": None}}
    facts = {"weights": "a", "images": ["x"], "versions": {"torch": "2.9"}}
    optimize._check_identity(tmp_path / "w", options=first, **facts)

    def refusal(**changed: object) -> str:
        with pytest.raises(UsageError) as caught:
            optimize._check_identity(tmp_path / "w", **({"options": first} | facts | changed))
        return str(caught.value).partition(" a call with ")[2].partition(";")[0]

    assert refusal(options=first | {"max_drop": 1.0}) == "--max-drop 0.5 in the place of 1.0"
    assert refusal(options=first | {"images": {"data": "test", "split": None}}) == "--data 'val' in the place of 'test'"
    assert refusal(weights="b", images=["y"]) == "other weights, other images"
    assert refusal(versions={"torch": "2.11"}) == "versions torch '2.9' in the place of '2.11'"
    assert refusal(options={}, weights="b", images=["y"]).endswith("other weights and 1 more")


@pytest.mark.skipif(bool(env.nvidia_gpus()), reason="there is one")
def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu"):
        convnext_deploy.optimize("random", variant="atto", data=tmp_path, out=tmp_path / "best", device="cuda")
    assert not (tmp_path / "best.optimize").exists()


def test_a_network_without_classes_is_refused_with_what_can_be_done_for_it(tmp_path: Path) -> None:
    network = timm.create_model("test_convnext", features_only=True)
    with pytest.raises(UsageError, match=r"optimize judges top-1: .* has no head; export it with --task features, seg"):
        convnext_deploy.optimize(network, data=IMAGES, out=tmp_path / "o")


def test_what_is_assumed_of_the_images_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes are lost where the size is wrong and only the end says that it was assumed."""

    def work(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "_check_identity", work)
    network, said = timm.create_model("test_convnext", num_classes=10, in_chans=1), list[str]()
    with pytest.raises(KeyboardInterrupt):
        convnext_deploy.optimize(network.state_dict(), data=IMAGES, out=tmp_path / "o", image_size=64, say=said.append)
    told = next(line for line in said if line.startswith("assumed"))
    assert "mean, std" in told
    assert "image_size" not in told
    assert "`export --data` with these images tries other values" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"max_drop": -1}, "max_drop -1.0; expected percentage points above 0"),
        ({"max_latency_ms": 0}, "max_latency_ms 0.0; expected milliseconds above 0"),
        ({"maximize": "speed"}, "maximize speed; expected one of latency, throughput"),
        ({"max_latency_ms": 5, "maximize": "throughput"}, "is for the latency of a batch"),
        ({"runtimes": "onxx"}, "did you mean onnx?"),
        ({"runtimes": "tensorrt"}, "runs on cuda, not on cpu"),
        ({"device": "gpu"}, "device gpu; expected one of cpu, cuda; did you mean cuda?"),
        ({"batch": 0}, "batch 0; expected at least 1"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused_before_any_work(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, DataError)) as caught:
        convnext_deploy.optimize(WEIGHTS, **({"data": IMAGES, "out": tmp_path / "best"} | options))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


# The whole way -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OptimizeResult, list[str]]:
    """One run on the bundled model with the runtime `native`, interrupted at its second build, and taken up again."""
    folder = tmp_path_factory.mktemp("optimize")
    out = folder / "best"
    right, calls = Workshop.built, []

    def built(self: Workshop, row: Candidate, plan: Path | None) -> Any:
        calls.append(row.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(self, row, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workshop, "built", built)
        patch.setattr(race, "FIRST_S", 0.2)
        patch.setattr(race, "LAST_S", 0.2)
        options: dict[str, Any] = {"data": IMAGES, "out": out, "max_drop": 2, "runtimes": "native", "input": "uint8"}
        with pytest.raises(KeyboardInterrupt):
            convnext_deploy.optimize(WEIGHTS, **options)
        assert not out.exists()
        said: list[str] = []
        result = convnext_deploy.optimize(
            WEIGHTS, **options, command=["convnext-deploy", "optimize", "a b"], say=said.append
        )
    assert f"going on with the work in {optimize.work_folder(out)}: 1 candidate built" in said
    return out, result, calls


@pytest.mark.slow  # builds and times
def test_an_interrupted_run_goes_on_and_ends_with_a_proven_artifact(
    run: tuple[Path, OptimizeResult, list[str]],
) -> None:
    out, result, calls = run
    assert calls.count("native-fp32") == 1  # built before the interruption, and kept
    assert result.chosen is not None
    row = next(row for row in result.candidates if row.name == result.chosen)
    assert convnext_deploy.load(out).manifest.export.format == "native"
    assert row.exact or (row.verdict is not None and row.verdict.decision == "PASS")
    work = optimize.work_folder(out)
    assert msgspec.json.decode((work / optimize.RESULT).read_bytes(), type=OptimizeResult) == result
    assert not [path for path in work.iterdir() if path.is_dir()]  # the others are gone, what they did is not
    with pytest.raises(UsageError, match="exists; choose another --out"):
        convnext_deploy.optimize(WEIGHTS, data=IMAGES, out=out)


@pytest.mark.slow
def test_a_run_that_ended_can_be_made_again(
    run: tuple[Path, OptimizeResult, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # what stands for the machine and the judge in the other tests
    shutil.copytree(run[0], tmp_path / "best")
    shutil.copytree(optimize.work_folder(run[0]), optimize.work_folder(tmp_path / "best"))
    monkeypatch.setattr(race, "FIRST_S", 0.2)
    monkeypatch.setattr(race, "LAST_S", 0.2)
    again = convnext_deploy.optimize(
        WEIGHTS, data=IMAGES, out=tmp_path / "best", max_drop=2, runtimes="native", input="uint8", force=True
    )
    assert again.chosen is not None
    assert convnext_deploy.load(tmp_path / "best").manifest.export.format == "native"


@pytest.mark.slow
def test_the_page_of_a_run_stands_alone_and_says_how_to_repeat_it(
    run: tuple[Path, OptimizeResult, list[str]],
) -> None:
    out, result, _ = run
    page = (optimize.work_folder(out) / optimize.PAGE).read_text()
    assert page.index(result.why) < page.index("<table")
    assert "convnext-deploy optimize &#x27;a b&#x27;" in page
    for row in result.candidates:
        assert row.name in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "").replace(
        "https://matplotlib", ""
    )
    code = cli.run(["report", str(optimize.work_folder(out) / optimize.RESULT), "--out", str(out.parent / "all.html")])
    assert code == 0
    assert "Candidates: " in (out.parent / "all.html").read_text()


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_every_command_ends_with_an_example_that_the_program_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([name, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("\\\n", " ").split())
    assert words.endswith(f"Example: convnext-deploy {cli.EXAMPLES[name]}")
    group = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, cli.EXAMPLES[name].split()[1:])  # type: ignore[attr-defined]


def test_an_error_as_json_has_what_to_do_as_a_field_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["optimize", "--data", "x", "--out", "y", "--maximize", "latencyy", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"].startswith("--maximize latencyy; expected one of latency, throughput")
    assert document["hint"] == "did you mean latency?"


def test_the_table_survives_sixty_columns() -> None:
    from rich.console import Console

    from convnext_deploy.cli import optimize as shown

    row = Candidate(name="openvino-int8-linears", runtime="openvino", precision="fp32", eight_bits="int8", ms=12.345,
                    agreement=0.9912, state="not proven", reason="a long reason " * 9)  # fmt: skip
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(shown.table((row,)))
    text = console.export_text()
    assert all(len(line) <= 60 for line in text.splitlines())
    for word in ("openvino-int8-linears", "12.3", "99.1%", "not proven"):
        assert word in text
    assert text.count("reason") == 9  # nothing is cut off
