"""The command line of `fedlean node`; its rounds are in test_deployment.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlean.runtime.flower import node
from fedlean.runtime.flower.node import device, parser

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
        (["--tls-ca", "/nowhere/ca.crt"], "there is no such file"),
        (["--key", "/nowhere/node.key"], "there is no key file"),
        (["--insecure", "--poll", "0"], "--poll must be positive"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(more, message, capfd, monkeypatch):
    pytest.importorskip("flwr")
    monkeypatch.setattr(node.signal, "signal", lambda *_: None)
    assert node.main([*HERE, *more]) == 2
    assert message in capfd.readouterr().err


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
