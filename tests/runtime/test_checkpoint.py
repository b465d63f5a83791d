"""States on disk: bit-exact round trip, and falling back when the newest one was cut short."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import params
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from fedlean.core import SubModel
from fedlean.methods.prunefl import State
from fedlean.runtime import checkpoint
from fedlean.runtime.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    state_tree,
    write_atomically,
)

DTYPES = ["float32", "float64", "float16", "int64", "int32", "uint8", "int8", "bool"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
LEAVES = st.one_of(
    ARRAYS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)
)
KEYS = st.text(alphabet="ab/.0", max_size=4)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.dictionaries(KEYS, inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def identical(left: Any, right: Any) -> bool:
    """The same types all the way down, the same bits at the leaves."""
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(identical(left[key], right[key]) for key in left)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        same_form = (left.dtype, left.shape) == (right.dtype, right.shape)
        return same_form and left.tobytes() == right.tobytes()
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return left == right


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, {"step": step, "w": np.full(50, step, np.float32)})


def newest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def falls_back_to(folder: Path, step: int) -> str:
    """The line that says so."""
    tree, (line,) = load_checkpoint(folder)
    assert identical(tree, {"step": step, "w": np.full(50, step, np.float32)})
    return line


# Round trip


@settings(max_examples=80, deadline=None)
@given(TREES)
def test_any_tree_comes_back_bit_for_bit(tree):
    with tempfile.TemporaryDirectory() as name:
        save_checkpoint(Path(name), 7, tree)
        back, skipped = load_checkpoint(Path(name))
    assert not skipped
    assert identical(back, tree)


def test_keys_with_slashes_do_not_collide(tmp_path):
    tree = {"a/b": np.zeros(2), "a": {"b": np.ones(3)}}
    save_checkpoint(tmp_path, 1, tree)
    assert identical(load_checkpoint(tmp_path)[0], tree)


def test_special_values(tmp_path):
    tree = {
        "floats": (0.1, -0.0, float("inf"), float("nan"), 5e-324),
        "array": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "big": 2**80,
        "text": 'ä\n"\0',
        "empty": {},
        "none": ((), None, True, False, 1, 1.0),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(10)[::-2],
        "zero_d": {"bool": np.array(True), "int": np.array(-3), "float": np.array(0.5, np.float32)},
    }
    save_checkpoint(tmp_path, 1, tree)
    assert identical(load_checkpoint(tmp_path)[0], tree)


def test_a_method_state(tmp_path):
    masks = {"fc1.weight": params()["fc1.weight"] > 0}
    state = State(3, "train", params(), masks, reconfigurations=2, initial_sent=True)
    save_checkpoint(tmp_path, 3, {"state": state_tree(state)})
    back = State(**load_checkpoint(tmp_path)[0]["state"])
    assert identical(state_tree(back), state_tree(state))


@pytest.mark.parametrize("value", [SubModel(), {1, 2}, b"bytes", 1j, np.float32(1)])
def test_what_cannot_be_kept_is_refused_by_name(tmp_path, value):
    with pytest.raises(TypeError, match=f"{type(value).__name__} at .*inner"):
        save_checkpoint(tmp_path, 1, {"outer": {"inner": value}})
    assert not list(tmp_path.iterdir())


# The two newest


def test_only_the_two_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 10, 200)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{step:08d}.{kind}" for step in (10, 200) for kind in ("json", "safetensors")]
    tree, skipped = load_checkpoint(tmp_path)
    assert tree["step"] == 200 and not skipped


def test_same_step_again_overwrites(tmp_path):
    write(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, {"step": "again"})
    assert load_checkpoint(tmp_path) == ({"step": "again"}, [])
    assert len(list(tmp_path.iterdir())) == 4


# Cut short


def test_truncated_at_every_length(tmp_path):
    write(tmp_path, 1, 2)
    path = newest(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        line = falls_back_to(tmp_path, 1)
        assert "00000002.safetensors" in line and "using the one before" in line


def test_any_flipped_byte(tmp_path):
    write(tmp_path, 1, 2)
    path = newest(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        assert "digest" in falls_back_to(tmp_path, 1)


def test_grown(tmp_path):
    write(tmp_path, 1, 2)
    path = newest(tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    falls_back_to(tmp_path, 1)


def test_sidecar_truncated_at_every_length(tmp_path):
    write(tmp_path, 1, 2)
    path = newest(tmp_path).with_suffix(".json")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "00000002" in falls_back_to(tmp_path, 1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"bytes": 3}',
        b'{"bytes": "3", "blake2b": 5}',
        b"\0" * 70,
    ],
)
def test_sidecar_garbage(tmp_path, garbage):
    write(tmp_path, 1, 2)
    newest(tmp_path).with_suffix(".json").write_bytes(garbage)
    assert "00000002" in falls_back_to(tmp_path, 1)


def test_sidecar_missing(tmp_path):
    write(tmp_path, 1, 2)
    newest(tmp_path).with_suffix(".json").unlink()
    assert "cut short" in falls_back_to(tmp_path, 1)


def test_tensors_missing(tmp_path):
    write(tmp_path, 1, 2)
    newest(tmp_path).unlink()
    assert load_checkpoint(tmp_path)[0]["step"] == 1


def test_both_damaged(tmp_path):
    write(tmp_path, 1, 2)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint(tmp_path)


def test_none(tmp_path):
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint(tmp_path / "absent")


def test_whole_ones_survive_newer_damaged_ones(tmp_path):
    """After falling back, two whole checkpoints are kept again, whatever the damaged one is."""
    write(tmp_path, 10, 20)
    newest(tmp_path).write_bytes(b"cut")
    write(tmp_path, 12, 14)
    newest_whole = tmp_path / "00000014.safetensors"
    assert load_checkpoint(tmp_path)[0]["step"] == 14
    newest_whole.write_bytes(b"cut")
    assert load_checkpoint(tmp_path)[0]["step"] == 12


# Atomic writing


def test_leftovers_of_a_killed_writer_are_harmless(tmp_path):
    write(tmp_path, 1, 2)
    for name in ("00000003.safetensors.tmp", "00000003.json.tmp", "00000002.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    tree, skipped = load_checkpoint(tmp_path)
    assert tree["step"] == 2 and not skipped
    write(tmp_path, 3)
    assert load_checkpoint(tmp_path)[0]["step"] == 3


@pytest.mark.parametrize("step", ["fsync", "write", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, step, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail(*_):
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        opened = Path.open

        def open_half(self, mode="r", **rest):
            file = opened(self, mode, **rest)
            return Half(file) if mode[0] in "wx" else file

        monkeypatch.setattr(Path, "open", open_half)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new content")
    assert (path.read_bytes() if path.exists() else None) == before


class Half:
    """A file on a full disk."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(28, "No space left on device")


