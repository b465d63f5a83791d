"""Do model, data and loss go together?  Found before anything is written or trained."""

from __future__ import annotations

from fedlean.data.dataset import Dataset
from fedlean.spec import ModelSpec


def check_classes(dataset: Dataset) -> None:
    """Raises ValueError for a data set with nothing to tell apart."""
    if dataset.classes < 2:
        raise ValueError(
            f"data set {dataset.name!r} has one class only, {dataset.class_names[0]!r}: a model "
            "tells at least two apart; check its labels"
        )


def check_training(dataset: Dataset) -> None:
    """Raises ValueError for a data set that clients in this process could not learn from."""
    if not len(dataset.y_train):
        raise ValueError(
            f"data set {dataset.name!r} has no training examples: give one that has some, or let "
            "devices train on theirs (docs/deploy.md)"
        )


def check_test(dataset: Dataset) -> None:
    """Raises ValueError for a data set without examples to evaluate the model on."""
    if not len(dataset.y_test):
        raise ValueError(
            f"data set {dataset.name!r} has no test examples: mark some in its files "
            "(docs/data.md), or hold out a share of its examples with --test-share 0.2"
        )


def check_together(spec: ModelSpec, dataset: Dataset, model: str) -> None:
    """The model takes the data's examples and gives one number for each of its classes.

    model: its name, for the error.  Raises ValueError naming what was found on either side.
    """
    if tuple(spec.input_shape) != tuple(dataset.input_shape):
        raise ValueError(
            f"model {model!r} takes inputs of shape {tuple(spec.input_shape)}, the examples of "
            f"{dataset.name!r} are {tuple(dataset.input_shape)}: build it for the shape that it is "
            "called with"
        )
    output = spec.nodes[-1].name
    if len(spec.output_shape) != 1:
        raise ValueError(
            f"model {model!r} ends in {output!r} of shape {tuple(spec.output_shape)}, but a loss "
            f"needs one number per class, ({dataset.classes},): end it with pooling or Flatten and "
            "a Linear"
        )
    outputs = spec.output_shape[0]
    if outputs < dataset.classes:
        raise ValueError(
            f"model {model!r} has {outputs} outputs ({output!r}), {dataset.name!r} has "
            f"{dataset.classes} classes ({', '.join(dataset.class_names[:12])}"
            f"{', ...' if dataset.classes > 12 else ''}): give it one output per class"
        )
