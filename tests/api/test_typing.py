"""What pyright says of the public functions, where it is installed: `pip install 'pyright[nodejs]'`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def checked(*files: Path) -> str:
    program = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if program is None:
        pytest.skip("pyright is not installed")
    command = [program, "--pythonpath", sys.executable, *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240).stdout


@pytest.mark.slow
def test_pyright_takes_uses_of_the_public_functions_and_refuses_wrong_ones(tmp_path: Path) -> None:
    assert checked(HERE / "example_uses.py").strip().endswith("0 errors, 0 warnings, 0 informations")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import convnext_deploy\n"
        "convnext_deploy.export('a.pth', input='int8')\n"
        "convnext_deploy.evaluate('build/a', 5)\n"
        "convnext_deploy.load('build/a').nothing()\n"
        "convnext_deploy.export('a.pth', weights_kye='model')\n"
        "convnext_deploy.optimize('a.pth', data='val', out='a', class_order='mine')\n"
        "convnext_deploy.asgi('build/a', room='many')\n"
    )
    found = checked(wrong)
    assert all(f"wrong.py:{line}:" in found for line in range(2, 8)), found


@pytest.mark.slow
def test_pyright_finds_nothing_in_what_the_package_offers() -> None:
    assert (
        checked(ROOT / "convnext_deploy" / "__init__.py", ROOT / "convnext_deploy" / "api")
        .strip()
        .endswith("0 errors, 0 warnings, 0 informations")
    )
