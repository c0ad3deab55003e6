"""Records with made-up values, one of each kind that a file can contain. Keywords change single fields."""

from typing import Any

import numpy as np

from convnext_deploy.records.accuracy import Check, EvalResult, Flip, Limits, ScoreResult, ScoreVerdict, Verdict
from convnext_deploy.records.base import SCHEMA
from convnext_deploy.records.manifest import (
    ExportSpec,
    Manifest,
    ModelSpec,
    PrecisionTruth,
    Preprocessing,
    WeightsRecord,
)
from convnext_deploy.records.optimize import Candidate, OptimizeResult
from convnext_deploy.records.timing import BenchResult, LayerKind, LayerTime, ProfileResult

MACHINE = {"cpu": "Test CPU", "cores": 2, "system": "Linux"}


def manifest(export: ExportSpec, **fields: Any) -> Manifest:
    """Of a folder that has no files: a ConvNeXt of one block a stage, eight channels wide."""
    given: dict[str, Any] = {
        "schema_version": SCHEMA, "created": "2025-01-01T00:00:00Z", "tool": "test", "export": export,
        "model": ModelSpec(architecture="custom", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
        "weights": WeightsRecord(source="random", layout="timm", random=True, tensors_sha256="0" * 64),
        "preprocessing": Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), "labels": None, "inputs": (), "outputs": (),
        "passes": (), "parity": (), "precision": PrecisionTruth(graph={}), "versions": {}, "machine": {}, "files": (),
    }  # fmt: skip
    return Manifest(**(given | fields))


def bench_row(turns: list[list[float]], **changes: Any) -> BenchResult:
    """A result with these samples by turn."""
    samples = [sample for turn in turns for sample in turn]
    facts: dict[str, Any] = {
        "created": "2026-01-01T00:00:00+00:00", "run": "a", "subject": "convnext_tiny onnx fp32",
        "model": "convnext_tiny", "runtime": "onnx", "precision": "fp32", "task": "classify",
        "image_size": (224, 224), "device": "cpu", "threads": 2, "batch": 1, "scenario": "single-stream",
        "scope": "compute", "artifact": None, "artifact_sha256": None, "artifact_bytes": None,
        "random_weights": True, "status": "valid", "samples_ms": tuple(samples),
        "turns": tuple(map(len, turns)), "turn_images_per_s": tuple(1e3 / float(np.median(turn)) for turn in turns),
        "median_ms": float(np.median(samples)), "images_per_s": 1e3 / float(np.median(samples)), "quantiles": (),
        "yardstick_ms": (4.0,) * len(turns),
        "warmup_s": 1.0, "steady": True, "load_s": 1.0, "first_inference_ms": 1.0, "peak_memory_bytes": 1,
        "conditions": None, "machine": {"cpu": "a", "cores": 2}, "versions": {},
    }  # fmt: skip
    return BenchResult(**(facts | changes))


def noisy(seed: int, level: float = 1.0, turns: int = 12) -> list[list[float]]:
    """Turns whose samples share a level of their own (2 %), so that neighbours resemble each other."""
    generator = np.random.default_rng(seed)
    return [(50 * level * generator.normal(1, 0.02) * generator.normal(1, 0.005, 20)).tolist() for _ in range(turns)]


def profile(**fields: Any) -> ProfileResult:
    made: tuple[tuple[str, LayerKind, float], ...] = (
        ("big", "GEMM", 6.0),
        ("small", "GEMM", 1.0),
        ("dw", "depthwise", 2.0),
    )
    layers: tuple[LayerTime, ...] = tuple(
        LayerTime(name=name, op="op", kind=kind, type="fp32", ms=ms) for name, kind, ms in made
    )
    given: dict[str, Any] = {
        "time": "2026-11-22T00:00:00+00:00", "artifact": "a", "artifact_sha256": "0" * 64, "format": "onnx",
        "precision": "fp32", "model": "convnext_tiny", "image_size": (224, 224), "batch": 1, "threads": 2,
        "device": "cpu", "steps": 5, "profiler": "P", "layers": layers, "layers_ms": 9.0, "wall_ms": 10.0,
        "plain_ms": 9.5, "note": None, "machine": MACHINE, "versions": {"torch": "2.15.0"},
    }  # fmt: skip
    return ProfileResult(**(given | fields))