def test_a_failing_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)
    real, calls = checkpoint.write_atomically, []

    def second_fails(path: Path, data: bytes) -> None:
        calls.append(path)
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", second_fails)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 3)
    assert [path.suffix for path in calls] == [".safetensors", ".json"]  # the digest comes last
    assert "cut short" in falls_back_to(tmp_path, 2)


# Files of others


def test_any_flipped_bit_of_either_file_falls_back(tmp_path):
    write(tmp_path, 1, 2)
    for path in (newest(tmp_path), newest(tmp_path).with_suffix(".json")):
        whole = path.read_bytes()
        for at in range(len(whole)):
            for bit in (0, 5, 7):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
                assert "using the one before" in falls_back_to(tmp_path, 1)
        path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[1] == []


@pytest.mark.parametrize("kinds", [("safetensors",), ("json",), ("safetensors", "json")])
def test_exchanged_files_are_unusable(tmp_path, kinds):
    """Also where both are: a checkpoint is of the step in its name."""
    write(tmp_path, 1, 2)
    for kind in kinds:
        one, two = (tmp_path / f"0000000{step}.{kind}" for step in (1, 2))
        one.rename(tmp_path / "aside")
        two.rename(one)
        (tmp_path / "aside").rename(two)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint(tmp_path)


def test_a_later_number_does_not_make_it_the_newest(tmp_path):
    """An old state under another name, with a sidecar to match, is still of its own step."""
    write(tmp_path, 1, 2)
    for kind in ("safetensors", "json"):
        copied = (tmp_path / f"00000001.{kind}").read_bytes()
        (tmp_path / f"00000009.{kind}").write_bytes(copied.replace(b'"step": 1', b'"step": 9'))
    tree, (line,) = load_checkpoint(tmp_path)
    assert tree["step"] == 2 and "it is of step 1" in line


