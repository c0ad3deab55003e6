"""AMX where no CPU has it: the products on a model of the tile instructions, and the code that a compiler makes."""

import ctypes
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import native_kernels
import numpy as np
import pytest
from native_networks import folded, images_for, network_of, quantize_

from convnext_deploy.errors import UsageError
from convnext_deploy.models import registry
from convnext_deploy.native import library, packed
from convnext_deploy.native.engine import Engine

HAS_COMPILER = any(map(shutil.which, library.COMPILERS))
ISAS = library.isas() if HAS_COMPILER else ()
pytestmark = pytest.mark.skipif(
    "avx512_bf16" not in ISAS, reason="the rest of the AMX path is AVX-512 with bf16, and needs a C++ compiler"
)
FLAGS = library.units().get("kernels_amx", ())
MODEL = ("-DCNXT_MODEL_AMX=1", "-O2")  # -O1 does not fuse what the epilogue multiplies and adds


def compiled(folder: Path, unit: str, *flags: str) -> Path:
    """One of the library's files, or another one."""
    source = library.SOURCES / f"{unit}.cpp" if (library.SOURCES / f"{unit}.cpp").exists() else folder / f"{unit}.cpp"
    command = [*shlex.split(library.find_compiler()), *library.FLAGS, *flags, f"-I{library.SOURCES}"]
    subprocess.run([*command, "-c", str(source), "-o", str(folder / f"{unit}.o")], check=True)
    return folder / f"{unit}.o"


def linked(folder: Path, *objects: Path) -> ctypes.CDLL:
    target = folder / "part.so"
    compiler = shlex.split(library.find_compiler())
    subprocess.run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`cnxt_test_kernel` over the AMX path's inner loops, with the model in the instructions' place."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "choice.cpp").write_text(
        '#include "kernels.h"\nconst cnxt::Kernels *cnxt::choose_kernels(const char *) { return amx_kernels(); }\n'
    )
    units = (compiled(folder, unit, *MODEL) for unit in ("testing", "choice"))
    return linked(folder, compiled(folder, "kernels_amx", *FLAGS, *MODEL), *units)


@pytest.fixture
def on_tiles(products: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda isa=None: products)


