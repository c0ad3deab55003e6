"""What a session of PyTorch's asks of PyTorch on a GPU, without one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.runtimes import torch_compiled, torch_session
from convnext_deploy.runtimes.torch_session import TorchSession, whole_float32

GRAPH: Any = SimpleNamespace(export=SimpleNamespace(kernels=(), precision="fp32", device="cuda"), program=None)


def package(path: str, records: dict[str, bytes]) -> None:
    """One of PyTorch's zip files."""
    writer = torch._C.PyTorchFileWriter(path)
    for name, content in records.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def switches() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def _both_on() -> Iterator[None]:
    before = switches()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_aotinductor_package_is_loaded_so_that_a_cuda_graph_can_be_captured(
    cuda_graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> None:
        asked.append(options)
        raise RuntimeError("no package")

    monkeypatch.setattr(torch_session, "check_device", lambda options: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    with pytest.raises(ConvNextDeployError, match="no package"):
        torch_compiled.load(tmp_path, SimpleNamespace(), RunOptions(device="cuda", cuda_graph=cuda_graph))  # type: ignore[arg-type]
    assert asked == [{"run_single_threaded": cuda_graph}]


@pytest.mark.parametrize(
    ("precision", "device", "allowed"),
    [("fp32", "cuda", False), ("fp16", "cuda", True), ("bf16", "cuda", True), ("fp32", "cpu", True)],
)
def test_a_session_in_fp32_on_a_gpu_computes_without_tf32(
    precision: str, device: Any, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def call(images: torch.Tensor) -> torch.Tensor:
        seen.append(switches())
        return images

    monkeypatch.setattr(torch_session, "check_device", lambda options: None)
    manifest: Any = SimpleNamespace(export=SimpleNamespace(precision=precision))
    TorchSession(call, manifest, RunOptions(device=device))._computed(torch.zeros(1))
    assert seen == [(allowed, allowed)]
    assert switches() == (True, True)


def test_the_first_of_two_sessions_to_end_does_not_bring_tf32_back() -> None:
    first, second = whole_float32("fp32", "cuda"), whole_float32("fp32", "cuda")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == (False, False)
    second.__exit__(None, None, None)
    assert switches() == (True, True)


def test_an_error_inside_puts_the_switches_back() -> None:
    def fails() -> None:
        with whole_float32("fp32", "cuda"):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        fails()
    assert switches() == (True, True)


def test_aotinductor_compiles_fp32_for_a_gpu_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def compile(program: Any, package_path: str, **options: Any) -> None:
        seen.append(switches())
        package(package_path, {})

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    torch_compiled.build(GRAPH, tmp_path)
    assert seen == [(False, False)]


def test_an_aotinductor_package_names_no_folder_of_the_machine_and_keeps_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor_alice"))
    torch_folder = Path(torch.__file__).parents[1]
    library = b"\x7fELF".join(
        f"{name}\0".encode()
        for name in (
            torch_folder / "torch/include/utils.h",
            tmp_path / "inductor_alice/c1/model.wrapper.cpp",
            home / ".venv/include",
            home,
            f"{home}2/other",  # another's, which is no part of it
            "/usr/include/stdio.h",
        )
    )
    records = {"data/model.so": library, "data/model.cpp": f"// g++ {home}/a.cpp -I{torch_folder}/torch\n".encode()}

    def compile(program: Any, package_path: str, **options: Any) -> None:
        package(package_path, records)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    torch_compiled.build(GRAPH, tmp_path)
    reader = torch._C.PyTorchFileReader(str(tmp_path / torch_compiled.FILE))
    found = {name: reader.get_record(name) for name in records}
    assert [len(found[name]) for name in records] == [len(record) for record in records.values()]
    for folder in (torch_folder, tmp_path / "inductor_alice", home):
        assert not any(f"{folder}/".encode() in record or f"{folder}\0".encode() in record for record in found.values())
    assert b"//torch/include/utils.h\0" in found["data/model.so"]
    assert f"{home}2/other".encode() in found["data/model.so"]
    assert b"\0\x7fELF/usr/include/stdio.h\0" in found["data/model.so"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pt2"] == [torch_compiled.FILE]
