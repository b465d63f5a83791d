"""A ready Flower project, from the template beside this module."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

FILES = (
    "pyproject.toml",
    "README.md",
    "fedlean_app/__init__.py",
    "fedlean_app/server_app.py",
    "fedlean_app/client_app.py",
)


def write_project(folder: Path) -> list[Path]:
    """Writes the project and gives its files.  Raises ValueError where the folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another")
    written = []
    source = resources.files("fedlean.runtime.flower") / "template"
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with resources.as_file(source / name) as original:
            shutil.copyfile(original, path)
        written.append(path)
    return written
