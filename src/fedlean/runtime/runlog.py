"""`rounds.jsonl`, one object per server step, and the totals it leads to (docs/run-folder.md)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlean.core import Masks, Model
from fedlean.jsonfile import parse_json
from fedlean.pruning.density import density, full_masks, layer_density
from fedlean.runtime.evaluate import Score
from fedlean.runtime.record import StepRecord
from fedlean.spec import ModelSpec

FIRST_REFUSALS = 1000


@dataclass(frozen=True)
class Totals:
    """The run so far; part of the checkpoint."""

    downlink_bytes: int = 0
    uplink_bytes: int = 0
    flops_per_client: float = 0.0
    flops_dense_gradient_per_client: float = 0.0
    simulated_seconds: float = 0.0
    measured_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    best_accuracy: float = 0.0
    targets: Mapping[str, Any] = field(default_factory=dict)  # accuracy text -> first reached
    refused_updates: int = 0  # by the checks, after they came
    first_refusals: Mapping[str, str] = field(default_factory=dict)  # client -> round and reason
    largest_cohort: int = 0  # clients asked in one step, at most
    left_out_tasks: int = 0  # that were not sent, since their devices cannot hold them
    left_out: Mapping[str, int] = field(default_factory=dict)  # client -> how many of them
    memory_shares: float = 0.0  # the sum of the steps' `memory_utilisation`, and of how many
    memory_steps: int = 0
    memory_bytes: float = 0.0  # the sum of the steps' peaks, and of how many had clients at work
    working_steps: int = 0
    link_shares: float = 0.0
    link_steps: int = 0
    budget_shares: float = 0.0
    budget_steps: int = 0

    def after(self, record: StepRecord, clients: int) -> Totals:
        cost = record.cost
        return replace(
            self,
            downlink_bytes=self.downlink_bytes + cost.downlink_bytes,
            uplink_bytes=self.uplink_bytes + cost.uplink_bytes,
            flops_per_client=self.flops_per_client + cost.flops / clients,
            flops_dense_gradient_per_client=self.flops_dense_gradient_per_client
            + cost.flops_dense_gradient / clients,
            simulated_seconds=self.simulated_seconds + cost.simulated_seconds,
            measured_seconds=self.measured_seconds + record.measured_seconds,
            wall_seconds=self.wall_seconds + record.wall_seconds,
            peak_memory_bytes=max(self.peak_memory_bytes, cost.peak_memory_bytes),
            refused_updates=self.refused_updates + len(record.rejected),
            first_refusals=self._first_refusals(record),
            largest_cohort=max(self.largest_cohort, len(record.tasks)),
            left_out_tasks=self.left_out_tasks + len(record.left_out),
            left_out=self._left_out(record),
            memory_shares=self.memory_shares + (cost.memory_utilisation or 0.0),
            memory_steps=self.memory_steps + (cost.memory_utilisation is not None),
            memory_bytes=self.memory_bytes + cost.peak_memory_bytes,
            working_steps=self.working_steps + (cost.peak_memory_bytes > 0),
            link_shares=self.link_shares + (cost.link_utilisation or 0.0),
            link_steps=self.link_steps + (cost.link_utilisation is not None),
            budget_shares=self.budget_shares + (cost.budget_utilisation or 0.0),
            budget_steps=self.budget_steps + (cost.budget_utilisation is not None),
        )

    @property
    def memory_utilisation(self) -> float | None:
        """Mean over the steps that have one."""
        return self.memory_shares / self.memory_steps if self.memory_steps else None

    @property
    def mean_memory_bytes(self) -> float | None:
        """Of the steps' peaks, each step once; None where no client ever did anything."""
        return self.memory_bytes / self.working_steps if self.working_steps else None

    @property
    def link_utilisation(self) -> float | None:
        return self.link_shares / self.link_steps if self.link_steps else None

    @property
    def budget_utilisation(self) -> float | None:
        return self.budget_shares / self.budget_steps if self.budget_steps else None

    def _left_out(self, record: StepRecord) -> Mapping[str, int]:
        """Of at most FIRST_REFUSALS clients, as below."""
        times = dict(self.left_out)
        for client in sorted(record.left_out):
            if str(client) in times or len(times) < FIRST_REFUSALS:
                times[str(client)] = times.get(str(client), 0) + 1
        return times

    def _first_refusals(self, record: StepRecord) -> Mapping[str, str]:
        """Of at most FIRST_REFUSALS clients, since a checkpoint holds them."""
        first = dict(self.first_refusals)
        for client, reason in sorted(record.rejected.items()):
            if len(first) < FIRST_REFUSALS:
                first.setdefault(str(client), f"round {record.tasks[0].round}: {reason[:200]}")
        return first

    def scored(self, round: int, accuracy: float, targets: Sequence[float]) -> Totals:
        """Notes the accuracy targets that this evaluation reaches first."""
        reached = dict(self.targets)
        for target in targets:
            if accuracy >= target and f"{target:g}" not in reached:
                reached[f"{target:g}"] = {
                    "round": round,
                    "simulated_seconds": self.simulated_seconds,
                    "measured_seconds": self.measured_seconds,
                    "flops_per_client": self.flops_per_client,
                    "flops_dense_gradient_per_client": self.flops_dense_gradient_per_client,
                    "bytes": self.downlink_bytes + self.uplink_bytes,
                }
        best = max(self.best_accuracy, accuracy)
        return replace(self, best_accuracy=best, targets=reached)


