"""Memory that is not there is one line: for what, and how much."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from federation import Around, fresh_dispatch, run, server

from fedlean import cli
from fedlean.methods.fedavg import client_update, fedavg
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.outofmemory import OutOfMemory, memory_for


def test_the_line_names_what_and_how_much():
    line = r"^out of memory for the model 'm', 5 MB in all \(two\): free memory"
    with pytest.raises(OutOfMemory, match=line), memory_for("the model 'm'", lambda: 5_000_000):
        raise MemoryError("two")
    with pytest.raises(OutOfMemory, match="for the data: free memory"), memory_for("the data"):
        raise MemoryError
    with memory_for("nothing"):
        pass


def test_a_clients_step_names_round_client_and_plan(monkeypatch):
    algorithm = fedavg(server(2))
    data = fresh_dispatch(algorithm)._data  # type: ignore[attr-defined]

    def greedy(task, batches, engine, state):
        if task.client == 2:
            raise MemoryError("std::bad_alloc")
        return client_update(task, batches, engine, state)

    dispatch = LocalDispatch(greedy, server().engine, data)
    line = r"out of memory for round 1 \(train\), client 2, \d+ MB in all \(std::bad_alloc\)"
    with pytest.raises(OutOfMemory, match=line):
        run(algorithm, dispatch=Around(dispatch, lambda tasks, updates: updates))


@pytest.mark.parametrize("where", ["load", "build", "evaluate"])
def test_anywhere_it_is_one_line_and_exit_code_2(where, monkeypatch, capsys, tmp_path):
    def full(*arguments, **rest):
        raise MemoryError("Unable to allocate 146. MiB")

    name = {
        "load": "fedlean.data.digits.Dataset.from_images",
        "build": "fedlean.runtime.start.init_params",
        "evaluate": "fedlean.runtime.evaluate._cross_entropy",
    }[where]
    monkeypatch.setattr(name, full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "fedavg", "--rounds", "1", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    assert "out of memory" in said and "146. MiB" in said


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_under_a_real_limit(tmp_path):
    """160 MB of images where the process may have some 150 MB more than it starts with."""
    rng = np.random.Generator(np.random.Philox(0))
    x = rng.integers(0, 255, (20_000, 1, 64, 64), np.uint8)
    y = np.arange(20_000) % 10
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "set.npz", x=x, y=y, split=(y == 0).astype(np.uint8))
    base = _address_space("import fedlean.cli.runs, fedlean.engine.native")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (base + 60_000_000, base + 60_000_000))

    command = ["run", "fedavg", "--dataset", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "fedlean", *command],
        preexec_fn=limited,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith("fedlean: out of memory for the data set"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def _address_space(code: str) -> int:
    """Bytes of a process after `code`."""
    read = f"{code}\nprint(open('/proc/self/statm').read().split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", read],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) * os.sysconf("SC_PAGE_SIZE")
