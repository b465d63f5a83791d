"""What a user says about a data set because its files do not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedlean.data.layout import check_layout


@dataclass(frozen=True)
class Declared:
    """Empty fields are found in the files.

    layout: one of `layout.LAYOUTS`.  label: the column of a table that holds the classes.  length:
    of a recording in samples, to which each is cut, or padded with silence.  test_share: of the
    examples, held out for testing where the files do not say which these are.

    Raises ValueError naming the field that makes no sense.
    """

    layout: str = ""
    label: str = ""
    length: int | None = None
    test_share: float = 0.0

    def __post_init__(self) -> None:
        check_layout(self.layout)
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is {self.length}, expected at least 1 sample")
        if not 0 <= self.test_share < 1:
            raise ValueError(
                f"test_share is {self.test_share:g}, expected a share from 0 to below 1"
            )

    def check(self, takes: Collection[str], name: str) -> None:
        """Raises ValueError where something is said that means nothing for the data set `name`.

        takes: of the fields, those that do.
        """
        for field in ("layout", "label", "length"):
            if getattr(self, field) and field not in takes:
                raise ValueError(
                    f"--{field} says nothing about the data set {name!r}, whose files are of"
                    " another kind: leave it out"
                )


NOTHING = Declared()
