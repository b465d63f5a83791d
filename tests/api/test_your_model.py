"""Your own module: built from its file, trained from its weights, given back under its names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fedlean as fl
from fedlean import cli

torch = pytest.importorskip("torch")
nn = torch.nn

NETS = """
import torch
from torch import nn
from fedlean.models.mlp import mlp

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(width, 16, 1)
        self.out = nn.Linear(16, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(torch.relu(self.head(self.pool(self.body(x)))).flatten(1))

def net():
    return Net()

def sized(input_shape, classes, width: int = 8):
    return Net(width)

def spec(shape, classes):
    return mlp(shape, classes)

def needy(a, b, c):
    return None

def number():
    return 7

def broken(input_shape, classes):
    raise KeyError("x")

made = Net()
"""
QUICK = ["--rounds", "2", "--local-steps", "2", "--batch", "8"]


@pytest.fixture
def place(tmp_path, monkeypatch, data) -> Path:
    """A folder with the user's file and arrays, in which commands are given."""
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "data").mkdir()
    x = np.concatenate([data.x_train, data.x_test])[:, 0]
    y = np.concatenate([data.y_train, data.y_test])
    split = np.repeat([0, 1], [len(data.y_train), len(data.y_test)])
    client = np.concatenate([data.clients, np.zeros(len(data.y_test), int)])
    np.savez(tmp_path / "data" / "own.npz", x=x, y=y, split=split, client=client, layout="nhw")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    return tmp_path


def net():
    """The class of the user's file, in the test's own hands."""
    space: dict = {"__name__": "nets"}
    exec(NETS, space)
    torch.manual_seed(3)
    return space["Net"]()


def outputs(module, normalised: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(normalised)).numpy()


def test_twelve_lines(data):
    """The user's module and arrays, PruneFL, and the result back in that module."""
    x, y, ids, test = data.x_train, data.y_train, data.clients, (data.x_test, data.y_test)
    net_ = net()
    script = """
import fedlean as fl
data = fl.Dataset.from_arrays(x, y, clients=ids, test=test)
run = fl.train("prunefl", model=net, data=data, rounds=6, lr=0.1, partition="natural",
               settings={"reconfigure_every": 2, "initial_stable": 1, "initial_max_passes": 9})
net.load_state_dict(run.model.state_dict())
"""
    assert len(script.strip().splitlines()) <= 12
    space = {"x": x, "y": y, "ids": ids, "test": test, "net": net_}
    exec(script, space)
    run = space["run"]
    assert run.model.density < 1
    mine = outputs(net_, data.normalise(test[0]))
    np.testing.assert_allclose(mine, run.model.outputs(test[0]), rtol=1e-4, atol=1e-5)
    assert run.accuracy == pytest.approx((mine.argmax(1) == test[1]).mean())
    assert (run.model.predict(test[0]) == test[1]).mean() == pytest.approx(run.accuracy)


def test_its_weights_are_the_start(data):
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = fl.train("fedavg", model=module, data=data, rounds=1, lr=1e-9, local_steps=1)
    back = run.model.state_dict()
    assert back.keys() == before.keys() - {"body.1.num_batches_tracked"}
    for name, value in back.items():
        assert value.shape == before[name].shape  # of the 1x1 convolution (16, 16, 1, 1)
        if "running" not in name:
            torch.testing.assert_close(value, before[name])
        assert torch.equal(module.state_dict()[name], before[name])  # the user's stays as it was
    assert torch.equal(back["unused.weight"], before["unused.weight"])


def test_the_same_from_the_command_line(place, data, capsys):
    """A .py file and an .npz; the result through the folder, in the user's own module."""
    words = ["--dataset", "data", "--partition", "natural", *QUICK, "--out", "run"]
    cli.main(["run", "prunefl", "--model", "my_nets.py:net", *words])
    model = fl.load("run")
    module = net()
    module.load_state_dict(model.state_dict())
    np.testing.assert_allclose(
        outputs(module, data.normalise(data.x_test)), model.outputs(data.x_test), atol=1e-4
    )
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["model"] == f"{place}/my_nets.py:net"
    assert config["tensor_names"]["head.weight"] == {"name": "head.weight", "shape": [16, 16, 1, 1]}
    normal = config["normalisation"]
    np.testing.assert_allclose(normal["mean"], data.x_train.mean(), rtol=1e-6)
    with pytest.raises(SystemExit):  # code runs where it is named again
        cli.main(["resume", "run"])
    cli.main(["resume", "run", "--model", "my_nets.py:net", "--rounds", "3"])
    assert fl.load("run").names.of == model.names.of


