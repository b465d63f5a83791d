"""Which devices have the memory for a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlean.algorithm import Device, profile_of
from fedlean.core import ClientTask, Masks, Scalar, SubModel, Work
from fedlean.cost.price import cost
from fedlean.cost.profile import Profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.freezing.stages import Stage
from fedlean.freezing.staging import Staging
from fedlean.tree import kept_counts


def without_values(
    staging: Staging,
    device: Device,
    phase: str,
    one: Stage,
    hparams: Mapping[str, Scalar],
    masks: Masks | None = None,
) -> ClientTask:
    """What `stage_tasks` would order of the device, but for the values: enough to price it.

    masks: of the stage's model.
    """
    told = {**hparams, **staging.hparams(device), "stage": one.name}
    sub_model = SubModel(masks=masks or {}, frozen=one.frozen)
    return ClientTask(1, phase, device.id, 0, one.spec, {}, sub_model, told)


class Eligibility:
    """Devices by the modelled peak of what stages ask of them, to the byte.

    work: the method's.  fallback: the profile of devices that have none of their own.  What devices
    are told alike is priced once in a run: other rounds of a stage must change nothing that memory
    depends on but the masks.
    """

    def __init__(self, work: Callable[[ClientTask], Sequence[Work]], fallback: Profile):
        self._work, self._fallback = work, fallback
        self._needed_bytes: dict[Any, int] = {}

    def __call__(
        self,
        staging: Staging,
        devices: Sequence[Device],
        phase: str,
        one: Stage,
        hparams: Mapping[str, Scalar],
        masks: Masks | None = None,
    ) -> list[Device]:
        """Those of `devices` that can hold the stage; one whose memory is not known can.

        Where nobody can it is all of them: a cohort of all is asked, and the runtime says what each
        lacks.  masks: of the stage's model.
        """
        kept = kept_counts(masks or {})

        def holds(device: Device) -> bool:
            has, told = device.memory_bytes, staging.hparams(device)
            if has is None:
                return True
            task = without_values(staging, device, phase, one, hparams, masks)
            key = (phase, one.spec, one.frozen, *told.items(), *sorted(kept.items()))
            fastest = self._needed(
                key, lambda: peak_memory_bytes(one.spec, self._work(task), frozen=one.frozen)
            )
            if has >= fastest or not kept:
                return has >= fastest
            # layers may take the slower and smaller of their forms, or all of them no mask
            profile = profile_of(device, self._fallback)
            return has >= self._needed(
                (*key, has, profile.dense_way),
                lambda: cost(task, self._work(task), profile).peak_memory_bytes,
            )

        return [device for device in devices if holds(device)] or list(devices)

    def _needed(self, key: tuple[Any, ...], price: Callable[[], int]) -> int:
        if key not in self._needed_bytes:
            self._needed_bytes[key] = price()
        return self._needed_bytes[key]
