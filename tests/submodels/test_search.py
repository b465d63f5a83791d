"""The search: which sub-network a device gets, within each of its limits, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from fedlean.algorithm import Device
from fedlean.core import Work
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.models.catalog import build
from fedlean.submodels.search import Search
from fedlean.submodels.supernet import supernet

PI = load_profile("raspberry_pi_4")
WORK = Work(5, 8, optimizer_floats=1)
NETS = supernet(build("mlp", (1, 8, 8), 10), (1.0, 0.5, 0.25))
ALL = [NETS.named(f"{a}/{b}") for a in ("1", "0.5", "0.25") for b in ("1", "0.5", "0.25")]


def search(probability: float = 0.0, tries: int = 5) -> Search:
    return Search(NETS, WORK, probability, tries, seed=3)


def values(net) -> int:
    return sum(map(prod, NETS.cut(net).spec.tensor_shapes.values()))


def test_the_data_base_is_sorted_and_holds_each_once():
    base = search().with_more(search().begun(0), [*ALL, *ALL])
    assert len(base) == 9 and set(base) == set(map(NETS.name, ALL))
    sizes = [values(NETS.named(name)) for name in base]
    assert sizes == sorted(sizes, reverse=True)
    assert base[0] == NETS.name(NETS.largest) and base[-1] == NETS.name(NETS.smallest)


def test_it_begins_with_the_ends_and_what_is_asked_for():
    assert search().begun(0) == (NETS.name(NETS.largest), NETS.name(NETS.smallest))
    assert len(search().begun(50)) == 9, "all that there are"
    assert search().begun(4) == search().begun(4)


@pytest.mark.parametrize("net", ALL)
def test_memory_decides_to_the_byte(net):
    looked, base = search(), search().with_more((), ALL)
    needs = peak_memory_bytes(NETS.cut(net).spec, [WORK])
    assert looked.needs(net).memory_bytes == needs
    found = looked.fitting(base, Device(0, memory_bytes=needs), PI)
    assert values(found) >= values(net)
    assert peak_memory_bytes(NETS.cut(found).spec, [WORK]) <= needs
    larger = base[: base.index(NETS.name(found))]
    assert all(looked.needs(NETS.named(name)).memory_bytes > needs for name in larger)


def test_bytes_and_seconds_are_limits_as_well():
    looked, base = search(), search().with_more((), ALL)
    middle = looked.needs(ALL[4])
    by_bytes = looked.fitting(base, Device(0, budget_bytes=middle.traffic_bytes), PI)
    assert looked.needs(by_bytes).traffic_bytes <= middle.traffic_bytes
    assert values(by_bytes) >= values(ALL[4])
    by_time = looked.fitting(base, Device(0, budget_seconds=middle.seconds(PI)), PI)
    assert looked.needs(by_time).seconds(PI) <= middle.seconds(PI)
    slow = replace(PI, uplink_bytes_per_s=1e3)
    on_a_slow_link = Device(0, profile=slow, budget_seconds=middle.seconds(PI))
    assert looked.fitting(base, on_a_slow_link, PI) == NETS.smallest


def test_it_falls_back_to_the_smallest_and_knows_no_limit_where_none_is_known():
    looked, base = search(), search().with_more((), ALL)
    assert looked.fitting(base, Device(0, memory_bytes=1), PI) == NETS.smallest
    assert looked.fitting(base, Device(0), PI) == NETS.largest


def test_a_draw_ends_and_is_the_same_again():
    assert search(0.0).drawn(1, 2) == [] and search(0.99, tries=0).drawn(1, 2) == []
    assert all(len(search(0.99, tries=3).drawn(r, 0)) <= 3 for r in range(50))
    assert search(0.5).drawn(4, 1) == search(0.5).drawn(4, 1)
    looks = [len(search(0.2).drawn(r, c)) for r in range(200) for c in range(10)]
    assert sum(looks) / len(looks) == pytest.approx(0.25, abs=0.03), "0.2 + 0.2² + ..."
