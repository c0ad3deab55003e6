"""Other weights for an engine that was built to take them.

`refit` has never run: TensorRT-RTX 1.7.1, whose interface it is written from, needs a GPU for it.
"""

from pathlib import Path

import msgspec

from ... import env
from ...artifact.manifest import Artifact
from ...errors import BuildError, UsageError
from ...records.manifest import EngineRecord
from .build import make_logger
from .choose import TITLES, Name, import_module
from .files import ENGINE_FILE, read_record, save_record, write_engine


def refittable(artifact: Artifact) -> Path:
    """The engine of an artifact whose weights can be replaced.

    Raises:
        UsageError: it is no engine, cannot be refitted, or there is no GPU.
    """
    spec = artifact.manifest.export
    if spec.tensorrt is None or spec.format not in TITLES:
        raise UsageError(f"{artifact.path} is {spec.format}; only TensorRT engines are refitted, export it again")
    if spec.tensorrt.refit == "none":
        raise UsageError(
            f"{artifact.path} was not exported with --trt-refit refit or --trt-refit strip; export it again"
        )
    if not env.nvidia_gpus():
        raise UsageError("refitting an engine needs an NVIDIA GPU, and there is none here")
    return artifact.path / ENGINE_FILE


def refit(name: Name, engine: Path, onnx: Path, folder: Path) -> EngineRecord:
    """A copy of a refittable engine in `folder`, with the weights of an ONNX file of the same graph.

    Raises:
        BuildError: the engine cannot be loaded, or the weights do not fit it.
    """
    trt = import_module(name)
    log = make_logger(trt)
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine.read_bytes())
    if loaded is None:
        raise BuildError(f"{TITLES[name]} cannot load {engine}: {log.reason()}")
    refitter = trt.Refitter(loaded, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(onnx)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.reason()
        raise BuildError(f"the weights do not fit {engine}: {' '.join(reason.split())}")
    absent = refitter.get_missing_weights()
    if absent:
        raise BuildError(f"the weights for {', '.join(absent[:3])} are missing; the checkpoint is of another model")
    if not refitter.refit_cuda_engine():
        raise BuildError(f"{TITLES[name]} cannot refit {engine}: {log.reason()}")
    settings = loaded.create_serialization_config()
    settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # a stripped engine would leave them out again
    settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    built = loaded.serialize_with_config(settings)
    write_engine(folder / ENGINE_FILE, memoryview(built))
    record = read_record(engine.parent)
    record = msgspec.structs.replace(record, engine_bytes=built.nbytes)
    save_record(folder, record)
    return record
