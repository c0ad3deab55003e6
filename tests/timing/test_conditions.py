"""Readings of a made-up /proc and /sys, and what is judged from them."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from convnext_deploy.errors import MissingPackageError
from convnext_deploy.records.timing import Conditions, GpuReading
from convnext_deploy.timing import conditions
from convnext_deploy.timing.conditions import Watch, judged

TICK = os.sysconf("SC_CLK_TCK")


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores of which this process may use two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    stat(tmp_path, busy_s=0)
    put(tmp_path, "proc/loadavg", "0.42 0.2 0.1 1/100 4242")
    return tmp_path


def stat(root: Path, busy_s: float, elsewhere_s: float = 0, stolen_s: float = 0) -> None:
    """Seconds of user time on core 0, of user time on core 1 (not ours), and of stolen time on core 2."""
    busy, elsewhere, stolen = (round(1000 + seconds * TICK) for seconds in (busy_s, elsewhere_s, stolen_s))
    rows = [f"cpu0 {busy} 0 0 500 0 0 0 0 0 0", f"cpu1 {elsewhere} 0 0 500 0 0 0 0 0 0"]
    rows += [f"cpu2 0 0 0 500 77 0 0 {stolen} 0 0", "cpu3 0 0 0 500 0 0 0 0 0 0"]
    put(root, "proc/stat", "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"]))


def watched(root: Path, **after: float) -> Conditions:
    """Two turns of next to no time, during which the counters of /proc/stat rise."""
    watch = Watch(root=root)
    with watch:
        pass
    with watch:
        stat(root, **{"busy_s": 0, **after})
    return watch.conditions()


def test_what_others_take_on_our_cores_is_seen_and_makes_it_invalid(root: Path) -> None:
    found = watched(root, busy_s=100)
    assert found.others_cores is not None
    assert found.others_cores * found.wall_s == pytest.approx(100, abs=1)
    assert "shared: other processes took" in found.problems[0]


def test_what_others_take_on_other_cores_does_not_count(root: Path) -> None:
    assert watched(root, elsewhere_s=100).problems == ()


def test_time_that_the_hypervisor_took_makes_it_invalid(root: Path) -> None:
    assert "shared: the hypervisor took" in watched(root, stolen_s=100).problems[0]


def test_what_happens_between_two_turns_does_not_count(root: Path) -> None:
    watch = Watch(root=root)
    with watch:
        pass
    stat(root, busy_s=100, stolen_s=100)
    with watch:
        pass
    assert watch.conditions().problems == ()


def test_our_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(0.0, 0.0), (2.0, 0.0)])
    monkeypatch.setattr(conditions, "_cpu_seconds", lambda _: next(readings))
    usage = iter([SimpleNamespace(ru_utime=1.0, ru_stime=0.0), SimpleNamespace(ru_utime=2.5, ru_stime=0.5)])
    monkeypatch.setattr(conditions.resource, "getrusage", lambda _: next(usage))
    watch = Watch()
    with watch:
        pass
    found = watch.conditions()
    assert found.others_cores == 0.0
    assert found.own_cores * found.wall_s == pytest.approx(2.0)


def test_thermal_events_and_quotas_make_it_invalid(root: Path) -> None:
    put(root, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 3)
    put(root, "sys/fs/cgroup/cpu.stat", "usage_usec 5\nnr_periods 9\nnr_throttled 2\nthrottled_usec 5")
    watch = Watch(root=root)
    with watch:
        put(root, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 5)
        put(root, "sys/fs/cgroup/cpu.stat", "nr_throttled 6")
    assert watch.conditions().problems == (
        "throttled: 2 thermal events of the processor",
        "throttled: the container's CPU quota stopped it 4 times",
    )


def test_energy_is_that_of_the_packages_and_survives_the_counters_wrap(root: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    for leaf, value in (("name", "package-0"), ("energy_uj", 900_000), ("max_energy_range_uj", 1_000_000)):
        put(root, f"{zone}/{leaf}", value)
    put(root, "sys/class/powercap/intel-rapl:0:0/name", "core")  # part of the package
    watch = Watch(root=root)
    with watch:
        put(root, f"{zone}/energy_uj", 400_000)
    found = watch.conditions()
    assert found.energy_j == pytest.approx(0.5)
    assert found.energy_source == "RAPL packages"


def test_frequency_and_governor_are_read(root: Path) -> None:
    for core, mhz in ((0, 3000), (1, 3200)):
        put(root, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", mhz * 1000)
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance")
    found = watched(root)
    assert found.frequency_mhz == (3100.0,) * 4
    assert found.governor == "performance"
    assert found.load_average == 0.42


def test_what_the_machine_does_not_tell_is_none_and_no_problem(tmp_path: Path) -> None:
    watch = Watch(root=tmp_path)
    with watch:
        pass
    found = watch.conditions()
    told = (found.others_cores, found.stolen_cores, found.load_average, found.governor, found.throttle_events)
    assert told == (None,) * 5
    assert (found.quota_events, found.energy_j, found.energy_source, found.gpu, found.problems) == (*(None,) * 4, ())


# GPU: a madeup NVML ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the made-up NVML answers; a test changes it."""
    state = SimpleNamespace(clock=[1980], reasons=0, pids=[os.getpid()], energy=[5000, 9000])

    class NotSupported(Exception):
        pass

    def total_energy(_: object) -> int:
        if not state.energy:
            raise NotSupported
        return state.energy.pop(0) if len(state.energy) > 1 else state.energy[0]

    module: Any = ModuleType("pynvml")
    module.NVMLError_NotSupported = NotSupported
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlClocksThrottleReasonSwPowerCap, module.nvmlClocksThrottleReasonHwThermalSlowdown = 0x4, 0x40
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetClockInfo = lambda _, kind: (
        (state.clock.pop(0) if len(state.clock) > 1 else state.clock[0]) if kind == 1 else 2619
    )
    module.nvmlDeviceGetTemperature = lambda *_: 55
    module.nvmlDeviceGetPowerUsage = lambda _: 300_000
    module.nvmlDeviceGetEnforcedPowerLimit = lambda _: 700_000
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: state.reasons
    module.nvmlDeviceGetComputeRunningProcesses = lambda _: [SimpleNamespace(pid=pid) for pid in state.pids]
    module.nvmlDeviceGetName = lambda _: "NVIDIA H100"
    module.nvmlSystemGetDriverVersion = lambda: "570.1"
    module.nvmlDeviceGetTotalEnergyConsumption = total_energy
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return state


