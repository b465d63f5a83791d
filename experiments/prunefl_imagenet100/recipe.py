"""PruneFL and FedAvg, ResNet-18 on ImageNet-100: the paper's third task.

100 clients, 10 of them a round.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import AUTHORS_PRUNEFL, approaches, main
from fedlean.runtime.config import RunConfig

ROUNDS = 20_000
TARGETS = (0.6, 0.7)
DENSITY = 0.677  # the paper's at convergence
COMMON = {"lr": 0.05, "local_steps": 5, "batch_size": 20, "cohort": 10}
PRUNEFL = {**AUTHORS_PRUNEFL, "initial_examples": 500, "initial_passes": 25}


def config(method: str, settings: dict) -> RunConfig:
    return RunConfig(
        method=method,
        model="resnet18",
        partition="iid",
        clients=100,
        rounds=ROUNDS,
        device="raspberry_pi_4",
        target_accuracy=TARGETS,
        eval_every=20,
        eval_examples=2000,
        settings=settings,
    )


# ten reconfigurations of initial pruning
RUNS = approaches(config, common=COMMON, prunefl=PRUNEFL, density=DENSITY, warmup_steps=2500)

if __name__ == "__main__":
    main({"iid": RUNS}, default_out="runs/prunefl_imagenet100")