@pytest.mark.parametrize(
    "model",
    [
        "my_nets.py:Net",
        "./my_nets.py:net",
        "my_nets:Net",
        "my_nets:net",
        "my_nets.py:sized,width=4",
        "my_nets.py:Net,width=4",
        "my_nets:spec",
        "my_nets.py:made",
    ],
)
def test_what_is_built(place, model):
    """Row 9 of what failed once: classes, files, modules of the working folder."""
    cli.main(["run", "fedavg", "--dataset", "data", "--model", model, *QUICK, "--out", "run"])
    config = json.loads((place / "run" / "config.json").read_text())
    if "width=4" in model:
        assert config["tensor_names"]["body_0.weight"]["shape"] == [4, 1, 3, 3]
    # what PyTorch draws is drawn by --seed
    cli.main(["run", "fedavg", "--dataset", "data", "--model", model, *QUICK, "--out", "two"])
    one, two = ((place / each / "model.safetensors").read_bytes() for each in ("run", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("my_nets.py:needy", "needs a, b, c, but is called with the input's shape and the classes"),
        ("my_nets.py:number", "must be a ModelSpec, a Model, a torch.nn.Module"),
        ("my_nets.py:nothing", "has no attribute 'nothing'"),
        ("my_nets.py:broken", "failed when it was called: KeyError"),
        ("there.py:net", "give the path of the file"),
        ("theirs:net", "it is neither installed nor in"),
        ("my_nets.net:net", "is it my_nets.py:function?"),
        ("sub/my_nets:net", "a file is named with its ending"),
    ],
)
def test_what_is_not_is_one_line_with_the_remedy(place, model, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "fedavg", "--dataset", "data", "--model", model, *QUICK, "--out", "run"])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and said in line
    assert not (place / "run").exists()


def test_what_a_method_cannot_train_is_refused(data):
    module = net()
    module.out.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'out.bias' does not require gradients.*requires_grad_"):
        fl.train("fedavg", model=module, data=data, rounds=1)
    with pytest.raises(ValueError, match="the class Net: call it"):
        fl.train("fedavg", model=type(module), data=data, rounds=1)


def test_one_layer_alone_and_double_precision(data):
    layer = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    run = fl.train("fedavg", model=layer, data=data, rounds=2, local_steps=2)
    layer.load_state_dict(run.model.state_dict())
    x = data.normalise(data.x_test)
    mine = layer(torch.from_numpy(x).double()).detach().numpy()
    np.testing.assert_allclose(mine, run.model.outputs(data.x_test), atol=1e-4)
    from fedlean.models.torch import from_torch

    alone = from_torch(nn.Linear(4, 2), np.zeros((2, 4)))
    assert [own.name for own in alone.names.of.values()] == ["weight", "bias"]


def test_a_model_in_one_file(data, tmp_path):
    run = fl.train("prunefl", model=net(), data=data, rounds=2, local_steps=2)
    run.model.save(tmp_path / "m.safetensors")
    back = fl.load(tmp_path / "m.safetensors")
    assert np.array_equal(back.outputs(data.x_test), run.model.outputs(data.x_test))
    assert back.class_names == ("0", "1", "2") and back.density == run.model.density
    for name, value in run.model.arrays().items():
        assert np.array_equal(back.arrays()[name], value)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        fl.load(tmp_path)


def test_a_narrow_model_has_no_names_of_the_module(data, tmp_path):
    run = fl.train(
        "allsmall", model=net(), data=data, rounds=1, settings={"width": 0.5}, out=tmp_path / "run"
    )
    for model in (run.model, fl.load(tmp_path / "run")):
        assert model.names is None
        module = model.to_torch()
        module.load_state_dict(model.state_dict())
