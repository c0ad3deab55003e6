"""Benchmarks of made-up sessions in real processes, most of them on a clock of their own, and of one real artifact."""

import importlib.util
import json
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import timm
import torch
from sample_records import bench_row

from convnext_deploy import api, cli
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import PrecisionError, UsageError, WorkerError
from convnext_deploy.formats import pt2
from convnext_deploy.models import baselines, registry
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.records.base import Precision
from convnext_deploy.records.manifest import BatchRange, Manifest, PrecisionTruth
from convnext_deploy.records.timing import BenchResult, Ceilings
from convnext_deploy.runtimes.torch_session import TorchSession
from convnext_deploy.timing import compare, roofline
from convnext_deploy.timing.worker import Worker
from convnext_deploy.workflows import caches, contenders, counterparts
from convnext_deploy.workflows.bench import Plan, bench
from convnext_deploy.workflows.contenders import Contender, Wanted

SEGMENTERS = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_segmenter.py"
FAKES = '''
"""Sessions on a virtual clock: a step lets time pass and takes none."""
import os, random, signal, threading, time
from types import SimpleNamespace

from convnext_deploy.timing import conditions, measure; from convnext_deploy.artifact import session
from convnext_deploy.artifact.session import RunOptions, Session

NOW = [0.0]

def tick():
    NOW[0] += 1e-7
    return NOW[0]

def sleep(seconds):
    NOW[0] += max(0.0, seconds)

def virtual():
    measure.yardstick = lambda: 4.0
    time.perf_counter, time.perf_counter_ns, time.sleep = tick, lambda: round(tick() * 1e9), sleep
    conditions._cpu_seconds = lambda root: (None, None)  # others do nothing in virtual time

session.check_images = lambda images, manifest: None  # a manifest of fakes says too little

class Fake(Session):
    def __init__(self, name, ms, seed, threads, log, fault):
        manifest = SimpleNamespace(
            model=SimpleNamespace(in_chans=3, image_size=(32, 32)), preprocessing=None,
            export=SimpleNamespace(input="uint8"),
        )
        super().__init__(manifest, RunOptions(threads=threads))
        self.name, self.ms, self.log, self.fault, self.steps = name, ms, log, fault, 0
        self.random = random.Random(seed)

    def _bind(self, images):
        self.count = len(images)
        print("noise on stdout")
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{self.name} {os.getpid()} {int(images[0, 0, 0, 0])}\\n")

    def _step(self):
        self.steps += 1
        if self.fault == "segfault" and self.steps > 30:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "error" and self.steps > 30:
            raise ValueError("a runtime's own\\nerror")
        level = self.ms * (1 + 0.1 * self.steps if self.fault == "slower and slower" else 1)
        NOW[0] += level * self.count / 1e3 * self.random.lognormvariate(0, 0.01)

    def _fetch(self):
        return ()

    def _unshare(self): ...

    def _precision(self): ...

def open_fake(name, ms, seed=0, threads=None, log=None, fault=None):
    if fault == "open":
        raise OSError("no such model")
    virtual()
    if fault == "throttled":
        counts = iter(range(0, 10**6, 2))
        conditions._throttle_count = lambda root: next(counts)
    if fault == "memory":
        open_fake.kept = bytearray(os.urandom(1)) * (300 << 20)
    return Fake(name, ms, seed, threads, log, fault)

class Sleeper(Fake):
    def _step(self):
        time.sleep(self.ms / 1e3)

def open_sleeper(name, ms, threads=None):
    return Sleeper(name, ms, 0, threads, None, None)
'''

Fake = Callable[..., Contender]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """(name, milliseconds an image, further arguments) to a contender that a worker can open."""
    (tmp_path / "fakes.py").write_text(textwrap.dedent(FAKES))
    monkeypatch.syspath_prepend(tmp_path)

    def contender(name: str, ms: float, *, opener: str = "open_fake", **arguments: Any) -> Contender:
        return Contender(
            model=name, runtime="onnx", precision="fp32", task="classify", image_size=(32, 32),
            batch=BatchRange(min=1, opt=8, max=64), opener=f"fakes:{opener}",
            arguments={"name": name, "ms": ms, **arguments}, imports=("fakes",),
        )  # fmt: skip

    return contender


