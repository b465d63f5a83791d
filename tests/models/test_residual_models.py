"""resnet18 and mobilenetv3_small: structure by hand, and arithmetic against plain torch.nn.

The plain definitions share nothing with the package: they follow the papers and torchvision (1x1
convolutions in the gates), and get the spec's tensors in the order in which they are defined.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from fedlean import layers as L
from fedlean.core import Params, SubModel, generator
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine, TorchSession
from fedlean.models.initialise import check_params, init_params
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet18
from fedlean.models.torch import to_torch
from fedlean.spec import INPUT, ModelSpec

torch.set_num_threads(1)

MODELS = {"resnet18": resnet18, "mobilenetv3_small": mobilenetv3_small}


# --- structure ------------------------------------------------------------------------------------


def sizes(spec: ModelSpec, where: Callable[[str], str]) -> dict[str, int]:
    """Parameters by group, in order; `where` says the group of a node."""
    out: dict[str, int] = {}
    for name, shape in spec.param_shapes.items():
        group = where(name.rsplit(".", 1)[0])
        out[group] = out.get(group, 0) + prod(shape)
    return out


def by_block(spec: ModelSpec) -> dict[str, int]:
    return sizes(spec, lambda name: spec.by_name[name].block)


def test_resnet18_parameters_by_hand():
    assert by_block(resnet18((3, 168, 168), 100)) == {
        "stem": 64 * 3 * 7 * 7 + 2 * 64,
        "stage1": 4 * (64 * 64 * 9 + 2 * 64),
        "stage2": 128 * (64 * 9 + 3 * 128 * 9 + 64) + 5 * 2 * 128,
        "stage3": 256 * (128 * 9 + 3 * 256 * 9 + 128) + 5 * 2 * 256,
        "stage4": 512 * (256 * 9 + 3 * 512 * 9 + 256) + 5 * 2 * 512,
        "head": 512 * 100 + 100,
    }
    assert by_block(resnet18((1, 28, 28), 10))["stem"] == 64 * 1 * 3 * 3 + 2 * 64


def test_mobilenetv3_small_parameters_by_hand():
    """Expand, depthwise, the two layers of the gate, project; each convolution with its norm."""
    spec = mobilenetv3_small((3, 84, 84), 2, blocks="unit")
    last = 96 * 576 + 2 * 576
    late = (96 * 576 + 1152) + (576 * 25 + 1152) + (577 * 144 + 145 * 576) + (576 * 96 + 192)
    assert by_block(spec) == {
        "stem": 16 * 3 * 9 + 2 * 16,
        "stage1_1": (16 * 9 + 32) + (17 * 8 + 9 * 16) + (16 * 16 + 32),
        "stage2_1": (16 * 72 + 144) + (72 * 9 + 144) + (72 * 24 + 48),
        "stage2_2": (24 * 88 + 176) + (88 * 9 + 176) + (88 * 24 + 48),
        "stage3_1": (24 * 96 + 192) + (96 * 25 + 192) + (97 * 24 + 25 * 96) + (96 * 40 + 80),
        "stage3_2": (40 * 240 + 480) + (240 * 25 + 480) + (241 * 64 + 65 * 240) + (240 * 40 + 80),
        "stage3_3": (40 * 240 + 480) + (240 * 25 + 480) + (241 * 64 + 65 * 240) + (240 * 40 + 80),
        "stage3_4": (40 * 120 + 240) + (120 * 25 + 240) + (121 * 32 + 33 * 120) + (120 * 48 + 96),
        "stage3_5": (48 * 144 + 288) + (144 * 25 + 288) + (145 * 40 + 41 * 144) + (144 * 48 + 96),
        "stage4_1": (48 * 288 + 576) + (288 * 25 + 576) + (289 * 72 + 73 * 288) + (288 * 96 + 192),
        "stage4_2": late,
        "stage4_3": late + last,
        "head": 577 * 1024 + 1025 * 2,
    }
    assert sum(by_block(spec).values()) - by_block(spec)["head"] == 927_008  # PruneFL, Table I
    # torchvision's has 2,542,856 parameters for ImageNet
    assert mobilenetv3_small((3, 224, 224), 1000).num_params == 2_542_856


@pytest.mark.parametrize(
    ("side", "sides"),
    [
        (168, {"stem": 84, "stem_pool": 42, "stage1": 42, "stage2": 21, "stage3": 11, "stage4": 6}),
        (65, {"stem": 33, "stem_pool": 17, "stage1": 17, "stage2": 9, "stage3": 5, "stage4": 3}),
        (64, {"stem": 64, "stage1": 64, "stage2": 32, "stage3": 16, "stage4": 8}),
        (32, {"stem": 32, "stage1": 32, "stage2": 16, "stage3": 8, "stage4": 4}),
        (8, {"stem": 8, "stage1": 8, "stage2": 4, "stage3": 2, "stage4": 1}),
    ],
)
def test_resnet18_shapes(side: int, sides: dict[str, int]):
    spec = resnet18((3, side, side), 7)
    channels = {"stem": 64, "stem_pool": 64, "stage1": 64, "stage2": 128, "stage3": 256}
    got = {name: spec.shapes[f"{name}_2_relu2" if "stage" in name else name] for name in sides}
    assert got == {name: (channels.get(name, 512), side, side) for name, side in sides.items()}
    assert ("stem_pool" in spec.by_name) == ("stem_pool" in sides)
    assert spec.shapes["pool"] == (512,) and spec.output_shape == (7,)


@pytest.mark.parametrize(
    ("side", "sides"),
    [
        (224, (112, 56, 28, 14, 7)),  # the paper's Table 2
        (84, (42, 21, 11, 6, 3)),
        (65, (33, 17, 9, 5, 3)),
        (64, (64, 32, 16, 8, 4)),
        (8, (8, 4, 2, 1, 1)),
    ],
)
def test_mobilenetv3_small_shapes(side: int, sides: tuple[int, ...]):
    spec = mobilenetv3_small((3, side, side), 7)
    names = ("stem_act", "stage1_1_project_norm", "stage2_2_add", "stage3_5_add", "last_act")
    channels = (16, 16, 24, 48, 576)
    expected = [(c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [spec.shapes[name] for name in names] == expected
    assert spec.shapes["pool"] == (576,) and spec.output_shape == (7,)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_shorter_side_decides_the_stem(model: Callable[..., ModelSpec]):
    assert {model((3, *sides), 4).by_name["stem"].layer.stride for sides in SMALL} == {1}  # type: ignore[union-attr]
    assert model((3, 65, 100), 4).by_name["stem"].layer.stride == 2  # type: ignore[union-attr]


SMALL = ((64, 64), (64, 200), (200, 64), (8, 8))


def test_mobilenetv3_small_layers():
    """Activations, gates and shortcuts of each row of the paper's Table 2."""
    spec = mobilenetv3_small((3, 224, 224), 10)
    units = sorted({node.name[:8] for node in spec.nodes if node.name.startswith("stage")})
    assert len(units) == 11

    def which(suffix: str, kind: type = object) -> list[int]:
        nodes = [spec.by_name.get(f"{unit}_{suffix}") for unit in units]
        return [i for i, node in enumerate(nodes, 1) if node and isinstance(node.layer, kind)]

    assert which("expand") == list(range(2, 12))
    assert which("depthwise_act", L.ReLU) == [1, 2, 3]
    assert which("depthwise_act", L.Hardswish) == which("expand_act", L.Hardswish)
    assert which("scale", L.Scale) == [1, *range(4, 12)]
    assert which("add", L.Add) == [3, 5, 6, 8, 10, 11]
    assert which("project_act") == []  # the bottleneck is linear
    norms = {node.layer for node in spec.nodes if isinstance(node.layer, L.BatchNorm)}
    assert norms == {L.BatchNorm(eps=1e-3, momentum=0.01)}


