"""What the machine did while something was timed, and whether the timing may count.

A `Watch` is entered around each timed turn, inside the measured process, and sums up over the turns only: what happens
between them does not matter. A fact that the machine does not tell is None, never a guess.
"""

import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..env import usable_cores
from ..errors import MissingPackageError
from ..records.base import Device
from ..records.timing import Conditions, GpuReading

# Of the cores this process may use. Kernel threads and the measuring parent take about 1 %.
SHARED = 0.05
STOLEN = 0.01
HIGH_CLOCK_DROP = 0.10  # the GPU's clock after a turn beside the highest that was seen

# NVML's reasons that slow a GPU down under load; idle, application clocks and the display setting do not.
_SLOWDOWNS = {
    "SwPowerCap": "power cap", "HwSlowdown": "hardware slowdown", "SwThermalSlowdown": "thermal (software)",
    "HwThermalSlowdown": "thermal (hardware)", "HwPowerBrakeSlowdown": "power brake", "SyncBoost": "sync boost",
}  # fmt: skip


@dataclass(slots=True)
class _Sums:
    wall_s: float = 0.0
    own_s: float = 0.0
    busy_s: float | None = 0.0
    stolen_s: float | None = 0.0
    throttles: int | None = 0
    quota: int | None = 0
    energy_j: float | None = 0.0
    frequencies: list[float] = field(default_factory=list)


