"""From measurements to a profile: what was measured comes back in what is charged."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from measure.fake import FORWARD, OPEN, SIZES, SPEC, STEP, TICK, Engine

from fedlean.core import Work
from fedlean.cost.flops import layer_flops, step_flops
from fedlean.cost.price import round_seconds
from fedlean.cost.profile import load_profile
from fedlean.cost.time import activations, linear_round_time, work_seconds
from fedlean.measure.cases import plan
from fedlean.measure.link import Link
from fedlean.measure.result import measurement, write
from fedlean.measure.survey import MEMORY_MARGIN, survey
from fedlean.measure.visit import Setting
from fedlean.report.profile_page import profile_page, profile_tables
from fedlean.report.profile_rows import density_rows, layer_rows, notes

LINK = Link(1000.0, 4000.0, 0.5, 100, 400, 3)


def measured(link=None, densities=(1.0, 0.5, 0.2, 0.1), **more):
    engine = Engine()
    result = survey(
        engine,
        SPEC,
        plan(SPEC, densities),
        Setting(batch_size=4, local_steps=5),
        repeats=2,
        budget_seconds=1e9,
        clock=engine.clock,
        **{"available": lambda: None, **more},
    )
    return measurement("board", "mine", SPEC, result, link, engine=engine, threads=2)


@pytest.fixture(scope="module")
def result():
    return measured(LINK)


def test_a_round_is_charged_as_it_was_measured(result):
    for point in result.survey.points:
        work = Work(5, 4, kept=point.kept)
        charged = work_seconds(SPEC, work, result.profile)
        assert charged == pytest.approx(point.round, rel=1e-6), point.case


def test_a_mixture_that_was_not_measured(result):
    kept = {"conv.weight": 150, "fc1.weight": 2000, "fc2.weight": 37}
    step = 1000 * TICK + sum(min(n, 0.75 * SIZES[name]) * STEP[name] for name, n in kept.items())
    session = 110 * TICK + sum(min(n, 0.75 * SIZES[name]) * OPEN[name] for name, n in kept.items())
    charged = work_seconds(SPEC, Work(3, 8, kept=kept), result.profile)  # twice the batch
    assert charged == pytest.approx(session + 3 * 2 * step, rel=1e-6)


def test_importance_and_inference(result):
    times = result.measured
    assert times.importance_seconds == pytest.approx(5000 * TICK, rel=1e-6)
    assert times.dense_importance_seconds == pytest.approx(5000 * TICK, rel=1e-6)
    assert times.forward.layers["conv.weight"].seconds_per_weight == pytest.approx(
        FORWARD["conv.weight"]
    )


def test_the_linear_round(result):
    """PruneFL's T(M), the link's seconds per value included: up at 1000, down at 4000 bytes/s."""
    time = linear_round_time(SPEC, result.profile, batch_size=4, local_steps=5)
    per_value = 4 / 1000 + 4 / 4000
    for name in SIZES:
        expected = OPEN[name] + 5 * STEP[name] + per_value
        assert time.seconds_per_weight[name] == pytest.approx(expected, rel=1e-6)
        # the table shows the same, computation only
        shown = result.round.layers[name].seconds_per_weight
        assert shown == pytest.approx(expected - per_value, rel=1e-6)
    biases = 8 + 40 + 10
    expected = (110 + 5 * 1000) * TICK + per_value * biases
    assert time.constant_seconds == pytest.approx(expected, rel=1e-6)


def test_rates_for_other_models_by_hand(result):
    profile = result.profile
    assert not profile.dense_way, "the native engine has none"
    dense = 1000 * TICK + sum(0.75 * STEP[name] * size for name, size in SIZES.items())
    assert profile.dense_flops_per_s == pytest.approx(step_flops(SPEC, {}, 4) / dense, rel=1e-6)

    def flops(name):
        return layer_flops(SPEC, SPEC.by_name[name], {}, 4).step

    conv = STEP["conv.weight"] * 200 / flops("conv")
    assert profile.sparse_conv_seconds_per_flop == pytest.approx(conv, rel=1e-6)
    linear = STEP["fc1.weight"] * SIZES["fc1.weight"] + STEP["fc2.weight"] * 400
    linear /= flops("fc1") + flops("fc2")
    assert profile.sparse_linear_seconds_per_flop == pytest.approx(linear, rel=1e-6)
    assert profile.sparse_seconds_per_activation == pytest.approx(
        1000 * TICK / (activations(SPEC) * 4), rel=1e-6
    )


def test_a_link_that_was_not_measured_is_assumed():
    assumed, without = load_profile("raspberry_pi_4"), measured()
    assert without.profile.uplink_bytes_per_s == assumed.uplink_bytes_per_s
    assert without.profile.downlink_bytes_per_s == assumed.downlink_bytes_per_s
    assert "assumed" in without.profile.source
    assert any("not measured" in note for note in notes(without))


def test_the_file_round_trips(result, tmp_path):
    path = tmp_path / "board.json"
    write(path, result)
    assert load_profile(str(path)) == result.profile
    assert [entry.name for entry in tmp_path.iterdir()] == ["board.json"]
    derivation = json.loads(path.read_text())["derivation"]
    assert derivation["link"]["uplink_bytes"] == 100
    assert len(derivation["points"]) == len(result.survey.points)
    assert result.profile.uplink_bytes_per_s == 1000
    conditions = result.measured.conditions
    assert (conditions["threads"], conditions["instruction_set"]) == (2, "none")


def test_a_link_beside_the_file_is_not_followed(result, tmp_path):
    """In a folder that others may write, one of them may know this process's number."""
    victim, link = tmp_path / "victim", tmp_path / f".board.json.{os.getpid()}.tmp"
    victim.write_text("precious")
    link.symlink_to(victim)
    write(tmp_path / "board.json", result)
    assert victim.read_text() == "precious" and link.is_symlink()
    assert not (tmp_path / "board.json").is_symlink()


