"""Foresight pruning and training by forward passes on scikit-learn's digits, with controls.

Ten clients, iid and Dirichlet(0.1).  What runs: backpropagation; zeroth order on the dense model,
on NTK masks of three densities, on masks of other criteria, on small dense models with as many
parameters; its variants.  README.md is the card.
"""

from dataclasses import replace
from functools import partial

from fedlean.recipe import main
from fedlean.runtime.config import RunConfig

ROUNDS = 200
TARGETS = (0.9, 0.95)
PARTITIONS = {"iid": "iid", "dirichlet": "dirichlet:0.1"}
BACKPROP = {"lr": 0.7, "local_steps": 1, "batch_size": 32}
FORWARD = {
    "directions": 50,
    "batch_size": 32,
    "lr": 0.015,
    "lr_half_life_rounds": 100.0,
    "ema": 0.9,
}
CRITERIA = ("ntk_shuffled", "node_ntk", "node", "water_filling", "random", "synflow", "magnitude")
SMALL = {0.2: "mlp_40_20", 0.05: "mlp_13_7"}


def config(
    partition: str, method: str, settings: dict, model: str = "mlp", rounds: int = ROUNDS
) -> RunConfig:
    return RunConfig(
        method=method,
        model=model,
        partition=partition,
        clients=10,
        rounds=rounds,
        eval_every=5,
        target_accuracy=TARGETS,
        settings=settings,
    )


def runs(partition: str) -> dict[str, RunConfig]:
    run = partial(config, partition)
    zeroth = partial(run, "ntk_zo")
    found = {
        "backprop": run("fedavg", BACKPROP),
        "dense": zeroth({**FORWARD, "density": 1.0}),
        "ntk_50": zeroth({**FORWARD, "density": 0.5}),
    }
    for density, small in SMALL.items():
        percent = round(100 * density)
        sized = {**FORWARD, "density": density}
        found[f"ntk_{percent}"] = zeroth(sized)
        for criterion in CRITERIA:
            found[f"{criterion}_{percent}"] = zeroth({**sized, "criterion": criterion})
        # one round of SNIP makes its mask, which the next run takes
        snip = {"lr": 0.3, "local_steps": 1, "batch_size": 32, "density": density}
        found[f"snip_mask_{percent}"] = run("snip", snip, rounds=2)
        found[f"snip_{percent}"] = replace(
            zeroth({**FORWARD, "rescale_given": True}),
            start=f"snip_mask_{percent}",
            start_weights="original",
        )
        found[f"small_dense_{percent}"] = zeroth({**FORWARD, "density": 1.0}, model=small)
    found["own_directions"] = zeroth({**FORWARD, "density": 0.2, "shared_directions": False})
    found["int8_log_20"] = zeroth(
        {**FORWARD, "density": 0.2, "scalars": "int8", "download": "scalars"}
    )
    found["signs_20"] = zeroth({**FORWARD, "density": 0.2, "kind": "sign"})
    found["rank1_20"] = zeroth({**FORWARD, "density": 0.2, "kind": "rank1"})
    found["central_20"] = zeroth({**FORWARD, "density": 0.2, "differences": "central"})
    found["hybrid"] = zeroth({**FORWARD, "density": 1.0, "last_block": "backprop"})
    return found


GROUPS = {group: runs(partition) for group, partition in PARTITIONS.items()}

if __name__ == "__main__":
    main(GROUPS, default_out="runs/ntk_zo_digits", default_data="digits")
