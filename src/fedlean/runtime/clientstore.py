"""What each client holds, as the server remembers it: spec, pattern, last round, frozen values.

It decides what need not be sent again, and it is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate

FROZEN = "frozen"  # the key of the tree beside the clients' numbers


class ClientStore:
    """Client id -> (spec hash, pattern hash, last round, hash of the frozen values held).

    What lies behind that last hash, the hash of each frozen tensor by name, is the same for many
    clients and kept once.
    """

    def __init__(self, tree: Mapping[str, Any] | None = None):
        entries = dict(tree or {})
        self._frozen: dict[str, dict[str, str]] = {
            key: dict(hashes) for key, hashes in entries.pop(FROZEN, {}).items()
        }
        self._held: dict[int, tuple[str, str, int, str]] = {
            int(client): (*entry[:3], self._listed(*entry[3:])) for client, entry in entries.items()
        }

    def _listed(self, key: str = wire.NO_FROZEN) -> str:
        """Earlier versions named sets of tensors that cannot be told apart now."""
        return key if key in self._frozen else wire.NO_FROZEN

    def to_tree(self) -> dict[str, Any]:
        clients = {str(client): entry for client, entry in self._held.items()}
        return {**clients, FROZEN: dict(self._frozen)} if self._frozen else clients

    def known(self, client: int) -> wire.Known:
        """What need not be sent to this client."""
        if client not in self._held:
            return wire.Known()
        spec, pattern, _, frozen = self._held[client]
        held = frozenset(self._frozen.get(frozen, {}).values())
        return wire.Known(frozenset({spec}), frozenset({pattern}), held)

    def acknowledge(self, task: ClientTask, update: ClientUpdate) -> None:
        """The client answered: it holds the task's spec and frozen values, the pattern it trained.

        Of each tensor that was ever frozen it holds the values that came last.
        """
        pattern = wire.pattern_hash(update.sub_model.masks)
        before = self._held[task.client][3] if task.client in self._held else wire.NO_FROZEN
        frozen = self._with(before, task)
        self._held[task.client] = (task.spec.hash, pattern, task.round, frozen)
        if frozen != before and all(entry[3] != before for entry in self._held.values()):
            self._frozen.pop(before, None)

    def _with(self, before: str, task: ClientTask) -> str:
        """The hash of what a client holds that held `before` and was given the task."""
        held = self._frozen.get(before, {})
        given = wire.frozen_hashes(wire.frozen_params(task), task.sub_model.masks)
        if given.items() <= held.items():
            return before
        after = {**held, **given}
        key = wire.hash_of(after)
        self._frozen.setdefault(key, after)
        return key
