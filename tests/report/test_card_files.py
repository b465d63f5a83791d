"""What lies beside a card, from figures made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedlean.report.card_files import all_tables, brief_table, of_all_seeds, write_times_plot


def figures(seconds: float | None, end: float, sent: int, device: str = "pi") -> dict[str, Any]:
    at = {"round": 5, "simulated_seconds": seconds, "measured_seconds": 1.0, "bytes": sent}
    at |= {"flops_per_client": 1e9, "flops_dense_gradient_per_client": 1e9}
    return {
        "final_accuracy": end,
        "density": 1.0,
        "downlink_bytes": sent,
        "uplink_bytes": sent,
        "flops_per_client": 1e9,
        "flops_dense_gradient_per_client": 1e9,
        "peak_memory_bytes": 3e6,
        "median_round_memory_bytes": 2e6,
        "seconds_before_round_1": 0.0,
        "median_round_seconds": 1.0,
        "median_round_measured_seconds": 0.1,
        "device": device,
        "time_to_accuracy": {"0.9": None if seconds is None else at},
    }


SEEDS = {
    "seed0": {"a": figures(100, 0.9, 1000), "b": figures(40, 0.8, 250), "c": figures(1, 0.1, 1)},
    "seed1": {"a": figures(200, 0.94, 1000), "b": figures(60, 0.9, 250)},
}


def test_means_over_the_seeds_that_all_have():
    """(100 + 200)/(40 + 60) = 3; bytes both ways; c has one seed only."""
    assert [list(runs) for runs in of_all_seeds(SEEDS)] == [["a", "b"]] * 2
    assert brief_table(SEEDS).splitlines() == [
        "| run | 90% after | at the end | bytes | memory, median round / peak |",
        "| --- | --- | --- | --- | --- |",
        "| a | 150 s | 92.0% | 2.00 kB (1.00) | 2.00 MB / 3.00 MB |",
        "| b | 50 s, **3.00×** | 85.0% | 500 B (0.25) | 2.00 MB / 3.00 MB |",
    ]


def test_what_not_all_seeds_reached_and_other_clocks():
    seeds = {
        "seed0": {
            "a": figures(100, 0.9, 10),
            "some": figures(50, 0.9, 10),
            "none": figures(None, 0.5, 10),
            "elsewhere": figures(5, 0.9, 10, device="mine"),
        },
    }
    seeds["seed1"] = {**seeds["seed0"], "some": figures(None, 0.5, 10)}
    cells = [line.split(" | ")[1] for line in brief_table(seeds).splitlines()[2:]]
    assert cells == ["100 s", "reached with 1 of 2 seeds", "not reached", "round 5"]


def test_all_tables_have_every_seed_and_run():
    page = all_tables("mine", {"iid": SEEDS})
    for head in ("## iid, seed 0", "## iid, seed 1", "## iid, all seeds"):
        assert page.count(head) == 1
    assert page.count("| c | ") == 2  # in the two tables of its seed


def test_the_plot_is_the_same_for_the_same_figures(tmp_path):
    for name in ("one.svg", "other.svg"):
        write_times_plot(SEEDS, tmp_path / name)
    one, other = ((tmp_path / name).read_bytes() for name in ("one.svg", "other.svg"))
    assert one == other and one.startswith(b"<?xml")
    never = {"seed0": {"a": figures(None, 0.1, 1)}}
    with pytest.raises(ValueError, match="the first run, a, reached none of its targets"):
        write_times_plot(never, tmp_path / "never.svg")
