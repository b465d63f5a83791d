"""PruneFL and FedAvg, MobileNetV3-Small on CelebA (smiling or not): the paper's fourth task.

934 clients, 10 of them a round.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import AUTHORS_PRUNEFL, approaches, main
from fedlean.runtime.config import RunConfig

ROUNDS = 1000
TARGETS = (0.85, 0.9)
DENSITY = 0.5  # ours: the paper gives no density for this task
COMMON = {"lr": 0.001, "local_steps": 5, "batch_size": 20, "cohort": 10}
PRUNEFL = {**AUTHORS_PRUNEFL, "initial_examples": 500}


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


RUNS = approaches(
    config,
    common=COMMON,
    prunefl=PRUNEFL,
    density=DENSITY,
    warmup_steps=5000,  # ten reconfigurations of initial pruning
)

if __name__ == "__main__":
    main({"natural": RUNS}, default_out="runs/prunefl_celeba")
