"""Running out of memory in one line: for what, and how much it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class OutOfMemory(RuntimeError):
    """The machine, or the limit it is under, has not enough memory; the message says for what."""


@contextmanager
def memory_for(what: str, needed_bytes: Callable[[], int] | None = None) -> Iterator[None]:
    """A MemoryError in the block becomes OutOfMemory, which names `what` and its size.

    needed_bytes: gives what it takes in all, where that can be said; NumPy's own message has the
    size of the one array that did not fit.
    """
    try:
        yield
    except MemoryError as error:
        needs = f", {needed_bytes() / 1e6:.0f} MB in all" if needed_bytes else ""
        detail = f" ({error})" if str(error) else ""
        raise OutOfMemory(
            f"out of memory for {what}{needs}{detail}: free memory, or take smaller data, model or "
            "batch"
        ) from None
