from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlean.data.declared import Declared
from fedlean.data.load import load_dataset, load_source

RNG = np.random.default_rng(0)
TABLE: dict[str, Any] = {
    "a": np.array([1, 2, 3, 4], np.int16),
    "b": np.array([0.5, 1.5, 2.5, 3.5], np.float32),
    "label": ["ok", "hot", "ok", "hot"],
    "client": ["bert", "anna", "bert", "anna"],
    "split": ["train", "train", "test", "train"],
}


def parquet(path: Path, columns: dict[str, Any], rows: int = 2) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)


def arrow(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> None:
    """As Hugging Face's `save_to_disk` writes a part: a stream, with its features as metadata."""
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_a_table(tmp_path: Path):
    parquet(tmp_path / "readings.parquet", TABLE)
    data = load_dataset(str(tmp_path))
    assert data.x_train.tolist() == [[1, 0.5], [2, 1.5], [4, 3.5]]
    assert data.x_test.tolist() == [[3, 2.5]] and data.x_train.dtype == np.float32
    assert data.class_names == ("hot", "ok") and data.y_train.tolist() == [1, 0, 0]
    assert data.clients is not None and data.clients.tolist() == [1, 0, 0]


def lists(count: int, classes: int, first: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    x = RNG.integers(-9, 9, (count, 3, 5)).astype(np.int16)
    return x, {"x": x.tolist(), "label": [first + i % classes for i in range(count)]}


def test_halves_in_several_files_with_signals(tmp_path: Path):
    parts = [lists(4, 2), lists(3, 2), lists(2, 2)]
    for name, (_, columns) in zip(("train-0-of-2", "train-1-of-2", "test-0"), parts, strict=True):
        parquet(tmp_path / f"data/{name}.parquet", columns)
    with pytest.raises(ValueError, match=r"column 'x' .*\(7, 3, 5\), .*ncl .* or as nlc"):
        load_dataset(str(tmp_path))
    data = load_dataset(str(tmp_path), Declared("ncl"))
    np.testing.assert_array_equal(data.x_train, np.concatenate([parts[0][0], parts[1][0]]))
    np.testing.assert_array_equal(data.x_test, parts[2][0])
    other = load_dataset(str(tmp_path), Declared("nlc"))
    np.testing.assert_array_equal(other.x_test, parts[2][0].transpose(0, 2, 1))
    source = load_source(str(tmp_path), declared=Declared("ncl"))
    np.testing.assert_array_equal(source.share(np.array([1, 5])).x_train, data.x_train[[1, 5]])


def test_what_save_to_disk_wrote_with_its_class_names(tmp_path: Path):
    x, columns = lists(7, 2)
    arrow(tmp_path / "train/data-00000-of-00001.arrow", columns, ["no", "yes", "never"])
    test, columns = lists(2, 2)
    arrow(tmp_path / "test/data-00000-of-00001.arrow", columns, ["no", "yes", "never"])
    data = load_dataset(str(tmp_path), Declared("ncl"))
    np.testing.assert_array_equal(data.x_train, x)
    np.testing.assert_array_equal(data.x_test, test)
    assert data.class_names == ("no", "yes", "never") and data.y_test.tolist() == [0, 1]


def test_one_part_without_halves(tmp_path: Path):
    _, columns = lists(5, 3, first=1)
    arrow(tmp_path / "data-00000-of-00001.arrow", columns)
    data = load_dataset(str(tmp_path), Declared("ncl"))
    assert data.class_names == ("1", "2", "3") and len(data.y_test) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": [1, None, 3, 4]}, "column 'a' has empty cells"),
        ({"label": ["ok", None, "ok", "hot"]}, "column 'label' has empty cells"),
        ({"a": ["x"] * 4}, "column 'a' holds string, expected numbers"),
        ({"y": [1, 2, 3, 4]}, "got 2 columns of labels .*--label"),
        ({"a": [[1, 2]] * 4}, "column 'a' holds list"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str):
    parquet(tmp_path / "a.parquet", TABLE | change)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path))


def test_lists_of_several_lengths(tmp_path: Path):
    parquet(tmp_path / "a.parquet", {"x": [[1, 2], [3]], "y": [0, 1]})
    with pytest.raises(ValueError, match="column 'x' has lists of several lengths"):
        load_dataset(str(tmp_path))
    parquet(tmp_path / "a.parquet", {"x": [[1, 2], [3, 4]], "y": [0, 1]})
    assert load_dataset(str(tmp_path)).x_train.tolist() == [[1, 2], [3, 4]]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_dataset(str(tmp_path))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: reading it needs pyarrow.*pip install"):
        load_dataset(str(tmp_path))
