"""What each client holds, as the server remembers it: spec, pattern, last round, frozen values.

It decides what need not be sent again, and it is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate


class ClientStore:
    """Client id -> (spec hash, pattern hash, last round, hash of frozen values)."""

    def __init__(self, tree: Mapping[str, Any] | None = None):
        self._held: dict[int, tuple[str, str, int, str]] = {
            int(client): (entry[0], entry[1], entry[2], entry[3] if entry[3:] else wire.NO_FROZEN)
            for client, entry in (tree or {}).items()
        }

    def to_tree(self) -> dict[str, Any]:
        return {str(client): entry for client, entry in self._held.items()}

    def known(self, client: int) -> wire.Known:
        """What need not be sent to this client."""
        if client not in self._held:
            return wire.Known()
        spec, pattern, _, frozen = self._held[client]
        held = frozenset({frozen}) - {wire.NO_FROZEN}
        return wire.Known(frozenset({spec}), frozenset({pattern}), held)

    def acknowledge(self, task: ClientTask, update: ClientUpdate) -> None:
        """The client answered: it holds the task's spec and frozen values, the pattern it trained.

        A task without frozen values leaves those that it holds from another.
        """
        pattern = wire.pattern_hash(update.sub_model.masks)
        frozen = wire.frozen_hash(wire.frozen_params(task), task.sub_model.masks)
        if frozen == wire.NO_FROZEN and task.client in self._held:
            frozen = self._held[task.client][3]
        self._held[task.client] = (task.spec.hash, pattern, task.round, frozen)
