"""A cursor over received bytes that checks every length before anything is allocated."""

from __future__ import annotations

from fedlean.wire.errors import OverLimit, WireError


class Reader:
    """Takes bytes from the front of `data` and keeps count of what the decoder may still allocate.

    A few bytes can stand for a large array ("none kept"), so what a message decodes into is bounded
    apart from its length: at most `budget_bytes` for all arrays together.
    """

    def __init__(self, data: bytes | memoryview, budget_bytes: int) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._budget_bytes = budget_bytes

    @property
    def remaining(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes, without a copy.  Raises WireError where fewer are left."""
        if count > self.remaining:
            raise WireError(
                f"truncated: {what} needs {count} bytes at offset {self._at}, {self.remaining} left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self, what: str) -> int:
        return self.take(1, what)[0]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def reserve(self, array_bytes: int, what: str) -> None:
        """Call before allocating an array that the message's bytes do not pay for."""
        if array_bytes > self._budget_bytes:
            raise OverLimit(
                f"{what} would decode into {array_bytes} bytes, over the limit "
                f"({self._budget_bytes} left)"
            )
        self._budget_bytes -= array_bytes

    def finish(self) -> None:
        if self.remaining:
            raise WireError(f"{self.remaining} trailing bytes at offset {self._at}")
