"""The C++ tests, what the compiled objects must look like, and a fuzz of the module.

In one file, since they share builds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = 8000
# What cases must get to, often: a fuzz that only ever meets refusals finds nothing.
REACHED = ["step", "backward", "descend", "forward loss", "rank1"]
REACHED += ["raw step", "raw descend", "raw losses", "raw read_mask"]
REACHED += ["raw add_scaled", "raw mean"]
# The same for both that use it, so that it is compiled once.
SANITIZED = ["-DFEDLEAN_SANITIZE=ON"]
SANITIZED += ["-DCMAKE_CXX_COMPILER=g++"] if shutil.which("g++") else []


@pytest.mark.slow
def test_as_the_wheel_is_built(build_and_test):
    build_and_test("plain")


@pytest.mark.slow
def test_with_address_and_undefined_behaviour_checks(build_and_test):
    build_and_test("sanitized", *SANITIZED)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbol types")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_kernel_objects_lend_no_inline_function(build_and_test):
    """An inline function that an object for AVX-512 defines is a weak symbol: the linker may pick
    it for everybody, and a processor without AVX-512 dies in code that never asked for it."""
    library = build_and_test("plain") / "native" / "libfedlean_core.a"
    listing = subprocess.run(
        ["nm", "--print-file-name", "--defined-only", "--demangle", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = [
        line
        for line in listing.splitlines()
        if any(f":{name}.cpp.o:" in line for name in ("avx2", "avx512", "neon"))
    ]
    tables = [line for line in kernels if "_table" in line]
    weak = [line for line in kernels if line.split(maxsplit=2)[1] in "VWuvw"]
    assert tables, listing[:2000]
    assert not weak, "\n".join(weak)


def checkers() -> str:
    """The libraries that a process must begin with, as the interpreter has no checks itself."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            pytest.skip("g++ is not installed")
        if not Path(done.stdout.strip()).is_absolute():
            pytest.skip(f"g++ has no {name}")
        found.append(done.stdout.strip())
    return " ".join(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the checkers")
def test_no_call_does_what_is_undefined(build_module):
    """Random and extreme models and calls under the checks (`fuzz`)."""
    preload = checkers()
    module = build_module("sanitized", *SANITIZED)
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(TESTS),
    }
    done = subprocess.run(
        [sys.executable, "-m", "native.fuzz", str(module), str(CASES)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    last = [line for line in lines if line.startswith("case ")][-1:]
    rest = [line for line in lines if not line.startswith("case ")]
    assert done.returncode == 0 and rest[-1] == "done", "\n".join([*last, *rest[:60]])
    times = dict(line.rsplit(" ", 1) for line in rest if ": " in line)
    assert all(int(times[f"{what}: done"]) > 50 for what in REACHED), times
