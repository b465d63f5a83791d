"""Parquet files, and data sets that Hugging Face's `save_to_disk` wrote.  Needs pyarrow.

An example is a row: columns of numbers make a table, or one column of lists of numbers is the
example itself.  `train*.parquet` and `test*.parquet`, or train/*.arrow and test/*.arrow, are the
halves of one set.  Columns are named as those of CSV files (`fedlean.data.table`).
"""

# n examples, k rows of a batch

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.data.columns import one_table, two_tables
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.labels import listed
from fedlean.data.layout import arranged, kept_as, layout_of
from fedlean.data.rows import Rows, rows_source
from fedlean.data.source import READING_BYTES, Room, Source, labels_bytes, take, unlimited
from fedlean.data.table import CLIENTS, LABELS, SPLIT

HALVES = ("train", "test")
ROWS_AT_ONCE = 1024
PYARROW_BYTES = 100_000_000  # counted for pyarrow, once imported
STORED_BYTES = 40  # of a label, a client id and a part, as arrays

Files = Mapping[str, Sequence[Path]]  # half, or "" for files that are not a half


def find_arrow(folder: Path) -> dict[str, Files]:
    """{"parquet": files} or {"arrow": files} where a folder holds such a set, else {}."""
    parquet = sorted(folder.glob("*.parquet"))
    halves = {half: [p for p in parquet if p.stem.split("-")[0] == half] for half in HALVES}
    if any(halves.values()):
        return {"parquet": {half: paths for half, paths in halves.items() if paths}}
    if parquet:
        return {"parquet": {"": parquet}}
    parts = {half: sorted((folder / half).glob("data-*.arrow")) for half in HALVES}
    parts |= {"": sorted(folder.glob("data-*.arrow"))}
    found = {half: paths for half, paths in parts.items() if paths}
    return {"arrow": found} if found else {}


