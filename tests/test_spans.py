"""Spans of a model: by hand, against a search of all paths, and against the whole model."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import BLOCK, MLP, NET, opened, start
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.engine.open import open_engine
from fedlean.layers import Add, Linear, ReLU
from fedlean.models.resnet import resnet8
from fedlean.spans import after, crossing, span, upto
from fedlean.spec import INPUT, ModelSpec, Node

RUNS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
# in -> a -> b -> sum -> out, with a way around b, and an exit at a
FORKED = ModelSpec(
    (4,),
    (
        Node("a", Linear(3), (INPUT,), "one"),
        Node("exit", Linear(2), ("a",), "exit"),
        Node("b", Linear(3), ("a",), "two"),
        Node("sum", Add(), ("a", "b"), "two"),
        Node("out", Linear(2), ("sum",), "head"),
    ),
)


def names(spec: ModelSpec) -> list[str]:
    return [node.name for node in spec.nodes]


def test_upto_by_hand():
    assert names(upto(FORKED, "b")) == ["a", "b"]
    assert names(upto(FORKED, "exit")) == ["a", "exit"]
    assert names(upto(FORKED, "out")) == ["a", "b", "sum", "out"]
    assert names(upto(FORKED, "out", also=["exit"])) == names(FORKED)
    assert names(upto(FORKED, "b", also=["exit"])) == ["a", "exit", "b"]
    assert names(upto(FORKED, "exit", also=["b"])) == ["a", "b", "exit"]
    part = upto(FORKED, "sum")
    assert part.input_shape == (4,) and part.output_shape == (3,)
    assert part.by_name["sum"] == FORKED.by_name["sum"]  # with its block and inputs
    assert dict(part.param_shapes) == {
        name: shape for name, shape in FORKED.param_shapes.items() if name[0] in "ab"
    }


def test_after_by_hand():
    part = after(upto(FORKED, "out"), "a")
    assert names(part) == ["b", "sum", "out"] and part.input_shape == (3,)
    assert part.by_name["b"].inputs == (INPUT,)
    assert part.by_name["sum"].inputs == (INPUT, "b")  # both ways around begin at the cut
    assert names(after(FORKED, "a")) == ["exit", "b", "sum", "out"]
    assert names(after(upto(FORKED, "out"), "sum")) == ["out"]


def test_span_by_hand():
    assert span(FORKED) is FORKED
    assert names(span(FORKED, "a", "sum")) == ["b", "sum"]
    assert names(span(FORKED, "", "b")) == ["a", "b"]
    assert span(FORKED, "a") == after(FORKED, "a")
    assert span(FORKED, "a", "out") == after(upto(FORKED, "out"), "a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: upto(FORKED, "c"), "no layer 'c'; it has 'a', 'exit', 'b', 'sum', 'out'"),
        (lambda: upto(FORKED, "a", also=["c"]), "no layer 'c'"),
        (lambda: upto(FORKED, "a", also=["b"]), "'b' reads 'a', which cannot be the output"),
        (lambda: after(FORKED, "c"), "no layer 'c'"),
        (lambda: after(FORKED, "out"), "'out' is the output of the model: there is nothing"),
        (lambda: after(upto(FORKED, "out"), "b"), "cut at 'b': 'a' of what lies .* as at 'a'"),
        (lambda: after(FORKED, "sum"), "cut at 'sum': 'a' of what lies .* as at 'a'"),  # the exit
        (lambda: span(FORKED, "exit", "out"), "'out' does not need 'exit'"),
        (lambda: span(FORKED, "a", "a"), "'a' is the output of the model"),
        (lambda: span(FORKED, "sum", "b"), "'b' does not need 'sum'"),
        (lambda: span(FORKED, "c", "b"), "no layer 'c'"),
        (lambda: span(FORKED, "", "c"), "no layer 'c'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_without_any_cut():
    spec = ModelSpec(
        (3,),
        (
            Node("a", ReLU(), (INPUT,)),
            Node("b", Add(), ("a", INPUT)),
            Node("c", Add(), ("b", INPUT)),
        ),
    )
    with pytest.raises(ValueError, match=r"'b': 'input' of what lies before .*; cut elsewhere"):
        after(spec, "b")


def naive_needed(spec: ModelSpec, name: str) -> set[str]:
    """By recursion along every path."""
    if name == INPUT:
        return set()
    return {name}.union(*(naive_needed(spec, s) for s in spec.by_name[name].inputs))


@RUNS
@given(networks(), st.data())
def test_any_cut_divides_a_model_or_is_refused(spec, data):
    name = data.draw(st.sampled_from([node.name for node in spec.nodes[:-1]] or ["none"]))
    if name == "none":
        return
    before = naive_needed(spec, name)
    first = upto(spec, name)
    assert set(first.by_name) == before and first.nodes[-1].name == name
    read = {s for n in spec.nodes if n.name not in before for s in n.inputs}
    across = (before | {INPUT}) & read
    assert set(crossing(spec, before)) == across
    if across == {name}:
        rest = after(spec, name)
        assert not first.by_name.keys() & rest.by_name.keys()
        assert first.by_name.keys() | rest.by_name.keys() == spec.by_name.keys()
        assert {**first.tensor_shapes, **rest.tensor_shapes} == dict(spec.tensor_shapes)
        assert rest.output_shape == spec.output_shape
    else:
        with pytest.raises(ValueError, match=r"cannot be cut|the output of the model"):
            after(spec, name)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("spec", [MLP, NET, BLOCK, resnet8((3, 8, 8), 4)])
def test_the_parts_compute_what_the_whole_computes(spec):
    """At every cut that there is: forward through one part and then the other, bit for bit."""
    params = start(spec)
    engine = open_engine("native", 1)
    x = np.random.default_rng(1).standard_normal((5, *spec.input_shape)).astype(np.float32)
    whole = opened(engine, spec, batch_size=5, params=params)
    cuts = 0
    for node in spec.nodes[:-1]:
        if crossing(spec, naive_needed(spec, node.name)) != (node.name,):
            continue
        cuts += 1
        values = whole.forward(x, taps=[node.name])
        between, out = x, {}
        for part in (upto(spec, node.name), after(spec, node.name)):
            own = {name: params[name] for name in part.tensor_shapes}
            session = opened(engine, part, batch_size=5, params=own)
            out = session.forward(between)
            between = out[part.nodes[-1].name]
            assert between.tobytes() == values[part.nodes[-1].name].tobytes()
    assert cuts >= 2
