"""`fedlean evaluate`, `fedlean predict` and `fedlean export`: what a trained model is for."""

from __future__ import annotations

import csv
import json as documents
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TextIO

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from fedlean.api.export import ENDINGS, Format, export
from fedlean.api.model import Model, Part, load
from fedlean.cli.options import Place
from fedlean.cli.screen import show, show_lines
from fedlean.data.dataset import Dataset
from fedlean.data.load import load_dataset
from fedlean.printable import printable
from fedlean.runtime.config import read_config

Flag = Annotated[bool, Parameter(negative=())]
_ENDING = {format: ending for ending, format in ENDINGS.items()}


def evaluate(
    run: Place,
    /,
    *,
    data: str,
    part: Part = "test",
    best: Flag = False,
    json: Flag = False,
) -> None:
    """How well a trained model does on a data set.

    Parameters
    ----------
    run
        a run folder, or a file of Model.save
    data
        digits or a folder, as 'fedlean run --dataset' takes it; classes are compared by name
    part
        its test examples, its training examples, or all
    best
        the model of the best evaluation, instead of the last
    json
        print JSON instead of a table
    """
    found = load(run, best=best).evaluate(_dataset(data, run), part)
    recall = [None if math.isnan(share) else share for share in found.recall.tolist()]
    names = [str(label) for label in found.labels]
    if json:
        document = {
            "accuracy": found.accuracy,
            "examples": found.examples,
            "classes": names,
            "recall": recall,
            "confusion": found.confusion.tolist(),
        }
        show_lines(documents.dumps(document, indent=1).splitlines())
        return
    show(f"accuracy {found.accuracy:.2%} on {found.examples} examples")
    table = Table(box=None, padding=(0, 1))
    for head in ("class", "examples", "recall"):
        table.add_column(head, justify="left" if head == "class" else "right", overflow="fold")
    for name, count, share in zip(names, found.confusion.sum(1), recall, strict=True):
        shown = "\u2013" if share is None else f"{share:.1%}"
        table.add_row(Text(printable(name)), str(count), shown)
    show(table)


def predict(
    run: Place,
    /,
    *,
    data: str,
    part: Literal["test", "train", "all"] = "all",
    best: Flag = False,
    out: Place | None = None,
) -> None:
    """What a trained model makes of each example, as CSV: its class, and all probabilities.

    Parameters
    ----------
    run
        a run folder, or a file of Model.save
    data
        digits or a folder, as 'fedlean run --dataset' takes it
    part
        its test examples, its training examples, or all, training examples first
    best
        the model of the best evaluation, instead of the last
    out
        a file to write (default: standard output)
    """
    model, dataset = load(run, best=best), _dataset(data, run)
    x, y = model.examples(dataset, part)
    shares = model.probabilities_of(dataset, x)
    names = [str(label) for label in model.labels]
    with _written(out) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["example", "label", "predicted", *names])
        for at, (true, each) in enumerate(zip(y, shares, strict=True)):
            cells = [f"{share:.6g}" for share in each]
            rows.writerow([at, names[true], names[each.argmax()], *cells])
    if out is not None:
        show(f"wrote {len(y)} predictions to {out}")


def _dataset(name: str, run: Path) -> Dataset:
    """Read as the run's own data was: what a user declared of that counts here, too."""
    if not (run / "config.json").is_file():
        return load_dataset(name)
    return load_dataset(name, replace(read_config(run).declared, test_share=0.0))


@contextmanager
def _written(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        yield file


def export_model(
    run: Place,
    /,
    *,
    format: Format,
    out: Place | None = None,
    best: Flag = False,
) -> None:
    """Write a trained model for other programs: ONNX, PyTorch, safetensors or one C file.

    Parameters
    ----------
    run
        a run folder, or a file of Model.save
    format
        onnx, torch and c read stored values and normalise them; safetensors holds the tensors
    out
        the file to write (default: model with the format's ending, in the working folder)
    best
        the model of the best evaluation, instead of the last
    """
    model = load(run, best=best)
    path = export(model, out or Path(f"model{_ENDING[format]}"), format)
    show(f"wrote {path}: {path.stat().st_size} bytes, {_about(model)}")


def _about(model: Model) -> str:
    shape = " x ".join(map(str, model.spec.input_shape))
    return f"{shape} values to {model.spec.output_shape[0]} classes, density {model.density:.1%}"
