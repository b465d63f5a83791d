"""Foresight pruning and training by forward passes on Fashion-MNIST, with controls.

Ten clients, iid and Dirichlet(0.1), with an MLP and with a LeNet-5-like network with GroupNorm; the
runs of `ntk_zo_digits` that matter most.  README.md is the card.
"""

from dataclasses import replace
from functools import partial

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
TARGETS = (0.6, 0.7)
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.1"}
SMALL = {"mlp": "mlp_27_14", "lenet5": "lenet5_small"}  # a fifth of the parameters
BACKPROP = {"lr": 0.1, "local_steps": 1, "batch_size": 32}
FORWARD = {"directions": 50, "batch_size": 32, "lr": 0.01, "lr_half_life_rounds": 100.0, "ema": 0.9}
SIZED = {**FORWARD, "density": 0.2}
CRITERIA = ("ntk_shuffled", "random", "synflow", "magnitude")  # beside "ntk", as controls


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


def runs(partition: str, model: str) -> dict[str, RunConfig]:
    run = partial(config, partition, model)
    zeroth = partial(run, "ntk_zo")
    return {
        "backprop": run("fedavg", BACKPROP),
        "dense": zeroth({**FORWARD, "density": 1.0}),
        "ntk_50": zeroth({**FORWARD, "density": 0.5}),
        "ntk_20": zeroth(SIZED),
        **{f"{name}_20": zeroth({**SIZED, "criterion": name}) for name in CRITERIA},
        # one round of SNIP makes its mask, which the next run takes
        "snip_mask_20": replace(run("snip", {**BACKPROP, "density": 0.2}), rounds=2),
        "snip_20": replace(
            zeroth({**FORWARD, "rescale_given": True}),
            start="snip_mask_20",
            start_weights="original",
        ),
        "small_dense_20": replace(zeroth({**FORWARD, "density": 1.0}), model=SMALL[model]),
        "ntk_5": zeroth({**FORWARD, "density": 0.05}),
        "hybrid": zeroth({**FORWARD, "density": 1.0, "last_block": "backprop"}),
    }


GROUPS = {
    f"{model}-{group}": runs(partition, model)
    for model in SMALL
    for group, partition in PARTITIONS.items()
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_fashion_mnist")
