"""The search for a sub-network that fits a device's budget of the round.

Dynamic model selection (Yao, arXiv 2409.08858): a data base of sub-networks, the largest first, of
which a device takes the first within its limits; now and then another one is drawn and added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from fedlean.algorithm import Device
from fedlean.core import Work, generator
from fedlean.cost.flops import work_flops
from fedlean.cost.profile import Profile
from fedlean.submodels.needs import Needs
from fedlean.submodels.supernet import SubNet, Supernet


@dataclass(frozen=True, eq=False)
class Search:
    """Of the sub-networks of one supernet, on which a client's round is `work`.

    probability: of drawing another before each look; tries: the most that are drawn so
    """

    supernet: Supernet
    work: Work
    probability: float
    tries: int
    seed: int
    _needs: dict[SubNet, Needs] = field(default_factory=dict, repr=False)
    _ranks: dict[str, tuple[int, int, str]] = field(default_factory=dict, repr=False)

    def begun(self, count: int) -> tuple[str, ...]:
        """A data base of the smallest, the largest and `count` more that are drawn."""
        random = generator(self.seed, 0, 0, "sub-networks")
        drawn = [self.supernet.draw(random) for _ in range(count)]
        return self.with_more((), [self.supernet.smallest, self.supernet.largest, *drawn])

    def with_more(self, base: Sequence[str], nets: Iterable[SubNet]) -> tuple[str, ...]:
        """The data base with these, each once, from the largest to the smallest.

        By values, then by operations; of equals by name, so that the order is nobody's choice.
        """
        new = set(map(self.supernet.name, nets)) - set(base)
        return tuple(sorted([*base, *new], key=self._rank, reverse=True)) if new else tuple(base)

    def drawn(self, round: int, client: int) -> list[SubNet]:
        """What is added while a client's sub-network of the round is looked for."""
        random = generator(self.seed, round, client, "explore")
        found: list[SubNet] = []
        while len(found) < self.tries and random.random() < self.probability:
            found.append(self.supernet.draw(random))
        return found

    def fitting(self, base: Sequence[str], device: Device, fallback: Profile) -> SubNet:
        """The first of `base` within the device's limits; the smallest where none is.

        What a device that cannot hold even that one lacks is found out before a task is sent.
        """
        for name in base:
            net = self.supernet.named(name)
            if self.needs(net).within(device, fallback):
                return net
        return self.supernet.smallest

    def needs(self, net: SubNet) -> Needs:
        """Worked out once for each sub-network."""
        if net not in self._needs:
            self._needs[net] = Needs(self.supernet.cut(net).spec, (self.work,))
        return self._needs[net]

    def _rank(self, name: str) -> tuple[int, int, str]:
        """Worked out once for each, as its needs are."""
        if name not in self._ranks:
            spec = self.supernet.cut(self.supernet.named(name)).spec
            values = sum(map(prod, spec.tensor_shapes.values()))
            self._ranks[name] = values, work_flops(spec, Work(forward_examples=1)), name
        return self._ranks[name]
