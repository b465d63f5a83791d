"""Where a run leaves what it makes: in its folder, or nowhere (docs/run-folder.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedlean.core import Model, Params
from fedlean.runtime.checkpoint import save_checkpoint, write_atomically
from fedlean.runtime.config import write_document
from fedlean.runtime.lock import Lock
from fedlean.runtime.modelfile import read_stored, write_model
from fedlean.runtime.runlog import RunLog, last_accuracy
from fedlean.runtime.start import keep
from fedlean.spec import ModelSpec

MODEL, BEST = "model.safetensors", "best.safetensors"


class Keeper(Protocol):
    """What the runtime does with a run's outcome while it goes on."""

    def check(self) -> None:
        """Raises Superseded once the run is another process's."""
        ...

    def begin(self, document: dict[str, Any], given: Model | None, rest: Params) -> None:
        """A new run; `given` is the model that it starts from, where that is not its seed's.

        rest: what the module that the model came from holds beside it.
        """
        ...

    def go_on(self, document: dict[str, Any] | None, log_bytes: int) -> None:
        """An earlier run, whose configuration is now `document` (None: as it was)."""
        ...

    def append(self, entry: Mapping[str, Any]) -> None: ...

    def checkpoint(self, step: int, tree: dict[str, Any], best: Model | None) -> None: ...

    def last_accuracy(self) -> float | None: ...

    def finish(self, model: Model, best: Model | None, summary: dict[str, Any] | None) -> None:
        """summary: None for a run that was interrupted."""
        ...

    def close(self) -> None: ...


class Nowhere:
    """A run without a folder; its caller has what it gives back."""

    def check(self) -> None:
        pass

    def begin(self, document: dict[str, Any], given: Model | None, rest: Params) -> None:
        pass

    def go_on(self, document: dict[str, Any] | None, log_bytes: int) -> None:
        raise ValueError("a run that was not written cannot be continued: give it an 'out'")

    def append(self, entry: Mapping[str, Any]) -> None:
        pass

    def checkpoint(self, step: int, tree: dict[str, Any], best: Model | None) -> None:
        pass

    def last_accuracy(self) -> float | None:
        return None

    def finish(self, model: Model, best: Model | None, summary: dict[str, Any] | None) -> None:
        pass

    def close(self) -> None:
        pass


class InFolder:
    """A run folder, which the process holds.  spec: the run's."""

    def __init__(self, folder: Path, lock: Lock, spec: ModelSpec, rest: Params):
        self._folder, self._lock, self._spec, self._rest = folder, lock, spec, rest
        self._log: RunLog | None = None
        self._best: Model | None = None  # that the folder holds

    def check(self) -> None:
        self._lock.check()

    def begin(self, document: dict[str, Any], given: Model | None, rest: Params) -> None:
        self._lock.own()
        if given is not None:
            keep(self._folder, given, rest)
        write_document(self._folder, document)
        self._log = RunLog(self._folder / "rounds.jsonl")

    def go_on(self, document: dict[str, Any] | None, log_bytes: int) -> None:
        self._lock.own()
        self._log = RunLog(self._folder / "rounds.jsonl", keep_bytes=log_bytes)
        if document is not None:
            write_document(self._folder, document)

    def append(self, entry: Mapping[str, Any]) -> None:
        assert self._log is not None
        self._log.append(entry)

    def checkpoint(self, step: int, tree: dict[str, Any], best: Model | None) -> None:
        assert self._log is not None
        self._write_best(best)  # before: a checkpoint says that it was reached
        tree["log_bytes"] = self._log.sync()
        save_checkpoint(self._folder / "checkpoint", step, tree)

    def last_accuracy(self) -> float | None:
        return last_accuracy(self._folder)

    def finish(self, model: Model, best: Model | None, summary: dict[str, Any] | None) -> None:
        write_model(self._folder / MODEL, model, self._spec, rest=self._rest)
        self._write_best(best)
        if summary is not None:
            write_atomically(self._folder / "summary.json", json.dumps(summary, indent=1).encode())

    def _write_best(self, best: Model | None) -> None:
        if best is not None and best is not self._best:
            write_model(self._folder / BEST, best, self._spec, rest=self._rest)
            self._best = best

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def read_best(folder: Path, spec: ModelSpec) -> Model | None:
    """Of a run that goes on; None where there is none, as in early folders."""
    path = folder / BEST
    return read_stored(path, spec).model if path.is_file() else None
