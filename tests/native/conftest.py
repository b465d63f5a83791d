"""Builds the C++ tests with CMake and runs them with ctest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """A program of this environment or of the machine; skips the test where there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def built(name: str, *options: str) -> Path:
    """The build folder, build/native/NAME.

    It is kept, so that the next run compiles only what changed; it is configured afresh each time,
    so that another compiler or CMake does no harm.
    """
    cmake = tool("cmake")
    folder = ROOT / "build" / "native" / name
    run(cmake, "--fresh", "-S", ROOT, "-B", folder, "-DFEDLEAN_TESTS=ON", *options)
    run(cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder


@pytest.fixture
def build_and_test() -> Callable[..., Path]:
    """`build_and_test(name, *options)` returns the build folder after its tests passed."""

    def build_and_test(name: str, *options: str) -> Path:
        ctest, folder = tool("ctest"), built(name, *options)
        jobs = str(os.cpu_count() or 1)
        run(ctest, "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-j", jobs)
        return folder

    return build_and_test


@pytest.fixture
def build_module() -> Callable[..., Path]:
    """`build_module(name, *options)` returns the compiled fedlean._native of such a build."""

    def build_module(name: str, *options: str) -> Path:
        nanobind = pytest.importorskip("nanobind", reason="nanobind is not installed")
        where = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind.cmake_dir()}")
        folder = built(name, "-DFEDLEAN_BINDINGS=ON", *where, *options)
        (module,) = (folder / "native" / "bindings").glob("_native*.so")
        return module

    return build_module
