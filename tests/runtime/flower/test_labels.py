"""Labels are a global fact: a device may lack classes, and count or spell them as it likes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from answering import Devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlean.runtime.config import RunConfig
from fedlean.runtime.flower.serve import serve
from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.how import How
from fedlean.runtime.remote.dispatch import NobodyThere, Terms
from fedlean.runtime.run import start

SIDE = 4
RNG = np.random.Generator(np.random.Philox(5))
PROTOTYPES = RNG.integers(0, 256, (12, SIDE, SIDE))


def drawn(labels: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 (n, SIDE, SIDE) that show their label."""
    noise = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (len(labels), SIDE, SIDE))
    return (0.7 * PROTOTYPES[labels] + 0.3 * noise).astype(np.uint8)


SPELLINGS = {
    "int8": lambda y: y.astype(np.int8),
    "uint16": lambda y: y.astype(np.uint16),
    "float32": lambda y: y.astype(np.float32),
    "float64": lambda y: y.astype(np.float64),
    "text": lambda y: y.astype(str),
    "bytes": lambda y: y.astype("S3"),
}


def saved(
    folder: Path,
    x: np.ndarray,
    y: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    client: np.ndarray | None = None,
) -> str:
    """One .npz with a training and a test part, and who owns each example."""
    folder.mkdir(parents=True)
    split = np.repeat([0, 1], [len(y), len(test[1])])
    owners = (
        {} if client is None else {"client": np.concatenate([client, np.zeros(len(test[1]), int)])}
    )
    np.savez(
        folder / "set.npz",
        x=np.concatenate([x, test[0]]),
        y=np.concatenate([y, test[1]]),
        split=split,
        **owners,
    )
    return str(folder)


def deployed(data: str, folders: list[str], out: Path, nodes: Path) -> dict[str, object]:
    config = RunConfig(
        "fedavg",
        data,
        "mlp_13_7",
        clients=len(folders),
        rounds=2,
        partition="natural",
        settings={"local_steps": 2, "batch_size": 5},
    )
    terms = Terms(min_clients=len(folders), join_seconds=0.05, poll_seconds=0.01)
    return serve(Devices(nodes, folders), ServerSettings(config, terms, out))


@st.composite
def federations(draw):
    """What each of two to four devices holds: some classes of a run's, in its own spelling."""
    first = draw(st.sampled_from([0, 1, 3]))
    classes = np.arange(first, first + draw(st.integers(2, 6)))
    devices = draw(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from(classes.tolist()), min_size=1, max_size=4, unique=True),
                st.sampled_from(sorted(SPELLINGS)),
            ),
            min_size=2,
            max_size=4,
        )
    )
    held = [
        np.array(draw(st.lists(st.sampled_from(own), min_size=9, max_size=9))) for own, _ in devices
    ]
    spellings = [spelling for _, spelling in devices]
    stranger = draw(st.booleans()) and draw(st.booleans())  # one device in four has another class
    return classes, held, spellings, stranger


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(federation=federations(), spelling=st.sampled_from(sorted(SPELLINGS)))
def test_a_deployed_run_is_the_local_one_bit_for_bit_or_refused(
    tmp_path_factory, federation, spelling
):
    classes, held, spellings, stranger = federation
    base = tmp_path_factory.mktemp("labels")
    y, owner = np.concatenate(held), np.repeat(np.arange(len(held)), 9)
    x, test_y = drawn(y, 0), np.tile(classes, 2)
    write = SPELLINGS[spelling]
    test = (drawn(test_y, 1), write(test_y))
    data = saved(base / "all", x, write(y), test, owner)
    if stranger:
        held[0] = np.where(np.arange(9) == 4, 11, held[0])
    folders = []
    for i, (own, mine) in enumerate(zip(spellings, held, strict=True)):
        write = SPELLINGS[own]
        few = (drawn(mine[:2], 2), write(mine[:2]))
        folders.append(saved(base / f"device{i}", x[owner == i], write(mine), few))
    if stranger:
        with pytest.raises(NobodyThere, match=r"holds the classes.*'11' must be renamed"):
            deployed(data, folders, base / "run", base / "nodes")
        assert not (base / "run" / "rounds.jsonl").read_bytes(), "not one round was run"
        return
    deployed(data, folders, base / "run", base / "nodes")
    local = RunConfig(
        "fedavg",
        data,
        "mlp_13_7",
        rounds=2,
        partition="natural",
        settings={"local_steps": 2, "batch_size": 5},
    )
    start(local, base / "local", How())
    model = "model.safetensors"
    assert (base / "run" / model).read_bytes() == (base / "local" / model).read_bytes()


def idx(folder: Path, part: str, x: np.ndarray, y: np.ndarray) -> None:
    for kind, array in (("images-idx3", x), ("labels-idx1", y.astype(np.uint8))):
        head = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
        (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scikit-learn's, as bytes up to 255: training and test images and labels."""
    from fedlean.data.load import load_dataset

    data = load_dataset("digits")
    x, test = (
        (16 * each[:, 0].clip(max=15)).astype(np.uint8) for each in (data.x_train, data.x_test)
    )
    return x, data.y_train, test, data.y_test


@pytest.mark.parametrize("case", ["idx", "idx from 1", "npz", "npz from 1", "npz text"])
def test_two_devices_with_three_and_seven_and_with_the_others(tmp_path, case):
    """Within two points of the same shares in one process: labels keep their meaning."""
    x, y, test, test_y = digits()
    first = np.isin(y, (3, 7))
    shift = 1 if "from 1" in case else 0
    names = np.array([f"digit {i}" for i in range(10)])
    folders = []
    for i, mine in enumerate((first, ~first)):
        folder = tmp_path / f"device{i}"
        if case.startswith("idx"):
            folder.mkdir()
            idx(folder, "train", x[mine], y[mine] + shift)
            idx(folder, "t10k", x[mine][:4], y[mine][:4] + shift)
            folders.append(str(folder))
        else:
            own = names[y[mine]] if "text" in case else y[mine] + shift
            folders.append(saved(folder, x[mine], own, (x[mine][:4], own[:4])))
    kept, kept_test = (names[y], names[test_y]) if "text" in case else (y + shift, test_y + shift)
    data = saved(tmp_path / "all", x, kept, (test, kept_test), (~first).astype(int))
    accuracy = []
    for where in ("deployed", "local"):
        config = RunConfig(
            "fedavg",
            data,
            "lenet300",
            clients=2,
            rounds=60,
            partition="natural",
            eval_every=60,
            settings={"local_steps": 5, "batch_size": 20},
        )
        if where == "deployed":
            terms = Terms(min_clients=2, join_seconds=1.0, poll_seconds=0.001)
            devices = Devices(tmp_path / "nodes", folders)
            summary = serve(devices, ServerSettings(config, terms, tmp_path / "run"))
        else:
            summary = start(config, tmp_path / "local", How())
        accuracy.append(summary["final_accuracy"])
    assert abs(accuracy[0] - accuracy[1]) <= 0.02 and accuracy[1] > 0.8, accuracy
    assert accuracy[0] == accuracy[1], "the same examples in the same order are the same bits"
