"""`cost`: what one client pays for one round, before it happens."""

from __future__ import annotations

from dataclasses import dataclass

from fedlean import wire
from fedlean.core import SubModel, Work
from fedlean.cost.flops import work_flops
from fedlean.cost.profile import Profile
from fedlean.cost.time import as_done, link_seconds, work_seconds
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.protocol import SGD
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts


@dataclass(frozen=True)
class Cost:
    """One client, one round.  Bytes are payload: values, pattern, full gradients.

    Message headers (about a hundred bytes) are left out here and counted in the run log.
    """

    flops: int
    peak_memory_bytes: int
    uplink_bytes: int
    downlink_bytes: int
    seconds: float


def cost(
    spec: ModelSpec,
    sub_model: SubModel,
    device: Profile,
    *,
    batch_size: int,
    local_steps: int,
    optimizer: SGD,
    importance_steps: int = 0,
    importance_bytes: int = 0,
    pattern_known: bool = True,
    value_dtype: wire.ValueDtype = "fp32",
) -> Cost:
    """Price of a round of `local_steps` steps on `device`.

    `importance_steps` of them also take the dense weight gradient, whose sums go up in
    `importance_bytes` (of all trainable coordinates: two or four each, bfloat16 or float32);
    `pattern_known` says whether the masks travel down.
    """
    floats = 1 if optimizer.momentum else 0
    kept = kept_counts(sub_model.masks)
    asked = Work(local_steps, batch_size, importance_steps, kept=kept, optimizer_floats=floats)
    work = as_done(spec, asked, device)
    values = wire.params_payload_bytes(spec, sub_model.masks, value_dtype=value_dtype)
    down = values + (0 if pattern_known else wire.pattern_payload_bytes(sub_model.masks))
    up = values + importance_bytes
    memory = work_memory_bytes(spec, work, frozen=sub_model.frozen)
    seconds = work_seconds(spec, work, device) + link_seconds(down, up, device)
    return Cost(work_flops(spec, work), memory, up, down, seconds)


def work_memory_bytes(
    spec: ModelSpec, work: Work, *, frozen: frozenset[str] = frozenset(), sparse: bool = True
) -> int:
    """Modelled peak of a device that stores only what it trains (see `engine.memory`).

    Work of forward passes alone needs no more than those: what is frozen may be perturbed in them.
    """
    if not work.steps:
        return forward_memory(spec, work.kept, batch_size=work.batch_size, sparse=sparse).peak_bytes
    return step_memory(
        spec,
        work.kept,
        batch_size=work.batch_size,
        optimizer_floats=work.optimizer_floats,
        frozen=frozen,
        importance=work.importance_steps > 0,
        sparse=sparse,
    ).peak_bytes
