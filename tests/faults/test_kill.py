"""A real run, killed and interrupted: it resumes and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pytest

from fedlean import cli

pytestmark = pytest.mark.slow
ROUNDS = 100
PROGRAM = (
    "import sys, fedlean.runtime.going as going; from fedlean import cli; "
    "going.CHECKPOINT_SECONDS = (float(sys.argv[1]),) * 2; cli.main(sys.argv[2:])"
)
RNG = np.random.default_rng()


PRUNEFL = ("initial_passes=40", "reconfigure_every=25")
STAGED = {
    "smartfreeze": ("local_steps=20", "momentum=0.5"),
    "profl": ("local_steps=20", "map_steps=40"),
}


def arguments(
    folder: Path, rounds: int = ROUNDS, method: str = "prunefl", settings: Sequence[str] = PRUNEFL
) -> list[str]:
    options = ["--clients", "4", "--cohort", "3", "--rounds", str(rounds), "--seed", "2"]
    return ["run", method, *options, "--set", *settings, "--out", str(folder)]


def launch(*arguments: str, checkpoint_seconds: float = 0.1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint_seconds), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A suite that runs as a job in the background ignores SIGINT, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_when(
    process: subprocess.Popen[str],
    ready: Callable[[], bool],
    how: signal.Signals,
    *,
    later_seconds: float = 0.1,
) -> tuple[int, str]:
    """Signals the process once `ready`, a random moment later; its exit status and what it said."""
    deadline = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended or hung before its time: {process.communicate()[1]}")
        time.sleep(0.002)
    time.sleep(RNG.uniform(0, later_seconds))
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def log(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the log."""
    path = folder / "rounds.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def without_wall_times(folder: Path) -> list[dict[str, Any]]:
    entries = log(folder)
    for entry in entries:
        for key in ("wall_seconds", "measured_seconds"):
            del entry[key], entry["total"][key]
    return entries


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "checkpoint").glob("*.json"))


def has(folder: Path, entries: int) -> Callable[[], bool]:
    """Whether the log has grown to so many lines (reading bytes only: it is polled)."""
    path = folder / "rounds.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= entries


def checkpointed_after(folder: Path, known: list[str]) -> Callable[[], bool]:
    return lambda: bool(set(checkpoints(folder)) - set(known))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody disturbs, in this process."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    cli.main(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder as SIGKILL left it in training, with two checkpoints."""
    folder = tmp_path_factory.mktemp("faults") / "killed"
    process = launch(*arguments(folder))

    def ready() -> bool:
        entries = log(folder)
        return bool(entries) and entries[-1]["round"] > 10 and len(checkpoints(folder)) >= 2

    assert stop_when(process, ready, signal.SIGKILL)[0] == -signal.SIGKILL
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    model = "model.safetensors"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()
    rounds = [entry["round"] for entry in log(folder) if entry["phase"] == "train"]
    assert rounds == list(range(1, len(rounds) + 1))
    assert without_wall_times(folder) == without_wall_times(whole)
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (folder, whole))
    for key in ("wall_seconds", "measured_seconds"):
        assert ours.pop(key) > 0 and theirs.pop(key) > 0
    for summary in (ours, theirs):
        for reached in filter(None, summary["time_to_accuracy"].values()):
            assert reached.pop("measured_seconds") > 0
    assert ours == theirs
    assert 1 <= len(checkpoints(folder)) <= 2


def initial_steps(folder: Path) -> int:
    return sum(entry["phase"] == "initial" for entry in log(folder))


def test_killed_at_every_stage(tmp_path, whole):
    """Before the first checkpoint, in initial pruning, and twice in training."""
    folder, initial = tmp_path / "run", initial_steps(whole)
    assert initial > 20

    process = launch(*arguments(folder), checkpoint_seconds=1000)
    assert stop_when(process, has(folder, 3), signal.SIGKILL)[0] == -signal.SIGKILL
    assert not checkpoints(folder) and not (folder / "model.safetensors").exists()

    process = launch("resume", str(folder), checkpoint_seconds=0.05)
    _, said = stop_when(process, checkpointed_after(folder, []), signal.SIGKILL)
    assert "starting from the beginning" in said
    assert int(checkpoints(folder)[0]) < initial

    reached = len(log(folder))
    process = launch("resume", str(folder))
    target = max(initial, reached) + int(RNG.integers(5, 40))
    _, said = stop_when(process, has(folder, target), signal.SIGKILL)
    assert "continuing after step" in said

    known = checkpoints(folder)
    process = launch("resume", str(folder))
    stop_when(process, checkpointed_after(folder, known), signal.SIGKILL)

    cli.main(["resume", str(folder)])
    assert_same(folder, whole)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Callable[[str], Path]:
    """The undisturbed run of a method that trains the model part by part."""

    @cache
    def made(method: str) -> Path:
        folder = tmp_path_factory.mktemp("faults") / method
        cli.main(arguments(folder, 36, method, STAGED[method]))
        return folder

    return made