@pytest.mark.parametrize(
    "sidecar", [b"[" * 500, b"[" * 10**6, b"\xff" * 10, b'{"step": 2, "step": 2}']
)
def test_a_sidecar_of_others(tmp_path, sidecar):
    write(tmp_path, 1, 2)
    newest(tmp_path).with_suffix(".json").write_bytes(sidecar)
    falls_back_to(tmp_path, 1)


def of_a_tree(folder: Path, step: int, metadata: dict[str, str]) -> None:
    """A checkpoint whose digest is right, whatever it says."""
    data = save({"0/w": np.zeros(3, np.float32)}, metadata=metadata)
    (folder / f"{step:08d}.safetensors").write_bytes(data)
    (folder / f"{step:08d}.json").write_bytes(checkpoint._sidecar(step, data))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tree": "[" * 10**5},
        {"tree": '{"map":' * 300 + "{}" + "}" * 300},
        {"tree": '{"map": {"a": {"map": 3}}}'},
        {"tree": '{"map": {"a": {"array": "none", "scalar": false}}}'},
        {"tree": '{"value": 3}'},
        {"tree": "null"},
        {"tree": '{"map": {}}', "step": "7"},
    ],
)
def test_a_digest_that_is_right_over_a_tree_that_is_not(tmp_path, metadata):
    write(tmp_path, 1)
    of_a_tree(tmp_path, 2, metadata)
    assert "00000002" in falls_back_to(tmp_path, 1)


def test_checkpoints_of_early_versions_do_not_say_their_step(tmp_path):
    tree = {"map": {"w": {"array": "0/w", "scalar": False}}}
    of_a_tree(tmp_path, 2, {"tree": json.dumps(tree)})
    assert identical(load_checkpoint(tmp_path)[0], {"w": np.zeros(3, np.float32)})


def test_other_files_and_folders_are_left_alone(tmp_path):
    write(tmp_path, 1, 2)
    for name in ("notes.json", "notes.txt", "7.safetensors", "00000001"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "00000001.json.d").mkdir()
    write(tmp_path, 3)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"notes.json", "notes.txt", "7.safetensors", "00000001", "00000001.json.d"} <= left
    assert "00000001.safetensors" not in left
    tree, skipped = load_checkpoint(tmp_path)
    assert tree["step"] == 3 and all("not the number of a step" in line for line in skipped)


def test_a_link_in_place_of_the_folder_is_not_cleaned_up(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, 1, 2)
    (tmp_path / "checkpoint").symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    with pytest.raises(ValueError, match="is a link, expected a folder of the run's own"):
        write(tmp_path / "checkpoint", 3)
    with pytest.raises(ValueError, match="is a link, expected a folder of the run's own"):
        load_checkpoint(tmp_path / "checkpoint")
    assert sorted(elsewhere.iterdir()) == before


def test_the_command_that_begins_anew(tmp_path):
    write(tmp_path / "my run/checkpoint", 1)
    newest(tmp_path / "my run/checkpoint").write_bytes(b"")
    with pytest.raises(ValueError, match="to begin it anew: rm -r ") as error:
        load_checkpoint(tmp_path / "my run/checkpoint")
    folder = f"'{tmp_path}/my run'"
    assert f"rm -r {folder}/checkpoint && fedlean resume {folder}" in str(error.value)
    assert "0 bytes of" in str(error.value)
