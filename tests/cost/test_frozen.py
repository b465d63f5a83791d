"""What frozen tensors save: by hand, against a walk of every path, and as PyTorch counts it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import SubModel, Work
from fedlean.cost.backward import FORWARD_SHARE, Activations, activations_of
from fedlean.cost.flops import layer_flops, step_flops, work_flops
from fedlean.cost.price import Model, cost, round_seconds
from fedlean.cost.profile import Profile
from fedlean.cost.time import linear_round_time, step_seconds
from fedlean.engine.gradient_flow import needs_gradient
from fedlean.layers import Add, BatchNorm, Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, ReLU
from fedlean.models import catalog
from fedlean.spec import INPUT, ModelSpec, Node, sequential

# weights: 6·5 = 30, 5·4 = 20, 4·3 = 12; twice as many operations an example and pass
MLP = sequential(
    (6,),
    [("a", Linear(5)), ("relu", ReLU()), ("b", Linear(4)), ("norm", ReLU()), ("c", Linear(3))],
)
A, B, C = 60, 40, 24
BOARD = Profile("p", "", "", 1000.0, 0.01, 0.02, 0.5, 4.0, 8.0, 10**9)
SLOW = replace(BOARD, dense_flops_per_s=1e-3)  # on which the sparse way is always the shorter


def of(*layers: str) -> frozenset[str]:
    return frozenset(f"{layer}.{suffix}" for layer in layers for suffix in ("weight", "bias"))


@pytest.mark.parametrize(
    ("frozen", "backward"),
    [
        (frozenset(), A + 2 * B + 2 * C),  # a reads the model's input
        (of("a"), B + 2 * C),  # the beginning: no gradient flows to b's input
        (of("a", "b"), C),
        (of("b"), A + B + 2 * C),  # the middle: its input's gradient alone
        (of("b", "c"), A + B + C),  # the end: gradients of the inputs alone
        (of("a", "b", "c"), 0),
        (frozenset({"a.bias", "b.bias", "c.bias"}), A + 2 * B + 2 * C),  # biases are not counted
        (frozenset({"a.weight"}), 2 * B + 2 * C),  # a's bias trains: b's input takes a gradient
        (frozenset({"a.weight", "b.weight", "c.weight"}), B + C),
        (of("a") | {"b.weight"}, 2 * C),  # b's bias trains
    ],
)
def test_a_chain_by_hand(frozen, backward):
    assert step_flops(MLP, {}, 1, frozen=frozen) == A + B + C + backward
    assert step_flops(MLP, {}, 7, frozen=frozen) == 7 * (A + B + C + backward)
    work = Work(2, 1, forward_examples=3)
    assert work_flops(MLP, work, frozen=frozen) == 5 * (A + B + C) + 2 * backward


def test_pruned_and_with_importance_by_hand():
    """b keeps a half, c a quarter; of the dense gradients b's is not taken, for b is frozen."""
    kept = {"b.weight": 10, "c.weight": 3}
    frozen = of("b")
    backward = A + B // 2 + 2 * C // 4
    assert step_flops(MLP, kept, 1, frozen=frozen) == A + B // 2 + C // 4 + backward
    with_importance = backward - C // 4 + C
    forward = A + B // 2 + C // 4
    assert step_flops(MLP, kept, 1, importance=True, frozen=frozen) == forward + with_importance
    paper = work_flops(MLP, Work(1, 1, kept=kept), dense_gradient=True, frozen=frozen)
    assert paper == forward + with_importance


# conv1 makes 4 maps of 5x5, a depthwise layer and a 1x1 one follow, and the sum has a way around
RESIDUAL = ModelSpec(
    (2, 5, 5),
    (
        Node("conv1", Conv2d(4, 3, padding=1), (INPUT,)),
        Node("norm", BatchNorm(), ("conv1",)),
        Node("deep", Conv2d(4, 3, padding=1, groups=4), ("norm",)),
        Node("one", Conv2d(4, 1), ("deep",)),
        Node("sum", Add(), ("one", "norm")),
        Node("mean", GlobalAvgPool(), ("sum",)),
        Node("fc", Linear(3), ("mean",)),
    ),
)
CONV1, DEEP, ONE, FC = 2 * 72 * 25, 2 * 36 * 25, 2 * 16 * 25, 2 * 12


