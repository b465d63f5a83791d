"""The command line of `fedlean node`; its rounds are in test_deployment.py."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest

from fedlean.runtime.flower import node
from fedlean.runtime.flower.node import connection, device, parser

HERE = ["--superlink", "127.0.0.1:9", "--data", "digits"]


def options(*more: str):
    return parser().parse_args([*HERE, *more])


def test_a_share_of_the_data(tmp_path):
    worker = device(options("--client", "3/10", "--state", str(tmp_path)))
    assert worker._data.num_examples == 144  # 1,438 training digits among ten
    assert len(worker._data.dataset.y_train) == 144, "the others' examples are not kept"
    whole = device(options("--client", "3/10", "--whole", "--state", str(tmp_path)))
    assert whole._data.num_examples == 1438


def test_nodes_of_one_machine_do_not_share_a_folder(tmp_path):
    folders = {
        device(options("--state", str(tmp_path), "--client", f"{i}/2"))._folder for i in (0, 1)
    }
    assert len(folders) == 2 and all(folder.parent == tmp_path for folder in folders)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--client", "2/2"], "expected I/N"),
        (["--client", "x"], "expected I/N"),
        (["--memory-limit", "12MB"], "from 64MB on"),
        (["--memory-limit", "lots"], "expected a size like 128MB"),
    ],
)
def test_bad_options_are_named(more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        options(*more)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "count"), [("128MB", 128e6), ("1GiB", 2**30), ("70000000", 7e7)])
def test_sizes(text, count):
    assert options("--memory-limit", text).memory_limit == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no root certificates"),
        (["--insecure", "--data", "/nowhere"], "/nowhere"),
        (["--insecure", "--tls-ca", "/nowhere/ca.crt"], "there is no such file"),
        (["--key", "/nowhere/node.key"], "there is no key file"),
        (["--insecure", "--poll", "0"], "--poll must be positive"),
        (["--insecure", "--max-task-seconds", "0"], "--max-task-seconds must be a positive number"),
        (["--insecure", "--max-task-seconds", "nan"], "of seconds, got nan"),
        (["--superlink", "https://h:1", "--insecure"], "https://h:1 and --insecure contradict"),
        (["--superlink", "http://h:1"], "http:// has no TLS: give https://h:1 with --tls-ca"),
        (["--superlink", "grpc://h:1", "--insecure"], "grpc:// is not spoken here"),
        (["--superlink", "::1", "--insecure"], "in brackets, as in [::1]:8000"),
        (["--insecure", "--state", f"{__file__}/state"], "cannot be written (Not a directory)"),
        (["--insecure", "--state", "/proc/state"], "cannot be written (No such file or directory)"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(more, message, capfd, monkeypatch):
    pytest.importorskip("flwr")
    monkeypatch.setattr(node.signal, "signal", lambda *_: None)
    assert node.main([*HERE, *more]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "fedlean node: " in line]
    assert len(said) == 1 and message in said[0]


def test_a_full_disk_is_found_at_the_start(tmp_path, capfd, monkeypatch):
    pytest.importorskip("flwr")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node.signal, "signal", lambda *_: None)
    monkeypatch.setattr(node.os, "fsync", full)
    assert node.main([*HERE, "--insecure", "--state", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert f"--state: {tmp_path}" in error and "cannot be written (No space left" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_link_in_the_state_folder_is_not_followed(tmp_path):
    folder, victim = tmp_path / "state", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    (folder / "trial").symlink_to(victim)
    node._check_writable(folder)
    assert victim.read_text() == "precious" and (folder / "trial").is_symlink()


def test_a_folder_that_can_be_written_is_left_empty(tmp_path):
    chosen = options("--state", str(tmp_path / "new" / "state"))
    node._check_writable(chosen.state / node._folder_name(chosen))
    worker = device(chosen)
    assert worker._folder.is_dir() and not list(worker._folder.iterdir())


def test_one_superlink_has_one_folder_however_it_is_written():
    names = {
        node._folder_name(options("--superlink", text))
        for text in ("127.0.0.1:9", "https://127.0.0.1:9/", " http://127.0.0.1:9")
    }
    assert names == {node._folder_name(options())} and names.pop().startswith("127-0-0-1-9-")


def test_home_is_found_in_every_path(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    more = ["--tls-ca=~/ca.crt", "--key=~/node.key", "--state=~/state", "--data=~/sets:mnist"]
    found = options(*more)
    assert (found.tls_ca, found.key) == (tmp_path / "ca.crt", tmp_path / "node.key")
    assert (found.state, found.data) == (tmp_path / "state", f"{tmp_path}/sets:mnist")
    assert options().state == tmp_path / ".local/state/fedlean"
    with pytest.raises(SystemExit):
        options("--key=~nobody-of-that-name/node.key")
    assert "'~nobody-of-that-name/node.key'" in capsys.readouterr().err


def test_a_proxy_is_named_once_without_its_password(monkeypatch, caplog):
    pytest.importorskip("flwr")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    chosen = options("--insecure")
    with caplog.at_level(logging.INFO, "fedlean"):
        link = connection(chosen)
    assert caplog.messages == ["through the proxy 127.0.0.1:1 (http_proxy)"]
    assert link._calls.channel._proxy is not None
    assert link._side_calls.channel._proxy is not None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connection(chosen)._calls.channel._proxy is None
    assert len(caplog.messages) == 1
    monkeypatch.setenv("no_proxy", "other")
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(ValueError, match="http_proxy names a socks5:// proxy"):
        connection(chosen)


def test_its_process_loads_nothing_that_a_device_has_no_room_for():
    pytest.importorskip("flwr")
    code = (
        "import sys; from fedlean.runtime.flower import node\n"
        "from fedlean.runtime.flower.protobufs import protobufs; protobufs()\n"
        "import fedlean.methods.prunefl, fedlean.engine.native\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "matplotlib", "rich", "cyclopts", "flwr", "grpc", "sklearn"}
    assert all(name.startswith("flwr.proto") for name in loaded if name.startswith("flwr"))


def test_memory_that_is_not_there_is_one_line(monkeypatch, capfd, tmp_path):
    def full(*arguments, **rest):
        raise MemoryError("Unable to allocate 146. MiB")

    monkeypatch.setattr("fedlean.runtime.flower.node.load_share", full)
    arguments = ["--superlink", "127.0.0.1:9", "--data", "digits", "--insecure"]
    assert node.main([*arguments, "--state", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert "fedlean node: out of memory for digits: Unable to allocate 146. MiB" in said
    assert "Traceback" not in said
