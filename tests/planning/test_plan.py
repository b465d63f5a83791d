"""What fits, what to choose, for whom: blocks of a plan on small models."""

from __future__ import annotations

import json
from dataclasses import replace

import federation
import pytest

from fedlean.algorithm import Device
from fedlean.cost.profile import load_profile
from fedlean.cost.split import MemorySplit
from fedlean.fleet.fleet import Fleet, Member, always
from fedlean.fleet.quantity import Quantity
from fedlean.models.lenet300 import lenet300
from fedlean.models.mlp import mlp_13_7
from fedlean.planning import plan
from fedlean.planning.choose import recommend
from fedlean.planning.document import to_document
from fedlean.planning.page import plan_page
from fedlean.planning.records import Knob, MethodPlan, Phase
from fedlean.planning.rows import rows, verdicts
from fedlean.planning.table import plan_parts
from fedlean.runtime.method import available

PROFILE = load_profile("raspberry_pi_4")
SPEC = federation.SPEC
MLP = lenet300((1, 8, 8), 10)  # whose memory is that of its weights


def block(memory_bytes, methods=None, spec=SPEC, **more):
    device = Device(0, memory_bytes=memory_bytes)
    return plan(spec, [device], profile=PROFILE, methods=methods, **more).devices[0]


def method(memory_bytes, name, spec=SPEC, **more):
    return block(memory_bytes, [name], spec, **more).methods[0]


def test_models_in_processes_of_their_own_have_the_same_plan():
    models = {"wide": lenet300((1, 8, 8), 10), "narrow": mlp_13_7((1, 8, 8), 10)}

    def planned(processes):
        return plan(
            models,
            [Device(0, memory_bytes=10**6)],
            profile=PROFILE,
            methods=["fedavg", "smartfreeze"],
            processes=processes,
        )

    assert to_document(planned(2)) == to_document(planned(1))


def test_every_built_in_method_is_planned_or_left_out():
    found = plan(SPEC, [Device(0)], profile=PROFILE)
    names = {one.method for one in found.devices[0].methods}
    assert names | found.left_out.keys() == set(available())
    assert all(one.planned and one.fits for one in found.devices[0].methods)


def test_the_largest_density_fits_and_a_larger_one_does_not():
    whole = method(None, "ntk_zo", MLP, settings={"density": 1.0}).needs_bytes
    least = method(1, "ntk_zo", MLP, settings={"density": 0.01}).needs_bytes
    limit = (whole + least) // 2
    one = method(limit, "ntk_zo", MLP)
    assert one.fits and one.knob is not None
    found = one.knob.value
    assert found is not None and 0.01 < found < 1 and one.settings == {"density": found}
    assert one.needs_bytes <= limit
    more = method(limit, "ntk_zo", MLP, settings={"density": 1.1 * found})  # does not fit as set
    assert more.knob is not None and more.knob.value == pytest.approx(found, rel=0.03)
    assert method(10 * limit, "ntk_zo", MLP, settings={"density": 1.1 * found}).knob == Knob(
        "density", 1.1 * found, 1.0
    )


def test_a_density_of_the_users_own_is_kept_where_it_fits():
    one = method(None, "synflow", settings={"density": 0.3})
    assert one.knob is not None and (one.knob.value, one.knob.largest) == (0.3, 1.0)
    assert not one.settings and one.phases[-1].model_share == pytest.approx(0.3, abs=0.05)


def test_what_trains_the_whole_model_first_fits_at_no_density():
    dense = method(None, "fedavg", MLP).needs_bytes
    one = method(dense - 1, "iterative", MLP)
    assert not one.fits and one.knob is not None and one.knob.largest is None
    assert one.needs_bytes == dense and one.why.startswith("needs ")
    assert [phase.fits for phase in one.phases] == [False, True]
    assert one.phases[0].binds == "memory"


def test_initial_pruning_may_be_for_a_larger_device():
    limit = method(None, "fedavg", MLP).needs_bytes
    one = method(limit, "prunefl", MLP)
    assert one.fits and not one.lone_fits
    assert one.knob is not None and one.knob.name == "size_limit" and one.knob.value is not None
    said = verdicts(block(limit, ["prunefl"], MLP))
    assert any("needs one client with" in line for line in said)
    assert any("initial_pruning=false with an importance_budget_bytes" in line for line in said)
    without = {"initial_pruning": False, "importance_budget_bytes": 10_000}
    assert method(limit + 50_000, "prunefl", MLP, settings=without).fits
    said = verdicts(block(limit - 40_000, ["prunefl"], MLP))
    assert any("whatever its size_limit" in line for line in said)
    assert any("importance_budget_bytes sums them in pieces" in line for line in said)