def measured(contenders: list[Contender], **plan: Any) -> list[BenchResult]:
    return list(bench(contenders, Plan(**{"batches": (1,), "seconds": 2.0, "warmup_limit_s": 5.0, **plan})))


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_row_holds_what_was_measured(fake: Fake) -> None:
    first, second = measured([fake("a", 10.0)], batches=(1, 4))
    assert (first.status, first.reason, first.steady) == ("valid", None, True)
    assert first.median_ms == pytest.approx(10, rel=0.01)
    assert second.median_ms == pytest.approx(40, rel=0.01)
    assert second.images_per_s == pytest.approx(100, rel=0.01)
    assert sum(first.turns) == len(first.samples_ms)
    assert len(first.turns) == len(first.turn_images_per_s) == 10
    assert first.conditions is not None
    assert first.conditions.wall_s == pytest.approx(2, rel=0.1)
    assert first.peak_memory_bytes is not None
    assert first.peak_memory_bytes > 10_000_000


def test_a_percentile_that_the_samples_cannot_carry_is_not_given_unless_it_is_asked_for(fake: Fake) -> None:
    (short,) = measured([fake("a", 10.0)])
    (long,) = measured([fake("a", 10.0)], percentile=0.99)
    p99 = [next(q for q in row.quantiles if q.fraction == 0.99) for row in (short, long)]
    assert p99[0].value_ms is None
    assert p99[1].value_ms is not None
    assert len(long.samples_ms) >= 368


def test_contenders_take_turns_in_processes_of_their_own_and_the_order_rotates(fake: Fake, tmp_path: Path) -> None:
    log = tmp_path / "log"
    measured([fake(name, 10.0, log=str(log)) for name in "abc"], seconds=1.2)
    lines = [line.split() for line in log.read_text().splitlines()]
    names, processes, _ = zip(*lines, strict=True)
    turns = "".join(names)[-18:]  # before: each is warmed up
    assert turns == "abcbcacababcbcacab"
    assert len(set(processes)) == 3
    assert str(os.getpid()) not in processes


def test_turns_rotate_among_different_real_images(fake: Fake, tmp_path: Path) -> None:
    log = tmp_path / "log"
    measured([fake("a", 10.0, log=str(log))])
    firsts = [line.split()[2] for line in log.read_text().splitlines()][-10:]
    assert firsts[:2] == firsts[4:6] == firsts[8:10]
    assert len(set(firsts[:4])) > 1


def test_an_a_a_run_is_the_same_and_a_slower_one_is_slower(fake: Fake) -> None:
    base = measured([fake("a", 10.0, seed=1)])
    again = measured([fake("a", 10.0, seed=2)])
    slow = measured([fake("a", 11.5, seed=3)])
    assert [c.verdict for c in compare.compare(base, again, 0.05)] == ["SAME"]
    (found,) = compare.compare(base, slow, 0.05)
    assert found.verdict == "SLOWER"
    assert found.ratio == pytest.approx(1.15, rel=0.01)


def test_the_ratio_of_two_contenders_comes_from_their_turns(fake: Fake) -> None:
    first, second = measured([fake("a", 10.0, seed=1), fake("b", 12.5, seed=2)])
    interval = compare.ratio_of_turns(compare.blocks_ms(second), compare.blocks_ms(first))
    assert interval is not None
    assert interval[1] <= 1.25 <= interval[2]
    assert first.run == second.run


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("segfault", "b onnx fp32: the process was killed by SIGSEGV"),
        ("error", "b onnx fp32: ValueError: a runtime's own error"),
        ("open", "b onnx fp32: OSError: no such model"),
    ],
)
def test_a_contender_that_fails_is_a_row_with_the_reason_and_the_others_go_on(
    fake: Fake, fault: str, reason: str
) -> None:
    rows = measured([fake("a", 10.0), fake("b", 10.0, fault=fault), fake("c", 10.0)])
    assert [row.status for row in rows] == ["valid", "failed", "valid"]
    assert (rows[1].reason or "").startswith(reason)
    assert len(rows[2].turns) == 10


def test_what_never_settles_is_not_steady(fake: Fake) -> None:
    (row,) = measured([fake("a", 10.0, fault="slower and slower")])
    assert (row.status, row.steady) == ("not steady", False)
    assert row.reason == "its medians did not agree within 5 s of warm-up"


def test_a_run_during_which_the_machine_throttled_is_invalid(fake: Fake) -> None:
    (row,) = measured([fake("a", 10.0, fault="throttled")])
    assert row.status == "invalid"
    assert (row.reason or "").startswith("throttled: ")


