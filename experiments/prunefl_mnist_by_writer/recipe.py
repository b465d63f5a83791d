"""PruneFL, its baselines and its studies: Conv-2 on MNIST by writer, for the paper's FEMNIST.

539 writers merged into 10 clients, all of them in every round, as in the paper (there: 193
writers).  Emulated Raspberry Pi 4.  README.md is the card.
"""

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 100  # the paper: 10,000, and 50 between reconfigurations
EVERY = 25
TARGETS = (0.9, 0.95, 0.97)
DENSITY = 0.14  # about what PruneFL chose in pilot runs; what cannot choose a size gets this one
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}
PRUNEFL = {**COMMON, "reconfigure_every": EVERY}
SIZED = {**COMMON, "density": DENSITY}
WARMUP = {"warmup_steps": 70, "warmup_examples": 0}  # as many as initial pruning takes here
PAPER_EXAMPLES = {"initial_examples": 200, "initial_batches": 10}  # as the authors' code
SELECTION = {"cohort": 5}


def config(method: str, settings: dict, **changes) -> RunConfig:
    fields = {
        "model": "conv2",
        "inputs": "unit",  # [0, 1], as the authors' code feeds FEMNIST
        "partition": "natural",
        "clients": 10,
        "rounds": ROUNDS,
        "device": "raspberry_pi_4",
        "target_accuracy": TARGETS,
        "eval_examples": 2000,
    }
    return RunConfig(method=method, settings=settings, **{**fields, **changes})


TABLE = {
    "fedavg": config("fedavg", COMMON),
    "prunefl": config("prunefl", PRUNEFL),
    "fedavg_warmup": config("fedavg", {**COMMON, **WARMUP}),
    "snip": config("snip", {**SIZED, "score": "update"}),  # as in the authors' code
    "synflow": config("synflow", SIZED),
    "online": config("online", COMMON),
    "iterative": config("iterative", {**SIZED, "spacing": "geometric"}),  # so, too
}
STUDIES = {
    # lottery ticket (VI-C): the final mask from the original weights, and from new ones
    "ticket": config("fixed_mask", COMMON, start="prunefl", start_weights="original"),
    "ticket_random": config("fixed_mask", COMMON, start="prunefl", start_weights="random"),
    # initial and further pruning apart
    "initial_only": config("prunefl", {**COMMON, "reconfigure_every": 0}),
    "further_only": config("prunefl", {**PRUNEFL, "initial_pruning": False}),
    # size limit and target (VI-E)
    "limit": config("prunefl", {**PRUNEFL, "size_limit": 0.1}),
    "limit_target": config("prunefl", {**PRUNEFL, "size_limit": 0.2, "size_target": 0.05}),
    # SNIP at wrong densities
    "snip_30": config("snip", {**COMMON, "density": 0.3, "score": "update"}),
    "snip_1": config("snip", {**COMMON, "density": 0.01, "score": "update"}),
    # client selection
    "fedavg_selection": config("fedavg", {**COMMON, **SELECTION}),
    "prunefl_selection": config("prunefl", {**PRUNEFL, **SELECTION}),
    # what we do otherwise than the paper
    "all_importance": config("prunefl", {**PRUNEFL, "importance_rounds": 0}),
    "paper_examples": config("prunefl", {**PRUNEFL, **PAPER_EXAMPLES}),
}
COSTS = {  # which the paper compares in cost only
    "prunetrain": config("prunetrain", {**COMMON, "penalty_ratio": 0.5}),
    "dpf": config("dpf", SIZED),
}
RUNS = {**TABLE, **STUDIES, **COSTS}


def begun(initial: str, density: float, **changes) -> RunConfig:
    """PruneFL from the mask of a criterion, at the size that this is told."""
    first = {"initial": initial, "initial_density": density, "initial_rescale": True}
    return config("prunefl", {**PRUNEFL, **first, "size_limit": density, **changes})


FORESIGHT = {
    "fedavg": TABLE["fedavg"],
    "prunefl": TABLE["prunefl"],
    "snip_8": config("snip", {**COMMON, "density": 0.08, "score": "update"}),
    "from_snip_8": begun("snip", 0.08),
    "from_snip_5": begun("snip", 0.05),
    "from_synflow_8": begun("synflow", 0.08),
    # what of it does what: masks that never move, weights that do not grow, another size, and
    # first weights of other sizes for all
    "synflow_8_still": begun("synflow", 0.08, reconfigure_every=0, size_limit=None),
    "synflow_8_plain": begun("synflow", 0.08, initial_rescale=False),
    "from_synflow_5": begun("synflow", 0.05),
    "fedavg_he": config("fedavg", COMMON, init="he"),
}
GROUPS = {"natural": RUNS, "foresight": FORESIGHT}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/prunefl_mnist_by_writer", here=["prunefl"])
