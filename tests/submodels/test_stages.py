"""Grafts and reroutes by hand, what they refuse, and that the results compute what they should."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import opened, start
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.engine.open import open_engine
from fedlean.layers import Add, Conv2d, Flatten, GlobalAvgPool, Linear, ReLU
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.submodels.stages import after, graft, reroute, span, upto

RUNS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
CHAIN = sequential(
    (4,),
    [("a", Linear(3), "one"), ("b", Linear(3), "two"), ("c", Linear(3), "three"), ("out", ReLU())],
)


def wiring(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    return {node.name: node.inputs for node in spec.nodes}


def test_the_span_functions_are_here_too():
    assert list(wiring(upto(CHAIN, "b"))) == ["a", "b"]
    assert list(wiring(after(CHAIN, "b"))) == ["c", "out"]
    assert list(wiring(span(CHAIN, "a", "c"))) == ["b", "c"]


HEAD = (Node("head", Linear(2), (INPUT,), "head"), Node("end", ReLU(), ("head",), "head"))


def test_a_graft_that_becomes_the_output():
    staged = graft(upto(CHAIN, "a"), HEAD, at="a", output=True)
    assert wiring(staged) == {"a": (INPUT,), "head": ("a",), "end": ("head",)}
    assert staged.output_shape == (2,) and staged.by_name["head"].block == "head"


def test_dead_ends_come_before_the_output():
    exits = graft(CHAIN, HEAD, at="b")
    assert list(wiring(exits)) == ["a", "b", "c", "head", "end", "out"]
    assert exits.output_shape == CHAIN.output_shape
    assert exits.by_name["head"].inputs == ("b",)
    # without `at` nodes read what they name, which may be the model's input
    both = graft(CHAIN, [Node("x", Linear(3), (INPUT,)), Node("y", Add(), ("x", "c"))])
    assert wiring(both) | {"x": (INPUT,), "y": ("x", "c")} == wiring(both)
    assert upto(exits, "out") == CHAIN


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graft(CHAIN, []), "no nodes to graft"),
        (lambda: graft(CHAIN, [Node("b", ReLU(), ("a",))]), "a layer 'b' already: graft a new"),
        (lambda: graft(CHAIN, [Node(INPUT, ReLU(), ("a",))]), "a layer 'input' already"),
        (lambda: graft(CHAIN, HEAD, at="z"), "no layer 'z'; it has 'a', 'b', 'c', 'out'"),
        (lambda: graft(CHAIN, HEAD, at="out"), "'head' would read 'out', the output, which"),
        (lambda: graft(CHAIN, [Node("x", ReLU(), ("z",))]), "layer 'x' reads 'z', which is not"),
        (lambda: graft(CHAIN, reversed(HEAD), at="a"), "layer 'end' reads 'head', which is not"),
        (lambda: graft(CHAIN, [Node("x", GlobalAvgPool(), ("a",))]), "layer 'x' .* image"),
        (lambda: reroute(CHAIN, "z", "a"), "no layer 'z'"),
        (lambda: reroute(CHAIN, "a", "z"), "no layer 'z'"),
        (lambda: reroute(CHAIN, "a", "a"), "'a' cannot be read in place of itself"),
        (lambda: reroute(graft(CHAIN, HEAD, at="a", output=True), "b", "end"), "'c' .* the output"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_surrogate_takes_the_place_of_a_block():
    """ProFL's shrinking: who read block two reads what stands in for it, and block two goes."""
    mapped = graft(CHAIN, [Node("small", Linear(3), ("a",), "surrogate")])
    shrunk = reroute(mapped, "b", "small")
    assert wiring(shrunk) == {"a": (INPUT,), "small": ("a",), "c": ("small",), "out": ("c",)}
    kept = reroute(mapped, "b", "small", keep=True)
    assert wiring(kept) == wiring(shrunk) | {"b": ("a",)}
    assert list(wiring(kept))[-1] == "out"
    back = reroute(kept, "small", "b")
    assert wiring(back) == wiring(CHAIN)


def test_only_what_nobody_reads_any_more_goes():
    # b's only reader moves to a: b goes, a stays; a dead end that was there before stays
    exits = graft(CHAIN, HEAD, at="a")
    assert list(wiring(reroute(exits, "b", "a"))) == ["a", "c", "head", "end", "out"]
    # an exit reads b, too: it reads a instead
    at_b = graft(CHAIN, HEAD, at="b")
    assert wiring(reroute(at_b, "b", "a"))["head"] == ("a",)
    # two layers that only the old one needed go with it
    x = Node("x", Linear(3), (INPUT,))
    assert list(wiring(reroute(graft(CHAIN, [x]), "c", "x"))) == ["x", "out"]


def test_what_the_new_needs_is_left_alone():
    """A layer put between: it reads b itself, and c reads it."""
    between = reroute(graft(CHAIN, [Node("new", Linear(3), ("b",))]), "b", "new")
    assert wiring(between) == {
        "a": (INPUT,),
        "b": ("a",),
        "new": ("b",),
        "c": ("new",),
        "out": ("c",),
    }


def test_the_output_may_be_replaced():
    replaced = reroute(graft(CHAIN, HEAD, at="c"), "out", "end")
    assert list(wiring(replaced)) == ["a", "b", "c", "head", "end"]
    kept = reroute(graft(CHAIN, HEAD, at="c"), "out", "end", keep=True)
    assert list(wiring(kept))[-1] == "end" and "out" in wiring(kept)


def test_shapes_that_do_not_fit_name_the_layer():
    spec = sequential((2, 4, 4), [("conv", Conv2d(3, 3)), ("flat", Flatten()), ("fc", Linear(2))])
    with pytest.raises(ValueError, match="layer 'fc' "):
        reroute(spec, "flat", "conv")


@RUNS
@given(networks(), st.data())
def test_a_reroute_leaves_a_valid_model_whose_readers_have_moved(spec, data):
    """To a copy of any layer: the same model under another name."""
    old = data.draw(st.sampled_from(spec.nodes))
    copy = Node("copy", old.layer, old.inputs, old.block)
    moved = reroute(graft(spec, [copy]), old.name, "copy")
    assert old.name not in moved.by_name
    expected = {
        node.name: tuple("copy" if s == old.name else s for s in node.inputs)
        for node in spec.nodes
        if node.name != old.name
    }
    assert wiring(moved) == expected | {"copy": old.inputs}


@pytest.mark.usefixtures("has_native")
def test_a_stage_trains_and_the_rest_of_the_model_is_none_the_wiser():
    """Tensors keep their names: what a stage trained is put back into the whole by name."""
    spec = sequential((4,), [("a", Linear(3)), ("r", ReLU()), ("b", Linear(5))])
    head = [Node("head", Linear(2), (INPUT,))]
    stage = graft(upto(spec, "r"), head, at="r", output=True)
    params = start(spec) | start(stage)
    session = opened(open_engine("native", 1), stage, {n: params[n] for n in stage.tensor_shapes})
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    session.step(x, np.zeros(5, np.int64))
    trained = session.params()
    assert trained.keys() - spec.tensor_shapes.keys() == {"head.weight", "head.bias"}
    assert all(trained[n].shape == spec.tensor_shapes[n] for n in ("a.weight", "a.bias"))
    assert not np.array_equal(trained["a.weight"], params["a.weight"])
