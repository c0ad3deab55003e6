"""The native CPU engine as a whole: networks against PyTorch, on every path of this CPU."""

import copy
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from native_networks import SIZE, folded, images_for, network_of, quantize_

from convnext_deploy.errors import ArtifactError, InputError, UsageError
from convnext_deploy.models import registry
from convnext_deploy.models.convnext import ConvNeXt
from convnext_deploy.models.costs import multiply_accumulates
from convnext_deploy.native import library, packed
from convnext_deploy.native.engine import Engine
from convnext_deploy.quantization.plan import operations, products
from convnext_deploy.records.manifest import ModelSpec

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="the native engine needs a C++ compiler"
)
ISAS = library.isas() if any(map(shutil.which, library.COMPILERS)) else ()


def outputs_of(model: ConvNeXt, images: torch.Tensor) -> tuple[np.ndarray[Any, Any], ...]:
    """In float64."""
    with torch.no_grad():
        result = copy.deepcopy(model).double()(images if model.takes_uint8 else images.double())
    return tuple(t.numpy() for t in (result if isinstance(result, tuple) else (result,)))


def run(path: Path, images: torch.Tensor, threads: int = 1, isa: str | None = None) -> tuple[np.ndarray[Any, Any], ...]:
    batch, *sides = images.shape
    height, width = sides[:2] if images.dtype == torch.uint8 else sides[1:]
    engine = Engine(path, batch, height, width, threads, isa=isa)
    engine.bind(images.numpy())
    engine.run()
    outputs = tuple(output.copy() for output in engine.outputs)
    engine.close()
    return outputs


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


