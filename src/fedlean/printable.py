"""Text of others on the way to a terminal, which acts on what stands in it."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with its escape sequences, line ends and the like spelled out, which makes it longer.

    Also with invisible marks that turn the direction of reading, and with what is not UTF-8.

    >>> print(printable("a\x1b[31mb"))
    a\x1b[31mb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
