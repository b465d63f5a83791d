"""Foresight pruning and training by forward passes on CIFAR-10: LeNet-5-like, with GroupNorm.

Ten clients, iid and Dirichlet(0.1); few rounds: each evaluates every client's batch 51 times.
README.md is the card.
"""

from functools import partial

from fedlean.recipe import foresight, main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
TARGETS = (0.3, 0.4)
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.1"}
BACKPROP = {"lr": 0.1, "local_steps": 1, "batch_size": 32}
FORWARD = {"directions": 50, "batch_size": 32, "lr": 0.01, "lr_half_life_rounds": 100.0, "ema": 0.9}


def config(partition: str, method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="lenet5",
        partition=partition,
        clients=10,
        rounds=ROUNDS,
        eval_every=10,
        eval_examples=2000,
        target_accuracy=TARGETS,
        settings=settings,
    )


GROUPS = {
    group: foresight(
        partial(config, partition), backprop=BACKPROP, forward=FORWARD, small="lenet5_small"
    )
    for group, partition in PARTITIONS.items()
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_cifar10")
