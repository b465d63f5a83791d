"""A run from its first step to its outcome: what is evaluated, logged and kept."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlean.core import Masks, Model, Params
from fedlean.data.batches import ClientData
from fedlean.printable import megabytes
from fedlean.runtime.checkpoint import state_tree
from fedlean.runtime.evaluate import Score
from fedlean.runtime.how import How
from fedlean.runtime.local import ToDevices
from fedlean.runtime.method import model_of
from fedlean.runtime.modelfile import About
from fedlean.runtime.notices import about_masks
from fedlean.runtime.outofmemory import memory_for
from fedlean.runtime.personal import personalised
from fedlean.runtime.prepared import Prepared
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import LoopState, run_rounds
from fedlean.runtime.runlog import Totals, log_entry
from fedlean.runtime.served import class_counts, served
from fedlean.runtime.summary import summary_of

CHECKPOINT_SECONDS = (5.0, 60.0)  # between two of them, at least and, where they take long, at most
CHECKPOINT_SHARE = 0.005  # of a run's time


@dataclass(frozen=True)
class Finished:
    """What a run comes to."""

    summary: dict[str, Any]
    document: dict[str, Any]  # of `config.json`
    model: Model
    best: Model  # of the evaluation with the highest accuracy
    about: About
    interrupted: bool  # by Ctrl-C, where `how` says that it may be


def go(
    run: Prepared,
    document: dict[str, Any],
    progress: LoopState,
    totals: Totals,
    best: Model | None,
) -> Finished:
    config, keeper, tested = run.config, run.keeper, len(run.dataset.y_test) > 0
    book = _Book(totals, progress, progress.state.params, _pause_seconds(run.how, 0.0), best)

    def after_step(progress: LoopState, record: StepRecord, last: bool) -> bool:
        """Whether to go on."""
        keeper.check()
        state = progress.state
        book.totals = book.totals.after(record, config.num_clients)
        due = state.round % config.eval_every == 0 or last
        model = model_of(run.algorithm, run.server, state)
        moved = state.params is not book.params or last  # initial pruning leaves them for long
        with memory_for("the evaluation of the model"):
            score = run.evaluate(model, last) if due and moved and tested else None
        book.score = score if last else None
        book.params = state.params
        if score is not None:
            if book.best is None or score.accuracy > book.totals.best_accuracy:
                book.best = model
            book.totals = book.totals.scored(state.round, score.accuracy, config.target_accuracy)
        _note_empty_layers(run, book, record, model.masks)
        _note_memory(run, book, record)
        entry = log_entry(
            round=state.round,
            phase=record.tasks[0].phase if record.tasks else state.phase,
            record=record,
            totals=book.totals,
            clients=config.num_clients,
            score=score,
            model=model,
            whole=run.server.spec,
            reported=run.algorithm.report(state) if run.algorithm.report else {},
        )
        keeper.append(entry)
        book.last_entry, book.progress = entry, progress
        began = time.monotonic()
        saved = last or began - book.saved_at >= book.pause_seconds
        if saved:
            _checkpoint(run, progress, book)
            book.saved_at = time.monotonic()
            book.pause_seconds = _pause_seconds(run.how, book.saved_at - began)
        if run.how.watch(entry) is not False:
            return True
        book.stopped = not last
        if not saved:
            _checkpoint(run, progress, book)
        return False

    interrupted = False
    try:
        progress = run_rounds(
            run.algorithm,
            progress,
            server=run.server,
            dispatch=run.dispatch,
            after_step=after_step,
            max_update_norm=config.max_update_norm,
        )
    except KeyboardInterrupt:
        if not run.how.interruptible:
            raise
        interrupted, progress = True, book.progress
        _checkpoint(run, progress, book)
    finally:
        keeper.close()
    keeper.check()
    return _finish(run, document, progress, book, interrupted=interrupted)


def _note_empty_layers(run: Prepared, book: _Book, record: StepRecord, masks: Masks) -> None:
    """Once for the same layers, however often the masks are drawn anew."""
    if masks is book.masks:
        return
    lines = about_masks(masks)
    for line in lines:
        if line not in about_masks(book.masks):
            run.how.say(line)
            record.notes.append(line)
    book.masks = masks


def _note_memory(run: Prepared, book: _Book, record: StepRecord) -> None:
    """Once, where no fleet keeps such tasks from a client that the emulated device could not be."""
    needs, has = record.cost.peak_memory_bytes, run.server.profile.memory_bytes
    if book.memory_noted or run.config.fleet or needs <= has or not run.dispatch.clients():
        return
    book.memory_noted = True
    line = (
        f"a client's work takes {megabytes(needs)}, modelled, and {run.config.device} has "
        f"{megabytes(has)}: take a smaller --batch, or a method that 'fedlean plan' says fits"
    )
    run.how.say(line)
    record.notes.append(line)


@dataclass
class _Book:
    """What `after_step` keeps between steps."""

    totals: Totals
    progress: LoopState  # after the last whole step
    params: Params  # of the step before
    pause_seconds: float  # between the last checkpoint and the next
    best: Model | None  # of the evaluation with the highest accuracy so far
    masks: Masks = field(default_factory=dict)  # of the step before
    last_entry: dict[str, Any] | None = None
    score: Score | None = None  # of the last step, where it was evaluated
    saved_at: float = field(default_factory=time.monotonic)
    stopped: bool = False  # before its last round
    memory_noted: bool = False


def _pause_seconds(how: How, took_seconds: float) -> float:
    if how.checkpoint_seconds is not None:
        return how.checkpoint_seconds
    least, most = CHECKPOINT_SECONDS
    return min(max(least, took_seconds / CHECKPOINT_SHARE), most)


def _checkpoint(run: Prepared, progress: LoopState, book: _Book) -> None:
    clients = {str(client): dict(s) for client, s in run.dispatch.client_states().items()}
    tree = {
        "step": progress.step,
        "empty_steps": progress.empty_steps,
        "refused_steps": progress.refused_steps,
        "moves": asdict(progress.moves),
        "state": state_tree(progress.state),
        "store": progress.store.to_tree(),
        "clients": clients,
        "totals": asdict(book.totals),
    }
    run.keeper.checkpoint(progress.step, tree, book.best)


def _finish(
    run: Prepared, document: dict[str, Any], progress: LoopState, book: _Book, *, interrupted: bool
) -> Finished:
    state, config = progress.state, run.config
    model = model_of(run.algorithm, run.server, state)
    early = book.stopped or interrupted  # so that the last evaluation was one during the run
    final = book.last_entry["accuracy"] if book.last_entry else run.keeper.last_accuracy()
    if len(run.dataset.y_test):
        if book.score is None:
            book.score = run.evaluate(model, True)
        if final is None or (early and config.eval_examples):
            final = book.score.accuracy
    held = run.dispatch.held() if isinstance(run.dispatch, ToDevices) else {}
    summary = summary_of(
        config, run.server, state, model, book.totals, final, run.data_changes, held
    )
    summary["notes"] = list(run.notes)
    if book.score is not None:
        summary |= _whom_it_serves(run, model, book.score)
    best = model if book.best is None else book.best
    run.keeper.finish(model, best, None if interrupted else summary)
    return Finished(summary, document, model, best, run.about, interrupted)


def _whom_it_serves(run: Prepared, model: Model, score: Score) -> dict[str, Any]:
    """Errors by class; of clients in this process also what each may expect, and what it gains."""
    here = run.dispatch.clients()
    clients = {client: one for client, one in here.items() if isinstance(one, ClientData)}
    names = run.dataset.class_names
    held = {client: class_counts(one.labels, len(names)) for client, one in clients.items()}
    found: dict[str, Any] = {"served": served(score.confusion, held, names)}
    if run.config.personalize:
        found["personal"] = personalised(
            model,
            clients,
            run.server.engine,
            run.evaluate,
            run.config.settings,
            steps=run.config.personalize,
            seed=run.config.seed,
        )
    return found
