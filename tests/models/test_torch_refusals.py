"""What a spec cannot say is refused, and the message names the user's layer and what would do."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlean.models.torch import from_torch

torch.set_num_threads(1)

IMAGE, VECTOR = (2, 4, 8, 8), (2, 6)


class Net(nn.Module):
    """`body` under a dotted path, computed by `function(x, body)`."""

    def __init__(self, body: nn.Module | None, function) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"odd": body} if body is not None else {})
        self.function = function

    def forward(self, x: torch.Tensor):
        return self.function(x, *self.trunk.values())


def refuse(module: nn.Module, shape: tuple[int, ...], *messages: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError) as caught:
        from_torch(module, torch.randn(shape, generator=generator))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "only padding_mode='zeros'"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "only ceil_mode=False"),
        (nn.MaxPool2d(2, dilation=2), "only dilation=1"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "only ceil_mode=False"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "only count_include_pad=True"),
        (nn.AvgPool2d(2, divisor_override=3), "only divisor_override=None"),
        (
            nn.AdaptiveAvgPool2d(3),
            "output_size=3 does not divide the input's side of 8: use one of",
        ),
        (nn.AdaptiveMaxPool2d((2, 5)), "output_size=5 does not divide"),
        (nn.GroupNorm(2, 4, affine=False), "only affine=True"),
        (nn.BatchNorm2d(4, affine=False), "only affine=True"),
        (nn.BatchNorm2d(4, track_running_stats=False), "only track_running_stats=True"),
        (nn.BatchNorm2d(4, momentum=None), "momentum=None"),
        (nn.Dropout(1.0), "p must be a float in [0, 1), got 1.0"),
        (nn.AlphaDropout(0.3), "is not supported"),
        (nn.LayerNorm(8), "use nn.GroupNorm(1, 4)"),
        (nn.LayerNorm((4, 8, 8)), "use nn.GroupNorm(1, 4)"),
        (nn.InstanceNorm2d(4), "use nn.GroupNorm(C, C)"),
        (nn.ELU(), "use nn.SiLU or nn.GELU"),
        (nn.PReLU(), "use nn.LeakyReLU"),
        (nn.Softmax(1), "leave it out: the loss takes the scores"),
        (nn.LeakyReLU(1.5), "slope must be a float in [0, 1]"),
        (nn.Upsample(scale_factor=2), "is not supported; supported are Linear, Conv1d/2d"),
        (nn.ConvTranspose2d(4, 4, 3), "is not supported"),
        (nn.Flatten(0), "turns a batch of 2 into shape (512,)"),
        (nn.Flatten(2), "has shape (4, 64) in PyTorch"),
        (nn.Linear(8, 3), "needs a vector as input"),
    ],
)
def test_modules(body: nn.Module, message: str):
    net = Net(body, lambda x, odd: odd(x))
    refuse(net, IMAGE, f"layer 'trunk.odd' ({type(body).__name__})", message)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
def test_asymmetric_padding():
    body = nn.Conv2d(4, 4, 2, padding="same")
    refuse(Net(body, lambda x, odd: odd(x)), IMAGE, "layer 'trunk.odd' (Conv2d)", "asymmetric")


def test_a_recurrent_layer():
    net = Net(nn.LSTM(6, 3), lambda x, odd: odd(x)[0])
    refuse(net, VECTOR, "layer 'trunk.odd' (LSTM)", "use nn.Conv1d layers")


@pytest.mark.parametrize(
    ("function", "name", "message"),
    [
        (lambda x: F.elu(x), "elu", "use nn.SiLU or nn.GELU"),
        (lambda x: torch.cat([x, x], 2), "cat", "joins along axis 2, only the channels, dim=1"),
        (lambda x: torch.cat([x, x]), "cat", "turns a batch of 2 into shape (4, 4, 8, 8)"),
        (lambda x: torch.stack([x, x], 1), "stack", "is not supported"),
        (lambda x: x + 1, "add", "only tensors of other layers are supported, got 1"),
        (lambda x: 2 * x, "mul", "got 2"),
        (lambda x: x * x, "mul", "products need an image and a gate"),
        (lambda x: torch.add(x, x, alpha=2), "add", "is not supported"),
        (lambda x: x + x.mean((2, 3), keepdim=True), "add", "sums need two tensors of equal shape"),
        (lambda x: x.mean((1, 2)), "mean", "only over (2, 3)"),
        (lambda x: x.mean(), "mean", "turns a batch of 2 into shape ()"),
        (lambda x: x[:, :2], "getitem", "only new axes are supported"),
        (lambda x: x.view(2, 16, 16), "view", "only flattening"),
        (lambda x: x.reshape(4, -1), "reshape", "turns a batch of 2 into shape (4, 128)"),
        (lambda x: x.permute(0, 2, 3, 1), "permute", "give the data with the channels first"),
        (lambda x: x.chunk(2, 1)[0], "getitem", "reads chunk, which no layer computes"),
        (lambda x: F.dropout(x), "dropout", "drops p=0.5 in evaluation, too"),
        (lambda x: F.max_pool2d(x, 3, ceil_mode=True), "max_pool2d", "only ceil_mode=False"),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x, "add", "has shape (4, 8, 8)"),
        (lambda x: (F.relu(x), x), "output", "only one tensor"),
        (lambda x: {"y": F.relu(x)}, "output", "only one tensor"),
        (lambda x: x.mean((2, 3), keepdim=True), "output", "shape (4, 1, 1)"),
    ],
)
def test_calls(function, name: str, message: str):
    refuse(Net(None, function), IMAGE, f"layer '{name}'", message)


def test_calls_are_named_after_the_module_around_them():
    refuse(nn.Sequential(nn.ReLU(), Net(None, F.elu)), IMAGE, "layer '1.elu'")


@pytest.mark.parametrize(
    "function", [lambda x, odd: odd(x) + odd(x), lambda x, odd: odd(F.relu(odd(x)))]
)
def test_parameters_used_twice(function):
    refuse(Net(nn.Conv2d(4, 4, 1), function), IMAGE, "layer 'trunk.odd' (Conv2d): is used twice")


def test_parameters_shared_between_layers():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    refuse(net, VECTOR, "layer '2' (Linear): is used twice or shares its parameters")


def test_raw_parameters():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    refuse(Raw(), VECTOR, "layer 'mul'", "reads gain, which no layer computes")


def test_in_place_layers_whose_input_is_read_again():
    relu = nn.ReLU(inplace=True)
    refuse(Net(relu, lambda x, odd: odd(x) + x), IMAGE, "'trunk.odd' changes in place what 'add'")
    refuse(Net(relu, lambda x, odd: odd(x.flatten(1)) + x.flatten(1)), IMAGE, "'trunk.odd'")
    refuse(Net(None, lambda x: x.relu_() + x), IMAGE, "'relu_' changes in place")
    refuse(Net(None, lambda x: F.relu(x, True) + x), IMAGE, "'relu' changes in place")


def test_in_place_sums_that_tracing_does_not_see():
    def function(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        y = conv(x)
        kept = y
        y += x  # torch.fx takes this for y = y + x
        return kept + y

    refuse(Net(nn.Conv2d(4, 4, 1), function), IMAGE, "Net computes something else", "x = x + y")


def test_several_inputs():
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.relu(x) + y

    refuse(Two(), IMAGE, "Two.forward takes several inputs (missing a required argument: 'y')")


def test_control_flow_on_values():
    net = Net(None, lambda x: F.relu(x) if x.sum() > 0 else x)
    refuse(net, IMAGE, "torch.fx cannot follow Net.forward", "control flow")


def test_examples_that_do_not_fit():
    net = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
    refuse(net, VECTOR, "layer '1' fails on example_input of shape (2, 6)")
    refuse(net, (6,), "example_input must be (B, ...), got shape (6,)")
    refuse(net, (0, 7), "example_input must be (B, ...)")
    refuse(nn.Conv2d(1, 4, 3), (1, 8, 8), "layer '0'")  # the batch axis was forgotten


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torch_jit(how: str):
    with warnings.catch_warnings(action="ignore"):
        make = {
            "script": torch.jit.script,
            "trace": lambda m: torch.jit.trace(m, torch.ones(VECTOR)),
        }[how]
        module = nn.Sequential(make(nn.Linear(6, 3)))
    refuse(module, VECTOR, "layer '0'", "is compiled by torch.jit: pass the nn.Module")


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), "layer '0' (Embedding)"),
        (nn.Sequential(nn.EmbeddingBag(9, 4)), "layer '0' (EmbeddingBag)"),
        (Net(nn.Embedding(9, 4), lambda x, odd: odd(x.long())), "layer 'trunk.odd' (Embedding)"),
        (
            Net(nn.Embedding(9, 4), lambda x, odd: F.embedding(x, odd.weight)),
            "layer 'embedding' (embedding)",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_layers_of_ids(module: nn.Module, layer: str, dtype: torch.dtype):
    with pytest.raises(ValueError) as caught:
        from_torch(module, torch.ones((2, 5), dtype=dtype))
    message = f"{layer}: is not supported; a spec reads numbers, not ids: convert the layers after"
    assert message in str(caught.value)


def test_an_example_of_zeros_hides_nothing():
    def function(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        kept = y = linear(x)
        y += x  # torch.fx takes this for y = y + x
        return kept + y

    module = Net(nn.Linear(6, 6, bias=False), function)
    with pytest.raises(ValueError, match="Net computes something else than its layers"):
        from_torch(module, torch.zeros(VECTOR))
