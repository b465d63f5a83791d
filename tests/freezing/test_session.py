"""Two sessions around a cut against one of the whole model."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import FULL_SGD, LOSSES, NET, assert_near, batch, masks_of, opened, start

from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.freezing.beginning import frozen_beginning, frozen_blocks, split
from fedlean.freezing.session import BeginningSession
from fedlean.layers import BatchNorm, Conv2d, GlobalAvgPool, Linear, ReLU
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet8
from fedlean.runtime.remote.room import STATM, resident_bytes
from fedlean.spec import ModelSpec, sequential
from fedlean.train.sgd import local_sgd

SMALL = resnet8((3, 8, 8), 4, norm="batch")
MOBILE = mobilenetv3_small((3, 16, 16), 4)
ENGINES = ["native", "torch"]


def first_half(spec: ModelSpec) -> frozenset[str]:
    """The tensors of a beginning that ends where one tensor crosses."""
    blocks = list(spec.blocks)
    if len(blocks) > 1:
        return frozen_blocks(spec, blocks[: len(blocks) // 2])
    nodes = {node.name for node in spec.nodes[: len(spec.nodes) // 2]}
    return frozenset(n for n in spec.tensor_shapes if n.rsplit(".", 1)[0] in nodes)


def both(name, spec, *, density=1.0, sgd=FULL_SGD, loss="ce", micro=2, size=5, threads=1):
    """(one session, the two around a cut) on separate engines, each of one kind."""
    frozen, params = first_half(spec), start(spec)
    masks = masks_of(spec, density) if density < 1 else {}
    whole, parts = (open_engine(name, threads) for _ in range(2))
    one = opened(
        whole, spec, params, masks=masks, frozen=frozen, sgd=sgd, loss=loss, batch_size=size
    )
    two = BeginningSession(
        parts,
        spec,
        params,
        SubModel(masks, frozen=frozen),
        batch_size=size,
        micro_batch=micro,
        optimizer=sgd,
        loss=loss,
    )
    return one, two


def same(got, expected) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].tobytes() == expected[name].tobytes() for name in expected
    )


def trained(session, spec, size=5, steps=3):
    losses = []
    for seed in range(steps):
        x, y = batch(spec, size, seed)
        losses.append(session.step(x, y, importance=seed == 1))
    x, y = batch(spec, size, 9)
    return [*losses, session.loss(x, y)]


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("spec", [NET, SMALL, MOBILE], ids=["net", "resnet8", "mobile"])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_native_results_are_those_of_one_session_bit_for_bit(spec, density, loss):
    """Momentum, decay, clipping over all tensors, the proximal term, masks, Σ g²."""
    one, two = both("native", spec, density=density, loss=loss)
    assert trained(two, spec) == trained(one, spec)
    assert same(two.params(), one.params()) and same(
        two.params(packed=True), one.params(packed=True)
    )
    assert same(two.importance(), one.importance())
    assert list(two.params()) == list(spec.tensor_shapes)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_micro_batches_change_no_bit(size, threads):
    x, y = batch(SMALL, size)
    results = []
    for micro in (1, 3, 16, 64):
        _, two = both("native", SMALL, micro=micro, size=size, threads=threads)
        features = two.features(x).copy()
        results.append((features.tobytes(), two.step(x, y), two.params()))
    assert len({(features, loss) for features, loss, _ in results}) == 1
    assert all(same(params, results[0][2]) for _, _, params in results)
    one, _ = both("native", SMALL, size=size, threads=threads)
    name = split(SMALL, first_half(SMALL)).name
    expected = one.forward(x, taps=[name])[name]
    assert results[0][0] == expected.tobytes()


@pytest.mark.parametrize("spec", [NET, SMALL], ids=["net", "resnet8"])
def test_torch_results_are_those_of_one_session(spec):
    one, two = both("torch", spec)
    np.testing.assert_allclose(trained(two, spec), trained(one, spec), rtol=1e-4)
    assert_near(two.params(), one.params(), 2e-4)


@pytest.mark.usefixtures("has_native")
def test_local_sgd_takes_it_as_a_session():
    one, two = both("native", SMALL, size=4)

    class Drawn:
        num_examples = 12

        def draw(self, *, steps, batch_size, seed, examples=None):
            return (batch(SMALL, batch_size, seed + i) for i in range(steps))

    losses = [local_sgd(s, Drawn(), steps=3, batch_size=4, seed=1) for s in (one, two)]
    assert losses[0] == losses[1] and same(two.params(), one.params())


@pytest.mark.usefixtures("has_native")
def test_the_parts_of_a_step():
    """Forward with taps, backward, apply, descend and load, as of one session."""
    sessions = both("native", SMALL)
    x, y = batch(SMALL)
    given = np.full((5, 4), 0.1, np.float32)
    for session in sessions:
        out = session.forward(x, taps=["stage3_1_relu2"], training=True)
        assert set(out) == {"stage3_1_relu2", "fc"}
        gradients = session.backward({"fc": given}, dense=True)
        session.apply(gradients)
        session.forward(x, training=True)
        session.descend({"fc": given}, importance=True)
    one, two = sessions
    assert same(two.params(), one.params()) and same(two.importance(), one.importance())
    again = start(SMALL, 7)
    for session in sessions:
        session.load(again)
    assert same(two.params(), again) and two.loss(x, y) == one.loss(x, y)


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_of_the_beginning_moves(name):
    """Not even the running statistics of its norms."""
    if name == "native":
        pytest.importorskip("fedlean._native")
    _, two = both(name, SMALL)
    trained(two, SMALL)
    frozen, params = first_half(SMALL), start(SMALL)
    assert any(key.endswith("running_var") for key in frozen)
    assert all(two.params()[key].tobytes() == params[key].tobytes() for key in frozen)
    assert any(not np.array_equal(value, params[key]) for key, value in two.params().items())


@pytest.mark.usefixtures("has_native")
def test_memory_is_both_sessions_and_what_passes_between():
    _, two = both("native", SMALL, micro=2, size=5)
    shape = SMALL.shapes[two.name]
    assert two.features_bytes == 4 * (5 + 2) * int(np.prod(shape))
    trained(two, SMALL)
    held = two.beginning.held_bytes + two.rest.held_bytes + two.features_bytes
    assert two.peak_memory_bytes == held


class Stopped(Exception):
    pass


@pytest.mark.skipif(not STATM.is_file(), reason="this system says the peak only")
def test_what_passes_between_is_in_memory_when_the_sessions_are_opened():
    """A device's limit looks at the process then: 64 MB of activations are there."""
    spec = sequential(
        (1, 64, 64), [("conv", Conv2d(64, 1)), ("pool", GlobalAvgPool()), ("fc", Linear(2))]
    )
    seen = []

    class Limited:
        name = "limited"

        def open_forward(self, *given, **named):
            seen.append(resident_bytes())
            raise Stopped

    before = resident_bytes()
    with pytest.raises(Stopped):
        BeginningSession(
            Limited(),
            spec,
            start(spec),
            SubModel(frozen=frozenset({"conv.weight", "conv.bias"})),
            batch_size=64,
            micro_batch=1,
            optimizer=SGD(0.1),
            at="conv",
        )
    assert seen[0] - before > 60e6


