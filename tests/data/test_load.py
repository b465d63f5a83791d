from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlean.data.load import available, load_dataset

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
    with pytest.raises(ValueError, match=r"passed over: text.npz with \['text'\].*looked for IDX"):
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
