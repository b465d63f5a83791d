"""Device profiles: data files beside this module, or a JSON file that the user names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from sys import float_info
from typing import Any

from fedlean.cost.measured import MeasuredTime, measured_from
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class Profile:
    """What a device computes and sends per second.

    A step takes the shorter of two ways, since a device may always compute densely:
    dense   FLOPs / dense_flops_per_s
    sparse  Σ_layers FLOPs · seconds_per_flop[kind] + activations · seconds_per_activation
    where activations are all layer outputs of the batch except Flatten's.  The link is apart.
    For the model that `measured` is of, if any, its times count instead of these rates.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                if not isinstance(value, str):
                    raise ValueError(f"{field.name} must be text, got {value!r}")
                continue
            if field.name == "measured":
                continue  # `measured_from` checks it
            number = isinstance(value, int | float) and not isinstance(value, bool)
            may_be_zero = field.name.startswith("sparse_")
            if (
                not number
                or not abs(value) <= float_info.max
                or value < 0
                or (value == 0 and not may_be_zero)
            ):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")


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
        return _parse(name, (folder / f"{name}.json").read_text())
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for an unknown user
    if path.is_file():
        try:
            return _parse(name, path.read_text(encoding="utf-8-sig"))  # editors write the mark
        except UnicodeDecodeError:
            raise ValueError(
                f"device profile {name!r}: expected text in UTF-8, this is another encoding "
                "(UTF-16?): save it as UTF-8"
            ) from None
    if name.endswith(".json") or os.sep in name:
        raise ValueError(f"device profile {name!r}: no such file")
    near = get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)
    raise ValueError(
        f"no device profile named {name!r}; nearest: {', '.join(near)} "
        "(or the path of a profile file)"
    )


def _parse(name: str, text: str) -> Profile:
    try:
        return from_document(json.loads(text))
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"device profile {name!r}: {error}") from None


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


def other_model(profile: Profile, spec: ModelSpec) -> str | None:
    """A line that says so where the profile was measured on another model than `spec`."""
    if profile.measured is None or profile.measured.of(spec):
        return None
    return (
        f"device profile {profile.name!r} was measured on another model or shape "
        f"({profile.measured.model}): its rates per kind of layer count here"
    )