def test_peak_memory_is_the_workers_own(fake: Fake) -> None:
    small, large = measured([fake("a", 10.0), fake("b", 10.0, fault="memory")])
    assert small.peak_memory_bytes is not None
    assert large.peak_memory_bytes is not None
    assert large.peak_memory_bytes - small.peak_memory_bytes == pytest.approx(300 << 20, rel=0.1)


def test_ctrl_c_gives_what_was_measured(fake: Fake) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2 + 9:  # two warm-ups, nine turns
            raise KeyboardInterrupt

    rows: list[BenchResult] = []

    def collect() -> None:
        for row in bench([fake("a", 10.0), fake("b", 10.0)], Plan(batches=(1, 8)), progress=interrupt):
            rows.append(row)  # noqa: PERF402 - `extend` would lose what came before the interruption

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert [(row.status, row.reason, len(row.turns)) for row in rows] == [
        ("partial", "interrupted after 5 turns", 5),
        ("partial", "interrupted after 4 turns", 4),
    ]


def test_progress_counts_every_warm_up_and_turn(fake: Fake) -> None:
    told: list[tuple[int, int]] = []
    contenders = [fake("a", 10.0), fake("b", 10.0)]
    list(bench(contenders, Plan(batches=(1, 8)), progress=lambda done, total, what: told.append((done, total))))
    assert told[-1] == (44, 44)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"batches": (65,)}, "batch 65; a onnx fp32 takes 1 to 64"),
        ({"batches": (0,)}, "batch 0; expected at least 1"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"percentile": 1.0}, "--percentile 100; expected between 0 and 100"),
        ({"scenario": "server"}, "takes a latency limit: --slo-ms"),
        ({"slo_ms": 5.0}, "takes a latency limit: --slo-ms"),
        ({"scenario": "server", "slo_ms": 0.0}, "--slo-ms 0.0; expected milliseconds above 0"),
        ({"streams": (2,)}, "scenario single-stream has one stream"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fake: Fake, plan: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measured([fake("a", 10.0)], **plan)


def test_a_worker_survives_an_error_and_says_how_it_died(fake: Fake) -> None:
    worker = Worker("w")
    try:
        with pytest.raises(WorkerError, match=r"^w: ModuleNotFoundError: No module named 'nowhere'$"):
            worker.call("call", function="nowhere:f", arguments={})
        assert worker.call("call", function="os:getpid", arguments={}) != os.getpid()
        with pytest.raises(WorkerError, match=r"^w: the process ended with exit code 3$"):
            worker.call("call", function="os:_exit", arguments={"status": 3})
    finally:
        worker.close()


# Scenarios -----------------------------------------------------------------------------------------------------------


def test_a_server_carries_the_rate_that_the_queue_allows(fake: Fake) -> None:
    (row,) = measured([fake("a", 10.0)], scenario="server", slo_ms=100.0)
    assert row.server is not None
    assert row.server.queries_per_s == row.images_per_s
    # With a batch of 1 it is M/D/1, whose 99th percentile of 10 services is reached at a load of about 0.8.
    assert 65 < (row.server.queries_per_s or 0) < 95


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Python's own handler, which a test of the whole program in this process takes away at its end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_search_for_a_rate_tells_how_many_runs_are_left(fake: Fake) -> None:
    """It stood at 0 of 1 for its minute, with no time left."""
    told: list[tuple[int, int, str]] = []
    plan = Plan(scenario="server", slo_ms=20.0, batches=(1,), seconds=0.1)
    (row,) = bench([fake("a", 2.0)], plan, progress=lambda *step: told.append(step))
    assert row.server is not None
    runs = len(row.server.trials)
    during = [(done, total) for done, total, what in told if "arrivals a second" in what]
    assert during[0][0] == 0
    assert during[0][1] >= 3
    assert {done for done, _ in during} >= set(range(runs))
    assert all(done < total for done, total in during[:-1])
    assert during[-1][0] == during[-1][1] == runs + 1  # and the contender's end


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_keeps_the_runs_of_arrivals_that_a_server_has_ended(fake: Fake) -> None:
    said: list[str] = []
    interrupted: list[float] = []
    timers: list[threading.Timer] = []

    guard, over = threading.Lock(), threading.Event()

    def strike() -> None:
        with guard:  # once the measurement is over it would end pytest
            if not over.is_set():
                interrupted.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGINT)

    def interrupt(done: int, total: int, what: str) -> None:
        if "arrivals a second" in what and what not in said:
            said.append(what)
            if len(said) == 3:  # in the midst of a run
                timers.append(threading.Timer(0.02, strike))
                timers[0].start()

    rows: list[BenchResult] = []

    def collect() -> None:
        for row in bench([fake("a", 2.0)], Plan(scenario="server", slo_ms=20.0, batches=(1,)), progress=interrupt):
            rows.append(row)  # noqa: PERF402 - `extend` would lose what came before the interruption

    def guarded() -> None:
        try:
            collect()
        finally:
            with guard:
                over.set()

    with pytest.raises(KeyboardInterrupt):
        guarded()
    timers[0].join()
    (row,) = rows
    assert row.server is not None
    assert (row.status, row.reason) == ("partial", "interrupted after 2 runs of arrivals")
    assert len(row.server.trials) == 2
    assert time.perf_counter() - interrupted[0] < 2
    rate = row.server.trials[0].queries_per_s
    assert said[0].startswith(f"{rate:,.0f} arrivals a second at a ")


