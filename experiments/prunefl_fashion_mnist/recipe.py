"""PruneFL and its baselines: Conv-2 on Fashion-MNIST, iid and Dirichlet(0.5) over 10 clients.

Not in the paper.  All clients in every round, emulated Raspberry Pi 4.  README.md is the card.
"""

from dataclasses import replace
from functools import partial

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 100
EVERY = 30  # a reconfiguration then adds less than 2% to the rounds between two
TARGETS = {"iid": (0.8, 0.85), "dirichlet": (0.75, 0.8)}
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.5"}
DENSITY = 0.15  # about what PruneFL chose in pilot runs; what cannot choose a size gets this one
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}
SIZED = {**COMMON, "density": DENSITY}
# about as many as PruneFL's initial pruning takes, on the same examples
WARMUP = {"warmup_steps": 70, "warmup_examples": 0}
LONG_ROUNDS = 600  # six times as many: does the gap in accuracy close?


def config(group: str, method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="conv2",
        inputs="unit",
        partition=PARTITIONS[group],
        clients=10,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        target_accuracy=TARGETS[group],
        eval_examples=2000,
        settings=settings,
    )


def runs(group: str) -> dict[str, RunConfig]:
    run = partial(config, group)
    return {
        "fedavg": run("fedavg", COMMON),
        "prunefl": run("prunefl", {**COMMON, "reconfigure_every": EVERY}),
        "fedavg_warmup": run("fedavg", {**COMMON, **WARMUP}),
        "snip": run("snip", {**SIZED, "score": "update"}),  # as in the authors' code
        "synflow": run("synflow", SIZED),
        "online": run("online", COMMON),
        "iterative": run("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
    }


def foresight(group: str) -> dict[str, RunConfig]:
    """PruneFL from the masks of criteria, at the sizes that these are told."""

    def begun(initial: str, density: float) -> RunConfig:
        first = {"initial": initial, "initial_density": density, "initial_rescale": True}
        size = {"reconfigure_every": EVERY, "size_limit": density}
        return config(group, "prunefl", {**COMMON, **first, **size})

    return {
        **{name: runs(group)[name] for name in ("fedavg", "prunefl")},
        "snip_8": config(group, "snip", {**COMMON, "density": 0.08, "score": "update"}),
        "from_snip_8": begun("snip", 0.08),
        "from_snip_5": begun("snip", 0.05),
        "from_synflow_8": begun("synflow", 0.08),
    }


GROUPS = {group: runs(group) for group in PARTITIONS}
GROUPS |= {f"{group}_foresight": foresight(group) for group in PARTITIONS}
GROUPS["iid_long"] = {
    name: replace(GROUPS["iid"][name], rounds=LONG_ROUNDS, eval_every=5)
    for name in ("fedavg", "prunefl")
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_fashion_mnist", here=["prunefl"])