def held_masks(model: Model) -> Masks:
    """A mask for every prunable weight: the model's, and all kept where there is none."""
    return {**full_masks(model.spec), **model.masks}


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def log_entry(
    *,
    round: int,
    phase: str,
    record: StepRecord,
    totals: Totals,
    clients: int,
    score: Score | None,
    model: Model,
    whole: ModelSpec,
    reported: Mapping[str, float],
) -> dict[str, Any]:
    """One line of the log; `whole` is the run's model, of which clients may train a part.

    reported: what the method says of its state.
    """
    masks = held_masks(model)
    cohort = [task.client for task in record.tasks]
    cost = asdict(record.cost)
    flops, dense = cost.pop("flops"), cost.pop("flops_dense_gradient")
    return {
        "round": round,
        "asked_round": round if record.asked_round is None else record.asked_round,
        "phase": phase,
        "stage": _stage(record),
        "method": {key: _finite(value) for key, value in reported.items()},
        "devices": record.present,
        "able_devices": record.able,
        "cohort": cohort,
        "server_only": record.server_only,
        "absent": [c for c in cohort if c not in record.answered and c not in record.refused],
        "left_out": {str(client): reason for client, reason in sorted(record.left_out.items())},
        "parameters": _parts_of(record, whole),
        "refused": {str(client): reason for client, reason in sorted(record.refused.items())},
        "rejected": sorted(record.rejected),
        "notes": list(record.notes),
        "attempts": record.attempts,
        "accuracy": None if score is None else score.accuracy,
        "loss": None if score is None else _finite(score.loss),
        "train_loss": _finite(record.metrics.get("train_loss")),
        "density": density(masks),
        "layer_density": layer_density(masks),
        **cost,
        "flops_per_client": flops / clients,
        "flops_dense_gradient_per_client": dense / clients,
        "measured_seconds": record.measured_seconds,
        "wall_seconds": record.wall_seconds,
        "metrics": {key: _finite(value) for key, value in record.metrics.items()},
        "total": {
            "downlink_bytes": totals.downlink_bytes,
            "uplink_bytes": totals.uplink_bytes,
            "flops_per_client": totals.flops_per_client,
            "flops_dense_gradient_per_client": totals.flops_dense_gradient_per_client,
            "simulated_seconds": totals.simulated_seconds,
            "measured_seconds": totals.measured_seconds,
            "wall_seconds": totals.wall_seconds,
        },
    }


def _stage(record: StepRecord) -> str | None:
    """Of progressive training; None where the tasks name none."""
    stages = [task.hparams.get("stage") for task in record.tasks]
    return str(stages[0]) if stages and stages[0] is not None else None


def _parts_of(record: StepRecord, whole: ModelSpec) -> dict[str, int]:
    """By client, the parameters of the model that it was given; {} where all got the whole."""
    if all(task.spec.hash == whole.hash for task in record.tasks):
        return {}
    return {str(task.client): task.spec.num_params for task in record.tasks}


def last_accuracy(folder: Path) -> float | None:
    """Of the last step in the run's log; None where it was not evaluated, or there is none."""
    path = folder / "rounds.jsonl"
    lines = path.read_bytes().splitlines()
    if not lines:
        return None
    try:
        accuracy = parse_json(lines[-1])["accuracy"]
        return None if accuracy is None else float(accuracy)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: the last line is damaged: {type(error).__name__}: {error}"
        ) from None


class RunLog:
    """Appends to `rounds.jsonl`; a resumed run cuts it back to its checkpoint first."""

    def __init__(self, path: Path, *, keep_bytes: int = 0):
        """Raises ValueError when the log is a link, or shorter than the checkpoint says."""
        if path.is_symlink():
            raise ValueError(f"{path} is a link, expected a file of the run's own: remove it")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_NONBLOCK  # a pipe in its place would wait for a reader
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab")
        size = os.fstat(self._file.fileno()).st_size
        if size < keep_bytes:
            self._file.close()
            raise ValueError(
                f"{path} has {size} bytes but the checkpoint was written at {keep_bytes}: it was "
                "cut or replaced; restore it or start a new run"
            )
        os.truncate(self._file.fileno(), keep_bytes)

    def append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Forces the log to disk; its length, for the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
