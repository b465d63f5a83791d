"""PruneFL and its baselines, Conv-2 on FEMNIST, the paper's first task at its full length.

193 writers merged into 10 clients, all of them in every round; loss, rate, inputs and intervals are
the paper's.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 10_000
TARGETS = (0.7, 0.8)  # the paper's
DENSITY = 0.134  # the paper's at convergence
COMMON = {"lr": 0.25, "loss": "bce", "local_steps": 5, "batch_size": 20}
SIZED = {**COMMON, "density": DENSITY}
AUTHORS = {  # PruneFL as its authors' code has it
    "initial_batches": 10,
    "initial_passes": 50,
    "initial_examples": 200,
    "initial_importance_passes": 0,
    "importance_rounds": 0,
    "importance_multiple": 0.0,
    "importance_dtype": "fp32",
    "reconfigure_every": 50,
}
# of ten reconfigurations of initial pruning
WARMUP = {"warmup_steps": 5000, "warmup_examples": 200}


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
    "paper": {
        "fedavg": config("fedavg", COMMON),
        "prunefl": config("prunefl", {**COMMON, **AUTHORS}),
        "fedavg_warmup": config("fedavg", {**COMMON, **WARMUP}),
        "snip": config("snip", {**SIZED, "score": "update"}),  # as in the authors' code
        "synflow": config("synflow", SIZED),
        "online": config("online", COMMON),
        "iterative": config("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
    },
    "fresh_examples": {  # initial pruning as by our defaults: fresh batches, after every pass
        "fedavg": config("fedavg", COMMON),
        "prunefl": config("prunefl", COMMON),
    },
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_femnist", here=["prunefl"])
