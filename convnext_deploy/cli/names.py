"""What people call commands and options elsewhere, and what options were called before."""

# What people call these commands elsewhere.
SYNONYMS = {
    "classify": "predict", "infer": "predict", "inference": "predict", "run": "predict", "evaluate": "eval",
    "test": "eval", "validate": "eval", "val": "eval", "accuracy": "eval",
    "verify": "inspect", "show": "inspect", "info": "inspect", "check": "inspect",
    "convert": "export", "compile": "export", "build": "export",
    "optimise": "optimize", "tune": "optimize", "search": "optimize", "auto": "optimize",
    "int8": "quantize", "ptq": "quantize", "calibrate": "quantize", "fp16": "half", "bf16": "half",
    "benchmark": "bench", "time": "bench", "latency": "bench", "speed": "bench",
    "server": "serve", "deploy": "serve", "triton": "package", "kserve": "package", "docker": "package",
    "compare": "gate", "diff": "gate", "models": "list", "variants": "list", "formats": "list", "ls": "list",
    "env": "doctor", "trace": "profile", "plot": "report", "update": "refit", "version": "--version", "help": "--help",
}  # fmt: skip

# What people call these options elsewhere; the first that the command has is named.
OPTION_SYNONYMS = {
    "model": ["--weights"], "checkpoint": ["--weights"], "ckpt": ["--weights"], "pretrained": ["--weights"],
    "arch": ["--variant"], "architecture": ["--variant"], "output": ["--out"], "output-dir": ["--out"], "o": ["--out"],
    "dataset": ["--data", "--calibration"], "images": ["--data"], "val": ["--data"], "calib": ["--calibration"],
    "imgsz": ["--image-size"], "img-size": ["--image-size"], "size": ["--image-size"], "b": ["--batch"],
    "batch-size": ["--batch"], "topk": ["--top"], "top-k": ["--top"], "k": ["--top"], "classes": ["--labels"],
    "half": ["--precision fp16", "--type int8"], "fp16": ["--precision fp16"], "bf16": ["--precision bf16"],
    "int8": ["--type int8", "--plan PLAN.json"], "gpu": ["--device cuda"], "cuda": ["--device cuda"],
    "cpu": ["--device cpu"], "dynamic": ["--dynamic-image-size"], "overwrite": ["--force"], "f": ["--force"],
    "yes": ["--force"], "y": ["--force"], "verbose": ["--debug"], "v": ["--debug"], "silent": ["--quiet"],
    "tolerance": ["--max-drop"], "runtimes": ["--runtime"], "backend": ["--runtime", "--format"],
    "format": ["--target", "--runtime", "--for"], "workers": ["--sessions", "--threads"], "n": ["--limit", "--images"],
}  # fmt: skip

# Options by the names that they had in 0.1, to be taken until 0.3.
_TENSORRT = (
    "target", "profile", "sides", "optimization-level", "workspace-mb", "hardware-compatible", "version-compatible",
    "refit",
)  # fmt: skip
RENAMED = {"export": {f"--{name}": f"--trt-{name}" for name in _TENSORRT}}
