"""Where a run was made, and by what: part of `config.json`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import fedlean
from fedlean.engine.protocol import Engine


def environment(engine: Engine) -> dict[str, Any]:
    """Results are bit-equal only on the same of all these.

    Of threads, too, with the torch engine; the native engine gives the same bits at any number.
    """
    versions = {"fedlean": fedlean.__version__, "python": platform.python_version()}
    for package in ("numpy", "torch") if engine.name == "torch" else ("numpy",):
        versions[package] = metadata.version(package)
    where = {"machine": platform.machine(), "system": platform.system()}
    return {
        **versions,
        **where,
        "engine": engine.name,
        "instruction_set": engine.instruction_set,
    }
