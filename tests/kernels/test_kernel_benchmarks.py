"""What the kernel benchmarks compare is the same function, and without a GPU they say one line."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from convnext_deploy.errors import PrecisionError
from convnext_deploy.models.registry import spec
from convnext_deploy.records.manifest import BatchRange

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # it takes minutes, and is PyTorch's own


def load(name: str) -> Any:
    location = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bench_dwconv_norm", "bench_expand", "bench_project", "bench_mlp"])
@pytest.mark.parametrize("batch", [2, 9])  # with the contenders of small batches, and without
def test_contenders_compute_the_same(name: str, batch: int) -> None:
    import kernel_bench

    case = kernel_bench.Case(channels=40, side=7, batch=batch, precision="fp32")
    torch.manual_seed(0)
    found = kernel_bench.errors(load(name).subject(case, "cpu"))
    compared = {contender: error for contender, error in found.items() if error is not None}
    assert {"eager", "compiled"} < set(compared)
    assert all(error < 1e-5 for contender, error in compared.items() if "tanh" not in contender)


def test_contenders_of_small_batches_are_launched_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_bench

    from convnext_deploy.kernels import launch
    from convnext_deploy.kernels.project import PARTS

    monkeypatch.setattr(launch, "capability", lambda x: (9, 0))
    monkeypatch.setattr(launch, "waits_are_operations", lambda: True)
    weight = torch.empty(768, 3072, dtype=torch.float16)

    def chosen() -> tuple[int, int, bool]:
        found = launch.fitted_launch(weight, 49, parts=PARTS)
        return found.n, found.split, found.pdl

    assert chosen() == (32, 5, True)
    assert kernel_bench.under(chosen, kernel_bench.WHOLE_K)() == (16, 1, True)
    assert kernel_bench.under(chosen, kernel_bench.WIDE_TILES)() == (64, 1, True)
    assert kernel_bench.under(chosen, kernel_bench.IN_TURN)() == (32, 5, False)
    assert chosen() == (32, 5, True)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_parts_with_and_without_kernels_compute_the_same(name: str) -> None:
    import kernel_bench

    small = spec(name, image_size=(64, 64), num_classes=5)
    seen, narrow = [], []
    for part, case, subject in load("bench_block").subjects(small, "fp32", 2, "cpu"):
        seen.append(part)
        narrow += [part] if "kernels, mlp" in subject.contenders else []
        assert all(error is not None and error < 1e-5 for error in kernel_bench.errors(subject).values()), part
        assert subject.bytes > 0
        assert subject.matrix_flop > 0
        assert case.batch == 2
    assert seen == ["stem", "stages.0", "downsamples.0", "stages.1", "downsamples.1", "stages.2", "downsamples.2",
                    "stages.3", "head"]  # fmt: skip
    assert narrow == ([] if "v2" in name else ["stages.0", "stages.1"])  # 40 and 80 channels


def test_a_stage_is_measured_in_both_ways_to_run_it() -> None:
    import kernel_bench

    bench = load("bench_block")
    case = kernel_bench.Case(channels=96, side=56, batch=32, precision="fp16")
    times = {"kernels": 4.0, "kernels, mlp": 2.0, "eager": 9.0, "compiled": 6.0}
    found = [(row.part, row.speedup) for row in bench.speedups("stages.0", case, False, times)]
    assert found == [("stages", 1.5), ("mlp", 3.0)]
    assert [row.part for row in bench.speedups("stem", case, False, {"kernels": 4.0, "compiled": 6.0})] == ["stem"]
    assert list(bench.speedups("stem", case, False, {"kernels": 4.0})) == []
    (of_v2,) = bench.speedups("stages.0", case, True, {"kernels": 4.0, "compiled": 6.0})
    assert of_v2.grn


def test_the_table_is_updated_by_part_width_type_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convnext_deploy.kernels import choice
    from convnext_deploy.records.timing import KernelMeasurement

    bench = load("bench_block")
    monkeypatch.setattr(choice, "TABLE", tmp_path / "measured.json")
    choice.TABLE.write_text("{}")

    def row(batch: int, speedup: float) -> KernelMeasurement:
        return KernelMeasurement(part="stem", channels=96, precision="fp16", batch=batch, speedup=speedup)

    bench.updated("a GPU", [row(32, 1.5), row(1, 0.9)])
    bench.updated("a GPU", [row(32, 1.6)])
    assert choice.table() == {"a GPU": [row(1, 0.9), row(32, 1.6)]}


def test_the_table_is_made_of_lines_that_another_machine_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `scripts/gpu_check` brings them home: among those of other benchmarks, V1 and V2 of one width apart."""
    from convnext_deploy.kernels import choice

    bench = load("bench_block")
    shape = {"benchmark": "block", "step": "parts", "part": "stages.1", "channels": 192, "side": 28, "batch": 256,
             "precision": "fp16", "gpu": "a GPU"}  # fmt: skip
    times = {False: {"kernels": 2.0, "eager": 9.0, "compiled": 5.0}, True: {"kernels": 4.0, "compiled": 5.0}}
    lines = [{"step": "facts", "gpus": []}, {"benchmark": "expand", "contender": "kernel", "median": 1.0}]
    lines += [
        {**shape, "grn": grn, "contender": contender, "median": median}
        for grn, medians in times.items()
        for contender, median in medians.items()
    ]
    source = tmp_path / "gpu.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(choice, "TABLE", tmp_path / "measured.json")
    choice.TABLE.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["bench_block.py", "--update", "--from", str(source)])
    bench.main()
    (rows,) = choice.table().values()
    assert [(row.part, row.grn, row.speedup) for row in rows] == [("stages", False, 2.5), ("stages", True, 1.25)]
    for name, used in (("convnext_tiny", 2.5), ("convnextv2_tiny", 1.25)):
        assert choice._speedup(spec(name), "fp16", 256, "stages.1", rows) == used


