"""Progressive training and its controls, Conv-2 on Fashion-MNIST, on devices of little memory.

100 clients of whom 8 can hold the full model (`fleet.toml`).  README.md is the card.
"""

from pathlib import Path

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

HERE = Path(__file__).parent
SETTINGS = {
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "local_steps": 10,
    "batch_size": 16,
    "cohort": 10,
}
# With a constant rate a part does a random walk long before it has converged: a longer window
# sees the drift in it, and later.
PATIENT = {"window": 20, "below": 1.1, "patience": 5}


def config(method: str, partition: str, width: int = 16, **settings: float | str) -> RunConfig:
    return RunConfig(
        method=method,
        model=f"conv2,width={width}",
        partition=partition,
        clients=100,
        rounds=200,
        device="raspberry_pi_4",
        fleet=str(HERE / "fleet.toml"),
        target_accuracy=(0.8, 0.85),
        eval_every=10,
        eval_examples=2000,
        settings={**SETTINGS, **settings},
    )


def runs(partition: str) -> dict[str, RunConfig]:
    return {
        "exclusivefl": config("exclusivefl", partition),
        "allsmall": config("fedavg", partition, width=4),  # its own model, which all can hold
        "heterofl": config("heterofl", partition),
        "depthfl": config("depthfl", partition),
        "smartfreeze": config("smartfreeze", partition, **PATIENT),
        "profl": config("profl", partition, **PATIENT),
        "neulite": config("neulite", partition),
        "slt": config("slt", partition, shares="equal"),
    }


GROUPS = {"iid": runs("iid"), "dirichlet": runs("dirichlet:0.5")}
SMOKE = {"rounds": 13}  # what the phases of ProFL need

if __name__ == "__main__":
    main(GROUPS, default_out="runs/progressive_fashion_mnist", smoke=SMOKE)
