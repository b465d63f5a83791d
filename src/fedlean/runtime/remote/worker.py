"""A device's half of a round: an envelope in, an envelope out, the same on every transport.

It keeps what need not be sent again, answers what it cannot do with the reason, and never raises
for what came in.  What decides the result (method, hyper-parameters, seed) is in the task; the
operator decides what a server cannot: the data, the memory limit, which methods may run.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlean import wire
from fedlean.core import ClientTask
from fedlean.data.batches import ClientData
from fedlean.data.moments import Moments, moments
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import Engine
from fedlean.printable import printable
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.budget import Budget, GaveUp, TimedBatches, TimedEngine, TooMuch
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.fitting import FittingEngine
from fedlean.runtime.remote.frozen import HeldFrozen
from fedlean.runtime.remote.held import (
    HeldPatterns,
    HeldSpecs,
    HeldStates,
    forget_old_runs,
    kept_identity,
)
from fedlean.runtime.remote.holding import Holding, held_by, mismatch
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.normalising import to_fields
from fedlean.runtime.remote.room import TooLarge, resident_bytes
from fedlean.spec import ModelSpec

log = logging.getLogger("fedlean")
LIMIT_BYTES = 1 << 28  # of a message and of what it decodes into, where the operator says nothing
MAX_TASK_SECONDS = 3600.0  # of a task, where the operator says nothing
LIMIT_FLOOR_BYTES = 1 << 16  # of the same, however little memory is left: it says why


class Worker:
    """One client on one device.

    folder: its files (`held`); data: its examples; client: its number, if the operator gave one;
    identity: who it is, in words that stay the same when it starts again and that nobody can guess;
    what may be shown comes before a space ("": drawn once and kept).
    memory_limit_bytes: of the whole process; methods: `module:function` methods that may run beside
    FedLean's own, whose modules this process would otherwise never import on a server's word.
    max_task_seconds: after which a task is given up, whatever the server's deadline is.
    """

    def __init__(
        self,
        folder: Path,
        data: ClientData,
        *,
        client: int | None = None,
        name: str = "",
        identity: str = "",
        engine: str = "native",
        threads: int = 1,
        memory_limit_bytes: int | None = None,
        methods: Collection[str] = (),
        max_task_seconds: float = MAX_TASK_SECONDS,
    ):
        self._folder = folder
        self._data = data
        self._client = client
        self._name = name
        self._identity = identity
        self._engine_name = engine
        self._threads = threads
        self._limit = memory_limit_bytes
        self._methods = frozenset(methods)
        self._max_task_seconds = max_task_seconds
        self._engines: dict[str, Engine] = {}  # by spec hash: one, warm
        self._run: _Run | None = None
        self._moments: Moments | None = None  # of its examples

    def answer(
        self,
        data: bytes | memoryview,
        *,
        age_seconds: float = 0.0,
        withdrawn: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """The reply to one envelope.  Whatever came in, it is an envelope.

        Who keeps no reference to `data` has its memory back before the training.  age_seconds:
        since it was sent; withdrawn: whether nobody waits for the reply any more.
        """
        try:
            asked = unseal(data, expected=(env.HELLO, env.MEASURE, env.TASK))
            if asked.kind == env.HELLO:
                return seal(self._welcome(asked.fields))
            if asked.kind == env.MEASURE:
                return seal(self._measured())
            waits = asked.fields["deadline_seconds"] - age_seconds
            budget = Budget(waits, self._max_task_seconds, withdrawn)
            budget.check()
            jobs = [self._job(asked, budget)]
            del asked, data  # the task has copies: a whole model's bytes are free while it trains
            return seal(self._update(jobs.pop()))
        except wire.UnknownSpec as error:
            return trouble(str(error), "spec")
        except wire.UnknownPattern as error:
            return trouble(str(error), "pattern")
        except wire.UnknownFrozen as error:
            return trouble(str(error), "frozen tensors")
        except GaveUp as error:
            log.warning("gave up a task: %s", error)
            return trouble(f"gave up: {error}", gave_up=True)
        except (TooLarge, wire.OverLimit) as error:
            log.warning("refused a task: %s", error)
            return trouble(str(error), final=isinstance(error, TooLarge), too_large=True)
        except (EnvelopeError, wire.WireError) as error:
            log.warning("refused a message: %s", error)
            return trouble(str(error))
        except (TooMuch, Refused) as error:
            log.warning("refused a task: %s", error)
            return trouble(str(error), final=True)
        except Exception as error:  # the round goes on without this device, and says why
            log.exception("a task failed")
            return trouble(f"{type(error).__name__}: {error}")

    def _welcome(self, hello: Mapping[str, Any]) -> Envelope:
        held = held_by(self._data)
        why = hello["refused"] or mismatch(held, Holding.from_fields(hello))
        if why is not None:
            log.error("this device cannot take part in run %s: %s", hello["run"], printable(why))
        fields = {
            "client": self._client,
            "num_examples": self._data.num_examples,
            "memory_bytes": self._memory_bytes(),
            **held.to_fields(),
            "device": (self._identity or kept_identity(self._folder))[:200],
            "name": self._name[:200],
        }
        return Envelope(env.WELCOME, fields)

    def _measured(self) -> Envelope:
        """What its examples add up to."""
        dataset, indices = self._data.dataset, self._data.indices
        if self._moments is None:
            whole = len(indices) == len(dataset.x_train)
            self._moments = moments(dataset.x_train if whole else dataset.x_train[indices])
        return Envelope(env.MOMENTS, to_fields(self._moments, dataset.scale))

    def _memory_bytes(self) -> int | None:
        """What is left for a task of the limit of the whole process."""
        if self._limit is None:
            return None
        engine = next(iter(self._engines.values()), None)
        if isinstance(engine, LimitedEngine):
            return max(0, engine.free_bytes())
        return max(0, self._limit - resident_bytes())

    def _job(self, asked: Envelope, budget: Budget) -> _Job:
        """What is to be done, decoded and checked."""
        fields = asked.fields
        client_update = self._method(fields["method"])
        run = self._open_run(fields["run"])
        task = self._task(asked.body, run)
        self._check_data(task, fields)
        return _Job(client_update, run, task, fields, budget)

    def _update(self, job: _Job) -> Envelope:
        client_update, run, task, fields, budget = job
        del job
        run.specs.keep(task.spec)
        run.patterns.keep(task.sub_model.masks)
        run.frozen.keep(wire.frozen_params(task), task.sub_model.masks)
        states = HeldStates(run.folder / f"states-{task.client}")
        state, lost = states.read(fields["committed"])
        began = time.perf_counter()
        batches = TimedBatches(self._as_the_run_has_it(fields), budget)
        engine = self._engine(task.spec)
        if fields["memory_bytes"] is not None:
            engine = FittingEngine(engine, fields["memory_bytes"])
        engine = TimedEngine(engine, budget)
        update, state = client_update(task, batches, engine, state)
        seconds = time.perf_counter() - began
        run.patterns.keep(update.sub_model.masks)
        states.write(fields["step"], state, committed=fields["committed"])
        task = replace(task, params={}, arrays={})  # their memory is needed for the reply
        os.utime(run.folder)  # by which the oldest runs are found and forgotten
        reply = {"step": fields["step"], "seconds": seconds, "lost_state": lost}
        return Envelope(env.UPDATE, reply, wire.encode_update(update, task))

    def _task(self, body: bytes | memoryview, run: _Run) -> ClientTask:
        limit = _array_limit_bytes(self._limit)
        held = run.specs, run.patterns, run.frozen
        return wire.decode_task(body, *held, limit_bytes=limit, packed=True)

    def _open_run(self, run: str) -> _Run:
        if self._run is None or self._run.folder.name != run:
            forget_old_runs(self._folder, run)
            self._run = _Run(self._folder / run)
        return self._run

    def _engine(self, spec: ModelSpec) -> Engine:
        if spec.hash not in self._engines:
            # not engine_for, which opens a dense session to ask whether it can
            engine: Engine = open_engine(self._engine_name, self._threads)
            if self._limit is not None:
                engine = LimitedEngine(engine, self._limit)
            self._engines = {spec.hash: engine}
        return self._engines[spec.hash]

    def _method(self, name: str) -> Callable[..., Any]:
        """`client_update` of a method's module."""
        if ":" not in name:
            if not name.isidentifier():
                raise Refused(f"no method is named {name[:80]!r}")
            module = f"fedlean.methods.{name}"
        elif name in self._methods:
            module = name.partition(":")[0]
        else:
            raise Refused(
                f"method {name[:80]!r} is not FedLean's: the operator allows it with "
                f"--allow-method {name[:80]}"
            )
        try:
            return importlib.import_module(module).client_update
        except (ImportError, AttributeError) as error:
            raise Refused(f"method {name!r} cannot be used on this device: {error}") from None

    def _check_data(self, task: ClientTask, fields: Any) -> None:
        dataset = self._data.dataset
        if task.spec.input_shape != dataset.input_shape:
            raise Refused(
                f"the model takes examples of shape {task.spec.input_shape}, this device holds "
                f"{dataset.input_shape}"
            )
        if len(fields["classes"]) > task.spec.output_shape[0]:
            raise Refused(
                f"the model has {task.spec.output_shape} outputs for {len(fields['classes'])} "
                "classes"
            )
        if self._client is not None and task.client != self._client:
            raise Refused(f"the task is for client {task.client}, this is client {self._client}")
        channels = dataset.input_shape[0]
        if not len(fields["mean"]) == len(fields["std"]) == channels:
            raise Refused(f"mean and std must have {channels} numbers, one per channel")
        if not all(value > 0 for value in fields["std"]):
            raise Refused(f"std must be positive, got {fields['std']}")

    def _as_the_run_has_it(self, fields: Any) -> ClientData:
        """With the federation's classes, mean and deviation, which all devices share."""
        mean, std = (np.array(fields[name], np.float32) for name in ("mean", "std"))
        held = self._data.dataset
        try:
            mapped = held.with_classes(fields["classes"])
        except ValueError as error:
            raise Refused(str(error)) from None
        if not (np.array_equal(held.mean, mean) and np.array_equal(held.std, std)):
            mapped = replace(mapped, mean=mean, std=std)
        if mapped is not held:
            self._data = ClientData(mapped, self._data.indices)
        return self._data


