"""PruneFL and its baselines, VGG-11 on CIFAR-10: the paper's second task.

100 clients, 10 of them a round, as in the paper.  `short` is sized for a few hours on two cores,
`paper` has the paper's length.  NOT RUN by us: README.md says what is missing.
"""

from fedlean.recipe import approaches, main
from fedlean.runtime.run import RunConfig

TARGETS = (0.5, 0.6)
DENSITY = 0.168  # the paper's at convergence, with client selection
COMMON = {
    "lr": 0.1,
    "lr_half_life_rounds": 10_000.0,
    "loss": "bce",
    "local_steps": 5,
    "batch_size": 20,
    "cohort": 10,
}


def runs(rounds: int, every: int) -> dict[str, RunConfig]:
    def config(method: str, settings: dict) -> RunConfig:
        return RunConfig(
            method=method,
            model="vgg11",
            partition="iid",
            clients=100,
            rounds=rounds,
            device="raspberry_pi_4",
            target_accuracy=TARGETS,
            eval_every=5,
            eval_examples=2000,
            settings=settings,
        )

    prunefl = {"reconfigure_every": every}
    return approaches(config, common=COMMON, prunefl=prunefl, density=DENSITY, warmup_steps=100)


GROUPS = {"short": runs(600, 15), "paper": runs(10_000, 50)}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_cifar10")
