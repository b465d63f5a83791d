"""The vocabulary of FedLean: read this file first.

Everything that a server and its clients exchange is plain, immutable data made of NumPy arrays,
numbers and strings, so it can be costed, hashed, checkpointed and sent without pickle.  This module
knows what a model is (`spec`), and no method, engine or transport.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

import numpy as np

from fedlean.spec import ModelSpec

Params = Mapping[str, np.ndarray]  # tensor name -> float32 array; every tensor of the model
Masks = Mapping[str, np.ndarray]  # tensor name -> bool array, True = kept; absent = dense
Scalar = int | float | str | bool
Reduction = Literal["mean", "sum"]  # mean: weighted by num_examples, as p_n in the papers


@dataclass(frozen=True)
class Model:
    """A network with its values: what a run starts from, evaluates, saves and gives back."""

    spec: ModelSpec
    params: Params  # every tensor of the spec; pruned coordinates are 0
    masks: Masks = field(default_factory=dict)  # empty: dense


@dataclass(frozen=True)
class SubModel:
    """What of the task's model a client holds and trains; empty fields mean "all of it".

    A slice of a larger model is a spec of its own, and masks are in its shapes.
    """

    masks: Masks = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()  # tensor names that no client updates
    # of masks that are `patterns.shuffled_masks` of their counts: a new one travels as these
    mask_seed: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Work:
    """A stretch of local work in the terms in which `fedlean.cost` charges it.

    A client states what it did; what that costs depends on the device and is not its business.
    A stretch may run a span of the task's model only: from the activation of layer `begin` to that
    of `end`, of which it holds some outside the engine, as a frozen beginning leaves them.  Or a
    narrower model, with the first `width` of each layer's channels (`fedlean.narrowed`), densely.
    """

    steps: int = 0  # forward + backward + update, on `batch_size` examples each
    batch_size: int = 1
    importance_steps: int = 0  # of those steps, how many also took the dense weight gradient
    forward_examples: int = 0  # examples that only ran forward
    kept: Mapping[str, int] = field(default_factory=dict)  # masked tensor -> kept coordinates
    # held per trained weight beside its value: by the optimiser (1 with momentum), or of gradients
    optimizer_floats: int = 0
    beside: int = 0  # so many of the stretches right before it stay in memory while it runs
    held_examples: int = 0  # whose activations at `begin` (else `end`) lie outside the engine
    # The importance steps took the parts of an `engine.pieces.sweep` of so many bytes from this one
    # on; 0 bytes: all coordinates each.
    piece_bytes: int = 0
    first_piece: int = 0
    held_floats: int = 0  # of arrays outside the engine, as gradients that it returns
    begin: str = ""  # the model's input
    end: str = ""  # the model's output
    taps: tuple[str, ...] = ()  # layers that a loss of the client's own reads; (): the engine's
    width: float = 1.0  # share of the channels; 1.0: all


@dataclass(frozen=True)
class ClientTask:
    """One client's order for one round.  `params` and `sub_model` are what it starts from.

    In tasks and updates a masked tensor is dense or "packed": its kept values alone (K,), in the
    row-major order of its mask, as they travel.  `arrays` are what else a method's clients need,
    named tensors by group; they travel bit for bit.
    """

    round: int
    phase: str
    client: int
    seed: int
    spec: ModelSpec
    params: Params
    sub_model: SubModel
    hparams: Mapping[str, Scalar]
    arrays: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistic:
    """Named arrays beside the parameters, with the rule by which the server reduces them.

    One with a mask may be packed, as parameters are: its values where that is True, 0 elsewhere.
    """

    tensors: Mapping[str, np.ndarray]
    reduction: Reduction
    masks: Masks = field(default_factory=dict)


@dataclass(frozen=True)
class StatisticForm:
    """What the answers to a task hold under one name; another is refused, with its reason."""

    shapes: Mapping[str, tuple[int, ...]]  # of each of its tensors
    reduction: Reduction = "mean"
    non_negative: bool = False
    limit: float = inf  # of |value|: what no honest client computes


@dataclass(frozen=True)
class ClientUpdate:
    """One client's answer; `sub_model` says what it holds now (coverage of the merge)."""

    client: int
    num_examples: int
    params: Params
    sub_model: SubModel
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    # the server's own order that this answers, set by the runtime for `server_update`; never sent
    task: ClientTask | None = field(default=None, compare=False, repr=False)


class Batches(Protocol):
    """A client's local data.  Drawing is a pure function of its arguments."""

    num_examples: int

    def draw(
        self, *, steps: int, batch_size: int, seed: int, examples: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`steps` batches (x float32 (B, *input_shape), y int64 (B,)).

        Shuffled passes over the data, reshuffled at each pass; every batch is full, wrapping around
        where the data is shorter.  `examples` restricts to the first so many of a seeded shuffle.
        `fedlean.data.batches.drawn_positions` says which examples that are.
        """
        ...


ClientState = Mapping[str, np.ndarray]  # what a client keeps between rounds; {} at first contact


def derive_seed(seed: int, round: int, client: int, purpose: str) -> int:
    """A 63-bit seed for one use.  Same on every machine; no two uses share a stream.

    >>> derive_seed(0, 1, 2, "batches") == derive_seed(0, 1, 2, "batches")
    True
    >>> derive_seed(0, 1, 2, "batches") == derive_seed(0, 1, 2, "dropout")
    False
    """
    text = f"{seed}/{round}/{client}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, round: int, client: int, purpose: str) -> np.random.Generator:
    """A Philox (counter-based) generator on `derive_seed`, the only way FedLean draws numbers."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, round, client, purpose)))
