"""Who trains a stage: communities of clients that learn alike, and in each the most useful ones.

SmartFreeze (arXiv 2408.09101) divides clients into communities by the cosine similarity of their
updates of the output module.  Its detection is called "RL-CD", of which no more is known; here it
is Louvain's (Blondel et al., "Fast unfolding of communities in large networks", 2008).  Within a
community a client is worth Oort's utility (Lai et al., OSDI 2021):

    |B| · sqrt(1/|B| Σ loss²) · (T / t)^α, the last factor for who is slower than T

The rest is ours: a client is remembered by a small random projection of its update.  Places in a
round are shared over the communities in proportion to their size.  Who has not been heard from yet
forms a group of its own, so that its share of the places goes to finding out.
"""

# C clients heard from, k numbers of a sketch, N clients to choose from

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlean.algorithm import Device
from fedlean.core import Params, derive_seed, generator
from fedlean.train.cohort import sample_cohort

SKETCH = 256  # k: the error of a cosine is about 1/√k
NEIGHBOURS = 10  # of a client in the graph: of all C² edges, 5000 clients would have millions
LEAST = 1e-6  # of the largest utility: nobody is ruled out
NOBODY = -1  # the community of those not heard from
_ROWS = 512  # of similarities at a time

Known = Mapping[str, np.ndarray]  # of the clients heard from, as checkpoints hold it


class Heard(NamedTuple):
    """One client's answer, as far as the choice of the next cohorts needs it."""

    sketch: np.ndarray  # float32 (k,)
    examples: int
    squared_loss: float  # mean of loss²


def check_louvain() -> None:
    """Raises ValueError with the remedy where networkx is missing."""
    if importlib.util.find_spec("networkx") is None:
        raise ValueError(
            "communities of clients are found by networkx, which is not installed: "
            "pip install 'fedlean[sim]', or set select=false"
        )


def sketch(moves: Params, seed: int) -> np.ndarray:
    """float32 (k,) of the moves of some tensors; inner products are kept, but for an error of 1/√k.

    Each coordinate is added to one of k sums with a random sign, both drawn by the seed (feature
    hashing, Weinberger et al., ICML 2009).
    """
    total = np.zeros(SKETCH)
    for name in sorted(moves):
        values = moves[name].reshape(-1)
        drawn = generator(seed, 0, 0, f"sketch/{name}").integers(0, 2 * SKETCH, values.size)
        signed = np.where(drawn & 1, values, -values)
        total += np.bincount(drawn >> 1, weights=signed, minlength=SKETCH)
    return total.astype(np.float32)


def nobody() -> Known:
    """No client has been heard from."""
    return {
        "clients": np.zeros(0, np.int64),  # (C,), ascending
        "sketches": np.zeros((0, SKETCH), np.float32),
        "examples": np.zeros(0, np.int64),
        "squared_losses": np.zeros(0),
        "communities": np.zeros(0, np.int64),  # (C,), from 0
    }


def remember(known: Known, heard: Mapping[int, Heard], seed: int) -> Known:
    """`known` with the last answer of each client, and its communities found anew."""
    if not heard:
        return known
    held = {
        int(client): Heard(sketch, int(examples), float(loss))
        for client, sketch, examples, loss in zip(
            *(known[key] for key in ("clients", "sketches", "examples", "squared_losses")),
            strict=True,
        )
    }
    held |= heard
    clients = sorted(held)
    sketches = np.stack([held[client].sketch for client in clients])
    return {
        "clients": np.array(clients, np.int64),
        "sketches": sketches,
        "examples": np.array([held[client].examples for client in clients], np.int64),
        "squared_losses": np.array([held[client].squared_loss for client in clients]),
        "communities": communities(sketches, seed),
    }


def communities(sketches: np.ndarray, seed: int) -> np.ndarray:
    """The community of each of C clients, from 0, int64 (C,); sketches (C, k).

    Louvain's method on the graph in which each client is joined to the NEIGHBOURS most similar to
    it (ours), as far as their cosine is positive, with the cosine as the weight.
    """
    from networkx import Graph
    from networkx.algorithms.community import louvain_communities

    graph: Any = Graph()
    graph.add_nodes_from(range(len(sketches)))
    graph.add_weighted_edges_from(_edges(sketches))
    found = louvain_communities(graph, seed=seed)
    labels = np.zeros(len(sketches), np.int64)
    for number, members in enumerate(sorted(map(sorted, found))):
        labels[members] = number
    return labels


