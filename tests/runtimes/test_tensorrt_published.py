"""What this package asks of TensorRT, beside the interface that TensorRT's own bindings publish.

TensorRT's libraries are several gigabytes and need a GPU; its bindings are a small wheel. They load beside libraries
that only have the right names, and then tell every class, method and signature. TensorRT-RTX, whose engines the other
tests build, has nearly the same interface: what differs is listed here, and has to stay behind a condition.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import convnext_deploy

pytestmark = [
    pytest.mark.skipif(find_spec("tensorrt_bindings") is None, reason="tensorrt-cu13-bindings is not installed"),
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

SOURCES = Path(convnext_deploy.__file__).parent
OF_RTX_ONLY = {
    "ComputeCapability", "CudaGraphStrategy", "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability", "IRuntimeConfig.cuda_graph_strategy",
}  # fmt: skip
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
COMPARE = """
import json, re, sys
import tensorrt_bindings as published
import tensorrt_rtx as tried
used, differ, same = set(json.loads(sys.argv[1])), [], []
def signature(thing):
    line = (thing.__doc__ or "").strip().partition("\\n")[0]
    # A module, a namespace or an interface's I says nothing; TensorRT's builder has a wrapper without a signature.
    line = re.sub(r"tensorrt(_rtx)?_bindings\\.tensorrt(_rtx)?\\.|nvinfer1::|nvonnxparser::I?", "", line).strip()
    return None if "*args" in line else line
for name in dir(tried):
    kind = getattr(tried, name)
    if name in used and not hasattr(published, name):
        differ.append(name)
    if not isinstance(kind, type) or not hasattr(published, name):
        continue
    for attribute in used & set(dir(kind)):
        if attribute.startswith("_"):
            continue
        mine, theirs = getattr(kind, attribute), getattr(getattr(published, name), attribute, None)
        full = name + "." + attribute
        if theirs is None or None not in (signature(mine), signature(theirs)) and signature(mine) != signature(theirs):
            differ.append(full)
        else:
            same.append(full)
print(json.dumps([published.__version__, sorted(differ), len(same)]))
"""


def attributes_used() -> set[str]:
    files = [*(SOURCES / "runtimes" / "tensorrt").glob("*.py"), *(SOURCES / "formats").glob("tensorrt*.py")]
    return {
        node.attr for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    }


def test_what_is_asked_of_tensorrt_is_in_its_published_interface_with_the_same_signature(tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    major = metadata.version("tensorrt_cu13_bindings").partition(".")[0]
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(source)]
        subprocess.run(command, check=True)
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(sorted(attributes_used()))],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    published, differ, same = json.loads(ran.stdout.splitlines()[-1])
    assert set(differ) == OF_RTX_ONLY, published
    assert same > 60  # it did compare


def test_what_only_tensorrt_rtx_has_stands_behind_a_condition_on_it() -> None:
    names = {name.rpartition(".")[2] for name in OF_RTX_ONLY}
    found = set()
    for file in (SOURCES / "runtimes" / "tensorrt").glob("*.py"):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            used = {name for name in names if f".{name}" in line}
            if used:
                found |= used
                before = "\n".join(lines[max(0, number - 12) : number + 1])
                assert "tensorrt_rtx" in before or "hasattr" in before or "getattr" in before or "targets" in before, (
                    file.name, line)  # fmt: skip
    assert found == names
