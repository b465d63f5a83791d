from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedlean.data import table as module
from fedlean.data.declared import Declared
from fedlean.data.load import load_dataset, load_source

READINGS = """temperature,humidity,label,client,split
20.5,0.3,ok,anna,train
-1e3,0.5,hot,bert,test
21,0.25,ok,bert,train

22,1,hot,anna,train
"""


def put(folder: Path, text: str, name: str = "readings.csv", encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding=encoding)
    return folder


def refuse(folder: Path, message: str, declared: Declared | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(str(folder), declared or Declared())


@pytest.mark.parametrize("cells_at_once", [20_000, 1])
def test_sensor_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells_at_once: int):
    monkeypatch.setattr(module, "CELLS_AT_ONCE", cells_at_once)
    data = load_dataset(str(put(tmp_path, READINGS)))
    assert data.x_train.tolist() == [[20.5, np.float32(0.3)], [21, 0.25], [22, 1]]
    assert data.x_test.tolist() == [[-1000, 0.5]] and data.x_train.dtype == np.float32
    assert data.class_names == ("hot", "ok")
    assert data.y_train.tolist() == [1, 1, 0] and data.y_test.tolist() == [0]
    assert data.clients is not None and data.clients.tolist() == [0, 1, 0]
    assert (data.name, data.input_shape, data.notes) == (tmp_path.name, (2,), ())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_quotes_and_a_byte_order_mark(tmp_path: Path, separator: str, encoding: str):
    text = READINGS.replace(",", separator).replace("ok", '"all ok"')
    data = load_dataset(str(put(tmp_path, text, encoding=encoding)))
    assert data.class_names == ("all ok", "hot") and data.input_shape == (2,)


@pytest.mark.parametrize("name", ["label", "Label", "Y", "class", "TARGET"])
def test_labels_by_their_usual_names(tmp_path: Path, name: str):
    data = load_dataset(str(put(tmp_path, READINGS.replace("label", name))))
    assert data.class_names == ("hot", "ok")


def test_labels_by_a_declared_name(tmp_path: Path):
    text = READINGS.replace("label", "state")
    put(tmp_path, text)
    refuse(tmp_path, r"readings\.csv with the columns 'temperature', .*'state'.*--label names")
    data = load_dataset(str(tmp_path), Declared(label="state"))
    assert data.class_names == ("hot", "ok") and data.input_shape == (2,)
    refuse(tmp_path, "holds no data set", Declared(label="stat"))


def test_two_columns_of_labels(tmp_path: Path):
    put(tmp_path, "a,y,target\n1,2,3\n4,5,6\n")
    refuse(tmp_path, "got 2 columns of labels .'y', 'target'., expected one: .* with --label")
    data = load_dataset(str(tmp_path), Declared(label="target"))
    assert data.x_train.tolist() == [[1, 2], [4, 5]] and data.class_names == ("3", "6")


def test_labels_that_are_numbers_count_from_zero(tmp_path: Path):
    data = load_dataset(str(put(tmp_path, "a,y\n1,0\n2,2\n3,0\n")))
    assert data.class_names == ("0", "1", "2") and data.y_train.tolist() == [0, 2, 0]
    assert len(data.y_test) == 0, "without a split all are for training"


def test_halves_in_two_files(tmp_path: Path):
    put(tmp_path, "a,b,y\n1,2,dog\n3,4,cat\n", "train.csv")
    put(tmp_path, "a,b,y\n5,6,cow\n", "test.csv")
    data = load_dataset(str(tmp_path))
    assert data.x_train.tolist() == [[1, 2], [3, 4]] and data.x_test.tolist() == [[5, 6]]
    assert data.class_names == ("cat", "cow", "dog") and data.y_test.tolist() == [1]
    put(tmp_path, "a,c,y\n5,6,cow\n", "test.csv")
    refuse(tmp_path, "differ in the columns 'b', 'c'")
    (tmp_path / "train.csv").unlink()
    server = load_dataset(str(tmp_path))
    assert len(server.y_train) == 0 and server.x_test.tolist() == [[5, 6]]


def test_several_files_are_several_sets(tmp_path: Path):
    put(tmp_path, "a,y\n1,x\n2,z\n", "one.csv")
    put(tmp_path, "a,y\n3,x\n4,z\n", "two.csv")
    put(tmp_path, "who,when\nme,now\n", "notes.csv")
    refuse(tmp_path, r"2 data sets; choose one of .*:one\.csv, .*:two\.csv$")
    assert load_dataset(f"{tmp_path}:two.csv").x_train.tolist() == [[3], [4]]


def test_the_index_of_pandas_is_no_number(tmp_path: Path):
    data = load_dataset(str(put(tmp_path, ",a,y\n0,1.5,x\n1,2.5,z\n")))
    assert data.x_train.tolist() == [[1.5], [2.5]]
    assert data.notes == ("columns without a name are left out",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,x\nn/a,z\n", r"line 3: column 'a' holds 'n/a', expected a finite number"),
        ("a,y\n1,x\n,z\n", "line 3: column 'a' holds ''"),
        ("a,y\n1,x\nnan,z\n", "column 'a' holds 'nan'"),
        ("a,y\n1,x\n1e40,z\n", "beyond float32"),
        ("a,y\n1,x\n2\n", "line 3: got 1 cells, expected 2"),
        ("a,y\n1,x\n2, \n", "line 3: no 'y', expected a label"),
        ("a,y\n", "has a header and no rows"),
        ("y\n1\n2\n", "expected numbers beside the label"),
        ("a,a,y\n1,2,x\n", "two columns are named 'a'"),
        ("", "is empty, expected a first line"),
        ('a,y\n"1,x\n2,z\n', "not readable as CSV"),
        ("a,y,split\n1,x,before\n2,z,test\n", "split holds 'before', expected 'train' and 'test'"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, message: str):
    refuse(put(tmp_path, text), message)


def test_other_bytes(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"a,y\n1,\xff\xfe\n")
    refuse(tmp_path, "not readable as CSV")


def test_a_share_is_that_of_the_whole_set_and_others_rows_are_not_held(tmp_path: Path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 40)).astype(np.float32)
    lines = [",".join([*(f"{v:.9g}" for v in row), f"c{i % 3}"]) for i, row in enumerate(x)]
    put(tmp_path, "\n".join([",".join([*(f"f{i}" for i in range(40)), "y"]), *lines]) + "\n")
    source = load_source(str(tmp_path))
    whole = source.dataset()
    np.testing.assert_array_equal(whole.x_train, x)
    indices = np.arange(5, 3000, 100)
    tracemalloc.start()
    share = source.share(indices)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(share.x_train, x[indices])
    assert peak < 30 * 160 + source.reading_bytes
    put(tmp_path, "a,y\n1,x\n")
    with pytest.raises(ValueError, match=r"expected 41|has changed"):
        source.share(indices)


def test_room_is_asked_for_before_the_labels_are_read(tmp_path: Path):
    def room(needed_bytes: int, what: str, remedy: str) -> None:
        raise ValueError(f"{what} {remedy}")

    put(tmp_path, READINGS)
    with pytest.raises(ValueError, match=r"reading the labels in .*readings\.csv.*divide the file"):
        load_source(str(tmp_path), room)
