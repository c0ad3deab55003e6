"""Packed files of version 1, byte for byte: `golden_networks` says what is in them.

`classifier` has products of every type, GRN, several kernels, a shift and both linears of a head; `features` has an
overlapping stem with a mean, and two maps, one of them through a norm. This file writes them and what the portable path
computes where it is run, with `tests` on PYTHONPATH: only for a new version, beside the files of this one.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_networks import GOLDEN, NETWORKS, SIDE, assert_kept, images

from convnext_deploy.native import library, packed
from convnext_deploy.native.engine import Engine

HAS_COMPILER = any(map(shutil.which, library.COMPILERS))
ISAS = library.isas() if HAS_COMPILER else ()


def computed(source: Path, isa: str) -> list[Any]:
    engine = Engine(source, 2, SIDE, SIDE, 2, isa)
    engine.bind(images(engine.input_shape, engine.input_dtype))
    engine.run()
    return list(engine.outputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_writer_writes_version_1_byte_for_byte(name: str, tmp_path: Path) -> None:
    packed.write(NETWORKS[name](), tmp_path / name)
    assert packed.VERSION == 1
    assert (tmp_path / name).read_bytes() == (GOLDEN / f"{name}-1.cnxt").read_bytes()


@pytest.mark.skipif(not HAS_COMPILER, reason="the native engine needs a C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_version_1_is_read_and_computes_what_it_did(name: str, isa: str) -> None:
    assert_kept(name, computed(GOLDEN / f"{name}-1.cnxt", isa))


if __name__ == "__main__":
    for name, network in NETWORKS.items():
        packed.write(network(), GOLDEN / f"{name}-1.cnxt")
        outputs = computed(GOLDEN / f"{name}-1.cnxt", "portable")
        np.savez(GOLDEN / f"{name}-1.npz", **{str(i): output for i, output in enumerate(outputs)})
