"""What a walk sees is what a run logs: bytes of every message, and the peak of every step."""

from __future__ import annotations

import importlib
from functools import cache

import federation
import pytest

from fedlean.algorithm import Device
from fedlean.cost.profile import load_profile
from fedlean.planning.pricing import phases, pricer
from fedlean.planning.rehearse import Stage
from fedlean.runtime.method import build

PROFILE = load_profile("generic")
DIGITS = 4  # by which the text of a loss may be longer or shorter than that of another

# method, its settings, and by step of the run: which kind of the walk, and whether it is its first
HALF = {"density": 0.5}
CASES = {
    "fedavg": ({}, {1: (0, True), 2: (0, False), 6: (0, False)}),
    "exclusivefl": ({}, {1: (0, True), 2: (0, False)}),
    "allsmall": ({"width": 0.5}, {1: (0, True), 2: (0, False)}),
    "heterofl": ({"widths": "0.5"}, {1: (0, True), 2: (0, False)}),
    "depthfl": ({}, {1: (0, True), 2: (0, False)}),
    "iterative": (
        {**HALF, "prune_every": 3},
        {1: (0, True), 2: (0, False), 4: (1, True), 5: (1, False)},
    ),
    "dpf": (
        {**HALF, "reconfigure_every": 3},
        {1: (0, True), 2: (0, False), 4: (1, True), 5: (1, False)},
    ),
    "snip": (HALF, {1: (0, True), 2: (1, True), 3: (2, True), 4: (2, False)}),
    "ssfl": (HALF, {1: (0, True), 2: (1, True), 3: (1, False)}),
    # another mask in every round
    "fiarse": ({"densities": "0.5"}, {1: (0, True), 2: (0, False), 4: (0, False)}),
    "synflow": (HALF, {3: (0, False)}),  # a walk prunes in one step: other masks, as large
    "prunefl": (
        {"initial_pruning": False, "reconfigure_every": 3},
        {1: (0, True), 2: (0, False), 3: (1, True)},
    ),
    "prunefl_widths": (
        {"widths": "0.5", "initial": "all", "reconfigure_every": 3},
        {1: (0, True), 2: (0, False), 3: (1, True)},
    ),
    "online": ({}, {1: (0, True), 2: (0, False)}),
    "ntk_zo": ({"density": 1.0, "directions": 7}, {1: (0, True), 2: (0, False)}),
    "zo_slices": ({"widths": "0.5", "directions": 7}, {1: (0, True), 2: (0, False)}),
}
# the same of methods whose clients send more numbers than a loss
STAGED = {
    "smartfreeze": (
        {"pace": False},
        {1: (0, True), 2: (0, False), 4: (1, True), 5: (1, False)},
    ),
    "profl": (
        {"freezing": "never", "map_rounds": 1},
        {1: (0, True), 2: (1, True), 3: (2, True), 4: (2, False), 5: (3, True), 6: (3, False)},
    ),
    "zo_stages": ({"directions": 7}, {1: (0, True), 2: (0, False), 4: (1, True), 5: (1, False)}),
    # in turns: what is frozen has been trained since
    "neulite": ({}, {1: (0, True), 2: (1, True), 3: (0, False), 4: (1, False), 6: (1, False)}),
}
SEEDED = ("zo_slices", "zo_stages")  # each round names a seed of 18 or 19 digits
DATA_DECIDE = {
    "snip": (1, 2),
    "ssfl": (1,),
    "synflow": (0,),
}  # kinds of which data or scores say where zeros are


@cache
def logged(method: str):
    """The records of a real run, by step."""
    settings, _ = {**CASES, **STAGED}[method]
    records = []
    algorithm = build(method, federation.server(), settings)
    federation.run(algorithm, watch=lambda progress, record: records.append(record))
    return dict(enumerate(records, 1))


@cache
def walked(method: str):
    stage = Stage(federation.SPEC, federation.SEED)
    device = Device(0, profile=PROFILE)
    settings, _ = {**CASES, **STAGED}[method]
    found = stage.walked(method, settings, device, PROFILE).walk
    return found, phases(found.kinds, stage.spec, pricer(device, PROFILE, {}))


