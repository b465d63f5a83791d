"""Foresight pruning and training by forward passes on CIFAR-10: LeNet-5-like, with GroupNorm.

Ten clients, iid; one seed and few rounds: a round evaluates each client's batch 51 times.
README.md is the card.
"""

from functools import partial

from fedlean.recipe import main
from fedlean.runtime.run import RunConfig

ROUNDS = 200
TARGETS = (0.3, 0.4)
BACKPROP = {"lr": 0.1, "local_steps": 1, "batch_size": 32}
FORWARD = {"directions": 50, "batch_size": 32, "lr": 0.01, "lr_half_life_rounds": 100.0, "ema": 0.9}


def config(method: str, settings: dict, model: str = "lenet5") -> RunConfig:
    return RunConfig(
        method=method,
        model=model,
        partition="iid",
        clients=10,
        rounds=ROUNDS,
        eval_every=10,
        eval_examples=2000,
        target_accuracy=TARGETS,
        settings=settings,
    )


zeroth = partial(config, "ntk_zo")
SPARSE = {**FORWARD, "density": 0.2}
GROUPS = {
    "iid": {
        "backprop": config("fedavg", BACKPROP),
        "ntk_20": zeroth(SPARSE),
        "random_20": zeroth({**SPARSE, "criterion": "random"}),
        "small_dense_20": zeroth({**FORWARD, "density": 1.0}, model="lenet5_small"),
        "dense": zeroth({**FORWARD, "density": 1.0}),
    }
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_cifar10")
