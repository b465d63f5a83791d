"""The settings of progressive training that its methods share, and the tasks of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedlean.algorithm import Device, Server
from fedlean.core import ClientTask, Model, Scalar
from fedlean.freezing.session import check_micro_batch
from fedlean.freezing.stages import Stage, stage
from fedlean.spec import ModelSpec
from fedlean.submodels.parts import Part, parts
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import one_of

Way = Literal["together", "pieces", "memory", "disk"]


@dataclass(frozen=True)
class Staging:
    """How a model is divided, and how clients run what is frozen; the same names in every method.

    ends: blocks or layers after which the model is divided, as "stage1 stage3"; "" is after its own
    blocks (`submodels.parts`).
    module_norm: whether GroupNorm and ReLU follow each convolution of an output module (ours; the
    authors of ProFL and NeuLite have bare ones).
    beginning: how the frozen beginning runs; it changes memory and time, and no bit of a native
    result.  "together": in one session with what trains, which the native engine gives 32 examples
    at a time.  "pieces": `micro_batch` examples at a time, in a session of its own.  "memory",
    "disk": once a round over all of a client's examples, whose activations stay in memory or in an
    unnamed file; it pays where a round goes over the examples several times.  A client whose number
    of examples is not known to the server takes "pieces" then.
    micro_batch: examples at a time of a beginning that has a session of its own.
    """

    ends: str = ""
    module_norm: bool = False
    beginning: Way = "together"
    micro_batch: int = 8

    def check(self, server: Server) -> None:
        """Raises ValueError naming the setting that is out of range or does not fit the model."""
        one_of("beginning", self.beginning, get_args(Way))
        check_micro_batch(self.micro_batch)
        parts(server.spec, self.ends)

    def parts(self, spec: ModelSpec) -> tuple[Part, ...]:
        return parts(spec, self.ends)

    def stages(self, spec: ModelSpec, prefix: str = "surrogate") -> tuple[Stage, ...]:
        """Of all parts; the output modules of all stages have tensors of the same names."""
        own = self.parts(spec)
        return tuple(
            stage(spec, own, number, prefix=prefix, norm=self.module_norm)
            for number in range(len(own))
        )

    def hparams(self, device: Device) -> dict[str, Scalar]:
        """What a client is told."""
        told: dict[str, Scalar] = {"beginning": self.beginning, "micro_batch": self.micro_batch}
        if self.beginning in ("memory", "disk"):
            examples = device.num_examples
            told |= {"held": examples} if examples else {"beginning": "pieces"}
        return told


def stage_tasks(
    server: Server,
    staging: Staging,
    devices: Sequence[Device],
    *,
    round: int,
    phase: str,
    one: Stage,
    model: Model,
    hparams: Mapping[str, Scalar],
) -> list[ClientTask]:
    """One task for each of `devices`, of the stage's model with what it freezes."""
    return [
        task
        for device in devices
        for task in cohort_tasks(
            server,
            [device.id],
            round=round,
            phase=phase,
            model=model,
            hparams={**hparams, **staging.hparams(device), "stage": one.name},
            frozen=one.frozen,
        )
    ]
