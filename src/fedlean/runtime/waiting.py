"""What waits on disk for its turn, in a folder that nobody else can read or guess.

A full disk costs what had to wait and not the run: who keeps or reads here says whose loss it is.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoRoom(OSError):
    """Something could not be kept, or not be read again; the message says what to do."""

    def __init__(self, what: str, error: OSError, where: str):
        cannot, remedy = "cannot keep", "look after"
        if error.errno in _FULL:
            cannot, remedy = "has no room for", "free space in"
        super().__init__(
            error.errno,
            f"the server {cannot} {what}: {error.strerror or error}: {remedy} {where}, or set "
            "TMPDIR to another folder",
        )

    def __str__(self) -> str:
        return self.args[1]


class Waiting:
    """A context; its folder is made when the first has to wait, and goes at the end.

    prefix: of the folder's name, for whoever finds one that a killed process left.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def keep(self, content: bytes | memoryview, what: str) -> Path:
        """A file with `content`, readable by this user alone.

        Raises NoRoom naming `what` it is; then nothing of it is left.
        """
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    prefix=self._prefix, ignore_cleanup_errors=True
                )
            return _written(content, self._folder.name)
        except OSError as error:
            raise NoRoom(what, error, _folder_of_all()) from None


def read(path: Path, what: str) -> bytes:
    """What `keep` has put there.  Raises NoRoom."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise NoRoom(what, error, str(path.parent.parent)) from None


def _written(content: bytes | memoryview, folder: str) -> Path:
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        with suppress(OSError):
            Path(name).unlink()
        raise
    return Path(name)


def _folder_of_all() -> str:
    """Where temporary files are made; there may be no such place."""
    with suppress(OSError):
        return tempfile.gettempdir()
    return "the folder for temporary files"
