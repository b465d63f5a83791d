"""PruneFL and its baselines, Conv-2 on FEMNIST, the paper's first task at its full length.

193 writers merged into 10 clients, all of them in every round; loss, rate, inputs and intervals are
the paper's.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import AUTHORS_PRUNEFL, approaches, main
from fedlean.runtime.config import RunConfig

ROUNDS = 10_000
TARGETS = (0.7, 0.8)  # the paper's
DENSITY = 0.134  # the paper's at convergence
COMMON = {"lr": 0.25, "loss": "bce", "local_steps": 5, "batch_size": 20}
PAPER = {**AUTHORS_PRUNEFL, "initial_examples": 200}


def config(method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="conv2",
        inputs="unit",
        partition="natural",
        clients=10,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        target_accuracy=TARGETS,
        eval_every=5,
        eval_examples=2000,
        settings=settings,
    )


GROUPS = {
    "paper": approaches(config, common=COMMON, prunefl=PAPER, density=DENSITY, warmup_steps=5000),
    "fresh_examples": {  # initial pruning as by our defaults: fresh batches, after every pass
        "fedavg": config("fedavg", COMMON),
        "prunefl": config("prunefl", COMMON),
    },
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_femnist")
