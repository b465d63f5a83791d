"""What the machine says of itself."""

from __future__ import annotations

import sys

import pytest

from fedlean.measure import machine


def test_this_machine():
    assert machine.processor() and "\n" not in machine.processor()
    assert machine.cores() >= 1
    assert machine.memory_bytes() > 10**8


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_available_memory_is_part_of_all():
    available = machine.available_bytes()
    assert available is not None and 0 < available <= machine.memory_bytes()


def test_available_memory_by_hand(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:     300 kB\n")
    assert machine.available_bytes(path) == 300 * 1024
    path.write_text("MemTotal:  900 kB\n")
    assert machine.available_bytes(path) is None
    assert machine.available_bytes(tmp_path / "absent") is None
