"""Triton kernels compiled for a GPU that is not there, and what their machine code consists of."""

import collections
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)

JUMP = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?BRA[.\w]* (?:!?U?P\w+, )?0x([0-9a-f]+)", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    registers: int
    stack_bytes: int  # spilled
    shared_bytes: int
    threads: int
    opcodes: "collections.Counter[str]"
    order: tuple[str, ...]  # opcodes as they stand in memory
    jumps: tuple[tuple[int, int], ...]  # branches: from which place in it to which

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values()) - self.opcodes["NOP"]

    def first(self, *starts: str) -> int:
        """Where the first opcode stands that starts so; the end where there is none."""
        places = (place for place, opcode in enumerate(self.order) if opcode.startswith(starts))
        return next(places, len(self.order))

    def share(self, *opcodes: str) -> float:
        return sum(self.opcodes[opcode] for opcode in opcodes) / self.instructions


def compiled(
    kernel: Any, types: dict[str, str], *, sm: int, num_warps: int, num_stages: int = 3, **constants: Any
) -> Code:
    """Compile for compute capability `sm` / 10. `types`: of run-time arguments; pointers are aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, type in types.items() if type.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces a change of 3.10
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return of_cubin(built.asm["cubin"], shared_bytes=built.metadata.shared, threads=32 * num_warps)


def of_cubin(code: bytes, *, shared_bytes: int, threads: int) -> Code:
    """What a compiler gave, taken apart by the disassembler that Triton brings along."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code)
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        text, usage = (
            subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    order = tuple(match.group(1) for match in OPCODE.finditer(text))
    jumps = tuple((int(start, 16) // 16, int(end, 16) // 16) for start, end in JUMP.findall(text))  # 16 bytes each
    counts = collections.Counter(order)
    return Code(int(found[1]), int(found[2]), shared_bytes, threads, counts, order, jumps)
