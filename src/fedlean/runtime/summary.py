"""`summary.json`: what only the end of a run knows (docs/run-folder.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlean.algorithm import Server, State
from fedlean.core import Model
from fedlean.pruning.density import density
from fedlean.pruning.units import dead_units
from fedlean.runtime.config import RunConfig
from fedlean.runtime.local import Held
from fedlean.runtime.runlog import Totals, held_masks


def summary_of(
    config: RunConfig,
    server: Server,
    state: State,
    model: Model,
    totals: Totals,
    final: float | None,
    data_changes: Sequence[dict[str, Any]],
    held: Mapping[int, Held],
) -> dict[str, Any]:
    """final: accuracy after the last round, None without test examples.

    data_changes: those that the user accepted.
    held: what devices with data of their own said that they hold; {} in a simulation.
    """
    targets = {f"{t:g}": totals.targets.get(f"{t:g}") for t in config.target_accuracy}
    return {
        "method": config.method,
        "dataset": config.dataset,
        "model": config.model,
        "partition": _who_holds_what(held) or config.partition,
        "held": {str(client): each._asdict() for client, each in held.items()},
        "clients": config.clients,
        "cohort": totals.largest_cohort or config.num_clients,
        "rounds": state.round,
        "seed": config.seed,
        "engine": config.engine,
        "device": config.device,
        "fleet": config.fleet,
        "arithmetic": server.engine.arithmetic,
        "final_accuracy": final,
        "best_accuracy": None if final is None else max(totals.best_accuracy, final),
        "parameters": model.spec.num_params,
        "density": density(held_masks(model)),
        "dead_units": {
            name: {"outputs": rows, "inputs": columns}
            for name, (rows, columns) in dead_units(model.masks).items()
        },
        "downlink_bytes": totals.downlink_bytes,
        "uplink_bytes": totals.uplink_bytes,
        "flops_per_client": totals.flops_per_client,
        "flops_dense_gradient_per_client": totals.flops_dense_gradient_per_client,
        "simulated_seconds": totals.simulated_seconds,
        "measured_seconds": totals.measured_seconds,
        "wall_seconds": totals.wall_seconds,
        "peak_memory_bytes": totals.peak_memory_bytes,
        "mean_memory_bytes": totals.mean_memory_bytes,
        "time_to_accuracy": targets,
        "refused_updates": totals.refused_updates,
        "first_refusals": dict(totals.first_refusals),
        "left_out_tasks": totals.left_out_tasks,
        "left_out": dict(totals.left_out),
        "memory_utilisation": totals.memory_utilisation,
        "link_utilisation": totals.link_utilisation,
        "budget_utilisation": totals.budget_utilisation,
        "data_changes": list(data_changes),
    }


def _who_holds_what(held: Mapping[int, Held]) -> str:
    """Of devices; no partition dealt their data out."""
    if not held:
        return ""
    examples, classes = ([getattr(each, f) for each in held.values()] for f in Held._fields)
    return (
        f"as {len(held)} devices hold it: {_span(examples)} examples, {_span(classes)} classes each"
    )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
