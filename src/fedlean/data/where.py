"""Names of data sets, independent of the folder that a command runs in."""

from __future__ import annotations

from pathlib import Path

from fedlean.data.load import BUILT_IN


def absolute(name: str) -> str:
    """`name` with its folder as an absolute path, `~` expanded.

    `name` is a folder, FOLDER:NAME, or a built-in data set, which stays as it is; so does what does
    not exist, for the loader to refuse by the name that was given.

    >>> absolute("digits")
    'digits'
    """
    if name in BUILT_IN:
        return name
    whole = Path(name).expanduser()
    if name and whole.exists():
        return str(whole.resolve())
    before, colon, wanted = name.rpartition(":")
    folder = Path(before).expanduser()
    if colon and before and folder.exists():
        return f"{folder.resolve()}:{wanted}"
    return name
