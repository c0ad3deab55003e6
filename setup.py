"""Compiles the CPU engine into the wheel. All else about the package stands in pyproject.toml.

One wheel serves every Python: the library is loaded with ctypes, and chooses the CPU's path when it runs. A compiler
for another machine (CXX=aarch64-linux-gnu-g++) makes a wheel for that one. Without a compiler the wheel has no library,
and one is compiled at the first use. The variable CONVNEXT_DEPLOY_WHEEL says more: "with-engine" refuses to build a
wheel without it, and "without-engine" leaves it out.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from convnext_deploy.errors import ConvNextDeployError
from convnext_deploy.native import shipped

VARIABLE = "CONVNEXT_DEPLOY_WHEEL"
WISHES = ("", "with-engine", "without-engine")


class BuildPy(build_py):
    """Adds what `Wheel` has compiled; an editable installation has no copy of the package to add it to."""

    engine = None

    def run(self):
        if not self.editable_mode:  # an earlier wheel's modules, which may be gone, and its library
            shutil.rmtree(Path(self.build_lib) / "convnext_deploy", ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "convnext_deploy" / "native" / "lib"
        if self.engine is not None:
            shutil.copytree(self.engine, folder)


class Wheel(bdist_wheel):
    machine = ""  # that the library is for, where it is not this one

    def run(self):
        wish = os.environ.get(VARIABLE, "")
        if wish not in WISHES:
            raise SystemExit(f"error: {VARIABLE} is {wish!r}; expected with-engine, without-engine, or nothing")
        folder = Path(self.get_finalized_command("build").build_temp) / "engine"
        if wish != "without-engine" and sys.platform == "linux":
            try:
                self.machine = shipped.ship(folder)
            except ConvNextDeployError as error:
                if wish == "with-engine":
                    raise SystemExit(f"error: {error}") from None
                self.warn(f"the wheel has no library of the CPU engine: {error}")
            else:
                self.root_is_pure = False
                self.distribution.has_ext_modules = lambda: True
                self.distribution.get_command_obj("build_py").engine = folder
        elif wish == "with-engine":
            raise SystemExit(f"error: {VARIABLE}=with-engine is for Linux, this is {sys.platform}")
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        if self.root_is_pure:
            return python, abi, platform
        return "py3", "none", f"linux_{self.machine}" if self.machine else platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
