"""Device profiles: data files beside this module, or a JSON file that the user names."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from sys import float_info


@dataclass(frozen=True)
class Profile:
    """What a device computes and sends per second.

    A step takes the shorter of two ways, since a device may always compute densely:
    dense   FLOPs / dense_flops_per_s
    sparse  Σ_layers FLOPs · seconds_per_flop[kind] + activations · seconds_per_activation
    where activations are all layer outputs of the batch except Flatten's.  The link is apart.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                if not isinstance(value, str):
                    raise ValueError(f"{field.name} must be text, got {value!r}")
                continue
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
    """A built-in profile by name, or a path ending in .json.

    Raises ValueError when there is none, or naming the field that is wrong.
    """
    folder = resources.files("fedlean.cost") / "profiles"
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"device profile {name!r}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"device profile {name!r}: {error}") from None
    else:
        names = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json")]
        if name not in names:
            near = get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)
            raise ValueError(
                f"no device profile named {name!r}; nearest: {', '.join(near)} "
                "(or the path of a .json file)"
            )
        text = (folder / f"{name}.json").read_text()
    return _parse(name, text)


def _parse(name: str, text: str) -> Profile:
    try:
        document = json.loads(text)
        known = {field.name for field in fields(Profile)}
        document = {key: value for key, value in document.items() if key != "derivation"}
        missing = [
            f.name for f in fields(Profile) if f.name not in document and f.default is MISSING
        ]
        if missing or set(document) - known:
            unknown = sorted(set(document) - known)
            raise ValueError(f"missing {missing}, unknown {unknown}")
        return Profile(**document)
    except (json.JSONDecodeError, AttributeError, ValueError) as error:
        raise ValueError(f"device profile {name!r}: {error}") from None
