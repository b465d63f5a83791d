"""PruneFL and FedAvg, MobileNetV3-Small on CelebA (smiling or not): the paper's fourth task.

934 clients, 10 of them a round.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 1000
TARGETS = (0.85, 0.9)
DENSITY = 0.5  # ours: the paper gives no density for this task
COMMON = {"lr": 0.001, "local_steps": 5, "batch_size": 20, "cohort": 10}
SIZED = {**COMMON, "density": DENSITY}
AUTHORS = {  # PruneFL as its authors' code has it
    "initial_batches": 10,
    "initial_passes": 50,
    "initial_examples": 500,
    "initial_importance_passes": 0,
    "importance_rounds": 0,
    "importance_multiple": 0.0,
    "importance_dtype": "fp32",
    "reconfigure_every": 50,
}
# of ten reconfigurations of initial pruning
WARMUP = {"warmup_steps": 5000, "warmup_examples": 500}


def config(method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="mobilenetv3_small",
        partition="natural",
        clients=934,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        target_accuracy=TARGETS,
        eval_every=5,
        eval_examples=2000,
        settings=settings,
    )


RUNS = {
    "fedavg": config("fedavg", COMMON),
    "prunefl": config("prunefl", {**COMMON, **AUTHORS}),
    "fedavg_warmup": config("fedavg", {**COMMON, **WARMUP}),
    "snip": config("snip", {**SIZED, "score": "update"}),  # as in the authors' code
    "synflow": config("synflow", SIZED),
    "online": config("online", COMMON),
    "iterative": config("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
}

if __name__ == "__main__":
    main({"natural": RUNS}, default_out="runs/prunefl_celeba", here=["prunefl"])
