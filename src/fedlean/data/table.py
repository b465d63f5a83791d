"""CSV files: a row for each example, a column for each number, and one for the label.

The first line names the columns.  Those named `client` and `split` are not numbers of an example,
nor is a column without a name, as pandas writes its index.  `train.csv` and `test.csv` are the
halves of one set; every other file is a set of its own.  Files are read front to back, and twice:
for the labels, and for the rows that are wanted.
"""

# F columns of numbers

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.data.columns import Columns, client_numbers, one_table, two_tables
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.labels import classes_of, listed
from fedlean.data.rows import Rows, rows_source
from fedlean.data.source import READING_BYTES, Room, Source, labels_bytes, unlimited

LABELS = ("label", "y", "class", "target")  # in any letter case
CLIENTS, SPLIT = ("client", "client_id"), ("split",)
HALVES = ("train", "test")
MOST_HEADER = 1 << 20  # characters that are looked at for the separator
CELLS_AT_ONCE = 20_000  # parsed together
CELL_BYTES = 200  # of a cell that is being parsed: its text, a float, and their places in lists


def find_csv(folder: Path, label: str = "") -> dict[str, dict[str, Path]]:
    """The CSV sets of a folder: name -> half -> file, "" for a file that is not a half.

    Files without a column of labels are passed over.  label: the one that is declared, or "".
    """
    paths = [path for path in _files(folder) if _label(_names(path), label)]
    halves = {path.stem: path for path in paths if path.stem in HALVES}
    found = {path.name: {"": path} for path in paths if path.stem not in HALVES}
    return found | ({"train.csv" if "train" in halves else "test.csv": halves} if halves else {})


def passed_over(folder: Path) -> list[str]:
    """For a message: the CSV files of a folder, with their columns."""
    return [f"{path.name} with the columns {listed(_names(path))}" for path in _files(folder)]


