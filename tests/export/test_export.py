"""Exported models compute what ours do: C compiled, ONNX in onnxruntime, PyTorch loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fedlean as fl
from fedlean.api.export import EXAMPLES, _examples
from fedlean.core import generator
from fedlean.export import c, onnx
from fedlean.export.buffers import buffers
from fedlean.export.window import window
from fedlean.layers import (
    GELU,
    Add,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Linear,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.models.catalog import available, build
from fedlean.models.initialise import init_params
from fedlean.normalisation import Normalisation
from fedlean.spec import INPUT, ModelSpec, Node
from fedlean.tree import apply_mask

CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler is installed")


def model(spec: ModelSpec, density: float = 1.0, names: tuple[str, ...] = ()) -> fl.Model:
    """With drawn weights, statistics and normalisation, all far from their neutral values."""
    rng = generator(1, 0, 0, "test of export")
    params = dict(init_params(spec, 0))
    for name in params:
        if name.endswith("running_var"):
            params[name] = rng.uniform(0.5, 2, params[name].shape).astype(np.float32)
        elif name not in spec.prunable:
            params[name] = (params[name] + rng.normal(0, 0.3, params[name].shape)).astype("f4")
    masks = {}
    if density < 1:
        masks = {n: rng.random(params[n].shape) < density for n in spec.prunable}
        masks[spec.prunable[0]][:1] = False  # a row without a weight
    channels = spec.input_shape[0]
    normal = Normalisation(
        rng.normal(0.3, 0.1, channels).astype("f4"), rng.uniform(0.2, 1, channels).astype("f4"), 9.0
    )
    return fl.Model(spec, apply_mask(params, masks), masks, None, normal, names)


def all_kinds() -> ModelSpec:
    """Each layer once: branches, a view that two read, a norm that cannot be folded."""
    chain = [
        ("conv", Conv2d(8, 3, 2, 1), (INPUT,)),
        ("norm", BatchNorm(), ("conv",)),
        ("act", Hardswish(), ("norm",)),
        ("depth", Conv2d(8, 3, 1, 1, 8, False), ("act",)),
        ("groups", GroupNorm(groups=2), ("depth",)),
        ("pool", GlobalAvgPool(), ("groups",)),
        ("gate", Linear(8), ("pool",)),
        ("gated", Hardsigmoid(), ("gate",)),
        ("scale", Scale(), ("groups", "gated")),
        ("sum", Add(), ("scale", "act", "groups")),
        ("scaler", Scaler(2.0), ("sum",)),
        ("relu", ReLU(), ("scaler",)),
        ("again", BatchNorm(), ("sum",)),
        ("both", Add(), ("relu", "again")),
        ("max", MaxPool2d(3, 2, 1), ("both",)),
        ("avg", AvgPool2d(3, 1, 1), ("max",)),
        ("flat", Flatten(), ("avg",)),
        ("hidden", Linear(12, False), ("flat",)),
        ("vector", GroupNorm(groups=3), ("hidden",)),
        ("bend", ReLU(), ("vector",)),
        ("out", Linear(4), ("bend",)),
    ]
    nodes = tuple(Node(name, layer, inputs) for name, layer, inputs in chain)
    return ModelSpec((3, 9, 7), nodes)


def odd_windows() -> ModelSpec:
    """Sides that differ, dilation, dropout."""
    chain = [
        ("wide", Conv2d(6, (1, 3), (1, 2), (0, 1)), (INPUT,)),
        ("drop", Dropout(0.5), ("wide",)),
        ("far", Conv2d(4, (3, 2), 1, (2, 1), dilation=(2, 1)), ("drop",)),
        ("pool", MaxPool2d((1, 2)), ("far",)),
        ("flat", Flatten(), ("pool",)),
        ("out", Linear(3), ("flat",)),
    ]
    return ModelSpec((2, 7, 9), tuple(Node(name, layer, inputs) for name, layer, inputs in chain))


def signal() -> ModelSpec:
    chain = [
        ("conv", Conv1d(8, 5, 2, 2), (INPUT,)),
        ("norm", BatchNorm(), ("conv",)),
        ("relu", ReLU(), ("norm",)),
        ("pool", MaxPool1d(3, 2, 1), ("relu",)),
        ("far", Conv1d(6, 3, dilation=2), ("pool",)),
        ("mean", GlobalAvgPool(), ("far",)),
        ("out", Linear(3), ("mean",)),
    ]
    return ModelSpec((6, 40), tuple(Node(name, layer, inputs) for name, layer, inputs in chain))


def curves() -> ModelSpec:
    """Every activation, beside each other and one behind the rest; a gate on a signal."""
    layers = [LeakyReLU(0.2), Hardtanh(-0.5, 0.7), Sigmoid(), Tanh(), SiLU(), GELU(), GELU(True)]
    nodes = [Node("conv", Conv1d(6, 3), (INPUT,))]
    nodes += [Node(f"curve{i}", layer, ("conv",)) for i, layer in enumerate(layers)]
    nodes.append(Node("all", Concat(), tuple(node.name for node in nodes[1:])))
    chain = [
        ("pool", GlobalAvgPool(), ("all",)),
        ("gate", Sigmoid(), ("pool",)),
        ("scale", Scale(), ("all", "gate")),
        ("flat", Flatten(), ("scale",)),
        ("out", Linear(4), ("flat",)),
        ("last", SiLU(), ("out",)),
    ]
    nodes += [Node(name, layer, inputs) for name, layer, inputs in chain]
    return ModelSpec((2, 9), tuple(nodes))


def compiled(net: fl.Model, folder: Path, *flags: str) -> tuple[np.ndarray, Path]:
    """What the exported program gives for the stored examples, and the program."""
    source = net.export(folder / "net.c")
    program = folder / "net"
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-DNET_MAIN"]
    subprocess.run([CC, *strict, *flags, source, "-o", program, "-lm"], check=True)
    text = "\n".join(" ".join(f"{v:.9g}" for v in x.ravel()) for x in _examples(net))
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return np.array([line.split() for line in done.stdout.splitlines()], np.float32), program


def agrees(got: np.ndarray, net: fl.Model) -> None:
    expected = net.outputs(_examples(net))
    assert got.shape == expected.shape == (EXAMPLES, net.spec.output_shape[0])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


SPECS = {name: build(name, (3, 32, 32), 10) for name in available()}
SPECS |= {
    "all kinds": all_kinds(),
    "odd windows": odd_windows(),
    "signal": signal(),
    "curves": curves(),
}


@needs_cc
@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize(
    "name", ["all kinds", "odd windows", "signal", "curves", "lenet5", "resnet8"]
)
def test_c_computes_the_same(name, density, tmp_path):
    net = model(SPECS[name], density)
    sanitised = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    agrees(compiled(net, tmp_path, *(sanitised if name == "all kinds" else []))[0], net)


@needs_cc
def test_c_of_a_small_mobilenet(tmp_path):
    net = model(SPECS["mobilenetv3_small"], 0.3)
    agrees(compiled(net, tmp_path)[0], net)


@needs_cc
def test_c_of_lenet_at_a_tenth_fits_150_kb_without_a_heap(tmp_path):
    net = model(build("lenet300", (1, 28, 28), 10), 0.1, tuple("0123456789"))
    got, _ = compiled(net, tmp_path)
    agrees(got, net)
    code = tmp_path / "net.o"
    subprocess.run([CC, "-std=c99", "-Os", "-c", tmp_path / "net.c", "-o", code], check=True)
    sizes = subprocess.run(["size", code], capture_output=True, text=True, check=True).stdout
    total = int(sizes.splitlines()[1].split()[3])  # text, data and zeroed memory
    assert total < 150_000
    symbols = subprocess.run(["nm", "-u", code], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"alloc|free", symbols)


@needs_cc
def test_names_of_any_text_are_strings_of_c(tmp_path):
    names = ('a "b"', "back\\slash", "??/", "né\n", "%d1")
    net = model(build("lenet300", (1, 8, 8), 5), names=names)
    source = net.export(tmp_path / "7 Nets.c").read_text()
    assert "void model_7_nets_run(" in source
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "7 Nets.c"\n'
        "int main(void) { for (int i = 0; i < 5; i++) { fputs(model_7_nets_classes[i], stdout);"
        " putchar(0); } return 0; }\n"
    )
    subprocess.run([CC, tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == list(names)


def test_a_layer_that_a_format_lacks_is_named(tmp_path, monkeypatch):
    net = model(SPECS["lenet300"])
    monkeypatch.delitem(c._CASES, ReLU)
    with pytest.raises(ValueError, match=r"layer 'relu1' \(ReLU\) cannot be exported to C yet"):
        net.export(tmp_path / "net.c")
    pytest.importorskip("onnx")
    monkeypatch.delitem(onnx._CASES, ReLU)
    with pytest.raises(ValueError, match=r"layer 'relu1' \(ReLU\) cannot be exported to ONNX yet"):
        net.export(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_window_of_rows_and_columns():
    """Also of layers whose sides differ, or that read a signal."""
    plain = window(MaxPool2d(3, None, 1))
    assert plain == ((3, 3), (3, 3), (1, 1), (1, 1))
    wide = SimpleNamespace(kernel_size=(1, 7), stride=(1, 2), padding=(0, 3), dilation=2, rank=3)
    assert window(wide) == ((1, 7), (1, 2), (0, 3), (2, 2))
    signal = SimpleNamespace(kernel_size=5, stride=2, padding=2, dilation=3, rank=2)
    assert window(signal) == ((1, 5), (1, 2), (0, 2), (1, 3))


@pytest.mark.parametrize("name", ["all kinds", "resnet18", "vgg11", "mobilenetv3_small"])
def test_no_two_activations_that_live_share_memory(name):
    """By running the plan: each step writes its own number, and must find its readers' intact."""
    spec = SPECS[name]
    plan = buffers(spec, spec.nodes)
    block = np.full(plan.size, -1)
    views = {}
    block[plan.at[INPUT] : plan.at[INPUT] + prod(spec.input_shape)] = 0
    views[INPUT] = 0
    for step, node in enumerate(spec.nodes, 1):
        for source in node.inputs:
            held = block[plan.at[source] :][: prod(spec.shapes[source])]
            assert (held == views[source]).all(), (node.name, source)
        if isinstance(node.layer, Flatten | Scaler | Dropout):
            views[node.name] = views[node.inputs[0]]
            continue
        block[plan.at[node.name] :][: prod(spec.shapes[node.name])] = step
        views[node.name] = step
    total = sum(prod(shape) for shape in spec.shapes.values())
    assert plan.size < total / 2


