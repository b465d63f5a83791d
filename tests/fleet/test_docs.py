"""The files of docs/fleets.md are fleets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedlean.algorithm import Device, Server
from fedlean.core import Model, Scalar
from fedlean.cost.profile import load_profile
from fedlean.engine.open import open_engine
from fedlean.fleet.load import load_fleet
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.runtime.method import find_method
from fedlean.submodels.needs import Needs
from fedlean.submodels.width import width
from fedlean.train.local_sgd import LocalSGD

PAGE = Path(__file__).parents[2] / "docs" / "fleets.md"
BLOCK = re.compile(r"^```(toml|csv)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PI = load_profile("raspberry_pi_4")
PHONES = "time_seconds,device,memory_bytes\n0,0,5e7\n91,0,6e7\n"


def test_every_file_of_the_page_is_a_fleet(tmp_path):
    (tmp_path / "phones.csv").write_text(PHONES)
    sizes = []
    for kind, text in BLOCK.findall(PAGE.read_text()):
        path = tmp_path / f"fleet.{kind}"
        path.write_text(text)
        fleet = load_fleet(path, PI).fleet
        assert fleet.size is not None
        sizes.append(fleet.size)
        devices = fleet.present(0, 1, fleet.size)
        assert all(device.profile and device.memory_bytes for device in devices)
        if "round,device" in text:
            there = [[d.id for d in fleet.present(0, step, 2)] for step in (1, 7, 8, 11, 12)]
            assert there == [[0, 1], [0, 1], [0], [0], [0, 1]]
            assert fleet.present(0, 5, 2)[0].memory_bytes == 60_000_000
        if "trace =" in text:
            memory = [fleet.present(0, step, 1)[0].memory_bytes for step in (1, 2, 3)]
            assert memory == [50_000_000, 50_000_000, 60_000_000]
    assert sizes == [20, 20, 3, 2, 1]


def test_the_first_file_of_the_page_has_five_lines():
    text = BLOCK.findall(PAGE.read_text())[0][1]
    assert len(text.splitlines()) == 5


def of_the_page(name: str, tmp_path: Path) -> tuple[Device, ...]:
    """Of the fleet on a method's page, a device of each memory, the smallest first."""
    ((kind, text),) = BLOCK.findall((PAGE.parent / f"{name}.md").read_text())
    path = tmp_path / f"boards.{kind}"
    path.write_text(text)
    devices = load_fleet(path, PI).fleet.present(0, 1, 12)
    assert len(devices) == 12
    return tuple({d.memory_bytes: d for d in sorted(devices, key=memory_of)}.values())


def memory_of(device: Device) -> int:
    return device.memory_bytes or 0


def asked(
    method: str, devices: Sequence[Device], hparam: str, model: str = "resnet8"
) -> list[Scalar]:
    """By the method's defaults, on a model for digits."""
    spec = build(model, (1, 8, 8), 10)
    server = Server(spec, open_engine("torch", 1), 0, 30, PI)
    algorithm = find_method(method)(server)
    tasks = algorithm.configure(algorithm.init(Model(spec, init_params(spec, 0))), devices)
    by_client = {task.client: task for task in tasks}
    return [by_client[device.id].hparams[hparam] for device in devices]


def test_the_pages_of_methods_say_what_their_boards_get(tmp_path):
    """Boards of 0.5, 0.9 and 2 MB by width; of 0.9, 1.2 and 2 MB by depth; others by density."""
    boards = of_the_page("heterofl", tmp_path)
    assert [memory_of(board) for board in boards] == [500_000, 900_000, 2_000_000]
    assert asked("heterofl", boards, "width") == ["0.25", "0.5", "1.0"]
    for page in ("controls", "fedrolex", "federated-dropout", "fjord"):
        assert of_the_page(page, tmp_path) == boards
    for method in ("fedrolex", "federated_dropout", "fjord"):
        assert asked(method, boards, "width") == ["0.25", "0.5", "1.0"]
    assert asked("allsmall", boards, "width") == [0.25] * 3
    assert asked("allsmall", boards[1:], "width") == [0.5] * 2
    boards = of_the_page("zo-slices", tmp_path)
    assert [memory_of(board) for board in boards] == [150_000, 300_000, 1_000_000]
    assert asked("zo_slices", boards, "width") == ["0.25", "0.5", "1.0"]
    spec = build("resnet8", (1, 8, 8), 10)
    least = Needs(width(spec, 0.25).spec, (LocalSGD().work,)).memory_bytes
    assert asked("heterofl", boards[2:], "width") == ["0.5"] and least > memory_of(boards[1])
    boards = of_the_page("depthfl", tmp_path)
    assert [memory_of(board) for board in boards] == [900_000, 1_200_000, 2_000_000]
    assert asked("depthfl", boards, "depth") == ["1", "2", "3"]
    boards = of_the_page("fiarse", tmp_path)
    assert [memory_of(board) for board in boards] == [100_000, 160_000, 240_000, 400_000]
    assert asked("fiarse", boards, "density", "lenet300") == [0.0625, 0.25, 0.5, 1.0]
