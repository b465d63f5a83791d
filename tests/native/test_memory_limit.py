"""Whole processes under a hard memory limit, and their peak resident memory.

The paper trains on a Raspberry Pi 3; here a process gets 96 MB (10^6 bytes each).  Without rights
that not everybody has, Linux limits the private writable memory of a process (RLIMIT_DATA: heap,
anonymous mappings, thread stacks, what libraries write to, all of it reserved or touched), but not
the pages of program files that processes share.  Therefore the process that trains must also stay
within 96 MB of resident memory, program files included (VmHWM).  The address space itself
(RLIMIT_AS) cannot be 96 MB: it would count what the libraries map and never touch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MB = 10**6
LIMIT = 96 * MB
PROCESS = Path(__file__).parents[2] / "benchmarks" / "memory_process.py"
# Buffers of NumPy's and PyTorch's linear algebra grow with the cores of the machine otherwise.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limits and VmHWM are Linux's"),
    pytest.mark.skipif(
        importlib.util.find_spec("fedlean._native") is None,
        reason="the native engine is not built: there is no fedlean._native",
    ),
]


def run(*arguments: str | Path, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    if limit_bytes is not None:
        kib = str(limit_bytes // 1024)
        command = ["sh", "-c", 'ulimit -d "$0" && exec "$@"', kib, *command]
    return subprocess.run(
        command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )


def report(*arguments: str, limit_bytes: int | None = None) -> dict:
    """What a process of memory_process.py says that it took: peak_bytes and more."""
    done = run(PROCESS, *arguments, limit_bytes=limit_bytes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def peak_bytes(*arguments: str) -> int:
    """The first process may have to compile Python files, which takes memory too."""
    return min(report(*arguments)["peak_bytes"] for _ in range(2))


@pytest.fixture(scope="module")
def hard_limit() -> int:
    """The limit in bytes, where the kernel holds processes to it."""
    if run("-c", f"bytearray({LIMIT})", limit_bytes=LIMIT).returncode == 0:
        pytest.skip("this kernel does not enforce RLIMIT_DATA (Linux does since 4.7)")
    return LIMIT


def test_conv2_trains_sparse_in_96_mb(hard_limit):
    """10% density, B=20, SGD with momentum, 2,000 images as bytes in memory; 20 steps."""
    took = report("train", "native", "1", "conv2", "0.1", limit_bytes=hard_limit)
    assert took["peak_bytes"] <= hard_limit
    assert 0 < took["loss"] < 10  # finite, and near log(62) = 4.1
    assert took["planned_bytes"] < 16 * MB  # 0.1 of 6.6 million weights, not all of them


def test_conv2_does_not_fit_dense_in_96_mb(hard_limit):
    """The limit is no formality: dense, the native engine does not fit either."""
    done = run(PROCESS, "train", "native", "1", "conv2", "1", limit_bytes=hard_limit)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr


def test_dense_pytorch_does_not_start_in_96_mb(hard_limit):
    pytest.importorskip("torch")
    program = "import torch; print('started')"
    assert run("-c", program).stdout == "started\n"  # so it is the limit that stops it
    assert "started" not in run("-c", program, limit_bytes=hard_limit).stdout


def test_dense_pytorch_needs_more_than_96_mb_to_train():
    pytest.importorskip("torch")
    assert report("train_pytorch", "1", "conv2")["peak_bytes"] > 2 * LIMIT


@pytest.mark.parametrize(
    ("process", "limit_mb"),
    [
        (["import_fedlean"], 40),
        (["open_engine", "native", "2"], 40),
        (["train", "native", "2", "lenet300", "0.1"], 41),
        (["train", "native", "2", "conv2", "0.1"], 64),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_peak_resident_memory(process, limit_mb):
    """Everything that the process ever held at once: interpreter, NumPy, data, model, step."""
    assert peak_bytes(*process) <= limit_mb * MB


def test_a_process_that_trains_imports_no_torch():
    program = f"""
import runpy, sys
sys.argv = ["memory_process.py", "train", "native", "1", "lenet300", "0.1"]
runpy.run_path({str(PROCESS)!r}, run_name="__main__")
assert not {{"torch", "flwr", "sklearn", "matplotlib", "safetensors"}} & set(sys.modules)
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