@pytest.mark.parametrize("method", [*CASES, *STAGED])
def test_bytes_down_are_those_of_the_log(method):
    walk, _ = walked(method)
    for step, (at, first) in {**CASES, **STAGED}[method][1].items():
        kind, record = walk.kinds[at], logged(method)[step]
        expected = kind.downlink_first_bytes if first else kind.downlink_bytes
        off = abs(record.cost.downlink_bytes - federation.CLIENTS * expected)
        assert off <= federation.CLIENTS * (method in SEEDED), (step, kind.phase)


@pytest.mark.parametrize("method", CASES)
def test_bytes_up_are_those_of_the_log_but_for_the_digits_of_a_loss(method):
    walk, _ = walked(method)
    for step, (at, _) in CASES[method][1].items():
        kind, record = walk.kinds[at], logged(method)[step]
        if kind.statistics and kind.statistics != ("c",):  # zeros among real values are left out
            assert record.cost.uplink_bytes <= federation.CLIENTS * (kind.uplink_bytes + DIGITS)
            continue
        off = record.cost.uplink_bytes - federation.CLIENTS * kind.uplink_bytes
        assert abs(off) <= federation.CLIENTS * DIGITS, (step, kind.phase, off)


@pytest.mark.parametrize("method", CASES)
def test_memory_is_that_of_the_log(method):
    _, found = walked(method)
    for step, (at, _) in CASES[method][1].items():
        logged_peak = logged(method)[step].cost.peak_memory_bytes
        assert found[at].memory.peak_bytes > 0
        if at in DATA_DECIDE.get(method, ()):
            assert found[at].memory.peak_bytes == pytest.approx(logged_peak, rel=0.05)
        else:
            assert found[at].memory.peak_bytes == logged_peak, step


def test_seconds_are_those_of_the_log():
    record = logged("fedavg")[2]
    (phase,) = walked("fedavg")[1]
    assert phase.compute_seconds == record.cost.compute_seconds
    assert phase.link_seconds == pytest.approx(record.cost.link_seconds, rel=1e-3)
    assert phase.flops * federation.CLIENTS == record.cost.flops


def test_initial_pruning_is_asked_of_one_client_and_goes_on_without_the_model():
    device = Device(0, profile=PROFILE)
    stage = Stage(federation.SPEC, federation.SEED)
    kinds = stage.walked("prunefl", {"initial_client": 3}, device, PROFILE).walk.kinds
    initial = [kind for kind in kinds if kind.phase == "initial"]
    assert len(initial) == 1 and initial[0].one_client and initial[0].task.client == 3
    values = 4 * federation.SPEC.num_params
    assert initial[0].downlink_first_bytes > values > initial[0].downlink_bytes
    assert initial[0].uplink_bytes > values  # of its last answer
    assert not any(kind.one_client for kind in kinds if kind.phase == "train")

    records = []
    algorithm = build("prunefl", federation.server(), {"initial_max_passes": 25})
    federation.run(algorithm, watch=lambda progress, record: records.append(record))
    first, second = records[:2]
    text = len("1000") - len("25")
    assert first.cost.downlink_bytes + text == initial[0].downlink_first_bytes
    assert first.tasks[0].phase == second.tasks[0].phase == "initial"


@pytest.mark.parametrize("initial", ["snip", "synflow", "ntk"])
def test_masks_of_a_criterion_are_walked_at_their_density(initial):
    """A round of scores with SNIP alone; then masks of as many weights, which may lie elsewhere."""
    settings = {"initial": initial, "initial_density": 0.25, "reconfigure_every": 3}
    device, stage = Device(0, profile=PROFILE), Stage(federation.SPEC, federation.SEED)
    found = stage.walked("prunefl", settings, device, PROFILE)
    kinds = found.walk.kinds
    records = []
    algorithm = build("prunefl", federation.server(), settings)
    federation.run(algorithm, watch=lambda progress, record: records.append(record))
    asked = [record for record in records if record.tasks][: len(kinds)]
    scores = ["score"] if initial == "snip" else []
    assert [kind.phase for kind in kinds] == [*scores, "train", "train"] and found.bound
    if scores:
        assert asked[0].cost.downlink_bytes == federation.CLIENTS * kinds[0].downlink_first_bytes
        assert asked[0].cost.uplink_bytes <= federation.CLIENTS * (kinds[0].uplink_bytes + DIGITS)
    for kind in kinds[len(scores) :]:
        kept = {name: int(mask.sum()) for name, mask in kind.task.sub_model.masks.items()}
        assert kept.keys() == set(federation.SPEC.prunable)
        assert sum(kept.values()) == 210


