"""JSON that somebody else may have written: its value, or one line that says what is wrong.

Python's parser takes what JSON does not have (NaN), keeps the last of two equal keys, and ends in
errors of its own kind for deep nesting; the files that FedLean reads come from other machines.
"""

from __future__ import annotations

import json
import os
import stat
from math import isinf
from pathlib import Path
from typing import Any

MAX_BYTES = 32 << 20  # of a document or a line; 65,536 class names take 13 MB
MAX_DEPTH = 60  # lists and objects within each other; a run's own have up to 8


def read_json(path: Path, *, finite: bool = True) -> Any:
    """The value in the file `path`.  Raises OSError, or ValueError as `parse_json`, not naming it.

    A file of more than MAX_BYTES is refused and not read.
    """
    return parse_json(read_bytes(path, MAX_BYTES), finite=finite)


def read_bytes(path: Path, max_bytes: int | None) -> bytes:
    """The whole file.  Raises OSError, or ValueError when it is larger or no regular file."""
    # A pipe in the place of a file would be waited for: it opens at once, and is refused.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a file")
        if max_bytes is not None and about.st_size > max_bytes:
            raise ValueError(f"it has {about.st_size} bytes, expected at most {max_bytes}")
        return file.read() if max_bytes is None else file.read(max_bytes)


def parse_json(text: bytes | str, *, finite: bool = True, max_depth: int | None = MAX_DEPTH) -> Any:
    """The value of a JSON text, as bytes in UTF-8 with or without the mark that editors write.

    Raises ValueError for anything else, also for a key that an object has twice, for NaN and
    numbers that Python takes for infinite (not with finite=False, where the reader can say which
    they are), and for lists and objects nested deeper than `max_depth` (None: than Python can).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        no = _no_constant if finite else None
        value = json.loads(text, object_pairs_hook=_object, parse_constant=no)
    except UnicodeDecodeError:
        raise ValueError(
            "expected text in UTF-8, this is another encoding (UTF-16?): save it as UTF-8"
        ) from None
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    if max_depth is not None:
        _check_within(value, max_depth, finite)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_within(value: Any, levels: int, finite: bool) -> None:
    """Raises ValueError for deeper nesting, and for the infinity that Python makes of 1e400."""
    inside = [value]
    for _ in range(levels + 1):
        if finite and any(isinstance(each, float) and isinf(each) for each in inside):
            raise ValueError("it has a number beyond what a double holds")
        within = [each for each in inside if isinstance(each, dict | list)]
        if not within:
            return
        inside = [
            inner
            for each in within
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    raise ValueError(f"its lists and objects are nested deeper than {levels} levels")
