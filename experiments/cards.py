"""Writes what lies beside the cards, from their `expected.json`: `tables.md`, and `times.svg`.

    python experiments/cards.py                        # of all experiments
    python experiments/cards.py prunefl_cifar10        # of one

`times.svg` is of the first group, where it reaches a target and the card has no plot of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedlean.report.card_files import all_tables, brief_table, write_times_plot

HERE = Path(__file__).parent


def write(folder: Path) -> None:
    """Of one experiment, and its brief tables on the screen."""
    groups = json.loads((folder / "expected.json").read_text())
    (folder / "tables.md").write_text(all_tables(folder.name, groups))
    first = next(iter(groups.values()))
    drawn = (folder / "accuracy.svg").is_file()
    if not drawn and any(next(iter(first["seed0"].values()))["time_to_accuracy"].values()):
        write_times_plot(first, folder / "times.svg")
    for group, seeds in groups.items():
        print(f"{folder.name}, {group}\n\n{brief_table(seeds)}")


if __name__ == "__main__":
    named = [HERE / name for name in sys.argv[1:]]
    for path in named or sorted(path.parent for path in HERE.glob("*/expected.json")):
        write(path)
