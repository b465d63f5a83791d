"""What a terminal is sent of others' texts."""

from __future__ import annotations

import pytest

from fedlean.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä – [bold]", "plain ä – [bold]"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\u202egpj.exe", "\\u202egpj.exe"),  # read from right to left
        ("\x9b31m", "\\x9b31m"),  # the escape sequence's start in one character
        ("\udcff", "\\udcff"),  # of a file name that is not UTF-8
    ],
)
def test_what_a_terminal_would_act_on_is_spelled_out(text, shown):
    assert printable(text) == shown
    assert shown.isprintable()