def test_without_room_for_the_dense_model(tmp_path):
    """Dense work is then charged by the fit at 100%, and nothing is invented."""
    result = measured(available=lambda: MEMORY_MARGIN * 11 * SPEC.num_params)
    path = tmp_path / "board.json"
    write(path, result)
    profile = load_profile(str(path))
    assert profile == result.profile and profile.measured is not None
    assert profile.measured.step.dense_seconds is None
    full = 1000 * TICK + sum(
        STEP[name] * size * (1 if name == "fc1.weight" else 0.75) for name, size in SIZES.items()
    )
    opens = 110 * TICK + sum(
        OPEN[name] * size * (1 if name == "fc1.weight" else 0.75) for name, size in SIZES.items()
    )
    assert work_seconds(SPEC, Work(1, 4), profile) == pytest.approx(opens + full, rel=1e-6)
    assert density_rows(result)[-1][0] == "50%"
    assert any("the dense model: too little memory" in note for note in notes(result))
    assert profile_tables(result) and round_seconds(SPEC, {}, profile, batch_size=4, local_steps=1)


def test_rows(result):
    rows = layer_rows(result)
    assert [row[0] for row in rows] == ["conv", "fc1", "fc2", "c", "dense model"]
    nanoseconds = 1e9 * (OPEN["conv.weight"] + 5 * STEP["conv.weight"])
    assert rows[0][1:3] == ("200", f"{nanoseconds:.0f}")
    assert rows[0][-1] == "1.0000"
    densities = density_rows(result)
    assert [row[0] for row in densities] == ["10%", "20%", "50%", "100%"]
    assert all(row[1] == row[2] for row in densities)  # measured and modelled
    assert densities[-1][3] == "1.00×"


def test_notes_say_how(result):
    text = " ".join(notes(result))
    for part in ("5 steps of 4 examples", "threads: 2", "at least 2 visits", "had 20%", "up 0.001"):
        assert part in text, part


def test_the_page_is_whole_and_escapes(result):
    named = replace(result, profile=replace(result.profile, name="<b>", description="<script>"))
    page = profile_page(named)
    assert page.startswith("<!doctype html>") and page.count("<svg role") == 3
    assert "<script" not in page and "&lt;script&gt;" in page
    assert profile_page(named) == page
