"""Parts of models: where they end by hand, and what each of them holds."""

from __future__ import annotations

import pytest

from fedlean.layers import Add, Conv2d, Flatten, Linear, ReLU
from fedlean.models.catalog import available, build
from fedlean.spans import crossing
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.submodels.parts import Part, parts

SHAPE, CLASSES = (1, 32, 32), 7
UNITS = [f"stage{stage}_{unit}" for stage in range(1, 5) for unit in (1, 2)]
# By hand, in every catalogue model: (name, layer after which it ends).
OWN = {
    "conv2": [("conv1", "pool1"), ("conv2", "pool2"), ("head", "fc2")],
    "lenet300": [("fc1", "relu1"), ("head", "fc3")],
    "lenet5": [("conv1", "pool1"), ("conv2", "pool2"), ("head", "fc3")],
    "lenet5_small": [("conv1", "pool1"), ("conv2", "pool2"), ("head", "fc3")],
    "mlp": [("fc1", "act1"), ("head", "fc3")],
    "mlp_13_7": [("fc1", "act1"), ("head", "fc3")],
    "mlp_27_14": [("fc1", "act1"), ("head", "fc3")],
    "mlp_40_20": [("fc1", "act1"), ("head", "fc3")],
    "mobilenetv3_small": [
        ("stage1", "stage1_1_project_norm"),
        ("stage2", "stage2_2_add"),
        ("stage3", "stage3_5_add"),
        ("stage4", "fc2"),
    ],
    "resnet18": [*((f"stage{n}", f"stage{n}_2_relu2") for n in (1, 2, 3)), ("stage4", "fc")],
    "resnet20": [*((f"stage{n}", f"stage{n}_3_relu2") for n in (1, 2)), ("stage3", "fc")],
    "resnet34": [
        ("stage1", "stage1_3_relu2"),
        ("stage2", "stage2_4_relu2"),
        ("stage3", "stage3_6_relu2"),
        ("stage4", "fc"),
    ],
    "resnet8": [*((f"stage{n}", f"stage{n}_1_relu2") for n in (1, 2)), ("stage3", "fc")],
    "vgg11": [*((f"stage{n}", f"pool{n}") for n in (1, 2, 3, 4)), ("stage5", "fc3")],
    "vgg16": [*((f"stage{n}", f"pool{n}") for n in (1, 2, 3, 4)), ("stage5", "fc3")],
}
DIVIDED = [
    *((name, "") for name in sorted(OWN)),
    ("resnet18,blocks=unit", ""),
    ("resnet34,blocks=unit", ""),
    ("mobilenetv3_small,blocks=unit", ""),
    ("resnet18", "stage1 stage3"),
    ("vgg11", "conv1,stage2"),
]


def ends(found: tuple[Part, ...]) -> list[tuple[str, str]]:
    return [(part.name, part.end) for part in found]


@pytest.mark.parametrize("model", available())
def test_the_own_parts_of_every_model_of_the_catalogue(model):
    assert ends(parts(build(model, SHAPE, CLASSES))) == OWN[model]


@pytest.mark.parametrize(("model", "named"), DIVIDED)
def test_parts_are_consecutive_and_hold_everything_once(model, named):
    spec = build(model, SHAPE, CLASSES)
    found = parts(spec, named)
    order = [layer for part in found for layer in part.layers]
    assert sorted(order) == sorted(spec.by_name) and len(order) == len(set(order))
    tensors = [name for part in found for name in part.tensors]
    assert sorted(tensors) == sorted(spec.tensor_shapes)
    before = {INPUT}
    for part in found:
        inside = before | set(part.layers)
        for layer in part.layers:  # everything that a part reads comes before it
            assert inside.issuperset(spec.by_name[layer].inputs)
        before = inside


@pytest.mark.parametrize(("model", "named"), DIVIDED)
def test_each_later_part_reads_the_model_through_one_activation(model, named):
    spec = build(model, SHAPE, CLASSES)
    held: list[str] = []
    for part in parts(spec, named)[:-1]:
        held += part.layers
        readers = {
            name
            for node in spec.nodes
            if node.name not in held
            for name in node.inputs
            if name in held
        }
        assert readers == {part.end} == set(crossing(spec, held))


