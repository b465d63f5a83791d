"""PruneFL and its baselines, LeNet-300-100 on MNIST by writer.

Not in the paper.  539 writers merged into 10 clients, all of them in every round, emulated
Raspberry Pi 4.  README.md is the card.
"""

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
EVERY = 30  # a reconfiguration then adds less than 2% to the rounds between two
TARGETS = (0.9, 0.93, 0.95)
DENSITY = 0.135  # about what PruneFL chose; what cannot choose a size gets this one
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}
SIZED = {**COMMON, "density": DENSITY}
# about as many as PruneFL's initial pruning takes, on the same examples
WARMUP = {"warmup_steps": 70, "warmup_examples": 0}


def config(method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="lenet300",
        inputs="unit",
        partition="natural",
        clients=10,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        target_accuracy=TARGETS,
        settings=settings,
    )


RUNS = {
    "fedavg": config("fedavg", COMMON),
    "prunefl": config("prunefl", {**COMMON, "reconfigure_every": EVERY}),
    "fedavg_warmup": config("fedavg", {**COMMON, **WARMUP}),
    "snip": config("snip", {**SIZED, "score": "update"}),  # as in the authors' code
    "synflow": config("synflow", SIZED),
    "online": config("online", COMMON),
    "iterative": config("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
}

if __name__ == "__main__":
    main({"natural": RUNS}, default_out="runs/prunefl_lenet300_mnist", here=["prunefl"])
