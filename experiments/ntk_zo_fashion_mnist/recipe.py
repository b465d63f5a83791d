"""Foresight pruning and training by forward passes on Fashion-MNIST, with controls.

Ten clients, iid and Dirichlet(0.1), with an MLP and with a LeNet-5-like network with GroupNorm; the
runs of `ntk_zo_digits` that matter most.  README.md is the card.
"""

from functools import partial

from fedlean.recipe import foresight, main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
TARGETS = (0.6, 0.7)
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.1"}
SMALL = {"mlp": "mlp_27_14", "lenet5": "lenet5_small"}
BACKPROP = {"lr": 0.1, "local_steps": 1, "batch_size": 32}
FORWARD = {"directions": 50, "batch_size": 32, "lr": 0.01, "lr_half_life_rounds": 100.0, "ema": 0.9}


def config(partition: str, model: str, method: str, settings: dict) -> RunConfig:
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


GROUPS = {
    f"{model}-{group}": foresight(
        partial(config, partition, model), backprop=BACKPROP, forward=FORWARD, small=small
    )
    for model, small in SMALL.items()
    for group, partition in PARTITIONS.items()
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_fashion_mnist")
