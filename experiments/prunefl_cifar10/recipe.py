"""PruneFL and its baselines, VGG-11 on CIFAR-10: the paper's second task.

100 clients, as in the paper.  `short` is sized for a few hours on two cores; `paper` has the
paper's length, cohort, loss and learning rate.  README.md is the card.
"""

from functools import partial

from fedlean.recipe import main
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
SIZED = {**SHORT, "density": DENSITY}
AS_PAPER = {**SHORT, "density": PAPER_DENSITY}  # what the paper's PruneFL came to
PAPER_SIZED = {**PAPER, "density": PAPER_DENSITY}
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
# waits longer before it prunes than the defaults, nearer to the authors' 50 passes and 50 rounds
PATIENT = {"reconfigure_every": 50, "initial_passes": 10}
# about as many as initial pruning of `prunefl`, on the same examples
WARMUP = {"warmup_steps": 400, "warmup_examples": 0}
# of ten reconfigurations of initial pruning
PAPER_WARMUP = {"warmup_steps": 5000, "warmup_examples": 200}


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


paper = partial(config, rounds=10_000, init="pytorch")
GROUPS = {
    "short": {
        "fedavg": config("fedavg", SHORT),
        "prunefl": config("prunefl", {**SHORT, **PATIENT}),
        "fedavg_warmup": config("fedavg", {**SHORT, **WARMUP}),
        "snip": config("snip", {**SIZED, "score": "update"}),  # as in the authors' code
        "synflow": config("synflow", SIZED),
        "online": config("online", SHORT),
        "iterative": config("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
        "fedavg_warmup_100": config("fedavg", {**SHORT, **WARMUP, "warmup_steps": 100}),
        "prunefl_at_once": config("prunefl", {**SHORT, "reconfigure_every": 15}),
        # importance from every pass of initial pruning
        "prunefl_all_passes": config(
            "prunefl", {**SHORT, **PATIENT, "initial_importance_passes": 0}
        ),
        "snip_17": config("snip", {**AS_PAPER, "score": "update"}),
        "synflow_17": config("synflow", AS_PAPER),
        "iterative_17": config("iterative", {**AS_PAPER, "spacing": "geometric"}),
    },
    "paper": {
        "fedavg": paper("fedavg", PAPER),
        "prunefl": paper("prunefl", {**PAPER, **AUTHORS}),
        "fedavg_warmup": paper("fedavg", {**PAPER, **PAPER_WARMUP}),
        "snip": paper("snip", {**PAPER_SIZED, "score": "update"}),  # as in the authors' code
        "synflow": paper("synflow", PAPER_SIZED),
        "online": paper("online", PAPER),
        "iterative": paper("iterative", {**PAPER_SIZED, "spacing": "geometric"}),  # so, too
    },
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_cifar10", here=["prunefl"])
