"""What is said of this machine and its Python, where something that is asked for is not there."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import env


def test_a_checkout_that_is_not_installed_has_a_version_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert env.version() == "0+unknown"
    assert env.versions()["convnext-deploy"] == "0+unknown"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert env.version() == env.versions()["convnext-deploy"]


def limited(
    folder: Path, mount: str, group: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> float | None:
    """What is found where the control groups of a process look like this."""
    root = folder / "mounted"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    (folder / "cgroup").write_text(group + "\n")
    (folder / "mountinfo").write_text(f"1 2 0:3 / /proc rw - proc proc rw\n4 2 0:5 / {root} rw - {mount}\n")
    found = env.cpu_quota(folder)
    monkeypatch.setattr(env, "cpu_quota", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return found


@pytest.mark.parametrize(
    ("mount", "group", "files", "quota", "cores"),
    [
        ("cgroup2 cgroup2 rw", "0::/", {"cpu.max": "200000 100000"}, 2.0, 2),  # a container
        ("cgroup2 cgroup2 rw", "0::/", {"cpu.max": "250000 100000"}, 2.5, 2),  # a third thread would be stopped
        ("cgroup2 cgroup2 rw", "0::/", {"cpu.max": "50000 100000"}, 0.5, 1),
        ("cgroup2 cgroup2 rw", "0::/", {"cpu.max": "max 100000"}, None, 8),
        ("cgroup2 cgroup2 rw", "0::/", {"cpu.max": "1600000 100000"}, 16.0, 8),  # more than the cores
        ("cgroup2 cgroup2 rw", "0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0, 3),
        ("cgroup2 cgroup2 rw", "0::/", {}, None, 8),  # the root group has no limit
        (
            "cgroup cgroup rw,cpu,cpuacct",
            "4:cpu,cpuacct:/docker/1f",  # the host's path, whose group is the mount's root
            {"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"},
            4.0,
            4,
        ),
        (
            "cgroup cgroup rw,cpu",
            "4:cpu:/job",
            {"job/cpu.cfs_quota_us": "-1", "job/cpu.cfs_period_us": "100000"},
            None,
            8,
        ),
        ("cgroup cgroup rw,cpuset", "3:cpuset:/", {"cpu.cfs_quota_us": "1", "cpu.cfs_period_us": "1"}, None, 8),
    ],
)
def test_a_container_s_limit_of_cpu_time_counts_as_cores(
    mount: str,
    group: str,
    files: dict[str, str],
    quota: float | None,
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert limited(tmp_path, mount, group, files, monkeypatch) == quota
    assert env.usable_cores() == cores
    assert env.machine().get("cpu_quota") == (None if quota is None else f"{quota:g} cores")


def test_the_limit_is_read_once_since_sessions_ask_for_their_cores_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = env.usable_cores()
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("it was read again"))
    assert env.usable_cores() == cores


def test_no_limit_is_found_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert env.cpu_quota(tmp_path) is None


def test_an_arm_cpu_is_named_by_its_numbers_and_has_the_features_that_linux_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is neither a model name nor a line of flags."""
    lines = {"CPU implementer": "0x41", "CPU part": "0xd40", "Features": "fp asimd asimddp i8mm bf16 sve"}
    monkeypatch.setattr(env, "_cpuinfo", lambda field: lines.get(field, ""))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = env.machine()
    assert found["cpu"] == "aarch64 0x41 0xd40"
    assert found["cpu_features"] == "asimddp bf16 i8mm sve"


def test_an_apple_cpu_is_named_by_the_system_and_has_the_features_that_it_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an M1 answers, by Apple's reference of these names: there is no /proc. Made up, since no Mac was at hand."""
    said = {
        "machdep.cpu.brand_string": "Apple M1",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "0",
    }
    asked: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        path, option, name = command
        assert (path, option) == ("/usr/sbin/sysctl", "-n")
        asked.append(name)
        unknown = "" if name in said else f"sysctl: unknown oid '{name}'\n"
        return subprocess.CompletedProcess(command, int(bool(unknown)), f"{said.get(name, '')}\n", unknown)

    env._sysctl.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(env.subprocess, "run", run)
    monkeypatch.setattr(env, "_cpuinfo", lambda field: "")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    try:
        assert env._cpu_model() == "Apple M1"
        assert env.cpu_features() == {"asimddp"}
        assert env.cpu_features() == {"asimddp"}
        assert len(asked) == len(set(asked)) == 4  # each is asked once a process
    finally:
        env._sysctl.cache_clear()


def test_a_mac_without_the_command_is_named_by_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> Any:
        raise FileNotFoundError

    env._sysctl.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(env.subprocess, "run", run)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    try:
        assert env._cpu_model() == "x86_64"
        assert env.cpu_features() == set()
    finally:
        env._sysctl.cache_clear()
