"""A device's own examples, and what loading them takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stored import WITH_CLIENTS, Stored, npz, npz_deflated, npz_jpeg

from fedlean.data.batches import Batch, ClientData
from fedlean.data.dataset import Dataset
from fedlean.data.load import load_dataset
from fedlean.runtime.remote import share as module
from fedlean.runtime.remote.room import TooLarge, resident_bytes
from fedlean.runtime.remote.share import Share, client_share, load_share, room_under

MB = 1_000_000


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "shards:2", "natural"])
@pytest.mark.parametrize("write", WITH_CLIENTS)
def test_draws_are_those_of_a_simulated_client(tmp_path: Path, write, scheme: str):
    """The device normalises with the federation's mean and deviation, here with the whole set's."""
    write(Stored(), tmp_path)
    whole = load_dataset(str(tmp_path))
    for client in range(4):
        share = Share(client, 4, scheme, seed=5)
        expected = client_share(whole, share)
        found = load_share(str(tmp_path), share)
        assert found.num_examples == expected.num_examples == len(found.dataset.y_train)
        for (x, y), (same, labels) in zip(draws(found, whole), draws(expected, whole), strict=True):
            assert x.tobytes() == same.tobytes()
            np.testing.assert_array_equal(y, labels)


def draws(data: ClientData, whole: Dataset) -> list[Batch]:
    dataset = replace(data.dataset, mean=whole.mean, std=whole.std)
    return list(ClientData(dataset, data.indices).draw(steps=3, batch_size=16, seed=9))


def test_no_client_number_means_all_examples():
    data = load_share("digits", Share())
    assert data.num_examples == 1438 and len(data.dataset.y_test) == 0
    np.testing.assert_array_equal(data.indices, np.arange(1438))


@pytest.mark.parametrize("client", [-1, 3])
def test_a_client_beyond_the_last(client: int):
    with pytest.raises(ValueError, match=f"client {client} of 3: expected 0 to the last"):
        load_share("digits", Share(client, 3))
    with pytest.raises(ValueError, match=f"client {client} of 3"):
        client_share(load_dataset("digits"), Share(client, 3))


def test_room_names_both_numbers_and_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "resident_bytes", lambda: 60 * MB)
    room = room_under(100 * MB)
    room(40 * MB, "something", "do less")
    with pytest.raises(
        TooLarge,
        match=r"^something needs 40\.1 MB, 40\.0 MB are free under the limit of 100 MB: do less, or"
        " raise --memory-limit$",
    ):
        room(40 * MB + 100_000, "something", "do less")


def test_a_share_that_does_not_fit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    npz(Stored(), tmp_path)
    monkeypatch.setattr(module, "resident_bytes", lambda: 60 * MB)
    load_share(str(tmp_path), Share(0, 4), limit_bytes=70 * MB)
    monkeypatch.setattr("fedlean.data.npz.take", lambda *_: pytest.fail("it was read"))
    with pytest.raises(TooLarge, match=r"labels of 184 examples in .*set\.npz needs 2\.0 MB, 1\.0"):
        load_share(str(tmp_path), Share(0, 4), limit_bytes=61 * MB)
    free = iter([60 * MB, 69 * MB])
    monkeypatch.setattr(module, "resident_bytes", lambda: next(free))
    with pytest.raises(TooLarge, match=r"loading 40 of 160 examples.*--client I/N with a larger N"):
        load_share(str(tmp_path), Share(0, 4), limit_bytes=70 * MB)


def test_scikit_learn_needs_room_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(TooLarge, match=r"'digits' comes, needs 100\.0 MB.*give a folder as --data"):
        load_share("digits", Share(0, 4), limit_bytes=resident_bytes() + 50 * MB)


LOAD = """
import sys
from pathlib import Path
from fedlean.runtime.flower import node

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

options = node.parser().parse_args(sys.argv[1:])
node._give_back_what_is_freed()
before = kilobytes("VmRSS:")
try:
    examples = node.device(options)._data.num_examples
except ValueError as error:
    examples = str(error)
print(before * 1024, kilobytes("VmHWM:") * 1024, examples, sep="\\n")
"""


def loaded(folder: Path, *more: str) -> tuple[int, int, str]:
    """Resident bytes before loading and at the peak, and how many examples, or why none."""
    where = ["--superlink", "127.0.0.1:9", "--data", str(folder), "--state", str(folder / "state")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *where, *more], capture_output=True, text=True, check=True
    )
    before, peak, examples = done.stdout.splitlines()
    return int(before), int(peak), examples


def many(count: int) -> Stored:
    """Images of 32 x 32: half of them noise, half of one colour."""
    stored = Stored(np.arange(count) % 10, np.arange(100) % 10)
    rng = np.random.default_rng(0)
    for name, n in (("x", count), ("x_test", 100)):
        x = rng.integers(0, 256, (n, 32, 32), np.uint8)
        x[::2] = x[::2, :1, :1]
        setattr(stored, name, x)
    return stored


def colour(stored: Stored, folder: Path) -> None:
    npz(stored, folder, lambda x: np.repeat(x[..., None], 3, -1), np.savez_compressed)


def doubles(stored: Stored, folder: Path) -> None:
    npz(stored, folder, lambda x: x[:, None] / 255.0)


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="VmHWM is Linux's")


@linux
@pytest.mark.parametrize(
    ("write", "count", "decoded_mb"),
    [(colour, 20_000, 61), (npz_jpeg, 20_000, 61), (doubles, 10_000, 41)],
)
def test_loading_stays_within_the_limit(
    tmp_path: Path, write: Callable[[Stored, Path], None], count: int, decoded_mb: int
):
    """A tenth of the set is what the process grows by, and some megabytes to read it."""
    if write is npz_jpeg:
        pytest.importorskip("PIL")
    write(many(count), tmp_path)
    before, peak, examples = loaded(tmp_path, "--client", "0/10", "--memory-limit", "128MB")
    assert examples == str(count // 10)
    assert peak < 128 * MB
    assert peak - before < decoded_mb * MB / 10 + 15 * MB
    before, peak, why = loaded(tmp_path, "--memory-limit", "64MB")
    assert f"loading {count} of {count} examples" in why and "limit of 64 MB" in why
    assert peak < 64 * MB, "nothing was loaded"


@linux
@pytest.mark.parametrize("write", [npz_deflated, doubles])
def test_the_smallest_limit_that_admits_a_share_holds(tmp_path: Path, write):
    """Each limit either refuses the share or is kept."""
    write(many(10_000), tmp_path)
    outcomes = []
    for megabytes in range(64, 84, 3):
        _, peak, examples = loaded(tmp_path, "--client", "1/3", "--memory-limit", f"{megabytes}MB")
        assert peak < megabytes * MB
        outcomes.append(examples.isdigit())
    assert outcomes == sorted(outcomes) and outcomes[-1]
