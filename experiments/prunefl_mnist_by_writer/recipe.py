"""PruneFL and FedAvg, Conv-2 on MNIST by writer: the stand-in for the paper's FEMNIST.

539 writers merged into 10 clients, all of them in every round, as in the paper (there: 193
writers).  Emulated Raspberry Pi 4.  README.md is the card.
"""

from fedlean.recipe import main
from fedlean.runtime.run import RunConfig

ROUNDS = 150
TARGETS = (0.9, 0.95, 0.97)
WARMUP_STEPS = 70  # as many as PruneFL's initial pruning takes here
COMMON = {"lr": 0.25, "local_steps": 5, "batch_size": 20}
PAPER_EXAMPLES = {"initial_examples": 200, "initial_batches": 10}  # as the authors' code
WARMUP = {"warmup_steps": WARMUP_STEPS, "warmup_examples": 0}


def config(method: str, settings: dict, **changes) -> RunConfig:
    fields = {
        "model": "conv2",
        "inputs": "unit",  # [0, 1], as the authors' code feeds FEMNIST
        "partition": "natural",
        "clients": 10,
        "rounds": ROUNDS,
        "device": "raspberry_pi_4",
        "engine": "torch",  # expected.json was made on it
        "target_accuracy": TARGETS,
        "eval_examples": 2000,
    }
    return RunConfig(method=method, settings=settings, **{**fields, **changes})


RUNS = {
    "fedavg": config("fedavg", COMMON),
    "fedavg_warmup": config("fedavg", {**COMMON, **WARMUP}),
    "prunefl": config("prunefl", COMMON),
    "prunefl_limit": config("prunefl", {**COMMON, "size_limit": 0.1}),
    "prunefl_all_importance": config("prunefl", {**COMMON, "importance_rounds": 0}),
    "prunefl_paper_examples": config("prunefl", {**COMMON, **PAPER_EXAMPLES}),
}

if __name__ == "__main__":
    main({"natural": RUNS}, default_out="runs/prunefl_mnist_by_writer")
