"""`fedlean plan`: what each method would cost on given devices, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from json import dumps
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from fedlean.algorithm import Device
from fedlean.cli.options import Place, Whole
from fedlean.cli.screen import show, show_lines
from fedlean.core import Scalar
from fedlean.cost.profile import Profile, load_profile
from fedlean.data import digits
from fedlean.data.declared import Declared
from fedlean.data.load import load_source
from fedlean.fleet.load import load_fleet
from fedlean.measure.machine import cores
from fedlean.models import catalog
from fedlean.planning.document import to_document
from fedlean.planning.page import plan_page
from fedlean.planning.plan import LEFT_OUT
from fedlean.planning.plan import plan as planned
from fedlean.planning.table import plan_parts
from fedlean.printable import printable
from fedlean.report.page import write_page
from fedlean.runtime import method as methods
from fedlean.runtime.config import CLIENTS

DEFAULT_MODEL, DEFAULT_DEVICE = "lenet300", "raspberry_pi_4"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Many = Parameter(consume_multiple=True, negative=())


def plan(
    *,
    model: Annotated[list[str] | None, Many] = None,
    dataset: str | None = None,
    layout: str = "",
    input_shape: str | None = None,
    classes: Whole | None = None,
    batch: Whole | None = None,
    local_steps: Whole | None = None,
    device: Annotated[list[str] | None, Many] = None,
    memory: Annotated[list[str] | None, Many] = None,
    fleet: Place | None = None,
    method: Annotated[list[str] | None, Many] = None,
    set: Annotated[list[str] | None, Many] = None,
    seed: Whole = 0,
    json: Annotated[bool, Parameter(negative=())] = False,
    out: Place | None = None,
) -> None:
    """What each method would cost on a device, what fits, and what to choose.

    Parameters
    ----------
    model
        names from 'fedlean models', with options as resnet18,blocks=unit, or
        package.module:function (default: lenet300)
    dataset
        gives the input's shape and the classes: digits (the default), or a folder
    layout
        what the axes of its arrays are, e.g. ncl (docs/data.md)
    input_shape
        instead of a data set, e.g. 3x32x32
    classes
        with --input-shape (default: 10)
    batch
        examples a step (default: each method's)
    local_steps
        local steps a round (default: each method's)
    device
        profiles from 'fedlean devices' or files of 'fedlean profile' (default: raspberry_pi_4)
    memory
        what a device may hold, as 128MB, in place of the profile's; of several each is planned
    fleet
        a file of devices (docs/fleets.md): rows are of its median device, choices of all of it
    method
        names from 'fedlean methods', or package.module:function (default: all that start dense)
    set
        further hyper-parameters, key=value, of every method that has them
    seed
        of the first weights, and of a fleet's draws
    json
        print JSON instead of tables (docs/plan.md has the keys)
    out
        page to write
    """
    profiles = [load_profile(name) for name in device or [DEFAULT_DEVICE]]
    shape, count, examples = _shape(dataset, layout, input_shape, classes)
    models = {name: catalog.build(name, shape, count) for name in model or [DEFAULT_MODEL]}
    names = method or [name for name in methods.available() if name not in LEFT_OUT]
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    loaded = load_fleet(str(fleet), profiles[0]).fleet if fleet else None
    alone = [] if fleet and not device and not memory else _devices(profiles, memory or [])
    found = planned(
        models,
        alone,
        profile=profiles[0],
        methods=method,
        settings=_settings(names, batch, local_steps, set or []),
        fleet=loaded,
        seed=seed,
        examples=examples,
        processes=cores(),
    )
    every = [one for block in found.devices for one in block.methods]
    if not any(one.planned for one in every):
        raise ValueError(f"no method could be planned; {every[0].method}: {every[0].why}")
    if out is not None:
        write_page(out, plan_page(found))
    if json:
        show_lines(dumps(to_document(found), indent=1).splitlines())
        return
    for part in plan_parts(found):
        show(Text(printable(part)) if isinstance(part, str) else part)  # text that is wrapped
    if out is not None:
        show(f"wrote {out}")


def _devices(profiles: Sequence[Profile], memory: Sequence[str]) -> list[Device]:
    limits = [memory_bytes(text) for text in memory]
    return [
        Device(0, profile=profile, memory_bytes=limit)
        for profile in profiles
        for limit in (limits or [None])
    ]


def memory_bytes(text: str) -> int:
    """A size as it is typed.  Raises ValueError saying what was expected.

    >>> memory_bytes("128MB"), memory_bytes("1.5 GiB")
    (128000000, 1610612736)
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    size = float(found[1]) * unit if found and unit else 0.0
    if not 1 <= size < 1e18:
        raise ValueError(f"--memory expects a size like 128MB or 1GiB, got {text!r:.40}")
    return int(size)


def _shape(
    dataset: str | None, layout: str, input_shape: str | None, classes: int | None
) -> tuple[tuple[int, ...], int, int]:
    """(input shape, classes, examples of a client)."""
    if input_shape is not None:
        if dataset is not None:
            raise ValueError("--dataset gives the input shape and the classes: leave out one")
        words = re.split(r"[x, ]+", input_shape)
        sides = tuple(int(word) for word in words if word.isdecimal())
        if len(sides) != len(words) or not all(sides) or len(sides) > 3:
            raise ValueError(f"--input-shape expects sides like 3x32x32, got {input_shape!r:.40}")
        count = 10 if classes is None else classes
        if count < 2:
            raise ValueError(f"--classes must be at least 2, got {count}")
        return sides, count, 100
    if classes is not None:
        raise ValueError("--classes goes with --input-shape; a data set says how many it has")
    if dataset in (None, "digits"):
        return digits.SHAPE, digits.CLASSES, digits.TRAINING_EXAMPLES // CLIENTS
    source = load_source(str(dataset), declared=Declared(layout))
    examples = max(1, len(source.y_train) // CLIENTS)
    return source.input_shape, len(source.class_names), examples


def _settings(
    names: Sequence[str], batch: int | None, local_steps: int | None, texts: Sequence[str]
) -> dict[str, Scalar | None]:
    """Of all methods together; each takes those that it has."""
    flags = {"batch_size": batch, "local_steps": local_steps}
    given: dict[str, Scalar | None] = {k: v for k, v in flags.items() if v is not None}
    for text in texts:
        key = text.partition("=")[0]
        owners = [name for name in names if key in methods.hyperparameters(_found(name))]
        if "=" not in text:
            raise ValueError(f"--set {text!r:.60} is not of the form key=value")
        if not owners:
            given[key] = text  # for `plan` to refuse
        else:
            given |= methods.parse_settings(owners[0], _found(owners[0]), [text])
    return given


def _found(name: str) -> methods.Method:
    return methods.find_method(name)
