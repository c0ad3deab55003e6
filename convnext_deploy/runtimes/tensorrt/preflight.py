"""Whether an engine can run on this machine, before it is loaded."""

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import env
from ...processes import Group, import_path, python
from ...records.manifest import EngineRecord, Manifest
from .choose import TITLES, Name, import_module
from .files import ENGINE_FILE, read_header, read_record


@dataclass(frozen=True, slots=True)
class Preflight:
    """Whether an engine can run here: `facts` about it, and `problems` with their cures (none: it should run)."""

    facts: tuple[str, ...]
    problems: tuple[str, ...]


def preflight(
    engine: Path, name: Name | None = None, record: EngineRecord | None = None, trust: bool = False
) -> Preflight:
    """Say, before loading, what an engine needs and whether this machine has it.

    Args:
        engine: the engine file.
        name: the module it is for; None: taken from its version (TensorRT-RTX counts from 1, TensorRT from 7).
        trust: try to load it where everything else fits; an engine contains code.

    Raises:
        ArtifactError: no engine, or one that was cut short.
    """
    header = read_header(engine)
    name = name or ("tensorrt_rtx" if int(header.version.split(".")[0]) < 5 else "tensorrt")
    title = TITLES[name]
    where = "every GPU from Ampere on" if header.ampere_on else ", ".join(header.targets) or "the GPU it was built on"
    facts = [f"{title} {header.version} engine for {where}, {header.bytes / 1e6:.1f} MB"]
    if record is not None:
        facts += [f"profile: {shape_words(profile)}" for profile in record.profiles]
        facts.append(f"built in {record.build_s:.1f} s; layers: {_census_words(record.layers)}")
    problems = []
    installed = None if env.missing((name,)) else import_module(name).__version__
    package = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}[name]
    if installed is None:
        problems.append(f"{title} is not installed; run: pip install {package}=={header.version}")
    elif installed != header.version:
        problems.append(
            f"{title} {installed} is installed, the engine is of {header.version}; run: pip install "
            f"{package}=={header.version}, or export again"
        )
    gpus = env.nvidia_gpu_facts()
    if not gpus:
        problems.append("no NVIDIA GPU here (nvidia-smi lists none); the engine runs on a machine with one")
    for gpu in gpus[:1]:
        facts.append(f"GPU here: {gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}")
        sm = "sm" + gpu["compute_capability"].replace(".", "")
        fits = sm in header.targets or (header.ampere_on and int(sm[2:]) >= 80) or not header.targets
        if not fits:
            problems.append(f"the engine is for {where}, the GPU here is {sm}; export again with --trt-target {sm}")
    if gpus and not problems:
        untried = "it was not tried: others built it, and loading it runs its code; --trust loads it in a trial process"
        problems += probe(name, engine) if trust else [untried]
    return Preflight(tuple(facts), tuple(problems))


def inspected(folder: Path, manifest: Manifest, trust: bool = False) -> Preflight:
    """`preflight` of an artifact folder."""
    record = read_record(folder)
    return preflight(folder / ENGINE_FILE, _name(manifest.export.format), record, trust)


def _name(text: str) -> Name:
    return "tensorrt" if text == "tensorrt" else "tensorrt_rtx"


def shape_words(profile: dict[str, Any]) -> str:
    return ", ".join(f"{name} {' / '.join('x'.join(map(str, s)) for s in r)}" for name, r in profile.items())


def _census_words(layers: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in list(layers.items())[:6])


PROBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
errors = []
class Log(trt.ILogger):
    def __init__(self): super().__init__()
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR: errors.append(message)
log = Log()
engine = trt.Runtime(log).deserialize_cuda_engine(open(sys.argv[2], "rb").read())
print(json.dumps({"loaded": engine is not None, "errors": errors}))
"""


def probe(name: Name, engine: Path, code: str = PROBE, limit_s: float = 300) -> list[str]:
    """Deserialize in a process of its own, so that a wrong engine can crash nothing; why it failed, or nothing."""
    command = python(code, name, str(engine))
    with Group() as group:  # killed with this process
        child = group.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=import_path())
        try:
            said, complaint = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            said, complaint = "", f"no answer in {limit_s:g} s"
    child.communicate()
    if child.returncode > 128:  # a shell's word for a signal
        killed = signal.Signals(child.returncode - 128).name
        return [f"{TITLES[name]} crashed on this engine ({killed}); it is damaged or of another version, export again"]
    try:
        answer = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return [f"{TITLES[name]} could not be asked about this engine: {' '.join(complaint.split())[-300:]}"]
    if answer["loaded"]:
        return []
    reason = " ".join(answer["errors"][0].split())[:300] if answer["errors"] else "no reason given"
    return [f"{TITLES[name]} refuses this engine: {reason}; export again on this machine"]