def test_resnet18_prunes_all_but_the_shortcuts():
    """PruneFL's code has a time coefficient for each of the 18 layers that it prunes."""
    spec = resnet18((3, 168, 168), 100)
    kept = [node.name for node in spec.weighted if not node.prunable]
    assert kept == ["stage2_1_down", "stage3_1_down", "stage4_1_down"]
    assert all(spec.by_name[name].layer.kernel_size == 1 for name in kept)  # type: ignore[union-attr]
    assert len(spec.prunable) == 18
    assert spec.prunable[0] == "stem.weight" and spec.prunable[-1] == "fc.weight"


def test_mobilenetv3_small_prunes_all_but_the_depthwise():
    spec = mobilenetv3_small((3, 84, 84), 2)
    kept = [node.name for node in spec.weighted if not node.prunable]
    assert kept == [name for name in spec.by_name if name.endswith("_depthwise")]
    assert len(kept) == 11
    # stem, 10 expansions, 11 projections, 9 gates of two layers, last, two fully connected
    assert len(spec.prunable) == 1 + 10 + 11 + 2 * 9 + 1 + 2


@pytest.mark.parametrize(("name", "units"), [("resnet18", 8), ("mobilenetv3_small", 11)])
def test_blocks_divide_the_same_network(name: str, units: int):
    stages, fine = (MODELS[name]((3, 32, 32), 10, blocks=kind) for kind in ("stage", "unit"))
    assert list(stages.blocks) == ["stem", *(f"stage{n}" for n in range(1, 5)), "head"]
    assert len(fine.blocks) == 1 + units + 1
    assert stages.param_shapes == fine.param_shapes and stages.shapes == fine.shapes
    for coarse, node in zip(stages.nodes, fine.nodes, strict=True):
        assert node.block.startswith(coarse.block)
        assert (node.layer, node.inputs, node.prunable) == (
            coarse.layer,
            coarse.inputs,
            coarse.prunable,
        )


