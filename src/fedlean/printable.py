"""What a terminal shows: text of others, on which it would act, and sizes."""

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


def megabytes(size_bytes: float) -> str:
    """With enough digits to tell the sizes of small models apart.

    >>> megabytes(52_340_000), megabytes(48_300)
    ('52.3 MB', '0.048 MB')
    """
    megabytes = size_bytes / 1e6
    return f"{megabytes:.1f} MB" if megabytes >= 10 else f"{megabytes:.3f} MB"
