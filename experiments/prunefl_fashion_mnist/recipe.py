"""PruneFL and FedAvg, Conv-2 on Fashion-MNIST, iid and Dirichlet(0.5) over 10 clients.

Not in the paper.  All clients in every round, emulated Raspberry Pi 4.  README.md is the card.
"""

from fedlean.recipe import main
from fedlean.runtime.run import RunConfig

ROUNDS = 120
TARGETS = {"iid": (0.75, 0.8, 0.85), "dirichlet": (0.7, 0.75, 0.8)}
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.5"}
WARMUP_STEPS = 70  # about as many as PruneFL's initial pruning takes
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}
WARMUP = {"warmup_steps": WARMUP_STEPS, "warmup_examples": 0}


def config(group: str, method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="conv2",
        inputs="unit",
        partition=PARTITIONS[group],
        clients=10,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        engine="torch",  # expected.json was made on it
        target_accuracy=TARGETS[group],
        eval_examples=2000,
        settings=settings,
    )


GROUPS = {
    group: {
        "fedavg": config(group, "fedavg", COMMON),
        "fedavg_warmup": config(group, "fedavg", {**COMMON, **WARMUP}),
        "prunefl": config(group, "prunefl", COMMON),
        "prunefl_limit": config(group, "prunefl", {**COMMON, "size_limit": 0.1}),
        "prunefl_initial_only": config(group, "prunefl", {**COMMON, "reconfigure_every": 0}),
    }
    for group in PARTITIONS
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_fashion_mnist")
