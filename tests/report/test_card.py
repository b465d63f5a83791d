"""The tables of a card, by hand."""

from __future__ import annotations

import json

import pytest

from fedlean.report.card import (
    card_table,
    clock_table,
    layer_table,
    reconfiguration_share,
    seeds_table,
    targets_table,
    times_table,
)


def test_card_table_by_hand():
    """Twice as soon on one clock, half as soon on the other; 0.9 was never reached."""

    def run(simulated: float, measured: float, device: str = "pi") -> dict:
        first = {"round": 3, "simulated_seconds": simulated, "measured_seconds": measured}
        return {
            "time_to_accuracy": {"0.8": first, "0.9": None},
            "seconds_before_round_1": 5.0,
            "median_round_seconds": 2.0,
            "median_round_measured_seconds": 0.0125,
            "device": device,
            "density": 0.25,
            "final_accuracy": 0.875,
            "downlink_bytes": int(simulated * 1e8),
            "uplink_bytes": 0,
            "flops_per_client": 2e12,
            "flops_dense_gradient_per_client": 4e12,
            "median_round_memory_bytes": 2e6,
            "peak_memory_bytes": 3e6,
        }

    results = {"a": run(100, 1), "b": run(50, 2), "c": run(1, 0.5, "here")}
    heads, _, base, other, here = card_table(results).splitlines()
    assert base == (
        "| a | 100 s (round 3) | 1.0 s | not reached | – | 5 s | 2.0 s | 12 ms | 25.0% | 87.50% "
        "| 10.0 GB (1.00) | 2.00 T (1.00) | 4.00 T (1.00) | 2 / 3 MB |"
    )
    assert other.startswith("| b | 50 s (round 3), **2.00×** | 2.0 s, **0.50×** | not reached | – ")
    assert here.startswith("| c | (round 3) | 0.5 s, **2.00×** | not reached | – | – | – | 12 ms ")
    assert heads.count("|") == base.count("|") == other.count("|") == here.count("|")


def test_clock_table_by_hand():
    """Ratios are to the first run of the same seed; what never changed its mask adds nothing."""

    def run(seconds: float, share: float | None) -> dict:
        first = {"round": 3, "simulated_seconds": 1.0, "measured_seconds": seconds}
        return {
            "time_to_accuracy": {"0.8": first, "0.9": None},
            "device": "pi",
            "measured_seconds_before_round_1": seconds / 2,
            "median_round_measured_seconds": seconds / 100,
            "reconfiguration_share": {"measured_seconds": share},
        }

    seeds = {
        "seed0": {"a": run(4, None), "b": run(2, 0.075)},
        "seed7": {"a": run(3, None), "b": run(6, 0.5)},
    }
    assert clock_table(seeds).splitlines()[2:] == [
        "| a | 0 | 4.0 s | – | 2.0 s | 40 ms | – |",
        "| b | 0 | 2.0 s, **2.00×** | – | 1.0 s | 20 ms | 7.5% |",
        "| a | 7 | 3.0 s | – | 1.5 s | 30 ms | – |",
        "| b | 7 | 6.0 s, **0.50×** | – | 3.0 s | 60 ms | 50.0% |",
    ]


def test_times_table_by_hand():
    """(100 + 140)/2 = 120 over (50 + 30)/2 = 40: 3 times; b misses 0.9 with the second seed."""

    def run(seconds: float, last: float | None) -> dict:
        reached = {"round": 3, "simulated_seconds": seconds, "measured_seconds": 1.0}
        end = {"round": 9, "simulated_seconds": last, "measured_seconds": 1.0} if last else None
        return {
            "time_to_accuracy": {"0.8": reached, "0.9": end},
            "density": seconds / 1000,
            "seconds_before_round_1": seconds / 10,
            "median_round_seconds": seconds / 100,
        }

    seeds = [{"a": run(100, 300), "b": run(50, 60)}, {"a": run(140, 500), "b": run(30, None)}]
    heads, _, base, other = times_table(seeds).splitlines()
    assert base == (
        "| a | 12.0% | 12 | 1.2 | 3 / 3 | 100 / 140 | 120 s | 9 / 9 | 300 / 500 | 400 s |"
    )
    assert other == (
        "| b | 4.0% | 4 | 0.4 | 3 / 3 | 50 / 30 | 40 s, **3.00×** | 9 / – | 60 / – | – |"
    )
    assert heads.startswith("| run | density | before round 1 | median round | rounds to 80% | ")
    assert heads.count("|") == base.count("|")


