"""The files of docs/fleets.md are fleets."""

from __future__ import annotations

import re
from pathlib import Path

from fedlean.cost.profile import load_profile
from fedlean.fleet.load import load_fleet

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
