"""Is this the data that a run was begun with?  `config.json` holds its fingerprint."""

from __future__ import annotations

from typing import Any

from fedlean.data.dataset import Dataset
from fedlean.data.fingerprint import changed_parts, fingerprint


def about_data(dataset: Dataset) -> dict[str, Any]:
    """What `config.json` says of the data set: names of the classes, and the fingerprint."""
    return {"class_names": list(dataset.class_names), "fingerprint": fingerprint(dataset)}


def held_against(
    known: Any, dataset: Dataset, *, round: int, accept_changed: bool, advice: str
) -> dict[str, Any]:
    """`about_data` of a run that goes on after `round`, with its history of changes.

    known: what `config.json` has; early runs have none.  Raises ValueError naming what changed,
    with `advice`, unless that is accepted.
    """
    if known is None:
        return about_data(dataset)
    try:
        changed = changed_parts(known["fingerprint"], fingerprint(dataset))
        history = [*known.get("changes", []), {"after_round": round, "changed": changed}]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"config.json is damaged: data: {type(error).__name__}: {error}; take it out to go on "
            "without comparing the data"
        ) from None
    if not changed:
        return known
    if not accept_changed:
        raise ValueError(f"the data changed since the run began: {'; '.join(changed)}; {advice}")
    return {**about_data(dataset), "changes": history}