def _edges(sketches: np.ndarray) -> Iterator[tuple[int, int, float]]:
    norms = np.linalg.norm(sketches, axis=1, keepdims=True)
    unit = np.divide(sketches, norms, out=np.zeros_like(sketches), where=norms > 0)
    most = min(NEIGHBOURS, len(unit) - 1)
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        for row, values in enumerate(cosines, start):
            values[row] = -1.0
            # a stable order of rounded values: the last bits are not the same on every machine
            near = np.argsort(-np.round(values, 6), kind="stable")[:most]
            for other in near[values[near] > 5e-7].tolist():
                yield row, other, round(float(values[other]), 6)


def utility(examples: float, squared_loss: float) -> float:
    """Oort's statistical utility, |B| · sqrt(1/|B| Σ loss²)."""
    return examples * float(np.sqrt(squared_loss))


def system_term(seconds: np.ndarray, penalty: float) -> np.ndarray:
    """Oort's (T / t)^α where t > T, else 1; T is the median of `seconds` (N,) (ours)."""
    preferred = np.median(seconds)
    slower = seconds > preferred
    return np.where(slower, preferred / np.where(slower, seconds, 1.0), 1.0) ** penalty


def places(sizes: Sequence[int], count: int, at: int) -> list[int]:
    """`count` places shared over groups in proportion to their sizes; nowhere more than members.

    at: from 0 to the sum of the sizes, drawn by the caller.  A share that is no whole number is
    rounded up or down by it (systematic sampling), so that over all `at` it is met exactly and
    no small group is left out for good.

    >>> [places([4, 4, 2], 4, at) for at in (0, 5)]
    [[1, 2, 1], [2, 1, 1]]
    """
    total, before, found = sum(sizes), at, []
    for size in sizes:
        after = before + count * size
        found.append(after // total - before // total)
        before = after
    return found


def choose(
    devices: Sequence[Device],
    size: int,
    known: Known,
    seconds: Iterable[float],
    *,
    penalty: float,
    seed: int,
    round: int,
) -> list[int]:
    """Ids of `size` of the devices, ascending; all where there are no more.

    seconds: of a round on each of `devices`.  penalty: α.  A pure function of its arguments.
    """
    if size >= len(devices):
        return sorted(device.id for device in devices)
    speed = dict(
        zip(
            (device.id for device in devices),
            system_term(np.array([*seconds]), penalty),
            strict=True,
        )
    )
    clients = known["clients"].tolist()
    useful = map(utility, known["examples"], known["squared_losses"])
    worth = dict(zip(clients, useful, strict=True))
    label = dict(zip(clients, known["communities"].tolist(), strict=True))
    groups: dict[int, list[Device]] = {}
    for device in sorted(devices, key=lambda device: device.id):
        groups.setdefault(label.get(device.id, NOBODY), []).append(device)
    ordered = sorted(groups)
    sizes = [len(groups[number]) for number in ordered]
    at = int(generator(seed, round, 0, "places").integers(len(devices)))
    chosen: list[int] = []
    for number, count in zip(ordered, places(sizes, size, at), strict=True):
        members = groups[number]
        utilities = [worth.get(one.id, 1.0) * speed[one.id] for one in members]
        # one group draws as `sample_cohort` does; of several each has a stream of its own
        own = seed if len(groups) == 1 else derive_seed(seed, round, number, "community")
        chosen += draw(members, count, utilities, seed=own, round=round)
    return sorted(chosen)


def draw(
    devices: Sequence[Device], size: int, utilities: Sequence[float], *, seed: int, round: int
) -> list[int]:
    """Ids of `size` of the devices, one after the other with probabilities as their utilities.

    Of equal utilities it is `sample_cohort`, the uniform draw, number for number.
    """
    values = np.array(utilities)
    if size >= len(devices) or (values == values[0]).all():
        return sample_cohort(devices, size, seed=seed, round=round)
    values = np.maximum(values, LEAST * values.max())
    drawn = generator(seed, round, 0, "utility").choice(
        len(devices), size, replace=False, p=values / values.sum()
    )
    return sorted(devices[position].id for position in drawn)
