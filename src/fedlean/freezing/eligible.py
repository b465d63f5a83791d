"""Which devices have the memory for a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlean.algorithm import Device
from fedlean.core import ClientTask, Scalar, SubModel, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.freezing.stages import Stage
from fedlean.freezing.staging import Staging


def without_values(
    staging: Staging, device: Device, phase: str, one: Stage, hparams: Mapping[str, Scalar]
) -> ClientTask:
    """What `stage_tasks` would order of the device, but for the values: enough to price it."""
    told = {**hparams, **staging.hparams(device), "stage": one.name}
    return ClientTask(1, phase, device.id, 0, one.spec, {}, SubModel(frozen=one.frozen), told)


class Eligibility:
    """Devices by the modelled peak of what stages ask of them, to the byte.

    work: the method's.  What devices are told alike is priced once in a run: other rounds of a
    stage must change nothing that memory depends on.
    """

    def __init__(self, work: Callable[[ClientTask], Sequence[Work]]):
        self._work = work
        self._needed_bytes: dict[Any, int] = {}

    def __call__(
        self,
        staging: Staging,
        devices: Sequence[Device],
        phase: str,
        one: Stage,
        hparams: Mapping[str, Scalar],
    ) -> list[Device]:
        """Those of `devices` that can hold the stage; one whose memory is not known can.

        Where nobody can it is all of them: a cohort of all is asked, and the runtime says what each
        lacks.
        """
        return [
            device
            for device in devices
            if device.memory_bytes is None
            or device.memory_bytes >= self._needed(staging, device, phase, one, hparams)
        ] or list(devices)

    def _needed(
        self,
        staging: Staging,
        device: Device,
        phase: str,
        one: Stage,
        hparams: Mapping[str, Scalar],
    ) -> int:
        key = (phase, one.spec, one.frozen, *staging.hparams(device).items())
        if key not in self._needed_bytes:
            works = self._work(without_values(staging, device, phase, one, hparams))
            self._needed_bytes[key] = peak_memory_bytes(one.spec, works, frozen=one.frozen)
        return self._needed_bytes[key]