@pytest.mark.parametrize(("model", "names"), [
    ("resnet18,blocks=unit", UNITS),
    ("resnet20,blocks=unit", [f"stage{s}_{u}" for s in (1, 2, 3) for u in (1, 2, 3)]),
])  # fmt: skip
def test_units_are_parts(model, names):
    """The stem belongs to the first unit, the head to the last."""
    found = parts(build(model, SHAPE, CLASSES))
    assert [part.name for part in found] == names
    assert found[0].layers[0] == "stem" and found[-1].layers[-1] == "fc"


def test_named_ends_in_any_order_and_of_both_kinds():
    """A block ends where its last layer does; what comes after the last end is the head."""
    spec = build("resnet18", SHAPE, CLASSES)
    expected = [("stem", "stem_relu"), ("stage1", "stage1_2_relu2"), ("head", "fc")]
    assert ends(parts(spec, "stage1, stem")) == expected
    assert ends(parts(spec, "stage1_2_relu2 stem"))[1] == ("stage1_2_relu2", "stage1_2_relu2")
    assert ends(parts(spec, "stage3"))[-1] == ("stage4", "fc")  # images of one block are left


SKIP = ModelSpec(
    (4,),
    (
        Node("a", Linear(4), (INPUT,), "one"),
        Node("b", Linear(4), ("a",), "two"),
        Node("sum", Add(), ("a", "b"), "three"),
        Node("c", Linear(4), ("sum",), "three"),
        Node("out", Linear(2), ("c",), "four"),
    ),
)


def test_a_block_that_is_read_past_its_end_ends_no_part():
    """Layer `a` is read again after `b`: nothing can be divided between them."""
    assert "two" not in [part.name for part in parts(SKIP)]
    with pytest.raises(ValueError, match=r"cannot be divided after 'two'.* it can be"):
        parts(SKIP, "two")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("stage9", r"no block or layer 'stage9' to be divided after .*after stem, stage1, stage2"),
        ("stage1 nothing", "no block or layer 'nothing'"),
        ("head", "cannot be divided after 'head', its last layer: .* after stem, stage1"),
        ("stage2_1_conv1", "cannot be divided after 'stage2_1_conv1'.*several; .* stage1, stage2"),
        ("stage1 stage1_1_relu2", "no weights to train after 'stage1' up to 'stage1_1_relu2'"),
        ("stage1 stem_norm stem_relu", "of the ends 'stem_norm stem_relu stage1', leave one"),
    ],
)
def test_ends_that_are_refused(named, message):
    with pytest.raises(ValueError, match=message):
        parts(build("resnet8", SHAPE, CLASSES), named)


@pytest.mark.parametrize(
    "spec",
    [
        sequential((4,), [("fc", Linear(3))]),
        sequential((4,), [("relu", ReLU(), "first"), ("fc", Linear(3), "second")]),
    ],
)
def test_models_that_cannot_be_divided(spec):
    with pytest.raises(
        ValueError, match=r"into parts: it needs two blocks .* train it with fedavg"
    ):
        parts(spec)


def test_a_model_of_one_block_is_taken_layer_by_layer():
    spec = sequential(
        (1, 4, 4),
        [("a", Conv2d(2, 3)), ("relu", ReLU()), ("b", Conv2d(3, 1)), ("flat", Flatten()),
         ("fc", Linear(2))],
    )  # fmt: skip
    assert ends(parts(spec)) == [("a", "relu"), ("head", "fc")]
    assert ends(parts(spec, "a b")) == [("a", "a"), ("b", "b"), ("head", "fc")]


def test_modules_of_your_own_are_divided_at_their_children():
    """A converted module's blocks are its children; they and their layers are named as it is."""
    torch = pytest.importorskip("torch")
    from torch import nn

    from fedlean.models.torch import from_torch

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            self.third = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
            self.top = nn.Linear(8, 3)

        def forward(self, x):
            x = self.third(self.second(self.first(x)))
            return self.top(x.mean((2, 3)))

    spec = from_torch(Net().eval(), torch.zeros(1, 1, 8, 8)).spec
    assert list(spec.blocks)[:3] == ["first", "second", "third"]
    named = parts(spec, "first third")
    assert [part.name for part in named] == ["first", "third", "head"]
    assert named[0].tensors == {"first_0.weight", "first_0.bias"}
    assert [part.name for part in parts(spec)][:2] == ["first", "second"]
    with pytest.raises(ValueError, match=r"no block or layer 'fourth'.*first, second, third"):
        parts(spec, "fourth")