@pytest.mark.parametrize("density", [None, 0.3])
def test_masks_of_a_criterion_get_as_small_as_they_must(density):
    """The size limit that is found bounds the first masks, too; more does not fit."""
    settings = {"initial": "synflow", "initial_density": density, "importance_budget_bytes": 10_000}
    one = method(130_000, "prunefl", MLP, settings=settings)
    assert one.fits and one.needs_bytes <= 130_000
    assert one.knob is not None and one.knob.name == "size_limit"
    found = one.knob.value
    assert found is not None and 0.01 < found < 0.1
    assert one.phases[0].model_share == pytest.approx(found, abs=0.01)
    for limit, expected in ((1.1 * found, found), (0.9 * found, 0.9 * found)):
        set_so = method(130_000, "prunefl", MLP, settings={**settings, "size_limit": limit})
        assert set_so.knob is not None
        assert set_so.knob.value == pytest.approx(expected, rel=0.03)


def test_what_begins_with_full_masks_needs_them():
    dense = method(None, "fedavg", MLP).needs_bytes
    settings = {"initial_pruning": False, "reconfigure_every": 0}
    one = method(dense - 1, "prunefl", MLP, settings=settings)
    assert not one.fits and one.knob is not None and one.knob.largest is None
    assert one.needs_bytes == dense


def test_methods_that_choose_by_memory_do():
    wide, narrow = (method(memory, "heterofl") for memory in (10**9, 15_000))
    assert wide.phases[0].about == "width 1" and narrow.phases[0].about != "width 1"
    assert narrow.phases[0].model_share < wide.phases[0].model_share == 1


def test_what_a_device_gets_of_the_largest_weights_fits_as_it_is_split():
    """Its mask is made for it: no other split of as many weights is held against its memory."""
    one = method(None, "fiarse", MLP)
    assert one.phases[0].about == "density 1" and one.phases[0].model_share == 1
    for density in ("0.5", "0.25", "0.125", "0.0625"):
        limit = one.needs_bytes - 1
        one = method(limit, "fiarse", MLP)
        assert one.phases[0].about == f"density {density}" and one.fits and one.knob is None
        assert one.needs_bytes == one.phases[0].memory.peak_bytes <= limit
        assert method(one.needs_bytes, "fiarse", MLP).phases[0].about == f"density {density}"
    none = method(one.needs_bytes - 1, "fiarse", MLP)
    assert none.phases[0].about == "density 0.0625" and not none.fits


def test_what_cannot_be_planned_says_why():
    found = plan(
        SPEC,
        [Device(0)],
        profile=PROFILE,
        methods=["fedavg", "heterofl"],
        settings={"assign": "anyhow"},
    )
    fedavg, heterofl = found.devices[0].methods
    assert fedavg.planned and not heterofl.planned
    assert "assign must be one of" in heterofl.why
    assert any("heterofl: not planned: assign" in line for line in verdicts(found.devices[0]))


def test_code_of_ones_own_that_fails_costs_its_own_lines_only(tmp_path, monkeypatch):
    (tmp_path / "failing_method.py").write_text("def failing(server):\n    return server.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    fedavg, failing = block(None, ["fedavg", "failing_method:failing"]).methods
    assert fedavg.planned and not failing.planned and "nothing" in failing.why


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="no method named 'fedavgg'; nearest: fedavg"):
        block(None, ["fedavgg"])
    with pytest.raises(ValueError, match="has a setting 'densty'; nearest: density"):
        block(None, ["snip"], settings={"densty": 0.1})
    with pytest.raises(ValueError, match="needs a model, and a device or a fleet"):
        plan(SPEC, [], profile=PROFILE)


def test_the_parts_of_memory_are_all_of_it():
    for one in block(None, settings={"momentum": 0.9}).methods:
        for phase in one.phases:
            split = phase.memory
            assert min(vars(split).values()) >= 0
            assert split.weights_bytes and split.activations_bytes
            if not phase.forward_only and phase.name != "score":  # which has no optimiser
                assert split.optimizer_bytes, (one.method, phase.name)


