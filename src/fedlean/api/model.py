"""A trained model with what its user needs: predictions, its own tensor names, a file."""

# n examples, K classes

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fedlean import core
from fedlean.core import SubModel
from fedlean.data.dataset import Dataset
from fedlean.engine.open import engine_for
from fedlean.engine.protocol import SGD
from fedlean.jsonfile import read_json
from fedlean.models.brought import Names
from fedlean.normalisation import Normalisation, nothing
from fedlean.pruning.density import density
from fedlean.runtime.keeper import BEST, MODEL
from fedlean.runtime.modelfile import About, about_from, read_stored, write_model
from fedlean.runtime.runlog import held_masks
from fedlean.spec import ModelSpec

BATCH = 100  # examples at a time
Part = Literal["test", "train", "all"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """confusion: int64 (K, K), how many examples of each class [row] were taken for which."""

    accuracy: float
    confusion: np.ndarray
    labels: np.ndarray  # of the classes, (K,)

    @property
    def examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def recall(self) -> np.ndarray:
        """Of each class, (K,): the share of its examples that were found; NaN without examples."""
        counts = self.confusion.sum(1)
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / counts


@dataclass(frozen=True)
class Model(core.Model):
    """A network with its values, and what others need to use it.

    names: of its tensors in the PyTorch module that it came from, if any.  normalisation: what
    makes its inputs of stored values; None: they are inputs already.  class_names: of its outputs;
    (): their numbers.
    """

    names: Names | None = None
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Kept share of the weights that may be pruned, in [0, 1]."""
        return density(held_masks(self))

    def outputs(self, x: Any) -> np.ndarray:
        """The network's outputs, float32 (n, K), for stored examples x (n, *input_shape).

        x are values as the data set had them: the model normalises them itself.  Raises ValueError
        naming the shape that was expected.
        """
        return np.concatenate([self._batch(part) for part in self._parts(x)])

    def probabilities(self, x: Any) -> np.ndarray:
        """The softmax of `outputs`, float32 (n, K)."""
        logits = self.outputs(x).astype(np.float64)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        return (shifted / shifted.sum(1, keepdims=True)).astype(np.float32)

    def predict(self, x: Any) -> np.ndarray:
        """The label of the likeliest class of each example, (n,): numbers, or names as text."""
        return self.labels[self.outputs(x).argmax(1)]

    @property
    def labels(self) -> np.ndarray:
        """Of each class, (K,): int64 where all of them are whole numbers, else text."""
        names = self.class_names or tuple(map(str, range(self.spec.output_shape[0])))
        spare = [f"output {i}" for i in range(len(names), self.spec.output_shape[0])]
        try:
            return np.array([int(name) for name in (*names, *range(-len(spare), 0))], np.int64)
        except ValueError:
            return np.array([*names, *spare])

    def _parts(self, x: Any) -> Iterator[np.ndarray]:
        x = np.asarray(x)
        if x.shape[1:] != tuple(self.spec.input_shape) or x.ndim < 2 or not len(x):
            raise ValueError(
                f"x has shape {x.shape}, expected (examples, "
                f"{', '.join(map(str, self.spec.input_shape))}), at least one, as the model takes "
                "them: add, move or remove axes"
            )
        if x.dtype.kind not in "biuf":
            raise ValueError(f"x is {x.dtype}, expected numbers")
        for start in range(0, len(x), BATCH):
            yield x[start : start + BATCH]

    def _batch(self, x: np.ndarray) -> np.ndarray:
        normal = self.normalisation or nothing(self.spec.input_shape[0])
        engine, _ = engine_for(self.spec, None, 1)
        held = SubModel(masks=self.masks)
        session = engine.open(self.spec, self.params, held, batch_size=len(x), optimizer=SGD(0.0))
        (logits,) = session.forward(normal(x)).values()
        return logits

    def evaluate(self, data: Dataset, part: Part = "test") -> Evaluation:
        """How well it does on the examples of a data set, which may be another than the run's.

        part: its test examples, its training examples, or all.  Classes are compared by name.
        Raises ValueError where the data set has classes that the model does not, examples of
        another shape, or none in that part.
        """
        x, y = self.examples(data, part)
        count = self.spec.output_shape[0]
        predicted = self._for(data).outputs(x).argmax(1)
        confusion = np.zeros((count, count), np.int64)
        np.add.at(confusion, (y, predicted), 1)
        return Evaluation(float((predicted == y).mean()), confusion, self.labels)

    def examples(self, data: Dataset, part: Part = "test") -> tuple[np.ndarray, np.ndarray]:
        """Stored examples of a data set, and the model's classes of them, int64 (n,)."""
        if self.class_names:
            data = data.with_classes(self.class_names)
        parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
        if part == "all":
            x = np.concatenate([data.x_train, data.x_test])
            y = np.concatenate([data.y_train, data.y_test])
        elif part in parts:
            x, y = parts[part]
        else:
            raise ValueError(f"part must be one of {', '.join(get_args(Part))}, got {part!r:.40}")
        if not len(y):
            raise ValueError(
                f"data set {data.name!r} has no {part} examples: choose another part of it"
            )
        return x, y

    def probabilities_of(self, data: Dataset, x: np.ndarray) -> np.ndarray:
        """`probabilities` of stored examples of `data`, whatever value counts as 1 there."""
        return self._for(data).probabilities(x)

    def _for(self, data: Dataset) -> Model:
        """Reading values as that data set has them: bytes, or the same as floats up to 1."""
        if self.normalisation is None:
            return self
        return replace(self, normalisation=replace(self.normalisation, scale=data.scale))

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors under the names and in the shapes of the module that they came from.

        Without such a module, under those of the spec.  Copies; pruned weights are 0.
        """
        if self.names is None:
            return {name: np.array(value) for name, value in self.params.items()}
        return self.names.state(self.params)

    def state_dict(self) -> dict[str, Any]:
        """`arrays` as PyTorch tensors, for `load_state_dict` of the module that was given.

        Without such a module, of that of `to_torch`.  Needs PyTorch.
        """
        from fedlean.models.torch import as_tensors

        return as_tensors(self.arrays())

    def to_torch(self) -> Any:
        """A PyTorch module that computes the network, of normalised inputs.  Needs PyTorch."""
        from fedlean.models.torch import to_torch

        return to_torch(self.spec, self.params)

    def export(self, path: str | Path, format: str | None = None) -> Path:
        """A file for other programs: onnx, torch, safetensors or c (docs/export.md).

        format: None for what the file's ending says, .onnx, .pt2, .safetensors or .c.  Raises
        ValueError naming the layer that the format lacks, or what to install.
        """
        from fedlean.api.export import export

        return export(self, path, format)

    def save(self, path: str | Path) -> None:
        """One safetensors file with all of it, for `fedlean.load` (docs/run-folder.md)."""
        rest = None if self.names is None else self.names.rest
        write_model(Path(path), self, about=self._about(), rest=rest)

    def _about(self) -> About:
        return About(self.names, self.normalisation, self.class_names)


def of(model: core.Model, about: About) -> Model:
    """A run's model; without the names where its method saves another network than it got."""
    names, shapes = about.names, model.spec.tensor_shapes
    if names is not None and (
        names.of.keys() != shapes.keys()
        or any(prod(names.of[name].shape) != prod(shape) for name, shape in shapes.items())
    ):
        names = None
    return Model(
        model.spec, model.params, model.masks, names, about.normalisation, about.class_names
    )


def load(path: str | Path, *, best: bool = False) -> Model:
    """The model of a run folder, or of a file that `Model.save` wrote.

    best: of the evaluation with the highest accuracy, instead of the last.  No code that a folder
    names is run.  Raises ValueError naming what is missing or damaged.
    """
    path = Path(path).expanduser()
    if path.is_file():
        stored = read_stored(path, None)
        return of(stored.model, stored.about)
    file = path / (BEST if best else MODEL)
    for needed, remedy in (
        (path / "config.json", "give a run folder, or a file of Model.save"),
        (file, f"finish the run with 'fedlean resume {path}'"),
    ):
        if not needed.is_file():
            raise ValueError(f"{path} holds no model, it has no {needed.name}: {remedy}")
    try:
        document = read_json(path / "config.json")
        spec = ModelSpec.from_json(json.dumps(document["spec"]))
        stored = read_stored(file, spec)
        names = (document.get("data") or {}).get("class_names") or ()
        told = {**document, "class_names": names}
        if stored.model.spec.hash != spec.hash:
            told["tensor_names"] = None  # a narrow model, or one with exits
        about = about_from(told, stored.model.spec, stored.rest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return of(stored.model, about)
