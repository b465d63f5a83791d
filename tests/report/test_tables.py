"""Costs, ratios and units, redone by hand."""

import io

import pytest
from rich.console import Console

from fedlean.report import cost_table, read_run
from fedlean.report import units as u
from fedlean.report.tables import PRICES, costs, differences, labels, summary_rows


@pytest.fixture
def pair(tmp_path, synthetic):
    """fedavg: 10 s, 2 MB, 1 GFLOP a step; prunefl: 3 s, 4 MB, 0.25 GFLOP and two initial steps."""
    fedavg = synthetic.make_run(tmp_path / "fedavg", {6: 0.9, 20: 0.94}, rounds=20)
    prunefl = synthetic.make_run(
        tmp_path / "prunefl", {6: 0.92, 18: 0.96}, rounds=20, density=0.3, seconds=3.0,
        megabytes=2, gflops=0.25, initial=2,
    )  # fmt: skip
    return [read_run(fedavg), read_run(prunefl)]


def test_costs_and_ratios_by_hand(pair):
    """At 90%: fedavg 6 steps = 60 s, 12 MB, 6 GFLOP; prunefl 8 steps = 24 s, 32 MB, 2 GFLOP.

    A measured second a step: 6 and 8.  60 / 24 = 2.5 sooner, 32 / 12 = 2.67 more, 6 / 2 = 3 less.
    """
    base, other = costs(pair, [0.9])[0]
    assert base.round == "6"
    assert [base.figures[head].text for head in PRICES] == [
        *("60.0 s", "6.00 s", "12.0 MB", "6.00 GFLOP", "12.0 GFLOP")
    ]
    assert all(figure.ratio is None for figure in base.figures.values())
    assert [(other.figures[head].text, other.figures[head].ratio) for head in PRICES] == [
        ("24.0 s", "2.5× sooner"),
        ("8.00 s", "1.3× later"),
        ("32.0 MB", "2.7× more"),
        ("2.00 GFLOP", "3.0× less"),
        ("4.00 GFLOP", "3.0× less"),
    ]


def test_not_reached_is_said_with_the_best(pair):
    base, other = costs(pair, [0.95])[0]
    assert base.missed == "not reached: best 94.0%, round 20"
    assert other.missed is None
    assert other.figures["simulated time"].ratio is None  # nothing to compare with


def test_a_miss_never_reads_like_the_target():
    assert u.short_of(0.94996, 0.95) == "94.996%"
    assert u.short_of(0.9321, 0.95) == "93.2%"


def test_summary_rows(pair):
    rows = dict(summary_rows(pair))
    assert rows["method"] == ["fedavg", "prunefl"]
    assert rows["final accuracy"] == ["94.0%", "96.0%"]
    assert rows["upload, all clients"] == ["20.0 MB", "44.0 MB"]
    assert rows["simulated time"] == ["200 s", "66.0 s"]
    assert rows["final density"] == ["100%", "30%"]
    assert rows["arithmetic"] == ["masked", "masked"]


def test_same_names_are_told_apart_and_settings_compared(tmp_path, synthetic):
    a = read_run(synthetic.make_run(tmp_path / "x" / "run", {1: 0.5}, rounds=1))
    b = read_run(synthetic.make_run(tmp_path / "y" / "run", {1: 0.5}, rounds=1, model="vgg11"))
    assert labels([a, b]) == ["x/run", "y/run"]
    assert labels([a, a]) == ["run (1)", "run (2)"]
    assert differences([a, b]) == ["model"]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.42, "seconds", "0.42 s"),
        (659, "seconds", "659 s"),
        (1000, "seconds", "16.7 min"),
        (7200, "seconds", "2.00 h"),
        (300_000, "seconds", "3.47 d"),
        (999, "bytes", "999 B"),
        (999_499, "bytes", "999 kB"),
        (999_500, "bytes", "1.00 MB"),
        (2.5e9, "bytes", "2.50 GB"),
        (5e17, "flops", "500 PFLOP"),
        (0, "bytes", "0 B"),
        (None, "flops", "–"),
    ],
)
def test_human_units(value, kind, text):
    assert u.human(value, kind) == text


@pytest.mark.parametrize(
    ("baseline", "value", "text"),
    [
        (104, 100, "1.04× less"),
        (1000, 80, "12× less"),
        (100, 100.4, "same"),
        (0, 5, None),
        (5, 0, None),
        (None, 5, None),
    ],
)
def test_versus(baseline, value, text):
    assert u.versus(baseline, value, "less", "more") == text


def test_target_text_keeps_what_was_asked():
    assert [u.target_text(t) for t in (0.95, 0.9725, 1.0)] == ["95.0%", "97.25%", "100.0%"]


def test_terminal_table(pair, tmp_path, synthetic):
    folder = synthetic.make_run(tmp_path / "[red]x", {1: 0.2}, rounds=1)
    out = io.StringIO()
    Console(file=out, width=140).print(cost_table([*pair, read_run(folder)]))
    text = out.getvalue()
    assert "2.5× sooner" in text and "not reached: best 20.0%, round 1" in text
    assert "[red]x" in text
    Console(file=out, width=140).print(cost_table(pair, []))
    assert "no target accuracy was set" in out.getvalue()


def test_terminal_table_fits_80_columns_and_breaks_no_name(tmp_path, synthetic):
    long = "speech_commands_cnn_prunefl_reconfigured_every_25"
    runs = [
        read_run(synthetic.make_run(tmp_path / name, {2: 0.4, 9: 0.98}, rounds=9))
        for name in (long, f"{long}_again")
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(cost_table(runs, [0.3, 0.9725]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.count(long) == 2 and lines.count(f"{long}_again") == 2
    heads = [line for line in lines if "simulated time" in line]
    assert [line[:12] for line in heads] == ["30.0%  round", "97.25% round"]
