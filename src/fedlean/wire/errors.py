"""What can be wrong with a message."""

from __future__ import annotations

_MAX_TEXT = 500


class WireError(ValueError):
    """Bytes that are no valid message, or an object that cannot be sent; the text says why.

    It is cut to what a log line bears: names in it are the sender's, who may have chosen long ones.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "...")


class OverLimit(WireError):
    """The message, or what it decodes into, takes more than the receiver grants it."""


class _Unknown(WireError):
    """The message refers to something by hash that the receiver does not hold: ask for it."""

    def __init__(self, what: str, hash: str) -> None:
        super().__init__(f"{what} {hash} is not held here: ask the sender to include it")
        self.hash = hash


class UnknownSpec(_Unknown):
    def __init__(self, hash: str) -> None:
        super().__init__("spec", hash)


class UnknownFrozen(_Unknown):
    def __init__(self, hash: str) -> None:
        super().__init__("values of frozen tensors with the hash", hash)


class UnknownPattern(_Unknown):
    def __init__(self, hash: str) -> None:
        super().__init__("pattern", hash)
