"""The CPU engine for 64-bit Arm, cross-compiled and run on emulated CPUs, each of which has to take its own path.

`scripts/check_arm` runs the other test files of this folder there, in a Python for Arm.
"""

import collections
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from golden_networks import GOLDEN, NETWORKS, SIDE, assert_kept, images

from convnext_deploy.native import compiler

COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
LACKING = [tool for tool in (COMPILER, EMULATOR, DISASSEMBLER) if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(LACKING), reason=f"no {', '.join(LACKING)} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
    ),
]
# QEMU's models, and the paths that their kernels report: the best first. `max` has all that QEMU emulates.
CPUS = {
    "cortex-a53": ("neon", "portable"),
    "cortex-a72": ("neon", "portable"),
    "neoverse-n1": ("neon_dotprod", "neon", "portable"),
    "max": ("neon_bf16", "neon_dotprod", "neon", "portable"),
}
every_cpu = pytest.mark.parametrize("cpu", CPUS)
FP32, BF16, INT8 = range(3)  # as `csrc/format.h` numbers them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `selftest`, which needs nothing of the system, and of every unit's object file."""
    folder = tmp_path_factory.mktemp("arm")
    units = compiler.units("aarch64") | {"selftest": ()}
    jobs = [
        [COMPILER, *compiler.FLAGS, "-Werror", *flags, "-c", str(compiler.SOURCES / f"{name}.cpp"), "-o",
         str(folder / f"{name}.o")]
        for name, flags in units.items()
    ]  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs))
    for job in done:
        assert job.returncode == 0, job.stderr
    objects = map(str, sorted(folder.glob("*.o")))
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", str(folder / "selftest")], check=True)
    return folder


def emulated(built: Path, cpu: str, *arguments: object) -> bytes:
    command = [EMULATOR, "-cpu", cpu, str(built / "selftest"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, (done.stdout[-500:] + done.stderr).decode(errors="replace")
    return done.stdout


@every_cpu
def test_products_on_every_path_of_a_cpu_are_those_of_integers_and_float64(built: Path, cpu: str) -> None:
    """Codes of the whole range, often the outermost ones: 40 shapes of each type."""
    said = emulated(built, cpu, "products", 40, 7).decode()
    assert said.splitlines() == [f"{path}: 120 products" for path in CPUS[cpu]]


@every_cpu
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_files_compute_what_they_did(name: str, cpu: str, built: Path, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    shape = (2, SIDE, SIDE, 3) if network.input == "uint8" else (2, 3, SIDE, SIDE)
    images(shape, np.dtype(network.input)).tofile(tmp_path / "images")
    with np.load(GOLDEN / f"{name}-1.npz") as kept:
        shapes = [output.shape for output in kept.values()]
    for path in CPUS[cpu]:
        written = emulated(
            built, cpu, "outputs", GOLDEN / f"{name}-1.cnxt", tmp_path / "images", path, 2, SIDE, SIDE, 2
        )
        values = np.frombuffer(written, np.float32)
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        assert len(values) == ends[-1]
        found = [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
        assert_kept(name, found)


@every_cpu
@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_threads_and_sessions_gives_the_same_outputs(name: str, cpu: str, built: Path) -> None:
    path = GOLDEN / f"{name}-1.cnxt"
    said = emulated(built, cpu, "threads", path, 32, 64, 4, 4).decode()
    runs, wrong = re.findall(r"(\d+) runs, (\d+) wrong", said)[0]
    assert int(runs) > 16
    assert wrong == "0"
    said = emulated(built, cpu, "run", path, 3, 45, 67, 3).decode()
    assert [line.split(":")[0] for line in said.splitlines()] == list(CPUS[cpu])


def test_damaged_files_are_opened_or_refused(built: Path) -> None:
    said = emulated(built, "max", "fuzz", GOLDEN / "classifier-1.cnxt", 20_000, 7).decode()
    counts = [int(n) for n in re.findall(r"(\d+) (?:inputs|refused|opened)", said)]
    assert counts[0] == counts[1] + counts[2] >= 20_000
    assert min(counts) > 1000  # both sides of the check are reached


def loops(built: Path, unit: str) -> dict[str, collections.Counter[str]]:
    """How often each instruction stands in the longest loop of every product's function; "stack" counts its uses."""
    command = [DISASSEMBLER, "-d", "-C", "--no-show-raw-insn", str(built / f"{unit}.o")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for title, body in re.findall(r"^[0-9a-f]+ <.*?(multiply\w*<[^>]*>)\(.*>:\n((?:.+\n)*)", text, re.MULTILINE):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)(.*)$", body, re.MULTILINE)
        places = [int(place, 16) for place, _, _ in lines]
        longest: list[tuple[str, str, str]] = []
        for end, (_, name, rest) in enumerate(lines):
            target = re.match(r"\s*([0-9a-f]+)", rest) if name.startswith("b.") else None
            if target and int(target[1], 16) in places[: end + 1]:
                loop = lines[places.index(int(target[1], 16)) : end + 1]
                longest = max(longest, loop, key=len)
        found[title] = collections.Counter(name for _, name, _ in longest)
        found[title]["stack"] = sum("[sp" in rest for _, _, rest in longest)
    return found


@pytest.mark.parametrize(
    ("unit", "type", "rows", "instructions", "spilled"),
    [
        ("neon", FP32, 6, {"fmla": 96}, 2),  # 16 outputs, four steps
        ("neon", BF16, 4, {"fmla": 128}, 8),
        ("neon", INT8, 2, {"smull": 32, "smull2": 32, "sadalp": 64}, 0),
        ("neon_dotprod", FP32, 6, {"fmla": 96}, 2),
        ("neon_dotprod", BF16, 4, {"fmla": 128}, 8),
        ("neon_dotprod", INT8, 6, {"sdot": 96}, 0),
        ("neon_bf16", FP32, 6, {"fmla": 96}, 2),
        ("neon_bf16", BF16, 6, {"bfmmla": 24}, 0),  # two steps
        ("neon_bf16", INT8, 6, {"usmmla": 24}, 0),
    ],
)
def test_the_inner_loops_are_made_of_the_instructions_that_they_are_written_for(
    unit: str, type: int, rows: int, instructions: dict[str, int], spilled: int, built: Path
) -> None:
    """And all but a few of their sums stay in registers."""
    of_type = {title: counts for title, counts in loops(built, f"kernels_{unit}").items() if f"<{type}u, " in title}
    assert len(of_type) == rows  # one function for every number of rows
    (largest,) = (counts for title, counts in of_type.items() if f"<{type}u, {rows}, 1>" in title)
    assert {name: largest[name] for name in instructions} == instructions
    assert largest["stack"] <= spilled


def test_what_every_cpu_runs_has_no_instruction_that_some_lack(built: Path) -> None:
    newer = re.compile(
        r"\t((?:[su]|us)dot|(?:[su]|us)mmla|bf(?:cvtn?2?|dot|mmla|mlal[bt])|cas[alp]*|ld(?:add|clr|set)[al]*|ptrue)\t"
    )
    for path in built.glob("*.o"):
        if path.stem in ("kernels_neon_dotprod", "kernels_neon_bf16"):
            continue
        command = [DISASSEMBLER, "-d", "--no-show-raw-insn", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert not newer.findall(text), path.name


def test_every_source_of_a_path_is_compiled_for_one_kind_of_machine() -> None:
    paths = {path.stem for path in compiler.SOURCES.glob("kernels_*.cpp")}
    assert paths == {"kernels_portable"} | compiler.X86.keys() | compiler.ARM.keys()
    assert compiler.units("arm64") == compiler.units("aarch64")
