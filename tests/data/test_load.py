from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored import FORMATS, Stored, leaf

from fedlean.data.load import absolute, available, load_dataset

ARRAYS = {
    "x": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    "y": np.array([0, 0]),
    "split": np.array([0, 1]),
}


def test_available_names_the_built_in_set():
    entries = available()
    assert load_dataset(entries[0][0]).name == "digits"
    assert all(name and line and "\n" not in line for name, line in entries)


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(ValueError, match=r"'digit': no such folder.*did you mean 'digits'"):
        load_dataset("digit")


@pytest.mark.parametrize("text", ["", "/no/such/folder", "/no/such:name", ":", "a:b:c"])
def test_what_does_not_exist(text: str):
    with pytest.raises(ValueError, match="no such folder, expected a folder or a built-in"):
        load_dataset(text)


def test_a_file_is_not_a_folder(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, **ARRAYS)
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        load_dataset(str(path))


def test_nothing_recognised_says_what_was_looked_for(tmp_path: Path):
    np.savez(tmp_path / "text.npz", text=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"passed over: text.npz with \['text'\].*looked there.*IDX"
    ):
        load_dataset(str(tmp_path))


def test_several_npz_files_and_a_colon_in_the_folder(tmp_path: Path):
    folder = tmp_path / "my:data"
    folder.mkdir()
    np.savez(folder / "one.npz", **ARRAYS)
    assert load_dataset(str(folder)).name == "my:data"
    np.savez(folder / "two.npz", **ARRAYS)
    with pytest.raises(ValueError, match=r"2 data sets; choose one of .*:one\.npz, .*:two\.npz"):
        load_dataset(str(folder))
    assert load_dataset(f"{folder}:two.npz").name == "two"


def put(folder: Path, name: str = "set.npz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **ARRAYS)
    return folder


@pytest.mark.parametrize("below", ["raw", "MNIST/raw", "my:data/raw"])
def test_a_set_one_or_two_levels_deeper(tmp_path: Path, below: str):
    put(tmp_path / below)
    (tmp_path / "empty" / "other").mkdir(parents=True)
    assert load_dataset(str(tmp_path)).name == tmp_path.name
    assert load_dataset(f"{tmp_path}:set.npz").name == tmp_path.name


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_is_found_deeper(tmp_path: Path, write):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    write(Stored(), folder)
    assert len(load_dataset(str(tmp_path)).y_train) == 160


def test_three_levels_are_too_deep(tmp_path: Path):
    put(tmp_path / "a/b/c")
    with pytest.raises(ValueError, match=r"recognises; looked there and 2 levels down"):
        load_dataset(str(tmp_path))


def test_several_sets_deeper_are_listed(tmp_path: Path):
    one, two = put(tmp_path / "a"), put(tmp_path / "b/raw")
    choices = rf"2 data sets; choose one of {one}:set\.npz, {two}:set\.npz$"
    for text in (str(tmp_path), f"{tmp_path}:set.npz"):
        with pytest.raises(ValueError, match=choices):
            load_dataset(text)
    assert load_dataset(f"{two}:set.npz").name == "raw"
    put(tmp_path / "b/raw", "other.npz")
    assert load_dataset(f"{tmp_path}:other.npz").name == "other"
    with pytest.raises(ValueError, match=r"no data set named 'third\.npz'; expected one of "):
        load_dataset(f"{tmp_path}:third.npz")


def test_a_set_in_the_folder_itself_comes_first(tmp_path: Path):
    put(tmp_path)
    put(tmp_path / "raw", "deeper.npz")
    assert load_dataset(str(tmp_path)).name == tmp_path.name
    with pytest.raises(ValueError, match=r"no data set named 'deeper\.npz'"):
        load_dataset(f"{tmp_path}:deeper.npz")


def test_a_set_that_is_found_is_not_searched_for_more(tmp_path: Path):
    """LEAF's folder may be called data, which is seen from above it too."""
    leaf(Stored(), put_folder(tmp_path / "femnist/data"))
    assert len(load_dataset(str(tmp_path)).y_train) == 160


def put_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_hidden_folders_are_passed_over(tmp_path: Path):
    put(tmp_path / ".cache")
    with pytest.raises(ValueError, match="holds no data set"):
        load_dataset(str(tmp_path))


def test_what_is_missing_says_what_to_give():
    with pytest.raises(ValueError, match=r"give the path of the folder.*'fedlean datasets' lists"):
        load_dataset("/no/such/folder")


def test_a_name_means_the_same_from_every_folder(tmp_path, monkeypatch):
    (tmp_path / "sets" / "a:b").mkdir(parents=True)
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "sets"))
    assert absolute("digits") == "digits", "the built-in one, as the loader takes it"
    assert absolute("sets") == str(tmp_path / "sets") == absolute("~") == absolute("./sets/")
    assert absolute("sets/a:b") == str(tmp_path / "sets" / "a:b") == absolute("~/a:b")
    assert absolute("sets:emnist-letters") == f"{tmp_path / 'sets'}:emnist-letters"
    assert absolute("~:x.npz") == f"{tmp_path / 'sets'}:x.npz" and absolute("sets:") == (
        f"{tmp_path / 'sets'}:"
    )
    for missing in ("", "nowhere", "no:where", "~/nothing"):
        assert absolute(missing) == missing