Written = Callable[..., tuple[ConvNeXt, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(spec, uint8 input, precision) to the folded module and its packed file, made once."""
    made: dict[Any, tuple[ConvNeXt, Path]] = {}

    def write(spec: ModelSpec, uint8: bool = False, precision: str = "fp32") -> tuple[ConvNeXt, Path]:
        key = (spec, uint8, precision)
        if key not in made:
            model = folded(spec, uint8)
            if precision == "int8":
                quantize_(model, images_for(model, 4, spec.image_size, seed=1))
            path = tmp_path_factory.mktemp("packed") / "network.cnxt"
            packed.write(network_of(model, "bf16" if precision == "bf16" else "fp32"), path)
            made[key] = model, path
        return made[key]

    return write


# Every part in which the 31 architectures differ, in the smallest of them that has it.
VARIED = (
    "test_convnext",  # widths that do not fill a block of 16 channels, GELU's tanh form
    "test_convnext3",  # kernels of 7, 5, 5 and 3, SiLU
    "convnext_zepto_rms",  # SimpleNorm
    "convnext_zepto_rms_ols",  # two convolutions in the stem, activation between them
    "convnext_atto",
    "convnext_atto_rms",  # RMSNorm
    "convnext_atto_ols",  # the tiered stem
    "convnextv2_atto",  # GRN
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", VARIED)
def test_float_outputs_are_those_of_pytorch_to_rounding(name: str, isa: str, written: Written) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10))
    images = images_for(model, 2)
    (found,), (expected,) = run(path, images, 2, isa), outputs_of(model, images)
    assert distance(found, expected) < 2e-6


@pytest.mark.parametrize("name", sorted(registry.VARIANTS))
def test_every_architecture_of_the_family_runs(name: str, tmp_path: Path) -> None:
    """All 31, narrowed to a sixteenth and one block a stage where they are large; what they differ in stays."""
    spec = registry.spec(name, image_size=SIZE, num_classes=7)
    if max(spec.dims) > 400:
        dims = [max(8, width // 16 // 4 * 4) for width in spec.dims]
        spec = msgspec.structs.replace(spec, dims=tuple(dims), depths=(1, 1, 1, 1))
        spec = msgspec.structs.replace(spec, head_hidden=spec.head_hidden and 96)
    model = folded(spec, uint8=True)
    packed.write(network_of(model), tmp_path / "network.cnxt")
    images = images_for(model, 1)
    (found,), (expected,) = run(tmp_path / "network.cnxt", images), outputs_of(model, images)
    assert distance(found, expected) < 5e-6  # raw pixels reach 255, and their mean is part of the bias


@pytest.mark.parametrize("task", ["classify", "embed", "features"])
@pytest.mark.parametrize("head", ["pool_norm", "norm_pool"])
def test_every_task_gives_what_pytorch_gives(task: Any, head: Any, tmp_path: Path) -> None:
    spec = ModelSpec(
        architecture="custom", depths=(1, 1, 1, 1), dims=(8, 24, 40, 56), task=task, head=head, head_hidden=30,
        num_classes=9, in_chans=1, image_size=SIZE,
    )  # fmt: skip
    model = folded(spec)
    packed.write(network_of(model), tmp_path / "network.cnxt")
    images = images_for(model, 2)
    found, expected = run(tmp_path / "network.cnxt", images, 2), outputs_of(model, images)
    assert [a.shape for a in found] == [b.shape for b in expected]
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("levels", "norms"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((2, 3, 4), (2, 3, 4)),
        ((1, 3), ()),  # two stages without a map, one of which is not computed
        ((1, 2, 4), (2, 4)),
    ],
)
def test_maps_go_through_their_norms_and_come_from_the_levels_that_are_asked_for(
    levels: Any, norms: Any, isa: str, tmp_path: Path
) -> None:
    """Widths that fill no block of 16 channels, and tiles that reach into the next image."""
    spec = ModelSpec(
        architecture="custom", depths=(1, 1, 1, 1), dims=(8, 24, 40, 56), task="features", image_size=SIZE,
        levels=levels, level_norms=norms,
    )  # fmt: skip
    model = folded(spec)
    packed.write(network_of(model), tmp_path / "network.cnxt")
    images = images_for(model, 5, (96, 160))
    found, expected = run(tmp_path / "network.cnxt", images, 3, isa), outputs_of(model, images)
    assert [a.shape for a in found] == [b.shape for b in expected]
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6
    assert np.array_equal(run(tmp_path / "network.cnxt", images[2:3], 1, isa)[-1], found[-1][2:3])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["test_convnext", "convnextv2_atto"])
def test_outputs_do_not_depend_on_threads_runs_or_the_rest_of_the_batch(
    name: str, precision: str, isa: str, written: Written
) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10), True, precision)
    images = images_for(model, 8)
    (expected,) = run(path, images, 1, isa)
    for threads in (2, 3):
        assert np.array_equal(run(path, images, threads, isa)[0], expected)
    assert np.array_equal(run(path, images[3:6], 2, isa)[0], expected[3:6])
    assert np.array_equal(run(path, images[7:], 3, isa)[0], expected[7:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "size",
    [
        (32, 32), (32, 160),
        (36, 60),  # maps of odd sides: downsampling drops a row and a column
        (45, 67), (63, 33),  # the stem drops some too, where it is padded it rounds up
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "uint8"), [("test_convnext3", False), ("test_convnext3", True), ("convnext_zepto_rms_ols", True)]
)
def test_any_size_from_32_pixels_is_right(
    name: str, uint8: bool, size: tuple[int, int], isa: str, written: Written
) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10), uint8)
    images = images_for(model, 3, size)
    (found,), (expected,) = run(path, images, 3, isa), outputs_of(model, images)
    assert distance(found, expected) < 5e-6  # raw pixels reach 255, and their mean is part of the bias


@pytest.mark.parametrize("stem", ["patch", "overlap_tiered"])
def test_maps_of_any_size_are_right_and_counted(stem: Any, tmp_path: Path) -> None:
    spec = ModelSpec(
        architecture="custom", depths=(1, 1, 1, 1), dims=(8, 24, 40, 56), task="features", stem=stem,
        image_size=(69, 99),
    )  # fmt: skip
    model = folded(spec)
    packed.write(network_of(model), tmp_path / "network.cnxt")
    images = images_for(model, 2, (69, 99))
    found, expected = run(tmp_path / "network.cnxt", images, 2), outputs_of(model, images)
    assert [a.shape for a in found] == [b.shape for b in expected]
    assert [a.shape[2:] for a in found] == list(spec.map_sizes())
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6
    engine = Engine(tmp_path / "network.cnxt", 1, 69, 99, 1)
    assert sum(engine.multiply_accumulates.values()) == sum(multiply_accumulates(spec).values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["test_convnext2", "convnext_atto_ols"])
def test_int8_at_an_odd_size_is_the_simulation(name: str, isa: str, written: Written) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10), True, "int8")
    images = images_for(model, 2, (45, 67))
    (found,), (simulated,) = run(path, images, 2, isa), outputs_of(model, images)
    exact, _ = written(registry.spec(name, image_size=SIZE, num_classes=10), True)
    assert distance(found, simulated) < 1.25 * distance(simulated, outputs_of(exact, images)[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["test_convnext2", "convnext_atto", "convnextv2_atto", "convnext_atto_ols"])
def test_bf16_outputs_are_as_near_as_bf16_is(name: str, isa: str, written: Written) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10), True, "bf16")
    images = images_for(model, 2)
    (found,), (expected,) = run(path, images, 2, isa), outputs_of(model, images)
    assert 1e-5 < distance(found, expected) < 1e-2  # one rounding is 2^-9; PyTorch's own bf16 is at twice this


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float32"])
@pytest.mark.parametrize("name", ["test_convnext2", "convnext_atto", "convnextv2_atto", "convnext_atto_ols"])
def test_int8_outputs_are_those_of_the_plan_s_simulation(name: str, uint8: bool, isa: str, written: Written) -> None:
    """To within quantization noise: one code that float32 rounds otherwise moves others in every layer that follows.

    The simulation in float32 is itself half as far from the simulation in float64 as that is from the float network.
    """
    spec = registry.spec(name, image_size=SIZE, num_classes=10)
    model, path = written(spec, uint8, "int8")
    images = images_for(model, 4)
    (found,), (simulated,) = run(path, images, 2, isa), outputs_of(model, images)
    exact, _ = written(spec, uint8)
    (float_outputs,) = outputs_of(exact, images)
    noise = distance(simulated, float_outputs)
    assert distance(found, simulated) < 1.25 * noise
    assert distance(found, float_outputs) < 1.25 * noise
    first, second = np.sort(simulated, 1)[:, :-3:-1].T
    clear = first - second > 4 * noise * simulated.std()
    assert clear.any()
    assert (found.argmax(1) == simulated.argmax(1))[clear].all()


@pytest.mark.parametrize("isa", ISAS)
def test_one_block_s_codes_are_those_of_the_simulation(isa: str, tmp_path: Path) -> None:
    """Before rounding noise has built up: one quantized product, in an otherwise exact network."""
    spec = registry.spec("test_convnext2", image_size=SIZE, num_classes=10)
    for operation in ("stages.0.0.expand", "stages.1.0.project", "downsamples.1", "head", "stem"):
        model = folded(spec)
        images = images_for(model, 3)
        quantize_(model, images, only=(operation,))
        path = tmp_path / "network.cnxt"
        packed.write(network_of(model), path)
        (found,), (expected,) = run(path, images, 2, isa), outputs_of(model, images)
        exact = outputs_of(folded(spec), images)[0]
        assert distance(found, expected) < 0.1 * distance(expected, exact), operation


def test_products_tell_the_type_that_multiplied_them(written: Written) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    for isa in ISAS:
        engine = Engine(path, 1, *SIZE, 2, isa=isa)
        assert engine.isa == isa
        assert engine.products == {"fp32": 0, "bf16": 0, "int8": 13}
        engine.bind(np.zeros((1, *SIZE, 3), np.uint8))
        parts = engine.profile()
        assert len({(part.operation, part.part) for part in parts}) == len(parts)
        assert {part.executed for part in parts if part.part in ("expand", "project", "downsample")} == {"int8"}
        assert all(part.ms >= 0 for part in parts)
        engine.close()
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "bf16")
    for isa in ISAS:
        engine = Engine(path, 1, *SIZE, 1, isa=isa)
        engine.bind(np.zeros((1, *SIZE, 3), np.uint8))
        executed = {part.executed for part in engine.profile() if part.part == "expand"}
        assert executed == {"bf16" if isa == "amx" or isa.endswith("_bf16") else "fp32"}


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto_ols"])
def test_times_are_named_as_plans_name_operations(name: str, written: Written) -> None:
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10))
    engine = Engine(path, 1, *SIZE, 1)
    engine.bind(images_for(model, 1).numpy())
    found = [part.name for part in engine.profile() if part.part != "wait"]
    ordered = list(dict.fromkeys("stem" if name in ("stem.0", "stem.1") else name for name in found))
    assert ordered == list(operations(model))


def test_multiply_accumulates_are_those_of_the_module(written: Written) -> None:
    model, path = written(registry.spec("convnext_atto_ols", image_size=SIZE, num_classes=10), True, "int8")
    engine = Engine(path, 2, *SIZE, 1)
    counts = multiply_accumulates(model.spec)
    assert sum(engine.multiply_accumulates.values()) == sum(counts.values())
    paths = {f"{path}.weight" for path in products(model).values()}
    assert engine.multiply_accumulates["int8"] == sum(n for name, n in counts.items() if name in paths)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_in_one_line(written: Written, tmp_path: Path) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    content = path.read_bytes()
    cases = {
        b"": "is empty",
        content[:-64]: "its header says",
        b"X" + content[1:]: "wrong first 8 bytes",
        content[:8] + b"\x09" + content[9:]: "version 9; this library reads version 1",
        content[:40]: "shorter than its header",
        content[: 64 + 24] + b"\xff" * 8 + content[64 + 32 :]: "operation 0",
    }
    for index, (damaged, line) in enumerate(cases.items()):
        broken = tmp_path / f"{index}.cnxt"
        broken.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=line) as error:
            Engine(broken, 1, *SIZE, 1)
        assert "\n" not in str(error.value)
        if damaged:
            with pytest.raises(ArtifactError, match=line):
                Engine(damaged, 1, *SIZE, 1)
    with pytest.raises(ArtifactError, match="No such file"):
        Engine(tmp_path / "missing.cnxt", 1, *SIZE, 1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((0, 64, 64, 1), "batch 0"),
        ((1, 31, 64, 1), "31x64"),
        ((1, 64, 0, 1), "64x0"),
        ((1, 2**20, 32, 1), "1048576x32"),
        ((1, 64, 64, 0), "0 threads"),
        ((-1, 64, 64, 1), "batch -1"),
        ((60_000, 32_768, 32_768, 1), "pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments: tuple[int, int, int, int], line: str, written: Written) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    with pytest.raises(UsageError, match=line):
        Engine(path, *arguments)


def test_a_batch_of_another_shape_or_type_is_refused(written: Written) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    engine = Engine(path, 1, *SIZE, 1)
    with pytest.raises(InputError, match="no images are bound"):
        engine.run()
    with pytest.raises(InputError, match="expected uint8"):
        engine.bind(np.zeros((1, *SIZE, 3), np.float32))
    with pytest.raises(InputError, match=r"expected uint8 \(1, 64, 96, 3\)"):
        engine.bind(np.zeros((2, *SIZE, 3), np.uint8))


def test_an_unknown_path_is_refused_with_those_there_are(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    with pytest.raises(UsageError, match=r"no path 'mmx'; it has .*portable"):
        Engine(path, 1, *SIZE, 1, isa="mmx")
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    assert Engine(path, 1, *SIZE, 1).isa == "portable"


def test_a_session_from_before_a_fork_is_refused_in_the_child(written: Written) -> None:
    _, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    code = f"""
import os, numpy as np
from pathlib import Path
from convnext_deploy.errors import UsageError
from convnext_deploy.native.engine import Engine
engine = Engine(Path({str(path)!r}), 1, 64, 96, 3)
engine.bind(np.zeros((1, 64, 96, 3), np.uint8))
engine.run()
child = os.fork()
if child == 0:
    try:
        engine.run()
    except UsageError as error:
        engine.close()
        engine = Engine(Path({str(path)!r}), 1, 64, 96, 3)
        engine.bind(np.zeros((1, 64, 96, 3), np.uint8))
        engine.run()
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
engine.run()
engine.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_engine_is_loaded_without_torch() -> None:
    code = "import sys, convnext_deploy.native.engine as e; e.library.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_sessions_of_one_file_run_at_once(written: Written) -> None:
    model, path = written(registry.spec("test_convnext2", image_size=SIZE, num_classes=10), True, "int8")
    images = [images_for(model, 2, seed=seed) for seed in range(4)]
    expected = [run(path, batch)[0] for batch in images]
    engines = [Engine(path, 2, *SIZE, 2) for _ in images]
    for engine, batch in zip(engines, images, strict=True):
        engine.bind(batch.numpy())

    def run_often(engine: Engine) -> None:
        for _ in range(20):
            engine.run()

    threads = [threading.Thread(target=run_often, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine, output in zip(engines, expected, strict=True):
        assert np.array_equal(engine.outputs[0], output)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are held to one core")
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])  # a V2 block meets four times as often
def test_threads_that_have_no_core_of_their_own_cost_little(name: str, written: Written) -> None:
    """All on one core, beside a process that keeps it busy: 90 to 270 times one thread's time where they spin."""
    model, path = written(registry.spec(name, image_size=SIZE, num_classes=10), True, "int8")
    images, cores = images_for(model, 1).numpy(), os.sched_getaffinity(0)
    one = min(cores)
    busy = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}}); print(flush=True)\nwhile True: pass"],
        stdout=subprocess.PIPE,
    )
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        os.sched_setaffinity(0, {one})  # the engine's threads inherit it
        medians = []
        for threads in (1, 3):
            engine, times = Engine(path, 1, *SIZE, threads), []
            engine.bind(images)
            for _ in range(41):
                start = time.perf_counter()
                engine.run()
                times.append(time.perf_counter() - start)
            engine.close()
            medians.append(sorted(times)[20])
    finally:
        os.sched_setaffinity(0, cores)
        busy.kill()
        busy.communicate()
    assert medians[1] < 12 * medians[0]