def message_limit_bytes(memory_limit_bytes: int | None) -> int:
    """Of a message: it is held as bytes, as arrays and in the session, a third each."""
    if memory_limit_bytes is None:
        return LIMIT_BYTES
    return max(LIMIT_FLOOR_BYTES, (memory_limit_bytes - resident_bytes()) // 3)


def _array_limit_bytes(memory_limit_bytes: int | None) -> int:
    """Of what a message decodes into: it is in memory already, and the engine checks its own."""
    if memory_limit_bytes is None:
        return LIMIT_BYTES
    return max(LIMIT_FLOOR_BYTES, memory_limit_bytes - resident_bytes())


class Refused(ValueError):
    """What this device will not do; the message says why."""


class _Run:
    """What is held for one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.specs = HeldSpecs(folder)
        self.patterns = HeldPatterns(folder)
        self.frozen = HeldFrozen(folder)


class _Job(NamedTuple):
    """One task and what goes with it."""

    client_update: Callable[..., Any]
    run: _Run
    task: ClientTask
    fields: Mapping[str, Any]
    budget: Budget


def trouble(
    reason: str,
    missing: str | None = None,
    *,
    final: bool = False,
    gave_up: bool = False,
    too_large: bool = False,
) -> bytes:
    """The envelope that says why there is no update, and whether asking again helps."""
    fields = {"reason": reason[:1000], "missing": missing, "final": final, "gave_up": gave_up}
    fields["too_large"] = too_large
    return seal(Envelope(env.TROUBLE, fields))
