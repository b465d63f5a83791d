"""What a terminal is sent of others' texts."""

from __future__ import annotations

import pytest

from fedlean.printable import megabytes, printable


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


def test_sizes_have_the_digits_that_tell_them_apart():
    sizes = (0, 48_300, 9_999_000, 10_000_000, 52_340_000, 1_234_567_890)
    expected = ["0.000", "0.048", "9.999", "10.0", "52.3", "1234.6"]
    assert [megabytes(size) for size in sizes] == [f"{text} MB" for text in expected]
