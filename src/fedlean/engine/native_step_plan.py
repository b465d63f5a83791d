"""What a session of the native engine that trains holds, to the byte, from the model alone.

A model of `native/src/session.cpp`, for servers and planners that have no extension.  A session
holds the tensors with what its optimiser keeps, and one arena for whichever pass is the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from fedlean.engine.native_program import Mode, program
from fedlean.engine.native_storage import FLOAT_BYTES, Geometry, stored_bytes
from fedlean.engine.native_structure import geometries
from fedlean.engine.pieces import Pieces, dense_rows, whole
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class SessionPlan:
    """`kept` maps masked tensors to their kept coordinates (absent: dense).

    slower: layers that take the slower of their two forms (`engine.forms`).
    """

    spec: ModelSpec
    kept: Mapping[str, int]
    batch_size: int
    frozen: frozenset[str] = frozenset()
    threads: int = 1
    slower: frozenset[str] = frozenset()

    @cached_property
    def where(self) -> Mapping[str, Geometry]:
        training = Mode(self.batch_size, self.threads, training=True)
        own = program(self.spec, self.frozen, training).structure
        return geometries(self.spec, own, self.slower)

    def stored_bytes(self, optimizer_floats: int = 0) -> int:
        """Values, patterns, masks, and so many floats for each trained value."""
        return stored_bytes(self.spec, self.kept, optimizer_floats, self.frozen, self.where)

    def gradient_bytes(self) -> int:
        """The stored form of all gradients, which a `backward` holds."""
        return self.stored_bytes(1) - self.stored_bytes(0)

    def step_bytes(self, summed: Iterable[Pieces] = ()) -> int:
        """The arena of a session that has taken steps, which summed g² of such pieces."""
        # pieces of the same sizes want the same scratch
        sizes = frozenset(tuple(sorted(dense_rows(pieces).items())) for pieces in summed)
        kept = tuple(sorted(self.kept.items()))
        return FLOAT_BYTES * _step_floats(
            self.spec, self.frozen, self.slower, self.batch_size, self.threads, kept, sizes
        )

    def forward_bytes(self, examples: int, taps: Collection[str], *, training: bool) -> int:
        """The arena of a `forward`, whose gradients may all be asked for where it is a training."""
        rows = dense_rows(whole(self.spec, self.frozen)) if training else {}
        mode = Mode(examples, self.threads, training=training, taps=frozenset(taps))
        own = program(self.spec, self.frozen, mode)
        return FLOAT_BYTES * own.floats(self.kept, self.where, rows)


Counts = tuple[tuple[str, int], ...]  # by tensor, sorted


@lru_cache(maxsize=512)
def _step_floats(
    spec: ModelSpec,
    frozen: frozenset[str],
    slower: frozenset[str],
    batch_size: int,
    threads: int,
    kept: Counts,
    summed_rows: frozenset[Counts],
) -> int:
    """Methods that keep the same are asked for the same, whatever their optimiser and steps."""
    training = Mode(batch_size, threads, training=True)
    own, counts = program(spec, frozen, training), dict(kept)
    where = geometries(spec, own.structure, slower)
    floats = own.floats(counts, where)
    for rows in summed_rows:
        floats = own.floats(counts, where, dict(rows), least=floats)
    evaluating = program(spec, frozen, replace(training, training=False))
    return evaluating.floats(counts, where, least=floats)