def test_a_micro_batch_is_at_most_the_batch():
    _, two = both("torch", SMALL, micro=64, size=5)
    assert two.micro_batch == 5


def open_parts(**changed):
    frozen = first_half(SMALL)
    given = {
        "spec": SMALL,
        "params": start(SMALL),
        "sub_model": SubModel(frozen=frozen),
        "batch_size": 5,
        "micro_batch": 2,
        "optimizer": SGD(0.1),
        **changed,
    }
    return BeginningSession(open_engine("torch", 1), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be an integer from 1"),
        ({"micro_batch": True}, "micro_batch must be an integer from 1"),
        ({"batch_size": 0}, "batch_size must be an integer"),
        ({"loss": "mse"}, "loss must be 'ce' or 'bce'"),
        ({"sub_model": SubModel()}, "no beginning is frozen"),
        ({"sub_model": SubModel(frozen=frozenset({"nothing"}))}, "frozen 'nothing' is no tensor"),
        ({"params": {}}, "parameter 'stem.weight' of shape .* is missing"),
        ({"at": "fc"}, "'fc' is not in the frozen beginning"),
    ],
)
def test_what_is_refused_at_opening(changed, message):
    with pytest.raises(ValueError, match=message):
        open_parts(**changed)


def test_what_is_refused_of_a_call():
    """As one session refuses it, whichever part it is about; then it goes on."""
    session = open_parts()
    before = session.params()
    x, y = batch(SMALL)
    calls = [
        (lambda: session.step(x[:, :2].copy(), y), "x has shape"),
        (lambda: session.step(np.concatenate([x, x]), np.concatenate([y, y])), "x holds 10"),
        (lambda: session.step(x, y + 9), "y has labels from"),
        (lambda: session.loss(x, y[:2].copy()), "y has shape"),
        (lambda: session.forward(x, taps=["none"]), "no layer named 'none' to tap"),
        (lambda: session.forward(x, taps=["stem"]), "'stem' is in the frozen beginning, which"),
        (lambda: session.load({}), "is missing"),
        (lambda: session.apply({"none": y}), "gradient 'none'"),
        (lambda: session.backward({"fc": x}), "no gradient can enter at 'fc'"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert same(session.params(), before)


def test_a_beginning_of_one_layer_without_tensors():
    """A ReLU alone: there is nothing to freeze, and it is evaluated beforehand."""
    spec = sequential((4,), [("relu", ReLU()), ("norm", BatchNorm()), ("fc", Linear(3))])
    assert frozen_beginning(spec, ()) == ("relu",)
    one = opened(open_engine("torch", 1), spec)
    two = BeginningSession(
        open_engine("torch", 1),
        spec,
        start(spec),
        SubModel(),
        batch_size=5,
        micro_batch=2,
        optimizer=SGD(0.1),
    )
    x, y = batch(spec)
    assert two.step(x, y) == pytest.approx(one.step(x, y))
    assert_near(two.params(), one.params())
