"""From the tree of a checkpoint to where a run stands.

A digest says that a checkpoint is as it was written, not by whom: one of another run, or one that
somebody made up, fits neither the method nor the model, and is refused before a step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientState
from fedlean.engine.checks import check_masks
from fedlean.models.initialise import check_params
from fedlean.runtime.checkpoint import begin_anew
from fedlean.runtime.clientstore import FROZEN, ClientStore
from fedlean.runtime.merged import not_finite
from fedlean.runtime.method import model_of
from fedlean.runtime.moves import Moves
from fedlean.runtime.rounds import EMPTY_STEPS, REFUSED_STEPS, LoopState
from fedlean.runtime.runlog import Totals
from fedlean.tree import read_only

TRIED = 16  # devices for which a state is tried out


class Restored(NamedTuple):
    """What a checkpoint holds."""

    progress: LoopState
    totals: Totals
    log_bytes: int  # of `rounds.jsonl` when it was written
    clients: dict[int, ClientState]


def restored(
    folder: Path,
    tree: Mapping[str, Any],
    initial: Any,
    algorithm: FederatedAlgorithm,
    server: Server,
) -> Restored:
    """Of the checkpoint `tree` in `folder`; `initial` is a state of the run's method.

    Raises ValueError naming what of it does not fit the method or the model.
    """
    try:
        progress = LoopState(
            _state(tree["state"], initial, algorithm, server),
            ClientStore(_store(tree["store"])),
            _count("step", tree["step"]),
            _below("empty_steps", tree["empty_steps"], EMPTY_STEPS),
            # early versions have neither of these
            _below("refused_steps", tree.get("refused_steps", 0), REFUSED_STEPS),
            _moves(tree.get("moves", {})),
        )
        totals = _totals(tree["totals"])
        return Restored(
            progress, totals, _count("log_bytes", tree["log_bytes"]), _clients(tree["clients"])
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the checkpoint in {folder} does not fit its run: {type(error).__name__}: {error}; "
            f"{begin_anew(folder)}"
        ) from None


def recorded_round(tree: Mapping[str, Any] | None) -> int:
    """The round of a checkpoint that is not checked yet; 0 where it does not say."""
    state = (tree or {}).get("state")
    round = state.get("round") if isinstance(state, Mapping) else None
    return round if isinstance(round, int) else 0


def _state(
    values: Mapping[str, Any], initial: Any, algorithm: FederatedAlgorithm, server: Server
) -> Any:
    """A state of the method, with model and masks of the shapes of its spec."""
    for field in fields(initial):
        now, then = values.get(field.name), getattr(initial, field.name)
        if None not in (_kind(now), _kind(then)) and _kind(now) != _kind(then):
            raise TypeError(f"{field.name} of its state is a {type(now).__name__}")
    state = type(initial)(**values)
    _count("round", state.round)
    _arrays("params", state.params)
    _arrays("masks", state.masks)
    _arrays("extra", getattr(state, "extra", {}))
    if name := not_finite(state):
        raise ValueError(f"{name} of its state is not finite")
    model = model_of(algorithm, server, state)
    check_params(model.spec, model.params)
    if model.params is not state.params:  # a part of the whole model, which the state has
        check_params(server.spec, state.params)
    check_masks(server.spec, state.masks)
    _try_out(state, algorithm, server)
    return replace(state, **_tensors(state))


def _tensors(state: Any) -> dict[str, dict[str, np.ndarray]]:
    """Its groups of tensors, as stages have beside `params`: frozen ones are hashed once, then."""
    groups = {field.name: getattr(state, field.name) for field in fields(state)}
    return {
        name: read_only(group)
        for name, group in groups.items()
        if isinstance(group, Mapping) and group and all(map(_is_array, group.values()))
    }


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _try_out(state: Any, algorithm: FederatedAlgorithm, server: Server) -> None:
    """What the server does with a state that nobody answers: what is odd in it is found at once."""
    if algorithm.report is not None:
        algorithm.report(state)
    if algorithm.done(state):
        return
    devices = [Device(client) for client in range(min(TRIED, server.clients or 1))]
    if algorithm.configure(state, devices):  # a step of the server's own may take long
        algorithm.server_update(state, ())


def _below(name: str, value: Any, limit: int) -> int:
    """A count that ended the run begins anew: whoever goes on has changed something."""
    return count if (count := _count(name, value)) < limit else 0


def _moves(values: Mapping[str, Any]) -> Moves:
    moves = Moves(**values)
    if not isinstance(moves.phase, str):
        raise TypeError(f"the phase of its moves is {moves.phase!r:.40}")
    for kind, last in (*moves.last.items(), *moves.alike.items()):
        for client, far in last:
            _count(f"a client of the moves of {kind!r:.40}", client)
            if not isinstance(far, float) or not 0 <= far < math.inf:
                raise ValueError(f"a move of {kind!r:.40} is {far!r:.40}")
    return moves


def _kind(value: Any) -> str | None:
    """What of a state may take its place; None for what may become anything."""
    kinds = {bool: "bool", (int, float): "number", str: "text", Mapping: "mapping"}
    kinds |= {(tuple, list): "tuple", np.ndarray: "array"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), None)


def _arrays(name: str, values: Any) -> Mapping[str, np.ndarray]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a {type(values).__name__}")
    odd = [key for key, value in values.items() if not isinstance(value, np.ndarray)]
    if odd:
        raise TypeError(f"{odd[0]!r:.60} of {name} is no array")
    return values


def _store(values: Mapping[str, Any]) -> Mapping[str, Any]:
    for client, held in values.items():
        if client == FROZEN:
            _hashes(held)
            continue
        kinds = [type(each) for each in held]
        if kinds not in ([str, str, int], [str, str, int, str]):  # early versions have three
            raise TypeError(f"what client {client!r:.20} holds is not hashes and a round")
    return values


def _hashes(sets: Any) -> None:
    for key, hashes in sets.items():
        if not all(isinstance(text, str) for text in (key, *hashes, *hashes.values())):
            raise TypeError(f"frozen values {key!r:.40} are no hashes by name")


def _clients(values: Mapping[str, Any]) -> dict[int, ClientState]:
    return {int(client): _arrays(f"client {client!r:.20}", kept) for client, kept in values.items()}


def _totals(values: Mapping[str, Any]) -> Totals:
    totals = Totals(**values)
    for field in fields(Totals):
        value = getattr(totals, field.name)
        if isinstance(value, bool) or _kind(value) not in ("number", "mapping"):
            raise TypeError(f"the total {field.name} is {value!r:.40}")
        if _kind(value) != _kind(getattr(Totals(), field.name)):
            raise TypeError(f"the total {field.name} is a {type(value).__name__}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"the total {field.name} is {value!r:.40}")
    return totals


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{name} is {value!r:.40}, expected a count")
    return value
