"""Whom a model serves: its errors by class, and what each client may expect of it.

A mean over a test set hides clients whose classes are rare in it.  What a client may expect is the
mean recall of the classes, weighted as its own training examples are: the accuracy on test examples
drawn in its mix of classes.  The figure is ours; it needs no test examples of the client's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_CLASSES = 100  # of a confusion matrix that is kept: a page with more cannot be read
LISTED = 1000  # clients that are listed one by one


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes,)."""
    return np.bincount(labels, minlength=classes)


def recalls(confusion: np.ndarray) -> np.ndarray:
    """Per class, float64 (classes,); NaN for a class without test examples.

    confusion: counts (classes, classes), a row per true class, a column per predicted one.
    """
    total = confusion.sum(1)
    hits = np.diagonal(confusion)
    return np.divide(hits, total, out=np.full(len(total), np.nan), where=total > 0)


def expected(confusion: np.ndarray, held: np.ndarray) -> float | None:
    """What a client that holds so many examples of each class may expect; in [0, 1].

    None where no class that it holds has test examples.
    """
    recall = recalls(confusion)
    seen = np.isfinite(recall) & (held > 0)
    if not seen.any():
        return None
    return float(np.average(recall[seen], weights=held[seen]))


def served(
    confusion: np.ndarray, held: Mapping[int, np.ndarray], class_names: Sequence[str]
) -> dict[str, Any]:
    """For `summary.json`; held: class counts by client, empty where they are not known here."""
    found: dict[str, Any] = {"classes": list(class_names)}
    found["recall"] = [None if np.isnan(one) else float(one) for one in recalls(confusion)]
    if len(class_names) <= MOST_CLASSES:
        found["confusion"] = confusion.tolist()
    by_client = {client: expected(confusion, counts) for client, counts in held.items()}
    return found | spread({client: one for client, one in by_client.items() if one is not None})


def spread(by_client: Mapping[int, float]) -> dict[str, Any]:
    """The worst client's, the 10th percentile's and the median's; {} without clients."""
    if not by_client:
        return {}
    values = [*by_client.values()]
    worst = min(by_client, key=lambda client: (by_client[client], client))
    listed = sorted(by_client.items())[:LISTED]
    return {
        "clients": {
            "count": len(values),
            "worst": by_client[worst],
            "worst_client": worst,
            "percentile_10": float(np.percentile(values, 10)),
            "median": float(np.median(values)),
            "by_client": {str(client): one for client, one in listed},
        }
    }
