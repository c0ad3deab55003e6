"""What this machine and its Python environment are, and one-line refusals for what they lack."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .errors import MissingPackageError, plain, was_interrupted

REPORTED = (
    "torch", "timm", "torchvision", "triton", "onnx", "onnxscript", "onnx-ir", "onnxruntime",
    "openvino", "tensorrt", "tensorrt-rtx-cu13", "torch-tensorrt",
    "numpy", "pillow", "safetensors", "huggingface_hub", "transformers",
)  # fmt: skip


# Which extra of this package installs what is imported under these names. The base installation has the rest: what
# runs, evaluates, compares and times an artifact of the native engine.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "onnx", "onnxscript", "onnx_ir",
         "setuptools"),
        "export",
    ),
    "onnxruntime": "onnx", "pyarrow": "parquet",
    "openvino": "openvino", "tensorrt": "trt", "tensorrt_rtx": "trt-rtx", "torch_tensorrt": "torch-tensorrt",
    "datasets": "hf", "pycocotools": "coco", "matplotlib": "report", "pynvml": "nvml",
    "anyio": "serve", "prometheus_client": "serve", "python_multipart": "serve", "starlette": "serve",
    "tritonclient": "triton", "google": "triton", "grpc": "triton",
    "ray": "ray", "fsspec": "remote", "s3fs": "remote", "gcsfs": "remote",
    "uvicorn": "serve", "uvloop": "serve", "httptools": "serve", "simplejpeg": "serve",
}  # fmt: skip
BROUGHT_BY_EXPORT = {"onnx", "parquet"}  # extras that the extra `export` brings with it
# Whose absence is somebody's installation, and not our mistake.
PACKAGES = frozenset({
    *EXTRAS, "numpy", "PIL", "rich", "typer", "msgspec", "tomli", "scipy", "triton", "transformers",
})  # fmt: skip


@contextmanager
def needs(module: str) -> Iterator[None]:
    """Turn a missing package into one line that says which `pip install` to run.

    The body is the import statement itself, so that type checkers and import-linter see it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if _package(error) != module:
            raise
        raise MissingPackageError(import_line(error)) from None


@contextmanager
def missing_named() -> Iterator[None]:
    """Turn an import that fails for want of a package, whichever it is, into that line. A decorator too.

    Raises:
        MissingPackageError: with the `pip install` to run.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if _package(error) not in PACKAGES:  # a mistake, or the caller's own module
            raise
        raise MissingPackageError(import_line(error)) from None


def import_line(error: ModuleNotFoundError) -> str:
    """The refusal for an import that failed: its package is missing, or is of a version without that module."""
    package = _package(error)
    if missing((package,)):
        return missing_line(package)
    return f"the {package} that is installed has no module {error.name}; run: {pip_line(package)} --upgrade {package}"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def missing(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those import names that are not installed. Nothing is imported."""
    return tuple(name for name in modules if not _is_there(name))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # an import hook's refusal, or a module without a spec
        return False


def import_failure(module: str) -> str | None:
    """Why a module that is installed cannot be imported, in a few words; None where it can. It is imported.

    A shared library that it needs may be missing, or a package beside it may be of another build: a torchvision that
    does not fit its PyTorch raises RuntimeError.
    """
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        return plain(error)
    return None


def broken_line(module: str, reason: str) -> str:
    """The refusal for a module that is installed and cannot be imported: why, and what to do."""
    return f"{module} is installed and cannot be imported: {reason}; {cure_of_broken()}"


def cure_of_broken() -> str:
    """What to do where an installed package cannot be imported.

    PyTorch's index of CPU wheels and others have the same versions in different builds. pip takes torch from one and
    torchvision from another without a word, since their numbers fit. Only the label after the + tells them apart.
    """
    builds = {name: installed for name, installed in versions().items() if name in ("torch", "torchvision")}
    if len({installed.partition("+")[2] for installed in builds.values()}) < 2:
        return "install versions that fit each other"
    named = " and ".join(f"{name} {installed}" for name, installed in builds.items())
    return (
        f"install torch and torchvision from one package index, for {named} are builds of two: pip install "
        "--force-reinstall torch torchvision (and --index-url with PyTorch's CPU index, for its smaller builds)"
    )


def broken_package(error: BaseException) -> str | None:
    """The package in whose import an error was raised, as where versions do not fit each other; None: in none's."""
    package, trace = None, error.__traceback__
    while trace is not None:
        top = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if trace.tb_frame.f_code.co_name == "<module>" and top in PACKAGES:
            package = top
        trace = trace.tb_next
    return package


