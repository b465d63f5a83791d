"""What a plan says: plain records, one level for each question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedlean.core import Scalar
from fedlean.cost.split import MemorySplit
from fedlean.layers import Shape

Binds = Literal["memory", "link", "compute"]


@dataclass(frozen=True)
class Phase:
    """What one client pays for a round of one kind."""

    name: str  # of the method's phase
    about: str  # which part of the model, and what goes up beside it; "" where there is one kind
    recurring: bool  # it comes again and again; otherwise before or between
    one_client: bool  # asked of one client of all
    model_share: float  # values that the client holds over those of the whole model
    memory: MemorySplit
    downlink_first_bytes: int  # at first contact, with the model's description and pattern
    downlink_bytes: int  # afterwards
    uplink_bytes: int
    flops: int
    compute_seconds: float
    link_seconds: float  # of a round after first contact
    fits: bool
    binds: Binds  # memory where it does not fit, otherwise what takes the longer
    forward_only: bool = False
    share: float | None = None  # of a fleet's devices that can hold it

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.link_seconds


@dataclass(frozen=True)
class Knob:
    """The setting by which a method fits its model to a device."""

    name: str
    value: float | None  # with which the phases were planned; None: as the method has it
    largest: float | None  # with which every phase fits; None: there is none


@dataclass(frozen=True)
class MethodPlan:
    """One method on one device."""

    method: str
    phases: tuple[Phase, ...] = ()
    settings: Mapping[str, Scalar | None] = field(default_factory=dict)  # that were changed
    knob: Knob | None = None
    fits: bool = False  # every phase that is not asked of one client only
    needs_bytes: int = 0  # of those, the most that one takes with what fits, or with the least,
    # however its masks are split over the layers: a phase's own memory is that of an even split
    why: str = ""  # why it does not fit, or could not be planned
    bound: bool = False  # figures are the most: what clients hold is found while it runs
    complete: bool = True  # False: the walk through its phases ended early
    choices: Mapping[str, float] = field(default_factory=dict)  # of a fleet's devices: share

    @property
    def planned(self) -> bool:
        return bool(self.phases)

    @property
    def typical(self) -> Phase:
        """The round that comes most: the quickest recurring one of the last model held."""
        again = [phase for phase in self.phases if phase.recurring]
        last = again[-1].model_share
        return min((p for p in again if p.model_share == last), key=lambda p: p.seconds)

    @property
    def lone_fits(self) -> bool:
        """Whether what one client is asked for fits this device, too, or some of the fleet."""
        return all(
            phase.fits if phase.share is None else phase.share > 0
            for phase in self.phases
            if phase.one_client
        )

    @property
    def share(self) -> float | None:
        """Of a fleet's devices, those that can take part in every phase."""
        shares = [p.share for p in self.phases if p.share is not None and not p.one_client]
        return min(shares, default=None)

    @property
    def able(self) -> bool:
        """Whether it would run: on this device, or on any of the fleet."""
        return self.planned and (self.fits if self.share is None else self.share > 0)


@dataclass(frozen=True)
class DevicePlan:
    """All methods for one model on one device, or on a fleet's device of median memory."""

    model: str
    parameters: int
    device: str
    memory_bytes: int
    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    methods: tuple[MethodPlan, ...]
    recommended: str | None
    reason: str
    device_steps: int | None = None  # of a fleet, that were drawn
    note: str = ""  # about the profile


@dataclass(frozen=True)
class Plan:
    """devices: a block for each model on each device, models first."""

    input_shape: Shape
    classes: int
    devices: tuple[DevicePlan, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)  # method -> why
