"""Who holds which training examples: iid, dirichlet:A[:M], natural and shards:K.

Every partition is disjoint, covers all training examples, leaves no client empty, and is a pure
function of (text, labels, ids, number of clients, seed).  The test set is not divided.
"""

# N clients, n training examples

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from fedlean.core import generator

Parts = list[np.ndarray]  # per client, sorted int64 indices into the training set
FORMS = {"iid": "iid", "dirichlet": "dirichlet:A", "natural": "natural", "shards": "shards:K"}
ATTEMPTS = 1000  # Dirichlet draws before giving up; one costs classes x N numbers
FULL_MINIMUM = 10  # examples per client, as in Li et al.'s benchmark (below)
ALPHA_RANGE = (1e-3, 1e6)  # beyond: one class per client in all but name, and iid


class Labelled(Protocol):
    """What dealing out needs to know: a `Dataset`, or a `Source` whose examples are not read."""

    @property
    def name(self) -> str: ...
    @property
    def y_train(self) -> np.ndarray: ...  # int64 (n,)
    @property
    def clients(self) -> np.ndarray | None: ...  # int32 (n,)


def partition(text: str, dataset: Labelled, clients: int | None, seed: int) -> Parts:
    """The share of each client, N = `clients` arrays of sorted int64 training indices.

    iid: a shuffle cut into N parts that differ by at most 1.
    dirichlet:A: label skew (see `dirichlet`); small A, strong skew.  dirichlet:A:M: at least M
    examples for each client, in place of its own minimum.
    natural: by the data set's client ids; clients=None gives one client per id (see `natural`).
    shards:K: sorted by label, cut into N·K shards, K to each client (McMahan et al. 2017).

    Raises ValueError when the text cannot be read, the data has too few examples or ids for N
    clients, or no draw gave every client enough.

    >>> from fedlean.data.dataset import Dataset
    >>> x, y = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), np.array([0, 1, 0, 1, 0, 1])
    >>> data = Dataset.from_images("tiny", (x, y), (x, y), classes=2, scale=255.0)
    >>> [share.tolist() for share in partition("shards:1", data, 2, seed=0)]
    [[1, 3, 5], [0, 2, 4]]
    """
    text, minimum = _minimum(text)
    scheme, argument = _parse(text)
    if scheme == "natural":
        return natural(dataset, clients)
    if clients is None:
        raise ValueError(
            f"partition {text!r} needs a number of clients, got none; only 'natural' has one"
        )
    labels = dataset.y_train
    shares = clients * int(argument) if scheme == "shards" else clients
    if clients < 1 or shares > len(labels):
        wanted = f" with {argument:g} shards each" if scheme == "shards" else ""
        raise ValueError(
            f"partition {text!r}: got {clients} clients{wanted}, expected at least 1 client and"
            f" at most one share per training example ({len(labels)})"
        )
    if scheme == "dirichlet":
        return dirichlet(labels, clients, argument, seed, minimum)
    if scheme == "shards":
        return shards(labels, clients, int(argument), seed)
    return iid(len(labels), clients, seed)


def iid(examples: int, clients: int, seed: int) -> Parts:
    """A shuffle of 0..examples-1 cut into `clients` parts that differ by at most 1."""
    order = generator(seed, 0, 0, "partition").permutation(examples)
    return [np.sort(part) for part in np.array_split(order, clients)]


def shards(labels: np.ndarray, clients: int, each: int, seed: int) -> Parts:
    """Examples sorted by label, cut into clients · each shards; `each` random ones per client.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017.  labels: int64 (n,).  Shards differ by at most 1 example.
    """
    pieces = np.array_split(np.argsort(labels, kind="stable"), clients * each)
    dealt = generator(seed, 0, 0, "partition").permutation(clients * each).reshape(clients, each)
    return [np.sort(np.concatenate([pieces[i] for i in hand])) for hand in dealt]