def gpu_watched(root: Path) -> tuple[Conditions, GpuReading]:
    watch = Watch("cuda", root)
    with watch:
        pass
    found = watch.conditions()
    assert found.gpu is not None
    return found, found.gpu


def test_a_quiet_gpu_is_valid_and_its_energy_is_that_of_the_turns(nvml: SimpleNamespace, root: Path) -> None:
    found, gpu = gpu_watched(root)
    assert found.problems == ()
    assert (found.energy_j, found.energy_source) == (4.0, "NVML")
    assert (gpu.name, gpu.sm_clock_mhz, gpu.power_w, gpu.other_processes) == (
        "NVIDIA H100",
        (1980,) * 2,
        (300.0,) * 2,
        0,
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reasons": 0x44}, "throttled: the GPU's power cap, thermal (hardware)"),
        ({"pids": [os.getpid(), 999_999_999]}, "shared: 1 other processes used the GPU"),
        ({"clock": [1980, 1200]}, "throttled: the GPU's clock moved between 1200 and 1980 MHz"),
    ],
)
def test_a_gpu_that_throttles_or_is_shared_makes_it_invalid(
    nvml: SimpleNamespace, root: Path, changes: dict[str, Any], problem: str
) -> None:
    vars(nvml).update(changes)
    assert problem in gpu_watched(root)[0].problems[0]


def test_idle_clocks_are_no_throttling(nvml: SimpleNamespace, root: Path) -> None:
    nvml.reasons = 0x1
    assert gpu_watched(root)[0].problems == ()


def test_a_gpu_without_an_energy_counter_has_none(nvml: SimpleNamespace, root: Path) -> None:
    nvml.energy = []
    assert gpu_watched(root)[0].energy_j is None


def test_a_gpu_without_nvml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingPackageError, match=r"convnext-deploy\[nvml\]"):
        Watch("cuda")


def test_a_judgement_keeps_the_facts() -> None:
    facts = Conditions(
        wall_s=1.0, own_cores=2.0, others_cores=0.01, stolen_cores=0.0, load_average=0.1, frequency_mhz=(),
        governor=None, throttle_events=0, quota_events=0, energy_j=None, energy_source=None,
    )  # fmt: skip
    assert judged(facts, 2) == facts