@pytest.mark.parametrize(
    "name", ["all kinds", "odd windows", "signal", "curves", "resnet8", "mobilenetv3_small"]
)
def test_onnx_computes_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    load = pytest.importorskip("onnx").load
    net = model(SPECS[name], 0.5, ("a", "b"))
    path = net.export(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = _examples(net)
    agrees(session.run(None, {"stored": x})[0], net)
    assert {p.key: p.value for p in load(path).metadata_props} == {"class_names": "a\nb"}


@pytest.mark.parametrize("name", ["all kinds", "resnet8"])
def test_torch_computes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    net = model(SPECS[name], 0.5)
    path = net.export(tmp_path / "net.pt2")
    with torch.no_grad():
        got = torch.export.load(path).module()(torch.from_numpy(_examples(net)))
    agrees(got.numpy(), net)


def test_safetensors_are_the_tensors_by_name(tmp_path):
    from safetensors import safe_open

    net = model(SPECS["lenet5"], 0.5, ("a", "b"))
    path = net.export(tmp_path / "net.bin", "safetensors")
    with safe_open(path, "numpy") as file:
        assert file.metadata()["class_names"] == '["a", "b"]'
        assert all(np.array_equal(file.get_tensor(n), v) for n, v in net.arrays().items())


def test_a_format_that_there_is_not(tmp_path):
    net = model(SPECS["lenet5"])
    for arguments in ((tmp_path / "net.h5",), (tmp_path / "net.c", "tflite")):
        with pytest.raises(ValueError, match="one of onnx, torch, safetensors, c"):
            net.export(*arguments)
    assert not list(tmp_path.iterdir())
