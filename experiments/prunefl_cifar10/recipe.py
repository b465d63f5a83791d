"""PruneFL and its baselines, VGG-11 on CIFAR-10: the paper's second task.

100 clients, as in the paper.  `short` is sized for a few hours on two cores; `paper` has the
paper's length, cohort, loss and learning rate.  README.md is the card.
"""

from functools import partial

from fedlean.recipe import AUTHORS_PRUNEFL, approaches, main, with_settings
from fedlean.runtime.config import RunConfig

TARGETS = (0.5, 0.6)
PAPER_DENSITY = 0.168  # at convergence, with client selection
DENSITY = 0.4  # about what `prunefl` chooses; what cannot choose a size gets this one
PAPER = {
    "lr": 0.1,
    "lr_half_life_rounds": 10_000.0,
    "loss": "bce",
    "local_steps": 5,
    "batch_size": 20,
    "cohort": 10,
}
# From PyTorch's first weights the loss stays at ln 10 for hundreds of rounds (there are no norms),
# and with He's the paper's learning rate diverges.
SHORT = {"lr": 0.02, "local_steps": 5, "batch_size": 20, "cohort": 2}
# waits longer before it prunes than the defaults, nearer to the authors' 50 passes and 50 rounds
PATIENT = {"reconfigure_every": 50, "initial_passes": 10}
WARMUP_STEPS = 400  # about as many as initial pruning of `prunefl`


def config(method: str, settings: dict, *, rounds: int = 600, init: str = "he") -> RunConfig:
    return RunConfig(
        method=method,
        model="vgg11",
        init=init,
        partition="iid",
        clients=100,
        rounds=rounds,
        device="raspberry_pi_4",
        target_accuracy=TARGETS,
        eval_every=10,
        eval_examples=1000,
        settings=settings,
    )


table = approaches(
    config, common=SHORT, prunefl=PATIENT, density=DENSITY, warmup_steps=WARMUP_STEPS
)
at_once = config("prunefl", {**SHORT, "reconfigure_every": 15})
all_passes = config("prunefl", {**SHORT, **PATIENT, "initial_importance_passes": 0})
GROUPS = {
    "short": {
        **table,
        "fedavg_warmup_100": with_settings(table["fedavg_warmup"], warmup_steps=100),
        "prunefl_at_once": at_once,
        "prunefl_all_passes": all_passes,  # importance from every pass of initial pruning
        # the others at the density that the paper's PruneFL came to
        "snip_17": with_settings(table["snip"], density=PAPER_DENSITY),
        "synflow_17": with_settings(table["synflow"], density=PAPER_DENSITY),
        "iterative_17": with_settings(table["iterative"], density=PAPER_DENSITY),
    },
    "paper": approaches(
        partial(config, rounds=10_000, init="pytorch"),
        common=PAPER,
        prunefl={**AUTHORS_PRUNEFL, "initial_examples": 200},
        density=PAPER_DENSITY,
        warmup_steps=5000,  # ten reconfigurations of initial pruning
    ),
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_cifar10")