# --- the rule of choice, by hand ---


def made(name, *, share=1.0, seconds=(1.0, 1.0), fits=True, forward=False, bound=False, lone=None):
    compute, link = seconds
    phase = Phase(
        "train", "", True, False, share, MemorySplit(100), 1, 1, 1, 1, compute, link, fits,
        "link" if link > compute else "compute", forward,
    )  # fmt: skip
    once = [] if lone is None else [replace(phase, recurring=False, one_client=True, fits=lone)]
    return MethodPlan(
        name, (*once, phase), fits=fits, needs_bytes=100 if fits else 10**6, bound=bound
    )


def test_the_whole_model_where_computing_takes_the_longer():
    name, why = recommend([made("fedavg", seconds=(3, 2)), made("snip", share=0.2, seconds=(1, 1))])
    assert name == "fedavg" and "computing takes longer" in why


def test_the_quickest_where_sending_takes_the_longer():
    able = [made("fedavg", seconds=(2, 3)), made("snip", share=0.2, seconds=(1, 1))]
    known = [*able, made("prunefl", seconds=(0.1, 0.1), bound=True)]
    assert recommend(known)[0] == "snip"


def test_the_most_of_the_model_where_the_whole_does_not_fit():
    able = [
        made("fedavg", fits=False),
        made("allsmall", share=0.25, seconds=(1, 1)),
        made("synflow", share=0.5, seconds=(9, 9)),
        made("ntk_zo", share=0.9, forward=True),
    ]
    name, why = recommend(able)
    assert name == "synflow" and "does not fit" in why and "50%" in why


def test_a_phase_of_one_client_that_does_not_fit_comes_after_others():
    able = [made("prunefl", share=0.9, lone=False), made("allsmall", share=0.1, lone=True)]
    assert recommend(able)[0] == "allsmall"
    name, why = recommend(able[:1])
    assert name == "prunefl" and "larger device" in why


def test_forward_passes_are_the_last_resort():
    name, why = recommend([made("fedavg", fits=False), made("ntk_zo", forward=True)])
    assert name == "ntk_zo" and "only forward passes fit" in why


def test_where_nothing_fits_it_says_what_would():
    name, why = recommend([made("fedavg", fits=False)])
    assert name is None and "fedavg needs the least, 1.00 MB" in why
    assert recommend([MethodPlan("fedavg", why="no")])[0] is None


# --- fleets ---


def test_stages_are_no_choice_of_a_device():
    """All devices of a round train the same stage; only width and depth differ among them."""
    fleet = Fleet((always(Member(PROFILE, {"memory_bytes": Quantity((1e9,))})),), 1)
    found = plan(MLP, profile=PROFILE, methods=["smartfreeze", "slt"], fleet=fleet).devices[0]
    assert [one.choices for one in found.methods] == [{}, {}]
    assert all(one.fits for one in found.methods)


def test_shares_of_a_fleet_are_counted():
    dense = method(None, "fedavg").needs_bytes
    # of ten devices three hold the whole model
    sizes = [dense] * 3 + [dense - 1] * 7
    members = [Member(PROFILE, {"memory_bytes": Quantity((float(size),))}) for size in sizes]
    fleet = Fleet(tuple(map(always, members)), 10)
    names = ["fedavg", "heterofl", "allsmall", "prunefl", "exclusivefl", "fiarse"]
    found = plan(SPEC, profile=PROFILE, methods=names, fleet=fleet).devices[0]
    assert found.device_steps == 200 and found.memory_bytes == dense - 1
    by_name = {one.method: one for one in found.methods}
    assert by_name["fedavg"].phases[0].share == pytest.approx(0.3)
    assert by_name["exclusivefl"].phases[0].share == pytest.approx(0.3)
    assert by_name["heterofl"].phases[0].share == 1
    assert by_name["heterofl"].choices == pytest.approx({"width 1": 0.3, "width 0.5": 0.7})
    assert by_name["allsmall"].choices == {"width 0.5": 1}
    assert by_name["fiarse"].phases[0].share == 1
    shares = by_name["fiarse"].choices
    assert shares["density 1"] == pytest.approx(0.3) and sum(shares.values()) == pytest.approx(1)
    assert by_name["prunefl"].phases[0].share == 0  # g² of all weights beside the whole model


