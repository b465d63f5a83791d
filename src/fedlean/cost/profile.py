"""Device profiles: data files beside this module, or a JSON file that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from fedlean.cost.measured import MeasuredTime, measured_from
from fedlean.jsonfile import parse_json, read_json
from fedlean.spec import ModelSpec

RATES = (1e-30, 1e30)  # what divides or multiplies counts of up to 1e60 and leaves a number


@dataclass(frozen=True)
class Profile:
    """What a device computes and sends per second.

    A step takes the shorter of two ways:
    dense   FLOPs / dense_flops_per_s
    sparse  Σ_layers FLOPs · seconds_per_flop[kind] + activations · seconds_per_activation
    where activations are all layer outputs of the batch except Flatten's.  The link is apart.
    For the model that `measured` is of, if any, its times count instead of these rates.

    Without `dense_way` a masked model is never computed as one without masks.  So it is with the
    native engine, which decides layer by layer: a layer then takes the shorter of
    FLOPs · seconds_per_flop[kind] and its FLOPs without a mask / dense_flops_per_s.
    """

    name: str
    description: str
    source: str
    dense_flops_per_s: float
    sparse_conv_seconds_per_flop: float
    sparse_linear_seconds_per_flop: float
    sparse_seconds_per_activation: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    memory_bytes: int
    measured: MeasuredTime | None = None
    dense_way: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                if not isinstance(value, str):
                    raise ValueError(f"{field.name} must be text, got {value!r:.60}")
            elif field.type == "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be true or false, got {value!r:.60}")
            elif field.name != "measured":  # `measured_from` checks it
                _check_rate(field.name, value)


def _check_rate(name: str, value: Any) -> None:
    """Raises ValueError for what is no rate, or makes seconds that are beyond a float."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    divides = not name.startswith("sparse_")  # where 0 is no rate
    if not number or not value >= 0 or (value == 0 and divides):
        raise ValueError(f"{name} must be a positive number, got {value!r:.60}")
    if value > RATES[1] or (divides and value < RATES[0]):
        raise ValueError(
            f"{name} must be from {RATES[0]:g} to {RATES[1]:g}, as of real devices, got "
            f"{value!r:.60}"
        )


def available() -> dict[str, str]:
    """Built-in profiles: name -> description."""
    folder = resources.files("fedlean.cost") / "profiles"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return {name[:-5]: load_profile(name[:-5]).description for name in names}


def load_profile(name: str) -> Profile:
    """A built-in profile by name, or the path of a profile file.

    Raises ValueError when there is none, or naming the field that is wrong.
    """
    folder = resources.files("fedlean.cost") / "profiles"
    names = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json")]
    if name in names:
        return from_document(parse_json((folder / f"{name}.json").read_bytes()))
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for an unknown user
    if path.is_file():
        try:
            return from_document(read_json(path, finite=False))
        except ValueError as error:
            raise ValueError(f"device profile {name!r}: {error}") from None
    if name.endswith(".json") or os.sep in name:
        raise ValueError(f"device profile {name!r}: no such file")
    near = get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)
    raise ValueError(
        f"no device profile named {name!r}; nearest: {', '.join(near)} "
        "(or the path of a profile file)"
    )


def to_document(profile: Profile) -> dict[str, Any]:
    """JSON values; the inverse of `from_document`."""
    return asdict(profile)


def from_document(document: Any) -> Profile:
    """A profile from a profile file's object; what stands under `derivation` is for readers.

    Raises ValueError naming the field that is missing, unknown or wrong.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"expected an object, got {type(document).__name__}")
    given = {key: value for key, value in document.items() if key != "derivation"}
    known = {field.name for field in fields(Profile)}
    missing = [f.name for f in fields(Profile) if f.name not in given and f.default is MISSING]
    if missing or set(given) - known:
        raise ValueError(f"missing {missing}, unknown {sorted(set(given) - known)}")
    if given.get("measured") is not None:
        given["measured"] = measured_from(given["measured"])
    return Profile(**given)


def faster(profile: Profile, factor: float) -> Profile:
    """A device that computes `factor` times as fast and is the same in all else.

    Raises ValueError where its rates would be beyond those of real devices.
    """
    if factor == 1:
        return profile
    measured = profile.measured
    return replace(
        profile,
        dense_flops_per_s=profile.dense_flops_per_s * factor,
        sparse_conv_seconds_per_flop=profile.sparse_conv_seconds_per_flop / factor,
        sparse_linear_seconds_per_flop=profile.sparse_linear_seconds_per_flop / factor,
        sparse_seconds_per_activation=profile.sparse_seconds_per_activation / factor,
        measured=None if measured is None else measured.times(1 / factor),
    )


def other_model(profile: Profile, spec: ModelSpec) -> str | None:
    """A line that says so where the profile was measured on another model than `spec`."""
    if profile.measured is None or profile.measured.of(spec):
        return None
    return (
        f"device profile {profile.name!r} was measured on another model or shape "
        f"({profile.measured.model}): its rates per kind of layer count here"
    )