class Watch:
    """Sums over the timed turns of one measurement.

    Args:
        device: "cuda" also reads the GPU, which takes the package nvidia-ml-py.
        root: where /proc and /sys are found.

    Raises:
        MissingPackageError: device "cuda", and nvidia-ml-py is not installed.
    """

    def __init__(self, device: Device = "cpu", root: Path = Path("/")) -> None:
        self._root = root
        self._sums = _Sums()
        self._load = _first_number(root / "proc/loadavg")
        self._gpu = _Gpu() if device == "cuda" else None
        self._begin: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._sums.frequencies += _frequency(self._root)
        self._begin = self._read()

    def __exit__(self, *_: object) -> None:
        begin, end, sums = self._begin, self._read(), self._sums
        sums.wall_s += end["wall"] - begin["wall"]
        sums.own_s += end["own"] - begin["own"]
        sums.busy_s = _grown(sums.busy_s, begin["busy"], end["busy"])
        sums.stolen_s = _grown(sums.stolen_s, begin["stolen"], end["stolen"])
        sums.throttles = _grown(sums.throttles, begin["throttles"], end["throttles"])
        sums.quota = _grown(sums.quota, begin["quota"], end["quota"])
        used = _energy_between(begin["energy"], end["energy"])
        sums.energy_j = None if used is None or sums.energy_j is None else sums.energy_j + used
        sums.frequencies += _frequency(self._root)
        if self._gpu:
            self._gpu.read()

    def _read(self) -> dict[str, Any]:
        busy, stolen = _cpu_seconds(self._root)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "wall": time.perf_counter(), "own": usage.ru_utime + usage.ru_stime, "busy": busy, "stolen": stolen,
            "throttles": _throttle_count(self._root), "quota": _quota_count(self._root),
            "energy": self._gpu.energy() if self._gpu else _rapl(self._root),
        }  # fmt: skip

    def conditions(self) -> Conditions:
        """The sums, judged."""
        sums, wall = self._sums, max(self._sums.wall_s, 1e-9)
        own = sums.own_s / wall
        others = None if sums.busy_s is None else max(0.0, sums.busy_s / wall - own)
        gpu = self._gpu.reading() if self._gpu else None
        conditions = Conditions(
            wall_s=sums.wall_s,
            own_cores=own,
            others_cores=others,
            stolen_cores=None if sums.stolen_s is None else sums.stolen_s / wall,
            load_average=self._load,
            frequency_mhz=tuple(sums.frequencies),
            governor=_text(self._root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            throttle_events=sums.throttles,
            quota_events=sums.quota,
            energy_j=sums.energy_j,
            energy_source=None if sums.energy_j is None else "NVML" if self._gpu else "RAPL packages",
            gpu=gpu,
        )
        return judged(conditions, usable_cores())


def judged(conditions: Conditions, cores: int) -> Conditions:
    """Add the `problems` of the conditions: each is a reason why the timing must not count."""
    from msgspec.structs import replace

    problems = []
    if conditions.others_cores is not None and conditions.others_cores > SHARED * cores:
        problems.append(f"shared: other processes took {conditions.others_cores:.2f} of {cores} cores")
    if conditions.stolen_cores is not None and conditions.stolen_cores > STOLEN * cores:
        problems.append(f"shared: the hypervisor took {conditions.stolen_cores:.2f} of {cores} cores")
    if conditions.throttle_events:
        problems.append(f"throttled: {conditions.throttle_events} thermal events of the processor")
    if conditions.quota_events:
        problems.append(f"throttled: the container's CPU quota stopped it {conditions.quota_events} times")
    if conditions.gpu is not None:
        if conditions.gpu.throttle_reasons:
            problems.append(f"throttled: the GPU's {', '.join(conditions.gpu.throttle_reasons)}")
        if conditions.gpu.other_processes:
            problems.append(f"shared: {conditions.gpu.other_processes} other processes used the GPU")
        clocks = conditions.gpu.sm_clock_mhz
        if clocks and min(clocks) < (1 - HIGH_CLOCK_DROP) * max(clocks):
            problems.append(f"throttled: the GPU's clock moved between {min(clocks)} and {max(clocks)} MHz")
    return replace(conditions, problems=tuple(problems))


# Linux ----------------------------------------------------------------------------------------------------------------


def _grown(total: Any, begin: Any, end: Any) -> Any:
    return None if total is None or begin is None or end is None else total + (end - begin)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None  # not there, or not for us to read: the fact is not told


def _first_number(path: Path) -> float | None:
    text = _text(path)
    return float(text.split()[0]) if text else None


def _cpu_seconds(root: Path) -> tuple[float | None, float | None]:
    """(busy, stolen) since boot on the cores this process may use."""
    text = _text(root / "proc/stat")
    if text is None or not hasattr(os, "sched_getaffinity"):
        return None, None
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = stolen = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if name in mine:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, stolen / tick


def _frequency(root: Path) -> list[float]:
    """The mean over the cores, MHz; empty where nothing tells."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    values = [float(text) / 1e3 for text in map(_text, files) if text]
    if not values:
        lines = (_text(root / "proc/cpuinfo") or "").splitlines()
        values = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return [sum(values) / len(values)] if values else []


def _throttle_count(root: Path) -> int | None:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    values = [int(text) for text in map(_text, files) if text]
    return sum(values) if values else None


def _quota_count(root: Path) -> int | None:
    """Times that the control group ran out of its CPU quota (version 2, then 1)."""
    for name in ("sys/fs/cgroup/cpu.stat", "sys/fs/cgroup/cpu/cpu.stat"):
        for line in (_text(root / name) or "").splitlines():
            if line.startswith("nr_throttled"):
                return int(line.split()[1])
    return None


Energy = dict[str, tuple[int, int]]  # counter to (microjoules, where it starts again)


def _rapl(root: Path) -> Energy:
    """The energy of each processor package; empty where it cannot be read."""
    domains = {}
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name, energy, wraps = (_text(zone / leaf) for leaf in ("name", "energy_uj", "max_energy_range_uj"))
        if name and name.startswith("package") and energy and wraps:
            domains[zone.name] = (int(energy), int(wraps))
    return domains


def _energy_between(begin: Energy, end: Energy) -> float | None:
    """Joules between two readings, of all counters."""
    if not begin or begin.keys() != end.keys():
        return None
    return sum((end[zone][0] - start) % wraps for zone, (start, wraps) in begin.items()) / 1e6


# NVIDIA ---------------------------------------------------------------------------------------------------------------


class _Gpu:
    """The first GPU, by NVML. Written from NVML's reference; no GPU has confirmed it yet."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ModuleNotFoundError:
            raise MissingPackageError(
                "pynvml is not installed, and without it nothing tells whether the GPU throttles; run: pip install "
                "'convnext-deploy[nvml]'"
            ) from None
        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(_first_visible())
        self._clocks: list[int] = []
        self._temperatures: list[int] = []
        self._power: list[float] = []
        self._reasons: set[str] = set()
        self._others = 0
        self.read()

    def energy(self) -> Energy:
        try:
            millijoules = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError_NotSupported:
            return {}
        return {"gpu": (millijoules * 1000, 1 << 64)}

    def read(self) -> None:
        nvml, gpu = self._nvml, self._handle
        self._clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        self._temperatures.append(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        self._power.append(nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        active = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
        for name, words in _SLOWDOWNS.items():
            bit = getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
            if active & bit:
                self._reasons.add(words)
        running = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
        self._others = max(self._others, _strangers(running))

    def reading(self) -> GpuReading:
        nvml, gpu = self._nvml, self._handle
        return GpuReading(
            name=nvml.nvmlDeviceGetName(gpu),
            driver=nvml.nvmlSystemGetDriverVersion(),
            sm_clock_mhz=tuple(self._clocks),
            memory_clock_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            temperature_c=tuple(self._temperatures),
            power_w=tuple(self._power),
            power_limit_w=nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            throttle_reasons=tuple(sorted(self._reasons)),
            other_processes=self._others,
        )


def gpu_memory_of_this_process() -> int | None:
    """Bytes on the first GPU, now; None where NVML does not tell them apart by process."""
    import pynvml

    pynvml.nvmlInit()
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(_first_visible()))
    return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)


def _strangers(running: set[int]) -> int:
    """How many of these process ids are neither this process nor started by its parent, as its competitors are.

    Inside a container NVML tells the host's ids, among which this process does not find its own: then they are only
    counted.
    """
    family = {os.getpid(), os.getppid()}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        text = _text(stat)  # "<pid> (<name>) <state> <parent> ...", and the name may contain spaces
        if text and int(text.rpartition(")")[2].split()[1]) == os.getppid():
            family.add(int(stat.parent.name))
    return len(running - family) if os.getpid() in running else max(0, len(running) - len(family))


def _first_visible() -> int:
    """NVML counts all GPUs; CUDA_VISIBLE_DEVICES says which one this process calls its first."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdigit() else 0
