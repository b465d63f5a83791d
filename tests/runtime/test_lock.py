"""One writer per run folder, whoever writes and however they end."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlean.runtime.lock import NAME, Superseded, hold

HOLD = """
import sys, time
from pathlib import Path
from fedlean.runtime.lock import hold
with hold(Path(sys.argv[1]), print, shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("mine", [False, True], ids=["run", "app"])
@pytest.mark.parametrize("theirs", ["alone", "shared"])
def test_a_living_holder_is_named_and_a_dead_one_is_not_waited_for(tmp_path, theirs, mine):
    process = holder(tmp_path / "run", theirs)
    try:
        what = "a Flower app" if theirs == "shared" else "fedlean"
        named = re.escape(f"{what}, process {process.pid} on {os.uname().nodename} since 2")
        if mine and theirs == "shared":
            with hold(tmp_path / "run", print, shared=True):
                pass
        else:
            with pytest.raises(ValueError, match=named), hold(tmp_path / "run", print, shared=mine):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    assert (tmp_path / "run" / NAME).exists(), "its words stay, the lock does not"
    with hold(tmp_path / "run", print, shared=mine):
        found = json.loads((tmp_path / "run" / NAME).read_text())
        assert (found["process"] == os.getpid()) != mine or theirs == "shared"
    with hold(tmp_path / "run", print):
        pass


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "a" / "b" / "run", print):
        assert (tmp_path / "a" / "b" / "run" / NAME).is_file()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with hold(tmp_path / "a" / "run", print):
        (tmp_path / "a" / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["config.json"]


def test_in_one_process_too(tmp_path):
    refused = pytest.raises(ValueError, match="wait until it ends")
    with hold(tmp_path, print), refused, hold(tmp_path, print):
        pass
    with hold(tmp_path, print):
        pass


def test_of_servers_of_an_app_the_last_that_takes_it_owns_the_folder(tmp_path):
    with hold(tmp_path, print, shared=True) as first:
        first.check()
        with hold(tmp_path, print, shared=True) as second:
            first.check()  # the second may still find that it cannot go on
            second.own()
            second.check()
            with pytest.raises(Superseded, match="another process has taken it over"):
                first.check()
    assert not list(tmp_path.iterdir())


def test_a_holder_whose_folder_was_removed_leaves_its_successor_alone(tmp_path):
    folder = tmp_path / "run"
    with hold(folder, print) as first:
        shutil.rmtree(folder)
        with pytest.raises(Superseded, match="was removed; this one ends"):
            first.check()
        successor = holder(folder)
        try:
            with pytest.raises(Superseded, match="another process has taken it over"):
                first.check()
        except BaseException:
            successor.kill()
            raise
    try:
        with pytest.raises(ValueError, match=str(successor.pid)), hold(folder, print):
            pass
    finally:
        successor.kill()
        successor.wait()
        successor.stdout.close()  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path):
    refused = pytest.raises(ValueError, match=r"cannot be written .*: name another folder")
    with refused, hold(tmp_path / "a" / "b" / ("x" * 300), print):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refused, hold(tmp_path / "link", print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_server_that_leaves_does_not_take_the_lock_of_the_next_with_it(tmp_path):
    """The next one has come, and has not yet made sure that it can go on."""
    first = hold(tmp_path, print, shared=True)
    first.__enter__()
    with hold(tmp_path, print, shared=True) as second:
        first.__exit__(None, None, None)
        second.own()
        second.check()
    assert not list(tmp_path.iterdir())


def test_noise_in_the_file_is_another_process(tmp_path):
    process = holder(tmp_path)
    try:
        for noise in (b"", b"[" * 4000, b"{}", b'{"process": "x"}', b"\xff\xfe"):
            (tmp_path / NAME).write_bytes(noise)
            refused = pytest.raises(ValueError, match="written by another process: wait")
            with refused, hold(tmp_path, print):
                pass
        words = {"process": 1, "host": "a\x1b[31m", "command": "c", "since": "s" * 999}
        (tmp_path / NAME).write_text(json.dumps(words))
        with pytest.raises(ValueError) as refused, hold(tmp_path, print):
            pass
        assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 600
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with hold(tmp_path, said.append):
        pass
    assert len(said) == 1 and "without locks" in said[0]


def _race(folder: Path, results: multiprocessing.SimpleQueue[int]) -> None:
    held = 0
    for _ in range(200):
        try:
            with hold(folder, print):
                (folder / "inside").touch(exist_ok=False)  # FileExistsError: two were inside
                (folder / "inside").unlink()
                held += 1
        except ValueError:
            pass
    results.put(held)


def test_never_two_inside(tmp_path):
    """The file is removed by whoever leaves, while others open it."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    (tmp_path / "keep").touch()
    processes = [context.Process(target=_race, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    assert sum(results.get() for _ in processes) >= 20