@pytest.mark.parametrize(
    ("precision", "formats"),
    [
        ("int8", ("eager",)),  # TensorRT-RTX takes half of the time
        *(
            pytest.param(precision, ("eager", "tensorrt_rtx"), marks=pytest.mark.slow)
            for precision in ("fp32", "int8", "fp8")
        ),
    ],
)
def test_the_engines_artifacts_are_what_their_names_say(
    precision: str,
    formats: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the CPU, where operations are their references; AOTInductor's kernels need a GPU."""
    from convnext_deploy.kernels import choice

    bench = load("bench_engine")
    refuse = choice.refuse
    monkeypatch.setattr(
        choice, "refuse", lambda spec, *rest: refuse(msgspec.structs.replace(spec, device="cuda"), *rest)
    )
    contenders = [("eager", "none"), ("eager", "all")]
    if "tensorrt_rtx" in formats and importlib.util.find_spec("tensorrt_rtx"):
        contenders.append(("tensorrt_rtx", "none"))
    monkeypatch.setattr(bench, "CONTENDERS", contenders)
    found = dict(bench.artifacts("random", "test_convnext", precision, BatchRange(max=2, opt=2), "cpu", tmp_path))
    assert capsys.readouterr().err == ""
    suffix = "" if precision == "fp32" else f", {precision}"
    names = [f"{format}, kernels {kernels}" for format, kernels in contenders]
    assert list(found) == [names[0], *(name + suffix for name in names[1:])]
    for name, made in found.items():
        eight_bits = bool(suffix) and name.endswith(suffix)
        assert (made.manifest.precision.quantized or 0) == (18 if eight_bits else 0)  # two linears in each of 9 blocks
        assert bool(made.manifest.export.kernels) == ("kernels all" in name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["dwconv_norm", "expand", "project", "mlp", "block", "engine"])
def test_without_a_gpu_a_benchmark_says_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"bench_{name}.py"])
    with pytest.raises(SystemExit) as ended:  # a text, which the interpreter prints before it ends with 1
        runpy.run_path(str(FOLDER / f"bench_{name}.py"), run_name="__main__")
    assert ended.value.code == "error: PyTorch finds no NVIDIA GPU here, and this benchmark measures nothing else"


@pytest.mark.parametrize("machine", ["without bf16", "with it"])
def test_what_a_machine_cannot_build_is_left_out_of_the_cpu_benchmark(
    machine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_cpu = load("bench_cpu")

    def export(*_: Any, out: Path, format: str, precision: str = "fp32", **__: Any) -> None:
        if machine == "without bf16" and (format, precision) == ("openvino", "bf16"):
            raise PrecisionError("OpenVINO runs fp32 here")

    monkeypatch.setattr(bench_cpu.api, "export", export)
    monkeypatch.setattr(bench_cpu, "draft", lambda *_, **__: None)
    names = [
        path.name
        for path in bench_cpu.artifacts(
            "atto", tmp_path, "photographs", 8, {"native", "openvino", "onnx"}, {"fp32", "bf16", "int8"}
        )
    ]
    assert ("atto-openvino-bf16" in names) == (machine == "with it")
    assert {"atto-native-bf16", "atto-openvino-fp32", "atto-onnx-w8-int8"} < set(names)
    said = "atto-openvino-bf16 is left out: OpenVINO runs fp32 here" in capsys.readouterr().out
    assert said == (machine == "without bf16")
