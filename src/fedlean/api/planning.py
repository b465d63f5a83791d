"""`plan`, and the devices that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from fedlean import algorithm
from fedlean.core import Scalar
from fedlean.cost.profile import Profile, load_profile
from fedlean.data.dataset import Dataset
from fedlean.data.load import load_source
from fedlean.fleet.fleet import Fleet
from fedlean.fleet.load import load_fleet
from fedlean.models.brought import brought
from fedlean.models.catalog import bring
from fedlean.planning.document import to_document
from fedlean.planning.plan import plan as planned
from fedlean.planning.records import DevicePlan
from fedlean.planning.records import Plan as Record
from fedlean.runtime.config import CLIENTS

DEVICE = "raspberry_pi_4"
_WIDTH = 100


def Device(
    profile: str | Profile = DEVICE,
    *,
    memory_bytes: int | None = None,
    budget_bytes: int | None = None,
    budget_seconds: float | None = None,
) -> algorithm.Device:
    """A device by its profile: a name from `fedlean devices`, a file, or a `Profile`.

    memory_bytes: what it may hold at once; None: as much as its profile says.  budget_bytes,
    budget_seconds: what a round may take it of traffic and of time.  Raises ValueError for a
    profile that there is not.
    """
    own = load_profile(profile) if isinstance(profile, str) else profile
    return algorithm.Device(0, None, own, memory_bytes, budget_bytes, budget_seconds)


@dataclass(frozen=True)
class Plan:
    """What each method would cost; docs/plan.md has the keys of `document`."""

    record: Record

    @property
    def devices(self) -> Sequence[DevicePlan]:
        """One for each device, with a row per method."""
        return self.record.devices

    @property
    def recommended(self) -> str | None:
        """The method to choose on the first device; None where nothing fits."""
        return self.record.devices[0].recommended

    @property
    def document(self) -> dict[str, Any]:
        """Plain values, as `fedlean plan --json` prints them."""
        return to_document(self.record)

    def report(self, path: str | Path) -> Path:
        """Writes the page of the plan."""
        from fedlean.planning.page import plan_page
        from fedlean.report.page import write_page

        path = Path(path).expanduser()
        write_page(path, plan_page(self.record))
        return path

    def __str__(self) -> str:
        from rich.console import Console

        from fedlean.planning.table import plan_parts

        text = StringIO()
        console = Console(file=text, width=_WIDTH)
        for part in plan_parts(self.record):
            console.print(part, highlight=False, markup=False)
        return text.getvalue()


def plan(
    model: Any,
    *devices: algorithm.Device,
    data: str | Path | Dataset = "digits",
    methods: Sequence[str] | None = None,
    batch_size: int | None = None,
    local_steps: int | None = None,
    settings: Mapping[str, Scalar] | None = None,
    fleet: Fleet | str | Path | None = None,
    seed: int = 0,
) -> Plan:
    """What each method would cost on each of `devices`, before anything runs.

    model: as `train` takes it.  data gives the shape of an example, the classes and how many
    examples a client has.  devices: none stands for a Raspberry Pi 4.  methods: names (default:
    all that start dense).  settings: of every method that has them.

    Raises ValueError naming what is unknown or does not fit.
    """
    shape, classes, examples = _of(data)
    if isinstance(model, str):
        spec = bring(model, shape, classes, seed).spec
    else:
        spec = brought("the model", model, shape).spec
    counts = {"batch_size": batch_size, "local_steps": local_steps}
    given = {key: value for key, value in counts.items() if value is not None}
    fallback = load_profile(DEVICE)
    if fleet is not None and not isinstance(fleet, Fleet):
        fleet = load_fleet(fleet, fallback).fleet
    found = planned(
        {"model": spec},
        devices or ([] if fleet else [Device()]),
        profile=fallback,
        methods=methods,
        settings={**(settings or {}), **given},
        fleet=fleet,
        seed=seed,
        examples=examples,
    )
    return Plan(found)


def _of(data: str | Path | Dataset) -> tuple[tuple[int, ...], int, int]:
    """(shape of an example, classes, examples of a client)."""
    known = data if isinstance(data, Dataset) else load_source(str(data))
    count = CLIENTS if known.clients is None else len(set(known.clients.tolist()))
    return tuple(known.input_shape), len(known.class_names), max(1, len(known.y_train) // count)
