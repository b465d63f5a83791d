"""Foresight pruning and training by forward passes on Fashion-MNIST: LeNet-5-like, with GroupNorm.

Ten clients, iid and Dirichlet(0.1); the runs of `ntk_zo_digits` that matter most.  README.md is the
card.
"""

from functools import partial

from fedlean.recipe import main
from fedlean.runtime.run import RunConfig

ROUNDS = 200
TARGETS = (0.6, 0.7)
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.1"}
BACKPROP = {"lr": 0.1, "local_steps": 1, "batch_size": 32}
FORWARD = {"directions": 50, "batch_size": 32, "lr": 0.01, "lr_half_life_rounds": 100.0, "ema": 0.9}


def config(partition: str, method: str, settings: dict, model: str = "lenet5") -> RunConfig:
    return RunConfig(
        method=method,
        model=model,
        partition=partition,
        clients=10,
        rounds=ROUNDS,
        eval_every=10,
        eval_examples=2000,
        target_accuracy=TARGETS,
        settings=settings,
    )


def runs(partition: str) -> dict[str, RunConfig]:
    run = partial(config, partition)
    zeroth = partial(run, "ntk_zo")
    sparse = {**FORWARD, "density": 0.2}
    return {
        "backprop": run("fedavg", BACKPROP),
        "dense": zeroth({**FORWARD, "density": 1.0}),
        "ntk_20": zeroth(sparse),
        "ntk_shuffled_20": zeroth({**sparse, "criterion": "ntk_shuffled"}),
        "random_20": zeroth({**sparse, "criterion": "random"}),
        "small_dense_20": zeroth({**FORWARD, "density": 1.0}, model="lenet5_small"),
        "ntk_5": zeroth({**FORWARD, "density": 0.05}),
        "hybrid": zeroth({**FORWARD, "density": 1.0, "last_block": "backprop"}),
    }


GROUPS = {group: runs(partition) for group, partition in PARTITIONS.items()}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_fashion_mnist")