def missing_line(*modules: str) -> str:
    """The refusal for missing packages: the first by its name, and the command that installs all of them."""
    return f"{modules[0]} is not installed; run: {pip_line(*modules)}"


def pip_line(*modules: str) -> str:
    """The command that installs what is imported under these names."""
    extras = {EXTRAS[module] for module in modules if module in EXTRAS}
    if "export" in extras:
        extras -= BROUGHT_BY_EXPORT
    return f"pip install 'convnext-deploy[{','.join(sorted(extras))}]'" if extras else "pip install convnext-deploy"


def version() -> str:
    """This package's own version; "0+unknown" where it is not installed, as in a checkout on `PYTHONPATH`."""
    try:
        return importlib.metadata.version("convnext-deploy")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def versions() -> dict[str, str]:
    """Installed versions of everything that shapes an artifact, and Python's."""
    installed = {"python": platform.python_version(), "convnext-deploy": version()}
    for name in REPORTED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def computing(packages: Iterable[str]) -> str:
    """This machine's kind, and the versions that what it computes with these packages may depend on."""
    facts = [str(machine()["cpu"]), *sorted(set(nvidia_gpus()))]
    for package in dict.fromkeys(("numpy", "pillow", *packages)):
        try:
            facts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # its module has another name
            continue
    return ", ".join(facts)


def machine() -> dict[str, str | int]:
    """Processor, cores this process may use and a limit of their time, memory in bytes, operating system."""
    quota = cpu_quota()
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        **({} if quota is None else {"cpu_quota": f"{quota:g} cores"}),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "cpu_features": " ".join(sorted(cpu_features() & _NOTABLE)),
    }


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its control group's time allows.

    A limit of 2.5 cores is 2: a third thread would be stopped half of the time, and the others wait for it.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return bound if quota is None else max(1, min(bound, int(quota)))


@functools.cache  # sessions ask for their cores whenever a run has to wait, and these files take 0.1 ms
def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """Cores' worth of time that Linux's control groups give this process, as containers are limited; None: no limit."""
    limits = [limit for folder in _cpu_groups(proc) if (limit := _quota_of(folder)) is not None]
    return min(limits, default=None)


def _cpu_groups(proc: Path) -> Iterator[Path]:
    """This process's control group and those above it, wherever cpu limits are mounted (of either version)."""
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return  # not Linux
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "cpu" not in options):
            continue
        for _, controllers, path in groups:
            if (kind == "cgroup2") != (controllers == "") or (controllers and "cpu" not in controllers.split(",")):
                continue
            # A container sees its own group as the mount's root, whose path may be the host's.
            group = PurePosixPath(path)
            for folder in (group, *group.parents):
                yield Path(mount[4]) / folder.relative_to("/")


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None  # no such group here, or one without a limit of its own
    return None if quota in ("max", "-1") else int(quota) / int(period)


_NOTABLE = {
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimddp",  # Arm's dot products; its other names are these three
    "i8mm",
    "bf16",
    "sve",
}


# What macOS calls the features of Apple's CPUs. Those of Intel's are not asked for: it does not tell all of them, and
# one that is missing would be taken for one that the CPU lacks.
_APPLE_FEATURES = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}


def cpu_features() -> set[str]:
    """Instruction-set flags as Linux names them; empty where the system does not tell them."""
    if sys.platform == "darwin":
        return {name for asked, name in _APPLE_FEATURES.items() if _sysctl(asked) == "1"}
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpu_model() -> str:
    if sys.platform == "darwin":  # whose platform.processor() is "arm" for every one of Apple's
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    part = _cpuinfo("CPU part")  # Linux on Arm has numbers for a name: those of implementer and core
    arm = f"{platform.machine()} {_cpuinfo('CPU implementer')} {part}" if part else ""
    return _cpuinfo("model name") or arm or platform.processor() or platform.machine()


@functools.cache
def _sysctl(name: str) -> str:
    """What macOS says of itself; empty where it does not know the name."""
    command = ["/usr/sbin/sysctl", "-n", name]  # whose folder a short PATH may lack
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except OSError:
        return ""


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == field:
                    return value.strip()
    except OSError:
        return ""  # not Linux; the fields stay empty in the manifest
    return ""


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs whose driver is loaded, asked of `nvidia-smi`; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False, timeout=30)
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def nvidia_gpu_facts() -> list[dict[str, str]]:
    """Name, compute capability ("8.0") and driver version of each NVIDIA GPU, as `nvidia-smi` says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    rows = [line.split(",") for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    names = ("name", "compute_capability", "driver")
    return [dict(zip(names, (part.strip() for part in row), strict=True)) for row in rows if len(row) == 3]
