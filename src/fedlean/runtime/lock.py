"""One writer per run folder: who holds it, and whether they are still there.

The lock is an advisory one of the operating system on `FOLDER/run.lock`, so it ends with its
process, however that ends; the file says in words who that is.  A local run holds the folder alone.
Servers of a Flower app share it among themselves, since the last one submitted goes on with the run
and the others find out: an app whose SuperLink was killed may live on for a while, and nobody
should have to find and end it first.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedlean.printable import printable

NAME = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network mounts
# of what is no file: a link, a folder, a socket or a device without its driver
_NO_FILE = {errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO, errno.ENODEV}
_READ_BYTES = 4096
MOMENTS, MOMENT_SECONDS = 10, 0.02


class Superseded(RuntimeError):
    """Another process goes on with the run, or its folder was removed."""


class Lock:
    """Held until the end of `hold`."""

    def __init__(self, path: Path, file: int, *, shared: bool):
        self._path, self._file = path, file
        self._text = _describe(shared)

    def own(self) -> None:
        """From now on the run is this process's; before, another server of the app may go on."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._text, 0)

    def is_owned(self) -> bool:
        written = os.pread(self._file, _READ_BYTES, 0) == self._text
        return written and _is_at(self._file, self._path)

    def check(self) -> None:
        """Raises Superseded once the folder is another's, or gone: nothing may be written there."""
        if self.is_owned():
            return
        raise Superseded(
            f"{self._path.parent} is no longer this run's: another process has taken it over or it "
            "was removed; this one ends"
        )


@contextmanager
def hold(folder: Path, say: Callable[[str], None], *, shared: bool = False) -> Iterator[Lock]:
    """The run folder is this process's alone; or, if `shared`, of servers of an app's alone.

    A folder that does not exist is made, and goes again if nothing was written there.  `say` gets a
    line where the file system has no locks.  Raises ValueError naming who holds the folder, or why
    it cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not _exists(each)]
    path = folder / NAME
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _locked(path, say, shared=shared)
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be written ({error.strerror}): name another folder, or make room"
            ) from None
        lock = Lock(path, file, shared=shared)
        try:
            if not shared or os.fstat(file).st_size == 0:
                lock.own()
            yield lock
        finally:
            if _is_at(file, path) and _is_last(file):
                path.unlink(missing_ok=True)
            os.close(file)
    finally:
        with suppress(OSError):  # not empty: the run's
            for each in made:
                if _exists(each):
                    each.rmdir()


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path's raises for a name that is too long


def _locked(path: Path, say: Callable[[str], None], *, shared: bool) -> int:
    """A file descriptor that has the lock."""
    tries = MOMENTS
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            tries -= 1
            if not tries:
                holder = _holder(file)
                os.close(file)
                raise ValueError(
                    f"{path.parent} is being written by {holder}: wait until it ends, or stop it"
                ) from None
            time.sleep(MOMENT_SECONDS)  # it may be leaving, or not have written yet who it is
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
            say(f"{path.parent} is on a file system without locks: let nobody else write there")
            return file
        os.close(file)  # it was held, or its holder has just ended and removed it


def _opened(path: Path) -> int:
    """A file of this folder's own, which may be emptied and overwritten.  Raises ValueError.

    Where others may write the folder, one of them could have put a link there to a file that is
    this user's, or a pipe that nobody reads.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    else:
        about = os.fstat(file)
        if stat.S_ISREG(about.st_mode) and about.st_nlink <= 1:  # 0: its holder has just left
            return file
        os.close(file)
    raise ValueError(
        f"{path} is no file of its own, as a run's lock is, but a link or something else that was "
        "put there: see who did, and remove it"
    )


def _is_last(file: int) -> bool:
    """Nobody else has the lock: of servers that share it, another may be about to own it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _describe(shared: bool) -> bytes:
    holder = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "a Flower app" if shared else "fedlean",
        "token": uuid.uuid4().hex,
    }
    return json.dumps(holder).encode()


def _holder(file: int) -> str:
    """The holder in words; the file is another process's, and may hold anything."""
    try:
        holder = json.loads(os.pread(file, _READ_BYTES, 0))
        process, host = int(holder["process"]), str(holder["host"])
        what = f"{holder['command']}, process {process} on {host} since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    return printable(what)[:300]