def dirichlet(
    labels: np.ndarray, clients: int, alpha: float, seed: int, minimum: int | None = None
) -> Parts:
    """Each class divided among the clients in proportions drawn from Dirichlet(α, ..., α).

    The per-class form (Yurochkin et al. 2019; Li et al. 2022, "Federated Learning on Non-IID Data
    Silos"), not the per-client one of Hsu et al. 2019: it uses every example once, and clients
    differ in size too.  A draw in which a client gets fewer than the minimum (for None 10, or a
    tenth of an equal share where that is less, at least 1) is drawn again with a derived seed.

    labels: int64 (n,).  Raises ValueError when ATTEMPTS draws have not given every client enough.
    """
    if minimum is None:
        minimum = max(1, min(FULL_MINIMUM, len(labels) // (10 * clients)))
    if minimum * clients > len(labels):
        raise ValueError(
            f"partition 'dirichlet:{alpha:g}:{minimum}': {clients} clients with {minimum} examples"
            f" each need {minimum * clients}, there are {len(labels)}; give a smaller minimum"
        )
    members = [np.flatnonzero(labels == value) for value in np.unique(labels)]
    sizes = np.array([len(each) for each in members])
    for attempt in range(ATTEMPTS):
        rng = generator(seed, 0, 0, f"partition/{attempt}" if attempt else "partition")
        cuts = _cuts(rng.dirichlet(np.full(clients, alpha), len(sizes)), sizes)
        if np.diff(cuts, axis=1).sum(axis=0).min() >= minimum:
            return _deal(rng, members, cuts)
    raise ValueError(
        f"partition 'dirichlet:{alpha:g}': {ATTEMPTS} draws of {len(labels)} examples over"
        f" {clients} clients left one with fewer than {minimum}; give fewer clients, a larger A,"
        f" or a smaller minimum, as dirichlet:{alpha:g}:1"
    )


def natural(dataset: Labelled, clients: int | None) -> Parts:
    """The training examples by client id, ids in ascending order.

    Fewer clients than ids: runs of consecutive ids are merged, equally many for each client and
    the remainder for the last, as PruneFL's authors merge FEMNIST's writers; so what neighbouring
    ids have in common stays together.
    Raises ValueError when the data set has no ids, or fewer than `clients`.
    """
    ids = dataset.clients
    if ids is None:
        raise ValueError(
            f"partition 'natural': data set {dataset.name!r} has no client ids; choose one of"
            f" {', '.join(form for form in FORMS.values() if form != 'natural')}"
        )
    starts = np.unique(np.sort(ids), return_index=True)[1]
    groups = np.split(np.argsort(ids, kind="stable"), starts[1:])
    wanted = len(groups) if clients is None else clients
    if not 1 <= wanted <= len(groups):
        raise ValueError(
            f"partition 'natural': got {wanted} clients, expected 1..{len(groups)}, the natural"
            f" clients of {dataset.name!r}; give fewer, or choose another partition"
        )
    if wanted == len(groups):
        return groups
    return _merge(groups, wanted)


def _merge(groups: Sequence[np.ndarray], clients: int) -> Parts:
    each = len(groups) // clients
    cuts = [each * client for client in range(clients)] + [len(groups)]
    return [np.sort(np.concatenate(groups[low:high])) for low, high in pairwise(cuts)]


def _cuts(proportions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Where to cut each class: int64 (classes, N + 1), from 0 to the class's size, never falling.

    proportions: float64 (classes, N), rows summing to 1; sizes: (classes,).
    """
    inner = np.cumsum(proportions, axis=1)[:, :-1] * sizes[:, None]
    inner = np.minimum(inner.astype(np.int64), sizes[:, None])  # sums may exceed 1 by rounding
    zero = np.zeros((len(sizes), 1), np.int64)
    return np.concatenate([zero, inner, sizes[:, None]], axis=1)


def _deal(rng: np.random.Generator, members: Sequence[np.ndarray], cuts: np.ndarray) -> Parts:
    pieces = [
        np.split(rng.permutation(each), row[1:-1]) for each, row in zip(members, cuts, strict=True)
    ]
    return [np.sort(np.concatenate(hand)) for hand in zip(*pieces, strict=True)]


def _minimum(text: str) -> tuple[str, int | None]:
    """The text of a partition without a minimum, and that; None where it names none."""
    parts = text.split(":")
    if parts[0] != "dirichlet" or len(parts) != 3:
        return text, None
    if not parts[2].isdecimal() or not 1 <= len(parts[2]) <= 9 or int(parts[2]) < 1:
        raise ValueError(
            f"partition {text!r:.80}: got {parts[2]!r:.40}, expected dirichlet:A:M with a whole"
            " number of examples from 1, as 'dirichlet:0.5:20'"
        )
    return f"{parts[0]}:{parts[1]}", int(parts[2])


def _parse(text: str) -> tuple[str, float]:
    """Scheme and its number (0 where it takes none)."""
    scheme, colon, argument = text.partition(":")
    if scheme not in FORMS:
        near = difflib.get_close_matches(scheme, FORMS, n=1)
        hint = f"; did you mean {FORMS[near[0]]!r}?" if near else ""
        raise ValueError(
            f"unknown partition {text!r}, expected one of {', '.join(FORMS.values())}{hint}"
        )
    if ":" not in FORMS[scheme]:
        if colon:
            raise ValueError(f"partition {text!r}: expected {scheme!r} alone, it takes no number")
        return scheme, 0.0
    low, high = ALPHA_RANGE if scheme == "dirichlet" else (1, 1 << 31)
    try:
        value = float(argument) if scheme == "dirichlet" else int(argument)
        if not low <= value <= high:  # NaN as well
            raise ValueError("out of range")
    except ValueError as error:
        kind = "a number" if scheme == "dirichlet" else "a whole number"
        example = "dirichlet:0.5" if scheme == "dirichlet" else "shards:2"
        raise ValueError(
            f"partition {text!r}: got {argument!r}, expected {FORMS[scheme]} with"
            f" {kind} in {low:g}..{high:g}, as {example!r}"
        ) from error
    return scheme, value