def borders(folder: Path) -> list[int]:
    """The rounds after which another stage begins."""
    stages = [(entry["phase"], entry["stage"]) for entry in log(folder)]
    return [at for at in range(1, len(stages)) if stages[at] != stages[at - 1]]


@pytest.mark.parametrize(
    ("method", "border", "after"),
    [
        ("smartfreeze", 0, 0),  # while the next stage is begun, or in its first round
        ("smartfreeze", 0, 1),
        ("smartfreeze", 0, 6),
        ("profl", 0, 0),  # before a map of two rounds
        ("profl", 0, 1),  # in the middle of it
        ("profl", 1, 0),  # after it, where growing begins
    ],
)
def test_killed_around_the_border_of_a_stage(staged, tmp_path, capsys, method, border, after):
    whole, folder = staged(method), tmp_path / "run"
    target = borders(whole)[border] + after
    process = launch(*arguments(folder, 36, method, STAGED[method]), checkpoint_seconds=0)
    status, _ = stop_when(process, has(folder, target), signal.SIGKILL, later_seconds=0.005)
    assert status == -signal.SIGKILL
    assert target - 1 <= int(checkpoints(folder)[-1]) < 36
    capsys.readouterr()
    cli.main(["resume", str(folder)])
    said = capsys.readouterr().err
    assert "continuing after step" in said and "starting from the beginning" not in said
    assert_same(folder, whole)


def test_interrupted(tmp_path, whole):
    """Ctrl-C: 130, the command that continues, and it does."""
    folder = tmp_path / ("a folder with a name as long as a terminal is wide " * 2) / "run"
    process = launch(*arguments(folder))
    status, said = stop_when(process, has(folder, 15), signal.SIGINT)
    assert status == 130
    assert "Traceback" not in said
    assert f"fedlean resume {quote(str(folder))}\n" in said
    cli.main(["resume", str(folder)])
    assert_same(folder, whole)


def test_interrupted_before_anything_was_written(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlean.runtime.prepared.with_inputs", interrupt)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments(tmp_path / "run"))
    assert stopped.value.code == 130
    assert "resume" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_resumes_from_where_it_was_killed(killed, whole, tmp_path, capsys):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = int(checkpoints(folder)[-1])
    cli.main(["resume", str(folder)])
    assert f"continuing after step {newest}," in capsys.readouterr().err
    assert_same(folder, whole)


@pytest.mark.parametrize("how", ["cut", "flipped", "no digest", "half a digest"])
def test_a_checkpoint_cut_short(killed, whole, tmp_path, capsys, how):
    """The one before is used, and that is said."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    *_, before, newest = checkpoints(folder)
    path = folder / "checkpoint" / f"{newest}.safetensors"
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif how == "no digest":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_bytes(b"{}")
    cli.main(["resume", str(folder)])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{newest}.safetensors is unusable" in said and "the one before" in said
    assert f"continuing after step {int(before)}," in said
    assert_same(folder, whole)


def test_killed_while_writing_the_first_checkpoint(killed, whole, tmp_path, capsys):
    """Nothing whole was ever written: from the beginning."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint").mkdir()
    for name in ("00000004.safetensors", "00000005.safetensors.tmp"):
        (folder / "checkpoint" / name).write_bytes(b"half")
    cli.main(["resume", str(folder)])
    assert "starting from the beginning" in capsys.readouterr().err
    assert_same(folder, whole)


def test_a_torn_last_line_of_the_log(killed, whole, tmp_path):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 12, "pha')
    cli.main(["resume", str(folder)])
    assert_same(folder, whole)


def test_resuming_what_is_finished(whole, tmp_path):
    """Nothing but the page may change."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for _ in range(2):
        cli.main(["resume", str(folder)])
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "report.html":
            assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert_same(folder, whole)
