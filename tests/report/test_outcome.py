"""The sentences at the top of a page, in every case that can occur."""

import pytest

from fedlean.report import read_run
from fedlean.report.outcome import comparison_outcome, run_outcome

TARGETS = (0.9, 0.95)


@pytest.fixture
def make(tmp_path, synthetic):
    def build(name, accuracies, **options):
        options = {"rounds": max(accuracies, default=1), **options}
        return read_run(synthetic.make_run(tmp_path / name, accuracies, **options))

    return build


def test_better_run(make):
    """fedavg: 20 steps · 10 s = 200 s; prunefl: 20 · 4 s = 80 s: 2.5 sooner.  Bytes equal."""
    a, b = make("fedavg", {20: 0.963}), make("prunefl", {20: 0.961}, seconds=4.0)
    assert comparison_outcome([a, b], TARGETS) == [
        "prunefl reached 95.0% after 80.0 simulated s (round 20), 2.5× sooner than fedavg; "
        "it ended at 96.1%, 0.2 points below fedavg, for the same bytes."
    ]


def test_worse_run(make):
    a, b = make("a", {20: 0.96}, megabytes=1), make("b", {20: 0.97}, seconds=15.0, megabytes=3)
    assert comparison_outcome([a, b], TARGETS) == [
        "b reached 95.0% after 300 simulated s (round 20), 1.5× later than a; "
        "it ended at 97.0%, 1.0 points above a, at 3.0× its bytes."
    ]


def test_only_one_reached_the_higher_target(make):
    a, b = make("a", {10: 0.91, 20: 0.93}), make("b", {10: 0.91, 20: 0.96}, megabytes=1)
    better, worse = comparison_outcome([a, b], TARGETS), comparison_outcome([b, a], TARGETS)
    assert better == [
        "b reached 90.0% after 100 simulated s (round 10), as soon as a; only b reached 95.0%, "
        "after 200 simulated s (round 20), and a did not (best 93.0% in round 20); "
        "b ended at 96.0%, 3.0 points above a, for the same bytes."
    ]
    assert worse == [
        "a reached 90.0% after 100 simulated s (round 10), as soon as b; a did not reach 95.0% "
        "(best 93.0% in round 20), which b reached after 200 simulated s (round 20); "
        "a ended at 93.0%, 3.0 points below b, for the same bytes."
    ]


def test_neither_reached(make):
    a, b = make("a", {20: 0.8}), make("b", {10: 0.80004}, density=0.5)
    assert comparison_outcome([a, b], TARGETS) == [
        "neither b (best 80.0% in round 10) nor a (best 80.0% in round 20) reached 90.0%; b ended "
        "at 80.0%, level with a after 10 rounds against 20, at 50% of its bytes."
    ]


def test_no_targets_and_no_clock(make):
    a, b = make("a", {20: 0.96}, seconds=None), make("b", {10: 0.96}, seconds=None)
    assert comparison_outcome([a, b], [])[0].startswith("b ended at 96.0%, level with a after")
    assert comparison_outcome([a, b], [0.9])[0].startswith(
        "b reached 90.0% in round 10, 2.0× fewer rounds than a; it ended"
    )


def test_never_evaluated(make):
    a, b = make("a", {20: 0.96}), make("b", {}, rounds=2, summary=False)
    assert comparison_outcome([a, b], TARGETS) == [
        "b did not reach 95.0% (never evaluated), which a reached after 200 simulated s "
        "(round 20).",
        "b has no summary: it is still running or was interrupted, and its figures end at round 2.",
    ]
    assert comparison_outcome([b, b], [])[0] == "b (2) or b (1) has not been evaluated yet."


def test_one_run(make):
    run = make("prunefl", {10: 0.92, 20: 0.96}, density=0.31, targets=(0.9, 0.95, 0.98))
    assert run_outcome(run, (0.9, 0.95, 0.98)) == [
        "prunefl reached 95.0% after 200 simulated s (round 20); it did not reach 98.0% "
        "(best 96.0% in round 20).",
        "It ended at 96.0% after 20 rounds, 31% of the prunable weights kept; all clients together "
        "moved 40.0 MB, each computed 20.0 GFLOP on average.",
    ]


def test_one_run_that_reached_nothing_and_was_interrupted(make):
    run = make("r", {1: 0.5}, summary=False)
    first, second, third = run_outcome(run, TARGETS)
    assert first == "r did not reach 90.0% or 95.0% (best 50.0% in round 1)."
    assert second.startswith("It stands at 50.0% after 1 round, ")
    assert third.startswith("r has no summary")
    assert run_outcome(run, [])[0].startswith("r stands at 50.0%")


@pytest.mark.parametrize(("factor", "said"), [(0.5, "50% of"), (1.5, "1.5×"), (1.004, "")])
def test_peak_memory_is_compared(make, factor, said):
    """40 MB in every step of the baseline, `factor` times that in one step and less in others."""
    a, b = make("a", {20: 0.9}), make("b", {20: 0.9})
    for row in b.rounds:
        row["peak_memory_bytes"] *= factor / 2 if row["round"] != 7 else factor
    (found,) = comparison_outcome([a, b], ())
    assert ("modelled peak memory" in found) == bool(said)
    assert f", with {said} its modelled peak memory" in found or not said