@pytest.mark.parametrize("type", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize(
    "rows",
    [
        1,
        15,  # one register that is not full
        16,
        17,  # the second register's rows overlap the first's
        32,
        33,  # an odd number of registers
        49,
        224,
        257,  # one row beyond what is done at once
        300,
    ],
)
def test_products_on_tiles_are_those_of_float64(type: packed.ProductType, rows: int, on_tiles: None) -> None:
    for k in (16, 32, 48, 64, 80, 144):  # bytes that are, and are not, a multiple of 64
        for n in (16, 32, 48):  # an odd number of groups
            native_kernels.check_product("amx", type, rows, k, n, seed=rows + k + n)


def test_sums_of_the_largest_codes_are_exact_on_tiles(on_tiles: None) -> None:
    for low, high in ((-128, -127), (127, 128), (-128, 128)):
        random = np.random.default_rng(high + 128)
        a = random.integers(254, 256, (35, 144), np.uint8)
        w = random.integers(low, high, (48, 144), np.int8)
        one, zero = np.ones(48, np.float32), np.zeros(48, np.float32)
        found = native_kernels.gemm("amx", "int8", a, w, zero, scale=one, offset=np.zeros(48, np.int32))
        assert np.array_equal(found, a.astype(np.int64) @ w.T.astype(np.int64))


@pytest.mark.parametrize("out", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_what_follows_a_product_of_codes_on_tiles_is_that_of_avx512(
    out: Any, activation: str | None, products: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = native_kernels.operands("int8", 49, 80, 48, seed=5)
    del arguments["expected"]
    step: dict[str, Any] = {"step": 0.02, "zero_point": 9} if out == "int8" else {}
    expected = native_kernels.gemm("avx512_bf16", "int8", **arguments, out=out, activation=activation, **step)
    monkeypatch.setattr(library, "load", lambda isa=None: products)
    found = native_kernels.gemm("amx", "int8", **arguments, out=out, activation=activation, **step)
    assert np.array_equal(found, expected)


def test_a_row_s_last_bytes_may_be_anything_in_memory(on_tiles: None) -> None:
    """What is behind a row or behind the weights is not multiplied: in bf16, 0 times NaN would be NaN."""
    arguments = native_kernels.operands("bf16", 19, 48, 16, seed=1)
    wide = np.full((19, 64), 0x7FC0, np.uint16)  # NaN
    wide[:, :48] = arguments["a"]
    expected = arguments.pop("expected")
    found = native_kernels.gemm("amx", "bf16", **{**arguments, "a": wide[:, :48]})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The whole library, its AMX path on the model."""
    return library.opened(library.build(tmp_path_factory.mktemp("modelled"), MODEL))


@pytest.mark.slow
@pytest.mark.parametrize("type", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "test_convnext2"])
def test_whole_networks_on_tiles_are_those_of_avx512(
    name: str, type: Any, modelled: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in int8, whose AVX-512 path is tested against the plan's simulation; bf16 is summed otherwise."""
    model = folded(registry.spec(name, num_classes=10, image_size=(64, 64)))
    if type == "int8":
        quantize_(model, images_for(model, 2, (64, 64), seed=1))
    packed.write(network_of(model, "bf16" if type == "bf16" else "fp32"), tmp_path / "network.cnxt")
    monkeypatch.setattr(library, "load", lambda isa=None: modelled)
    for batch, size, threads in ((1, 64, 1), (3, 45, 2), (2, 96, 3)):
        found = []
        for isa in ("amx", "avx512_bf16"):
            engine = Engine(tmp_path / "network.cnxt", batch, size, size, threads, isa=isa)
            engine.bind(images_for(model, batch, (size, size)).numpy())
            engine.run()
            assert engine.isa == isa
            found.append(engine.outputs[0].copy())
            engine.close()
        if type == "bf16":
            assert np.linalg.norm(found[0] - found[1]) < 0.02 * np.linalg.norm(found[1])
        else:
            assert np.array_equal(*found)


@pytest.mark.slow
def test_tile_instructions_stand_where_they_belong(tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(compiled(tmp_path, "kernels_amx", *FLAGS))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    functions = dict(re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE))
    code = {name: set(re.findall(r":\t(\w+)", body)) for name, body in functions.items()}
    tiles = {"tdpbusd", "tdpbf16ps", "ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tilezero"}

    def of(name: str) -> list[set[str]]:
        return [used & tiles for function, used in code.items() if name in function]

    # multiply_block<type, registers of rows, groups>: bf16 is 1, int8 is 2.
    assert of("multiply_block<1u") == [{"tileloadd", "tdpbf16ps", "tilestored"}] * 4
    assert of("multiply_block<2u") == [{"tileloadd", "tdpbusd", "tilestored"}] * 4
    shaping = {"ldtilecfg", "tilerelease"}
    assert set.union(*of("tile_gemm"), *of("gemm_on_tiles"), *of("multiply_rows")) == shaping
    elsewhere = [
        function for function, used in code.items()
        if used & tiles and not re.search("multiply_block|gemm|multiply_rows|tile_registers|sweep_tiles", function)
    ]  # fmt: skip
    assert elsewhere == []
    # Nothing that a Xeon with AMX need not have: the flags give no other extension of AVX-512.
    forbidden = re.compile(
        r"v(add|mul|fmadd\w*|cvt\w*2)ph\b|vp2intersect\w|vpopcnt|vpermb|vpshld|vpmadd52|vgf2p8|tdpbss"
    )
    assert not forbidden.search(listing)


def chooser(folder: Path, *flags: str) -> ctypes.CDLL:
    """What chooses the path, with `flags` for a CPU that this one seems to be, and no path behind it."""
    names = [unit.removeprefix("kernels_") for unit in library.units() if unit.startswith("kernels_")]
    lines = [f"const Kernels *{name}_kernels() {{ return nullptr; }}" for name in names]
    asked = ("available", "refused", "slower")
    lines += [f'extern "C" CNXT_API const char *{name}() {{ return {name}_kernels(); }}' for name in asked]
    (folder / "stubs.cpp").write_text(
        '#include "convnext_deploy.h"\n#include "kernels.h"\nnamespace cnxt {\n' + "\n".join(lines) + "\n}\n"
    )
    part = linked(folder, compiled(folder, "cpu", *flags), compiled(folder, "stubs"))
    for name in asked:
        getattr(part, name).restype = ctypes.c_char_p
    return part


def test_tiles_that_the_system_does_not_give_are_said_and_not_taken(tmp_path: Path) -> None:
    """A CPU that seems to have them: where it has none, Linux refuses, and the next path is the best."""
    part = chooser(tmp_path, "-DCNXT_MODEL_AMX=0", '-DCNXT_MODEL_VENDOR="AuthenticAMD"')
    paths, line = part.available().decode().split(), part.refused().decode()
    if "amx" in paths:  # a machine that has them
        assert line == ""
    else:
        assert paths[0] == "avx512_bf16"
        assert re.fullmatch(r"amx: the system does not give this process tile registers \(.+\)", line)


@pytest.mark.parametrize(
    ("vendor", "first", "said"),
    [
        ("GenuineIntel", "avx512_vnni avx512_bf16", "avx512_bf16: this CPU multiplies bf16 at half the rate of fp32"),
        ("AuthenticAMD", "avx512_bf16 avx512_vnni", ""),
    ],
)
def test_bf16_at_half_the_rate_of_fp32_is_multiplied_in_fp32_and_said(
    vendor: str, first: str, said: str, tmp_path: Path
) -> None:
    """Both paths can be asked for; without tiles the first is what a session takes."""
    part = chooser(tmp_path, f'-DCNXT_MODEL_VENDOR="{vendor}"')
    assert part.available().decode().removeprefix("amx ").startswith(first)
    assert part.slower().decode().startswith(said)
    assert bool(part.slower()) == bool(said)


def test_why_a_path_is_not_the_first_stands_in_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "slower", lambda _=None: "avx512_bf16: slower")
    assert library.state().endswith("; avx512_bf16: slower")


def test_a_refused_path_is_named_where_one_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "refused", lambda _=None: "amx: the system does not give it (Operation not permitted)")
    monkeypatch.setattr(library, "isas", lambda _=None: ("avx512_bf16",))
    assert library.state().startswith("ready, path avx512_bf16; amx: the system")
    with pytest.raises(UsageError, match="no path 'amx'; it has avx512_bf16; amx: the system does not give it"):
        library.load("amx")
