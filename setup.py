"""What pyproject.toml cannot say: build the native kernels where there is a C compiler, and install without them."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import rmtree
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from native.build import BuildError, build, library_name  # noqa: E402


class BuildNative(build_py):
    """Build the library beside the package that is being made; say so and go on if that fails."""

    def run(self) -> None:
        if not self.editable_mode:
            rmtree(self.build_lib, ignore_errors=True)  # what an older version left there would be installed, too
        super().run()
        folder = ROOT / "native" if self.editable_mode else Path(self.build_lib) / "native"
        try:
            print(f"native kernels: {build(folder)}")
        except (BuildError, OSError) as error:
            print(f"native kernels are left out, Numba's will be used: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """With the library in it a wheel is for this platform only, but for every Python."""

    def get_tag(self) -> Any:
        library = Path(self.get_finalized_command("build").build_lib) / "native" / library_name()
        self.root_is_pure = not library.is_file()
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildNative, "bdist_wheel": PlatformWheel})