@pytest.mark.parametrize(
    ("frozen", "backward"),
    [
        (frozenset(), CONV1 + 2 * DEEP + 2 * ONE + 2 * FC),
        (of("conv1"), 2 * DEEP + 2 * ONE + 2 * FC),  # the norm's scale trains
        (of("conv1", "norm"), DEEP + 2 * ONE + 2 * FC),
        (of("conv1", "norm", "deep"), ONE + 2 * FC),
        (of("conv1", "norm", "deep", "one"), FC),  # both ways into the sum are frozen
        (of("deep", "one"), CONV1 + DEEP + ONE + 2 * FC),  # the gradient flows both ways
        (of("conv1", "norm", "deep", "one", "fc"), 0),
    ],
)
def test_residual_and_depthwise_by_hand(frozen, backward):
    forward = CONV1 + DEEP + ONE + FC
    assert step_flops(RESIDUAL, {}, 1, frozen=frozen) == forward + backward


def test_running_statistics_are_no_gradient():
    moves = frozenset({"norm.running_mean", "norm.running_var"})
    for frozen in (frozenset(), of("conv1")):
        assert needs_gradient(RESIDUAL, frozen | moves) == needs_gradient(RESIDUAL, frozen)


def naive(spec: ModelSpec, kept, batch_size: int, frozen, importance: bool) -> int:
    """Every weighted layer, and every path from it down to the input."""

    def trains(name: str) -> bool:
        if name == INPUT:
            return False
        if any(p.rsplit(".", 1)[0] == name and p not in frozen for p in spec.param_shapes):
            return True
        return any(trains(source) for source in spec.by_name[name].inputs)

    total = 0
    for node in spec.weighted:
        weight = f"{node.name}.weight"
        size = 1
        for side in spec.param_shapes[weight]:
            size *= side
        pixels = 1
        for side in spec.shapes[node.name][1:]:
            pixels *= side
        pass_flops = 2 * kept.get(weight, size) * pixels * batch_size
        total += pass_flops
        if trains(node.inputs[0]):
            total += pass_flops
        if weight not in frozen:
            total += 2 * size * pixels * batch_size if importance else pass_flops
    return total


DEEPER = catalog.build("resnet8", (3, 8, 8), 10)
MOBILE = catalog.build("mobilenetv3_small", (3, 32, 32), 10)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([MLP, RESIDUAL, DEEPER]), st.integers(1, 9), st.booleans(), st.data())
def test_any_pattern_costs_what_a_walk_of_every_path_says(spec, batch_size, importance, data):
    frozen = data.draw(st.frozensets(st.sampled_from(sorted(spec.tensor_shapes))))
    kept = {name: data.draw(st.integers(0, 12)) for name in spec.prunable}
    found = step_flops(spec, kept, batch_size, importance=importance, frozen=frozen)
    assert found == naive(spec, kept, batch_size, frozen, importance)
    more = frozen | {data.draw(st.sampled_from(sorted(spec.tensor_shapes)))}
    assert step_flops(spec, kept, batch_size, importance=importance, frozen=more) <= found


@pytest.mark.parametrize("spec", [MLP, DEEPER], ids=["mlp", "resnet8"])
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("beginning", [True, False])
def test_pytorch_counts_the_same(spec, cut, beginning):
    """Its counter looks at the operations that automatic differentiation really runs."""
    pytest.importorskip("torch")
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    from fedlean.engine.protocol import SGD
    from fedlean.engine.torch import TorchEngine
    from fedlean.models.initialise import init_params

    names = list(spec.tensor_shapes)
    at = round(cut * len(names))
    frozen = frozenset(names[:at] if beginning else names[at:])
    if frozen >= spec.param_shapes.keys():
        frozen -= {names[0]}  # it asks PyTorch for a gradient of something
    session = TorchEngine(1).open(
        spec, init_params(spec, 0), SubModel(frozen=frozen), batch_size=3, optimizer=SGD(0.1)
    )
    x = np.ones((3, *spec.input_shape), np.float32)
    with FlopCounterMode(display=False) as counter:
        session.step(x, np.zeros(3, np.int64))
    assert step_flops(spec, {}, 3, frozen=frozen) == counter.get_total_flops()