def test_who_may_not_send_so_much_or_for_so_long_takes_no_part():
    """A message of the whole model and its answer are two times its values, and a little."""
    both = 2 * 4 * SPEC.num_params
    cases = [{"budget_bytes": both}, {"budget_bytes": 2 * both + 10_000}, {"budget_seconds": 1e-6}]
    members = [
        Member(PROFILE, {name: Quantity((float(value),)) for name, value in own.items()})
        for own in (*cases, {})
    ]
    fleet = Fleet(tuple(map(always, members)), 4)
    (phase,) = (
        plan(SPEC, profile=PROFILE, methods=["fedavg"], fleet=fleet).devices[0].methods[0].phases
    )
    assert phase.share == 0.5


def test_in_a_fleet_what_all_can_do_is_chosen_and_the_share_is_said():
    dense = method(None, "fedavg", MLP).needs_bytes
    sizes = [dense] * 6 + [dense * 2 // 3] * 4  # the median device holds the whole model
    members = [Member(PROFILE, {"memory_bytes": Quantity((float(size),))}) for size in sizes]
    fleet = Fleet(tuple(map(always, members)), 10)

    def found(*names):
        return plan(MLP, profile=PROFILE, methods=names, fleet=fleet).devices[0]

    alone = found("fedavg")
    assert alone.recommended == "fedavg" and "Only 60% of the fleet" in alone.reason
    both = found("fedavg", "synflow", "allsmall", "heterofl")
    fedavg, synflow, allsmall, heterofl = both.methods
    assert both.recommended == "heterofl" and "All devices of the fleet" in both.reason
    assert "does not fit all devices" in both.reason
    assert allsmall.phases[0].about == "width 0.5" and heterofl.phases[0].about == "width 1"
    assert (fedavg.share, synflow.share, allsmall.share, heterofl.share) == (0.6, 1, 1, 1)
    small = method(dense * 2 // 3, "synflow", MLP)
    assert small.knob is not None and synflow.knob is not None
    assert small.knob.value is not None and synflow.knob.value == small.knob.value


def test_a_fleet_that_is_never_there_is_refused():
    fleet = Fleet((always(Member(PROFILE, {"present": Quantity((0.0,))})),), 1)
    with pytest.raises(ValueError, match="no device of the fleet is there"):
        plan(SPEC, profile=PROFILE, fleet=fleet)


# --- what is shown ---


def test_json_holds_the_figures():
    found = plan(SPEC, [Device(0, memory_bytes=40_000)], profile=PROFILE, methods=["prunefl"])
    document = json.loads(json.dumps(to_document(found), allow_nan=False))
    assert document["format"] == 1 and document["input_shape"] == [1, 8, 8]
    (one,) = document["devices"]
    (shown,) = one["methods"]
    assert shown["method"] == "prunefl" and shown["knob"]["name"] == "size_limit"
    for phase, kept in zip(shown["phases"], found.devices[0].methods[0].phases, strict=True):
        assert phase["memory"]["peak_bytes"] == kept.memory.peak_bytes
        assert phase["seconds"] == phase["compute_seconds"] + phase["link_seconds"]


def test_the_page_is_one_file_and_names_everything():
    found = plan({"<net>": SPEC}, [Device(0, memory_bytes=45_000)], profile=PROFILE)
    page = plan_page(found)
    assert page.startswith("<!doctype html>") and "<net>" not in page and "&lt;net&gt;" in page
    assert "<script" not in page and 'id="memory-0"' in page
    for one in found.devices[0].methods:
        assert one.method in page
    assert page == plan_page(found)


def test_a_row_for_each_phase_and_lines_for_the_terminal():
    found = plan(SPEC, [Device(0, memory_bytes=40_000)], profile=PROFILE)
    shown = rows(found.devices[0])
    phases = sum(len(one.phases) for one in found.devices[0].methods)
    several = sum(len(one.phases) > 1 for one in found.devices[0].methods)
    assert len(shown) == phases + several
    parts = list(plan_parts(found))
    assert any(isinstance(part, str) and part.startswith("-> ") for part in parts)
