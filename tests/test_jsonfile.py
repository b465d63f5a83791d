"""JSON of others: what is taken, and one line for what is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fedlean.jsonfile import MAX_BYTES, MAX_DEPTH, parse_json, read_bytes, read_json


def nested(levels: int) -> bytes:
    return b"[" * levels + b"1" + b"]" * levels


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, 2.5, null, true, "\xc3\xa4"]}', {"a": [1, 2.5, None, True, "ä"]}),
        (b"\xef\xbb\xbf{}", {}),  # the mark that editors write
        ("[-1e308]", [-1e308]),
        (b'{"a": {"a": 1}, "b": {"a": 1}}', {"a": {"a": 1}, "b": {"a": 1}}),
    ],
)
def test_json_is_taken(text, value):
    assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 10**6, "nested"),
        (b'{"a":' * 10**6, "nested"),
        (nested(MAX_DEPTH + 1), f"deeper than {MAX_DEPTH} levels"),
        (nested(500), f"deeper than {MAX_DEPTH} levels"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' twice"),
        (b'{"b": 2, "b": 2}', "the key 'b' twice"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[[1e400]]", "beyond what a double holds"),
        (b"9" * 5000, "4300 digits"),
        (b"\xff", "text in UTF-8"),
        ("{}".encode("utf-16"), "text in UTF-8"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
    ],
    ids=range(14),
)
def test_anything_else_is_a_value_error_in_one_line(text, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_a_key_that_is_twice_among_very_many_is_found_at_once():
    """One look at each, not at all for each: that would take hours."""
    many = ",".join(f'"{number}": 0' for number in range(10**6))
    with pytest.raises(ValueError, match="the key '999999' twice"):
        parse_json(f'{{{many}, "999999": 0}}')


def test_the_deepest_that_is_taken():
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert parse_json(nested(500), max_depth=None) is not None


def test_a_reader_that_names_its_numbers_gets_them():
    assert parse_json(b"[Infinity, 1e400]", finite=False) == [float("inf")] * 2


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="it is not a file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="it is not a file"):
        read_json(Path("/dev/zero"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: on the disk it takes nothing
    with pytest.raises(ValueError, match=f"has {1 << 40} bytes, expected at most {MAX_BYTES}"):
        read_json(path)
    path.write_bytes(b"[1]")
    assert read_bytes(path, 3) == b"[1]" and read_bytes(path, None) == b"[1]"
    with pytest.raises(ValueError, match="3 bytes, expected at most 2"):
        read_bytes(path, 2)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
