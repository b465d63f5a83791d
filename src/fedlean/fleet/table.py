"""A fleet as a CSV file: a table of devices, or a trace of what they had and when.

A row of a trace holds from its round on until the device's next row.  An empty cell is what the
profile of the device says.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from fedlean.cost.profile import Profile
from fedlean.fleet.fleet import QUANTITIES, Fleet, Member, Timeline
from fedlean.fleet.quantity import Quantity, from_text

DEVICE, PROFILE, ROUND, TIME = "device", "profile", "round", "time_seconds"
COLUMNS = (DEVICE, ROUND, TIME, PROFILE, *QUANTITIES)
MAX_DEVICES = 1 << 20
MAX_ROUND = 1 << 40
WORDS = {"true": "1", "yes": "1", "false": "0", "no": "0"}  # for `present`


def parse_table(
    text: str,
    *,
    profiles: Callable[[str], Profile],
    defaults: Member,
    round_seconds: float | None = None,
) -> Fleet:
    """profiles: by name; defaults: of what has no column; round_seconds: for a column of times.

    Raises ValueError naming the line and what was expected there.
    """
    lines = csv.reader(text.splitlines())
    header = [name.strip() for name in next(lines, [])]
    _check_header(header, round_seconds)
    rows: dict[int, dict[int, tuple[int, Member]]] = {}  # device -> step -> line, what holds then
    for cells in lines:
        number = lines.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"line {number}: {len(cells)} cells, expected {len(header)} as in the first line"
            )
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        try:
            device, step = _device(row[DEVICE]), _begins(row, round_seconds)
            member = _member(row, profiles, defaults)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if (before := rows.setdefault(device, {}).get(step)) is not None:
            raise ValueError(
                f"line {number}: device {device} has a row for the same time in line {before[0]}"
            )
        rows[device][step] = number, member
    return _fleet(rows)


def _check_header(header: Sequence[str], round_seconds: float | None) -> None:
    for name in header:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"line 1: no column {name!r:.60}; {hint}known: {', '.join(COLUMNS)}")
        if header.count(name) > 1:
            raise ValueError(f"line 1: the column {name} is there twice")
    if DEVICE not in header:
        raise ValueError(
            f"line 1: no column {DEVICE}; the first line names the columns, of {', '.join(COLUMNS)}"
        )
    if ROUND in header and TIME in header:
        raise ValueError(f"line 1: {ROUND} and {TIME} say the same: keep one of them")
    if TIME in header and round_seconds is None:
        raise ValueError(
            f"line 1: the column {TIME} needs to know how long a round takes: name this file in a "
            "TOML file with trace = 'THIS.csv' and round_seconds = 60, and give that to --fleet"
        )


def _fleet(rows: Mapping[int, Mapping[int, tuple[int, Member]]]) -> Fleet:
    if not rows:
        raise ValueError("no device: expected a line for each below the first")
    size = max(rows) + 1
    missing = [str(device) for device in range(size) if device not in rows][:4]
    if missing:
        raise ValueError(
            f"no line for device {', '.join(missing)}; devices are numbered from 0, the highest "
            f"here is {size - 1}"
        )
    timelines = []
    for device in range(size):
        steps = sorted(rows[device])
        timelines.append(Timeline(tuple(steps), tuple(rows[device][step][1] for step in steps)))
    return Fleet(tuple(timelines), size)


def _device(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= MAX_DEVICES:
        raise ValueError(f"device is {text!r:.60}, expected a number from 0 to {MAX_DEVICES - 1}")
    return int(text)


def _begins(row: Mapping[str, str], round_seconds: float | None) -> int:
    """The first step that a row is of: the first one that begins no earlier."""
    if ROUND in row:
        text = row[ROUND]
        if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= MAX_ROUND:
            raise ValueError(f"round is {text!r:.60}, expected a whole number from 1")
        return int(text)
    if TIME not in row or round_seconds is None:
        return 0
    try:
        seconds = float(row[TIME])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_ROUND:
        raise ValueError(f"{TIME} is {row[TIME]!r:.60}, expected a number of seconds from 0")
    return math.ceil(seconds / round_seconds) + 1


def _member(row: Mapping[str, str], profiles: Callable[[str], Profile], defaults: Member) -> Member:
    own: dict[str, Quantity] = dict(defaults.own)
    for name in QUANTITIES.keys() & row.keys():
        text = row[name]
        if name == "present":
            text = WORDS.get(text.lower(), text)
        if text:
            try:
                own[name] = from_text(text, QUANTITIES[name])
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    profile = profiles(row[PROFILE]) if row.get(PROFILE) else defaults.profile
    return Member(profile, own)
