"""PruneFL and its baselines, LeNet-300-100 on MNIST by writer.

Not in the paper.  539 writers merged into 10 clients, all of them in every round, emulated
Raspberry Pi 4.  README.md is the card.
"""

from fedlean.recipe import approaches, main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
EVERY = 30  # a reconfiguration then adds less than 2% to the rounds between two
TARGETS = (0.9, 0.93, 0.95)
DENSITY = 0.135  # about what PruneFL chose; what cannot choose a size gets this one
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}


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


RUNS = approaches(
    config,
    common=COMMON,
    prunefl={"reconfigure_every": EVERY},
    density=DENSITY,
    warmup_steps=70,
)

if __name__ == "__main__":
    main({"natural": RUNS}, default_out="runs/prunefl_lenet300_mnist")
