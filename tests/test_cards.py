"""The tables of a card are those of its `expected.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlean.report.card import (
    card_table,
    clock_table,
    seeds_table,
    targets_table,
    times_table,
)

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
CARDS = sorted(path.parent for path in EXPERIMENTS.glob("*/expected.json"))
IN_TURNS = "in_turns"  # begins the name of a group of such runs
FEWEST_CELLS = 7  # of the smallest of these tables


def rows_of(group: str, seeds: dict) -> set[str]:
    if group.startswith(IN_TURNS):
        return set(clock_table(seeds).splitlines())
    rows = set()
    for runs in seeds.values():
        rows |= {*card_table(runs).splitlines(), *targets_table(runs).splitlines()}
    everywhere = [name for name in seeds["seed0"] if all(name in runs for runs in seeds.values())]
    common = [{name: runs[name] for name in everywhere} for runs in seeds.values()]
    return rows | {*seeds_table(common).splitlines(), *times_table(common).splitlines()}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_every_figure_of_a_run_is_the_recorded_one(card):
    groups = json.loads((card / "expected.json").read_text())
    rows = set().union(*(rows_of(group, seeds) for group, seeds in groups.items()))
    names = {name for seeds in groups.values() for runs in seeds.values() for name in runs}
    shown = [
        line
        for line in (card / "README.md").read_text().splitlines()
        if line.startswith("| ") and line.split("|")[1].strip() in names
    ]
    figures = [line for line in shown if line.count("|") > FEWEST_CELLS]
    assert len(figures) >= len(names) - 1
    assert [line for line in figures if line not in rows] == []