# Seconds


def test_activations_by_hand():
    """5 + 5 + 4 + 4 + 3; below b nothing trains where a is frozen."""
    assert activations_of(MLP) == Activations(21, 0)
    assert activations_of(MLP, of("a")) == Activations(11, 10)
    assert activations_of(MLP, of("a", "b")) == Activations(3, 18)
    assert activations_of(MLP, of("a", "b", "c")) == Activations(0, 21)
    assert activations_of(MLP, of("c")) == Activations(21, 0)


def test_sparse_seconds_by_hand():
    """a and b frozen, all kept: 148 operations at 0.02 s; 3 outputs both ways, 18 a third."""
    kept = {"a.weight": 30, "b.weight": 20, "c.weight": 12}
    found = step_seconds(MLP, kept, 2, SLOW, frozen=of("a", "b"))
    assert found == pytest.approx(2 * (148 * 0.02 + 0.5 * (3 + 18 * FORWARD_SHARE)))
    dense = step_seconds(MLP, {}, 2, BOARD, frozen=of("a", "b"))
    assert dense == pytest.approx(2 * 148 / 1000)


def test_the_linear_round_is_the_sparse_way():
    """PruneFL's T(M) and what is charged, with frozen tensors as without."""
    kept = {"a.weight": 7, "b.weight": 5, "c.weight": 3}
    setting = {"batch_size": 3, "local_steps": 2}
    seen = set()
    for frozen in (frozenset(), of("a"), of("b"), of("a", "b"), of("c"), of("a", "b", "c")):
        line = linear_round_time(MLP, SLOW, frozen=frozen, **setting)
        expected = line.constant_seconds
        expected += sum(line.seconds_per_weight[name] * count for name, count in kept.items())
        found = round_seconds(MLP, kept, SLOW, frozen=frozen, **setting)
        assert found == pytest.approx(expected, rel=1e-12)
        seen.add(round(found, 6))
    assert len(seen) == 6


def test_resnet18_costs_what_is_left_to_train():
    """Stage after stage is frozen, until all is: a third is left, which is the forward pass."""
    spec = catalog.build("resnet18", (3, 32, 32), 10)
    work = Work(5, 32, importance_steps=1)
    prices = []
    names = list(spec.tensor_shapes)
    for first in ("stem", "stage2", "stage3", "stage4", "fc", None):
        ahead = [i for i, name in enumerate(names) if first and name.startswith(first)]
        frozen = frozenset(names[: ahead[0] if ahead else len(names)])
        task = Model(spec, SubModel(frozen=frozen))
        for one in (work, replace(work, kept={"fc.weight": 512})):
            price = cost(task, (one,), SLOW if one.kept else BOARD)
            prices.append((price.flops, price.seconds, price.peak_memory_bytes))
    for way in (prices[::2], prices[1::2]):
        for more, less in pairwise(way):
            assert less[0] < more[0] and less[1] < more[1] and less[2] <= more[2]
    whole, nothing = prices[0], prices[-2]
    stem = layer_flops(spec, spec.by_name["stem"], {}, 32).forward
    assert 3 * nothing[0] - whole[0] == 5 * stem  # the stem never has an input's gradient
    assert nothing[1] == pytest.approx(nothing[0] / BOARD.dense_flops_per_s)
    last_stage, head = prices[6], prices[8]
    assert last_stage[0] < 0.5 * whole[0] and head[0] < 0.34 * whole[0]


def test_a_mobile_net_without_its_head():
    """Depthwise layers, squeeze and excitation: the head alone trains."""
    head = [name for name in MOBILE.tensor_shapes if not name.startswith("fc")]
    frozen = frozenset(head)
    left = MOBILE.param_shapes.keys() - frozen
    assert left  # else no test
    assert step_flops(MOBILE, {}, 2, frozen=frozen) == naive(MOBILE, {}, 2, frozen, False)


def test_a_pool_before_the_first_weight_takes_no_gradient():
    """As in the engines: nothing below the convolution trains."""
    spec = sequential(
        (1, 8, 8), [("pool", MaxPool2d(2)), ("conv", Conv2d(3, 3)), ("flat", Flatten())]
    )
    assert layer_flops(spec, spec.by_name["conv"], {}, 1).grad_input == 0