def arrow_source(
    name: str, files: Files, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The data set in the files.  Names of classes that Hugging Face's features hold are kept.

    Raises ValueError naming the file and the column of what cannot be used, or what `room` raises.
    """
    some = next(iter(files.values()))[0]
    if "pyarrow" not in sys.modules:
        room(PYARROW_BYTES, f"pyarrow, with which {some} is read,", "store the data as an .npz")
    try:
        return _source(name, files, room, declared)
    except ImportError as error:
        raise ValueError(
            f"{some}: reading it needs pyarrow, which is not installed; pip install pyarrow"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{some.parent}: {error}") from error


@dataclass(frozen=True)
class _Roles:
    """Names of columns."""

    label: str
    client: str | None
    split: str | None
    values: list[str]

    def beside(self) -> list[str]:
        return [each for each in (self.label, self.client, self.split) if each is not None]


def _source(name: str, files: Files, room: Room, declared: Declared) -> Source:
    schema = _schema(next(iter(files.values()))[0])
    roles = _roles(schema, declared.label)
    counts = {half: sum(map(_rows, paths)) for half, paths in files.items()}
    total = sum(counts.values())
    what = f"reading the labels of {total} examples of {name!r}"
    room(labels_bytes(total, STORED_BYTES * total), what, "divide the files among the devices")
    beside = {half: _columns(paths, roles.beside()) for half, paths in files.items()}
    labels = {half: each[roles.label] for half, each in beside.items()}
    names = _class_names(schema, roles.label)
    if "" in files:
        split, ids = (beside[""].get(each or "") for each in (roles.split, roles.client))
        columns = one_table(labels[""], names=names, split=split, clients=ids)
    else:
        train, test = (labels.get(half, np.empty(0, np.int64)) for half in HALVES)
        ids = beside["train"].get(roles.client or "") if "train" in beside else None
        columns = two_tables(train, test, names=names, clients=ids)
    rows = {half: _examples(paths, roles, counts[half], declared) for half, paths in files.items()}
    both = [rows.get("", rows.get(half)) for half in HALVES]
    return rows_source(name, columns, both[0], both[1], room)


def _roles(schema: Any, label: str) -> _Roles:
    header = list(schema.names)
    found = [each for each in header if (each == label if label else each.lower() in LABELS)]
    if len(found) != 1:
        raise ValueError(
            f"got {len(found)} columns of labels among {listed(header)}, expected one: say which"
            " with --label"
        )
    others = [each for each in header if each != found[0] and not each.startswith("__")]
    client, split = (
        next((each for each in others if each.lower() in names), None) for names in (CLIENTS, SPLIT)
    )
    values = [each for each in others if each not in (client, split)]
    if not values:
        raise ValueError(f"got the columns {listed(header)}, expected numbers beside the label")
    return _Roles(found[0], client, split, values)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Those of a ClassLabel, which Hugging Face writes into the metadata."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(text)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(each) for each in names] if isinstance(names, list) and names else None


def _pyarrow() -> tuple[Any, Any]:
    """The optional package, and its module for Parquet."""
    return import_module("pyarrow"), import_module("pyarrow.parquet")


def _schema(path: Path) -> Any:
    pa, pq = _pyarrow()
    if path.suffix == ".parquet":
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).schema


def _rows(path: Path) -> int:
    _, pq = _pyarrow()
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    return sum(batch.num_rows for batch in _batches([path], []))


def _batches(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Any]:
    """A few rows at a time, of all files end to end; [] for all columns of an .arrow file."""
    pa, pq = _pyarrow()
    for path in paths:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(ROWS_AT_ONCE, columns=list(columns))
            continue
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                whole = batch.select(list(columns)) if columns else batch
                for start in range(0, whole.num_rows, ROWS_AT_ONCE):
                    yield whole.slice(start, ROWS_AT_ONCE)


def _columns(paths: Sequence[Path], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole columns of labels and ids."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in _batches(paths, names):
        for name in names:
            column = batch.column(name)
            if column.null_count:
                raise ValueError(f"column {name!r} has empty cells; fill or remove their rows")
            values = column.to_numpy(zero_copy_only=False)
            found[name].append(values.astype(str) if values.dtype.kind == "O" else values)
    return {name: np.concatenate(pieces) for name, pieces in found.items() if pieces}


def _examples(paths: Sequence[Path], roles: _Roles, count: int, declared: Declared) -> Rows:
    first = _block(next(_batches(paths, roles.values)), roles.values)
    kept, scale = kept_as(first.dtype)
    shape = (count, *first.shape[1:])
    layout = layout_of(f"column {roles.values[0]!r}", shape, first.dtype, declared.layout)

    def blocks() -> Iterator[np.ndarray]:
        for batch in _batches(paths, roles.values):
            block = _block(batch, roles.values)
            if block.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"examples of {block.shape[1:]} values, expected {first.shape[1:]} as in the"
                    " first rows"
                )
            yield arranged(block, layout)

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        take(blocks(), rows, out)

    reading_bytes = READING_BYTES + 4 * _largest_bytes(paths, first)
    return Rows(arranged(first, layout).shape[1:], kept, scale, reading_bytes, fill)


def _largest_bytes(paths: Sequence[Path], first: np.ndarray) -> int:
    """Of a row group, which is unpacked as a whole, or of a batch."""
    _, pq = _pyarrow()
    sizes = [first.nbytes]
    for path in paths:
        if path.suffix == ".parquet":
            about = pq.read_metadata(path)
            sizes += [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
    return max(sizes)


def _block(batch: Any, names: Sequence[str]) -> np.ndarray:
    """(k, columns) of numbers; of one column of lists (k, ...)."""
    if len(names) == 1:
        return _lists(batch.column(names[0]), names[0])
    return np.stack([_numbers(batch.column(name), name) for name in names], axis=1)


def _lists(column: Any, name: str) -> np.ndarray:
    pa, _ = _pyarrow()
    sides: list[int] = [len(column)]
    while (
        pa.types.is_list(column.type)
        or pa.types.is_large_list(column.type)
        or (pa.types.is_fixed_size_list(column.type))
    ):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) != 1 or column.null_count:
            raise ValueError(f"column {name!r} has lists of several lengths, expected one length")
        sides.append(int(lengths[0]))
        column = column.flatten()
    return _numbers(column, name).reshape(*sides, *(() if len(sides) > 1 else (1,)))


def _numbers(column: Any, name: str) -> np.ndarray:
    pa, _ = _pyarrow()
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(
            f"column {name!r} holds {kind}, expected numbers: leave it out, name its meaning"
            " (client, split, or --label), or store pictures in a folder for each class"
        )
    if column.null_count:
        raise ValueError(f"column {name!r} has empty cells; fill or remove their rows")
    return column.to_numpy(zero_copy_only=False)
