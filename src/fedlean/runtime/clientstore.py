"""What each client holds, as the server remembers it: spec, pattern, last round.

It decides what need not be sent again, and it is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate


class ClientStore:
    """Client id -> (spec hash, pattern hash, last round)."""

    def __init__(self, tree: Mapping[str, Any] | None = None):
        self._held: dict[int, tuple[str, str, int]] = {
            int(client): (entry[0], entry[1], entry[2]) for client, entry in (tree or {}).items()
        }

    def to_tree(self) -> dict[str, Any]:
        return {str(client): entry for client, entry in self._held.items()}

    def known(self, client: int) -> wire.Known:
        """What need not be sent to this client."""
        if client not in self._held:
            return wire.Known()
        spec, pattern, _ = self._held[client]
        return wire.Known(specs=frozenset({spec}), patterns=frozenset({pattern}))

    def acknowledge(self, task: ClientTask, update: ClientUpdate) -> None:
        """The client answered, so it holds the task's spec and the pattern it trained."""
        pattern = wire.pattern_hash(update.sub_model.masks)
        self._held[task.client] = (task.spec.hash, pattern, task.round)
