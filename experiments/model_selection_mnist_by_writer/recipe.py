"""Dynamic model selection and its controls, Conv-2 on MNIST by writer, limits redrawn.

539 writers on 50 devices, 5 a round, whose memory and bytes of a round are drawn anew every round
(`fleet.toml`).
README.md is the card.
"""

from functools import partial
from pathlib import Path

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

HERE = Path(__file__).parent
WIDTHS = "1 0.5 0.25"
SETTINGS = {"lr": 0.1, "local_steps": 5, "batch_size": 20, "cohort": 5}


def config(method: str, **settings: float | str) -> RunConfig:
    return RunConfig(
        method=method,
        model="conv2",
        inputs="unit",
        partition="natural",
        clients=50,
        rounds=100,
        device="raspberry_pi_4",
        fleet=str(HERE / "fleet.toml"),
        target_accuracy=(0.9, 0.95, 0.97),
        eval_every=2,
        eval_examples=2000,
        settings={**SETTINGS, **settings},
    )


sliced = partial(config, widths=WIDTHS)
GROUPS = {
    "by_writer": {
        "heterofl": sliced("heterofl"),
        "allsmall": config("allsmall", width=0.375),  # what every device can hold in every round
        "exclusivefl": config("exclusivefl"),
        "fedrolex": sliced("fedrolex"),
        "model_selection": sliced("model_selection"),
        "model_selection_undistilled": sliced("model_selection", distill_every=0),
    }
}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/model_selection_mnist_by_writer")