def evaluation(**fields: Any) -> EvalResult:
    given: dict[str, Any] = {
        "artifact": "fast", "artifact_sha256": "a" * 64, "data": "val.parquet", "data_sha256": "d" * 64, "images": 200,
        "corrupt": (), "top1": 0.9, "top5": 0.99, "per_class": (), "images_per_s": 5.0, "predictions": None,
    }  # fmt: skip
    return EvalResult(**(given | fields))


def verdict(**fields: Any) -> Verdict:
    check = Check(name="top1_drop", decision="FAIL", limit=0.003, value=0.01, lower=0.005, upper=0.02)
    given: dict[str, Any] = {
        "decision": "FAIL", "limits": Limits(max_drop=0.3), "baseline": "fp32", "baseline_sha256": "0" * 64,
        "candidate": "int8", "candidate_sha256": "1" * 64, "data": "val", "data_sha256": "2" * 64, "images": 2000,
        "baseline_top1": 0.9, "candidate_top1": 0.89, "lost": 25, "gained": 5, "p_value": 0.01, "images_needed": None,
        "checks": (check,), "agreement": 0.98, "confident": 1500, "confident_flips": 3, "kl_at_least": 0.1,
        "per_class": (), "flips": (),
    }  # fmt: skip
    return Verdict(**(given | fields))


def score_result(**fields: Any) -> ScoreResult:
    given: dict[str, Any] = {
        "problem": "segmentation", "artifact": "ade20k", "artifact_sha256": "a" * 64, "data": "scenes",
        "data_sha256": "d" * 64, "images": 200, "corrupt": (), "score": 0.4321, "per_output": (), "exact": None,
        "mean_absolute_error": None, "root_mean_square_error": None, "images_per_s": 5.0, "predictions": None,
    }  # fmt: skip
    return ScoreResult(**(given | fields))


def score_verdict(**fields: Any) -> ScoreVerdict:
    check = Check(name="miou_drop", decision="PASS", limit=0.005, value=0.001, lower=-0.002, upper=0.004)
    given: dict[str, Any] = {
        "decision": "PASS", "problem": "segmentation", "limits": Limits(max_drop=0.5), "baseline": "fp32",
        "baseline_sha256": "0" * 64, "candidate": "int8", "candidate_sha256": "1" * 64, "data": "scenes",
        "data_sha256": "2" * 64, "images": 200, "baseline_score": 0.4321, "candidate_score": 0.4311,
        "standard_error": 0.001, "images_needed": None, "checks": (check,),
    }  # fmt: skip
    return ScoreVerdict(**(given | fields))


def optimize_result(**fields: Any) -> OptimizeResult:
    flips = (Flip(name="a/1.png", label=1, baseline=1, candidate=2, baseline_margin=1.5, candidate_margin=0.1),)
    rows = (
        Candidate(name="native-fp32", runtime="native", precision="fp32", state="slower", reason="slower", ms=2.0),
        Candidate(name="native-int8", runtime="native", precision="fp32", eight_bits="int8", operations=("stem",),
                  state="chosen", ms=1.0, interval_ms=(0.9, 1.1), agreement=0.9, bytes=10**6,
                  verdict=verdict(flips=flips)),
        Candidate(name="onnx-fp16", runtime="onnx", precision="fp16", state="left out", reason="no <b>fp16</b>"),
    )  # fmt: skip
    given: dict[str, Any] = {
        "created": "2026-11-27", "model": "convnext_tiny", "weights": "my.pth", "weights_sha256": "0" * 64,
        "image_size": (64, 64), "input": "uint8", "device": "cpu", "threads": None, "objective": "latency",
        "preprocessing": Preprocessing(mean=(0.5,), std=(0.5,), assumed=("crop_pct",)), "batch": 1, "max_drop": 0.5,
        "alpha": 0.05, "max_latency_ms": None, "data": "val", "images": {"calibration": 8, "selection": 8, "final": 9},
        "candidates": rows, "baseline": "native-fp32", "baseline_top1": 0.9, "order": ("native-int8",),
        "chosen": "native-int8", "why": "the fastest", "timings": (), "seconds": {"build": 2.0}, "machine": MACHINE,
        "versions": {"torch": "2"}, "command": ("convnext-deploy", "optimize"),
    }  # fmt: skip
    return OptimizeResult(**(given | fields))