@pytest.mark.parametrize("blocks", ["stage", "unit"])
@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_output_of_a_block_leaves_it(name: str, side: int, blocks: str):
    """So that a frozen prefix hands on one tensor, and an output module can stand in for a tail."""
    spec = MODELS[name]((3, side, side), 10, blocks=blocks)
    assert [node for block in spec.blocks.values() for node in block] == list(spec.nodes)
    before = INPUT
    for nodes in spec.blocks.values():
        own = {node.name for node in nodes}
        assert {source for node in nodes for source in node.inputs} - own == {before}
        before = nodes[-1].name


@pytest.mark.parametrize("name", MODELS)
def test_norm_is_a_choice(name: str):
    group, batch = (MODELS[name]((3, 32, 32), 10, norm=norm) for norm in ("group", "batch"))
    assert group.param_shapes == batch.param_shapes and not group.buffer_shapes
    kinds = [(type(g.layer), type(b.layer)) for g, b in zip(group.nodes, batch.nodes, strict=True)]
    differ = [pair for pair in kinds if pair[0] != pair[1]]
    assert set(differ) == {(L.GroupNorm, L.BatchNorm)}
    assert len(differ) == {"resnet18": 20, "mobilenetv3_small": 34}[name]


def test_default_norms():
    assert not resnet18((3, 32, 32), 10).variances
    assert len(mobilenetv3_small((3, 32, 32), 10).variances) == 34


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_bad_settings(model: Callable[..., ModelSpec]):
    with pytest.raises(ValueError, match="norm must be 'group' or 'batch', got 'layer'"):
        model((3, 32, 32), 10, norm="layer")
    with pytest.raises(ValueError, match="blocks must be 'stage' or 'unit', got 8"):
        model((3, 32, 32), 10, blocks=8)


# --- arithmetic -----------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if before != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.downsample(x))


