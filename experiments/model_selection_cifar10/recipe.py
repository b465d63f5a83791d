"""Dynamic model selection and its controls, ResNet-18 of width 16 on CIFAR-10, limits redrawn.

50 devices, 5 a round, whose memory and bytes of a round are drawn anew every round (`fleet.toml`).
README.md is the card.
"""

from functools import partial
from pathlib import Path

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

HERE = Path(__file__).parent
WIDTHS = "1 0.5 0.25"
SETTINGS = {
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "local_steps": 20,
    "batch_size": 16,
    "cohort": 5,
}


def config(method: str, **settings: float | str) -> RunConfig:
    return RunConfig(
        method=method,
        model="resnet18,blocks=unit,width=16",
        partition="iid",
        clients=50,
        rounds=200,
        device="raspberry_pi_4",
        fleet=str(HERE / "fleet.toml"),
        target_accuracy=(0.4, 0.5),
        eval_every=20,
        eval_examples=2000,
        settings={**SETTINGS, **settings},
    )


sliced = partial(config, widths=WIDTHS)
GROUPS = {
    "iid": {
        "heterofl": sliced("heterofl"),
        "allsmall": config("allsmall", width=0.25),  # what every device can hold in every round
        "allsmall_wider": config("allsmall", width=0.5),
        "exclusivefl": config("exclusivefl"),
        "fedrolex": sliced("fedrolex"),
        "model_selection": sliced("model_selection"),
        "model_selection_undistilled": sliced("model_selection", distill_every=0),
    }
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/model_selection_cifar10")
