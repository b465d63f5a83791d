"""One `fedlean profile`, from what was asked for to what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from fedlean.data.labels import MAX_CLASSES
from fedlean.data.load import load_dataset
from fedlean.engine.checks import MAX_BATCH_SIZE
from fedlean.engine.open import engine_for
from fedlean.measure.cases import plan
from fedlean.measure.link import measure_link
from fedlean.measure.probe import parse_address
from fedlean.measure.result import Measurement, measurement
from fedlean.measure.survey import Tell, survey
from fedlean.measure.visit import Setting
from fedlean.models.catalog import build
from fedlean.spec import ModelSpec

_MOST = {  # a round of more steps would take longer than any budget
    "batch_size": MAX_BATCH_SIZE,
    "local_steps": 1000,
    "threads": 1024,
    "repeats": 10_000,
    "classes": MAX_CLASSES,
}
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Request:
    """What to measure; the defaults are the model and the round of the paper's FEMNIST runs."""

    model: str = "conv2"
    dataset: str | None = None  # gives shape and classes; None: those below
    input_shape: tuple[int, ...] = (1, 28, 28)
    classes: int = 62
    batch_size: int = 20
    local_steps: int = 5
    densities: tuple[float, ...] = DENSITIES
    threads: int = 1
    repeats: int = 5
    seconds: float = 300.0
    link: str | None = None  # HOST:PORT of a responder


def measure_device(request: Request, name: str, tell: Tell) -> Measurement:
    """Measures this machine and calls the profile `name`.

    Raises ValueError naming what of the request is wrong or too much, OSError when the link's far
    end does not answer.
    """
    for field, most in _MOST.items():
        value = getattr(request, field)
        if value < 1:
            raise ValueError(f"{field} must be at least 1, got {value!r:.40}")
        if value > most:
            raise ValueError(f"{field} must be at most {most}, got {value!r:.40}")
    if not 0 < request.seconds < inf:
        raise ValueError(f"seconds must be positive, got {request.seconds:g}")
    spec = _spec(request)
    cases = plan(spec, request.densities)
    engine, _ = engine_for(spec, "native", request.threads)
    # First, as it is quick and a mistyped address should not cost a measurement.
    link = measure_link(*parse_address(request.link)) if request.link else None
    measured = survey(
        engine,
        spec,
        cases,
        Setting(request.batch_size, request.local_steps),
        repeats=request.repeats,
        budget_seconds=request.seconds,
        tell=tell,
    )
    return measurement(
        name, request.model, spec, measured, link, engine=engine, threads=request.threads
    )


def _spec(request: Request) -> ModelSpec:
    if request.dataset is None:
        return build(request.model, request.input_shape, request.classes)
    dataset = load_dataset(request.dataset)
    return build(request.model, dataset.input_shape, dataset.classes)