def plain_resnet18(classes: int, *, small: bool) -> nn.Module:
    if small:
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        stem.append(nn.MaxPool2d(3, 2, 1))
    body = [BasicBlock(64, 64, 1), BasicBlock(64, 64, 1)]
    for width in (128, 256, 512):
        body += [BasicBlock(width // 2, width, 2), BasicBlock(width, width, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, *body, *head)


def norm_of_mobilenet(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=0.001, momentum=0.01)


class Gate(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.clamp(gate + 3, 0, 6) / 6


class InvertedResidual(nn.Module):
    def __init__(
        self, before: int, kernel: int, wide: int, out: int, se: int, act: str, stride: int
    ) -> None:
        super().__init__()
        active = nn.Hardswish if act == "HS" else nn.ReLU
        parts: list[nn.Module] = []
        if wide != before:
            expand = nn.Conv2d(before, wide, 1, bias=False)
            parts += [expand, norm_of_mobilenet(wide), active()]
        padding = {3: 1, 5: 2}[kernel]
        depthwise = nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide, bias=False)
        parts += [depthwise, norm_of_mobilenet(wide), active()]
        parts += [Gate(wide, se)] if se else []
        parts += [nn.Conv2d(wide, out, 1, bias=False), norm_of_mobilenet(out)]
        self.parts = nn.Sequential(*parts)
        self.shortcut = stride == 1 and before == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) + x if self.shortcut else self.parts(x)


def plain_mobilenetv3_small(classes: int, *, small: bool) -> nn.Module:
    stem = nn.Conv2d(3, 16, 3, 1 if small else 2, 1, bias=False)
    return nn.Sequential(
        *(stem, norm_of_mobilenet(16), nn.Hardswish()),
        InvertedResidual(16, 3, 16, 16, 8, "RE", 2),
        InvertedResidual(16, 3, 72, 24, 0, "RE", 2),
        InvertedResidual(24, 3, 88, 24, 0, "RE", 1),
        InvertedResidual(24, 5, 96, 40, 24, "HS", 2),
        InvertedResidual(40, 5, 240, 40, 64, "HS", 1),
        InvertedResidual(40, 5, 240, 40, 64, "HS", 1),
        InvertedResidual(40, 5, 120, 48, 32, "HS", 1),
        InvertedResidual(48, 5, 144, 48, 40, "HS", 1),
        InvertedResidual(48, 5, 288, 96, 72, "HS", 2),
        InvertedResidual(96, 5, 576, 96, 144, "HS", 1),
        InvertedResidual(96, 5, 576, 96, 144, "HS", 1),
        *(nn.Conv2d(96, 576, 1, bias=False), norm_of_mobilenet(576), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(576, 1024), nn.Hardswish()),
        nn.Linear(1024, classes),
    )


PLAIN = {"resnet18": plain_resnet18, "mobilenetv3_small": plain_mobilenetv3_small}


def random_params(spec: ModelSpec) -> Params:
    """Initial ones with norms and statistics off their defaults, so that a swap shows.

    Weights √6 times as large (He's deviation): with fixed statistics the signal would die out.
    """
    weighted = {node.name for node in spec.weighted}
    out = {}
    for name, values in init_params(spec, 7).items():
        if name.rsplit(".", 1)[0] in weighted:
            out[name] = values * np.float32(6**0.5)
        else:
            noise = generator(1, 0, 0, name).uniform(-0.3, 0.3, values.shape)
            out[name] = (values + noise).astype(np.float32)
    return out


def copied_into(plain: nn.Module, params: Params) -> nn.Module:
    """`params` in order of definition; a gate's (out, in) weights become (out, in, 1, 1)."""
    values = iter(params.values())
    tensors = [*plain.parameters(), *(b for b in plain.buffers() if b.is_floating_point())]
    assert len(tensors) == len(params)
    with torch.no_grad():
        for tensor in tensors:
            value = torch.from_numpy(next(values))
            tensor.copy_(value.reshape(tensor.shape))
    return plain


def images(side: int, batch: int) -> np.ndarray:
    return generator(2, 0, 0, "x").standard_normal((batch, 3, side, side), np.float32)


@pytest.mark.parametrize("side", [20, 72])  # small stem, ImageNet stem
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_definition_in_float64(name: str, side: int):
    """Outputs in evaluation and training mode, running statistics, gradients."""
    spec = MODELS[name]((3, side, side), 10, norm="batch")
    params = random_params(spec)
    ours = to_torch(spec, params).double()
    plain = copied_into(PLAIN[name](10, small=side <= 64), params).double()
    x = torch.from_numpy(images(side, 3)).double()

    for training in (False, True):
        got, expected = ours.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert got.std(0).mean() > 0.01 * got.abs().mean()  # the image matters
    moved = [b for b in plain.buffers() if b.is_floating_point()]
    for (key, mine), theirs in zip(ours.named_buffers(), moved, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        assert not np.array_equal(mine.numpy(), params[key])  # training did move it
    (got * got).sum().backward()
    (expected * expected).sum().backward()
    largest = max(tensor.grad.abs().max() for tensor in plain.parameters())
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        # Against the largest: some are 0 but for rounding, biases that the next norm takes away.
        # 1e-7: PyTorch's gradient of hardsigmoid has 1/6 in float32, also for float64.
        expected = theirs.grad.reshape(mine.shape)
        torch.testing.assert_close(mine.grad, expected, rtol=1e-7, atol=float(largest) * 1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_the_torch_engine_computes_the_plain_definition(name: str):
    spec = MODELS[name]((3, 32, 32), 10, norm="batch")
    params, x = random_params(spec), images(32, 4)
    plain = copied_into(PLAIN[name](10, small=True), params)
    session = open_session(spec, params, lr=0.1)
    with torch.no_grad():
        for training in (False, True):
            expected = plain.train(training)(torch.from_numpy(x)).numpy()
            (got,) = session.forward(x, training=training).values()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def open_session(spec: ModelSpec, params: Params, *, lr: float) -> TorchSession:
    return TorchEngine(1).open(spec, params, SubModel(), batch_size=8, optimizer=SGD(lr))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_learns_eight_random_images(name: str, norm: str):
    spec = MODELS[name]((3, 32, 32), 10, norm=norm)
    params = init_params(spec, 0)
    check_params(spec, params)
    session = open_session(spec, params, lr={"resnet18": 0.003, "mobilenetv3_small": 0.02}[name])
    x, y = images(32, 8), np.arange(8)
    first, second, third = (session.step(x, y) for _ in range(3))
    assert first == pytest.approx(np.log(10), abs=0.5)  # no class is preferred at first
    assert third < second - 0.02 < first - 0.04
    trained = session.params()
    weights = [f"{node.name}.weight" for node in spec.weighted]
    assert all(not np.array_equal(trained[key], params[key]) for key in weights)
