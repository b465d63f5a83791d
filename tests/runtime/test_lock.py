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
import socket
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


def _socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "put",
    [
        lambda path, victim: path.symlink_to(victim),
        lambda path, victim: path.symlink_to(victim.parent / "nowhere"),
        lambda path, victim: path.hardlink_to(victim),
        lambda path, victim: path.mkdir(),
        lambda path, victim: os.mkfifo(path),
        _socket,
    ],
    ids=["link", "link to nothing", "hard link", "folder", "pipe", "socket"],
)
def test_what_others_put_in_its_place_is_neither_followed_nor_emptied(
    tmp_path, monkeypatch, put, shared
):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    monkeypatch.chdir(folder)  # a socket's name must be short
    put(Path(NAME), victim)
    refused = pytest.raises(ValueError, match=f"{folder / NAME} is no file of its own.*remove it")
    with refused, hold(folder, print, shared=shared):
        pass
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "victim"]
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_a_link_in_its_place_takes_the_folder_from_its_holder(tmp_path):
    with hold(tmp_path / "run", print) as lock:
        (tmp_path / "run" / NAME).rename(tmp_path / "elsewhere")
        (tmp_path / "run" / NAME).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Superseded):
            lock.check()
    assert (tmp_path / "elsewhere").exists() and (tmp_path / "run" / NAME).is_symlink()


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
