"""Is this the data that a run was begun with?  `config.json` holds its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlean.data.dataset import Dataset
from fedlean.data.fingerprint import changed_parts, fingerprint


def about_data(dataset: Dataset) -> dict[str, Any]:
    """What `config.json` says of the data set: names of the classes, and the fingerprint."""
    return {"class_names": list(dataset.class_names), "fingerprint": fingerprint(dataset)}


def held_against(
    known: dict[str, Any] | None,
    dataset: Dataset,
    *,
    folder: Path,
    round: int,
    accept_changed: bool,
) -> dict[str, Any]:
    """`about_data` of a run that goes on after `round`, with its history of changes.

    known: of the run so far; early runs have none.  folder: the run's.  Raises ValueError naming
    what changed, unless that is accepted.
    """
    if known is None:
        return about_data(dataset)
    changed = changed_parts(known["fingerprint"], fingerprint(dataset))
    if not changed:
        return known
    if not accept_changed:
        raise ValueError(
            f"the data changed since the run began: {'; '.join(changed)}; bring it back (if it has "
            f"moved: fedlean resume {folder} --dataset FOLDER), or go on with what there is and "
            "have the run marked: --accept-changed-data"
        )
    history = [*known.get("changes", []), {"after_round": round, "changed": changed}]
    return {**about_data(dataset), "changes": history}
