"""Random and extreme models and calls under address and undefined-behaviour checks (`fuzz`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = 8000
# What cases must get to, often: a fuzz that only ever meets refusals finds nothing.
REACHED = ["step", "backward", "descend", "forward loss", "rank1"]
REACHED += ["raw step", "raw descend", "raw losses", "raw read_mask"]


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
    preload = checkers()
    module = build_module("sanitized", "-DFEDLEAN_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
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
