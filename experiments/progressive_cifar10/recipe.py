"""Progressive training and its controls, ResNet-18 and VGG-11 on CIFAR-10, on small devices.

100 clients of whom 8 can hold the full model (`fleet*.toml`).  `short` and `iid` are sized for an
hour on two cores, `long` trains half as long again, `vgg11` is the other model, and `paper` has
ProFL's released length and the full width.  README.md is the card.
"""

from functools import partial
from pathlib import Path

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

HERE = Path(__file__).parent
TARGETS = (0.4, 0.5, 0.6)
SHORT = {
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
# 5 epochs over 500 examples are 39 steps of 64
PAPER = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "local_steps": 39,
    "batch_size": 64,
    "cohort": 20,
}


def config(
    method: str,
    settings: dict,
    *,
    model: str = "resnet18",
    width: int = 16,
    rounds: int = 400,
    partition: str = "dirichlet:0.5",
    fleet: str | None = "fleet.toml",
    init: str = "pytorch",
) -> RunConfig:
    return RunConfig(
        method=method,
        model=f"{model},width={width}",
        partition=partition,
        clients=100,
        rounds=rounds,
        device="raspberry_pi_4",
        fleet=None if fleet is None else str(HERE / fleet),
        target_accuracy=TARGETS,
        eval_every=20,
        eval_examples=2000,
        settings=settings,
        init=init,
    )


def runs(make: partial, settings: dict, narrow: int) -> dict[str, RunConfig]:
    """All of a group; `narrow` is the width that every device can hold."""
    return {
        "fedavg_without_limits": make("fedavg", settings, fleet=None),
        "exclusivefl": make("exclusivefl", settings),
        "allsmall": make("fedavg", settings, width=narrow),  # its own model, as narrow as must be
        "allsmall_wider": make("fedavg", settings, width=2 * narrow),  # of what fewer can hold
        "allsmall_widest": make("fedavg", settings, width=4 * narrow),
        "heterofl": make("heterofl", settings),
        "depthfl": make("depthfl", settings),
        "smartfreeze": make("smartfreeze", {**settings, **PATIENT}),
        "smartfreeze_schedule": make("smartfreeze", {**settings, "pace": False}),  # equal shares
        "profl": make("profl", {**settings, "lr": 0.01}),  # diverges at 0.03 when it grows
        "profl_patient": make("profl", {**settings, **PATIENT, "lr": 0.01}),
        "neulite": make("neulite", settings),
        "slt": make("slt", {**settings, "shares": "equal"}),
    }


short = partial(config)
# VGG-11 has no norms: from PyTorch's first weights its loss stays where it is
vgg11 = partial(config, model="vgg11", fleet="fleet_vgg11.toml", init="he")
paper = partial(config, width=64, rounds=1600, fleet="fleet_paper.toml")
GROUPS = {
    "short": runs(short, SHORT, narrow=2),
    "iid": runs(partial(short, partition="iid"), SHORT, narrow=2),
    "long": runs(partial(short, partition="iid", rounds=600), SHORT, narrow=2),
    "vgg11": runs(vgg11, {**SHORT, "lr": 0.01}, narrow=2),
    "paper": runs(paper, PAPER, narrow=8),
}

SMOKE = {"rounds": 17}  # what the phases of ProFL need on VGG-11

if __name__ == "__main__":
    main(GROUPS, default_out="runs/progressive_cifar10", smoke=SMOKE)
