"""Devices in this process that answer at once, each with a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlean.runtime.remote.share import Share, load_share
from fedlean.runtime.remote.worker import Worker


class Devices:
    """A `Post`.  Device i, node 10 + i, holds folder i; or its share of digits, of two."""

    def __init__(self, state: Path, folders: Sequence[str] = ()):
        shares = [load_share(folder, Share()) for folder in folders] or [
            load_share("digits", Share(i, 2)) for i in range(2)
        ]
        self.workers = {
            10 + i: Worker(state / str(i), data, client=i) for i, data in enumerate(shares)
        }
        self.replies: dict[str, bytes] = {}

    def nodes(self):
        return list(self.workers)

    def send(self, letters, *, seconds):
        keys = [f"m{len(self.replies) + i}" for i in range(len(letters))]
        for key, (node, content) in zip(keys, letters, strict=True):
            self.replies[key] = self.workers[node].answer(content)
        return keys

    def fetch(self, ids, *, seconds):
        return [(key, self.replies[key]) for key in ids if key in self.replies]