def test_seeds_table_by_hand():
    def run(end: float, round: int | None) -> dict:
        return {
            "density": 0.2,
            "time_to_accuracy": {"0.9": {"round": round} if round else None},
            "final_accuracy": end,
            "uplink_bytes": 12_300,
            "downlink_bytes": 4_560_000,
            "flops_per_client": 7.89e9,
            "median_round_memory_bytes": 1e6,
        }

    _, _, line = seeds_table([{"a": run(0.95, 7)}, {"a": run(0.85, None)}]).splitlines()
    assert line == (
        "| a | 20.0% | 7 / – | 95.0 / 85.0% | 90.0% | 12.3 kB | 4.56 MB | 7.89 GFLOP | 1.00 MB |"
    )


def test_layer_table_by_hand(tmp_path):
    densities = [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.25}]
    rows = [
        {"round": round, "layer_density": each, "density": each["b"]}
        for round, each in enumerate(densities)
    ]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert layer_table(tmp_path).splitlines()[1:] == [
        "| --- | --- | --- | --- |",
        "| after round 0 | 100.0% | 100.0% | 100.0% |",
        "| after round 1 | 50.0% | 25.0% | 25.0% |",
    ]


def test_targets_table_by_hand():
    def at(scale: float) -> dict:
        keys = ("bytes", "flops_per_client", "flops_dense_gradient_per_client")
        return dict(zip(keys, (3e9 * scale, 2e12 * scale, 4e12 * scale), strict=True))

    first = {"time_to_accuracy": {"0.8": at(1.0), "0.9": None}}
    second = {"time_to_accuracy": {"0.8": at(0.5), "0.9": at(1.0)}}
    heads, _, base, other = targets_table({"a": first, "b": second}).splitlines()
    assert heads.startswith("| run | bytes to 80% | FLOPs per client | with dense gradients | ")
    assert base == "| a | 3.00 GB (1.00) | 2.00 TFLOP (1.00) | 4.00 TFLOP (1.00) | – | – | – |"
    assert other == (
        "| b | 1.50 GB (0.50) | 1.00 TFLOP (0.50) | 2.00 TFLOP (0.50) "
        "| 3.00 GB | 2.00 TFLOP | 4.00 TFLOP |"
    )


def rounds(seconds: list[float], changed: set[int]) -> list[dict]:
    """Log entries of rounds 1, 2, ...; the masks are others after the rounds `changed`."""
    entries, share = [], 1.0
    for round, each in enumerate(seconds, start=1):
        share = share / 2 if round in changed else share
        entries.append({"round": round, "seconds": each, "layer_density": {"fc": share}})
    return entries


def test_reconfiguration_share_by_hand():
    """Round 4: 2 s more than round 3, 1 s of patterns in round 5; rounds 1 to 4 take 42 s."""
    training = rounds([10, 10, 10, 12, 9, 8, 8, 8], {4})
    assert reconfiguration_share(training, "seconds") == pytest.approx(3 / 42)
    # and round 8 over rounds 5 to 8: 1 s more, no patterns that cost
    longer = rounds([10, 10, 10, 12, 9, 8, 8, 9, 8, 8], {4, 8})
    assert reconfiguration_share(longer, "seconds") == pytest.approx((3 / 42 + 1 / 34) / 2)


def test_reconfiguration_share_of_none_and_of_the_last_rounds():
    assert reconfiguration_share(rounds([1, 1, 1, 1], set()), "seconds") is None
    assert reconfiguration_share(rounds([1, 1, 1, 5], {4}), "seconds") is None  # nothing after it
