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


@pytest.fixture
def build_and_test() -> Callable[..., Path]:
    """`build_and_test(name, *options)` returns the build folder, build/native/NAME.

    The folder is kept, so that the next run compiles only what changed; it is configured afresh
    each time, so that another compiler or CMake does no harm.
    """

    def build_and_test(name: str, *options: str) -> Path:
        cmake, ctest = tool("cmake"), tool("ctest")
        folder = ROOT / "build" / "native" / name
        jobs = str(os.cpu_count() or 1)
        run(cmake, "--fresh", "-S", ROOT, "-B", folder, "-DFEDLEAN_TESTS=ON", *options)
        run(cmake, "--build", folder, "--parallel", jobs)
        run(ctest, "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-j", jobs)
        return folder

    return build_and_test