def test_a_size_limit_is_walked_at_its_density():
    settings = {"size_limit": 0.25, "initial_pruning": True}
    device = Device(0, profile=PROFILE)
    found = Stage(federation.SPEC).walked("prunefl", settings, device, PROFILE)
    assert not found.bound
    train = [kind for kind in found.walk.kinds if kind.phase == "train"]
    sizes = {name: m.size for name, m in train[0].task.sub_model.masks.items()}
    kept = {name: int(m.sum()) for name, m in train[0].task.sub_model.masks.items()}
    assert kept.keys() == set(federation.SPEC.prunable)
    assert all(kept[name] == round(0.25 * sizes[name]) for name in kept)


def test_a_cohort_does_not_change_what_one_client_is_asked():
    device, stage = Device(0, profile=PROFILE), Stage(federation.SPEC)
    alone, all_of_them = (
        stage.walked("fedavg", settings, device, PROFILE).walk.kinds[0]
        for settings in ({"cohort": 1}, {})
    )
    assert not alone.one_client
    assert alone.downlink_first_bytes == all_of_them.downlink_first_bytes


def test_devices_that_a_method_treats_alike_share_a_walk():
    stage = Stage(federation.SPEC)
    small, large = (Device(0, profile=PROFILE, memory_bytes=m) for m in (1, 10**9))
    assert stage.walked("snip", {}, small, PROFILE) is stage.walked("snip", {}, large, PROFILE)
    narrow, wide = (stage.walked("heterofl", {}, d, PROFILE) for d in (small, large))
    assert narrow is not wide
    widths = [float(one.walk.kinds[0].task.hparams["width"]) for one in (narrow, wide)]
    assert widths == [0.25, 1]


def test_a_method_without_a_rehearsal_gets_more_rounds_where_it_asks_for_them(
    tmp_path, monkeypatch
):
    (tmp_path / "slow_method.py").write_text(
        "from fedlean.methods.fedavg import fedavg\n"
        "def slow(server, *, every: int = 50):\n"
        "    if server.rounds <= every:\n"
        "        raise ValueError('every must be below the number of rounds')\n"
        "    return fedavg(server)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    stage = Stage(federation.SPEC)
    found = stage.walked("slow_method:slow", {}, Device(0, profile=PROFILE), PROFILE)
    assert [kind.phase for kind in found.walk.kinds] == ["train"]
    with pytest.raises(ValueError, match="below the number of rounds"):
        stage.walked("slow_method:slow", {"every": 10**6}, Device(0, profile=PROFILE), PROFILE)


def test_importance_in_pieces_is_walked_to_its_end():
    settings = {"initial_pruning": False, "importance_budget_bytes": 3000, "reconfigure_every": 2}
    device = Device(0, profile=PROFILE)
    walk = Stage(federation.SPEC).walked("prunefl", settings, device, PROFILE).walk
    at_once = Stage(federation.SPEC).walked(
        "prunefl", {"initial_pruning": False, "reconfigure_every": 2}, device, PROFILE
    )
    peaks = [
        max(
            phase.memory.importance_bytes
            for phase in phases(kinds, federation.SPEC, pricer(device, PROFILE, {}))
        )
        for kinds in (walk.kinds, at_once.walk.kinds)
    ]
    assert 0 < peaks[0] <= 3000 < peaks[1]
    assert any(kind.statistics for kind in walk.kinds)