def test_offline_streams_add_up(fake: Fake) -> None:
    contender = fake("a", 20.0, opener="open_sleeper")
    one, two = measured([contender], scenario="offline", streams=(1, 2), seconds=0.4, batches=(2,))
    assert (one.streams, two.streams) == (1, 2)
    assert one.images_per_s is not None
    assert two.images_per_s is not None
    assert one.images_per_s <= 2 / 0.020
    assert two.images_per_s > 1.3 * one.images_per_s


# Contenders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({n for f in baselines.FAMILIES.values() for n in f.values()}))
def test_every_counterpart_is_a_model_of_timm(name: str) -> None:
    assert timm.is_model(name)
    assert timm.is_model(baselines.WINDOW_12.get(name, name))


def test_counterparts_follow_the_paper() -> None:
    assert baselines.counterpart("swin", "convnext_tiny", (224, 224)) == "swin_tiny_patch4_window7_224"
    assert baselines.counterpart("swin", "convnextv2_base", (384, 384)) == "swin_base_patch4_window12_384"
    assert baselines.counterpart("resnet18", "convnext_tiny", (224, 224)) == "resnet18"


@pytest.mark.parametrize(
    ("word", "architecture", "message"),
    [
        ("resnet", "convnext_large", "resnet has no counterpart of convnext_large; it has tiny, small, base"),
        (
            "swim",
            "convnext_tiny",
            "--compare swim: neither one of swin, deit, resnet nor a model of timm; did you mean",
        ),
    ],
)
def test_an_unknown_counterpart_is_refused(word: str, architecture: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        baselines.counterpart(word, architecture, (224, 224))


def test_formats_that_hold_convnext_only_have_no_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "built", lambda wanted, say: list(wanted))
    (group,) = contenders.of_variants(
        ["tiny"], ["swin"], ["eager", "native", "onnx"], ["fp32"], [(224, 224)], "classify", "cpu", print
    )
    assert [(want.model.partition("_")[0], want.runtime) for want in group] == [
        ("convnext", "eager"), ("convnext", "native"), ("convnext", "onnx"), ("swin", "onnx"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "task", "message"),
    [
        ("fp32", "segment", "runtime native does not take --task segment; expected one of torch, .*onnx"),
        ("fp16", "classify", "runtime native does not have fp16; expected --precision "),
    ],
)
def test_a_runtime_asked_for_by_name_is_refused_and_not_left_out(
    precision: Any, task: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "built", lambda wanted, say: list(wanted))
    with pytest.raises(UsageError, match=message):
        contenders.of_variants(["tiny"], [], ["torch", "native"], [precision], [(64, 64)], task, "cpu", print)