def csv_source(
    name: str, files: Mapping[str, Path], room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The data set in the files, as `find_csv` gives them; numbers become float32.

    Raises ValueError naming the file, and the line and the column of what is no number, or what
    `room` raises.
    """
    tables = {half: _open(path, declared.label) for half, path in files.items()}
    label_names = _Words()
    for table in tables.values():
        size_bytes = table.path.stat().st_size
        most = size_bytes // (2 * len(table.header)) + 1  # a cell has a character and a separator
        what = f"reading the labels in {table.path}, {size_bytes / 1e6:.1f} MB,"
        room(labels_bytes(most, 8 * most), what, "divide the file among the devices")
        table.scan(label_names)
    try:
        columns = _columns(tables, label_names)
        rows = {half: _rows(table) for half, table in tables.items()}
        train, test = (rows.get("", rows.get(half)) for half in HALVES)
        _check_alike(tables)
        source = rows_source(name, columns, train, test, room)
    except ValueError as error:
        raise ValueError(f"{next(iter(files.values()))}: {error}") from error
    nameless = any(not column for table in tables.values() for column in table.header)
    notes = ("columns without a name are left out",) if nameless else ()
    return replace(source, notes=(*source.notes, *notes))


class _Words:
    """Distinct texts, numbered as they come."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        return self.number.setdefault(word, len(self.number))

    def array(self) -> np.ndarray:
        """The texts (distinct,)."""
        return np.array(list(self.number))


@dataclass
class _Table:
    """A file of which the header is read; the rest is read by `scan`.

    values: positions of the columns of numbers.
    """

    path: Path
    header: list[str]
    label: int
    client: int | None
    split: int | None
    values: list[int]
    labels: array[int] = field(default_factory=lambda: array("i"))
    clients: array[int] = field(default_factory=lambda: array("i"))
    splits: array[int] = field(default_factory=lambda: array("i"))
    client_names: _Words = field(default_factory=_Words)
    split_names: _Words = field(default_factory=_Words)

    def scan(self, label_names: _Words) -> None:
        """Reads the labels, the clients and the split."""
        for line, row in _read(self.path, len(self.header)):
            if not row[self.label].strip():
                raise ValueError(
                    f"{self.path}, line {line}: no {self.header[self.label]!r}, expected a label"
                )
            self.labels.append(label_names(row[self.label].strip()))
            if self.client is not None:
                self.clients.append(self.client_names(row[self.client].strip()))
            if self.split is not None:
                self.splits.append(self.split_names(row[self.split].strip()))
        if not self.labels:
            raise ValueError(f"{self.path} has a header and no rows, expected at least 1 example")

    def ids(self) -> np.ndarray | None:
        if self.client is None:
            return None
        return client_numbers(self.client_names.array())[np.asarray(self.clients)]


def _open(path: Path, label: str) -> _Table:
    header = _names(path)
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: two columns are named {repeated[0]!r}; rename one")
    found = _label(header, label)
    if len(found) != 1:
        names = listed([header[i] for i in found])
        raise ValueError(
            f"{path}: got {len(found)} columns of labels ({names}), expected one: say which with"
            " --label"
        )
    client, split = (_position(header, names, found[0]) for names in (CLIENTS, SPLIT))
    special = {found[0], client, split}
    values = [i for i, name in enumerate(header) if name and i not in special]
    if not values:
        raise ValueError(
            f"{path}: got the columns {listed(header)}, expected numbers beside the label"
        )
    return _Table(path, header, found[0], client, split, values)


def _label(header: Sequence[str], label: str) -> list[int]:
    wanted = (label,) if label else LABELS
    return [i for i, name in enumerate(header) if (name if label else name.lower()) in wanted]


def _position(header: Sequence[str], names: Collection[str], label: int) -> int | None:
    return next((i for i, name in enumerate(header) if name.lower() in names and i != label), None)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.csv"))


def _columns(tables: Mapping[str, _Table], label_names: _Words) -> Columns:
    names, number = classes_of(label_names.array())
    labels = {half: number[np.asarray(table.labels)] for half, table in tables.items()}
    if "" in tables:
        table = tables[""]
        split = None
        if table.split is not None:
            split = table.split_names.array()[np.asarray(table.splits)]
        return one_table(labels[""], names=names, split=split, clients=table.ids())
    none = np.empty(0, np.int64)
    train, test = (labels.get(half, none) for half in HALVES)
    clients = tables["train"].ids() if "train" in tables else None
    return two_tables(train, test, names=names, clients=clients)


def _check_alike(tables: Mapping[str, _Table]) -> None:
    headers = [[each.header[i] for i in each.values] for each in tables.values()]
    if headers[0] != headers[-1]:
        odd = sorted(set(headers[0]) ^ set(headers[-1])) or headers[-1]
        raise ValueError(
            f"train.csv and test.csv differ in the columns {listed(odd)}, expected the same ones in"
            " the same order"
        )


def _rows(table: _Table) -> Rows:
    count = len(table.values)
    reading_bytes = READING_BYTES + CELL_BYTES * max(CELLS_AT_ONCE, count)
    return Rows((count,), np.dtype(np.float32), 1.0, reading_bytes, _fill(table))


def _fill(table: _Table) -> Callable[[np.ndarray, np.ndarray], None]:
    at_once = max(1, CELLS_AT_ONCE // len(table.values))

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        place = {row: i for i, row in enumerate(rows.tolist())}
        lines: list[tuple[int, int, list[str]]] = []  # place, line of the file, cells
        count = 0
        for row, (line, cells) in enumerate(_read(table.path, len(table.header))):
            count += 1
            if row in place:
                lines.append((place[row], line, [cells[i] for i in table.values]))
            if len(lines) == at_once:
                _parse(table, lines, out)
                lines = []
        _parse(table, lines, out)
        if count != len(table.labels):
            raise ValueError(f"{table.path}: the file has changed while it was read")

    return fill


def _parse(table: _Table, lines: Sequence[tuple[int, int, list[str]]], out: np.ndarray) -> None:
    if not lines:
        return
    try:
        found = np.array([cells for _, _, cells in lines], dtype=np.float64)
    except ValueError:
        found = np.array([[_number(cell) for cell in cells] for _, _, cells in lines])
    odd = np.argwhere(~np.isfinite(found))
    if len(odd):
        row, column = odd[0]
        _, line, cells = lines[row]
        raise ValueError(
            f"{table.path}, line {line}: column {table.header[table.values[column]]!r} holds"
            f" {cells[column]!r:.40}, expected a finite number; clean the data, or leave the column"
            " out"
        )
    with np.errstate(over="ignore"):  # what is beyond float32 is refused by `Dataset`
        out[[place for place, _, _ in lines]] = found


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _names(path: Path) -> list[str]:
    """The header, without spaces around the names."""
    with _opened(path) as rows:
        header = [name.strip() for name in next(rows, [])]
    if not header:
        raise ValueError(f"{path} is empty, expected a first line that names the columns")
    return header


def _read(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """(line of the file, cells) of every row; blank lines are passed over."""
    with _opened(path) as rows:
        next(rows, None)
        for row in rows:
            if not row:
                continue
            if len(row) != columns:
                raise ValueError(
                    f"{path}, line {rows.line_num}: got {len(row)} cells, expected {columns}, as"
                    " many as the first line names"
                )
            yield rows.line_num, row


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Its rows, as `csv.reader`; a semicolon or a tab separates where the first line says so."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline(MOST_HEADER)
            file.seek(0)
            yield csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as CSV ({error})") from error
