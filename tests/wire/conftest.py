import numpy as np
import pytest

from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel, Work
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.spec import ModelSpec, sequential


@pytest.fixture
def spec() -> ModelSpec:
    """conv.weight 36, conv.bias 4, norm 4 + 4 + 4 + 4, fc.weight 1440, fc.bias 10."""
    return sequential(
        (1, 8, 8),
        [
            ("conv", Conv2d(4, 3)),
            ("norm", BatchNorm()),
            ("relu", ReLU()),
            ("flat", Flatten()),
            ("fc", Linear(10)),
        ],
    )


@pytest.fixture
def task(spec: ModelSpec) -> ClientTask:
    """conv half kept, fc every 48th: 18 and 30 coordinates."""
    masks = {
        "conv.weight": np.arange(36).reshape(4, 1, 3, 3) % 2 == 0,
        "fc.weight": np.arange(1440).reshape(10, 144) % 48 == 0,
    }
    draw = np.random.Generator(np.random.Philox(7))
    params = {
        name: (draw.standard_normal(shape) * masks.get(name, 1)).astype(np.float32)
        for name, shape in spec.tensor_shapes.items()
    }
    sub_model = SubModel(masks, frozen=frozenset({"conv.bias"}))
    return ClientTask(3, "train", 5, 77, spec, params, sub_model, {"lr": 0.1, "steps": 5})


@pytest.fixture
def update(task: ClientTask) -> ClientUpdate:
    """An answer with everything in it: new masks, statistics of three kinds, metrics, work."""
    masks = {"fc.weight": np.arange(1440).reshape(10, 144) % 30 == 0}
    statistics = {
        "importance": Statistic(
            {
                name: np.full(shape, 0.5, np.float32)
                for name, shape in task.spec.param_shapes.items()
            },
            "sum",
        ),
        "seen": Statistic({"fc.weight": masks["fc.weight"], "c": np.arange(3.0)}, "mean"),
    }
    return ClientUpdate(
        client=5,
        num_examples=40,
        params={name: task.params[name] for name in ("fc.weight", "norm.running_var")},
        sub_model=SubModel(masks, frozen=frozenset({"conv.bias"})),
        statistics=statistics,
        metrics={"loss": 0.1 + 0.2},
        work=(Work(5, 20, kept={"fc.weight": 48}), Work(forward_examples=200)),
    )
