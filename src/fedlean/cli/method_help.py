"""`fedlean run METHOD --help`: what the method itself can be told, one line each."""

from __future__ import annotations

from rich.table import Table

from fedlean.cli.screen import show
from fedlean.described import described
from fedlean.printable import printable
from fedlean.runtime.method import find_method, hyperparameters

OPTIONS = {"batch_size": "--batch", "cohort": "--cohort", "local_steps": "--local-steps"}
OPTIONS |= {"lr": "--lr"}  # those of them that `fedlean run` has an option for


def show_settings(name: str) -> None:
    """Raises ValueError where no method has the name."""
    method = find_method(name)
    settings = hyperparameters(method)
    texts = described(method, settings)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, overflow="fold")
    table.add_column(overflow="fold")
    told: dict[str, str] = {}  # text -> the setting that has it: some are described together
    for key, parameter in settings.items():
        shown = OPTIONS.get(key, f"{key}=")
        text = texts.get(key, "")
        first = told.setdefault(text, key)
        text = text if first == key else f"see {first}"
        if parameter.default is not parameter.empty:
            text = f"{text} [default: {_written(parameter.default)}]".strip()
        table.add_row(printable(shown), printable(text.replace("`", "")))
    show(
        f"Hyper-parameters of {name}: --set NAME=VALUE ..., but for those with options of their own"
    )
    show(table)


def _written(default: object) -> str:
    """As --set takes it."""
    if isinstance(default, bool) or default is None:
        return str(default).lower()
    return repr(default) if default == "" else str(default)
