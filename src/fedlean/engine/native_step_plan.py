"""What a session of the native engine that trains holds, to the byte, from the model alone.

A model of `native/src/session.cpp`, for servers and planners that have no extension.  A session
holds the tensors with what its optimiser keeps, and one arena for whichever pass is the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fedlean.engine.native_program import Mode, Program
from fedlean.engine.native_storage import FLOAT_BYTES, Geometry, stored_bytes
from fedlean.engine.native_structure import Structure, geometries, structure
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
    def structure(self) -> Structure:
        return structure(self.spec, self.frozen)

    @cached_property
    def where(self) -> Mapping[str, Geometry]:
        return geometries(self.spec, self.structure, self.slower)

    def stored_bytes(self, optimizer_floats: int = 0) -> int:
        """Values, patterns, masks, and so many floats for each trained value."""
        return stored_bytes(self.spec, self.kept, optimizer_floats, self.frozen, self.where)

    def gradient_bytes(self) -> int:
        """The stored form of all gradients, which a `backward` holds."""
        return self.stored_bytes(1) - self.stored_bytes(0)

    def step_bytes(self, summed: Iterable[Pieces] = ()) -> int:
        """The arena of a session that has taken steps, which summed g² of such pieces."""
        training = Mode(self.batch_size, self.threads, training=True)
        modes = [training, replace(training, training=False)]
        # pieces of the same sizes want the same scratch
        sizes = {tuple(sorted(dense_rows(pieces).items())) for pieces in summed}
        modes += [replace(training, dense_rows=dict(each)) for each in sizes]
        return max(map(self._pass_bytes, modes))

    def forward_bytes(self, examples: int, taps: Collection[str], *, training: bool) -> int:
        """The arena of a `forward`, whose gradients may all be asked for where it is a training."""
        mode = Mode(
            examples,
            self.threads,
            training=training,
            dense_rows=dense_rows(whole(self.spec, self.frozen)) if training else {},
            taps=frozenset(taps),
        )
        return self._pass_bytes(mode)

    def _pass_bytes(self, mode: Mode) -> int:
        program = Program(self.spec, self.kept, self.frozen, self.structure, self.where, mode)
        return FLOAT_BYTES * program.floats
