"""The JSON part: everything small.  Canonical text in, checked values out.

Encoding runs the same checks as decoding, so what can be sent can be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from types import MappingProxyType
from typing import Any, get_args

from fedlean.core import Reduction, Scalar, Work
from fedlean.spec import ModelSpec
from fedlean.wire.errors import WireError

MAX_JSON_BYTES = 1 << 20
_MAX_INT = (1 << 63) - 1

# Statistic name -> (reduction, tensor name -> (dtype, shape; None: the shape of that tensor)).
TensorForm = tuple[str, tuple[int, ...] | None]
Table = Mapping[str, tuple[Reduction, Mapping[str, TensorForm]]]
STATISTIC_DTYPES = {"f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8", "b1": "?"}
BFLOAT16 = "bf"  # float32 whose values all have 16 bits only: their upper halves travel
FLOAT16 = "f2"  # float32 whose values are all of float16
SCALED = "q1"  # float32 that are steps of one scale: the scale and an int8 each
_MAX_WORKS = 256  # stretches of one task: each is priced
SPARSE = "s"  # behind either code of float32: a pattern and the values that are not 0
STATISTIC_CODES = frozenset(
    {*STATISTIC_DTYPES, BFLOAT16, FLOAT16, SCALED, "f4" + SPARSE, BFLOAT16 + SPARSE}
)
_MAX_AXES = 8
_MAX_ELEMENTS = 1 << 31

# Numbers of a `Work` in the order in which they are written, with their defaults.  A new one joins
# at the end, so that what was written before it can still be read.
AS_MASKED: Mapping[str, int] = MappingProxyType({})  # as many as the sub-model's masks keep
_WORK: dict[str, int] = {f.name: f.default for f in fields(Work) if isinstance(f.default, int)}


@dataclass(frozen=True)
class TaskFields:
    phase: str
    hparams: Mapping[str, Scalar]
    arrays: Mapping[str, Mapping[str, TensorForm]]


@dataclass(frozen=True)
class UpdateFields:
    metrics: Mapping[str, float]
    work: tuple[Work, ...]
    statistics: Table


def dump(document: dict[str, Any], what: str = "JSON part") -> bytes:
    """Canonical UTF-8 JSON.  Raises WireError for NaN, infinity, lone surrogates or > 1 MiB."""
    try:
        text = json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"{what}: {error}") from None
    if len(text) > MAX_JSON_BYTES:
        raise WireError(f"{what} has {len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    return text


def load(raw: bytes, what: str) -> dict[str, Any]:
    """The object in `raw`, whose length the caller has checked."""
    try:
        document = json.loads(raw.decode())
    except RecursionError:
        raise WireError(f"{what}: nested too deep") from None
    except ValueError as error:
        raise WireError(f"{what}: {error}") from None
    if not isinstance(document, dict):
        raise WireError(f"{what}: expected an object, got {type(document).__name__}")
    return document


def load_canonical(raw: bytes) -> dict[str, Any]:
    """As `load`; one document has one text, so repeated keys, 1e999 and spaces are refused too."""
    document = load(raw, "JSON part")
    if dump(document) != raw:
        raise WireError("JSON part: not canonical")
    return document


def read_task(document: dict[str, Any]) -> TaskFields:
    _only(document, {"phase", "hparams", "arrays"}, "task")
    hparams = _object(document.get("hparams", {}), "hparams")
    arrays = _object(document.get("arrays", {}), "arrays")
    return TaskFields(
        phase=_text(document.get("phase", ""), "phase"),
        hparams={key: _scalar(value, f"hparam {key!r}") for key, value in hparams.items()},
        arrays={
            key: _read_forms(_object(forms, f"arrays {key!r}"), key)
            for key, forms in arrays.items()
        },
    )


def read_update(document: dict[str, Any]) -> UpdateFields:
    _only(document, {"metrics", "work", "statistics"}, "update")
    metrics = _object(document.get("metrics", {}), "metrics")
    statistics = _object(document.get("statistics", {}), "statistics")
    return UpdateFields(
        metrics={key: float(_number(value, f"metric {key!r}")) for key, value in metrics.items()},
        work=_read_works(_list(document.get("work", []), "work")),
        statistics={key: _read_statistic(value, key) for key, value in statistics.items()},
    )


def write_work(work: Work) -> list[Any]:
    """The counts in their order without the defaults at the end, the width, the span with the taps,
    `kept`.

    The width is left out where it is 1, the span where it is the whole model without taps, and
    `kept` where it is empty; an empty object stands for `AS_MASKED`.

    >>> write_work(Work(steps=5, batch_size=20, kept={"fc.weight": 48}))
    [5, 20, {'fc.weight': 48}]
    >>> write_work(Work(steps=5, begin="relu"))
    [5, ['relu', '']]
    >>> write_work(Work(steps=5, taps=("exit", "fc")))
    [5, ['', '', 'exit', 'fc']]
    >>> write_work(Work(steps=5, width=0.5))
    [5, 0.5]
    """
    values = [getattr(work, name) for name in _WORK]
    defaults = list(_WORK.values())
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    names = [work.begin, work.end, *work.taps]
    span = [names] if any(names) else []
    kept = [dict(work.kept)] if work.kept or work.kept is AS_MASKED else []
    width = [work.width] if work.width != 1 else []
    return [*values, *width, *span, *kept]


def check_kept(works: tuple[Work, ...], spec: ModelSpec) -> None:
    """Raises WireError where work was done on tensors or layers that `spec` does not have."""
    for work in works:
        places = [("begin", work.begin), ("end", work.end), *(("taps", tap) for tap in work.taps)]
        for what, name in places:
            if (name or what == "taps") and name not in spec.by_name:
                raise WireError(f"work.{what}: {_short(name)} names no layer of the spec")
        for name in work.kept:
            if name not in spec.tensor_shapes:
                raise WireError(f"work.kept: {_short(name)} names no tensor of the spec")


def write_statistic(
    reduction: str, forms: Mapping[str, TensorForm], *, short: bool = False
) -> list[Any] | dict[str, Any]:
    """The inverse of `_read_statistic`; null stands for float32 in the tensor's own shape.

    `short` leaves out "mean".
    """
    tensors = write_forms(forms)
    return tensors if short and reduction == "mean" else [reduction, tensors]


def write_forms(forms: Mapping[str, TensorForm]) -> dict[str, Any]:
    return {name: _write_form(*form) for name, form in forms.items()}


def _write_form(dtype: str, shape: tuple[int, ...] | None) -> list[Any] | None:
    if shape is None:
        return None if dtype == "f4" else [dtype, None]
    return [dtype, list(shape)]


def _read_works(entries: list[Any]) -> tuple[Work, ...]:
    if len(entries) > _MAX_WORKS:
        raise WireError(f"work has {len(entries)} entries, the limit is {_MAX_WORKS}")
    return tuple(map(_read_work, entries))


def _read_work(entry: Any) -> Work:
    match entry:
        case [*values, dict(kept)]:
            kept = kept or AS_MASKED
        case [*values]:
            kept = {}
        case _:
            raise WireError(f"work must be a list, got {_short(entry)}")
    begin, end, taps = "", "", ()
    if values and isinstance(values[-1], list):
        begin, end, *taps = _read_span(values.pop())
    width = 1.0
    if values and isinstance(values[-1], float):
        width = values.pop()
        if not 0 < width < 1:
            raise WireError(f"work.width must be between 0 and 1, got {width}")
    if len(values) > len(_WORK):
        raise WireError(f"work has {len(values)} numbers, expected at most {len(_WORK)}")
    counts = {
        name: _count(value, f"work.{name}") for name, value in zip(_WORK, values, strict=False)
    }
    if kept is not AS_MASKED:
        kept = {name: _count(value, f"work.kept {name!r}") for name, value in kept.items()}
    return Work(**counts, kept=kept, begin=begin, end=end, taps=tuple(taps), width=width)


def _read_span(entry: list[Any]) -> list[str]:
    """Its beginning, its end and the taps."""
    if len(entry) >= 2 and any(entry) and all(isinstance(name, str) for name in entry):
        return entry
    raise WireError(
        f"work: a span must be two names and the taps', not all empty, got {_short(entry)}"
    )


def _read_statistic(entry: Any, name: str) -> tuple[Reduction, Mapping[str, TensorForm]]:
    match entry:
        case dict(tensors):
            reduction = "mean"
        case [reduction, dict(tensors)]:
            pass
        case _:
            raise WireError(f"statistic {name!r}: expected [reduction, tensors]")
    if reduction not in get_args(Reduction):
        raise WireError(f"statistic {name!r}: unknown reduction {reduction!r}")
    return reduction, _read_forms(tensors, name)


def _read_forms(tensors: Mapping[str, Any], name: str) -> dict[str, TensorForm]:
    return {key: _read_form(form, f"{name}.{key}") for key, form in tensors.items()}


def _read_form(form: Any, what: str) -> TensorForm:
    match form:
        case None:
            return "f4", None
        case [str(dtype), None] if dtype in STATISTIC_CODES:
            return dtype, None
        case [str(dtype), list(sides)] if dtype in STATISTIC_CODES:
            return dtype, _shape(sides, what)
    raise WireError(f"statistic {what!r}: expected null or [dtype, shape], got {_short(form)}")


def _shape(sides: list[Any], what: str) -> tuple[int, ...]:
    """A shape that NumPy can hold; zero sides are fine, so they are left out of the product."""
    elements = 1
    if len(sides) > _MAX_AXES:
        raise WireError(f"statistic {what!r}: {len(sides)} axes, the limit is {_MAX_AXES}")
    for side in sides:
        elements *= max(_count(side, f"statistic {what!r}: a side"), 1)
    if elements > _MAX_ELEMENTS:
        raise WireError(f"statistic {what!r}: the shape is absurd")
    return tuple(sides)


def _only(document: dict[str, Any], known: set[str], what: str) -> None:
    for key in document:
        if key not in known:
            raise WireError(f"{what}: unknown field {_short(key)}")


def _checked(kind: type | tuple[type, ...], expected: str) -> Callable[[Any, str], Any]:
    def check(value: Any, what: str) -> Any:
        if not isinstance(value, kind):
            raise WireError(f"{what} must be {expected}, got {_short(value)}")
        return value

    return check


_object = _checked(dict, "an object")
_list = _checked(list, "a list")
_text = _checked(str, "a string")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise WireError(f"{what} must be a number, got {_short(value)}")
    if isinstance(value, float) and not isfinite(value):
        raise WireError(f"{what} must be finite, got {value}")
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise WireError(f"{what} is an integer of more than 64 bits")
    return value


def _scalar(value: Any, what: str) -> Scalar:
    return value if isinstance(value, str | bool) else _number(value, what)


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT:
        raise WireError(f"{what} must be a count, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """Enough of a stranger's value for a log line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or too many digits
        text = type(value).__name__
    return text if len(text) <= 60 else text[:60] + "..."
