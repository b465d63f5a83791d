"""What there is, one line each: `fedlean methods`, `models`, `datasets`, `devices`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedlean.cli.screen import show


def list_methods() -> None:
    """What can be run, one line each."""
    from fedlean.runtime.method import available

    _list(available().items())


def list_models() -> None:
    """Built-in models, one line each."""
    from fedlean.models.catalog import available, options

    _list((name, text + _in_brackets(options(name))) for name, text in available().items())


def list_datasets() -> None:
    """Data sets and the folder layouts that are recognised."""
    from fedlean.data.load import available

    _list(available())


def list_devices() -> None:
    """Device profiles for the emulated clock."""
    from fedlean.cost.profile import available

    _list(available().items())


def _in_brackets(options: Mapping[str, str]) -> str:
    """As they are written after a model's name."""
    written = "".join(f",{key}={values}" for key, values in options.items())
    return f" [{written}]" if written else ""


def _list(entries: Iterable[tuple[str, str]]) -> None:
    entries = list(entries)
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        show(f"{name:{width}}  {text}")
