"""How near `optimize` comes to the fastest artifact that passes, which only an exhaustive run knows.

    python benchmarks/bench_optimize.py build [--weights W --data D]     optimize, then everything else: minutes
    python benchmarks/bench_optimize.py time                             on a quiet machine, a minute

`build` runs `optimize`. Then it builds every runtime and type that runs here, drops none, and judges each on the same
final images. `time` measures the chosen artifact beside all that passed, interleaved, and writes their ratio.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from records import append

from convnext_deploy import api, formats
from convnext_deploy.accuracy import gate
from convnext_deploy.artifact import manifest
from convnext_deploy.data import numbering
from convnext_deploy.data.image_source import with_one_label
from convnext_deploy.formats.base import Format
from convnext_deploy.models.source import Source
from convnext_deploy.quantization.plan import LoadedPlan
from convnext_deploy.records.accuracy import Limits
from convnext_deploy.records.manifest import BatchRange
from convnext_deploy.records.timing import BenchResult
from convnext_deploy.timing import compare
from convnext_deploy.timing.measure import quantile
from convnext_deploy.workflows import bench, contenders, optimize
from convnext_deploy.workflows.agenda import Agenda
from convnext_deploy.workflows.candidates import Goal, candidate, floats, machine_here, rest_of
from convnext_deploy.workflows.evaluate import Images
from convnext_deploy.workflows.race import Race
from convnext_deploy.workflows.workshop import Workshop

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "fashion-mnist"
TARGET = 1.03  # times the fastest: what `optimize` is to stay within
SECONDS = 2.0  # of timing, a candidate
NEAR = 1.5  # times the fastest of a first, short measurement: what takes part in the second


class State(msgspec.Struct, kw_only=True):
    """What `build` leaves for `time`."""

    weights: str
    data: str
    max_drop: float
    chosen: str  # the candidate's name
    passed: dict[str, bool]
    reasons: dict[str, str]
    optimize_s: float


class Everything(Race):
    """A race without hurdles: each candidate is built and judged."""

    def build_all(self, names: Sequence[Format]) -> None:
        plans_of: dict[str, LoadedPlan] = {}
        for fmt in names:
            for row in floats(fmt, self.goal.device):
                self._set(row)
            if fmt.eight_bits is None or fmt.kernels:
                continue
            rest = rest_of(fmt, self.goal.device, self.workshop.machine)
            whole = self._drafts().whole(fmt.name, rest)
            for suffix, plan in (("", whole), ("linears", self._drafts().linears(whole))):
                row = candidate(fmt, rest, "int8", suffix=suffix)
                self._set(row)
                plans_of[row.name] = plan
        for name in list(self.rows):
            self._build([name], plans_of)

    def judge_all(self) -> dict[str, bool]:
        """By name: the exact ones pass as they are, the others on the final images."""
        there = [name for name, row in self.rows.items() if row.state == "built"]
        baseline = next(name for name in there if self.rows[name].exact)
        limits = Limits(max_drop=self.goal.max_drop, alpha=self.goal.alpha)
        before = self._side(baseline, "final")
        return {
            name: self.rows[name].exact or gate.judge(before, self._side(name, "final"), limits).decision == "PASS"
            for name in there
        }


def build(args: argparse.Namespace) -> None:
    out = args.out / "best"
    done = api.optimize(
        args.weights, data=args.data, out=out, max_drop=args.max_drop, input=args.input, force=True, say=tell
    )
    source = Source.of(args.weights)
    goal = Goal(
        images=Images(data=args.data), calibration=None, max_drop=args.max_drop, alpha=0.05, objective="latency",
        batch=1, max_latency_ms=None, runtimes=(), input=args.input, device="cpu", threads=None,
    )  # fmt: skip
    images, classes = goal.images.opened()
    loaded = source.load()
    whole = numbering.numbered(with_one_label(images), loaded.model.spec.num_classes, loaded.labels, classes)
    folder = args.out / "everything"
    folder.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(
        folder=folder, source=source, input=args.input, batch=BatchRange(min=1, opt=1, max=32), device="cpu",
        threads=None, machine=machine_here((), "cpu"),
    )  # fmt: skip
    race = Everything(workshop, loaded, goal, *optimize._sets(whole, None), tell, Agenda(lambda view: None), {})
    try:
        race.build_all([formats.get(name) for name in workshop.machine.runtimes])
    finally:
        workshop.close()
    assert done.chosen is not None
    state = State(
        weights=done.weights,
        data=done.data,
        max_drop=args.max_drop,
        chosen=done.chosen,
        passed=race.judge_all(),
        reasons={name: row.reason for name, row in race.rows.items() if row.reason},
        optimize_s=sum(done.seconds.values()),
    )
    (args.out / "state.json").write_bytes(manifest.encode(state))
    tell(f"{sum(state.passed.values())} of {len(state.passed)} pass; now: {sys.argv[0]} time --out {args.out}")


def time(args: argparse.Namespace) -> None:
    state = msgspec.json.decode((args.out / "state.json").read_bytes(), type=State)
    names = [name for name, passes in state.passed.items() if passes]
    first = measured(args.out, names, args.seconds / 4)
    least = min(min(row.samples_ms) for row in first.values())
    names = [name for name in names if min(first[name].samples_ms) <= NEAR * least]
    rows = measured(args.out, names, args.seconds)
    fastest = min(names, key=lambda name: rows[name].median_ms or 0.0)
    ratio = compare.ratio_of_turns(compare.blocks_ms(rows["optimize"]), compare.blocks_ms(rows[fastest]))
    medians = {name: quantile(row.samples_ms, 0.5) for name, row in (first | rows).items()}
    append(
        {
            "benchmark": "optimize", "weights": state.weights, "data": state.data, "max_drop": state.max_drop,
            "chosen": state.chosen, "fastest": fastest, "optimize_s": state.optimize_s,
            "ratio": None if ratio is None else ratio[0], "ratio_95": None if ratio is None else ratio[1:],
            "within_target": None if ratio is None else ratio[0] <= TARGET,
            "median_ms": {name: median.value_ms for name, median in medians.items()},
            "status": {name: row.reason or row.status for name, row in rows.items()},
            "did_not_pass": [name for name, passes in state.passed.items() if not passes],
            "not_built": state.reasons,
            "samples": {name: row.samples_ms for name, row in rows.items()},
        },
        "optimize",
    )  # fmt: skip


def measured(out: Path, names: Sequence[str], seconds: float) -> dict[str, BenchResult]:
    """The chosen artifact, as "optimize", and the others, interleaved."""
    entries = {"optimize": out / "best"} | {name: out / "everything" / name for name in names}
    participants = [
        msgspec.structs.replace(contenders.of_artifact(path, "cpu", trust=True), label=name)
        for name, path in entries.items()
    ]
    plan = bench.Plan(batches=(1,), seconds=seconds, warmup_limit_s=2.0)
    rows = bench.bench(participants, plan, progress=lambda done, total, what: None)
    return {row.subject.split()[-1]: row for row in rows}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("build", "time"))
    parser.add_argument("--weights", default=str(EXAMPLE / "model.safetensors"))
    parser.add_argument("--data", default=str(EXAMPLE / "test-2000.parquet"))
    parser.add_argument("--input", default="uint8")
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("build/bench-optimize"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a candidate")
    args = parser.parse_args()
    {"build": build, "time": time}[args.step](args)


if __name__ == "__main__":
    main()