def test_rows_of_a_convnext_say_how_near_they_are_to_the_bound(fake: Fake) -> None:
    spec = registry.spec("convnext_tiny")
    ceilings = Ceilings(
        name="made up", source="made up", matrix_tflops={"fp32": 1.0}, vector_tflops=1.0, copy_gb_s=1000.0
    )
    float_, int8, other = (fake(name, 10.0) for name in "abc")
    contenders = [
        msgspec.structs.replace(float_, spec=spec),
        msgspec.structs.replace(int8, spec=spec, eight_bits="int8"),
        other,
        msgspec.structs.replace(other),  # of the same name: `--compare` may name what an artifact is
    ]
    rows = list(bench(contenders, Plan(batches=(1,), seconds=1.0), ceilings=ceilings))
    flop = 2 * sum(multiply_accumulates(spec).values())
    for row in rows[:2]:
        assert row.images_per_s is not None
        assert row.tflops == pytest.approx(flop * row.images_per_s / 1e12)
    assert rows[0].median_ms is not None
    assert rows[0].percent_of_bound == pytest.approx(
        100 * roofline.bound_ms(spec, "fp32", 1, ceilings) / rows[0].median_ms
    )
    assert rows[1].percent_of_bound is None  # two types: no one bound
    assert rows[1].subject == "b onnx int8"
    assert (rows[2].tflops, rows[2].percent_of_bound) == (None, None)


def test_a_baseline_computes_what_timm_does() -> None:
    module = baselines.Baseline("test_resnet", (64, 64), "classify")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(module(images), module.body(images))
        half = baselines.Baseline("test_resnet", (64, 64), "classify", "bf16")(images)
    assert half.dtype == torch.float32
    assert torch.allclose(half, module(images), atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_timms_own_module_opens_and_runs_in_every_precision(precision: Precision) -> None:
    want = Wanted(
        model="test_resnet", runtime="torch", precision=precision, task="classify", image_size=(64, 64), device="cpu"
    )
    session = counterparts.open_timm(msgspec.to_builtins(want), threads=1)
    (logits,) = session.run(np.zeros((2, 3, 64, 64), np.float32))
    assert logits.shape == (2, 1000)
    assert set(session.precision().executed or ()) == {precision}


def test_maps_of_a_baseline_come_as_convnexts_do() -> None:
    module = baselines.Baseline("swin_tiny_patch4_window7_224", (64, 96), "features")
    with torch.inference_mode():
        shapes = [tuple(x.shape) for x in module(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]


def test_a_model_without_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="returns no maps at the strides"):
        baselines.Baseline("deit_tiny_patch16_224", (224, 224), "features")


def test_a_counterpart_that_runs_in_another_type_than_asked_for_is_refused_and_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced_format: Callable[..., None]
) -> None:
    """As an export is: else a table calls fp16 what ran in bf16."""

    class Other(TorchSession):
        def _precision(self) -> PrecisionTruth:
            return PrecisionTruth(graph={"bf16": 1.0}, executed={"bf16": 1.0})

    def load(folder: Path, manifest: Manifest, options: RunOptions) -> TorchSession:
        return Other(pt2._program(folder / "model.pt2").module(check_guards=False), manifest, options)

    monkeypatch.chdir(tmp_path)
    replaced_format("pt2", load=load)
    want = Wanted(
        model="test_resnet", runtime="pt2", precision="fp32", task="classify", image_size=(64, 64), device="cpu"
    )
    with pytest.raises(PrecisionError, match="fp32 was asked for, but the built graph has 100% bf16"):
        counterparts.build_baseline(msgspec.to_builtins(want))
    assert not want.folder.exists()
    rejected = want.folder.with_name(f"{want.folder.name}.rejected")
    assert (rejected / "rejected.json").is_file()
    assert [cache.entries for cache in caches.found()][-1] == 1
    monkeypatch.setattr(caches, "_libraries", lambda clean: None)  # of the user who runs the tests
    monkeypatch.setattr(caches, "_timings", lambda clean: None)
    caches.clean()
    assert not rejected.exists()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_baseline_is_built_verified_and_reused(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_format: Callable[[str], None]
) -> None:
    need_format(runtime)
    monkeypatch.chdir(tmp_path)
    want = Wanted(
        model="test_resnet", runtime=runtime, precision="fp32", task="classify", image_size=(64, 64), device="cpu"
    )
    said: list[str] = []
    (made,) = contenders.built([want], said.append)
    assert made.broken is None
    assert made.parity is not None
    assert made.parity < 1e-5
    assert contenders.built([want], said.append) == [made]
    assert said == [f"building test_resnet {runtime} fp32"]
    session = counterparts.open_baseline(str(want.folder), "cpu", 1)
    source = baselines.Baseline("test_resnet", (64, 64), "classify")
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    with torch.inference_mode():
        expected = source(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(images)[0], expected, rtol=1e-3, atol=1e-4)
    with (want.folder / "model.onnx" if runtime == "onnx" else want.folder / "model.bin").open("ab") as file:
        file.write(b"x")
    contenders.built([want], said.append)
    assert len(said) == 2  # it was changed, so it is built again


@pytest.mark.slow
def test_the_command_measures_saves_compares_and_writes_for_ci(
    artifact_of: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(artifact_of("eager").path)
    common = ["bench", path, "--batch", "1,4", "--seconds", "0.3", "--max-slowdown", "5%"]
    code = cli.run([*common, "--scope", "jpeg", "--save", "base.json"])
    words = capsys.readouterr().out
    assert code == 0, words
    assert "batch 4, 64x64 pixels, classify, jpeg" in words
    rows = compare.read_results(Path("base.json"))
    assert [(row.batch, row.scope, row.artifact) for row in rows] == [(1, "jpeg", path), (4, "jpeg", path)]
    assert all(row.artifact_sha256 == artifact_of("eager").sha256 for row in rows)
    assert all(row.load_s is not None and row.load_s > 0 for row in rows)

    halved = [json.loads(line) for line in Path("base.json").read_text().splitlines()]
    for row in halved:  # as if it had been a hundred times as fast before
        row |= {"yardstick_ms": [4.0] * len(row["turns"]), "samples_ms": [ms / 100 for ms in row["samples_ms"]]}
    Path("fast.json").write_text("".join(json.dumps(row) + "\n" for row in halved))
    monkeypatch.setattr(
        "convnext_deploy.timing.compare._incomparable", lambda old, new: None
    )  # others use this machine too
    files = ["--junit", "junit.xml", "--markdown", "verdicts.md"]
    code = cli.run([*common, "--scope", "jpeg", "--against", "fast.json", "--json", *files])
    document = json.loads(capsys.readouterr().out)
    assert code == 1
    assert [c["verdict"] for c in document["comparisons"]] == ["SLOWER", "SLOWER"]
    assert 'failures="2"' in Path("junit.xml").read_text()
    assert Path("verdicts.md").read_text().count("| SLOWER |") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--junit", "j.xml"], "give --against RESULTS"),
        (["--max-slowdown", "5x"], "--max-slowdown 5x; expected a share such as 5%"),
        (["--batch", "one"], "--batch one; expected whole numbers"),
        (["--scenario", "burst"], "--scenario burst; expected one of single-stream"),
        (["--scope", "all"], "--scope all; expected one of compute"),
        (["--variant", "tini"], "unknown variant 'tini'"),
        (["--runtime", "onxx", "--variant", "tiny"], "unknown format 'onxx'\nhint: did you mean onnx?"),
        (["--against", "nowhere.json"], "nowhere.json cannot be read"),
        (["--save", "no/such/folder.json"], "is no folder"),
        (["build/none"], "build/none is not a folder"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_artifacts_take_no_options_of_models_that_are_built() -> None:
    with pytest.raises(UsageError, match="artifacts have their own variant"):
        list(api.bench(["somewhere"], variants=["tiny"]))


def test_a_segmenters_rows_come_one_a_call_until_none_is_left(tmp_path: Path) -> None:
    """Neither a row that cannot be built, nor one that is never valid, is chosen for ever."""
    location = importlib.util.spec_from_file_location("bench_segmenter", SEGMENTERS)
    assert location is not None
    assert location.loader is not None
    script = importlib.util.module_from_spec(location)
    location.loader.exec_module(script)
    (tmp_path / "tiny-onnx-fp32").mkdir()
    (tmp_path / "tiny-onnx-fp32" / "manifest.json").touch()
    rows, out = ["torch", "onnx-int8", "onnx-fp32", "torch.compile"], tmp_path / "results.jsonl"
    out.touch()  # as a call leaves it that was stopped before its first result

    def chosen_after(*subjects: str, **changes: Any) -> list[str]:
        results = [bench_row([[1.0]], subject=f"convnext_tiny {subject}", **changes) for subject in subjects]
        out.write_bytes(out.read_bytes() + compare.encode_results(results))
        chosen: list[str] = script.next_rows(rows, "tiny", tmp_path, out)
        return chosen

    assert chosen_after() == ["torch", "onnx-fp32"]
    assert chosen_after("torch fp32", "onnx fp32", status="failed") == ["torch", "torch.compile"]
    assert chosen_after("torch fp32", "torch.compile fp32") == ["torch", "onnx-fp32"]
    assert chosen_after(*["onnx fp32"] * 3, status="failed") == ["torch", "onnx-fp32"]
    assert chosen_after("onnx fp32", status="failed") == []
